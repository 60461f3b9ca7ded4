//! The data plane over files: compare and pack what a capture took, and materialize a device.

pub mod buffer;
pub mod copy;
pub mod scan;
