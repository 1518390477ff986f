//! Low-bit packed weight matrices and their product.

use burn::backend::{Dispatch, backend_extension};
use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn_backend::{
    Backend, DType, FloatDType, Shape, Slice, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// A weight matrix as low-bit codes with a scale and a zero point for each group of input rows.
///
/// `w[i][o] = scale[i / group][o] * (code[i][o] - zero[i / group][o])`. Codes sit in 32-bit words along `d_in`, least
/// significant bits first; a word holds `32 / bits` whole codes (ten at 3 bits), none crosses a word. At 2, 4 and 8 bits
/// this is the `qweight` of AutoGPTQ.
#[derive(Module, Debug)]
pub struct PackedMatrix {
    /// Bits of a code, 1 to 8.
    pub bits: u8,
    /// Input rows that share a scale and a zero point.
    pub group: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
    /// `[ceil(d_in / (32 / bits)), d_out]`, bit patterns as i32.
    pub words: Tensor<2, Int>,
    /// `[ceil(d_in / group), d_out]`.
    pub scale: Tensor<2>,
    /// `[ceil(d_in / group), d_out]` in units of codes; may be fractional.
    pub zero: Tensor<2>,
}

impl PackedMatrix {
    /// Packs `codes` (`[d_in, d_out]`, row-major) on the device of `scale`.
    ///
    /// - scale, zero: `[ceil(d_in / group), d_out]`
    ///
    /// # Panics
    /// If `bits` is not 1 to 8, `group` is 0, a shape disagrees or a code does not fit in `bits`.
    pub fn pack(
        codes: &[u8],
        d_in: usize,
        d_out: usize,
        bits: u8,
        group: usize,
        scale: Tensor<2>,
        zero: Tensor<2>,
    ) -> Self {
        assert!((1..=8).contains(&bits), "PackedMatrix: {bits} bits, expected 1 to 8");
        assert!(group > 0, "PackedMatrix: group must not be 0");
        assert_eq!(codes.len(), d_in * d_out, "PackedMatrix: codes for [{d_in}, {d_out}]");
        let groups = d_in.div_ceil(group);
        assert_eq!(scale.dims(), [groups, d_out], "PackedMatrix: shape of scale");
        assert_eq!(zero.dims(), [groups, d_out], "PackedMatrix: shape of zero");
        let per_word = 32 / bits as usize;
        let rows = d_in.div_ceil(per_word);
        let mut words = vec![0u32; rows * d_out];
        for i in 0..d_in {
            let shift = (i % per_word) * bits as usize;
            let word_row = &mut words[i / per_word * d_out..][..d_out];
            for (word, &code) in word_row.iter_mut().zip(&codes[i * d_out..]) {
                assert!(
                    u32::from(code) >> bits == 0,
                    "PackedMatrix: code {code} needs more than {bits} bits"
                );
                *word |= u32::from(code) << shift;
            }
        }
        let words: Vec<i32> = words.into_iter().map(|w| w as i32).collect();
        let words = Tensor::from_data(TensorData::new(words, [rows, d_out]), &scale.device());
        Self { bits, group, d_in, d_out, words, scale, zero }
    }

    /// The dense matrix `[d_in, d_out]`, in the dtype of the scales.
    pub fn unpack(&self) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as PackedOps>::unpack(
            self.words.clone().into_dispatch(),
            self.scale.clone().into_dispatch(),
            self.zero.clone().into_dispatch(),
            self.layout(),
        ))
    }

    fn layout(&self) -> PackedLayout {
        PackedLayout { bits: self.bits.into(), group: self.group, d_in: self.d_in }
    }

    /// Bytes held: words, scales and zero points.
    pub fn bytes(&self) -> usize {
        let values = |t: &Tensor<2>| t.shape().num_elements() * t.dtype().size();
        self.words.shape().num_elements() * 4 + values(&self.scale) + values(&self.zero)
    }
}

/// `x` times a packed matrix; gradients reach `x` only.
///
/// - x: `[rows, d_in]`
/// - result: `[rows, d_out]`
///
/// # Panics
/// If `x` does not have `d_in` columns.
pub fn packed_matmul(x: Tensor<2>, weight: &PackedMatrix) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.d_in, "packed_matmul: columns of x against rows of the matrix");
    Tensor::from_dispatch(<Dispatch as PackedOps>::packed_matmul(
        x.into_dispatch(),
        weight.words.clone().into_dispatch(),
        weight.scale.clone().into_dispatch(),
        weight.zero.clone().into_dispatch(),
        weight.layout(),
    ))
}

/// How codes lie in their words.
#[derive(Debug, Clone, Copy)]
pub struct PackedLayout {
    bits: usize,
    group: usize,
    d_in: usize,
}

