//! Layer drop and elastic networks.
//!
//! [`DropPlan`] chooses blocks or sublayers to leave out by their influence on the residual stream (ShortGPT, arXiv 2403.03853; LLM-Drop,
//! arXiv 2406.15786); as a [`Skip`](firebrick_core::Skip) brick it costs nothing to try, and whole blocks can be cut out for good.
#![forbid(unsafe_code)]

mod drop;

pub use drop::{DropError, DropKind, DropPlan, Scores};
