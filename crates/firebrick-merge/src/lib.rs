//! Weight-space model merging on the streaming executor, with mergekit's YAML.
//!
//! A [`MergeConfig`] (mergekit's format) names checkpoints and a method; [`Merge`] is the transformation that the
//! [`Executor`](firebrick_tensor::stream::Executor) runs tensor by tensor, in bounded memory;
//! [`Merge::analyze`] says beforehand what will interfere. [`task_vectors`] merges weights in memory, [`permutation`] and [`ot_fusion`]
//! align models whose units stand in another order, [`extract_lora`] makes an adapter of a fine-tune, [`twin`] keeps beside a merge
//! what each expert has to itself. [`learned`] fits coefficients by gradient or search. [`vocabulary_transplant`] gives a model
//! another one's tokenizer.
#![forbid(unsafe_code)]

mod adapter;
mod analyze;
mod chat_templates;
mod config;
pub mod distribution_fusion;
mod drift;
mod error;
pub mod extract_lora;
mod folder;
pub mod ibcl;
mod in_memory;
mod input;
pub mod learned;
pub mod logits_fusion;
mod merge;
mod methods;
mod names;
pub mod ot_fusion;
pub mod permutation;
mod plan;
mod rows;
mod stages;
pub mod task_vectors;
pub mod transport;
pub mod twin;
mod vocabulary;
pub mod vocabulary_transplant;
mod weight_search;
mod yaml;

pub use analyze::{MergeAnalysis, TaskVectors};
pub use config::{
    Filter, MergeConfig, ModelRef, Module, Parameters, Slice, SliceSource, TokenRule, TokenSource,
    TokenizerConfig, TokenizerSource, Value,
};
pub use drift::Drift;
pub use error::MergeError;
pub use firebrick_models::token_alignment;
pub use merge::Merge;
pub use methods::{
    GlobalParameters, MergeMethod, ModelParameters, Numerics, Parameter, Prepared, TensorMerge, Values,
    merge_tensor, prepare,
};
pub use plan::{MergePlan, ParameterValues, PlannedSource, PlannedTensor};
pub use stages::Stages;
pub use weight_search::{SearchText, SearchTexts, TextNats, WeightReport};
