//! Integration tests, in one binary.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod decoder;
mod export;
mod smollm2;
mod tokenizer;
