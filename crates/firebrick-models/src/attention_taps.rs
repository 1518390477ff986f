//! What attention sees, for bricks that look into it.

use burn::tensor::Tensor;
use firebrick_core::Site;
use firebrick_tensor::ops::AttentionOptions;

/// Queries and keys of the attention modules of one forward pass, as they meet: normed, rotated, with the settings of the product.
///
/// A brick at `attn` puts this into the [`Run`](firebrick_core::Run) and takes it out again; a wiring fills it where it
/// finds it.
#[derive(Debug, Default)]
pub struct AttentionTaps {
    /// The `attn` site, queries `[batch, heads, t, head_dim]`, keys `[batch, kv_heads, s, head_dim]`; consecutive query heads share a
    /// key head.
    pub seen: Vec<(Site, Tensor<4>, Tensor<4>, AttentionOptions)>,
}
