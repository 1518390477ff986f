//! Pieces the CPU kernels share: buffers, blocks of rows and vector arithmetic.
//!
//! Work is cut into blocks by shape alone and every reduction has a fixed order: the thread count never shows in a result.

use std::mem::MaybeUninit;

use burn_backend::{Bytes, DType, Shape, TensorMetadata, ops::FloatTensorOps};
use burn_flex::{Flex, FlexTensor, Layout};
use faer::MatRef;
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::awake;

/// Elements of a block of rows: large enough to pay for a task, small enough for the L2 cache.
const BLOCK: usize = 1 << 14;

/// Whether the f32 kernels apply; other dtypes take the composed body.
pub(super) fn all_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|t| t.dtype() == DType::F32)
}

/// A row-major tensor that owns exactly its elements; copies only when it has to.
pub(super) fn contiguous(x: FlexTensor) -> FlexTensor {
    let whole = x.is_contiguous()
        && x.layout().start_offset() == 0
        && x.bytes().len() == x.layout().num_elements() * x.dtype().size();
    if whole { x } else { x.to_contiguous() }
}

/// Whether numbers are stored in bf16, as weights may be.
pub(super) fn is_bf16(x: &FlexTensor) -> bool {
    x.dtype() == DType::BF16
}

/// `x` with numbers that are stored in bf16 as f32, which lie as those do where there are no gaps.
pub(super) fn widened(x: FlexTensor) -> FlexTensor {
    if !is_bf16(&x) {
        return x;
    }
    let x = without_gaps(x);
    let (shape, strides) = (x.shape(), x.layout().strides().to_vec());
    let halves = &x.storage::<bf16>()[x.layout().start_offset()..];
    let values = fresh(shape.num_elements(), BLOCK, |i, values| {
        for (value, half) in values.iter_mut().zip(&halves[i * BLOCK..]) {
            *value = f32::from_bits(u32::from(half.to_bits()) << 16);
        }
    });
    FlexTensor::new(Bytes::from_elems(values), Layout::new(shape, strides, 0), DType::F32)
}

/// Whether the numbers of a matrix along dimension 1, or those along dimension 0, lie together without gaps between the lines.
pub(super) fn unbroken(x: &FlexTensor, along: usize) -> bool {
    let (strides, shape) = (x.layout().strides(), x.shape());
    shape.num_dims() == 2 && strides[along] == 1 && strides[1 - along] == shape[along] as isize
}

/// A matrix whose numbers lie together in rows or in columns: `x` itself if it does, a row-major copy otherwise.
pub(super) fn without_gaps(x: FlexTensor) -> FlexTensor {
    if unbroken(&x, 0) || unbroken(&x, 1) { x } else { x.to_contiguous() }
}

/// Wraps row-major data.
pub(super) fn tensor(data: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(shape), DType::F32)
}

/// `[batch, heads, tokens, d]` as a view of `[batch, tokens, heads, d]`, and the other way round.
pub(super) fn by_token(x: FlexTensor) -> FlexTensor {
    <Flex as FloatTensorOps<Flex>>::float_swap_dims(x, 1, 2)
}

/// Length of the last dimension.
pub(super) fn last_dim(x: &FlexTensor) -> usize {
    let shape = x.shape();
    shape[shape.num_dims() - 1]
}

/// `x`, row-major, after `f` has changed its values in place: in its own buffer if nobody else holds it, in a copy otherwise.
pub(super) fn map(x: FlexTensor, f: impl FnOnce(&mut [f32])) -> FlexTensor {
    let mut x = contiguous(x);
    if x.try_storage_mut::<f32>().is_none() {
        let values = x.storage::<f32>();
        x = tensor(filled(values.len(), BLOCK, Some(values), |_, _| {}), x.shape());
    }
    f(x.try_storage_mut::<f32>().expect("nobody else holds it"));
    x
}

