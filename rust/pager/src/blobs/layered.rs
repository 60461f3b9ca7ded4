//! Two media: what lies on the first is not fetched from the second.

use std::sync::Arc;

use super::{BlobError, BlobSource, Medium, Opened};

/// A medium, and another for the blobs that it does not have.
#[derive(Debug)]
pub struct Layered {
    first: Arc<dyn BlobSource>,
    second: Arc<dyn BlobSource>,
}

impl Layered {
    /// Looks in `first`, then in `second`.
    pub fn new(first: Arc<dyn BlobSource>, second: Arc<dyn BlobSource>) -> Self {
        Self { first, second }
    }
}

impl BlobSource for Layered {
    fn open_with_end(&self, name: &str, end_bytes: u64) -> Result<Opened, BlobError> {
        let missed = match self.first.open_with_end(name, end_bytes) {
            Err(missed @ (BlobError::Missing | BlobError::Unavailable(_))) => missed,
            found_or_wrong => return found_or_wrong,
        };
        let found = self.second.open_with_end(name, end_bytes);
        found.map_err(|also| match missed {
            // That it is missing there says less than why it can't be had here.
            BlobError::Unavailable(_) if also == BlobError::Missing => missed,
            _ => also,
        })
    }

    fn medium(&self) -> Medium {
        let (first, second) = (self.first.medium(), self.second.medium());
        if second.has_latency() {
            second
        } else {
            first
        }
    }
}
