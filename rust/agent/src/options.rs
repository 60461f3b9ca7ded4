//! The command line. It is read once; a wrong one ends the agent with status 2.

use std::path::PathBuf;

use crate::copy::Copy;

/// Where the host is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A virtio-serial port.
    Port(PathBuf),
    /// A unix socket to listen on, one connection at a time: the same bytes without a VM.
    Socket(PathBuf),
}

/// What the agent was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the host is reached.
    pub endpoint: Endpoint,
    /// Whether HELLO and FREEZE change the system, or only say what they would do.
    pub system: bool,
}

/// A command line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Serve(Options),
    /// Copy a tree, in or out.
    Copy(Copy),
    /// Print the version.
    Version,
}

/// How to call the agent.
pub const USAGE: &str = "usage: diapause-agent [--port DEVICE | --socket PATH] [--no-system] \
     | pack PATH TOP | unpack PATH [NAME] | --version";
/// The port that a Diapause guest has.
pub const DEFAULT_PORT: &str = "/dev/virtio-ports/diapause.agent";

/// Reads the arguments behind the program's name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter().peekable();
    if let Some(verb) = arguments.next_if(|word| word == "pack" || word == "unpack") {
        return parse_copy(&verb, arguments.collect()).map(Command::Copy);
    }
    let mut options = Options {
        endpoint: Endpoint::Port(DEFAULT_PORT.into()),
        system: true,
    };
    while let Some(argument) = arguments.next() {
        let mut path = || {
            arguments
                .next()
                .map(PathBuf::from)
                .ok_or(format!("{argument} needs a path"))
        };
        match argument.as_str() {
            "--version" => return Ok(Command::Version),
            "--no-system" => options.system = false,
            "--port" => options.endpoint = Endpoint::Port(path()?),
            "--socket" => options.endpoint = Endpoint::Socket(path()?),
            _ => return Err(format!("unknown argument {argument:?}")),
        }
    }
    Ok(Command::Serve(options))
}

fn parse_copy(verb: &str, words: Vec<String>) -> Result<Copy, String> {
    let mut words = words.into_iter();
    let path = words.next().ok_or(format!("{verb} needs a path"))?.into();
    let name = words.next();
    if let Some(word) = words.next() {
        return Err(format!("unknown argument {word:?}"));
    }
    match (verb, name) {
        ("pack", Some(top)) => Ok(Copy::Pack { path, top }),
        ("pack", None) => Err("pack needs the name of the top".to_owned()),
        (_, name) => Ok(Copy::Unpack { path, name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn understands_its_flags() {
        let served = Options {
            endpoint: Endpoint::Socket("/tmp/s".into()),
            system: false,
        };
        assert_eq!(
            parse_words("--socket /tmp/s --no-system"),
            Ok(Command::Serve(served))
        );
        assert_eq!(parse_words("--port x --version"), Ok(Command::Version));
        let usual = Options {
            endpoint: Endpoint::Port(DEFAULT_PORT.into()),
            system: true,
        };
        assert_eq!(parse_words(""), Ok(Command::Serve(usual)));
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(parse_words("--port").is_err());
        assert!(parse_words("serve").is_err());
        for line in ["pack", "pack a", "pack a b c", "unpack", "unpack a b c"] {
            assert!(parse_words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn understands_a_copy() {
        let (path, top) = ("/etc".into(), "etc".into());
        let wanted = Command::Copy(Copy::Pack { path, top });
        assert_eq!(parse_words("pack /etc etc"), Ok(wanted));
        let (path, name) = ("--port".into(), None);
        let wanted = Command::Copy(Copy::Unpack { path, name });
        assert_eq!(parse_words("unpack --port"), Ok(wanted));
    }
}
