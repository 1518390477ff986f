//! Distillation losses and teachers.
//!
//! [`LogitKd`] is Hinton's soft-target loss between a student and a teacher that share a vocabulary, with forward or reverse
//! Kullback-Leibler divergence, over the fused large-vocabulary kernel: the logits of neither are ever whole in memory.
#![forbid(unsafe_code)]

mod fit;
mod logit_kd;

pub use firebrick_tensor::ops::Divergence;
pub use fit::distill_lora;
pub use logit_kd::{KdConfig, KdError, LogitKd, Teacher};
