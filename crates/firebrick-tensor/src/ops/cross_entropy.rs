//! Cross-entropy from logits.

use burn::backend::backend_extension;
use burn::tensor::{Int, Tensor};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn_backend::{
    AutodiffBackend, Backend, DType, Shape, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// Negative log-likelihood of each target, in nats.
///
/// - logits: `[n, vocab]`
/// - targets: `[n]`, each in `0..vocab`
/// - result: `[n]`
///
/// # Panics
/// If a shape disagrees; on the CPU also if a target is out of range.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    assert_eq!(logits.dims()[0], targets.dims()[0], "cross_entropy: rows of logits against targets");
    let (logits, targets) = (logits.into_dispatch(), targets.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as CrossEntropyOps>::cross_entropy(logits, targets).0)
}

/// Cross-entropy on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait CrossEntropyOps: Backend {
    /// Loss of each row and its log-sum-exp, both `[n]`; no gradient flows through the second.
    #[fusion(meta = |logits, _targets| {
        let mut rows = logits.clone();
        rows.shape = Shape::new([logits.shape[0]]);
        (rows.clone(), rows)
    })]
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::<Self>(logits, targets)
    }

    /// Gradient for the logits, `(softmax - one_hot) * grad`, from their log-sum-exp and the gradient of the loss.
    #[fusion(dtype = logits, shape = logits)]
    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed_backward::<Self>(logits, targets, log_sum, grad)
    }
}

/// `[n]` as a column `[n, 1]`.
pub(super) fn column<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let n = x.shape()[0];
    B::float_reshape(x, Shape::new([n, 1]))
}

/// A column `[n, 1]` as `[n]`.
pub(super) fn flat<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let n = x.shape()[0];
    B::float_reshape(x, Shape::new([n]))
}

/// Log-sum-exp of each row, `[n, 1]`.
pub(super) fn log_sum_exp<B: Backend>(logits: FloatTensor<B>) -> FloatTensor<B> {
    let max = B::float_max_dim(logits.clone(), 1);
    let sum = B::float_sum_dim(B::float_exp(B::float_sub(logits, max.clone())), 1);
    B::float_add(B::float_log(sum), max)
}

pub(super) fn composed<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let n = logits.shape()[0];
    let picked = B::float_gather(1, logits.clone(), B::int_reshape(targets, Shape::new([n, 1])));
    let log_sum = log_sum_exp::<B>(logits);
    (flat::<B>(B::float_sub(log_sum.clone(), picked)), flat::<B>(log_sum))
}

pub(super) fn composed_backward<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    log_sum: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let n = logits.shape()[0];
    let grad = column::<B>(grad);
    let p = B::float_exp(B::float_sub(logits, column::<B>(log_sum)));
    let scaled = B::float_mul(p, grad.clone());
    B::float_scatter(
        1,
        scaled,
        B::int_reshape(targets, Shape::new([n, 1])),
        B::float_neg(grad),
        burn_backend::tensor::IndexingUpdateOp::Add,
    )
}

impl CrossEntropyOps for Flex {
    fn cross_entropy(logits: FlexTensor, targets: FlexTensor) -> (FlexTensor, FlexTensor) {
        let (n, vocab) = (logits.shape()[0], logits.shape()[1]);
        let (true, Some(targets)) = (cpu::all_f32(&[&logits]) && vocab > 0, indices(&targets, vocab)) else {
            return composed::<Self>(logits, targets);
        };
        let logits = cpu::contiguous(logits);
        let values = logits.storage::<f32>();
        let (mut loss, mut log_sum) = (vec![0.0; n], vec![0.0; n]);
        cpu::blocks2((&mut loss, 1), (&mut log_sum, 1), cpu::block_rows(vocab), |first, loss, log_sum| {
            let logits = &values[first * vocab..][..loss.len() * vocab];
            let targets = &targets[first..][..loss.len()];
            Arch::new().dispatch(Forward { logits, targets, loss, log_sum });
        });
        (cpu::tensor(loss, Shape::new([n])), cpu::tensor(log_sum, Shape::new([n])))
    }

