//! What a stream may hold. Each limit is checked before anything is kept for what exceeds it.

/// A path, with its slashes: what the kernel takes.
pub const PATH_MAX: usize = 4095;
/// One component of a path.
pub const NAME_MAX: usize = 255;
/// Directories inside one another; each costs an open descriptor.
pub const DEPTH_MAX: usize = 256;
/// The target of a symbolic link.
pub const LINK_MAX: usize = 4095;
/// Files, directories and links of one stream.
pub const ENTRIES_MAX: u64 = 4_000_000;
/// The size that a file may have, holes counted.
pub const FILE_BYTES_MAX: u64 = 1 << 44;
/// The data of one stream.
pub const STREAM_BYTES_MAX: u64 = 1 << 44;
/// The extended header of one entry.
pub const EXTENDED_BYTES_MAX: u64 = 64 << 10;
/// Pieces of data in one sparse file. What is more broken up is sent whole.
pub const PIECES_MAX: usize = 1 << 18;
/// Zero bytes behind the end of a stream.
pub const PADDING_BYTES_MAX: u64 = 1 << 20;
/// Files with several names that are known again; further names become files of their own.
pub const LINKED_FILES_MAX: usize = 1 << 18;
/// What is remembered of an image's entries that files can't say: paths and attributes, in bytes.
pub const REMEMBERED_BYTES_MAX: usize = 256 << 20;
/// Notes that are kept.
pub const NOTES_MAX: usize = 20;
/// What one read or write moves.
pub const BUFFER_BYTES: usize = 256 << 10;
