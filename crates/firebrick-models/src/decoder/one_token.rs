//! A block for one new token in one op, where a wiring need not ask site by site.

use std::rc::Rc;

use burn::module::Param;
use burn::tensor::Tensor;
use firebrick_core::{Part, Run, Site};
use firebrick_tensor::ops::{
    self, BlockLinear, BlockMatrix, BlockOptions, BlockPacked, BlockWeights, Gate, KvCache, PackedWeight,
    Segments,
};

use super::{Decoder, Rotations};
use crate::attention_taps::AttentionTaps;
use crate::config::Activation;

/// The linear layers of a block.
const LINEARS: [Part; 7] =
    [Part::AttnQ, Part::AttnK, Part::AttnV, Part::AttnO, Part::MlpGate, Part::MlpUp, Part::MlpDown];

/// The packed weights that bricks put at [`LINEARS`]; none for a block that has to be asked site by site.
type Packed = Option<[Option<BlockPacked>; LINEARS.len()]>;

/// Those of each block, as far as they were asked for.
#[derive(Default)]
struct Blocks(Vec<Option<Rc<Packed>>>);

impl Decoder {
    /// What bricks put into block `l`.
    fn packed(&self, l: usize, run: &mut Run<'_>) -> Rc<Packed> {
        if let Some(Some(known)) = run.of_bricks::<Blocks>().0.get(l) {
            return known.clone();
        }
        let layer = &self.layers[l];
        let other = |site: Site| site.expert.is_some() || layer.linear(site.part).is_none();
        let mut wired = run.bricks().iter().any(|brick| brick.sites().of_layer(l).any(other));
        let packed = LINEARS.map(|part| {
            let site = Site::layer(l, part);
            let weight =
                run.weight(site).and_then(|weight| weight.downcast_ref::<PackedWeight>()?.for_block());
            wired |= weight.is_none() && !run.is_bare(site);
            weight
        });
        let found = Rc::new(if wired { None } else { Some(packed) });
        let Blocks(blocks) = run.of_bricks();
        blocks.resize(blocks.len().max(l + 1), None);
        blocks[l] = Some(found.clone());
        found
    }

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
        if batch * length != 1
            || run.get::<KvCache>().is_none()
            || run.get::<Segments>().is_some()
            || run.get::<AttentionTaps>().is_some()
        {
            return None;
        }
        let packed = self.packed(l, run);
        let packed = Option::as_ref(&packed)?;
        let linears = LINEARS.into_iter().zip(packed).map(|(part, packed)| {
            let linear = layer.linear(part)?;
            let weight = match packed {
                Some(packed) => BlockMatrix::Packed(packed),
                None => BlockMatrix::Dense(linear.weight.val()),
            };
            Some(BlockLinear { weight, bias: linear.bias.as_ref().map(Param::val) })
        });
        let [q, k, v, o, gate, up, down] = linears.collect::<Option<Vec<_>>>()?.try_into().ok()?;
        let maybe = |norm: &Option<Param<Tensor<1>>>| norm.as_ref().map(Param::val);
        let weights = BlockWeights {
            attn_norm: layer.attn_norm.val(),
            q,
            k,
            v,
            q_norm: maybe(&layer.q_norm),
            k_norm: maybe(&layer.k_norm),
            o,
            attn_post_norm: maybe(&layer.attn_post_norm),
            mlp_norm: layer.mlp_norm.val(),
            gate,
            up,
            down,
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
