//! What clients ask of the pager, over a SOCK_SEQPACKET socket: `docs/formats/pager-protocol.md`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{accept4, SockFlag};
use serde::{Deserialize, Serialize};

use crate::clients::{Client, ClientText};
use crate::nodes::Node;
use crate::packet::{self, Packet};
use crate::passed;
use crate::prefetch;
use crate::process::Process;
use crate::server::Server;
use crate::service::Service;
use crate::spec::DeviceSpec;
use crate::touched::{self, Touched};
use crate::trace::{Trace, GRANULE};

/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// Files that one VMM runs on.
const FILES_MAX: usize = 64;
/// Bytes of a path.
const PATH_BYTES_MAX: usize = 4096;
/// Names in one answer.
const NAMES_MAX: usize = 256;
/// Sandboxes that wait, in one answer, and what is said of each.
const STALLED_MAX: usize = 64;
const CAUSE_CHARACTERS_MAX: usize = 200;
/// Sandboxes in one answer.
const SANDBOXES_MAX: usize = 128;
/// Bytes of a sandbox's name.
const SANDBOX_BYTES_MAX: usize = 128;
const GREETING: Duration = Duration::from_secs(10);

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// Who is there; the answer comes with the mount.
    Hello {},
    /// A file, new or pointed elsewhere.
    Put {
        /// Its name.
        name: String,
        /// What it stands for.
        spec: DeviceSpec,
    },
    /// A file goes; nobody runs on it.
    Remove {
        /// Its name.
        name: String,
    },
    /// A file is passed through to the one that comes with this from now on; where none comes, no
    /// more.
    Pass {
        /// Its name.
        name: String,
    },
    /// Names of files behind `after`, in order.
    Names {
        /// A name, or nothing.
        after: String,
    },
    /// A VMM runs on files; a handle of its process comes with it.
    Attach {
        /// Whose VMM it is.
        sandbox: String,
        /// The files' names.
        files: Vec<String>,
    },
    /// A VMM will hand in its memory, which is a file's; a handle of its process and the socket
    /// that it connects to come with it.
    Listen {
        /// Whose VMM it is.
        sandbox: String,
        /// The file.
        file: String,
    },
    /// Sandboxes that have a VMM here behind `after`, in order.
    Sandboxes {
        /// A name, or nothing.
        after: String,
    },
    /// A VMM has ended, or never ran.
    Detach {
        /// Whose VMM it was.
        sandbox: String,
    },
    /// What is known of a sandbox.
    Seen {
        /// Which.
        sandbox: String,
    },
    /// A file is given to the kernel as far as a trace of it says, and so many bytes allow.
    Prefetch {
        /// The file.
        name: String,
        /// What was touched of it.
        trace: PathBuf,
        /// The most that is given.
        budget_bytes: u64,
        /// Whose VMM hands in its memory, which is this file's: it is given to that one.
        #[serde(default)]
        sandbox: Option<String>,
    },
    /// What a VMM has touched of a file.
    Touched {
        /// Whose VMM it is.
        sandbox: String,
        /// The file.
        name: String,
    },
    /// What a VMM has touched of what was brought ahead of a file.
    Used {
        /// Whose VMM it is.
        sandbox: String,
        /// The file.
        name: String,
    },
    /// What it has touched, with what was touched before it, becomes the trace `to`.
    Trace {
        /// Whose VMM it is.
        sandbox: String,
        /// The file.
        name: String,
        /// What was touched before.
        prior: Option<PathBuf>,
        /// Where the trace is put.
        to: PathBuf,
    },
    /// What was counted of all files, and which sandboxes wait.
    Totals {},
    /// Both processes are to end.
    Stop {},
}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(serde_json::Value),
    Error(String),
}

type Answered = Result<(serde_json::Value, Vec<OwnedFd>), String>;

