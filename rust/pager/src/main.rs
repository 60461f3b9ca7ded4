//! The processes `pager` and `keeper` of a home.

fn main() {}
