//! Errors of the data plane as the classes of `diapause.errors`.
