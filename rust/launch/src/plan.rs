//! The plan: what to run, as whom, and what it may see. Checked whole before anything is done.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::RawFd;

use serde::Deserialize;

use crate::failure::{At, Failure, Stage};

/// Bytes of a plan; a command line of the kernel is no longer either.
const PLAN_BYTES_MAX: u64 = 512 * 1024;
/// Words of a command line, paths, descriptors: far beyond what a VMM has.
const ENTRIES_MAX: usize = 4096;
/// The users that Diapause gives to VMMs; nothing else on a host is named by them.
pub const UIDS: std::ops::RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;

/// Whose rights the VMM has.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum User {
    /// A user of its own, that nothing belongs to; its group has the same number.
    Own(u32),
    /// Ours, in a user namespace of its own: outside of it, it is nobody in particular.
    Namespace,
    /// Ours.
    Same,
}

/// Resource limits; what is absent stays as it is.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a file that it writes.
    pub file_bytes: Option<u64>,
    /// Open descriptors.
    pub descriptors: Option<u64>,
    /// Processes and threads of its user.
    pub threads: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The program's path, inside the root that it will see.
    pub program: String,
    /// Its arguments, the zeroth first.
    pub arguments: Vec<String>,
    /// Its whole environment, `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Descriptors it gets besides 0, 1 and 2.
    pub descriptors: Vec<RawFd>,
    /// Whose rights it has.
    pub user: User,
    /// New mount, pid, ipc and uts namespaces, and a root of its own.
    pub namespaces: bool,
    /// Whether it keeps our network.
    pub network: bool,
    /// What of our root it sees, read-only: files, directories, links.
    pub visible: Vec<String>,
    /// Directories below those that it sees empty.
    pub hidden: Vec<String>,
    /// The directory of the cgroup that it begins in.
    pub cgroup: Option<RawFd>,
    /// Resource limits.
    pub limits: Limits,
}

impl Plan {
    /// Reads and checks the plan in an open file.
    pub fn read(mut file: File) -> Result<Self, Failure> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| (&mut file).take(PLAN_BYTES_MAX + 1).read_to_end(&mut bytes))
            .at(Stage::Plan, || "reading it")?;
        if bytes.len() as u64 > PLAN_BYTES_MAX {
            return Err(bad(format_args!("more than {PLAN_BYTES_MAX} bytes")));
        }
        let plan: Self = serde_json::from_slice(&bytes).at(Stage::Plan, || "parsing it")?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), Failure> {
        let lists = [
            &self.arguments,
            &self.environment,
            &self.visible,
            &self.hidden,
        ];
        if lists.iter().any(|list| list.len() > ENTRIES_MAX) || self.descriptors.len() > ENTRIES_MAX
        {
            return Err(bad(format_args!(
                "a list of more than {ENTRIES_MAX} entries"
            )));
        }
        if self.arguments.is_empty() {
            return Err(bad("no arguments"));
        }
        let mut texts = lists.into_iter().flatten().chain([&self.program]);
        if texts.any(|text| text.contains('\0')) {
            return Err(bad("a NUL in a text"));
        }
        let paths = self
            .visible
            .iter()
            .chain(&self.hidden)
            .chain([&self.program]);
        for path in paths {
            if !is_plain(path) {
                return Err(bad(format_args!("{path:?} is no plain absolute path")));
            }
        }
        if let User::Own(uid) = self.user {
            if !UIDS.contains(&uid) {
                return Err(bad(format_args!("{uid} is no user of Diapause")));
            }
        }
        if self.user == User::Namespace && !self.namespaces {
            return Err(bad("a user namespace alone hides nothing"));
        }
        for fd in self.descriptors.iter().chain(&self.cgroup) {
            // SAFETY: F_GETFD only asks, and -1 says that nothing is open there.
            if *fd < 0 || unsafe { libc::fcntl(*fd, libc::F_GETFD) } < 0 {
                return Err(bad(format_args!("descriptor {fd} is not open")));
            }
        }
        Ok(())
    }
}

/// Absolute, and each part a name: nothing that leads out of where it is put.
fn is_plain(path: &str) -> bool {
    path.len() > 1
        && path.starts_with('/')
        && path[1..]
            .split('/')
            .all(|part| !matches!(part, "" | "." | ".."))
}

/// A text for the kernel; checked to hold no NUL.
pub fn c_text(text: &str) -> Result<CString, Failure> {
    CString::new(text).at(Stage::Plan, || "a text")
}

fn bad(cause: impl std::fmt::Display) -> Failure {
    Failure::new(Stage::Plan, cause)
}
