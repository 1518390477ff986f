//! Merging whose coefficients are learned by gradient or found by search, over [`Decoder`](firebrick_models::Decoder).
//!
//! [`Composed`] is `theta(c) = theta_0 + sum_i c_{i,l} tau_{i,l}`, whose gradients reach `c` alone. [`adamerging`] and
//! [`concrete_merging`] fit it to text without labels, [`atlas`] to text with them; [`search`] needs no gradient, only a number
//! for each merged model.

mod adamerging;
mod atlas;
mod cma_es;
mod composed;
mod concrete;
mod search;
mod task_vector;
#[cfg(test)]
mod testing;

pub use adamerging::{AdaMergingConfig, adamerging, entropy};
pub use atlas::{AtlasConfig, atlas, atlas_negation};
pub use cma_es::{CmaEs, CmaEsConfig, Covariance};
pub use composed::{Coefficients, Composed, Granularity, Groups, Objective, Partition, learn};
pub use concrete::{ConcreteConfig, ConcreteMask, InnerStep, concrete_merging};
pub(crate) use search::search_from;
pub use search::{Comparison, Fitness, Method, SearchConfig, SearchReport, search};
pub use task_vector::{TaskVector, elect};
