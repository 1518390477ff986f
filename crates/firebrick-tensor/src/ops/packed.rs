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
use burn_flex::{Flex, FlexTensor};
use half::f16;
use pulp::Arch;

use super::packed_dots::{self, Level, STEP};
use super::{cpu, packed_f32};

/// A weight matrix as low-bit codes with a scale and a zero point for each group of input rows.
///
/// `w[i][o] = scale[i / group][o] * (code[i][o] - zero[i / group][o])`, in the dtype of `zero`. Codes sit in 32-bit words along
/// `d_in`, least significant bits first; a word holds `32 / bits` whole codes (ten at 3 bits), none crosses a word. Sixteen outputs
/// are a panel, whose words lie together, so that a product with one row reads memory from one end to the other; at 2, 4 and 8 bits a
/// panel is sixteen columns of AutoGPTQ's `qweight`. The last one is filled up with zeros.
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
    /// `[ceil(d_out / 16), ceil(d_in / (32 / bits)), 16]`, bit patterns as i32.
    pub words: Tensor<3, Int>,
    /// `[ceil(d_out / 16), ceil(d_in / group), 16]`; may be narrower than `zero`.
    pub scale: Tensor<3>,
    /// `[ceil(d_out / 16), ceil(d_in / group), 16]`, or `[.., 1, 16]` where all groups share it, in units of codes; may be fractional.
    pub zero: Tensor<3>,
}

impl PackedMatrix {
    /// Packs `codes` (`[d_in, d_out]`, row-major) on the device of `scale`.
    ///
    /// - scale: `[ceil(d_in / group), d_out]`
    /// - zero: as scale, or `[1, d_out]`
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
        let [rows, columns] = zero.dims();
        assert!(
            (rows == groups || rows == 1) && columns == d_out,
            "PackedMatrix: zero [{rows}, {columns}] for [{groups}, {d_out}]"
        );
        let device = scale.device();
        let layout = PackedLayout { bits: bits.into(), group, d_in, d_out };
        let (per_word, rows) = (layout.per_word(), layout.word_rows());
        let mut words = vec![0u32; layout.panels() * rows * PANEL];
        for (i, codes) in codes.chunks_exact(d_out.max(1)).enumerate() {
            let shift = (i % per_word) * layout.bits;
            for (panel, codes) in codes.chunks(PANEL).enumerate() {
                let row = &mut words[(panel * rows + i / per_word) * PANEL..];
                for (word, &code) in row.iter_mut().zip(codes) {
                    assert!(
                        u32::from(code) >> bits == 0,
                        "PackedMatrix: code {code} needs more than {bits} bits"
                    );
                    *word |= u32::from(code) << shift;
                }
            }
        }
        let words: Vec<i32> = words.into_iter().map(|w| w as i32).collect();
        let words = Tensor::from_data(TensorData::new(words, [layout.panels(), rows, PANEL]), &device);
        let (scale, zero) = (in_panels(scale), in_panels(zero));
        Self { bits, group, d_in, d_out, words, scale, zero }
    }

    /// The dense matrix `[d_in, d_out]`, in the dtype of the zero points.
    pub fn unpack(&self) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as PackedOps>::unpack(
            self.words.clone().into_dispatch(),
            self.scale.clone().into_dispatch(),
            self.zero.clone().into_dispatch(),
            self.layout(),
        ))
    }

    pub(super) fn layout(&self) -> PackedLayout {
        PackedLayout { bits: self.bits.into(), group: self.group, d_in: self.d_in, d_out: self.d_out }
    }

    /// Bytes held: words, scales and zero points, with what fills up the last panel.
    pub fn bytes(&self) -> usize {
        let values = |t: &Tensor<3>| t.shape().num_elements() * t.dtype().size();
        self.words.shape().num_elements() * 4 + values(&self.scale) + values(&self.zero)
    }
}

