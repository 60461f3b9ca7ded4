//! The data plane over files: compare and pack what a capture took, and materialize a device.
