//! What failed, and at which stage: the only thing a launcher has to say besides the pid.

use std::fmt;

/// Where a launch was when it failed, in the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading and checking the plan.
    Plan,
    /// The user namespace and its maps.
    UserNamespace,
    /// The process in its namespaces (and its cgroup).
    Clone,
    /// Its session, signals, and what the kernel kills first.
    Process,
    /// The root that it sees.
    Root,
    /// Resource limits.
    Limits,
    /// User, capabilities and `no_new_privs`.
    Privileges,
    /// Closing what was not handed over.
    Descriptors,
    /// The program itself.
    Exec,
}

impl fmt::Display for Stage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Plan => "plan",
            Self::UserNamespace => "user-namespace",
            Self::Clone => "clone",
            Self::Process => "process",
            Self::Root => "root",
            Self::Limits => "limits",
            Self::Privileges => "privileges",
            Self::Descriptors => "descriptors",
            Self::Exec => "exec",
        })
    }
}

/// One line: the stage, and what the kernel said to what.
#[derive(Debug)]
pub struct Failure {
    pub stage: Stage,
    cause: String,
}

impl Failure {
    /// A failure with its cause; control characters could forge a line of the report.
    pub fn new(stage: Stage, cause: impl fmt::Display) -> Self {
        let cause = cause.to_string().replace(|c: char| c.is_control(), " ");
        Self { stage, cause }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.stage, self.cause)
    }
}

/// Names the stage, and what was tried, of an error.
pub trait At<T> {
    /// The same as a `Failure`; `what` is made only where it is needed.
    fn at<W: fmt::Display>(self, stage: Stage, what: impl FnOnce() -> W) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> At<T> for Result<T, E> {
    fn at<W: fmt::Display>(self, stage: Stage, what: impl FnOnce() -> W) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(stage, format_args!("{}: {error}", what())))
    }
}