/// `[rows, d_out]` as `[panels, rows, 16]`, filled up with zeros. By way of the host: a view of other strides would be copied for each product.
fn in_panels(x: Tensor<2>) -> Tensor<3> {
    let ([rows, d_out], device, dtype) = (x.dims(), x.device(), x.dtype());
    let filled = d_out.next_multiple_of(PANEL);
    let x = match filled - d_out {
        0 => x,
        missing => Tensor::cat(vec![x, Tensor::zeros([rows, missing], (&device, dtype))], 1),
    };
    let panels = x.reshape([rows, filled / PANEL, PANEL]).swap_dims(0, 1);
    Tensor::from_data(panels.into_data(), (&device, dtype))
}

/// How the inputs of a product with packed weights are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PackedInputs {
    /// As they are. On the CPU few rows of inputs for codes of 4 or 8 bits in groups of a multiple of 32 are taken to 2^-21 of the
    /// largest of their block of 32, about what sums in f32 lose.
    #[default]
    Exact,
    /// Rounded to the 8-bit multiples of a scale for each block of 32, the largest of a block to 127 of them, so that products are
    /// of integers where there is a kernel (codes of 4 or 8 bits in groups of a multiple of 32, on the CPU). It costs about 0.4 % of
    /// the largest input of a block; llama.cpp decodes like this. Gradients pass as if nothing were rounded.
    EightBits,
}

/// `x` times a packed matrix; gradients reach `x` only.
///
/// - x: `[rows, d_in]`
/// - result: `[rows, d_out]`
///
/// # Panics
/// If `x` does not have `d_in` columns.
pub fn packed_matmul(x: Tensor<2>, weight: &PackedMatrix, inputs: PackedInputs) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.d_in, "packed_matmul: columns of x against rows of the matrix");
    Tensor::from_dispatch(<Dispatch as PackedOps>::packed_matmul(
        x.into_dispatch(),
        weight.words.clone().into_dispatch(),
        weight.scale.clone().into_dispatch(),
        weight.zero.clone().into_dispatch(),
        weight.layout(),
        inputs,
    ))
}

/// How codes lie in their words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedLayout {
    pub(super) bits: usize,
    pub(super) group: usize,
    pub(super) d_in: usize,
    pub(super) d_out: usize,
}

impl PackedLayout {
    pub(super) fn panels(&self) -> usize {
        self.d_out.div_ceil(PANEL)
    }

    /// Words of an output.
    pub(super) fn word_rows(&self) -> usize {
        self.d_in.div_ceil(self.per_word())
    }

    /// Scales of an output.
    pub(super) fn groups(&self) -> usize {
        self.d_in.div_ceil(self.group)
    }

    pub(super) fn per_word(&self) -> usize {
        32 / self.bits
    }

    pub(super) fn mask(&self) -> u32 {
        (1 << self.bits) - 1
    }
}

/// Packed products on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait PackedOps: Backend {
    /// The dense matrix `[d_in, d_out]`.
    #[fusion(dtype = zero, shape = Shape::new([layout.d_in, layout.d_out]))]
    fn unpack(
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        composed_unpack::<Self>(words, scale, zero, layout)
    }

    /// Product with the dense matrix, see [`packed_matmul`].
    #[fusion(dtype = x, shape = Shape::new([x[0], layout.d_out]))]
    fn packed_matmul(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
        inputs: PackedInputs,
    ) -> FloatTensor<Self> {
        composed::<Self>(x, words, scale, zero, layout, inputs)
    }
}

