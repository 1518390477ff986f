//! Cross-entropy of a linear head that never holds the logits of all rows.
//!
//! Rows go through in chunks; the backward pass computes each chunk's logits again but for the last one's, so that what is kept between
//! the passes is those and one log-sum-exp for each row (after Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel). Below a
//! head that is not trained, the slope of each row's loss is taken while its logits are there, and they are computed once.

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

use super::cross_entropy::{CrossEntropyOps, column};
use super::matmul::{MatmulOps, Precision};

/// Logits held at a time.
const CHUNK: usize = 1 << 25;

/// Negative log-likelihood of each target under `softmax(hidden weight)`, in nats.
///
/// About 32 million logits exist at a time, whatever `n` is, in the forward and in the backward pass. The gradient of the weight is
/// computed only if the weight is tracked.
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
        forward::<Self>(&hidden, &weight, &targets, precision, Keep::Nothing).loss
    }
}

impl LinearCrossEntropyOps for Flex {}

#[cfg(feature = "cubecl-backend")]
impl LinearCrossEntropyOps for CubeBackend {}

/// Row ranges of about even chunks for `rows` rows of `width` values; at least one, possibly empty. Each reads all weights.
pub(super) fn chunks(rows: usize, width: usize) -> Vec<std::ops::Range<usize>> {
    let most = (CHUNK / width.max(1)).max(1);
    let step = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
    (0..rows.max(1)).step_by(step).map(|first| first..rows.min(first + step)).collect()
}

/// Some rows of a matrix or some values of a vector.
pub(super) fn rows<B: Backend>(x: &FloatTensor<B>, rows: &std::ops::Range<usize>) -> FloatTensor<B> {
    let mut slices: Vec<Slice> = x.shape().iter().map(|&n| Slice::from(0..n)).collect();
    slices[0] = Slice::from(rows.clone());
    B::float_slice(x.clone(), &slices)
}

struct Forward<B: Backend> {
    loss: FloatTensor<B>,
    log_sum: FloatTensor<B>,
    /// Of each chunk the gradient of each row's own loss for its hidden state, `[rows, d]`, if they are to be kept.
    slopes: Vec<FloatTensor<B>>,
    /// Logits of the last chunk, if they are to be kept.
    last: Option<FloatTensor<B>>,
}

/// What of the logits the backward pass will want.
#[derive(Clone, Copy, PartialEq)]
enum Keep {
    Nothing,
    Slopes,
    Last,
}

fn forward<B: LinearCrossEntropyOps>(
    hidden: &FloatTensor<B>,
    weight: &FloatTensor<B>,
    targets: &IntTensor<B>,
    precision: Precision,
    keep: Keep,
) -> Forward<B> {
    let (mut loss, mut log_sum, mut slopes, mut last) = (Vec::new(), Vec::new(), Vec::new(), None);
    for chunk in chunks(hidden.shape()[0], weight.shape()[1]) {
        drop(last.take());
        let logits = B::matmul(rows::<B>(hidden, &chunk), weight.clone(), precision);
        let targets = B::int_slice(targets.clone(), &[Slice::from(chunk)]);
        let (l, s) = B::cross_entropy(logits.clone(), targets.clone());
        match keep {
            Keep::Nothing => {}
            Keep::Slopes => {
                let ones = B::float_ones(l.shape(), &l.device(), l.dtype().into());
                let dlogits = B::cross_entropy_backward(logits, targets, s.clone(), ones);
                slopes.push(B::matmul(dlogits, B::float_swap_dims(weight.clone(), 0, 1), precision));
            }
            Keep::Last => last = Some(logits),
        }
        loss.push(l);
        log_sum.push(s);
    }
    Forward { loss: B::float_cat(loss, 0), log_sum: B::float_cat(log_sum, 0), slopes, last }
}

/// What is kept for the backward pass.
#[derive(Debug, Clone)]
enum State<B: Backend> {
    /// Of a head that is not trained: the gradient of each row's loss, `[n, d]`.
    Slopes(FloatTensor<B>),
    Inputs(Inputs<B>),
}

#[derive(Debug, Clone)]
struct Inputs<B: Backend> {
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    targets: IntTensor<B>,
    log_sum: FloatTensor<B>,
    /// Logits of the last chunk.
    last: Option<FloatTensor<B>>,
    precision: Precision,
}

/// Gradients for the hidden states and for the weight, each only if asked for.
fn backward<B: LinearCrossEntropyOps>(
    state: State<B>,
    grad: FloatTensor<B>,
    wants: [bool; 2],
) -> [Option<FloatTensor<B>>; 2] {
    let Inputs { hidden, weight, targets, log_sum, last, precision } = match state {
        State::Slopes(slopes) => {
            return [Some(B::float_mul(slopes, column::<B>(grad))), None];
        }
        State::Inputs(inputs) => inputs,
    };
    head_backward::<B>(&hidden, &weight, wants, precision, last, |chunk, logits| {
        let (log_sum, grad) = (rows::<B>(&log_sum, chunk), rows::<B>(&grad, chunk));
        let targets = B::int_slice(targets.clone(), &[Slice::from(chunk.clone())]);
        B::cross_entropy_backward(logits, targets, log_sum, grad)
    })
}

/// Gradients for the hidden states and the weight of a linear head, each only if asked for; `last` are the logits of the last chunk if
/// they are still there, and `dlogits` makes the gradient of the logits of a chunk of rows from the rows and the logits.
pub(super) fn head_backward<B: MatmulOps>(
    hidden: &FloatTensor<B>,
    weight: &FloatTensor<B>,
    wants: [bool; 2],
    precision: Precision,
    mut last: Option<FloatTensor<B>>,
    dlogits: impl Fn(&std::ops::Range<usize>, FloatTensor<B>) -> FloatTensor<B>,
) -> [Option<FloatTensor<B>>; 2] {
    let mut dhidden = Vec::new();
    let mut dweight = None;
    for chunk in chunks(hidden.shape()[0], weight.shape()[1]).into_iter().rev() {
        let h = rows::<B>(hidden, &chunk);
        let logits = last.take().unwrap_or_else(|| B::matmul(h.clone(), weight.clone(), precision));
        let dlogits = dlogits(&chunk, logits);
        if wants[0] {
            dhidden.push(B::matmul(dlogits.clone(), B::float_swap_dims(weight.clone(), 0, 1), precision));
        }
        if wants[1] {
            dweight = Some(match dweight {
                Some(sum) => B::matmul_add(sum, B::float_swap_dims(h, 0, 1), dlogits, precision),
                None => B::weight_gradient(h, dlogits, weight.clone(), precision),
            });
        }
    }
    dhidden.reverse();
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

        let keep = match (hidden.is_tracked(), weight.is_tracked()) {
            (false, false) => Keep::Nothing,
            (true, false) => Keep::Slopes,
            (_, true) => Keep::Last,
        };
        let (hidden, hidden_node) = hidden.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let Forward { loss, log_sum, slopes, last } =
            forward::<B>(&hidden, &weight, &targets, precision, keep);
        match LinearCrossEntropy.prepare::<C>([hidden_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) if keep == Keep::Slopes => {
                prep.finish(State::Slopes(B::float_cat(slopes, 0)), loss)
            }
            OpsKind::Tracked(prep) => {
                let inputs = Inputs { hidden, weight, targets, log_sum, last, precision };
                prep.finish(State::Inputs(inputs), loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(loss),
        }
    }
}
