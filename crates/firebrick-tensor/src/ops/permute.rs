//! Rows of tokens to the order of their experts, and the weighed results back (the permutations of MegaBlocks, Gale et al. 2022,
//! arXiv:2211.15841), each in one pass.

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn_backend::{
    Backend, Shape, TensorData, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// The token of each slot: row `i` of the result is row `order[i] / k` of `x`, with `k` slots for each token.
///
/// - x: `[tokens, d]`
/// - order: each slot `token * k + choice` once, in the order of the result
/// - result: `[slots, d]`
///
/// # Panics
/// If `order` has not each slot of some `k` once.
pub fn permute(x: Tensor<2>, order: &[usize]) -> Tensor<2> {
    let [tokens, _] = x.dims();
    check(order, tokens);
    Tensor::from_dispatch(<burn::backend::Dispatch as PermuteOps>::permute(x.into_dispatch(), order.to_vec()))
}

/// The results of each token's slots, weighed and added up; [`permute`] backwards.
///
/// - rows: `[slots, d]`, row `i` that of slot `order[i]`
/// - weights: `[tokens, k]`
/// - order: each slot `token * k + choice` once
/// - result: `[tokens, d]`
///
/// # Panics
/// If a shape disagrees or `order` has not each slot once.
pub fn unpermute(rows: Tensor<2>, weights: Tensor<2>, order: &[usize]) -> Tensor<2> {
    let ([slots, _], [tokens, k]) = (rows.dims(), weights.dims());
    assert_eq!(slots, tokens * k, "unpermute: rows against weights");
    assert_eq!(slots, order.len(), "unpermute: rows against slots");
    check(order, tokens);
    let (rows, weights) = (rows.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as PermuteOps>::unpermute(rows, weights, order.to_vec()))
}

fn check(order: &[usize], tokens: usize) {
    assert!(order.len().is_multiple_of(tokens.max(1)), "{} slots for {tokens} tokens", order.len());
    let mut seen = vec![false; order.len()];
    let each_once = order.iter().all(|&slot| slot < seen.len() && !std::mem::replace(&mut seen[slot], true));
    assert!(each_once, "the order of {} slots has one of them twice, or another", order.len());
}

/// The place of each slot in `order`.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut places = vec![0; order.len()];
    for (place, &slot) in order.iter().enumerate() {
        places[slot] = place;
    }
    places
}

/// Permutations of rows on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait PermuteOps: Backend {
    /// See [`permute`].
    #[fusion(default)]
    fn permute(x: FloatTensor<Self>, order: Vec<usize>) -> FloatTensor<Self> {
        composed::<Self>(x, &order)
    }

    /// See [`unpermute`].
    #[fusion(default)]
    fn unpermute(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: Vec<usize>,
    ) -> FloatTensor<Self> {
        composed_back::<Self>(rows, weights, &order)
    }

    /// Gradients of the rows and of the weights of [`unpermute`] by that of its result, `[tokens, d]`.
    #[fusion(default)]
    fn unpermute_backward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        order: Vec<usize>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(rows, weights, grad, &order)
    }
}

fn numbers<B: Backend>(x: &FloatTensor<B>, numbers: impl Iterator<Item = usize>) -> IntTensor<B> {
    let numbers: Vec<i32> = numbers.map(|n| n as i32).collect();
    let count = numbers.len();
    B::int_from_data(TensorData::new(numbers, [count]), &x.device())
}

fn composed<B: Backend>(x: FloatTensor<B>, order: &[usize]) -> FloatTensor<B> {
    let k = order.len() / x.shape()[0].max(1);
    let tokens = numbers::<B>(&x, order.iter().map(|slot| slot / k));
    B::float_select(x, 0, tokens)
}

fn composed_back<B: Backend>(
    rows: FloatTensor<B>,
    weights: FloatTensor<B>,
    order: &[usize],
) -> FloatTensor<B> {
    let (d, [tokens, k]) = (rows.shape()[1], [weights.shape()[0], weights.shape()[1]]);
    let places = numbers::<B>(&rows, inverse(order).into_iter());
    let slots = B::float_reshape(B::float_select(rows, 0, places), Shape::new([tokens, k, d]));
    let weights = B::float_reshape(weights, Shape::new([tokens, k, 1]));
    B::float_reshape(B::float_sum_dim(B::float_mul(slots, weights), 1), Shape::new([tokens, d]))
}

fn composed_backward<B: Backend>(
    rows: FloatTensor<B>,
    weights: FloatTensor<B>,
    grad: FloatTensor<B>,
    order: &[usize],
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (d, [tokens, k]) = (rows.shape()[1], [weights.shape()[0], weights.shape()[1]]);
    let places = numbers::<B>(&rows, inverse(order).into_iter());
    let slots = B::float_reshape(B::float_select(rows, 0, places), Shape::new([tokens, k, d]));
    let wide = B::float_reshape(grad.clone(), Shape::new([tokens, 1, d]));
    let dweights = B::float_sum_dim(B::float_mul(slots, wide), 2);
    let by_slot = B::float_reshape(weights, Shape::new([tokens * k, 1]));
    let order_of = numbers::<B>(&by_slot, order.iter().copied());
    let drows = B::float_mul(composed::<B>(grad, order), B::float_select(by_slot, 0, order_of));
    (drows, B::float_reshape(dweights, Shape::new([tokens, k])))
}

#[cfg(feature = "cubecl-backend")]
impl PermuteOps for CubeBackend {}

