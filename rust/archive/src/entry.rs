//! One entry of a stream.

use crate::meta::Meta;
use crate::sparse::Map;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A file of `size` bytes; with `map`, only these pieces of it are in the stream.
    File {
        /// Bytes of the file.
        size: u64,
        /// Where its data is, if it has holes.
        map: Option<Map>,
    },
    /// A symbolic link; its target is data that nobody follows.
    Symlink(Vec<u8>),
    /// A further name of a file that came before, by its path in the stream.
    Hardlink(Vec<u8>),
    /// A device or a named pipe: only images have them.
    Special(Special),
}

/// What stands for no data: a device or a named pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// A character device with its numbers.
    Character(u32, u32),
    /// A block device with its numbers.
    Block(u32, u32),
    /// A named pipe.
    Pipe,
}

/// One entry: a name and what stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The path in the stream, as it is there.
    pub path: Vec<u8>,
    /// What stands there.
    pub kind: Kind,
    /// Its mode, owner and times.
    pub meta: Meta,
}

impl Entry {
    /// Bytes of file data that follow in the stream.
    pub fn data_bytes(&self) -> u64 {
        match &self.kind {
            Kind::File { map: Some(map), .. } => map.data_bytes(),
            Kind::File { size, map: None } => *size,
            _ => 0,
        }
    }
}