/// `f(first row, rows)` on blocks of rows of length `d`, in parallel, as [`map`].
pub(super) fn map_rows(x: FlexTensor, d: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> FlexTensor {
    let mut x = contiguous(x);
    let rows = block_rows(d);
    if let Some(values) = x.try_storage_mut::<f32>() {
        blocks(values, d, rows, f);
        return x;
    }
    let values = x.storage::<f32>();
    tensor(filled(values.len(), rows * d, Some(values), |i, out| f(i * rows, out)), x.shape())
}

/// A buffer that `f(number, part)` writes in parts of `size`, in parallel. Parts are zero at first, made so by the thread that has them.
pub(super) fn fresh(len: usize, size: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    filled(len, size, None, f)
}

/// [`fresh`], with parts that hold those of `source` at first if there is one.
fn filled(len: usize, size: usize, source: Option<&[f32]>, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    awake::parts(&mut out.spare_capacity_mut()[..len], size, |i, part| {
        let part = match source {
            Some(source) => part.write_copy_of_slice(&source[i * size..][..part.len()]),
            None => zeroed(part),
        };
        f(i, part);
    });
    // SAFETY: the parts are all there is.
    unsafe { out.set_len(len) };
    out
}

/// Memory that holds values, to write others.
pub(super) fn room(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: values that are there may be seen as values that may not be; this crate's kernels write values alone.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<f32>]) }
}

/// `part`, all zero.
pub(super) fn zeroed(part: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    part.fill(MaybeUninit::new(0.0));
    // SAFETY: all of it has just been written.
    unsafe { part.assume_init_mut() }
}

/// Rows in a block, from the shape alone.
pub(super) fn block_rows(d: usize) -> usize {
    (BLOCK / d.max(1)).max(1)
}

/// `f(first row, rows)` over blocks of `rows` rows of length `d`, in parallel.
pub(super) fn blocks(data: &mut [f32], d: usize, rows: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if data.len() <= rows * d {
        if !data.is_empty() {
            f(0, data);
        }
        return;
    }
    awake::parts(data, rows * d, |i, part| f(i * rows, part));
}

/// As [`blocks`], over two buffers with the same number of rows.
pub(super) fn blocks2<T: Send>(
    (a, da): (&mut [f32], usize),
    (b, db): (&mut [T], usize),
    rows: usize,
    f: impl Fn(usize, &mut [f32], &mut [T]) + Sync,
) {
    if a.len() <= rows * da {
        if !a.is_empty() {
            f(0, a, b);
        }
        return;
    }
    let pairs = a.chunks_mut(rows * da).zip(b.chunks_mut(rows * db)).enumerate();
    awake::each(pairs.collect(), |(i, (a, b))| f(*i * rows, a, b));
}

/// `[rows, columns]` from parts of `width` columns in parallel: `f(first column, part)` fills `[rows, its columns]`, zero at first.
pub(super) fn by_columns(
    rows: usize,
    columns: usize,
    width: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) -> FlexTensor {
    let shape = Shape::new([rows, columns]);
    let mut parts = vec![0.0; rows * columns];
    blocks(&mut parts, rows, width, f);
    if rows == 1 || columns <= width {
        return tensor(parts, shape);
    }
    let mut out = vec![0.0; rows * columns];
    blocks(&mut out, columns, block_rows(columns), |first, out| {
        for (row, out) in out.chunks_exact_mut(columns).enumerate() {
            for (part, out) in out.chunks_mut(width).enumerate() {
                let at = part * width * rows + (first + row) * out.len();
                out.copy_from_slice(&parts[at..][..out.len()]);
            }
        }
    });
    tensor(out, shape)
}

/// Sum of `f` over the elements of slices of one length, in 32 lanes and a fixed order.
#[inline(always)]
pub(super) fn sum<const N: usize>(x: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [0.0f32; LANES];
    let whole = x[0].len() / LANES * LANES;
    for base in (0..whole).step_by(LANES) {
        // Arrays: an index into a slice is checked in each lane, and the lanes then are no vectors.
        let mut chunk = [&[0.0; LANES]; N];
        for n in 0..N {
            chunk[n] = x[n][base..].first_chunk().expect("slices of one length");
        }
        for lane in 0..LANES {
            let mut at = [0.0; N];
            for n in 0..N {
                at[n] = chunk[n][lane];
            }
            lanes[lane] += f(at);
        }
    }
    for i in whole..x[0].len() {
        let mut at = [0.0; N];
        for n in 0..N {
            at[n] = x[n][i];
        }
        lanes[i - whole] += f(at);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest of `x`, NaN passed over: one instruction a vector. What is done with the result has to find a NaN.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    const LANES: usize = 64;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane = larger(*lane, v);
    }
    // By halves, which are vectors: one after the other they would wait for each other.
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = larger(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Bytes of a line of the caches.
pub(super) const LINE: usize = 64;

/// Asks for the line of memory that `at` is in.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// [`prefetch`] into the second-level cache alone.
#[inline(always)]
pub(super) fn prefetch_second<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Writes `x` as f32.
pub(super) fn widen(x: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") && is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has these instructions.
        return unsafe { widen_x86(x, out) };
    }
    x.convert_to_f32_slice(out);
}

/// `half` calls a function for each eight values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn widen_x86(x: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{__m128i, __m256, _mm256_cvtph_ps};
    use std::mem::transmute;
    let ((x, x_tail), (out, out_tail)) = (x.as_chunks::<8>(), out.as_chunks_mut::<8>());
    for (x, out) in x.iter().zip(out) {
        // SAFETY: eight halves and eight values are as long as their vectors, and any bits are one.
        *out = unsafe { transmute::<__m256, [f32; 8]>(_mm256_cvtph_ps(transmute::<[f16; 8], __m128i>(*x))) };
    }
    x_tail.convert_to_f32_slice(out_tail);
}

/// `e^x` within 2 ulp (Cephes' polynomial): 0 below -87.3, infinite above 88.3, NaN for NaN. Branch-free, so that
/// loops over it become vector code.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.3;
    const HIGH: f32 = 88.3;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let c = if x > HIGH { HIGH } else { x };
    let c = if c < LOW { LOW } else { c };
    let shifted = c * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = c - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    let y = y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let y = if x < LOW { 0.0 } else { y };
    if x > HIGH { f32::INFINITY } else { y }
}

