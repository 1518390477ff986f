//! Matrix products of expert segments: every expert multiplies its own rows, without padding or dropped tokens (after
//! MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, Slice, TensorMetadata, tensor::FloatTensor};
use burn_flex::{Flex, FlexTensor};
use faer::MatRef;

use super::awake;
use super::cpu;
use super::gemm_f32::{gemm_ahead, gemm_past, panel};
use super::linear_cross_entropy::rows;

/// Rows of a result that one task computes, at most: each reads a whole matrix.
pub(super) const ROWS: usize = 256;

/// Rows `offsets[e]..offsets[e + 1]` of `x` times `weight[e]`, for every expert `e`.
///
/// Both gradients are products over the same segments; an expert without rows gets a gradient of zero.
///
/// - x: `[rows, d_in]`, sorted by expert
/// - weight: `[experts, d_in, d_out]`
/// - offsets: `experts + 1` row numbers from 0 to `rows`, none below the one before
/// - result: `[rows, d_out]`
///
/// # Panics
/// If a shape disagrees or `offsets` are not as above.
pub fn grouped_matmul(x: Tensor<2>, weight: Tensor<3>, offsets: &[usize]) -> Tensor<2> {
    let ([rows, d_in], [experts, weight_in, _]) = (x.dims(), weight.dims());
    assert_eq!(d_in, weight_in, "grouped_matmul: columns of x against rows of weight");
    check_offsets("grouped_matmul", offsets, experts, rows);
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as GroupedMatmulOps>::grouped_matmul(
        x,
        weight,
        offsets.to_vec(),
    ))
}

/// # Panics
/// If `offsets` are not those of `rows` rows of so many experts.
pub(super) fn check_offsets(op: &str, offsets: &[usize], experts: usize, rows: usize) {
    assert_eq!(offsets.len(), experts + 1, "{op}: offsets for {experts} experts");
    let ascending = offsets.is_sorted() && offsets[0] == 0 && offsets[experts] == rows;
    assert!(ascending, "{op}: offsets {offsets:?} do not ascend from 0 to {rows}");
}

/// Products of segments on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait GroupedMatmulOps: Backend {
    /// Segments of rows times their expert's matrix, see [`grouped_matmul`].
    #[fusion(dtype = x, shape = Shape::new([x[0], weight[2]]))]
    fn grouped_matmul(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        composed::<Self>(x, weight, &offsets)
    }

    /// Gradient of the weight, `x[segment]^T grad[segment]` for each expert, `[experts, d_in, d_out]`.
    #[fusion(dtype = x, shape = Shape::new([offsets.len() - 1, x[1], grad[1]]))]
    fn grouped_matmul_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        composed_weight::<Self>(x, grad, &offsets)
    }
}

/// Rows of a task, so that those of `rows` are about even.
fn even(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(ROWS).max(1)).max(1)
}

/// The segments, empty ones included.
pub(super) fn segments(offsets: &[usize]) -> impl Iterator<Item = Range<usize>> {
    offsets.windows(2).map(|pair| pair[0]..pair[1])
}

pub(super) fn composed<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    offsets: &[usize],
) -> FloatTensor<B> {
    let (d_in, d_out) = (weight.shape()[1], weight.shape()[2]);
    let mut parts = Vec::new();
    for (e, segment) in segments(offsets).enumerate().filter(|(_, segment)| !segment.is_empty()) {
        let slices = [Slice::from(e..e + 1), Slice::from(0..d_in), Slice::from(0..d_out)];
        let w = B::float_reshape(B::float_slice(weight.clone(), &slices), Shape::new([d_in, d_out]));
        parts.push(B::float_matmul(rows::<B>(&x, &segment), w));
    }
    if parts.is_empty() {
        return B::float_zeros(Shape::new([0, d_out]), &x.device(), x.dtype().into());
    }
    B::float_cat(parts, 0)
}

pub(super) fn composed_weight<B: Backend>(
    x: FloatTensor<B>,
    grad: FloatTensor<B>,
    offsets: &[usize],
) -> FloatTensor<B> {
    let shape = Shape::new([1, x.shape()[1], grad.shape()[1]]);
    let parts = segments(offsets).map(|segment| {
        if segment.is_empty() {
            return B::float_zeros(shape.clone(), &x.device(), x.dtype().into());
        }
        let (x, grad) = (rows::<B>(&x, &segment), rows::<B>(&grad, &segment));
        B::float_reshape(B::float_matmul(B::float_swap_dims(x, 0, 1), grad), shape.clone())
    });
    let parts: Vec<_> = parts.collect();
    B::float_cat(parts, 0)
}

/// The matrices of a tensor `[experts, rows, columns]`.
pub(super) struct Stack<'a> {
    data: &'a [f32],
    strides: [usize; 3],
    pub dims: [usize; 3],
}

impl<'a> Stack<'a> {
    /// `x` itself if the columns of its matrices are unbroken, as in the transposed view of a backward pass; a row-major tensor otherwise.
    pub fn readable(x: FlexTensor) -> FlexTensor {
        let strides = x.layout().strides();
        let by_columns = strides[1] == 1 && strides[2] >= x.shape()[1] as isize && strides[0] >= 0;
        if by_columns { x } else { cpu::contiguous(x) }
    }

    /// Views a tensor that went through [`readable`](Self::readable).
    pub fn new(x: &'a FlexTensor) -> Self {
        let layout = x.layout();
        Stack {
            data: &x.storage::<f32>()[layout.start_offset()..],
            strides: std::array::from_fn(|i| layout.strides()[i] as usize),
            dims: std::array::from_fn(|i| x.shape()[i]),
        }
    }