pub(super) fn composed_unpack<B: Backend>(
    words: IntTensor<B>,
    scale: FloatTensor<B>,
    zero: FloatTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let (panels, rows) = (layout.panels(), layout.word_rows());
    let dtype: FloatDType = zero.dtype().into();
    let cut = |x: FloatTensor<B>, shape: &[usize]| {
        let slices: Vec<Slice> = shape.iter().map(|&n| Slice::from(0..n)).collect();
        B::float_slice(x, &slices)
    };
    // A word at a time along a new axis, so that a plain reshape puts the codes in order.
    let slots = (0..layout.per_word()).map(|slot| {
        let shifted = B::bitwise_right_shift_scalar(words.clone(), (slot * layout.bits).into());
        let code = B::bitwise_and_scalar(shifted, layout.mask().into());
        B::float_reshape(B::int_into_float(code, dtype), Shape::new([panels, rows, 1, PANEL]))
    });
    let codes = B::float_cat(slots.collect(), 2);
    let codes = B::float_reshape(codes, Shape::new([panels, rows * layout.per_word(), PANEL]));
    let spread = |x: FloatTensor<B>| {
        let groups = x.shape()[1];
        let group = if groups == 1 { layout.d_in } else { layout.group };
        let x = B::float_reshape(x, Shape::new([panels, groups, 1, PANEL]));
        let x = B::float_expand(x, Shape::new([panels, groups, group, PANEL]));
        let x = B::float_reshape(x, Shape::new([panels, groups * group, PANEL]));
        cut(x, &[panels, layout.d_in, PANEL])
    };
    let scale = spread(if scale.dtype() == zero.dtype() { scale } else { B::float_cast(scale, dtype) });
    let codes = cut(codes, &[panels, layout.d_in, PANEL]);
    let weight = B::float_mul(B::float_sub(codes, spread(zero)), scale);
    let weight = B::float_swap_dims(weight, 0, 1);
    let weight = B::float_reshape(weight, Shape::new([layout.d_in, panels * PANEL]));
    cut(weight, &[layout.d_in, layout.d_out])
}

pub(super) fn composed<B: PackedOps>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scale: FloatTensor<B>,
    zero: FloatTensor<B>,
    layout: PackedLayout,
    inputs: PackedInputs,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let x = if inputs == PackedInputs::EightBits { rounded::<B>(x) } else { x };
    let weight = B::unpack(words, scale, zero, layout);
    B::float_matmul(x, if weight.dtype() == dtype { weight } else { B::float_cast(weight, dtype.into()) })
}

/// `x` rounded as [`PackedInputs::EightBits`] says.
pub(super) fn rounded<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [rows, d_in] = [x.shape()[0], x.shape()[1]];
    let blocks = d_in.div_ceil(STEP);
    let dtype: FloatDType = x.dtype().into();
    let x = match blocks * STEP - d_in {
        0 => x,
        missing => {
            let zeros = B::float_zeros(Shape::new([rows, missing]), &x.device(), dtype);
            B::float_cat(vec![x, zeros], 1)
        }
    };
    let x = B::float_reshape(x, Shape::new([rows * blocks, STEP]));
    let largest = B::float_max_dim(B::float_abs(x.clone()), 1);
    let scale = B::float_div_scalar(largest, packed_dots::LARGEST.into());
    let scale = B::float_clamp_min(scale, packed_dots::LEAST.into());
    let codes = B::float_round(B::float_div(x, scale.clone()));
    let x = B::float_reshape(B::float_mul(codes, scale), Shape::new([rows, blocks * STEP]));
    B::float_slice(x, &[Slice::from(0..rows), Slice::from(0..d_in)])
}

/// Outputs whose words lie together: a vector of AVX-512, a line of the caches.
pub(super) const PANEL: usize = 16;

/// What each output of a panel has.
pub(super) type OfPanel<T> = [T; PANEL];

/// Rows of `x` from which the matrix is decoded for a dense product.
const DENSE_ROWS: usize = 8;

impl PackedOps for Flex {
    fn unpack(words: FlexTensor, scale: FlexTensor, zero: FlexTensor, layout: PackedLayout) -> FlexTensor {
        if !Weight::has_kernel(&words, &scale, &zero) {
            return composed_unpack::<Self>(words, scale, zero, layout);
        }
        let (words, scale, zero) = (cpu::contiguous(words), cpu::contiguous(scale), cpu::contiguous(zero));
        packed_f32::unpack(&Weight::new(&words, &scale, &zero, layout))
    }

