//! One step of Adam with decoupled weight decay (arXiv 1711.05101), parameter and both moments in one pass over memory.

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_backend::{Backend, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::awake;
use super::cpu;

/// Settings of [`adamw`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first and of the second moment, each in `0..1`.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Fraction of a value taken off, times the learning rate.
    pub weight_decay: f64,
    /// Number of this step, from 1: moments that began at 0 are too small at first.
    pub step: u64,
}

/// New values and new first and second moments, as `torch.optim.AdamW` computes them; on the CPU in place where a tensor
/// is held once. No gradients flow through it.
///
/// - values, gradient, first, second: `[n]`
///
/// # Panics
/// If the lengths differ.
pub fn adamw(
    values: Tensor<1>,
    gradient: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    options: AdamWOptions,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    for (name, other) in [("gradient", &gradient), ("first moment", &first), ("second moment", &second)] {
        assert_eq!(values.dims(), other.dims(), "adamw: values against {name}");
    }
    let (values, gradient) = (values.into_dispatch(), gradient.into_dispatch());
    let (first, second) = (first.into_dispatch(), second.into_dispatch());
    let (values, first, second) =
        <burn::backend::Dispatch as AdamWOps>::adamw(values, gradient, first, second, options);
    (Tensor::from_dispatch(values), Tensor::from_dispatch(first), Tensor::from_dispatch(second))
}

/// AdamW on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait AdamWOps: Backend {
    /// See [`adamw`].
    #[fusion(default)]
    fn adamw(
        values: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        options: AdamWOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::<Self>(values, gradient, first, second, options)
    }
}

/// What a step multiplies by.
struct Factors {
    betas: [f64; 2],
    /// On the root of the second moment.
    root: f64,
    eps: f64,
    update: f64,
    keep: f64,
}

impl AdamWOptions {
    fn factors(&self) -> Factors {
        let t = self.step.min(i32::MAX as u64) as i32;
        let [correction1, correction2] = self.betas.map(|beta| 1.0 - beta.powi(t));
        Factors {
            betas: self.betas,
            root: 1.0 / correction2.sqrt(),
            eps: self.eps,
            update: self.learning_rate / correction1,
            keep: 1.0 - self.learning_rate * self.weight_decay,
        }
    }
}

fn composed<B: Backend>(
    values: FloatTensor<B>,
    gradient: FloatTensor<B>,
    first: FloatTensor<B>,
    second: FloatTensor<B>,
    options: AdamWOptions,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let f = options.factors();
    let times = |x, factor: f64| B::float_mul_scalar(x, factor.into());
    let average = |moment, beta: f64, new| B::float_add(times(moment, beta), times(new, 1.0 - beta));
    let squared = B::float_mul(gradient.clone(), gradient.clone());
    let first = average(first, f.betas[0], gradient);
    let second = average(second, f.betas[1], squared);
    let root = B::float_add_scalar(times(B::float_sqrt(second.clone()), f.root), f.eps.into());
    let update = times(B::float_div(first.clone(), root), f.update);
    (B::float_sub(times(values, f.keep), update), first, second)
}

#[cfg(feature = "cubecl-backend")]
impl AdamWOps for CubeBackend {}

impl<B: Backend + AdamWOps, C: burn_autodiff::checkpoint::strategy::CheckpointStrategy> AdamWOps
    for burn_autodiff::Autodiff<B, C>
{
}

/// Values in a task.
const TASK: usize = 1 << 15;

impl AdamWOps for Flex {
    fn adamw(
        values: FlexTensor,
        gradient: FlexTensor,
        first: FlexTensor,
        second: FlexTensor,
        options: AdamWOptions,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if !cpu::all_f32(&[&values, &gradient, &first, &second]) {
            return composed::<Self>(values, gradient, first, second, options);
        }
        let factors = options.factors();
        let gradient = cpu::contiguous(gradient);
        let gradient = gradient.storage::<f32>();
        let (mut values, mut first, mut second) = (owned(values), owned(first), owned(second));
        let tasks = values
            .storage_mut::<f32>()
            .chunks_mut(TASK)
            .zip(first.storage_mut::<f32>().chunks_mut(TASK))
            .zip(second.storage_mut::<f32>().chunks_mut(TASK))
            .zip(gradient.chunks(TASK));
        awake::each(tasks.collect(), |(((values, first), second), gradient)| {
            Arch::new().dispatch(Step { values, gradient, first, second, factors: &factors });
        });
        (values, first, second)
    }
}

/// A row-major tensor that nobody else holds.
fn owned(x: FlexTensor) -> FlexTensor {
    let mut x = cpu::contiguous(x);
    if x.try_storage_mut::<f32>().is_some() {
        return x;
    }
    let copy = x.storage::<f32>().to_vec();
    cpu::tensor(copy, x.layout().shape().clone())
}

struct Step<'a> {
    values: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    factors: &'a Factors,
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let f = self.factors;
        let [beta1, beta2] = f.betas.map(|beta| beta as f32);
        let [new1, new2] = f.betas.map(|beta| (1.0 - beta) as f32);
        let (root, eps, update, keep) = (f.root as f32, f.eps as f32, f.update as f32, f.keep as f32);
        let n = self.values.len();
        let (values, gradient) = (&mut self.values[..n], &self.gradient[..n]);
        let (first, second) = (&mut self.first[..n], &mut self.second[..n]);
        for i in 0..n {
            let g = gradient[i];
            // The order of the composed body, so that both round alike.
            let m = first[i] * beta1 + g * new1;
            let v = second[i] * beta2 + g * g * new2;
            first[i] = m;
            second[i] = v;
            values[i] = values[i] * keep - m / (v.sqrt() * root + eps) * update;
        }
    }
}