    fn cross_entropy_backward(
        logits: FlexTensor,
        targets: FlexTensor,
        log_sum: FlexTensor,
        grad: FlexTensor,
    ) -> FlexTensor {
        let vocab = logits.shape()[1];
        let f32s = cpu::all_f32(&[&logits, &log_sum, &grad]) && vocab > 0;
        let (true, Some(targets)) = (f32s, indices(&targets, vocab)) else {
            return composed_backward::<Self>(logits, targets, log_sum, grad);
        };
        let (log_sum, grad) = (cpu::contiguous(log_sum), cpu::contiguous(grad));
        let (log_sum, grad) = (log_sum.storage::<f32>(), grad.storage::<f32>());
        cpu::map_rows(logits, vocab, |first, out| {
            let rows = first..first + out.len() / vocab;
            let (targets, log_sum, grad) = (&targets[rows.clone()], &log_sum[rows.clone()], &grad[rows]);
            Arch::new().dispatch(Reverse { out, targets, log_sum, grad });
        })
    }
}

/// Targets on the host; `None` for integer types without a kernel.
///
/// # Panics
/// If one is not in `0..vocab`.
pub(super) fn indices(targets: &FlexTensor, vocab: usize) -> Option<Vec<usize>> {
    let targets = cpu::contiguous(targets.clone());
    let wide: Vec<i64> = match targets.dtype() {
        DType::I64 => targets.storage::<i64>().to_vec(),
        DType::I32 => targets.storage::<i32>().iter().map(|&t| t.into()).collect(),
        _ => return None,
    };
    if let Some(bad) = wide.iter().find(|&&t| t < 0 || t as usize >= vocab) {
        panic!("target {bad} is outside of a vocabulary of {vocab}");
    }
    Some(wide.into_iter().map(|t| t as usize).collect())
}

struct Forward<'a> {
    logits: &'a [f32],
    targets: &'a [usize],
    loss: &'a mut [f32],
    log_sum: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let vocab = self.logits.len() / self.targets.len();
        for (i, row) in self.logits.chunks_exact(vocab).enumerate() {
            self.log_sum[i] = log_sum_exp_of(row, 1.0);
            self.loss[i] = self.log_sum[i] - row[self.targets[i]];
        }
    }
}

/// Log-sum-exp of a row times a positive factor.
#[inline(always)]
pub(super) fn log_sum_exp_of(row: &[f32], factor: f32) -> f32 {
    let max = cpu::max(row) * factor;
    max + cpu::sum([row], |[x]| cpu::exp(x * factor - max)).ln()
}

/// Rows of the backward pass; `out` holds the logits.
struct Reverse<'a> {
    out: &'a mut [f32],
    targets: &'a [usize],
    log_sum: &'a [f32],
    grad: &'a [f32],
}

impl WithSimd for Reverse<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let vocab = self.out.len() / self.targets.len();
        for (i, row) in self.out.chunks_exact_mut(vocab).enumerate() {
            let (log_sum, grad) = (self.log_sum[i], self.grad[i]);
            for x in row.iter_mut() {
                *x = cpu::exp(*x - log_sum) * grad;
            }
            row[self.targets[i]] -= grad;
        }
    }
}

impl<B: Backend + CrossEntropyOps, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct CrossEntropy;

        impl<B: Backend + CrossEntropyOps> Backward<B, 1> for CrossEntropy {
            type State = (FloatTensor<B>, IntTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let (logits, targets, log_sum) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |grad| {
                    B::cross_entropy_backward(logits, targets, log_sum, grad)
                });
            }
        }

        let (logits, node) = logits.into_parts();
        let (loss, log_sum) = B::cross_entropy(logits.clone(), targets.clone());
        let constant = Self::from_inner(log_sum.clone());
        let loss = match CrossEntropy.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((logits, targets, log_sum), loss),
            OpsKind::UnTracked(prep) => prep.finish(loss),
        };
        (loss, constant)
    }
}
