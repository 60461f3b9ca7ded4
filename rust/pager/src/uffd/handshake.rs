//! The handshake as Firecracker does it: one message over a stream, a list of regions in JSON with
//! exactly one descriptor, and not a word more.
//!
//! Nothing a peer sends is believed: who it is says the kernel, that the descriptor is a
//! userfaultfd and that the regions are registered with it is tried out. A peer that is refused is
//! killed where it sent a userfaultfd: its memory has nobody to fill it, and would read as zeros.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags, UnixAddr};

use crate::process::Process;

use super::host::Host;
use super::ioctl::{features, Filled, Uffd};
use super::regions::{parse, BadRegions, Message, Region, Regions, SMALL_BYTES};
use super::vmm::Vmm;

/// Bytes of a message: [`super::regions::REGIONS_MAX`] regions have room.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Descriptors that one message of a socket can bring: what has no room would be lost, open.
const FDS_MAX: usize = 253;
/// How long a refused peer may take to die where nobody else can wait for it.
const DEATH_MAX: Duration = Duration::from_secs(1);

/// Why a peer was refused.
#[derive(Debug)]
pub enum Refusal {
    /// The regions are wrong.
    Regions(BadRegions),
    /// The message is longer than [`MESSAGE_BYTES_MAX`].
    TooLarge,
    /// No descriptor came with it.
    NoDescriptor,
    /// More than one came.
    SeveralDescriptors,
    /// The descriptor is something else, or not set up.
    NotUserfaultfd,
    /// Its features are those of a peer that is served wrongly: no REMOVE, or FORK, REMAP, SIGBUS.
    Features(u64),
    /// A region is not registered with it, or has other pages.
    NotRegistered(Region),
    /// Not a byte came in time.
    Silent,
    /// The peer left, or its time was over, in the middle of its message.
    HalfMessage,
    /// It waited longest when there were too many.
    Crowded,
    /// As many VMMs are served as may be.
    Full,
    /// Who it is can't be known.
    NoPeer(io::Error),
    /// A call failed.
    Io(io::Error),
    /// The host does not want it.
    Unwanted(io::Error),
}

impl Refusal {
    /// A name that does not change.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Regions(BadRegions::Json(_)) => "bad_json",
            Self::Regions(BadRegions::Empty) => "no_regions",
            Self::Regions(BadRegions::TooMany(_)) => "too_many_regions",
            Self::Regions(BadRegions::PageSize(_)) => "page_size",
            Self::Regions(BadRegions::Unaligned(_)) => "unaligned",
            Self::Regions(BadRegions::Overflow(_)) => "overflow",
            Self::Regions(BadRegions::Beyond(_)) => "beyond_device",
            Self::Regions(BadRegions::Overlap(..)) => "overlap",
            Self::TooLarge => "too_large",
            Self::NoDescriptor => "no_descriptor",
            Self::SeveralDescriptors => "several_descriptors",
            Self::NotUserfaultfd => "not_userfaultfd",
            Self::Features(_) => "features",
            Self::NotRegistered(_) => "not_registered",
            Self::Silent => "silent",
            Self::HalfMessage => "half_message",
            Self::Crowded => "crowded",
            Self::Full => "full",
            Self::NoPeer(_) => "no_peer",
            Self::Io(_) => "io",
            Self::Unwanted(_) => "unwanted",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Regions(bad) => write!(to, "{bad}"),
            Self::TooLarge => write!(to, "the message has more than {MESSAGE_BYTES_MAX} bytes"),
            Self::NoDescriptor => write!(to, "no descriptor came with the message"),
            Self::SeveralDescriptors => write!(to, "more than one descriptor came"),
            Self::NotUserfaultfd => write!(to, "the descriptor is no userfaultfd that is set up"),
            Self::Features(asked) => write!(to, "its features are {asked:#x}"),
            Self::NotRegistered(region) => write!(to, "{region} is not registered as it says"),
            Self::Silent => write!(to, "nothing came in time"),
            Self::HalfMessage => write!(to, "the message has no end"),
            Self::Crowded => write!(to, "it said nothing while others waited"),
            Self::Full => write!(to, "as many VMMs are served as may be"),
            Self::NoPeer(error) => write!(to, "who it is can't be known: {error}"),
            Self::Io(error) => write!(to, "{error}"),
            Self::Unwanted(error) => write!(to, "it is not wanted: {error}"),
        }
    }
}