/// `tanh(x)` to about 3e-7 relative.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    let s = x * x;
    let small = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0))));
    if x.abs() < 0.25 { small } else { large }
}

/// A tensor `[batch, heads, tokens, d]` whose rows are unbroken but may lie anywhere (a transposed projection, a slice of a cache).
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    data: &'a [f32],
    strides: [usize; 3],
    pub dims: [usize; 4],
}

impl<'a> Heads<'a> {
    /// `x` itself if its rows are unbroken, a row-major copy otherwise.
    pub fn readable(x: FlexTensor) -> FlexTensor {
        let strides = x.layout().strides();
        let unbroken = (strides[3] == 1 || dim_len(&x, 3) == 1) && strides.iter().all(|&s| s >= 0);
        if unbroken { x } else { x.to_contiguous() }
    }

    /// Views a tensor that went through [`readable`](Self::readable).
    pub fn new(x: &'a FlexTensor) -> Self {
        let strides = x.layout().strides();
        Self {
            data: &x.storage::<f32>()[x.layout().start_offset()..],
            strides: std::array::from_fn(|i| strides[i] as usize),
            dims: std::array::from_fn(|i| dim_len(x, i)),
        }
    }

    /// Tokens `from..to` of one head of one sequence, `[to - from, d]`.
    pub fn tokens(&self, batch: usize, head: usize, from: usize, to: usize) -> MatRef<'a, f32> {
        let at = batch * self.strides[0] + head * self.strides[1] + from * self.strides[2];
        MatRef::from_row_major_slice_with_stride(&self.data[at..], to - from, self.dims[3], self.strides[2])
    }
}

fn dim_len(x: &FlexTensor, dim: usize) -> usize {
    x.layout().shape()[dim]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_agree_with_f64() {
        let mut worst = (0.0f64, 0.0f64);
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp();
            worst.0 = worst.0.max((f64::from(exp(x)) / want - 1.0).abs());
        }
        for i in -9000..9000 {
            let x = (i as f32 + 0.5) / 1000.0;
            let want = f64::from(x).tanh();
            worst.1 = worst.1.max((f64::from(tanh(x)) / want - 1.0).abs());
        }
        assert!(worst.0 < 2.5e-7, "exp is off by {:e}", worst.0);
        assert!(worst.1 < 6e-7, "tanh is off by {:e}", worst.1);
    }

    #[test]
    fn exp_saturates() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(200.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(tanh(f32::NAN).is_nan());
        assert_eq!((tanh(50.0), tanh(-50.0)), (1.0, -1.0));
    }

    #[test]
    fn halves_are_widened_exactly() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for from in [0, 1, 3] {
            let mut out = vec![0.0; all.len() - from];
            widen(&all[from..], &mut out);
            for (half, got) in all[from..].iter().zip(out) {
                assert!(got == half.to_f32() || got.is_nan() && half.is_nan(), "{half:?} became {got}");
            }
        }
    }

    #[test]
    fn sum_and_max_cover_every_element() {
        for len in [0, 1, 31, 32, 33, 100, 129] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum([&x], |[x]| x), (0..len).sum::<usize>() as f32);
            assert_eq!(sum([&x, &x], |[x, y]| x * y), (0..len).map(|i| i * i).sum::<usize>() as f32);
            for at in 0..len {
                let mut x = vec![-1.0; len];
                x[at] = 2.0;
                assert_eq!(max(&x), 2.0);
                x[at] = f32::NAN;
                assert_eq!(max(&x), if len == 1 { f32::NEG_INFINITY } else { -1.0 });
                assert!(sum([&x], |[x]| exp(x + 1.0)).is_nan());
            }
        }
    }
}
