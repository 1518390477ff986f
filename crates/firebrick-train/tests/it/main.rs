//! Integration tests of firebrick-train on tiny random decoders.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod eval;
mod held_out;
mod layer_rates;
mod loglikelihood;
mod packing;
mod plain;
mod reference;
mod resume;
mod strided;
mod tasks;
mod tiny;
mod training;