impl PackedLayout {
    fn per_word(&self) -> usize {
        32 / self.bits
    }

    fn mask(&self) -> u32 {
        (1 << self.bits) - 1
    }
}

/// Packed products on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait PackedOps: Backend {
    /// The dense matrix `[d_in, d_out]`.
    #[fusion(default)]
    fn unpack(
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        composed_unpack::<Self>(words, scale, zero, layout)
    }

    /// Product with the dense matrix, see [`packed_matmul`].
    #[fusion(default)]
    fn packed_matmul(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        composed::<Self>(x, words, scale, zero, layout)
    }
}

fn composed_unpack<B: Backend>(
    words: IntTensor<B>,
    scale: FloatTensor<B>,
    zero: FloatTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let (rows, d_out) = (words.shape()[0], words.shape()[1]);
    let dtype: FloatDType = scale.dtype().into();
    let first_rows = |x, rows: usize| B::float_slice(x, &[Slice::from(0..rows), Slice::from(0..d_out)]);
    // A word at a time along a new axis, so that a plain reshape puts the codes in order.
    let slots = (0..layout.per_word()).map(|slot| {
        let shifted = B::bitwise_right_shift_scalar(words.clone(), (slot * layout.bits).into());
        let code = B::bitwise_and_scalar(shifted, layout.mask().into());
        B::float_reshape(B::int_into_float(code, dtype), Shape::new([rows, 1, d_out]))
    });
    let codes = B::float_cat(slots.collect(), 1);
    let codes = B::float_reshape(codes, Shape::new([rows * layout.per_word(), d_out]));
    let spread = |x: FloatTensor<B>| {
        let groups = x.shape()[0];
        let x = B::float_reshape(x, Shape::new([groups, 1, d_out]));
        let x = B::float_expand(x, Shape::new([groups, layout.group, d_out]));
        first_rows(B::float_reshape(x, Shape::new([groups * layout.group, d_out])), layout.d_in)
    };
    let scale = spread(scale);
    B::float_mul(B::float_sub(first_rows(codes, layout.d_in), spread(zero)), scale)
}

fn composed<B: PackedOps>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scale: FloatTensor<B>,
    zero: FloatTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let weight = B::unpack(words, scale, zero, layout);
    B::float_matmul(x, if weight.dtype() == dtype { weight } else { B::float_cast(weight, dtype.into()) })
}

#[cfg(feature = "cubecl-backend")]
impl PackedOps for CubeBackend {}

/// Rows of `x` below which codes are multiplied as they are read, without a dense matrix.
const DIRECT_ROWS: usize = 8;

/// Output columns of a task of the direct product: their sums stay in the first-level cache.
const COLUMNS: usize = 256;

/// Whether the CPU kernels apply.
fn has_kernel(words: &FlexTensor, floats: &[&FlexTensor]) -> bool {
    words.dtype() == DType::I32 && words.shape().num_elements() > 0 && cpu::all_f32(floats)
}

impl PackedOps for Flex {
    fn unpack(words: FlexTensor, scale: FlexTensor, zero: FlexTensor, layout: PackedLayout) -> FlexTensor {
        if !has_kernel(&words, &[&scale, &zero]) {
            return composed_unpack::<Self>(words, scale, zero, layout);
        }
        let d_out = words.shape()[1];
        let (words, scale, zero) = (cpu::contiguous(words), cpu::contiguous(scale), cpu::contiguous(zero));
        let (words, scale, zero) = (words.storage::<i32>(), scale.storage::<f32>(), zero.storage::<f32>());
        let mut out = vec![0.0; layout.d_in * d_out];
        cpu::blocks(&mut out, d_out, cpu::block_rows(d_out), |first, out| {
            Arch::new().dispatch(Unpack { words, scale, zero, layout, first, out, d_out });
        });
        cpu::tensor(out, Shape::new([layout.d_in, d_out]))
    }

    fn packed_matmul(
        x: FlexTensor,
        words: FlexTensor,
        scale: FlexTensor,
        zero: FlexTensor,
        layout: PackedLayout,
    ) -> FlexTensor {
        let (rows, d_out) = (x.shape()[0], words.shape()[1]);
        if rows == 0 || rows >= DIRECT_ROWS || !has_kernel(&words, &[&x, &scale, &zero]) {
            return composed::<Self>(x, words, scale, zero, layout);
        }
        let (x, words) = (cpu::contiguous(x), cpu::contiguous(words));
        let (scale, zero) = (cpu::contiguous(scale), cpu::contiguous(zero));
        let (values, words) = (x.storage::<f32>(), words.storage::<i32>());
        let (scale, zero) = (scale.storage::<f32>(), zero.storage::<f32>());
        // Columns first, so that a task owns its part of the result; turned round below.
        let mut by_column = vec![0.0; d_out * rows];
        cpu::blocks(&mut by_column, rows, COLUMNS, |first, out| {
            Arch::new().dispatch(Direct { x: values, words, scale, zero, layout, first, out, rows, d_out });
        });
        let mut out = vec![0.0; rows * d_out];
        for (column, sums) in by_column.chunks_exact(rows).enumerate() {
            for (row, &sum) in sums.iter().enumerate() {
                out[row * d_out + column] = sum;
            }
        }
        cpu::tensor(out, Shape::new([rows, d_out]))
    }
}

