//! The FUSE protocol, as far as a read-only directory of files needs it: bytes to requests and
//! replies to bytes. No I/O; every length is checked before anything is read.
//!
//! ```text
//! request:  0 length u32   4 opcode u32   8 unique u64   16 node u64   24 uid u32   28 gid u32
//!          32 pid u32     36 extensions u16  38 padding u16            40 arguments
//! reply:    0 length u32   4 error i32 (0 or -errno)   8 unique u64    16 data
//! notice:   0 length u32   4 code i32                  8 zero u64      16 data
//! ```
//!
//! Facts of the kernel that this rests on (Linux 6.18, protocol 7.45):
//! - A request that a dead server had read is queued again after NOTICE_RESEND with bit 63 of its
//!   `unique` set; the reply has to carry the bit as well.
//! - FORGET, BATCH_FORGET and INTERRUPT get no reply. What is not known is refused with ENOSYS,
//!   which the kernel remembers and does not ask again.

/// The length of a request's head.
pub const REQUEST_HEAD: usize = 40;
/// The length of a reply's head.
pub const REPLY_HEAD: usize = 16;
/// Bytes that the kernel wants to have room for at each read of the device.
pub const REQUEST_BYTES_MAX: usize = (1 << 20) + 4096;
/// Bytes of the largest READ that is granted.
pub const READ_BYTES_MAX: usize = 1 << 20;
/// The node of the directory.
pub const ROOT: u64 = 1;
/// Bytes of a name.
pub const NAME_BYTES_MAX: usize = 255;

/// Notice: pages of a file for the page cache.
pub const NOTICE_STORE: i32 = 4;
/// Notice: what was read and not answered is to be queued again.
pub const NOTICE_RESEND: i32 = 7;

/// Kernel feature: requests that were read and not answered can be asked for again (Linux 6.9).
pub const HAS_RESEND: u64 = 1 << 39;
/// Kernel feature: a file can be passed through to another (Linux 6.9).
pub const PASSTHROUGH: u64 = 1 << 37;
const ASYNC_READ: u64 = 1;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const WANTED: u64 = ASYNC_READ | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND | PASSTHROUGH;
/// File systems above a file that is passed through: itself. One that lies on an overlay is not
/// passed through: what is mapped of it would have another name and number.
const STACK_DEPTH: u32 = 1;

const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// A close must not wait for a server: whoever closes may be the server's own process.
const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Not beside KEEP_CACHE: the kernel fails such an open.
const FOPEN_PASSTHROUGH: u32 = 1 << 7;

const MAJOR: u32 = 7;
/// The version whose INIT reply has `flags2`; older kernels are answered all the same.
const MINOR: u32 = 40;
const MINOR_MIN: u32 = 23;
const FOREVER_S: u64 = 1 << 32;

/// One request, its arguments checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request<'a> {
    /// Names it in the reply.
    pub unique: u64,
    /// What it is about.
    pub node: u64,
    /// The thread that waits, in the server's pid namespace; 0 where it has none there.
    pub pid: u32,
    /// What is asked.
    pub call: Call<'a>,
}

/// What is asked of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call<'a> {
    /// The kernel's greeting.
    Init(Init),
    /// A name in the directory.
    Lookup(&'a [u8]),
    /// Attributes of a node; also SETATTR, which changes nothing.
    Attributes,
    /// A file is opened.
    Open,
    /// A directory is opened.
    OpenDirectory,
    /// Bytes of a file.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at most [`READ_BYTES_MAX`].
        size: u32,
    },
    /// The file system as a whole.
    Statistics,
    /// Something that succeeds without doing anything.
    Nothing,
    /// Something that gets no reply.
    Silent,
    /// A signal came to whoever waits for the reply to this request.
    Interrupt(u64),
    /// Something that this server does not do.
    Unknown,
}

/// The kernel's greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Protocol version.
    pub major: u32,
    /// Its minor part.
    pub minor: u32,
    /// What the kernel would read ahead at most.
    pub readahead_bytes: u32,
    /// Features, both halves.
    pub features: u64,
}

/// Why a request could not be parsed; the kernel made it, so this is a bug of somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than its head, or than it says.
    Length,
    /// The arguments of this opcode are cut.
    Arguments(u32),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at + 8)?;
    let mut whole = [0; 8];
    whole.copy_from_slice(word);
    Some(u64::from_ne_bytes(whole))
}

impl<'a> Request<'a> {
    /// Parses what one read of the device returned.
    ///
    /// # Errors
    /// Where it is cut or longer than it says.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let head = bytes.get(..REQUEST_HEAD).ok_or(Malformed::Length)?;
        let word = |at| u32_at(head, at).ok_or(Malformed::Length);
        let long = |at| u64_at(head, at).ok_or(Malformed::Length);
        if word(0)? as usize != bytes.len() {
            return Err(Malformed::Length);
        }
        let opcode = word(4)?;
        let call = call(opcode, &bytes[REQUEST_HEAD..]).ok_or(Malformed::Arguments(opcode))?;
        Ok(Self {
            unique: long(8)?,
            node: long(16)?,
            pid: word(32)?,
            call,
        })
    }

    /// What names a request whose arguments can't be read: it is refused, not left to hang.
    pub fn unique_of(bytes: &[u8]) -> Option<u64> {
        u64_at(bytes, 8)
    }
}

