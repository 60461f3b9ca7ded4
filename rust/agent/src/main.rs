//! The guest agent's program: reads the command line and serves until the channel fails.

use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use diapause_agent::copy;
use diapause_agent::engine::Engine;
use diapause_agent::options::{parse, Command, Options, USAGE};
use diapause_agent::system::seal_inherited_descriptors;

/// The port appears when the guest's drivers have been loaded.
const PORT_WAIT: Duration = Duration::from_secs(30);
const PORT_STEP: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Copy(wanted)) => return copy::run(&wanted),
        Ok(Command::Version) => {
            println!("diapause-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(cause) => {
            eprintln!("diapause-agent: {cause}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    seal_inherited_descriptors();
    let Err(error) = open(&options).and_then(|mut engine| engine.run()) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("diapause-agent: {error}");
    ExitCode::FAILURE
}

fn open(options: &Options) -> io::Result<Engine> {
    let deadline = Instant::now() + PORT_WAIT;
    loop {
        match Engine::new(options) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                // Nothing in an early guest tells about a new device but looking.
                std::thread::sleep(PORT_STEP);
            }
            outcome => return outcome,
        }
    }
}
