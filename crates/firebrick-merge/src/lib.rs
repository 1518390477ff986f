//! Weight-space model merging on the streaming executor, with mergekit's YAML.
//!
//! A [`MergeConfig`] (mergekit's format) names checkpoints and a method; [`Merge`] is the transformation that the
//! [`Executor`](firebrick_tensor::stream::Executor) runs tensor by tensor, in bounded memory;
//! [`Merge::analyze`] says beforehand what will interfere. [`learned`] fits coefficients by gradient or search.
#![forbid(unsafe_code)]

mod analyze;
mod config;
mod error;
pub mod learned;
mod linear;
mod merge;
mod task_arithmetic;

pub use analyze::{MergeAnalysis, TaskVectors};
pub use config::{MergeConfig, MergeMethod, ModelEntry, Numerics, Value};
pub use error::MergeError;
pub use linear::linear;
pub use merge::Merge;
pub use task_arithmetic::task_arithmetic;
