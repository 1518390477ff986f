//! Benchmarks of the firebrick crates: suites, peers that take turns with them, the machine's own limits, and what becomes of
//! the figures. `docs/guide/bench.md` says how to run and read them.
#![forbid(unsafe_code)]

mod compare;
mod harness;
mod markdown;
mod measured;
pub mod memory;
mod page;
mod peer;
mod run;
pub mod suites;

pub use compare::{Change, Comparison, Verdict, compare};
pub use harness::{Bench, PeerSettings, Roofline};
pub use markdown::markdown;
pub use measured::{Bound, Case, Measured, median_mad};
pub use page::page;
pub use peer::{Peer, Started};
pub use run::{Machine, RunInfo, SavedRun, append, read};
