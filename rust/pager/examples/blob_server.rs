//! A directory over HTTP, as slow and as faulty as it is told: for measurements and trials.
//!
//! `blob_server DIRECTORY [DELAY_MS [FAIL_EVERY]]` serves the files of a directory by range, each
//! request late by so many milliseconds, and answers every so manieth with status 503. Prints the
//! URL that names are put behind, and ends with its standard input.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/server.rs"]
mod server;

use std::io::Read;
use std::time::Duration;

use server::{Act, Server};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap();
    let mut number = || {
        arguments
            .next()
            .map_or(0, |text| text.parse::<u64>().unwrap())
    };
    let (delay, fail_every) = (Duration::from_millis(number()), number() as usize);
    let server = Server::new(directory.into());
    server.act(move |request, _| match fail_every {
        0 => Act::Slow(delay),
        every if request % every == every - 1 => Act::Status(503),
        _ => Act::Slow(delay),
    });
    println!("{}", server.url());
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    eprintln!("{} requests", server.requests().len());
}