/// A block of rows of the dense matrix.
struct Unpack<'a> {
    words: &'a [i32],
    scale: &'a [f32],
    zero: &'a [f32],
    layout: PackedLayout,
    first: usize,
    out: &'a mut [f32],
    d_out: usize,
}

impl WithSimd for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (layout, d_out) = (self.layout, self.d_out);
        for (row, out) in self.out.chunks_exact_mut(d_out).enumerate() {
            let row = self.first + row;
            let shift = (row % layout.per_word() * layout.bits) as u32;
            let words = &self.words[row / layout.per_word() * d_out..][..d_out];
            let group = row / layout.group * d_out;
            let (scale, zero) = (&self.scale[group..][..d_out], &self.zero[group..][..d_out]);
            for j in 0..d_out {
                out[j] = scale[j] * (code(words[j], shift, layout.mask()) - zero[j]);
            }
        }
    }
}

#[inline(always)]
fn code(word: i32, shift: u32, mask: u32) -> f32 {
    // Through i32: its conversion to a float is one vector instruction, that of u32 is not.
    ((word as u32 >> shift) & mask) as i32 as f32
}

/// Columns `first..` of the product, each with its `rows` sums together.
struct Direct<'a> {
    x: &'a [f32],
    words: &'a [i32],
    scale: &'a [f32],
    zero: &'a [f32],
    layout: PackedLayout,
    first: usize,
    out: &'a mut [f32],
    rows: usize,
    d_out: usize,
}

impl WithSimd for Direct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let PackedLayout { group, d_in, .. } = self.layout;
        let columns = self.out.len() / self.rows;
        for row in 0..self.rows {
            let x = &self.x[row * d_in..][..d_in];
            let mut total = [0.0f32; COLUMNS];
            for (g, x) in x.chunks(group).enumerate() {
                // sum x (code - zero) over a group = sum x code - zero sum x
                let mut sums = [0.0f32; COLUMNS];
                let plain = cpu::sum(x.len(), |i| x[i]);
                for (i, &x) in x.iter().enumerate() {
                    self.add_row(&mut sums, g * group + i, columns, x);
                }
                let at = g * self.d_out + self.first;
                let (scale, zero) = (&self.scale[at..][..columns], &self.zero[at..][..columns]);
                for j in 0..columns {
                    total[j] += scale[j] * (sums[j] - zero[j] * plain);
                }
            }
            for (j, &total) in total[..columns].iter().enumerate() {
                self.out[j * self.rows + row] = total;
            }
        }
    }
}

impl Direct<'_> {
    /// Adds `x` times the codes of row `i`.
    #[inline(always)]
    fn add_row(&self, sums: &mut [f32; COLUMNS], i: usize, columns: usize, x: f32) {
        let per_word = self.layout.per_word();
        let shift = (i % per_word * self.layout.bits) as u32;
        let words = &self.words[i / per_word * self.d_out + self.first..][..columns];
        let mask = self.layout.mask();
        for (sum, &word) in sums[..columns].iter_mut().zip(words) {
            *sum += x * code(word, shift, mask);
        }
    }
}

impl<B: Backend + PackedOps, C: CheckpointStrategy> PackedOps for Autodiff<B, C> {
    fn packed_matmul(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct PackedMatmul;

        impl<B: Backend + PackedOps> Backward<B, 1> for PackedMatmul {
            type State = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>, PackedLayout);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let (words, scale, zero, layout) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |grad| {
                    let weight = B::float_swap_dims(B::unpack(words, scale, zero, layout), 0, 1);
                    let dtype = grad.dtype();
                    B::float_matmul(grad, B::float_cast(weight, dtype.into()))
                });
            }
        }

        let (x, node) = x.into_parts();
        let (scale, zero) = (scale.into_primitive(), zero.into_primitive());
        let y = B::packed_matmul(x, words.clone(), scale.clone(), zero.clone(), layout);
        match PackedMatmul.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((words, scale, zero, layout), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
