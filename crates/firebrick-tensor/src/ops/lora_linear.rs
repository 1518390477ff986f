//! Linear layer with an update of low rank beside its weight (LoRA, Hu et al. 2021, arXiv:2106.09685).
//!
//! The update is added while a part of the result is in a cache, and so is its share of the input's gradient; a gradient of the weight is
//! computed only if one is asked for.

use burn::backend::{Dispatch, backend_extension};
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::Flex;

use super::linear::{FEW_ROWS, linear, linear_add};
use super::matmul::{MatmulOps, Precision};

/// `x weight + scale x a b` over the last dimension of `x`; `a b` is never formed. The narrow products are f32 whatever `precision` says.
///
/// - x: `[.., d_in]`
/// - weight: `[d_in, d_out]`
/// - a: `[d_in, rank]`, b: `[rank, d_out]`
/// - result: `[.., d_out]`
///
/// # Panics
/// If a shape disagrees.
pub fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    precision: Precision,
) -> Tensor<D> {
    let mut shape = x.dims();
    let ([d_in, d_out], [_, rank]) = (weight.dims(), a.dims());
    assert_eq!(shape[D - 1], d_in, "lora_linear: last dimension of x against rows of weight");
    assert_eq!(a.dims(), [d_in, rank], "lora_linear: shape of a");
    assert_eq!(b.dims(), [rank, d_out], "lora_linear: shape of b");
    let rows: usize = shape[..D - 1].iter().product();
    let x = x.reshape([rows, d_in]);
    let y = if rows < FEW_ROWS {
        let narrow = linear(x.clone(), a, Precision::F32) * scale;
        linear_add(linear(x, weight, precision), narrow, b, Precision::F32)
    } else {
        let [x, weight, a, b] = [x, weight, a, b].map(Tensor::into_dispatch);
        Tensor::from_dispatch(<Dispatch as LoraLinearOps>::lora_linear(x, weight, a, b, scale, precision))
    };
    shape[D - 1] = d_out;
    y.reshape(shape)
}

/// A layer with its update on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait LoraLinearOps: Backend + MatmulOps {
    /// See [`lora_linear`]; `x` is `[rows, d_in]`.
    #[fusion(default)]
    fn lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let narrow = narrow::<Self>(x.clone(), a, scale);
        Self::matmul_low_rank(x, weight, narrow, b, precision)
    }
}

/// `scale x a`, scaled where it is narrowest.
fn narrow<B: Backend + MatmulOps>(x: FloatTensor<B>, a: FloatTensor<B>, scale: f64) -> FloatTensor<B> {
    B::float_mul_scalar(B::matmul(x, a, Precision::F32), scale.into())
}

impl LoraLinearOps for Flex {}

#[cfg(feature = "cubecl-backend")]
impl LoraLinearOps for CubeBackend {}

/// What the gradients need.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    /// `scale x a`, `[rows, rank]`.
    narrow: FloatTensor<B>,
    scale: f64,
    precision: Precision,
}

impl<B: Backend + LoraLinearOps, C: CheckpointStrategy> LoraLinearOps for Autodiff<B, C> {
    fn lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LoraLinear;

        impl<B: Backend + LoraLinearOps> Backward<B, 4> for LoraLinear {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                let State { x, weight, a, b, narrow: n, scale, precision } = ops.state;
                let [x_node, weight_node, a_node, b_node] = ops.parents;
                let transposed = |x| B::float_swap_dims(x, 0, 1);
                if let Some(node) = b_node {
                    let db = B::weight_gradient(n, dy.clone(), b.clone(), Precision::F32);
                    grads.register::<B>(node.id, db);
                }
                if let Some(node) = weight_node {
                    let dweight = B::weight_gradient(x.clone(), dy.clone(), weight.clone(), precision);
                    grads.register::<B>(node.id, dweight);
                }
                let dn = narrow::<B>(dy.clone(), transposed(b), scale);
                if let Some(node) = a_node {
                    grads
                        .register::<B>(node.id, B::weight_gradient(x, dn.clone(), a.clone(), Precision::F32));
                }
                if let Some(node) = x_node {
                    let dx = B::matmul_low_rank(dy, transposed(weight), dn, transposed(a), precision);
                    grads.register::<B>(node.id, dx);
                }
            }
        }

        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let (a, a_node) = a.into_parts();
        let (b, b_node) = b.into_parts();
        let n = narrow::<B>(x.clone(), a.clone(), scale);
        let y = B::matmul_low_rank(x.clone(), weight.clone(), n.clone(), b.clone(), precision);
        let nodes = [x_node, weight_node, a_node, b_node];
        match LoraLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(State { x, weight, a, b, narrow: n, scale, precision }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
