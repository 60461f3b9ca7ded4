//! The formats: pages, extents, headers, builds and capture files.
