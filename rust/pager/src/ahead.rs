//! Pages to be brought ahead over a medium with latency, by where they are stored.
//!
//! What a guest touches together lies together in a build more often than not, but not always in
//! the order of the device, and a diff's pages lie close that are far apart there. So requests are
//! made of frames that follow each other in a build: a few large ones, and nothing that is not
//! wanted but for small gaps, which cost less than another request.

use std::sync::Arc;
use std::time::Instant;

use crate::build::{Build, Unreadable};
use crate::device::{Device, Part, Place};
use crate::fetch::{Wanted, BATCH_FRAMES};

/// Frames that nobody wants between two that are: fetched with them.
const GAP_FRAMES: u64 = 4;
/// Bytes that are sorted by where they are stored: their order among themselves matters less than
/// requests that are large.
const SORTED_BYTES: u64 = 64 << 20;

/// Frames of one build for one request, and what of the device is stored in them.
pub(crate) struct Span {
    build: Arc<Build>,
    places: Vec<Place>,
}

/// Bytes of a device: the first, and how many.
pub(crate) type Window = (u64, u64);
/// Pages of a device, verified, to be stored: first byte and the parts from there on.
pub(crate) type Pages = (u64, Vec<Part>);

/// The spans of these pieces of a device, the first pieces first; and what is stored in no build.
///
/// # Errors
/// A build can't be opened.
pub(crate) fn spans(
    device: &Device,
    pieces: &[Window],
) -> Result<(Vec<Span>, Vec<Window>), Unreadable> {
    let (mut groups, mut others, mut bytes) = (vec![Vec::new()], Vec::new(), 0);
    for (offset, length) in pieces {
        if bytes >= SORTED_BYTES {
            groups.push(Vec::new());
            bytes = 0;
        }
        let group = groups.last_mut().expect("there is one");
        group.extend(device.places(*offset, *length, &mut others));
        bytes += length;
    }
    let mut numbers: Vec<u32> = groups.iter().flatten().map(|place| place.build).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let builds = device.open_builds(&numbers)?;
    let runs = groups.into_iter().flat_map(runs);
    let spans = runs.filter_map(|places| {
        let at = numbers.binary_search(&places.first()?.build).ok()?;
        let build = builds.get(at)?.clone();
        Some(Span { build, places })
    });
    Ok((spans.collect(), others))
}

/// Sorts places by where they are stored and parts them into requests.
fn runs(mut places: Vec<Place>) -> Vec<Vec<Place>> {
    places.sort_unstable_by_key(|place| (place.build, place.frame, place.from));
    let mut runs: Vec<Vec<Place>> = Vec::new();
    for place in places {
        let fits = runs.last().is_some_and(|run| {
            let (first, last) = (run[0], run[run.len() - 1]);
            first.build == place.build
                && place.frame - last.frame <= GAP_FRAMES + 1
                && place.frame - first.frame < BATCH_FRAMES as u64
        });
        match runs.last_mut() {
            Some(run) if fits => run.push(place),
            _ => runs.push(vec![place]),
        }
    }
    runs
}

impl Span {
    /// Fetches it with one request, and gives away what follows each other on the device, at most
    /// `bytes_max` at once, as it comes.
    ///
    /// # Errors
    /// Damaged, not available, or nothing of it came within the bound of a wait; what `give` says.
    pub(crate) fn bring<E: From<Unreadable>>(
        &self,
        device: &Device,
        bytes_max: u64,
        mut give: impl FnMut(Pages) -> Result<(), E>,
    ) -> Result<(), E> {
        let builds = device.builds();
        let (first, last) = (
            self.places[0].frame,
            self.places[self.places.len() - 1].frame,
        );
        let wanted: Vec<Wanted> = (first..=last)
            .map(|number| (self.build.clone(), number))
            .collect();
        let mut asked: Vec<_> = builds.ask(&wanted, false).into_iter().map(Some).collect();
        let mut ready: Option<Pages> = None;
        let mut end = 0;
        for places in self.places.chunk_by(|one, next| one.frame == next.frame) {
            let Some(asked) = asked[(places[0].frame - first) as usize].take() else {
                continue;
            };
            let until = Instant::now() + builds.wait_max;
            let frame = builds.receive(asked, &self.build, until)?.frame;
            for place in places {
                let full = |pages: &mut Pages| end != place.offset || end - pages.0 >= bytes_max;
                if let Some(pages) = ready.take_if(full) {
                    give(pages)?;
                }
                let (_, parts) = ready.get_or_insert_with(|| (place.offset, Vec::new()));
                parts.push(Part::Frame(frame.clone(), place.from, place.length));
                end = place.offset + place.length as u64;
            }
        }
        ready.map_or(Ok(()), give)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(build: u32, frame: u64, from: usize, offset: u64) -> Place {
        Place {
            build,
            frame,
            from,
            length: 4096,
            offset,
        }
    }

    #[test]
    fn a_request_is_of_what_lies_together_and_bounded() {
        let far = BATCH_FRAMES as u64;
        let mut places = vec![place(2, 1, 0, 7), place(1, 9, 0, 5), place(1, 0, 8192, 1)];
        places.extend([place(1, 0, 0, 9), place(1, 3, 0, 3), place(1, 10, 0, 2)]);
        places.extend((100..=100 + far).map(|frame| place(3, frame, 0, frame)));
        let frames: Vec<Vec<(u32, u64)>> = runs(places)
            .iter()
            .map(|run| run.iter().map(|place| (place.build, place.frame)).collect())
            .collect();
        assert_eq!(frames[0], [(1, 0), (1, 0), (1, 3)]);
        assert_eq!(frames[1], [(1, 9), (1, 10)]);
        assert_eq!(frames[2], [(2, 1)]);
        assert_eq!(
            (frames[3].len(), &frames[4][..]),
            (far as usize, &[(3, 100 + far)][..])
        );
        assert_eq!(frames.len(), 5);
        assert!(runs(Vec::new()).is_empty());
    }
}