impl PermuteOps for Flex {
    fn permute(x: FlexTensor, order: Vec<usize>) -> FlexTensor {
        let [tokens, d] = [x.shape()[0], x.shape()[1]];
        if !cpu::all_f32(&[&x]) || order.len() * d == 0 {
            return composed::<Self>(x, &order);
        }
        let x = cpu::contiguous(x);
        let (values, k, block) = (x.storage::<f32>(), order.len() / tokens, cpu::block_rows(d));
        let out = cpu::fresh(order.len() * d, block * d, |i, out| {
            for (row, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&values[order[i * block + row] / k * d..][..d]);
            }
        });
        cpu::tensor(out, Shape::new([order.len(), d]))
    }

    fn unpermute(rows: FlexTensor, weights: FlexTensor, order: Vec<usize>) -> FlexTensor {
        let [tokens, k, d] = [weights.shape()[0], weights.shape()[1], rows.shape()[1]];
        if !cpu::all_f32(&[&rows, &weights]) || tokens * k * d == 0 {
            return composed_back::<Self>(rows, weights, &order);
        }
        let (rows, weights, places) = (cpu::contiguous(rows), cpu::contiguous(weights), inverse(&order));
        let (values, weights, block) = (rows.storage::<f32>(), weights.storage::<f32>(), cpu::block_rows(d));
        let out = cpu::fresh(tokens * d, block * d, |i, out| {
            for (row, out) in out.chunks_exact_mut(d).enumerate() {
                let slots = (i * block + row) * k..(i * block + row + 1) * k;
                for (place, weight) in places[slots.clone()].iter().zip(&weights[slots]) {
                    let x = &values[place * d..][..d];
                    Arch::new().dispatch(Scaled { x, by: *weight, add: true, out: &mut *out });
                }
            }
        });
        cpu::tensor(out, Shape::new([tokens, d]))
    }

    fn unpermute_backward(
        rows: FlexTensor,
        weights: FlexTensor,
        grad: FlexTensor,
        order: Vec<usize>,
    ) -> (FlexTensor, FlexTensor) {
        let [tokens, k, d] = [weights.shape()[0], weights.shape()[1], rows.shape()[1]];
        if !cpu::all_f32(&[&rows, &weights, &grad]) || tokens * k * d == 0 {
            return composed_backward::<Self>(rows, weights, grad, &order);
        }
        let (rows, weights, grad) = (cpu::contiguous(rows), cpu::contiguous(weights), cpu::contiguous(grad));
        let (values, by_slot, grad) =
            (rows.storage::<f32>(), weights.storage::<f32>(), grad.storage::<f32>());
        let block = cpu::block_rows(d);
        let slope = |slot: usize| &grad[slot / k * d..][..d];
        let drows = cpu::fresh(order.len() * d, block * d, |i, out| {
            for (row, out) in out.chunks_exact_mut(d).enumerate() {
                let slot = order[i * block + row];
                Arch::new().dispatch(Scaled { x: slope(slot), by: by_slot[slot], add: false, out });
            }
        });
        let places = inverse(&order);
        let dweights = cpu::fresh(order.len(), block, |i, out| {
            for (j, out) in out.iter_mut().enumerate() {
                let slot = i * block + j;
                *out = Arch::new().dispatch(Dot(&values[places[slot] * d..][..d], slope(slot)));
            }
        });
        (cpu::tensor(drows, rows.shape()), cpu::tensor(dweights, weights.shape()))
    }
}

/// `out = by x`, or added to `out`.
struct Scaled<'a> {
    x: &'a [f32],
    by: f32,
    add: bool,
    out: &'a mut [f32],
}

impl WithSimd for Scaled<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let pairs = self.out.iter_mut().zip(self.x);
        if self.add {
            for (out, x) in pairs {
                *out += self.by * x;
            }
        } else {
            for (out, x) in pairs {
                *out = self.by * x;
            }
        }
    }
}

struct Dot<'a>(&'a [f32], &'a [f32]);

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let Dot(a, b) = self;
        cpu::sum([a, b], |[a, b]| a * b)
    }
}

impl<B: Backend + PermuteOps, C: CheckpointStrategy> PermuteOps for Autodiff<B, C> {
    fn permute(x: FloatTensor<Self>, order: Vec<usize>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Permute;

        impl<B: Backend + PermuteOps> Backward<B, 1> for Permute {
            type State = (usize, Vec<usize>);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let (tokens, order) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |grad| {
                    let shape = Shape::new([tokens, order.len() / tokens.max(1)]);
                    let ones = B::float_ones(shape, &grad.device(), grad.dtype().into());
                    B::unpermute(grad, ones, order)
                });
            }
        }

        let (x, node) = x.into_parts();
        let tokens = x.shape()[0];
        let y = B::permute(x, order.clone());
        match Permute.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((tokens, order), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn unpermute(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: Vec<usize>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Unpermute;

        impl<B: Backend + PermuteOps> Backward<B, 2> for Unpermute {
            type State = (FloatTensor<B>, FloatTensor<B>, Vec<usize>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (rows, weights, order) = ops.state;
                let (drows, dweights) = B::unpermute_backward(rows, weights, grad, order);
                for (parent, grad) in ops.parents.into_iter().zip([drows, dweights]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (rows, rows_node) = rows.into_parts();
        let (weights, weights_node) = weights.into_parts();
        let y = B::unpermute(rows.clone(), weights.clone(), order.clone());
        match Unpermute.prepare::<C>([rows_node, weights_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((rows, weights, order), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
