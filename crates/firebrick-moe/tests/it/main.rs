//! Tests of mixtures of experts as bricks.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod adapters;
mod layer;
mod learning;
mod reference;
mod upcycling;