fn call(opcode: u32, arguments: &[u8]) -> Option<Call<'_>> {
    Some(match opcode {
        1 => Call::Lookup(name(arguments)?),
        3 | 4 => Call::Attributes,
        14 => Call::Open,
        15 => Call::Read {
            offset: u64_at(arguments, 8)?,
            size: u32_at(arguments, 16).filter(|size| *size as usize <= READ_BYTES_MAX)?,
        },
        17 => Call::Statistics,
        // RELEASE, FLUSH, RELEASEDIR, ACCESS, DESTROY
        18 | 25 | 29 | 34 | 38 => Call::Nothing,
        26 => Call::Init(init(arguments)?),
        27 => Call::OpenDirectory,
        2 | 42 => Call::Silent,
        36 => Call::Interrupt(u64_at(arguments, 0)?),
        _ => Call::Unknown,
    })
}

/// A name ends with NUL and has none before.
fn name(arguments: &[u8]) -> Option<&[u8]> {
    let (last, name) = arguments.split_last()?;
    let plain = *last == 0 && !name.contains(&0) && name.len() <= NAME_BYTES_MAX;
    plain.then_some(name)
}

fn init(arguments: &[u8]) -> Option<Init> {
    let low = u32_at(arguments, 12)?;
    let high = match u64::from(low) & INIT_EXT {
        0 => 0,
        _ => u32_at(arguments, 16)?,
    };
    Some(Init {
        major: u32_at(arguments, 0)?,
        minor: u32_at(arguments, 4)?,
        readahead_bytes: u32_at(arguments, 8)?,
        features: u64::from(low) | u64::from(high) << 32,
    })
}

/// A file as the kernel is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Its node.
    pub node: u64,
    /// The number that users see: the same for each node that a name ever had.
    pub inode: u64,
    /// When it was written: seconds and nanoseconds. Of one that is passed through, as the file
    /// behind it says; no other has a time.
    pub modified: (u64, u32),
    /// Its size; of the directory, 0.
    pub size_bytes: u64,
    /// Whose it is.
    pub uid: u32,
    /// And of which group.
    pub gid: u32,
}

/// The bytes of a reply, put together from words.
#[derive(Debug, Default)]
struct Words(Vec<u8>);

impl Words {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
    fn attributes(self, of: &Attributes) -> Self {
        let (mode, links) = match of.node {
            ROOT => (libc::S_IFDIR | 0o500, 2),
            _ => (libc::S_IFREG | 0o400, 1),
        };
        self.u64(of.inode)
            .u64(of.size_bytes)
            .u64(of.size_bytes.div_ceil(512))
            .u64(0) // times of access, of writing, of change
            .u64(of.modified.0)
            .u64(0)
            .u32(0)
            .u32(of.modified.1)
            .u32(0)
            .u32(mode)
            .u32(links)
            .u32(of.uid)
            .u32(of.gid)
            .u32(0)
            .u32(4096)
            .u32(0)
    }
}

