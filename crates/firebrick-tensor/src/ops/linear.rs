//! Linear layer on a matrix that may lie transposed, with a kernel for the few rows of a decoding step.
//!
//! One row against a matrix reads every weight once, so memory bounds it: the kernel reads weights where they lie, on all
//! threads. burn's own layer keeps the leading dimensions of such an input, and reshapes the weight for it, which copies
//! a transposed one whole.

use burn::backend::{Dispatch, backend_extension};
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use half::bf16;
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::matmul::{MatmulOps, Precision};

/// Rows from which a matrix product that packs its operands is faster.
pub(super) const FEW_ROWS: usize = 8;

/// Weights that one task reads.
const TASK: usize = 1 << 16;

/// `x weight` over the last dimension of `x`; no f32 copy of `weight` is made, transposed view or not.
///
/// - x: `[.., d_in]`
/// - weight: `[d_in, d_out]`; on the CPU it may be stored in bf16, in half the memory
/// - result: `[.., d_out]`
///
/// # Panics
/// If the last dimension of `x` is not `d_in`.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, precision: Precision) -> Tensor<D> {
    let mut shape = x.dims();
    let [d_in, d_out] = weight.dims();
    assert_eq!(shape[D - 1], d_in, "linear: last dimension of x against rows of weight");
    let rows: usize = shape[..D - 1].iter().product();
    let x = x.reshape([rows, d_in]);
    let y = if rows < FEW_ROWS {
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        Tensor::<2>::from_dispatch(<Dispatch as LinearOps>::few_rows_matmul(x, weight))
    } else {
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        Tensor::<2>::from_dispatch(<Dispatch as MatmulOps>::matmul(x, weight, precision))
    };
    shape[D - 1] = d_out;
    y.reshape(shape)
}

/// `y + x weight`, in place where `y` is held once.
///
/// - y: `[rows, d_out]`
/// - x: `[rows, d_in]`
/// - weight: `[d_in, d_out]`
/// - result: `[rows, d_out]`
///
/// # Panics
/// If a shape disagrees.
pub fn linear_add(y: Tensor<2>, x: Tensor<2>, weight: Tensor<2>, precision: Precision) -> Tensor<2> {
    let ([rows, d_in], [inputs, d_out]) = (x.dims(), weight.dims());
    assert_eq!(d_in, inputs, "linear_add: columns of x against rows of weight");
    assert_eq!(y.dims(), [rows, d_out], "linear_add: shape of y");
    let [y, x, weight] = [y, x, weight].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as MatmulOps>::matmul_add(y, x, weight, precision))
}

/// Products of few rows on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait LinearOps: Backend {
    /// `x weight` for `x` `[rows, d_in]` and `weight` `[d_in, d_out]`.
    #[fusion(default)]
    fn few_rows_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(x, weight)
    }
}

#[cfg(feature = "cubecl-backend")]
impl LinearOps for CubeBackend {}

impl LinearOps for Flex {
    fn few_rows_matmul(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let (rows, d_in, d_out) = (x.shape()[0], weight.shape()[0], weight.shape()[1]);
        let (halves, by_input) = (words(&weight), cpu::unbroken(&weight, 1));
        if cpu::is_bf16(&weight) && halves.is_none() {
            return <Self as LinearOps>::few_rows_matmul(x, cpu::widened(weight));
        }
        let fits = halves.is_some() || cpu::all_f32(&[&weight]) && (by_input || is_by_output(&weight));
        if rows * d_in * d_out == 0 || !fits || !cpu::all_f32(&[&x]) {
            return <Self as FloatTensorOps<Self>>::float_matmul(x, cpu::widened(weight));
        }
        let x = cpu::contiguous(x);
        let values = x.storage::<f32>();
        // Columns first, so that a task owns its part of the result. Tasks begin at multiples of four columns.
        let mut by_column = vec![0.0; d_out * rows];
        if let Some(words) = halves {
            let values = &by_half(values, d_in);
            cpu::blocks(&mut by_column, rows, task(d_in), |first, out| {
                let weights = &words[first * d_in / 2..];
                Arch::new().dispatch(Dots { x: values, weights, out, rows, d_in });
            });
        } else {
            let weights = &weight.storage::<f32>()[weight.layout().start_offset()..][..d_in * d_out];
            cpu::blocks(&mut by_column, rows, task(d_in), |first, out| {
                if by_input {
                    Arch::new().dispatch(Sums { x: values, weights, out, rows, first, d_in, d_out });
                } else {
                    Arch::new().dispatch(Dots {
                        x: values,
                        weights: &weights[first * d_in..],
                        out,
                        rows,
                        d_in,
                    });
                }
            });
        }
        if rows == 1 {
            return cpu::tensor(by_column, Shape::new([1, d_out]));
        }
        let mut out = vec![0.0; rows * d_out];
        for (column, values) in by_column.chunks_exact(rows).enumerate() {
            for (row, &value) in values.iter().enumerate() {
                out[row * d_out + column] = value;
            }
        }
        cpu::tensor(out, Shape::new([rows, d_out]))
    }
}

