//! The experts of a mixture, each a gated linear unit (Shazeer 2020, arXiv:2002.05202) on its own rows.
//!
//! What an expert does with few rows is bound by reading its weights and by passing results from product to product. Here one task does all
//! of an expert: what lies between its products stays in a cache, forwards and backwards, and the weights of the next product are asked for
//! during each.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, TensorMetadata, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use faer::MatRef;

use super::gemm_f32::{gemm_add_ahead, gemm_ahead, gemm_past, panel};
use super::grouped_matmul::{GroupedMatmulOps, ROWS, Stack, check_offsets, segments};
use super::swiglu::{SwigluOps, gated, gated_backward};
use super::{awake, cpu};

thread_local! {
    /// What lies between the products of an expert.
    static INNER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `(silu(x gate[e]) * (x up[e])) down[e]` for the rows `offsets[e]..offsets[e + 1]` of `x`, for every expert `e`.
///
/// An expert without rows gets gradients of zero.
///
/// - x: `[rows, d_model]`, sorted by expert
/// - gate, up: `[experts, d_model, d_ff]`
/// - down: `[experts, d_ff, d_model]`
/// - offsets: `experts + 1` row numbers from 0 to `rows`, none below the one before
/// - result: `[rows, d_model]`
///
/// # Panics
/// If a shape disagrees or `offsets` are not as above.
pub fn grouped_swiglu(
    x: Tensor<2>,
    gate: Tensor<3>,
    up: Tensor<3>,
    down: Tensor<3>,
    offsets: &[usize],
) -> Tensor<2> {
    let ([rows, d_model], [experts, _, d_ff]) = (x.dims(), gate.dims());
    assert_eq!(gate.dims(), [experts, d_model, d_ff], "grouped_swiglu: shape of gate");
    assert_eq!(up.dims(), gate.dims(), "grouped_swiglu: shape of up");
    assert_eq!(down.dims(), [experts, d_ff, d_model], "grouped_swiglu: shape of down");
    check_offsets("grouped_swiglu", offsets, experts, rows);
    let (x, offsets) = (x.into_dispatch(), offsets.to_vec());
    let [gate, up, down] = [gate, up, down].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<burn::backend::Dispatch as GroupedSwigluOps>::grouped_swiglu(
        x, gate, up, down, offsets,
    ))
}

/// Gated experts on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait GroupedSwigluOps: Backend + GroupedMatmulOps + SwigluOps {
    /// Forward pass, see [`grouped_swiglu`].
    #[fusion(default)]
    fn grouped_swiglu(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        composed::<Self>(x, gate, up, down, offsets).0
    }

    /// Forward pass with the outputs of `gate` and `up`, `[rows, d_ff]`, which the backward pass needs.
    #[fusion(default)]
    fn grouped_swiglu_kept(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::<Self>(x, gate, up, down, offsets)
    }

    /// Gradient for `x` from that of the result; `inner_gate` and `inner_up` are the outputs of `gate` and `up`.
    #[fusion(default)]
    fn grouped_swiglu_input(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        inner_gate: FloatTensor<Self>,
        inner_up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        composed_input::<Self>(gate, up, down, inner_gate, inner_up, grad, &offsets).0
    }

    /// Gradients for `x`, `gate`, `up` and `down`, from what [`grouped_swiglu_input`](Self::grouped_swiglu_input) takes and `x`.
    #[fusion(default)]
    fn grouped_swiglu_backward(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        inner_gate: FloatTensor<Self>,
        inner_up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(x, gate, up, down, inner_gate, inner_up, grad, offsets)
    }
}

fn composed<B: GroupedSwigluOps>(
    x: FloatTensor<B>,
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    down: FloatTensor<B>,
    offsets: Vec<usize>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let inner_gate = B::grouped_matmul(x.clone(), gate, offsets.clone());
    let inner_up = B::grouped_matmul(x, up, offsets.clone());
    let inner = B::swiglu(inner_gate.clone(), inner_up.clone());
    (B::grouped_matmul(inner, down, offsets), inner_gate, inner_up)
}

/// Gradients for `x` and for the outputs of `gate` and `up`.
fn composed_input<B: GroupedSwigluOps>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    down: FloatTensor<B>,
    inner_gate: FloatTensor<B>,
    inner_up: FloatTensor<B>,
    grad: FloatTensor<B>,
    offsets: &[usize],
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let back = |grad, weight| B::grouped_matmul(grad, B::float_swap_dims(weight, 1, 2), offsets.to_vec());
    let (dgate, dup) = B::swiglu_backward(inner_gate, inner_up, back(grad, down));
    (B::float_add(back(dgate.clone(), gate), back(dup.clone(), up)), dgate, dup)
}

