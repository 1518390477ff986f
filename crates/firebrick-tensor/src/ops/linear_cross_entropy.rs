//! Cross-entropy of a linear head that never holds the logits of all rows.
//!
//! Rows go through in chunks; the backward pass computes each chunk's logits again, so that what is kept between
//! the passes is one log-sum-exp for each row (after Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel).

use burn::backend::backend_extension;
use burn::tensor::{Int, Tensor};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{
    Backend, Slice, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::Flex;

use super::cross_entropy::CrossEntropyOps;
use super::matmul::{MatmulOps, Precision};

/// Logits held at a time.
const CHUNK: usize = 1 << 22;

/// Negative log-likelihood of each target under `softmax(hidden weight)`, in nats.
///
/// About 4 million logits (16 million in bf16) exist at a time, whatever `n` is, in the forward and in the backward pass. The gradient
/// of the weight is computed only if the weight is tracked.
///
/// - hidden: `[n, d]`
/// - weight: `[d, vocab]`
/// - targets: `[n]`, each in `0..vocab`
/// - result: `[n]`
///
/// # Panics
/// If a shape disagrees; on the CPU also if a target is out of range.
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    precision: Precision,
) -> Tensor<1> {
    assert_eq!(
        hidden.dims()[1],
        weight.dims()[0],
        "linear_cross_entropy: columns of hidden against rows of weight"
    );
    assert_eq!(hidden.dims()[0], targets.dims()[0], "linear_cross_entropy: rows of hidden against targets");
    let (hidden, weight, targets) = (hidden.into_dispatch(), weight.into_dispatch(), targets.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as LinearCrossEntropyOps>::linear_cross_entropy(
        hidden, weight, targets, precision,
    ))
}

/// Cross-entropy of a linear head on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait LinearCrossEntropyOps: Backend + CrossEntropyOps + MatmulOps {
    /// Loss of each row, see [`linear_cross_entropy`].
    #[fusion(default)]
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        forward::<Self>(&hidden, &weight, &targets, precision).0
    }
}

impl LinearCrossEntropyOps for Flex {}

#[cfg(feature = "cubecl-backend")]
impl LinearCrossEntropyOps for CubeBackend {}

/// Row ranges of the chunks for `rows` rows of `width` values; at least one, possibly empty.
///
/// Chunks of bf16 products are longer: the weights are rounded anew for each.
pub(super) fn chunks(rows: usize, width: usize, precision: Precision) -> Vec<std::ops::Range<usize>> {
    let values = if precision.is_bf16(rows) { 4 * CHUNK } else { CHUNK };
    let step = (values / width.max(1)).max(1);
    (0..rows.max(1)).step_by(step).map(|first| first..rows.min(first + step)).collect()
}

/// Some rows of a matrix or some values of a vector.
pub(super) fn rows<B: Backend>(x: &FloatTensor<B>, rows: &std::ops::Range<usize>) -> FloatTensor<B> {
    let mut slices: Vec<Slice> = x.shape().iter().map(|&n| Slice::from(0..n)).collect();
    slices[0] = Slice::from(rows.clone());
    B::float_slice(x.clone(), &slices)
}

fn forward<B: LinearCrossEntropyOps>(
    hidden: &FloatTensor<B>,
    weight: &FloatTensor<B>,
    targets: &IntTensor<B>,
    precision: Precision,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (mut loss, mut log_sum) = (Vec::new(), Vec::new());
    for chunk in chunks(hidden.shape()[0], weight.shape()[1], precision) {
        let logits = B::matmul(rows::<B>(hidden, &chunk), weight.clone(), precision);
        let targets = B::int_slice(targets.clone(), &[Slice::from(chunk)]);
        let (l, s) = B::cross_entropy(logits, targets);
        loss.push(l);
        log_sum.push(s);
    }
    (B::float_cat(loss, 0), B::float_cat(log_sum, 0))
}

#[derive(Debug, Clone)]
struct State<B: Backend> {
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    targets: IntTensor<B>,
    log_sum: FloatTensor<B>,
    precision: Precision,
}

/// Gradients for the hidden states and for the weight, each only if asked for.
fn backward<B: LinearCrossEntropyOps>(
    state: State<B>,
    grad: FloatTensor<B>,
    wants: [bool; 2],
) -> [Option<FloatTensor<B>>; 2] {
    let State { hidden, weight, targets, log_sum, precision } = state;
    head_backward::<B>(&hidden, &weight, wants, precision, |chunk, logits| {
        let (log_sum, grad) = (rows::<B>(&log_sum, chunk), rows::<B>(&grad, chunk));
        let targets = B::int_slice(targets.clone(), &[Slice::from(chunk.clone())]);
        B::cross_entropy_backward(logits, targets, log_sum, grad)
    })
}

/// Gradients for the hidden states and the weight of a linear head, each only if asked for; `dlogits` makes that of the
/// logits of a chunk of rows from the rows and the logits.
pub(super) fn head_backward<B: MatmulOps>(
    hidden: &FloatTensor<B>,
    weight: &FloatTensor<B>,
    wants: [bool; 2],
    precision: Precision,
    dlogits: impl Fn(&std::ops::Range<usize>, FloatTensor<B>) -> FloatTensor<B>,
) -> [Option<FloatTensor<B>>; 2] {
    let mut dhidden = Vec::new();
    let mut dweight =
        wants[1].then(|| B::float_zeros(weight.shape(), &weight.device(), weight.dtype().into()));
    for chunk in chunks(hidden.shape()[0], weight.shape()[1], precision) {
        let h = rows::<B>(hidden, &chunk);
        let dlogits = dlogits(&chunk, B::matmul(h.clone(), weight.clone(), precision));
        if wants[0] {
            dhidden.push(B::matmul(dlogits.clone(), B::float_swap_dims(weight.clone(), 0, 1), precision));
        }
        dweight = dweight.map(|sum| B::matmul_add(sum, B::float_swap_dims(h, 0, 1), dlogits, precision));
    }
    [wants[0].then(|| B::float_cat(dhidden, 0)), dweight]
}

impl<B: Backend + LinearCrossEntropyOps, C: CheckpointStrategy> LinearCrossEntropyOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LinearCrossEntropy;

        impl<B: Backend + LinearCrossEntropyOps> Backward<B, 2> for LinearCrossEntropy {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let wants = ops.parents.each_ref().map(Option::is_some);
                let computed = backward::<B>(ops.state, grad, wants);
                for (parent, grad) in ops.parents.into_iter().zip(computed) {
                    if let (Some(parent), Some(grad)) = (parent, grad) {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (hidden, hidden_node) = hidden.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let (loss, log_sum) = forward::<B>(&hidden, &weight, &targets, precision);
        match LinearCrossEntropy.prepare::<C>([hidden_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish(State { hidden, weight, targets, log_sum, precision }, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(loss),
        }
    }
}