/// Whether the weights of an output lie together, one output after the other.
pub(super) fn is_by_output(weight: &FlexTensor) -> bool {
    cpu::unbroken(weight, 0)
}

/// Outputs of a task where each has `d_in` weights.
pub(super) fn task(d_in: usize) -> usize {
    (TASK / d_in).next_multiple_of(4).max(4)
}

/// `[rows, columns]` of inner products of each of `rows` with each of `columns` vectors that follow each other in `with`.
pub(super) fn dots_of_rows(rows: &[f32], with: &[f32], out: &mut [f32], columns: usize) {
    let depth = with.len() / columns;
    // Rows take the part of weights, which are read once.
    cpu::blocks(out, columns, task(depth), |first, out| {
        let weights = &rows[first * depth..];
        Arch::new().dispatch(Dots { x: with, weights, out, rows: columns, d_in: depth });
    });
}

/// Outputs of one row `x`, on the calling thread, of `weights` that lie together output after output; in the order of [`by_half`] where
/// they are words.
pub(super) fn outputs_of_row<W: Weights>(x: &[f32], weights: &[W], out: &mut [f32]) {
    Arch::new().dispatch(Dots { x, weights, out, rows: 1, d_in: x.len() });
}

/// Weights stored in bf16 that lie output after output, in words of two, the first in the low half; where they are that and `d_in` is even.
pub(super) fn words(weight: &FlexTensor) -> Option<&[u32]> {
    let (d_in, count) = (weight.shape()[0], weight.shape().num_elements());
    if !cpu::is_bf16(weight) || !is_by_output(weight) || !d_in.is_multiple_of(2) {
        return None;
    }
    let halves = &weight.storage::<bf16>()[weight.layout().start_offset()..][..count];
    if cfg!(target_endian = "big") { None } else { bytemuck::try_cast_slice(halves).ok() }
}

/// Rows of `d_in` inputs, those of low halves of words before those of high ones.
pub(super) fn by_half(x: &[f32], d_in: usize) -> Vec<f32> {
    let mut halves = Vec::with_capacity(x.len());
    for row in x.chunks_exact(d_in) {
        for half in [0, 1] {
            halves.extend(row.iter().skip(half).step_by(2));
        }
    }
    halves
}

/// Weights as they lie: f32, or words of two in bf16.
pub(super) trait Weights: Sync + Sized {
    /// How many one of these has.
    const EACH: usize;

    /// The inner product of `x` with each of `rows`.
    fn dots<S: Simd, const N: usize>(simd: S, x: &[f32], rows: [&[Self]; N]) -> [f32; N];
}

impl Weights for f32 {
    const EACH: usize = 1;

    #[inline(always)]
    fn dots<S: Simd, const N: usize>(simd: S, x: &[f32], rows: [&[f32]; N]) -> [f32; N] {
        dots(simd, x, rows)
    }
}

impl Weights for u32 {
    const EACH: usize = 2;

    #[inline(always)]
    fn dots<S: Simd, const N: usize>(simd: S, x: &[f32], rows: [&[u32]; N]) -> [f32; N] {
        const HIGH: u32 = 0xffff_0000;
        let (low, high) = x.split_at(x.len() / 2);
        let ((low, low_tail), (high, high_tail)) = (S::as_simd_f32s(low), S::as_simd_f32s(high));
        let rows = rows.map(|row| S::as_simd_u32s(row));
        let rows = rows.map(|(row, tail)| (&row[..low.len()], tail));
        let (sixteen, mask) = (simd.splat_u32s(16), simd.splat_u32s(HIGH));
        let next = N * low.len();
        let mut sums = [[simd.splat_f32s(0.0); 2]; N];
        for (i, (&low, &high)) in low.iter().zip(high).enumerate() {
            for (sum, (row, _)) in sums.iter_mut().zip(rows) {
                // The rows of the next outputs lie behind these.
                cpu::prefetch(row.as_ptr().wrapping_add(i + next));
                let first = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(row[i], sixteen));
                let second = simd.transmute_f32s_u32s(simd.and_u32s(row[i], mask));
                sum[0] = simd.mul_add_e_f32s(low, first, sum[0]);
                sum[1] = simd.mul_add_e_f32s(high, second, sum[1]);
            }
        }
        // A loop, as a closure would be compiled without the instructions of `S`.
        let mut dots = [0.0; N];
        for (dot, (sum, (_, row))) in dots.iter_mut().zip(sums.into_iter().zip(rows)) {
            *dot = simd.reduce_sum_f32s(simd.add_f32s(sum[0], sum[1]));
            for ((low, high), word) in low_tail.iter().zip(high_tail).zip(row) {
                *dot += low * f32::from_bits(word << 16) + high * f32::from_bits(word & HIGH);
            }
        }
        dots
    }
}