#[expect(clippy::too_many_arguments, reason = "three weights and what was computed with them")]
fn composed_backward<B: GroupedSwigluOps>(
    x: FloatTensor<B>,
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    down: FloatTensor<B>,
    inner_gate: FloatTensor<B>,
    inner_up: FloatTensor<B>,
    grad: FloatTensor<B>,
    offsets: Vec<usize>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let of_weight = |x, grad| B::grouped_matmul_weight(x, grad, offsets.clone());
    let inner = B::swiglu(inner_gate.clone(), inner_up.clone());
    let ddown = of_weight(inner, grad.clone());
    let (dx, dgate, dup) = composed_input::<B>(gate, up, down, inner_gate, inner_up, grad, &offsets);
    (dx, of_weight(x.clone(), dgate), of_weight(x, dup), ddown)
}

#[cfg(feature = "cubecl-backend")]
impl GroupedSwigluOps for CubeBackend {}

/// Whether one task does all of an expert: where none has more rows, so that what lies between its products fits a cache.
fn in_one(tensors: &[&FlexTensor], offsets: &[usize]) -> bool {
    let filled = tensors.iter().all(|t| t.shape().num_elements() > 0);
    filled && cpu::all_f32(tensors) && segments(offsets).all(|segment| segment.len() <= ROWS)
}

impl GroupedSwigluOps for Flex {
    fn grouped_swiglu(
        x: FlexTensor,
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        offsets: Vec<usize>,
    ) -> FlexTensor {
        if !in_one(&[&x, &gate, &up, &down], &offsets) {
            return composed::<Self>(x, gate, up, down, offsets).0;
        }
        forward(x, [gate, up, down], &offsets, None)
    }

    fn grouped_swiglu_kept(
        x: FlexTensor,
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        offsets: Vec<usize>,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if !in_one(&[&x, &gate, &up, &down], &offsets) {
            return composed::<Self>(x, gate, up, down, offsets);
        }
        let shape = Shape::new([x.shape()[0], gate.shape()[2]]);
        let len = shape.num_elements();
        let mut kept = [(); 2].map(|()| Vec::with_capacity(len));
        let y = forward(x, [gate, up, down], &offsets, Some(&mut kept));
        let [inner_gate, inner_up] = kept.map(|mut kept| {
            // SAFETY: the pass has written all rows.
            unsafe { kept.set_len(len) };
            cpu::tensor(kept, shape.clone())
        });
        (y, inner_gate, inner_up)
    }

    fn grouped_swiglu_input(
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        inner_gate: FlexTensor,
        inner_up: FlexTensor,
        grad: FlexTensor,
        offsets: Vec<usize>,
    ) -> FlexTensor {
        if !in_one(&[&gate, &up, &down, &inner_gate, &inner_up, &grad], &offsets) {
            return composed_input::<Self>(gate, up, down, inner_gate, inner_up, grad, &offsets).0;
        }
        backward(None, [gate, up, down], [inner_gate, inner_up], grad, &offsets).0
    }

    fn grouped_swiglu_backward(
        x: FlexTensor,
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        inner_gate: FlexTensor,
        inner_up: FlexTensor,
        grad: FlexTensor,
        offsets: Vec<usize>,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        if !in_one(&[&x, &gate, &up, &down, &inner_gate, &inner_up, &grad], &offsets) {
            return composed_backward::<Self>(x, gate, up, down, inner_gate, inner_up, grad, offsets);
        }
        let (dx, weights) = backward(Some(x), [gate, up, down], [inner_gate, inner_up], grad, &offsets);
        let [dgate, dup, ddown] = weights.expect("asked for with x");
        (dx, dgate, dup, ddown)
    }
}

/// The rows of an expert.
fn matrix(x: &[f32], rows: std::ops::Range<usize>, width: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(&x[rows.start * width..rows.end * width], rows.len(), width)
}

/// Numbers of the experts that have rows.
fn with_rows(offsets: &[usize]) -> Vec<usize> {
    segments(offsets).enumerate().filter(|(_, segment)| !segment.is_empty()).map(|(e, _)| e).collect()
}

/// Takes the next `len` values off `rest`.
fn take<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    rest.split_off_mut(..len).expect("room for all experts")
}