    fn packed_matmul(
        x: FlexTensor,
        words: FlexTensor,
        scale: FlexTensor,
        zero: FlexTensor,
        layout: PackedLayout,
        inputs: PackedInputs,
    ) -> FlexTensor {
        let rows = x.shape()[0];
        if rows == 0 || !cpu::all_f32(&[&x]) || !Weight::has_kernel(&words, &scale, &zero) {
            return composed::<Self>(x, words, scale, zero, layout, inputs);
        }
        let eight_bits = inputs == PackedInputs::EightBits;
        let integers = eight_bits && packed_dots::applies(layout);
        let x = if eight_bits && !integers { rounded::<Self>(x) } else { x };
        let (x, words) = (cpu::contiguous(x), cpu::contiguous(words));
        let (scale, zero) = (cpu::contiguous(scale), cpu::contiguous(zero));
        let weight = Weight::new(&words, &scale, &zero, layout);
        let (x, level) = (x.storage::<f32>(), Level::best());
        match integers || rows < DENSE_ROWS {
            true => Rows::new(x, layout, inputs).product(&weight, level),
            false => packed_f32::many_rows(x, &weight, Arch::new(), rayon::current_num_threads()),
        }
    }
}

/// Rows of inputs as a kernel takes them.
pub(super) struct Rows<'a> {
    rows: usize,
    /// What they are for.
    layout: PackedLayout,
    asked: PackedInputs,
    inputs: Inputs<'a>,
}

enum Inputs<'a> {
    /// Rounded to 8 bits.
    Rounded(Vec<packed_dots::Block<1>>),
    /// As they are, but for what their digits leave.
    Digits(Vec<packed_dots::Block<{ packed_dots::EXACT }>>),
    /// As they are.
    Plain(&'a [f32]),
}

impl<'a> Rows<'a> {
    /// Of `x`, `[rows, d_in]`; inputs that a layout has no integers for stay what they are.
    pub fn new(x: &'a [f32], layout: PackedLayout, asked: PackedInputs) -> Self {
        let inputs = match (packed_dots::applies(layout), asked) {
            (true, PackedInputs::EightBits) => Inputs::Rounded(packed_dots::blocks(x, layout)),
            (true, PackedInputs::Exact) => Inputs::Digits(packed_dots::blocks(x, layout)),
            (false, _) => Inputs::Plain(x),
        };
        Self { rows: x.len() / layout.d_in, layout, asked, inputs }
    }

    /// Whether they are what a matrix of `layout` takes.
    pub fn fit(&self, layout: PackedLayout, inputs: PackedInputs) -> bool {
        self.asked == inputs && self.layout == PackedLayout { d_out: self.layout.d_out, ..layout }
    }

    /// Writes outputs `first..`, from the beginning of a panel on, to `out`, `[rows, columns]`.
    pub fn columns(&self, weight: &Weight<'_>, level: Level, first: usize, out: &mut [f32]) {
        let columns = out.len() / self.rows;
        match &self.inputs {
            Inputs::Rounded(blocks) => packed_dots::panels(blocks, weight, level, first, columns, out),
            Inputs::Digits(blocks) => packed_dots::panels(blocks, weight, level, first, columns, out),
            Inputs::Plain(x) => packed_f32::columns(x, weight, Arch::new(), first, out),
        }
    }

    /// Their product with the matrix.
    pub fn product(&self, weight: &Weight<'_>, level: Level) -> FlexTensor {
        /// Rows of a task where there are many: as many threads read the whole matrix, and write rows as they lie.
        const ROWS: usize = 64;
        if self.rows >= 2 * ROWS
            && let Inputs::Rounded(blocks) = &self.inputs
        {
            let d_out = weight.layout.d_out;
            let mut out = vec![0.0; self.rows * d_out];
            cpu::blocks(&mut out, d_out, ROWS, |first, out| {
                let blocks = &blocks[first * packed_dots::steps(self.layout)..];
                packed_dots::panels(blocks, weight, level, 0, d_out, out);
            });
            return cpu::tensor(out, Shape::new([self.rows, d_out]));
        }
        cpu::by_columns(self.rows, weight.layout.d_out, weight.task(), |first, out| {
            self.columns(weight, level, first, out);
        })
    }
}

/// Scales as they lie in memory, group by group.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    F32(&'a [OfPanel<f32>]),
    F16(&'a [OfPanel<f16>]),
}