/// Outputs whose weights lie together: inner products, four outputs at a time.
struct Dots<'a, W> {
    x: &'a [f32],
    /// From the first weight of the first output on.
    weights: &'a [W],
    out: &'a mut [f32],
    rows: usize,
    d_in: usize,
}

impl<W: Weights> WithSimd for Dots<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (rows, d_in) = (self.rows, self.d_in);
        let mut fours = self.out.chunks_exact_mut(4 * rows);
        let mut weights = self.weights.chunks_exact(d_in / W::EACH);
        let mut next = || weights.next().expect("one row of weights for each output");
        for out in &mut fours {
            let four = [next(), next(), next(), next()];
            for (row, x) in self.x.chunks_exact(d_in).enumerate() {
                for (i, dot) in W::dots(simd, x, four).into_iter().enumerate() {
                    out[i * rows + row] = dot;
                }
            }
        }
        for out in fours.into_remainder().chunks_exact_mut(rows) {
            let one = [next()];
            for (out, x) in out.iter_mut().zip(self.x.chunks_exact(d_in)) {
                [*out] = W::dots(simd, x, one);
            }
        }
    }
}

/// The inner product of `x` with each of `rows`, each in two vectors of sums, so that additions need not wait.
#[inline(always)]
pub(super) fn dots<S: Simd, const N: usize>(simd: S, x: &[f32], rows: [&[f32]; N]) -> [f32; N] {
    let (x, tail) = S::as_simd_f32s(x);
    let rows = rows.map(|row| S::as_simd_f32s(row));
    let rows = rows.map(|(row, tail)| (&row[..x.len()], tail));
    let mut sums = [[simd.splat_f32s(0.0); 2]; N];
    let pairs = x.len() / 2;
    for i in 0..pairs {
        for (sum, (row, _)) in sums.iter_mut().zip(rows) {
            sum[0] = simd.mul_add_e_f32s(x[2 * i], row[2 * i], sum[0]);
            sum[1] = simd.mul_add_e_f32s(x[2 * i + 1], row[2 * i + 1], sum[1]);
        }
    }
    for i in 2 * pairs..x.len() {
        for (sum, (row, _)) in sums.iter_mut().zip(rows) {
            sum[0] = simd.mul_add_e_f32s(x[i], row[i], sum[0]);
        }
    }
    // A loop, as a closure would be compiled without the instructions of `S`.
    let mut dots = [0.0; N];
    for (dot, (sum, (_, row))) in dots.iter_mut().zip(sums.into_iter().zip(rows)) {
        *dot = simd.reduce_sum_f32s(simd.add_f32s(sum[0], sum[1]));
        for (x, w) in tail.iter().zip(row) {
            *dot += x * w;
        }
    }
    dots
}

/// Outputs `first..` where the weights of an input lie together: sums of rows of weights.
struct Sums<'a> {
    x: &'a [f32],
    weights: &'a [f32],
    out: &'a mut [f32],
    rows: usize,
    first: usize,
    d_in: usize,
    d_out: usize,
}

/// Outputs whose sums stay in the first-level cache.
const COLUMNS: usize = 256;

impl WithSimd for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (part, out) in self.out.chunks_mut(COLUMNS * self.rows).enumerate() {
            let (first, columns) = (self.first + part * COLUMNS, out.len() / self.rows);
            for (row, x) in self.x.chunks_exact(self.d_in).enumerate() {
                let mut sums = [0.0f32; COLUMNS];
                for (&x, weights) in x.iter().zip(self.weights.chunks_exact(self.d_out)) {
                    let weights = &weights[first..][..columns];
                    for (sum, &w) in sums[..columns].iter_mut().zip(weights) {
                        *sum += x * w;
                    }
                }
                for (column, &sum) in sums[..columns].iter().enumerate() {
                    out[column * self.rows + row] = sum;
                }
            }
        }
    }
}

impl<B: Backend + LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn few_rows_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;

        impl<B: Backend + LinearOps> Backward<B, 2> for Linear {
            type State = (FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (x, weight) = ops.state;
                let [x_node, weight_node] = ops.parents;
                if let Some(node) = x_node {
                    let dx = B::few_rows_matmul(grad.clone(), B::float_swap_dims(weight, 0, 1));
                    grads.register::<B>(node.id, dx);
                }
                if let Some(node) = weight_node {
                    grads.register::<B>(node.id, B::float_matmul(B::float_swap_dims(x, 0, 1), grad));
                }
            }
        }

        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        match Linear.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::few_rows_matmul(x.clone(), weight.clone());
                prep.finish((x, weight), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::few_rows_matmul(x, weight)),
        }
    }
}