/// The head of a reply or a notice in front of `data_bytes`.
pub fn head(unique: u64, error_or_code: i32, data_bytes: usize) -> [u8; REPLY_HEAD] {
    let mut bytes = [0; REPLY_HEAD];
    let length = (REPLY_HEAD + data_bytes) as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&error_or_code.to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// The features that are granted to a kernel that offers `offered`.
pub fn granted(offered: u64) -> u64 {
    offered & WANTED
}

/// The answer to a greeting; None where the kernel is too old to be served.
pub fn init_reply(asked: &Init) -> Option<Vec<u8>> {
    if asked.major != MAJOR || asked.minor < MINOR_MIN {
        return None;
    }
    let granted = granted(asked.features);
    let depth = if granted & PASSTHROUGH != 0 {
        STACK_DEPTH
    } else {
        0
    };
    let words = Words::default()
        .u32(MAJOR)
        .u32(MINOR)
        .u32(READ_BYTES_MAX as u32)
        .u32(granted as u32)
        .u16(64) // asynchronous reads under way
        .u16(48)
        .u32(READ_BYTES_MAX as u32)
        .u32(1)
        .u16((READ_BYTES_MAX / 4096) as u16)
        .u16(0)
        .u32((granted >> 32) as u32)
        .u32(depth);
    Some(words.zeros(24).0)
}

/// The answer to a lookup. A name is asked for at each open: what it stands for may be gone.
pub fn entry_reply(of: &Attributes) -> Vec<u8> {
    let words = Words::default().u64(of.node).u64(0).u64(0).u64(FOREVER_S);
    words.u32(0).u32(0).attributes(of).0
}

/// The answer to a question for attributes.
pub fn attributes_reply(of: &Attributes) -> Vec<u8> {
    let words = Words::default().u64(FOREVER_S).u32(0).u32(0);
    words.attributes(of).0
}

/// The answer to an open: what the page cache has of the file stays.
pub fn open_reply() -> Vec<u8> {
    let flags = FOPEN_KEEP_CACHE | FOPEN_NOFLUSH;
    Words::default().u64(0).u32(flags).u32(0).0
}

/// The answer to an open that is passed through to a file which the kernel was shown before.
pub fn passed_reply(backing: i32) -> Vec<u8> {
    let flags = FOPEN_PASSTHROUGH | FOPEN_NOFLUSH;
    Words::default().u64(0).u32(flags).u32(backing as u32).0
}

/// The answer to a question for the file system.
pub fn statistics_reply() -> Vec<u8> {
    let words = Words::default().zeros(40).u32(4096);
    words.u32(NAME_BYTES_MAX as u32).u32(4096).zeros(28).0
}

/// What precedes the bytes of a [`NOTICE_STORE`].
pub fn store_head(node: u64, offset: u64, size: u32) -> Vec<u8> {
    Words::default().u64(node).u64(offset).u32(size).u32(0).0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, arguments: &[u8]) -> Vec<u8> {
        let length = (REQUEST_HEAD + arguments.len()) as u32;
        let words = Words::default().u32(length).u32(opcode).u64(77).u64(5);
        let mut bytes = words.u32(0).u32(0).u32(1234).u32(0).0;
        bytes.extend_from_slice(arguments);
        bytes
    }

    fn parsed(opcode: u32, arguments: &[u8]) -> Result<Call<'static>, Malformed> {
        let bytes = request(opcode, arguments).leak();
        Request::parse(bytes).map(|request| request.call)
    }

    #[test]
    fn a_read_names_its_range() {
        let arguments = Words::default().u64(0).u64(8192).u32(4096).zeros(20).0;
        let bytes = request(15, &arguments);
        let parsed = Request::parse(&bytes).unwrap();
        assert_eq!((parsed.unique, parsed.node, parsed.pid), (77, 5, 1234));
        let (offset, size) = (8192, 4096);
        assert_eq!(parsed.call, Call::Read { offset, size });
    }

    #[test]
    fn what_is_cut_is_refused() {
        assert_eq!(Request::parse(&[0; 39]), Err(Malformed::Length));
        let mut long = request(3, &[]);
        long.push(0);
        assert_eq!(Request::parse(&long), Err(Malformed::Length));
        assert_eq!(parsed(15, &[0; 19]), Err(Malformed::Arguments(15)));
        let huge = Words::default().u64(0).u64(0).u32(1 << 21).zeros(20).0;
        assert_eq!(parsed(15, &huge), Err(Malformed::Arguments(15)));
        assert_eq!(parsed(36, &[0; 7]), Err(Malformed::Arguments(36)));
    }

    #[test]
    fn a_name_is_one_string() {
        assert_eq!(parsed(1, b"a.memory\0"), Ok(Call::Lookup(b"a.memory")));
        for wrong in [&b""[..], b"a", b"a\0b\0", &[b'x'; 300]] {
            assert_eq!(parsed(1, wrong), Err(Malformed::Arguments(1)), "{wrong:?}");
        }
    }

    #[test]
    fn an_old_kernel_is_told_no_more_than_it_knows() {
        let old = Words::default().u32(7).u32(31).u32(1 << 17).u32(1).0;
        let Ok(Call::Init(init)) = parsed(26, &old) else {
            panic!("no greeting");
        };
        assert_eq!(granted(init.features), ASYNC_READ);
        assert_eq!(init_reply(&init).map(|reply| reply.len()), Some(64));
        assert_eq!(init_reply(&Init { major: 8, ..init }), None);
        assert_eq!(init_reply(&Init { minor: 12, ..init }), None);
        let depth = |features| init_reply(&Init { features, ..init }).map(|reply| reply[36]);
        assert_eq!(
            [INIT_EXT, INIT_EXT | PASSTHROUGH].map(depth),
            [Some(0), Some(1)]
        );
    }

    #[test]
    fn replies_have_the_kernel_s_sizes() {
        let of = Attributes {
            node: 2,
            inode: 2,
            modified: (0, 0),
            size_bytes: 4096,
            uid: 0,
            gid: 0,
        };
        assert_eq!(entry_reply(&of).len(), 128);
        assert_eq!(attributes_reply(&of).len(), 104);
        assert_eq!(open_reply().len(), 16);
        assert_eq!(passed_reply(7)[8..], [0xa0, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(statistics_reply().len(), 80);
        assert_eq!(store_head(2, 0, 4096).len(), 24);
        assert_eq!(head(1, 0, 100)[..4], 116u32.to_ne_bytes());
    }
}
