//! The memory that a training step of a decoder takes, predicted from its sizes.

use firebrick_models::DecoderConfig;
use serde::Serialize;

use crate::{Optimizer, TrainConfig};

/// Bytes of an f32, which everything here is.
const F32: f64 = 4.0;

/// Logits that are computed, and kept for the backward pass, at a time: those of [`firebrick_tensor::ops::linear_cross_entropy`].
const LOGITS: f64 = (1 << 25) as f64;

/// What a training step holds at its peak, in bytes: a prediction, made of sizes alone, for the kernels of the CPU. What they pack and
/// what the allocator keeps is not in it (a tenth or so).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepMemory {
    /// Of all parameters, frozen or not.
    pub weights: u64,
    /// Of the parameters that train, twice where several passes make a step.
    pub gradients: u64,
    /// Moments of the optimizer.
    pub optimizer: u64,
    /// What blocks keep for the backward pass, and what one holds in it.
    pub activations: u64,
    /// Logits, and the gradients of hidden states or of a head that trains.
    pub head: u64,
}

impl StepMemory {
    /// That of a step of `config` on windows that are full, for a model with so many parameters, of which `trained` train.
    ///
    /// A block keeps the residual stream in front of both its sublayers and what their norms make of it, queries and keys rotated, values,
    /// what attention gives with a number for each head, gate, up and what is between them: `4 d_model + 2 (heads + kv_heads) head_dim +
    /// heads + 3 d_ff` numbers a token. With [`TrainConfig::recompute`] it is `d_model` for each block, and all that for one.
    pub fn predict(decoder: &DecoderConfig, config: &TrainConfig, parameters: usize, trained: usize) -> Self {
        let c = decoder;
        // Numbers that have no end: a size may be anything.
        let size = |n: usize| n as f64;
        let tokens = size(config.batch) * size(config.window);
        let heads = 2.0 * (size(c.heads) + size(c.kv_heads)) * size(c.head_dim) + size(c.heads);
        let block = 4.0 * size(c.d_model) + heads + 3.0 * size(c.d_ff);
        let kept = match config.recompute {
            true => size(c.layers) * size(c.d_model) + block,
            false => size(c.layers) * block,
        };
        // Gradients of the widest part of a block stand beside it.
        let transient = 2.0 * size(c.d_model) + 3.0 * size(c.d_ff);
        let (vocab, d_model) = (size(c.vocab), size(c.d_model));
        let logits = (tokens * vocab).min(LOGITS.max(vocab));
        // A head that trains has its gradient before anything else has one; another one keeps that of each row.
        let of_head = if trained < parameters { tokens * d_model } else { vocab * d_model };
        let moments = match config.optimizer {
            Optimizer::AdamW | Optimizer::Lamb { .. } => 2.0,
            Optimizer::Lars { .. } => 1.0,
        };
        let sums = if config.accumulate > 1 { 2.0 } else { 1.0 };
        StepMemory {
            weights: (F32 * size(parameters)) as u64,
            gradients: (F32 * sums * size(trained)) as u64,
            optimizer: (F32 * moments * size(trained)) as u64,
            activations: (F32 * tokens * (kept + transient)) as u64,
            head: (F32 * (logits + of_head)) as u64,
        }
    }

    /// All but the weights: gradients come as activations go, so that one of the two counts.
    pub fn beside_weights(&self) -> u64 {
        self.optimizer.saturating_add(self.gradients.max(self.activations.saturating_add(self.head)))
    }

    /// The peak.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.beside_weights())
    }
}

#[cfg(test)]
mod tests {
    use firebrick_models::ModelFiles;

    use super::*;

    #[test]
    fn it_is_the_sum_by_hand_and_moves_as_the_step_does() {
        let c = ModelFiles::embedded().unwrap().config;
        let config = TrainConfig { batch: 3, window: 50, ..TrainConfig::default() };
        let memory = StepMemory::predict(&c, &config, 1000, 10);
        assert_eq!((memory.weights, memory.gradients, memory.optimizer), (4000, 40, 80));
        let block =
            4 * c.d_model + 2 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + c.heads + 3 * c.d_ff;
        let token = c.layers * block + 2 * c.d_model + 3 * c.d_ff;
        assert_eq!(memory.activations, (4 * 150 * token) as u64);
        assert_eq!(memory.head, (4 * 150 * (c.vocab + c.d_model)) as u64);
        assert_eq!(memory.total(), 4000 + 80 + memory.activations + memory.head);

        let of = |config: &TrainConfig, trained| StepMemory::predict(&c, config, 1000, trained);
        assert!(
            of(&TrainConfig { recompute: true, ..config.clone() }, 10).activations < memory.activations / 2
        );
        assert_eq!(of(&TrainConfig { accumulate: 2, ..config.clone() }, 10).gradients, 80);
        let lars = Optimizer::Lars { form: Default::default(), trust: 1e-3, clamp: None };
        assert_eq!(of(&TrainConfig { optimizer: lars, ..config.clone() }, 10).optimizer, 40);
        assert_eq!(
            of(&config, 1000).head,
            (4 * (150 * c.vocab + c.vocab * c.d_model)) as u64,
            "a head that trains"
        );
        let many = TrainConfig { batch: 1 << 20, ..config };
        assert!(of(&many, 10).head < 5 * ((1 << 25) + (150 << 20) * c.d_model as u64), "chunks of logits");
        let endless = TrainConfig { batch: usize::MAX, window: usize::MAX, ..many };
        assert_eq!(of(&endless, 10).total(), u64::MAX);
    }
}