/// The result; `kept` get the outputs of gate and up.
fn forward(
    x: FlexTensor,
    weights: [FlexTensor; 3],
    offsets: &[usize],
    kept: Option<&mut [Vec<f32>; 2]>,
) -> FlexTensor {
    let (x, weights) = (cpu::contiguous(x), weights.map(Stack::readable));
    let [gate, up, down] = weights.each_ref().map(Stack::new);
    let (rows, [_, d_model, d_ff]) = (x.shape()[0], gate.dims);
    let values = x.storage::<f32>();
    let mut out = Vec::with_capacity(rows * d_model);
    let mut rest = &mut out.spare_capacity_mut()[..rows * d_model];
    let mut rest_kept =
        kept.map(|kept| kept.each_mut().map(|kept| &mut kept.spare_capacity_mut()[..rows * d_ff]));
    let experts = with_rows(offsets);
    let tasks = experts.iter().map(|&e| {
        let count = offsets[e + 1] - offsets[e];
        let kept = rest_kept.as_mut().map(|rest| rest.each_mut().map(|rest| take(rest, count * d_ff)));
        (e, take(&mut rest, count * d_model), kept)
    });
    let mut tasks: Vec<_> = tasks.collect();
    awake::parts(&mut tasks, 1, |i, task| {
        let (e, out, kept) = &mut task[0];
        let e = *e;
        let x = matrix(values, offsets[e]..offsets[e + 1], d_model);
        let len = x.nrows() * d_ff;
        // Threads take the tasks in turns.
        let next = experts.get(i + rayon::current_num_threads()).map_or(e, |&next| next);
        let then = [panel(gate.matrix(next)), matrix(values, offsets[next]..offsets[next + 1], d_model)];
        INNER.with_borrow_mut(|room| {
            room.resize(2 * len, 0.0);
            let (inner, gates) = room.split_at_mut(len);
            gemm_ahead(cpu::room(gates), x, gate.matrix(e), &[panel(up.matrix(e))]);
            gemm_ahead(cpu::room(inner), x, up.matrix(e), &[panel(down.matrix(e))]);
            if let Some([kept_gate, kept_up]) = kept {
                kept_gate.write_copy_of_slice(gates);
                kept_up.write_copy_of_slice(inner);
            }
            gated(gates, inner);
            gemm_ahead(out, matrix(inner, 0..x.nrows(), d_ff), down.matrix(e), &then);
        });
    });
    // SAFETY: the experts with rows have all rows, and the products have written them.
    unsafe { out.set_len(rows * d_model) };
    cpu::tensor(out, Shape::new([rows, d_model]))
}

/// What a task of the backward pass writes.
struct Written<'a> {
    expert: usize,
    dx: &'a mut [MaybeUninit<f32>],
    /// Gradients of gate, up and down.
    weights: Option<[&'a mut [MaybeUninit<f32>]; 3]>,
}

