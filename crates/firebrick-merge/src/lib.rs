//! Weight-space model merging on the streaming executor, with mergekit's YAML.
//!
//! A [`MergeConfig`] (mergekit's format) names checkpoints and a method; [`Merge`] is the transformation that the
//! [`Executor`](firebrick_tensor::stream::Executor) runs tensor by tensor, in bounded memory;
//! [`Merge::analyze`] says beforehand what will interfere.
#![forbid(unsafe_code)]

mod analyze;
mod chat_templates;
mod config;
mod error;
mod folder;
mod input;
mod merge;
mod methods;
mod names;
mod plan;
mod rows;
mod vocabulary;
mod yaml;

pub use analyze::{MergeAnalysis, TaskVectors};
pub use config::{
    Filter, MergeConfig, ModelRef, Module, Parameters, Slice, SliceSource, TokenRule, TokenSource,
    TokenizerConfig, TokenizerSource, Value,
};
pub use error::MergeError;
pub use merge::Merge;
pub use methods::{
    GlobalParameters, MergeMethod, ModelParameters, Numerics, Parameter, Prepared, Rectified, TensorMerge,
    Values, merge_tensor, prepare, rectify,
};
pub use plan::{MergePlan, ParameterValues, PlannedSource, PlannedTensor};
