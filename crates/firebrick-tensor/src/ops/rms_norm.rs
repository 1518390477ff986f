//! Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467).

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, FloatDType, Shape, TensorMetadata, tensor::FloatTensor};
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// `x / sqrt(mean(x^2) + eps) * gamma` over the last dimension, computed in f32 and returned in `x`'s dtype.
///
/// - x: `[.., d]`
/// - gamma: `[d]`
///
/// # Panics
/// If `gamma` is not as long as the last dimension of `x`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    assert_eq!(x.dims()[D - 1], gamma.dims()[0], "rms_norm: last dimension of x against gamma");
    let x = x.into_dispatch();
    Tensor::from_dispatch(<burn::backend::Dispatch as RmsNormOps>::rms_norm(x, gamma.into_dispatch(), eps))
}

/// RMSNorm on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait RmsNormOps: Backend {
    /// Forward pass; shapes as in [`rms_norm`].
    #[fusion(dtype = x, shape = x)]
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        composed::<Self>(x, gamma, eps)
    }

    /// Gradients for `x` and `gamma` from the gradient of the result.
    #[fusion(meta = |x, gamma, _grad, _eps| (x.clone(), gamma.clone()))]
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(x, gamma, grad, eps)
    }
}

/// As a matrix `[rows, d]` in f32.
fn rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let d = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / d.max(1);
    B::float_cast(B::float_reshape(x, Shape::new([rows, d])), FloatDType::F32)
}

/// `1 / sqrt(mean(x^2) + eps)` of each row, `[rows, 1]`.
fn inverse_rms<B: Backend>(x: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x), 1);
    B::float_recip(B::float_sqrt(B::float_add_scalar(mean, eps.into())))
}

pub(super) fn composed<B: Backend>(x: FloatTensor<B>, gamma: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    let (shape, dtype) = (x.shape(), x.dtype());
    let (x, gamma) = (rows::<B>(x), rows::<B>(gamma));
    let r = inverse_rms::<B>(x.clone(), eps);
    let y = B::float_mul(B::float_mul(x, r), gamma);
    B::float_reshape(B::float_cast(y, dtype.into()), shape)
}

pub(super) fn composed_backward<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (shape, dtype) = (x.shape(), x.dtype());
    let (gamma_shape, gamma_dtype) = (gamma.shape(), gamma.dtype());
    let (x, gamma, grad) = (rows::<B>(x), rows::<B>(gamma), rows::<B>(grad));
    let r = inverse_rms::<B>(x.clone(), eps);
    let normed = B::float_mul(x, r.clone());
    let dgamma = B::float_sum_dim(B::float_mul(grad.clone(), normed.clone()), 0);
    let scaled = B::float_mul(grad, gamma);
    let along = B::float_mean_dim(B::float_mul(scaled.clone(), normed.clone()), 1);
    let dx = B::float_mul(B::float_sub(scaled, B::float_mul(normed, along)), r);
    (
        B::float_reshape(B::float_cast(dx, dtype.into()), shape),
        B::float_reshape(B::float_cast(dgamma, gamma_dtype.into()), gamma_shape),
    )
}

impl RmsNormOps for Flex {
    fn rms_norm(x: FlexTensor, gamma: FlexTensor, eps: f64) -> FlexTensor {
        let d = cpu::last_dim(&x);
        if !cpu::all_f32(&[&x, &gamma]) || d == 0 {
            return composed::<Self>(x, gamma, eps);
        }
        let gamma = cpu::contiguous(gamma);
        let gamma = gamma.storage::<f32>();
        cpu::map_rows(x, d, |_, rows| {
            Arch::new().dispatch(Forward { rows, gamma, eps: eps as f32 });
        })
    }

    fn rms_norm_backward(
        x: FlexTensor,
        gamma: FlexTensor,
        grad: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let d = cpu::last_dim(&x);
        if !cpu::all_f32(&[&x, &gamma, &grad]) || d == 0 {
            return composed_backward::<Self>(x, gamma, grad, eps);
        }
        let (x, gamma) = (cpu::contiguous(x), cpu::contiguous(gamma));
        let (values, scale) = (x.storage::<f32>(), gamma.storage::<f32>());
        let rows = values.len() / d;
        // At most 64 partial sums for gamma, however many rows there are.
        let block = cpu::block_rows(d).max(rows.div_ceil(64));
        let mut partial = vec![0.0; rows.div_ceil(block) * d];
        let dx = cpu::map(grad, |dx| {
            // One row of `partial` stands beside a block of rows of `dx`.
            cpu::blocks2((dx, block * d), (&mut partial, d), 1, |index, dx, dgamma| {
                let x = &values[index * block * d..][..dx.len()];
                Arch::new().dispatch(Reverse { x, dx, dgamma, gamma: scale, eps: eps as f32 });
            });
        });
        let mut dgamma = vec![0.0; d];
        for block in partial.chunks_exact(d) {
            for (sum, &part) in dgamma.iter_mut().zip(block) {
                *sum += part;
            }
        }
        (dx, cpu::tensor(dgamma, gamma.shape()))
    }
}

/// Norms rows as long as `gamma`, in place, on the calling thread.
pub(super) fn in_place(rows: &mut [f32], gamma: &[f32], eps: f32) {
    Arch::new().dispatch(Forward { rows, gamma, eps });
}

/// Rows of the forward pass.
struct Forward<'a> {
    rows: &'a mut [f32],
    gamma: &'a [f32],
    eps: f32,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let d = self.gamma.len();
        for row in self.rows.chunks_exact_mut(d) {
            let r = inverse_rms_of(row, self.eps);
            for (y, &g) in row.iter_mut().zip(self.gamma) {
                *y = *y * r * g;
            }
        }
    }
}

/// Rows of the backward pass; `dx` holds the gradient of the result.
struct Reverse<'a> {
    x: &'a [f32],
    dx: &'a mut [f32],
    dgamma: &'a mut [f32],
    gamma: &'a [f32],
    eps: f32,
}

impl WithSimd for Reverse<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let d = self.gamma.len();
        let gamma = self.gamma;
        let dgamma = &mut self.dgamma[..d];
        for (x, dx) in self.x.chunks_exact(d).zip(self.dx.chunks_exact_mut(d)) {
            let r = inverse_rms_of(x, self.eps);
            let along = cpu::sum([dx, gamma, x], |[g, gamma, x]| g * gamma * x) * r * r / d as f32;
            for j in 0..d {
                let g = dx[j];
                dgamma[j] += g * x[j] * r;
                dx[j] = r * (g * gamma[j] - x[j] * along);
            }
        }
    }
}

#[inline(always)]
fn inverse_rms_of(x: &[f32], eps: f32) -> f32 {
    1.0 / (cpu::sum([x], |[x]| x * x) / x.len() as f32 + eps).sqrt()
}

impl<B: Backend + RmsNormOps, C: CheckpointStrategy> RmsNormOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct RmsNorm;

        impl<B: Backend + RmsNormOps> Backward<B, 2> for RmsNorm {
            type State = (FloatTensor<B>, FloatTensor<B>, f64);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (x, gamma, eps) = ops.state;
                let (dx, dgamma) = B::rms_norm_backward(x, gamma, grad, eps);
                for (parent, grad) in ops.parents.into_iter().zip([dx, dgamma]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (x, x_node) = x.into_parts();
        let (gamma, gamma_node) = gamma.into_parts();
        match RmsNorm.prepare::<C>([x_node, gamma_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::rms_norm(x.clone(), gamma.clone(), eps);
                prep.finish((x, gamma, eps), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, gamma, eps)),
        }
    }
}