/// Takes connections, each into a thread of its own; does not return.
pub fn listen(listener: &OwnedFd, service: &Arc<Service>) {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    loop {
        let Ok(connection) = accept(listener) else {
            std::thread::sleep(Duration::from_millis(50)); // no descriptor for it now
            continue;
        };
        if OPEN.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            OPEN.fetch_sub(1, Ordering::SeqCst);
            let _ = send(&connection, &Err("too many connections".to_owned()));
            continue;
        }
        let service = service.clone();
        let thread = std::thread::Builder::new().name("control".to_owned());
        let started = thread.stack_size(256 << 10).spawn(move || {
            while let Ok(Some(packet)) = packet::receive(connection.as_fd()) {
                let answered = answer(&service, packet);
                let ends = answered.as_ref().is_ok_and(|(value, _)| value == "stopped");
                if send(&connection, &answered).is_err() || ends {
                    break;
                }
            }
            OPEN.fetch_sub(1, Ordering::SeqCst);
        });
        if started.is_err() {
            OPEN.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::{AsRawFd, FromRawFd};
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send(connection: &OwnedFd, answered: &Answered) -> io::Result<()> {
    let (answer, fds) = match answered {
        Ok((value, fds)) => (Answer::Ok(value.clone()), &fds[..]),
        Err(error) => (Answer::Error(error.clone()), &[][..]),
    };
    packet::send(connection.as_fd(), &answer, &packet::borrowed(fds))
}

fn answer(service: &Arc<Service>, packet: Packet) -> Answered {
    let ask: Ask = packet.parse().map_err(|error| error.to_string())?;
    let server = &service.server;
    let said = match ask {
        Ask::Hello {} => return hello(service),
        Ask::Put { name, spec } => put(service, &name, &spec)?,
        Ask::Remove { name } => remove(service, &name)?,
        Ask::Pass { name } => pass(service, &name, packet.fds)?,
        Ask::Names { after } => names(server, &after),
        Ask::Attach { sandbox, files } => attach(service, &sandbox, files, packet.fds)?,
        Ask::Listen { sandbox, file } => listen_for(service, &sandbox, file, packet.fds)?,
        Ask::Sandboxes { after } => sandboxes(service, &after),
        Ask::Detach { sandbox } => detach(service, &sandbox)?,
        Ask::Seen { sandbox } => seen(service, &sandbox)?,
        Ask::Prefetch {
            name,
            trace,
            budget_bytes,
            sandbox,
        } => prefetch(service, sandbox.as_deref(), &name, &trace, budget_bytes)?,
        Ask::Touched { sandbox, name } => touched(service, &sandbox, &name, touched::of)?.1,
        Ask::Used { sandbox, name } => touched(service, &sandbox, &name, touched::of_stored)?.1,
        Ask::Trace {
            sandbox,
            name,
            prior,
            to,
        } => trace(service, &sandbox, &name, prior.as_deref(), &to)?,
        Ask::Totals {} => totals(server),
        Ask::Stop {} => stop(service)?,
    };
    Ok((said, Vec::new()))
}

fn hello(service: &Arc<Service>) -> Answered {
    let greeted = service.wait_for_kernel(GREETING);
    let (minor, resend) = greeted.ok_or("the kernel does not greet the pager")?;
    let keeper = service
        .keep
        .keeper_pid()
        .map_err(|error| error.to_string())?;
    let mount = service.server.fuse.mount_fd().try_clone();
    let device = service.server.fuse.device_number();
    let (_, connection) = device.map_err(|error| error.to_string())?;
    let said = serde_json::json!({
        "instance": service.settings.instance, "pid": std::process::id(),
        "keeper_pid": keeper, "version": env!("CARGO_PKG_VERSION"),
        "kernel_minor": minor, "replaceable": resend, "connection": connection,
    });
    Ok((said, vec![mount.map_err(|error| error.to_string())?]))
}

fn put(service: &Service, name: &str, spec: &DeviceSpec) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let nodes = &service.server.nodes;
    let text = nodes.plan(name, spec)?;
    // The number first: it may never be given again, whatever becomes of this process.
    let last = text.number.max(nodes.last());
    let kept = |error: io::Error| error.to_string();
    service
        .keep
        .put("numbers", &last, Some(Vec::new()))
        .map_err(kept)?;
    let key = format!("node/{name}");
    service
        .keep
        .put(&key, &text, Some(Vec::new()))
        .map_err(kept)?;
    nodes.put(name, text);
    Ok(serde_json::json!({}))
}

fn remove(service: &Service, name: &str) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let runs_on = |client: &Arc<Client>| client.text().files.iter().any(|file| file == name);
    if let Some(client) = service.server.clients.all().iter().find(|c| runs_on(c)) {
        return Err(format!("{} runs on {name}", client.sandbox));
    }
    passed::forget(service, name)?;
    let key = format!("node/{name}");
    service
        .keep
        .remove(&key)
        .map_err(|error| error.to_string())?;
    service.server.nodes.remove(name);
    service.server.seen.forget(name);
    Ok(serde_json::json!({}))
}

fn pass(service: &Service, name: &str, fds: Vec<OwnedFd>) -> Result<serde_json::Value, String> {
    if fds.len() > 1 {
        return Err("one file at most has to come with this".to_owned());
    }
    let cause = passed::pass(service, name, fds.into_iter().next())?;
    Ok(serde_json::json!({ "passed": cause.is_none(), "cause": cause }))
}