impl Scales<'_> {
    /// Those of a group.
    #[inline(always)]
    pub fn of(self, group: usize) -> OfPanel<f32> {
        match self {
            Scales::F32(scale) => scale[group],
            Scales::F16(scale) => {
                let mut wide = [0.0; PANEL];
                cpu::widen(&scale[group], &mut wide);
                wide
            }
        }
    }
}

/// A packed matrix that kernels read.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    pub words: &'a [OfPanel<i32>],
    pub scale: Scales<'a>,
    /// As many as scales, or one for each output.
    pub zero: &'a [OfPanel<f32>],
    pub layout: PackedLayout,
}

/// Sixteen of its outputs.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub words: &'a [OfPanel<i32>],
    pub scale: Scales<'a>,
    /// Of each group, or of all.
    pub zero: &'a [OfPanel<f32>],
}

impl Panel<'_> {
    /// Zero points of a group.
    #[inline(always)]
    pub fn zero(&self, group: usize) -> &OfPanel<f32> {
        &self.zero[if self.zero.len() == 1 { 0 } else { group }]
    }
}

impl<'a> Weight<'a> {
    /// Whether kernels read these types.
    pub fn has_kernel(words: &FlexTensor, scale: &FlexTensor, zero: &FlexTensor) -> bool {
        let scales = matches!(scale.dtype(), DType::F32 | DType::F16);
        words.dtype() == DType::I32 && words.shape().num_elements() > 0 && scales && cpu::all_f32(&[zero])
    }

    /// Views tensors that are contiguous.
    pub fn new(
        words: &'a FlexTensor,
        scale: &'a FlexTensor,
        zero: &'a FlexTensor,
        layout: PackedLayout,
    ) -> Self {
        let scale = match scale.dtype() {
            DType::F16 => Scales::F16(scale.storage().as_chunks().0),
            _ => Scales::F32(scale.storage().as_chunks().0),
        };
        Self { words: words.storage().as_chunks().0, scale, zero: zero.storage().as_chunks().0, layout }
    }

    /// Outputs of a task where each weight is read once: a part of 2^17 weights or so. The tasks are equal and their number even where
    /// that can be.
    pub fn task(&self) -> usize {
        /// At most.
        const OUTPUTS: usize = 256;
        let PackedLayout { d_in, d_out, .. } = self.layout;
        let parts = (d_in * d_out).div_ceil(1 << 17);
        let size = |parts: usize| d_out.div_ceil(parts).next_multiple_of(PANEL).clamp(64, OUTPUTS);
        let first = (parts - parts % 2).max(2);
        let even = |parts: &usize| size(*parts) * parts == d_out;
        (first..=2 * parts.max(1)).step_by(2).find(even).map_or(size(parts), size)
    }

    /// Outputs from `16 * number` on.
    #[inline(always)]
    pub fn panel(&self, number: usize) -> Panel<'a> {
        let (rows, groups) = (self.layout.word_rows(), self.layout.groups());
        let zeros = self.zero.len() / self.layout.panels();
        Panel {
            words: &self.words[number * rows..][..rows],
            scale: match self.scale {
                Scales::F32(scale) => Scales::F32(&scale[number * groups..][..groups]),
                Scales::F16(scale) => Scales::F16(&scale[number * groups..][..groups]),
            },
            zero: &self.zero[number * zeros..][..zeros],
        }
    }
}

/// Writes what a panel has to `out`, as far as that goes.
#[inline(always)]
pub(super) fn put(values: &OfPanel<f32>, out: &mut [f32]) {
    match out.first_chunk_mut() {
        Some(out) => *out = *values,
        None => out.copy_from_slice(&values[..out.len()]),
    }
}

impl<B: Backend + PackedOps, C: CheckpointStrategy> PackedOps for Autodiff<B, C> {
    fn packed_matmul(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scale: FloatTensor<Self>,
        zero: FloatTensor<Self>,
        layout: PackedLayout,
        inputs: PackedInputs,
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
        let y = B::packed_matmul(x, words.clone(), scale.clone(), zero.clone(), layout, inputs);
        match PackedMatmul.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((words, scale, zero, layout), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
