//! The files of the pager: names, numbers, and the devices behind them.
//!
//! A name stands for the same bytes for ever, and a number is never given twice: what the page
//! cache has of a file can't be wrong, whoever opens it later.
//!
//! A name whose bytes lie in one file that was verified whole is *passed through* to it, under a
//! number of its own: that one is never open in another way, nor to another file, which the kernel
//! would refuse. Who has it open by the first number goes on with that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::build::{Builds, Frames, Unreadable, WAIT_MAX};
use crate::device::Device;
use crate::given::Given;
use crate::runs::Streams;
use crate::spec::{BlobsSpec, DeviceSpec};
use crate::wire::ROOT;

/// Files at once.
pub const NODES_MAX: usize = 16 << 10;
/// Bytes of a name.
const NAME_BYTES_MAX: usize = 128;

/// What is kept of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeText {
    /// Its number.
    pub number: u64,
    /// What it stands for.
    pub spec: DeviceSpec,
}

/// What a file is passed through to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passed {
    /// The number that it is passed through under; the kernel's node.
    pub number: u64,
    /// What the kernel calls the file behind it.
    pub backing: i32,
    /// Which file that is: its device and its number there.
    pub place: (u64, u64),
    /// When it was written, in seconds and nanoseconds.
    pub modified: (u64, u32),
}

/// One file.
#[derive(Debug)]
pub struct Node {
    /// Its number.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    spec: Mutex<DeviceSpec>,
    device: Mutex<Option<Arc<Device>>>,
    given: Mutex<Given>,
    passed: Mutex<Option<Passed>>,
    streams: Mutex<Streams>,
}

impl Node {
    /// What whoever opens it from now on is passed through to.
    pub fn passed(&self) -> Option<Passed> {
        *self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept of it.
    pub fn text(&self) -> NodeText {
        let spec = self.spec.lock().unwrap_or_else(PoisonError::into_inner);
        NodeText {
            number: self.number,
            spec: spec.clone(),
        }
    }

    /// The device, opened by the first who wants it. One that could not be opened is tried again
    /// by the next.
    ///
    /// # Errors
    /// Damaged, not available.
    pub fn device(&self, open: &Open) -> Result<Arc<Device>, Unreadable> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = &*device {
            return Ok(device.clone());
        }
        let spec = self.text().spec;
        let opened = Arc::new(Device::open(&spec, open.builds(&spec.blobs)?)?);
        *device = Some(opened.clone());
        Ok(opened)
    }

    /// Says that the bytes lie elsewhere now.
    fn point(&self, spec: DeviceSpec) {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        *self.spec.lock().unwrap_or_else(PoisonError::into_inner) = spec;
        *device = None;
    }

