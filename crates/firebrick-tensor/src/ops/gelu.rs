//! Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv:1606.08415), the exact one.

use burn::backend::backend_extension;
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
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// `x cdf(x)` with the distribution function `cdf(x) = (1 + erf(x / sqrt 2)) / 2` of the standard normal: BERT's
/// activation, not its approximation by tanh. The gradient is exact on every device; that of burn's `gelu` is the
/// approximation's on some.
///
/// - x: any shape
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(<burn::backend::Dispatch as GeluOps>::exact_gelu(x.into_dispatch()))
}

/// GELU on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait GeluOps: Backend {
    /// Forward pass, see [`gelu`].
    #[fusion(default)]
    fn exact_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::<Self>(x)
    }

    /// Gradient for `x` from the gradient of the result.
    #[fusion(default)]
    fn exact_gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        composed_backward::<Self>(x, grad)
    }
}

/// The distribution function of the standard normal.
fn cdf<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x, std::f64::consts::FRAC_1_SQRT_2.into()));
    B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into())
}

fn composed<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(x.clone(), cdf::<B>(x))
}

fn composed_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let square = B::float_mul(x.clone(), x.clone());
    let bell = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
    let density = B::float_mul_scalar(bell, f64::from(DENSITY_AT_0).into());
    // (x cdf)' = cdf + x density
    let slope = B::float_add(cdf::<B>(x.clone()), B::float_mul(x, density));
    B::float_mul(grad, slope)
}

#[cfg(feature = "cubecl-backend")]
impl GeluOps for CubeBackend {}

impl GeluOps for Flex {
    fn exact_gelu(x: FlexTensor) -> FlexTensor {
        if !cpu::all_f32(&[&x]) {
            return composed::<Self>(x);
        }
        cpu::map_rows(x, 1, |_, out| Arch::new().dispatch(Forward { out }))
    }

    fn exact_gelu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if !cpu::all_f32(&[&x, &grad]) {
            return composed_backward::<Self>(x, grad);
        }
        let x = cpu::contiguous(x);
        let x = x.storage::<f32>();
        cpu::map_rows(grad, 1, |first, out| {
            let x = &x[first..][..out.len()];
            Arch::new().dispatch(Reverse { x, out });
        })
    }
}

/// `1 / sqrt(2 pi)`.
const DENSITY_AT_0: f32 = 0.398_942_3;

/// `cdf(-|x|)` and `e^(-x^2 / 2)`, the first within 1e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
fn tail(x: f32) -> (f32, f32) {
    // Farther out both are 0 in f32.
    let z = x.abs().min(20.0);
    let bell = cpu::exp(-0.5 * z * z);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * z);
    let sum = -1.453_152 + t * 1.061_405_4;
    let sum = 0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * sum));
    (0.5 * t * sum * bell, bell)
}

/// A run of elements; `out` holds `x`.
struct Forward<'a> {
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for y in self.out.iter_mut() {
            let x = *y;
            let magnitude = x.abs();
            // Half and half is the positive part, and NaN stays NaN.
            *y = 0.5 * x + 0.5 * magnitude - magnitude.min(20.0) * tail(x).0;
        }
    }
}

/// A run of elements; `out` holds the gradient of the result.
struct Reverse<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Reverse<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (y, &x) in self.out.iter_mut().zip(self.x) {
            let (below, bell) = tail(x);
            let cdf = if x > 0.0 { 1.0 - below } else { below };
            *y *= cdf + x.clamp(-20.0, 20.0) * bell * DENSITY_AT_0;
        }
    }
}

impl<B: Backend + GeluOps, C: CheckpointStrategy> GeluOps for Autodiff<B, C> {
    fn exact_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Gelu;

        impl<B: Backend + GeluOps> Backward<B, 1> for Gelu {
            type State = FloatTensor<B>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let dx = B::exact_gelu_backward(ops.state, grad);
                let [parent] = ops.parents;
                if let Some(parent) = parent {
                    grads.register::<B>(parent.id, dx);
                }
            }
        }

        let (x, node) = x.into_parts();
        match Gelu.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::exact_gelu(x.clone());
                prep.finish(x, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::exact_gelu(x)),
        }
    }
}
