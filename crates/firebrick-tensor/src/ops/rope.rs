//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the rotate-half layout of Hugging Face's models.

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn_backend::{Backend, Shape, Slice, TensorMetadata, tensor::FloatTensor};
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// Rotates the two halves of the last dimension: `[x1 cos - x2 sin, x2 cos + x1 sin]`.
///
/// The angles are constants: no gradient reaches `cos` and `sin`.
///
/// - x: `[batch, heads, tokens, head_dim]`
/// - cos, sin: `[tokens, head_dim / 2]`
///
/// # Panics
/// If `head_dim` is odd or a shape disagrees.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let [_, _, tokens, head_dim] = x.dims();
    assert!(head_dim.is_multiple_of(2), "rope: head_dim {head_dim} is odd");
    assert_eq!(cos.dims(), [tokens, head_dim / 2], "rope: shape of cos");
    assert_eq!(sin.dims(), [tokens, head_dim / 2], "rope: shape of sin");
    let (x, cos, sin) = (x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as RopeOps>::rope(x, cos, sin, false))
}

/// Rotary embedding on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait RopeOps: Backend {
    /// Shapes as in [`rope`]; `inverse` turns the other way, which is the backward pass.
    #[fusion(dtype = x, shape = x)]
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        composed::<Self>(x, cos, sin, inverse)
    }
}

pub(super) fn composed<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    inverse: bool,
) -> FloatTensor<B> {
    let shape = x.shape();
    let half = shape[3] / 2;
    let part = |start: usize| {
        let mut slices: Vec<Slice> = shape.iter().map(|&n| Slice::from(0..n)).collect();
        slices[3] = Slice::from(start..start + half);
        B::float_slice(x.clone(), &slices)
    };
    let (x1, x2) = (part(0), part(half));
    let wide = |t| B::float_reshape(t, Shape::new([1, 1, shape[2], half]));
    let (cos, sin) = (wide(cos), wide(sin));
    let sin = if inverse { B::float_neg(sin) } else { sin };
    let y1 = B::float_sub(B::float_mul(x1.clone(), cos.clone()), B::float_mul(x2.clone(), sin.clone()));
    let y2 = B::float_add(B::float_mul(x2, cos), B::float_mul(x1, sin));
    B::float_cat(vec![y1, y2], 3)
}

impl RopeOps for Flex {
    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, inverse: bool) -> FlexTensor {
        let shape = x.shape();
        let d = shape[3];
        if !cpu::all_f32(&[&x, &cos, &sin]) || shape.num_elements() == 0 {
            return composed::<Self>(x, cos, sin, inverse);
        }
        let (cos, sin) = (cpu::contiguous(cos), cpu::contiguous(sin));
        let (cos, sin) = (cos.storage::<f32>(), sin.storage::<f32>());
        let turn = |x: FlexTensor, heads: usize| {
            cpu::map_rows(x, d, |first, rows| {
                Arch::new().dispatch(Rotate { rows, first, heads, tokens: shape[2], cos, sin, inverse });
            })
        };
        // Heads come as a transposed view of a projection, and leave in the same order: neither way anything is copied.
        let by_token = cpu::by_token(x);
        if by_token.is_contiguous() {
            return cpu::by_token(turn(by_token, shape[1]));
        }
        turn(cpu::by_token(by_token), 1)
    }
}

/// Turns the heads of one token in place, on the calling thread; they are twice as long as `cos` and `sin`.
pub(super) fn turn_heads(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    Arch::new().dispatch(Rotate { rows: heads, first: 0, heads: 1, tokens: 1, cos, sin, inverse: false });
}

/// A block of rows, starting at row `first` of all; `heads` rows in a row belong to one of `tokens` tokens.
struct Rotate<'a> {
    rows: &'a mut [f32],
    first: usize,
    heads: usize,
    tokens: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    inverse: bool,
}

impl WithSimd for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let half = self.cos.len() / self.tokens;
        let sign = if self.inverse { -1.0 } else { 1.0 };
        for (i, row) in self.rows.chunks_exact_mut(2 * half).enumerate() {
            let at = (self.first + i) / self.heads % self.tokens * half;
            let (cos, sin) = (&self.cos[at..][..half], &self.sin[at..][..half]);
            let (y1, y2) = row.split_at_mut(half);
            let y2 = &mut y2[..half];
            for j in 0..half {
                let (x1, x2, c, s) = (y1[j], y2[j], cos[j], sin[j] * sign);
                y1[j] = x1 * c - x2 * s;
                y2[j] = x2 * c + x1 * s;
            }
        }
    }
}

impl<B: Backend + RopeOps, C: CheckpointStrategy> RopeOps for Autodiff<B, C> {
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Rope;

        impl<B: Backend + RopeOps> Backward<B, 1> for Rope {
            type State = (FloatTensor<B>, FloatTensor<B>, bool);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let (cos, sin, inverse) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |grad| B::rope(grad, cos, sin, !inverse));
            }
        }

        let (x, node) = x.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let y = B::rope(x, cos.clone(), sin.clone(), inverse);
        match Rope.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos, sin, inverse), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