    /// Forgets what was opened, and what the kernel was given: nobody runs on it.
    pub fn close(&self) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.with_given(|given| *given = Given::default());
    }

    /// Looks at who reads it from first to last.
    pub fn with_streams<T>(&self, look: impl FnOnce(&mut Streams) -> T) -> T {
        look(&mut self.streams.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at what the kernel was given of it.
    pub fn with_given<T>(&self, look: impl FnOnce(&mut Given) -> T) -> T {
        look(&mut self.given.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What devices share: builds by their place, frames.
#[derive(Debug)]
pub struct Open {
    frames: Arc<Frames>,
    builds: Mutex<HashMap<BlobsSpec, Arc<Builds>>>,
    wait_max: Duration,
}

impl Default for Open {
    fn default() -> Self {
        Self::waiting_at_most(WAIT_MAX)
    }
}

impl Open {
    /// With a bound on a reader's wait for what another thread is fetching.
    pub fn waiting_at_most(wait_max: Duration) -> Self {
        Self {
            frames: Arc::default(),
            builds: Mutex::default(),
            wait_max,
        }
    }

    fn builds(&self, blobs: &BlobsSpec) -> Result<Arc<Builds>, Unreadable> {
        let mut all = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(builds) = all.get(blobs) {
            return Ok(builds.clone());
        }
        let source = blobs.source();
        let source = source.map_err(|cause| Unreadable::away("builds", cause))?;
        let builds = Builds::new(source, self.frames.clone());
        let builds = Arc::new(builds.waiting_at_most(self.wait_max));
        all.insert(blobs.clone(), builds.clone());
        Ok(builds)
    }
}

#[derive(Debug, Default)]
struct Tables {
    by_number: HashMap<u64, Arc<Node>>,
    by_name: HashMap<String, Arc<Node>>,
    /// The highest number that was ever given.
    last: u64,
}

/// All files.
#[derive(Debug, Default)]
pub struct Nodes(RwLock<Tables>);

impl Nodes {
    /// All files of a pager before this one, and the highest number that it gave.
    pub fn take_up(texts: impl Iterator<Item = (String, NodeText)>, last: u64) -> Self {
        let mut tables = Tables {
            last: last.max(ROOT),
            ..Tables::default()
        };
        for (name, text) in texts {
            tables.last = tables.last.max(text.number);
            tables.add(name, text, Given::late());
        }
        Self(RwLock::new(tables))
    }

    /// The file that a name will stand for: the same again, or a new one with the next number.
    ///
    /// # Errors
    /// A name that is none, a device that is none, another size, too many files.
    pub fn plan(&self, name: &str, spec: &DeviceSpec) -> Result<NodeText, String> {
        check(name, spec)?;
        let tables = self.read();
        let number = match tables.by_name.get(name) {
            Some(node) if node.size_bytes != spec.size_bytes => {
                return Err(format!("{name} has {} bytes", node.size_bytes))
            }
            Some(node) => node.number,
            None if tables.by_number.len() >= NODES_MAX => {
                return Err(format!("there are {NODES_MAX} files already"))
            }
            None => tables.last + 1,
        };
        let spec = spec.clone();
        Ok(NodeText { number, spec })
    }

    /// Does what was planned.
    pub fn put(&self, name: &str, text: NodeText) {
        let mut tables = self.0.write().unwrap_or_else(PoisonError::into_inner);
        tables.last = tables.last.max(text.number);
        match tables.by_name.get(name) {
            Some(node) if node.text() != text => node.point(text.spec),
            Some(_) => {}
            None => tables.add(name.to_owned(), text, Given::default()),
        }
    }

    /// Lets go of a file.
    pub fn remove(&self, name: &str) {
        let mut tables = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = tables.by_name.remove(name) {
            tables.by_number.remove(&node.number);
            if let Some(passed) = node.passed() {
                tables.by_number.remove(&passed.number);
            }
        }
    }

    /// Passes a file through from now on, or no more.
    pub fn pass(&self, name: &str, to: Option<Passed>) {
        let mut tables = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(node) = tables.by_name.get(name).cloned() else {
            return;
        };
        let mut passed = node.passed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = std::mem::replace(&mut *passed, to) {
            tables.by_number.remove(&before.number);
        }
        if let Some(to) = to {
            tables.last = tables.last.max(to.number);
            tables.by_number.insert(to.number, node.clone());
        }
    }

    /// The file of a number.
    pub fn get(&self, number: u64) -> Option<Arc<Node>> {
        self.read().by_number.get(&number).cloned()
    }

    /// The file of a name.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.read().by_name.get(name).cloned()
    }

    /// The highest number that was ever given.
    pub fn last(&self) -> u64 {
        self.read().last
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.read().by_name.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn add(&mut self, name: String, text: NodeText, given: Given) {
        let node = Arc::new(Node {
            number: text.number,
            name: name.clone(),
            size_bytes: text.spec.size_bytes,
            spec: Mutex::new(text.spec),
            device: Mutex::new(None),
            given: Mutex::new(given),
            passed: Mutex::default(),
            streams: Mutex::default(),
        });
        self.by_number.insert(node.number, node.clone());
        self.by_name.insert(name, node);
    }
}

fn check(name: &str, spec: &DeviceSpec) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let named = !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(plain);
    if !named || name.starts_with('.') {
        return Err(format!("{name:?} is no name"));
    }
    if spec.size_bytes == 0 || spec.size_bytes % 4096 != 0 || spec.size_bytes > 1 << 44 {
        return Err(format!("{} bytes are no device", spec.size_bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(header: &str) -> DeviceSpec {
        DeviceSpec {
            size_bytes: 8192,
            header: header.into(),
            header_digest: "0".repeat(64),
            blobs: BlobsSpec::directory("/nowhere"),
            captures: Vec::new(),
        }
    }

    fn add(nodes: &Nodes, name: &str, header: &str) -> u64 {
        let text = nodes.plan(name, &spec(header)).unwrap();
        let number = text.number;
        nodes.put(name, text);
        number
    }

    #[test]
    fn a_number_is_never_given_twice() {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        let first = add(&nodes, "a.memory", "h");
        let second = add(&nodes, "b.memory", "h");
        nodes.remove("b.memory");
        let third = add(&nodes, "b.memory", "h");
        assert!(ROOT < first && first < second && second < third);
        assert!(nodes.get(second).is_none() && nodes.get(third).is_some());
        let texts = nodes.names().into_iter();
        let texts = texts.map(|name| (name.clone(), nodes.find(&name).unwrap().text()));
        let later = Nodes::take_up(texts, nodes.last());
        assert_eq!(later.find("a.memory").unwrap().number, first);
        assert_eq!(add(&later, "c.memory", "h"), third + 1);
    }

    #[test]
    fn a_file_that_is_passed_through_has_another_number_each_time() {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        let number = add(&nodes, "a.memory", "h");
        let node = nodes.find("a.memory").unwrap();
        let to = |number| Passed {
            number,
            backing: 1,
            place: (1, 2),
            modified: (3, 4),
        };
        nodes.pass("a.memory", Some(to(number + 1)));
        nodes.pass("nobody", Some(to(99)));
        assert_eq!(
            (node.passed(), nodes.last()),
            (Some(to(number + 1)), number + 1)
        );
        for known in [number, number + 1] {
            assert!(Arc::ptr_eq(&nodes.get(known).unwrap(), &node));
        }
        nodes.pass("a.memory", Some(to(number + 2)));
        assert!(nodes.get(number + 1).is_none());
        nodes.pass("a.memory", None);
        assert!(nodes.get(number + 2).is_none() && nodes.get(number).is_some());
        assert_eq!(add(&nodes, "b.memory", "h"), number + 3);
        nodes.pass("a.memory", Some(to(number + 4)));
        nodes.remove("a.memory");
        assert!(nodes.get(number + 4).is_none() && nodes.get(number).is_none());
    }

    #[test]
    fn a_name_keeps_its_number_and_its_size() {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        let number = add(&nodes, "a.memory", "provisional");
        assert_eq!(add(&nodes, "a.memory", "packed"), number);
        assert_eq!(nodes.get(number).unwrap().text().spec, spec("packed"));
        let other = DeviceSpec {
            size_bytes: 4096,
            ..spec("packed")
        };
        assert!(nodes.plan("a.memory", &other).is_err());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let nodes = Nodes::take_up(std::iter::empty(), 0);
        for name in ["", ".", "..", "a/b", "a\0", &"x".repeat(200)] {
            assert!(nodes.plan(name, &spec("h")).is_err(), "{name:?}");
        }
        for size_bytes in [0, 4095, 1 << 45] {
            let wrong = DeviceSpec {
                size_bytes,
                ..spec("h")
            };
            assert!(nodes.plan("a", &wrong).is_err(), "{size_bytes}");
        }
    }
}