    pub fn matrix(&self, expert: usize) -> MatRef<'a, f32> {
        let ([_, rows, columns], [step, down, across]) = (self.dims, self.strides);
        let data = &self.data[expert * step..];
        if across == 1 {
            MatRef::from_row_major_slice_with_stride(data, rows, columns, down)
        } else {
            MatRef::from_column_major_slice_with_stride(data, rows, columns, across)
        }
    }
}

impl GroupedMatmulOps for Flex {
    fn grouped_matmul(x: FlexTensor, weight: FlexTensor, offsets: Vec<usize>) -> FlexTensor {
        let (d_in, d_out) = (weight.shape()[1], weight.shape()[2]);
        if !cpu::all_f32(&[&x, &weight]) || x.shape().num_elements() * d_out == 0 {
            return composed::<Self>(x, weight, &offsets);
        }
        let (x, weight) = (cpu::contiguous(x), Stack::readable(weight));
        let stack = Stack::new(&weight);
        let values = x.storage::<f32>();
        let len = x.shape()[0] * d_out;
        let mut out = Vec::with_capacity(len);
        let mut rest = &mut out.spare_capacity_mut()[..len];
        let mut tasks = Vec::new();
        for (e, segment) in segments(&offsets).enumerate() {
            let (part, tail) = rest.split_at_mut(segment.len() * d_out);
            rest = tail;
            let rows = even(segment.len());
            for (i, part) in part.chunks_mut(rows * d_out).enumerate() {
                tasks.push((e, segment.start + i * rows, part));
            }
        }
        let rows = |first: usize, count: usize| {
            MatRef::from_row_major_slice(&values[first * d_in..][..count * d_in], count, d_in)
        };
        let order: Vec<_> = tasks.iter().map(|(e, first, part)| (*e, *first, part.len() / d_out)).collect();
        awake::parts(&mut tasks, 1, |i, task| {
            let (e, first, part) = &mut task[0];
            // Threads take the tasks in turns.
            let next = order.get(i + rayon::current_num_threads());
            let next = next.map(|&(e, first, count)| [panel(stack.matrix(e)), rows(first, count)]);
            let x = rows(*first, part.len() / d_out);
            gemm_ahead(part, x, stack.matrix(*e), next.as_ref().map_or(&[], |next| &next[..]));
        });
        // SAFETY: the segments are all rows, and the products have written them.
        unsafe { out.set_len(len) };
        cpu::tensor(out, Shape::new([x.shape()[0], d_out]))
    }

    fn grouped_matmul_weight(x: FlexTensor, grad: FlexTensor, offsets: Vec<usize>) -> FlexTensor {
        let (d_in, d_out) = (x.shape()[1], grad.shape()[1]);
        if !cpu::all_f32(&[&x, &grad]) || d_in * d_out == 0 {
            return composed_weight::<Self>(x, grad, &offsets);
        }
        let (x, grad) = (cpu::contiguous(x), cpu::contiguous(grad));
        let (x, grad) = (x.storage::<f32>(), grad.storage::<f32>());
        let experts = offsets.len() - 1;
        let len = experts * d_in * d_out;
        let mut out = Vec::with_capacity(len);
        let rows = even(d_in);
        let mut tasks = Vec::new();
        let matrices = out.spare_capacity_mut()[..len].chunks_mut(d_in * d_out);
        for (part, segment) in matrices.zip(segments(&offsets)) {
            for (i, part) in part.chunks_mut(rows * d_out).enumerate() {
                tasks.push((segment.clone(), i * rows, part));
            }
        }
        awake::each(tasks, |(segment, first, part)| {
            let segment = segment.clone();
            if segment.is_empty() {
                part.fill(MaybeUninit::new(0.0));
                return;
            }
            let range = |d: usize| segment.start * d..segment.end * d;
            let x = MatRef::from_row_major_slice(&x[range(d_in)], segment.len(), d_in).transpose();
            let grad = MatRef::from_row_major_slice(&grad[range(d_out)], segment.len(), d_out);
            gemm_past(part, x.subrows(*first, part.len() / d_out), grad, &[]);
        });
        // SAFETY: the tasks have written all of all matrices.
        unsafe { out.set_len(len) };
        cpu::tensor(out, Shape::new([experts, d_in, d_out]))
    }
}

impl<B: Backend + GroupedMatmulOps, C: CheckpointStrategy> GroupedMatmulOps for Autodiff<B, C> {
    fn grouped_matmul(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: Vec<usize>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct GroupedMatmul;

        impl<B: Backend + GroupedMatmulOps> Backward<B, 2> for GroupedMatmul {
            /// Each input only if the other's gradient needs it.
            type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>, Vec<usize>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (x, weight, offsets) = ops.state;
                let [x_node, weight_node] = ops.parents;
                if let (Some(node), Some(x)) = (weight_node, x) {
                    let dweight = B::grouped_matmul_weight(x, grad.clone(), offsets.clone());
                    grads.register::<B>(node.id, dweight);
                }
                if let (Some(node), Some(weight)) = (x_node, weight) {
                    let weight = B::float_swap_dims(weight, 1, 2);
                    grads.register::<B>(node.id, B::grouped_matmul(grad, weight, offsets));
                }
            }
        }

        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let kept = (weight_tracked.then(|| x.clone()), x_tracked.then(|| weight.clone()), offsets.clone());
        let y = B::grouped_matmul(x, weight, offsets);
        match GroupedMatmul.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(kept, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
