//! A block for one new token in one op, where a wiring need not ask site by site.

use burn::module::Param;
use burn::tensor::Tensor;
use firebrick_core::{Part, Run, Site};
use firebrick_tensor::ops::{
    self, BlockLinear, BlockMatrix, BlockOptions, BlockWeights, Gate, KvCache, Segments,
};

use super::{Decoder, Rotations};
use crate::attention_taps::AttentionTaps;
use crate::config::Activation;

impl Decoder {
    /// Block `l` for one new token behind those of the cache, in one op: where no brick sits but for packed weights, and the device has
    /// a kernel.
    pub(super) fn one_token(
        &self,
        l: usize,
        x: &Tensor<3>,
        rotary: &Rotations,
        run: &mut Run<'_>,
    ) -> Option<Tensor<3>> {
        let (c, layer) = (self.config(), &self.layers[l]);
        let [batch, length, _] = x.dims();
        let other = |site: Site| site.expert.is_some() || layer.linear(site.part).is_none();
        if batch * length != 1
            || run.get::<KvCache>().is_none()
            || run.get::<Segments>().is_some()
            || run.get::<AttentionTaps>().is_some()
            || run.bricks().iter().any(|brick| brick.sites().of_layer(l).any(other))
        {
            return None;
        }
        let linear = |part| {
            let (site, linear) = (Site::layer(l, part), layer.linear(part)?);
            let weight = match run.is_bare(site) {
                true => BlockMatrix::Dense(linear.weight.val()),
                false => BlockMatrix::Packed(run.weight(site)?.downcast_ref()?),
            };
            Some(BlockLinear { weight, bias: linear.bias.as_ref().map(Param::val) })
        };
        let maybe = |norm: &Option<Param<Tensor<1>>>| norm.as_ref().map(Param::val);
        let weights = BlockWeights {
            attn_norm: layer.attn_norm.val(),
            q: linear(Part::AttnQ)?,
            k: linear(Part::AttnK)?,
            v: linear(Part::AttnV)?,
            q_norm: maybe(&layer.q_norm),
            k_norm: maybe(&layer.k_norm),
            o: linear(Part::AttnO)?,
            attn_post_norm: maybe(&layer.attn_post_norm),
            mlp_norm: layer.mlp_norm.val(),
            gate: linear(Part::MlpGate)?,
            up: linear(Part::MlpUp)?,
            down: linear(Part::MlpDown)?,
            mlp_post_norm: maybe(&layer.mlp_post_norm),
        };
        let options = BlockOptions {
            norm_eps: c.norm_eps,
            norm_plus_one: c.norm_plus_one,
            head_dim: c.head_dim,
            attention: self.attention_options(l),
            gate: match c.activation {
                Activation::Silu => Gate::Silu,
                Activation::GeluTanh => Gate::GeluTanh,
            },
        };
        let rotary = rotary.of(c.is_windowed(l));
        ops::decode_block(x, &weights, run.get_mut()?, l, [&rotary.cos, &rotary.sin], &options)
    }
}
