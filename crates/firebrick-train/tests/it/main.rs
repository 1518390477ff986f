//! Integration tests of firebrick-train on tiny random decoders.

mod eval;
mod resume;
mod tiny;
mod training;