impl From<BadRegions> for Refusal {
    fn from(bad: BadRegions) -> Self {
        Self::Regions(bad)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A peer whose message is whole and right.
#[derive(Debug)]
pub struct Offer {
    /// It and its memory.
    pub vmm: Vmm,
    /// Its regions.
    pub regions: Regions,
    /// Its number, for people.
    pub pid: i32,
    /// The connection, which stays open.
    pub stream: UnixStream,
}

/// A peer in the middle of its handshake.
#[derive(Debug)]
pub struct Pending {
    stream: UnixStream,
    process: Process,
    pid: i32,
    host: Arc<dyn Host>,
    until: Instant,
    text: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Pending {
    /// A peer that has just connected.
    ///
    /// # Errors
    /// Where it is not known who it is.
    pub fn new(stream: UnixStream, host: Arc<dyn Host>, wait: Duration) -> Result<Self, Refusal> {
        stream.set_nonblocking(true)?;
        let (process, pid) = Process::peer(&stream).map_err(Refusal::NoPeer)?;
        Ok(Self {
            stream,
            process,
            pid,
            host,
            until: Instant::now() + wait,
            text: Vec::new(),
            fds: Vec::new(),
        })
    }

    /// Its connection, to be polled.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Who stands behind the socket.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// When its time is over.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// What it is refused for when its time is over.
    pub fn late(&self) -> Refusal {
        if self.text.is_empty() && self.fds.is_empty() {
            Refusal::Silent
        } else {
            Refusal::HalfMessage
        }
    }

    /// Takes what came; whether the message is whole, and its regions then.
    ///
    /// # Errors
    /// Any [`Refusal`].
    pub fn advance(&mut self) -> Result<Option<Vec<Region>>, Refusal> {
        while self.receive()? {
            // Only a message that could end here is worth reading.
            if self.text.trim_ascii_end().last() != Some(&b']') {
                continue;
            }
            if let Message::Whole(list) = parse(&self.text)? {
                return Ok(Some(list));
            }
        }
        Ok(None)
    }

    /// Whether something came.
    fn receive(&mut self) -> Result<bool, Refusal> {
        let mut buffer = [0; 8 << 10];
        let (bytes, fds, cut) = match receive(&self.stream, &mut buffer) {
            Ok(got) => got,
            Err(Errno::EAGAIN) => return Ok(false),
            Err(Errno::EINTR) => return Ok(true),
            Err(error) => return Err(Refusal::Io(error.into())),
        };
        self.fds.extend(fds);
        if cut || self.fds.len() > 1 {
            return Err(Refusal::SeveralDescriptors);
        }
        if bytes == 0 {
            return Err(self.late());
        }
        self.text.extend_from_slice(&buffer[..bytes]);
        if self.text.len() > MESSAGE_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        Ok(true)
    }

    /// Takes the peer at its word, as far as it can be proved.
    ///
    /// # Errors
    /// The refusal, said to the host already.
    pub fn accept(mut self, list: Vec<Region>) -> Result<(Offer, Arc<dyn Host>), Refusal> {
        let proved = Regions::new(list, self.host.size_bytes())
            .map_err(Refusal::from)
            .and_then(|regions| Ok((self.prove(&regions)?, regions)));
        match proved {
            Ok((uffd, regions)) => {
                let offer = Offer {
                    vmm: Vmm::new(uffd, self.process),
                    regions,
                    pid: self.pid,
                    stream: self.stream,
                };
                Ok((offer, self.host))
            }
            Err(why) => Err(self.refuse(why)),
        }
    }

    /// The descriptor, which is a userfaultfd with these regions.
    fn prove(&mut self, regions: &Regions) -> Result<Uffd, Refusal> {
        let fd = self.fds.pop().ok_or(Refusal::NoDescriptor)?;
        let uffd = Uffd::recognize(fd).map_err(|_| Refusal::NotUserfaultfd)?;
        let result = prove(&uffd, regions);
        if result.is_err() {
            self.fds.push(uffd.into());
            result?;
            unreachable!("it was an error");
        }
        Ok(uffd)
    }

    /// Tells the host, and kills the peer where its memory would read as zeros. Returns `why`.
    pub fn refuse(self, why: Refusal) -> Refusal {
        self.host.refused(self.pid, &why);
        for uffd in self
            .fds
            .into_iter()
            .filter_map(|fd| Uffd::recognize(fd).ok())
        {
            match self.process.as_fd().try_clone_to_owned() {
                Ok(same) => drop(Vmm::new(uffd, same.into())),
                // Without descriptors to spare it dies here and now.
                Err(_) => {
                    self.process.kill();
                    self.process.ended(DEATH_MAX);
                }
            }
        }
        why
    }
}

fn prove(uffd: &Uffd, regions: &Regions) -> Result<(), Refusal> {
    const HARMFUL: u64 = features::FORK | features::REMAP | features::SIGBUS;
    // A descriptor that nobody has set up refuses everything else.
    uffd.wake(SMALL_BYTES << 4, SMALL_BYTES)
        .map_err(|_| Refusal::NotUserfaultfd)?;
    let asked = uffd.features()?;
    if asked & features::REMOVE == 0 || asked & HARMFUL != 0 {
        return Err(Refusal::Features(asked));
    }
    uffd.set_nonblocking()?;
    for region in regions.list() {
        prove_region(uffd, region)?;
    }
    Ok(())
}

/// The first and the last page could be filled, and in pages of no other size.
fn prove_region(uffd: &Uffd, region: &Region) -> Result<(), Refusal> {
    let size = region.page_size;
    for page in [0, region.pages() - 1] {
        match uffd.probe(region.address(page), size)? {
            Filled::Failed(Errno::EFAULT) | Filled::Present => {}
            // It runs and gives memory back already: what it said shows when it is served.
            Filled::Changing => return Ok(()),
            Filled::Gone => return Err(Refusal::NoPeer(Errno::ESRCH.into())),
            _ => return Err(Refusal::NotRegistered(*region)),
        }
    }
    let small = uffd.probe(region.base, SMALL_BYTES)?;
    // Huge pages can't be filled by parts.
    match small {
        Filled::Failed(Errno::EINVAL) | Filled::Changing => Ok(()),
        _ if size == SMALL_BYTES => Ok(()),
        _ => Err(Refusal::NotRegistered(*region)),
    }
}

/// Bytes that came, descriptors that came with them, and whether some had no room.
fn receive(stream: &UnixStream, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>, bool), Errno> {
    let mut space = cmsg_space!([RawFd; FDS_MAX]);
    let mut data = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let got = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else has them.
            let owned = numbers
                .into_iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            fds.extend(owned);
        }
    }
    Ok((got.bytes, fds, got.flags.contains(MsgFlags::MSG_CTRUNC)))
}
