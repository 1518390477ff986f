//! Weight-space model merging on the streaming executor, with mergekit's YAML.
//!
//! A [`MergeConfig`] (mergekit's format) names checkpoints and a method; [`Merge`] is the transformation that the
//! [`Executor`](firebrick_tensor::stream::Executor) runs tensor by tensor, in bounded memory;
//! [`Merge::analyze`] says beforehand what will interfere. [`task_vectors`] merges weights in memory, [`permutation`] aligns models whose
//! units stand in another order.
#![forbid(unsafe_code)]

mod analyze;
mod config;
mod error;
pub mod ibcl;
mod merge;
mod methods;
pub mod permutation;
pub mod task_vectors;
pub mod transport;

pub use analyze::{MergeAnalysis, TaskVectors};
pub use config::{MergeConfig, ModelEntry, Value};
pub use error::MergeError;
pub use merge::Merge;
pub use methods::{
    GlobalParameters, MergeMethod, ModelParameters, Numerics, Parameter, Prepared, Rectified, TensorMerge,
    Values, merge_tensor, prepare, rectify,
};