fn names(server: &Server, after: &str) -> serde_json::Value {
    let names = server.nodes.names();
    let from = names.partition_point(|name| name.as_str() <= after);
    let some: Vec<_> = names[from..].iter().take(NAMES_MAX).collect();
    serde_json::json!({ "names": some })
}

fn attach(
    service: &Service,
    sandbox: &str,
    files: Vec<String>,
    fds: Vec<OwnedFd>,
) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let [process]: [OwnedFd; 1] = fds
        .try_into()
        .map_err(|_| "one handle of a process has to come with this")?;
    keep_client(service, sandbox, files, process, false)?;
    Ok(serde_json::json!({}))
}

fn listen_for(
    service: &Service,
    sandbox: &str,
    file: String,
    fds: Vec<OwnedFd>,
) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let [process, listener]: [OwnedFd; 2] = fds
        .try_into()
        .map_err(|_| "a handle of a process and a socket have to come with this")?;
    keep_client(service, sandbox, vec![file.clone()], process, true)?;
    service.handed.listen(sandbox, &file, listener)?;
    Ok(serde_json::json!({}))
}

/// From here on it is known whose accesses are answered.
fn keep_client(
    service: &Service,
    sandbox: &str,
    files: Vec<String>,
    process: OwnedFd,
    handed: bool,
) -> Result<(), String> {
    let process = Process::from(process);
    let gone = "the process is gone, or this is no handle of one";
    let pid = process.pid().map_err(|_| gone)?;
    if sandbox.is_empty() || sandbox.len() > SANDBOX_BYTES_MAX {
        return Err(format!("{sandbox:?} is no name"));
    }
    if files.len() > FILES_MAX {
        return Err(format!("a VMM runs on {FILES_MAX} files at most"));
    }
    let nodes = &service.server.nodes;
    if let Some(missing) = files.iter().find(|file| nodes.find(file).is_none()) {
        return Err(format!("there is no file {missing}"));
    }
    let clients = &service.server.clients;
    let other = clients.get(sandbox).filter(|client| !client.has_ended());
    if other.is_some_and(|client| client.text().handed && client.text().pid != pid) {
        return Err(format!("{sandbox} runs"));
    }
    let text = ClientText {
        pid,
        files,
        killed: None,
        handed,
    };
    let ours = process.try_clone().map_err(|error| error.to_string())?;
    let key = format!("client/{sandbox}");
    service
        .keep
        .put(&key, &text, Some(vec![ours.into()]))
        .map_err(|error| error.to_string())?;
    clients.add(Client::new(sandbox, text, process));
    Ok(())
}

/// A few words of each, as many as have room.
fn sandboxes(service: &Service, after: &str) -> serde_json::Value {
    let mut all = service.server.clients.all();
    all.sort_unstable_by(|one, other| one.sandbox.cmp(&other.sandbox));
    let from = all.partition_point(|client| client.sandbox.as_str() <= after);
    let some = all[from..].iter().take(SANDBOXES_MAX).map(|client| {
        let text = client.text();
        serde_json::json!({
            "sandbox": client.sandbox, "pid": text.pid, "ended": client.has_ended(),
            "files": text.files.len(), "killed": text.killed.is_some(), "handed": text.handed,
        })
    });
    serde_json::json!({ "sandboxes": some.collect::<Vec<_>>() })
}

fn detach(service: &Service, sandbox: &str) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let client = service.server.clients.get(sandbox);
    service.handed.leave(sandbox)?;
    let killed = client.as_ref().and_then(|client| client.text().killed);
    service
        .keep
        .remove(&format!("client/{sandbox}"))
        .map_err(|error| error.to_string())?;
    service.server.clients.remove(sandbox);
    for file in client.iter().flat_map(|client| client.text().files) {
        service.close_unused(&file);
    }
    Ok(serde_json::json!({ "killed": killed }))
}

fn seen(service: &Service, sandbox: &str) -> Result<serde_json::Value, String> {
    let server = &service.server;
    let client = server
        .clients
        .get(sandbox)
        .ok_or("no VMM of it runs here")?;
    let text = client.text();
    let files: Vec<_> = text
        .files
        .iter()
        .filter_map(|name| {
            let node = server.nodes.find(name)?;
            let waits = server.held.of(node.number);
            let stalled = waits.map(|(why, since)| {
                serde_json::json!({
                    "blob": why.blob, "cause": why.cause,
                    "waited_ms": since.as_millis() as u64,
                })
            });
            Some(serde_json::json!({
                "name": name, "size_bytes": node.size_bytes, "stalled": stalled,
                "seen": server.seen.of(name),
            }))
        })
        .collect();
    Ok(serde_json::json!({
        "pid": text.pid, "killed": text.killed, "files": files,
        "uffd": service.handed.seen(sandbox),
    }))
}

