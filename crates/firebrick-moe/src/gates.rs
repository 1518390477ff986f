//! Per-token weights of adapters, carried in the run.

use burn::tensor::{Device, Tensor, TensorData};

/// How much each adapter of a mixture counts for each token: what a router leaves in the [`Run`](firebrick_core::Run)
/// and adapter banks with a slot read.
#[derive(Clone, Debug)]
pub struct AdapterGates {
    weights: Tensor<3>,
}

impl AdapterGates {
    /// Gates `[batch, tokens, adapters]`, or `[1, 1, adapters]` for the same weights everywhere.
    pub fn new(weights: Tensor<3>) -> Self {
        AdapterGates { weights }
    }

    /// The same weights for every token, one per adapter.
    pub fn fixed(weights: &[f32], device: &Device) -> Self {
        Self::new(Tensor::from_data(TensorData::new(weights.to_vec(), [1, 1, weights.len()]), device))
    }

    /// The gate of adapter `slot`, `[batch, tokens, 1]` or `[1, 1, 1]`.
    ///
    /// # Panics
    /// If there are no more than `slot` adapters.
    pub fn of(&self, slot: usize) -> Tensor<3> {
        self.weights.clone().narrow(2, slot, 1)
    }

    /// All gates `[batch, tokens, adapters]` (or `[1, 1, adapters]`).
    pub fn weights(&self) -> Tensor<3> {
        self.weights.clone()
    }
}
