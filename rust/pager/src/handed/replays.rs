//! What VMMs that hand in their memory are given ahead, and what is recorded of them.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::{Handed, Watch};
use crate::replay::{planned_bytes, Replay, ReplayText};
use crate::touched::Touched;
use crate::trace::{Trace, GRANULE};

impl Handed {
    /// Begins to bring what a trace says, or will when the VMM has come; how many bytes that are.
    ///
    /// # Errors
    /// Nobody is waited for; there is no trace, or it is damaged.
    pub fn prefetch(
        &self,
        sandbox: &str,
        file: &str,
        trace: &Path,
        budget_bytes: u64,
    ) -> Result<u64, String> {
        let (watch, _) = self.seat(sandbox, file)?;
        let found = Trace::read(trace, watch.node.size_bytes);
        let found = found.map_err(|error| format!("{}: {error}", trace.display()))?;
        let text = ReplayText {
            trace: trace.to_owned(),
            budget_bytes,
        };
        let session = {
            let seats = self.lock();
            let seat = seats.get(sandbox);
            let seat = seat.filter(|seat| Arc::ptr_eq(&seat.watch, &watch));
            let seat = seat.ok_or_else(|| format!("{sandbox} has ended"))?;
            let key = format!("ahead/{sandbox}");
            let kept = self.keep.put(&key, &text, Some(Vec::new()));
            kept.map_err(|error| error.to_string())?;
            seat.session() // who comes from now on finds it there
        };
        if let Some(session) = session {
            self.replay(&watch, session, &found, budget_bytes)?;
        }
        Ok(planned_bytes(&found, budget_bytes))
    }

    /// What a VMM has of its memory, and the order in which it asked; with what is said of it.
    /// Which of what was brought ahead it has looked at nobody can tell.
    ///
    /// # Errors
    /// It has not come.
    pub fn touched(
        &self,
        sandbox: &str,
        file: &str,
    ) -> Result<(Touched, Vec<u32>, serde_json::Value), String> {
        let (watch, session) = self.seat(sandbox, file)?;
        let uffd = self.uffd().map_err(|error| error.to_string())?;
        let session = session.and_then(|id| uffd.session(id));
        let session = session.ok_or_else(|| format!("{sandbox} has not come"))?;
        let (there, pages) = session.granules(GRANULE);
        let mut touched = Touched {
            granules: there,
            pages,
            ..Touched::default()
        };
        let (order, late) = watch.came.with(|given| {
            // What was touched and given back since.
            touched.granules.extend(given.order());
            touched.granules.sort_unstable();
            touched.granules.dedup();
            (given.order_of(&touched.granules), given.is_late())
        });
        let ahead = watch.came.ahead_bytes() / 4096;
        let said = json!({
            "pages": pages, "prefetched_pages": ahead, "used_pages": null, "late": late,
        });
        Ok((touched, order, said))
    }

    /// Begins what was asked for before the VMM came, or of a predecessor.
    pub(super) fn replay_kept(&self, sandbox: &str) {
        let entry = |kept: &crate::kept::Kept| {
            let entry = kept.get(&format!("ahead/{sandbox}"))?;
            serde_json::from_value::<ReplayText>(entry.value.clone()).ok()
        };
        let Some(text) = self.keep.with(entry) else {
            return;
        };
        let found = self
            .lock()
            .get(sandbox)
            .map(|seat| (seat.watch.clone(), seat.session()));
        let Some((watch, Some(session))) = found else {
            return;
        };
        let trace = Trace::read(&text.trace, watch.node.size_bytes);
        let begun = trace
            .map_err(|error| error.to_string())
            .and_then(|trace| self.replay(&watch, session, &trace, text.budget_bytes));
        if let Err(error) = begun {
            eprintln!("{sandbox}: nothing is brought ahead: {error}");
        }
    }

    fn replay(
        &self,
        watch: &Arc<Watch>,
        session: u64,
        trace: &Trace,
        budget_bytes: u64,
    ) -> Result<(), String> {
        let device = watch.node.device(&self.server.open);
        let replay = Replay {
            server: self.server.clone(),
            uffd: self.uffd().map_err(|error| error.to_string())?,
            vmm: session,
            file: watch.file.clone(),
            device: device.map_err(|error| error.to_string())?,
            came: watch.came.clone(),
        };
        replay.begin(trace, budget_bytes);
        Ok(())
    }

    /// The VMM of a sandbox that is waited for or served from this file, and its session.
    fn seat(&self, sandbox: &str, file: &str) -> Result<(Arc<Watch>, Option<u64>), String> {
        let seats = self.lock();
        let seat = seats.get(sandbox);
        let seat = seat.ok_or_else(|| format!("no VMM of {sandbox} hands in its memory"))?;
        if seat.watch.file != file {
            return Err(format!("{sandbox} is served from {}", seat.watch.file));
        }
        Ok((seat.watch.clone(), seat.session()))
    }
}