fn prefetch(
    service: &Service,
    sandbox: Option<&str>,
    name: &str,
    trace: &Path,
    budget_bytes: u64,
) -> Result<serde_json::Value, String> {
    if trace.as_os_str().len() > PATH_BYTES_MAX {
        return Err(format!("a path has {PATH_BYTES_MAX} bytes at most"));
    }
    let server = &service.server;
    let bytes = match sandbox {
        Some(sandbox) => service
            .handed
            .prefetch(sandbox, name, trace, budget_bytes)?,
        None => {
            let node = found(server, name)?;
            let begun = prefetch::begin(server, &node, trace, budget_bytes);
            begun.map_err(|error| format!("{}: {error}", trace.display()))?
        }
    };
    Ok(serde_json::json!({ "bytes": bytes }))
}

/// What a VMM touched, the order in which it asked, and what is said of it.
fn touched(
    service: &Service,
    sandbox: &str,
    name: &str,
    look: impl FnOnce(i32, &Node) -> io::Result<Touched>,
) -> Result<(Touched, serde_json::Value, Vec<u32>), String> {
    let server = &service.server;
    let client = server.clients.get(sandbox);
    let text = client.ok_or("no VMM of it runs here")?.text();
    if text.handed {
        let (touched, order, said) = service.handed.touched(sandbox, name)?;
        return Ok((touched, said, order));
    }
    let node = found(server, name)?;
    let touched = look(text.pid, &node)
        .map_err(|error| format!("what {sandbox} touched of {name}: {error}"))?;
    server.seen.used(name, touched.newly_used_bytes);
    let (stored, late, order) = node.with_given(|given| {
        let order = given.order_of(&touched.granules);
        (given.stored_count(), given.is_late(), order)
    });
    let said = serde_json::json!({
        "pages": touched.pages, "prefetched_pages": stored * (GRANULE / 4096),
        "used_pages": touched.stored_pages, "late": late,
    });
    Ok((touched, said, order))
}

fn trace(
    service: &Service,
    sandbox: &str,
    name: &str,
    prior: Option<&Path>,
    to: &Path,
) -> Result<serde_json::Value, String> {
    let (node, client) = (
        found(&service.server, name)?,
        service.server.clients.get(sandbox),
    );
    let handed = client.is_some_and(|client| client.text().handed);
    if node.passed().is_some() && !handed {
        // As much as lies in the page cache in one piece, which may be megabytes.
        return Err(format!(
            "{name} is passed through: more of it is mapped than was touched"
        ));
    }
    let (touched, said, order) = touched(service, sandbox, name, touched::of)?;
    let size_bytes = node.size_bytes;
    // One that can't be read any more is as good as none.
    let known = prior.and_then(|path| Trace::read(path, size_bytes).ok());
    let known = known.unwrap_or_else(|| Trace::empty(size_bytes));
    let trace = known.with(&order, &touched.granules);
    let written = trace.write(to);
    written.map_err(|error| format!("{}: {error}", to.display()))?;
    Ok(said)
}

fn found(server: &Server, name: &str) -> Result<Arc<Node>, String> {
    let node = server.nodes.find(name);
    node.ok_or_else(|| format!("there is no file {name}"))
}

fn totals(server: &Server) -> serde_json::Value {
    let stalled: serde_json::Map<_, _> = server
        .stalled()
        .into_iter()
        .take(STALLED_MAX)
        .map(|(sandbox, mut cause)| {
            cause.cause = cause.cause.chars().take(CAUSE_CHARACTERS_MAX).collect();
            (sandbox, serde_json::json!(cause))
        })
        .collect();
    serde_json::json!({ "totals": server.seen.totals(), "stalled": stalled })
}

fn stop(service: &Arc<Service>) -> Result<serde_json::Value, String> {
    let _turn = service.turn();
    let running = service.server.clients.all();
    if let Some(client) = running.iter().find(|client| !client.has_ended()) {
        return Err(format!("{} runs", client.sandbox));
    }
    service.keep.stop().map_err(|error| error.to_string())?;
    service.end_soon();
    Ok("stopped".into())
}
