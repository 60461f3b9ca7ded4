//! Work on a few scoped threads: no pool, nothing that outlives the call.

use std::panic::resume_unwind;
use std::thread;

/// Runs `work` on each part, the first on this thread and each other on its own; results in order.
///
/// A panic of any of them goes on in the caller.
pub(crate) fn for_each_part<Part: Send, Output: Send>(
    parts: impl IntoIterator<Item = Part>,
    work: impl Fn(Part) -> Output + Sync,
) -> Vec<Output> {
    let mut parts = parts.into_iter();
    let Some(first) = parts.next() else {
        return Vec::new();
    };
    let work = &work;
    thread::scope(|scope| {
        let others: Vec<_> = parts.map(|part| scope.spawn(move || work(part))).collect();
        let mut outputs = vec![work(first)];
        for other in others {
            outputs.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        outputs
    })
}