/// The gradient of the input, and with `x` those of gate, up and down.
fn backward(
    x: Option<FlexTensor>,
    weights: [FlexTensor; 3],
    inner: [FlexTensor; 2],
    grad: FlexTensor,
    offsets: &[usize],
) -> (FlexTensor, Option<[FlexTensor; 3]>) {
    let (x, grad) = (x.map(cpu::contiguous), cpu::contiguous(grad));
    let x = x.as_ref().map(|x| x.storage::<f32>());
    let (inner, weights) = (inner.map(cpu::contiguous), weights.map(Stack::readable));
    let [inner_gate, inner_up] = inner.each_ref().map(|inner| inner.storage::<f32>());
    let [gate, up, down] = weights.each_ref().map(Stack::new);
    let ([experts, d_model, d_ff], rows) = (gate.dims, grad.shape()[0]);
    let (size, grad) = (d_model * d_ff, grad.storage::<f32>());

    let mut dx = Vec::with_capacity(rows * d_model);
    let mut rest = &mut dx.spare_capacity_mut()[..rows * d_model];
    let mut dweights = x.map(|_| [(); 3].map(|()| Vec::with_capacity(experts * size)));
    let mut rest_weights = dweights
        .as_mut()
        .map(|all| all.each_mut().map(|all| &mut all.spare_capacity_mut()[..experts * size]));
    let tasks = (0..experts).map(|expert| Written {
        expert,
        dx: take(&mut rest, (offsets[expert + 1] - offsets[expert]) * d_model),
        weights: rest_weights.as_mut().map(|rest| rest.each_mut().map(|rest| take(rest, size))),
    });
    let mut tasks: Vec<_> = tasks.collect();
    awake::parts(&mut tasks, 1, |_, task| {
        let Written { expert: e, dx, weights } = &mut task[0];
        let (e, rows) = (*e, offsets[*e]..offsets[*e + 1]);
        if rows.is_empty() {
            for weight in weights.iter_mut().flatten() {
                cpu::zeroed(weight);
            }
            return;
        }
        let next = (e + rayon::current_num_threads()).min(experts - 1);
        let grad_of = |e: usize| matrix(grad, offsets[e]..offsets[e + 1], d_model);
        let [gate, up, down, next_down] = [gate.matrix(e), up.matrix(e), down.matrix(e), down.matrix(next)]
            .map(|weight| weight.transpose());
        let then = [panel(next_down), grad_of(next)];
        let x = x.map(|x| matrix(x, rows.clone(), d_model));
        let of_inner = rows.start * d_ff..rows.end * d_ff;
        INNER.with_borrow_mut(|room| {
            room.resize(3 * of_inner.len(), 0.0);
            let (dup, others) = room.split_at_mut(of_inner.len());
            let (dgate, inner) = others.split_at_mut(of_inner.len());
            gemm_ahead(cpu::room(dup), grad_of(e), down, &[panel(gate)]);
            gated_backward(&inner_gate[of_inner.clone()], &inner_up[of_inner], dup, dgate, inner);
            let [dup, dgate, inner] = [dup, dgate, inner].map(|x| matrix(x, 0..rows.len(), d_ff));
            gemm_ahead(dx, dgate, gate, &[panel(up)]);
            // SAFETY: the product has written all of it.
            let dx = unsafe { dx.assume_init_mut() };
            let (Some(x), Some([of_gate, of_up, of_down])) = (x, weights) else {
                return gemm_add_ahead(dx, dup, up, &then);
            };
            gemm_add_ahead(dx, dup, up, &[x]);
            gemm_past(of_gate, x.transpose(), dgate, &[]);
            gemm_past(of_up, x.transpose(), dup, &[]);
            gemm_past(of_down, inner.transpose(), grad_of(e), &then);
        });
    });
    // SAFETY: the tasks have written all rows and all weights.
    unsafe { dx.set_len(rows * d_model) };
    let dweights = dweights.map(|all| {
        let [dgate, dup, ddown] = all.map(|mut weight| {
            // SAFETY: as above.
            unsafe { weight.set_len(experts * size) };
            weight
        });
        let shape = Shape::new([experts, d_model, d_ff]);
        let of_down = cpu::tensor(ddown, Shape::new([experts, d_ff, d_model]));
        [cpu::tensor(dgate, shape.clone()), cpu::tensor(dup, shape), of_down]
    });
    (cpu::tensor(dx, Shape::new([rows, d_model])), dweights)
}

/// What the gradients need.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    /// If a weight is trained.
    x: Option<FloatTensor<B>>,
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    down: FloatTensor<B>,
    inner_gate: FloatTensor<B>,
    inner_up: FloatTensor<B>,
    offsets: Vec<usize>,
}

impl<B: Backend + GroupedSwigluOps, C: CheckpointStrategy> GroupedSwigluOps for Autodiff<B, C> {
    fn grouped_swiglu(
        x: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct GroupedSwiglu;

        impl<B: Backend + GroupedSwigluOps> Backward<B, 4> for GroupedSwiglu {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let State { x, gate, up, down, inner_gate: g, inner_up: u, offsets } = ops.state;
                let computed = match x {
                    Some(x) => {
                        let all = B::grouped_swiglu_backward(x, gate, up, down, g, u, grad, offsets);
                        [Some(all.0), Some(all.1), Some(all.2), Some(all.3)]
                    }
                    None => {
                        let dx = B::grouped_swiglu_input(gate, up, down, g, u, grad, offsets);
                        [Some(dx), None, None, None]
                    }
                };
                for (parent, grad) in ops.parents.into_iter().zip(computed) {
                    if let (Some(parent), Some(grad)) = (parent, grad) {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let trained = gate.is_tracked() || up.is_tracked() || down.is_tracked();
        let (x, x_node) = x.into_parts();
        let (gate, gate_node) = gate.into_parts();
        let (up, up_node) = up.into_parts();
        let (down, down_node) = down.into_parts();
        let nodes = [x_node, gate_node, up_node, down_node];
        match GroupedSwiglu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (y, inner_gate, inner_up) = B::grouped_swiglu_kept(
                    x.clone(),
                    gate.clone(),
                    up.clone(),
                    down.clone(),
                    offsets.clone(),
                );
                let x = trained.then_some(x);
                prep.finish(State { x, gate, up, down, inner_gate, inner_up, offsets }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::grouped_swiglu(x, gate, up, down, offsets)),
        }
    }
}
