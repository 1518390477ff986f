//! Integration tests.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod blocks;
mod checkpoint;
mod imatrix;
mod ops;
mod stream;
