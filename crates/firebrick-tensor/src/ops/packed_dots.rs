//! Products of packed weights with inputs as integers: integer dot products, scaled once a block.
//!
//! An input is one digit of 8 bits, or three with 21 bits between them, each with products of its own: as close to the largest input of
//! its block as f32 sums come, for a third of the instructions that codes made f32 take.
//!
//! A 32-bit word holds four or eight codes of one output, so that a vector of words is as many outputs: four codes of each
//! are multiplied with the same four inputs, and nothing is summed across a vector. Every level of instructions gives the same bits: sums of
//! integers are exact, and the f32 operations are the same ones in the same order.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::cpu;
use super::packed::{COLUMNS, PackedLayout, Scales, Weight};

/// Inputs that share a scale.
pub(super) const STEP: usize = 32;

/// The largest digit; those after the first reach half of [`BASE`].
pub(super) const LARGEST: f32 = 127.0;

/// What a digit counts in units of the next one.
const BASE: i32 = 128;

/// Digits of inputs that are to stay what they are.
pub(super) const EXACT: usize = 3;

/// The least scale: blocks of zeros have it.
pub(super) const LEAST: f32 = 1e-30;

/// Four codes of each of these many outputs are multiplied at once by the kernel that every processor runs.
const LANES: usize = 8;

/// Rows that take their turn while a block of weights is in the first-level cache.
const ROWS: usize = 16;

/// Whether the kernels here multiply codes that lie like this.
pub(super) fn applies(layout: PackedLayout) -> bool {
    matches!(layout.bits, 4 | 8) && (layout.group.is_multiple_of(STEP) || layout.group >= layout.d_in)
}

/// Instructions that a kernel needs; only [`Level::all`] makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Level {
    /// Those of this processor, the fastest last.
    pub fn all() -> Vec<Level> {
        let mut all = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let haswell = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if haswell {
                all.push(Level::Avx2);
            }
            if haswell && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
                all.push(Level::Avx512Vnni);
            }
        }
        all
    }

    /// The fastest of this processor.
    pub fn best() -> Level {
        Self::all().pop().unwrap_or(Level::Portable)
    }
}

/// Inputs of a row as `D` digits each, [`STEP`] of them.
pub(super) struct Block<const D: usize> {
    /// Of each digit, four inputs a number, in the order in which words hold their codes.
    quads: [[i32; 8]; D],
    /// What the first digit is a multiple of.
    scale: f32,
    /// The sum of the inputs over `scale`.
    sum: f32,
}

/// A row of inputs, to be taken apart.
struct Row<'a, const D: usize> {
    x: &'a [f32],
    bits: usize,
}

impl<const D: usize> WithSimd for Row<'_, D> {
    type Output = Vec<Block<D>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<Block<D>> {
        // Loops, as closures would be compiled without the instructions of `S`.
        let mut blocks = Vec::with_capacity(self.x.len().div_ceil(STEP));
        for block in self.x.chunks(STEP) {
            let mut values = [0.0; STEP];
            values[..block.len()].copy_from_slice(block);
            blocks.push(Block::new(values, self.bits));
        }
        blocks
    }
}

impl<const D: usize> Block<D> {
    /// The digits of `rest`. The first is a multiple of a power of two if there are several, so that nothing is lost on the way.
    #[inline(always)]
    fn new(mut rest: [f32; STEP], bits: usize) -> Self {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let mut sizes = rest;
        for size in &mut sizes {
            *size = size.abs();
        }
        let scale = cpu::max(&sizes) / LARGEST;
        // What is not finite stays so.
        let scale = if scale < LEAST { LEAST } else { scale };
        let scale = if D > 1 && scale < f32::INFINITY { power_of_two_from(scale) } else { scale };
        for v in &mut rest {
            *v /= scale;
        }
        let (mut numbers, mut sums) = ([[0; 8]; D], [0; D]);
        for (numbers, sum) in numbers.iter_mut().zip(&mut sums) {
            let mut digits = [0i8; STEP];
            for (digit, rest) in digits.iter_mut().zip(&mut rest) {
                let rounded = *rest + ROUND;
                *rest = (*rest - (rounded - ROUND)) * BASE as f32;
                *digit = rounded.to_bits() as i8;
                *sum += i32::from(*digit);
            }
            *numbers = quads(&digits, bits);
        }
        Block { quads: numbers, scale, sum: combined(sums) }
    }
}

/// The blocks of all rows of `x`, `[rows, d_in]`, one row after the other.
pub(super) fn blocks<const D: usize>(x: &[f32], layout: PackedLayout) -> Vec<Block<D>> {
    let row = |x| Arch::new().dispatch(Row { x, bits: layout.bits });
    match x.len() / layout.d_in {
        1 => row(x),
        _ => x.par_chunks_exact(layout.d_in).flat_map_iter(row).collect(),
    }
}

/// The least power of two that is `x` or more, for a positive `x` in the normal range.
#[inline(always)]
fn power_of_two_from(x: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    f32::from_bits((x.to_bits() + MANTISSA) & !MANTISSA)
}

/// What sums over digits stand for, in units of the first.
#[inline(always)]
fn combined<const D: usize>(sums: [i32; D]) -> f32 {
    match sums.as_slice() {
        [a, b, c] => *a as f32 + (*b * BASE + *c) as f32 * LAST,
        _ => sums[0] as f32,
    }
}

/// The unit of the last of three digits.
const LAST: f32 = 1.0 / (BASE * BASE) as f32;

/// Digits in the order of codes of the weights: even and odd ones apart where a word holds eight.
#[inline(always)]
fn quads(digits: &[i8; STEP], bits: usize) -> [i32; 8] {
    let mut quads = [0; 8];
    for (i, quad) in quads.iter_mut().enumerate() {
        let (first, step) = if bits == 4 { (i / 2 * 8 + i % 2, 2) } else { (4 * i, 1) };
        let at = |k: usize| digits[first + k * step] as u8;
        *quad = i32::from_le_bytes([at(0), at(1), at(2), at(3)]);
    }
    quads
}

/// Adds outputs `first..` of all rows of `inputs` to `out`, `[rows, columns]`.
pub(super) fn columns<const D: usize>(
    inputs: &[Block<D>],
    weight: &Weight<'_>,
    level: Level,
    rows: usize,
    first: usize,
    out: &mut [f32],
) {
    const { assert!(D == 1 || D == EXACT) };
    let steps = weight.layout.d_in.div_ceil(STEP);
    Task { inputs, steps, weight, first, columns: out.len() / rows }.run(level, out);
}

/// Outputs `first..` of all rows.
struct Task<'a, const D: usize> {
    inputs: &'a [Block<D>],
    /// Blocks of a row.
    steps: usize,
    weight: &'a Weight<'a>,
    first: usize,
    columns: usize,
}

impl<const D: usize> Task<'_, D> {
    /// Adds to `out`, `[rows, columns]`.
    fn run(&self, level: Level, out: &mut [f32]) {
        for (block, out) in out.chunks_mut(ROWS * self.columns).enumerate() {
            for step in 0..self.steps {
                self.step(level, block * ROWS, step, out);
            }
        }
    }

    fn step(&self, level: Level, row: usize, step: usize, out: &mut [f32]) {
        let (weight, columns) = (self.weight, self.columns);
        let PackedLayout { bits, group, d_in } = weight.layout;
        let word_rows = bits;
        // Word rows that the last block lacks meet inputs of zero: any other will do.
        let last = d_in.div_ceil(weight.layout.per_word()) - 1;
        let group = step * STEP / group;
        let pass = Pass {
            words: std::array::from_fn(|i| {
                weight.word_row((step * word_rows + i.min(word_rows - 1)).min(last), self.first, columns)
            }),
            ahead: weight.words.as_ptr().wrapping_add((step + 1) * word_rows * weight.d_out + self.first),
            stride: weight.d_out,
            scale: weight.scales(group, self.first, columns),
            columns,
            rows: out.len() / columns,
            zero: weight.zeros(group, self.first, columns),
            inputs: &self.inputs[row * self.steps + step..],
            steps: self.steps,
            nibbles: bits == 4,
        };
        match level {
            Level::Portable => pass.portable(0, out),
            // SAFETY: `Level::all` makes this level only where the processor has AVX2 and F16C.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { pass.avx2(out) },
            // SAFETY: `Level::all` makes this level only where the processor has AVX-512F and AVX-512-VNNI.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => unsafe { pass.vnni(out) },
        }
    }
}

/// A block of inputs of some rows, against outputs of a task.
struct Pass<'a, const D: usize> {
    /// Word rows of the block: eight, or the first four.
    words: [&'a [i32]; 8],
    /// Where the words of the next block are, for prefetching; past the end behind the last one.
    ahead: *const i32,
    /// From one word row to the next.
    stride: usize,
    scale: Scales<'a>,
    zero: &'a [f32],
    columns: usize,
    rows: usize,
    /// Of this block in the first row, then every `steps` blocks.
    inputs: &'a [Block<D>],
    steps: usize,
    nibbles: bool,
}

impl<const D: usize> Pass<'_, D> {
    /// The kernel that every processor runs, on outputs `from..`.
    fn portable(&self, from: usize, out: &mut [f32]) {
        let columns = self.columns;
        if from == columns {
            return;
        }
        let mut weight_scale = [0.0; COLUMNS];
        self.scale.widen(&mut weight_scale[..columns]);
        for first in (from..columns).step_by(LANES) {
            let lanes = LANES.min(columns - first);
            let words: [[u32; LANES]; 8] = std::array::from_fn(|k| {
                let mut words = [0; LANES];
                for (word, &w) in words.iter_mut().zip(&self.words[k][first..][..lanes]) {
                    *word = w as u32;
                }
                words
            });
            let codes: [[u32; LANES]; 8] = match self.nibbles {
                true => std::array::from_fn(|k| words[k / 2].map(|w| w >> (4 * (k % 2)) & 0x0f0f_0f0f)),
                false => words,
            };
            for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                let Block { quads, scale, sum } = &self.inputs[row * self.steps];
                let mut dots = [[0i32; D]; LANES];
                for (digit, quads) in quads.iter().enumerate() {
                    for (codes, quad) in codes.iter().zip(quads) {
                        for (byte, x) in quad.to_le_bytes().into_iter().enumerate() {
                            for (dot, code) in dots.iter_mut().zip(codes) {
                                dot[digit] += (code >> (8 * byte) & 0xff) as i32 * i32::from(x as i8);
                            }
                        }
                    }
                }
                for (lane, &dots) in dots[..lanes].iter().enumerate() {
                    let j = first + lane;
                    out[j] += weight_scale[j] * scale * (combined(dots) - self.zero[j] * sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use half::f16;

    use super::{BASE, LAST, Pass, Scales};

    /// Asks for the cache lines at `first` in `rows` word rows, `stride` words apart.
    #[inline(always)]
    fn prefetch(first: *const i32, stride: usize, rows: usize) {
        for i in 0..rows {
            // SAFETY: a hint, which may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(i * stride).cast()) };
        }
    }

    impl<const D: usize> Pass<'_, D> {
        /// Asks for the words of the sixteen outputs from `first` on in the next block.
        #[inline(always)]
        fn prefetch(&self, first: usize) {
            prefetch(self.ahead.wrapping_add(first), self.stride, if self.nibbles { 4 } else { 8 });
        }

        #[target_feature(enable = "avx2,f16c")]
        pub(super) fn avx2(&self, out: &mut [f32]) {
            match self.nibbles {
                true => self.avx2_of::<true>(out),
                false => self.avx2_of::<false>(out),
            }
        }

        #[target_feature(enable = "avx2,f16c")]
        fn avx2_of<const NIBBLES: bool>(&self, out: &mut [f32]) {
            const WIDTH: usize = 8;
            let vectors = self.columns / WIDTH;
            let words = self.words.map(|row| &row.as_chunks::<WIDTH>().0[..vectors]);
            let zero = &self.zero.as_chunks::<WIDTH>().0[..vectors];
            let low = _mm256_set1_epi8(15);
            for v in 0..vectors {
                if v % 2 == 0 {
                    self.prefetch(v * WIDTH);
                }
                // SAFETY: eight words are as long as the vector, and any bits are one.
                let load = |k: usize| unsafe { transmute::<[i32; 8], __m256i>(words[k][v]) };
                let pair = |k: usize| {
                    let word = load(k);
                    [_mm256_and_si256(word, low), _mm256_and_si256(_mm256_srli_epi16::<4>(word), low)]
                };
                let codes: [__m256i; 8] = if NIBBLES {
                    let [a, b, c, d] = [pair(0), pair(1), pair(2), pair(3)];
                    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
                } else {
                    [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)]
                };
                // SAFETY: eight values are as long as the vector.
                let zero = unsafe { transmute::<[f32; 8], __m256>(zero[v]) };
                let scale = eight_scales(self.scale, v);
                for row in 0..self.rows {
                    let (input, place) = (&self.inputs[row * self.steps], row * self.columns + v * WIDTH);
                    let mut dots = [_mm256_setzero_si256(); D];
                    for (digit, quads) in input.quads.iter().enumerate() {
                        dots[digit] = match (NIBBLES, digit) {
                            (true, _) => nibbles(&codes, quads),
                            (false, 0) => bytes(&codes, quads),
                            (false, _) => bytes_by_small(&codes, quads),
                        };
                    }
                    let sums = _mm256_mul_ps(zero, _mm256_set1_ps(input.sum));
                    let dots = _mm256_sub_ps(eight_combined(dots), sums);
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(input.scale));
                    let out = out[place..].first_chunk_mut::<WIDTH>().expect("a vector of each row");
                    // SAFETY: eight values are as long as the vector, on the way there and back.
                    unsafe {
                        let total =
                            _mm256_add_ps(transmute::<[f32; 8], __m256>(*out), _mm256_mul_ps(scale, dots));
                        *out = transmute::<__m256, [f32; 8]>(total);
                    }
                }
            }
            self.portable(vectors * WIDTH, out);
        }

        #[target_feature(enable = "avx512f,avx512vnni")]
        pub(super) fn vnni(&self, out: &mut [f32]) {
            const WIDTH: usize = 16;
            let vectors = self.columns / WIDTH;
            let words = self.words.map(|row| &row.as_chunks::<WIDTH>().0[..vectors]);
            let zero = &self.zero.as_chunks::<WIDTH>().0[..vectors];
            let low = _mm512_set1_epi32(0x0f0f_0f0f);
            for v in 0..vectors {
                self.prefetch(v * WIDTH);
                // SAFETY: sixteen words are as long as the vector, and any bits are one.
                let load = |k: usize| unsafe { transmute::<[i32; 16], __m512i>(words[k][v]) };
                let pair = |k: usize| {
                    let word = load(k);
                    [_mm512_and_si512(word, low), _mm512_and_si512(_mm512_srli_epi32::<4>(word), low)]
                };
                let codes: [__m512i; 8] = if self.nibbles {
                    let [a, b, c, d] = [pair(0), pair(1), pair(2), pair(3)];
                    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
                } else {
                    [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)]
                };
                // SAFETY: sixteen values are as long as the vector.
                let zero = unsafe { transmute::<[f32; 16], __m512>(zero[v]) };
                let scale = sixteen_scales(self.scale, v);
                for row in 0..self.rows {
                    let (input, place) = (&self.inputs[row * self.steps], row * self.columns + v * WIDTH);
                    // Two sums of each digit, so that additions overlap.
                    let mut dots = [[_mm512_setzero_si512(); D]; 2];
                    for k in 0..8 {
                        for (digit, quads) in input.quads.iter().enumerate() {
                            let quad = _mm512_set1_epi32(quads[k]);
                            dots[k % 2][digit] = _mm512_dpbusd_epi32(dots[k % 2][digit], codes[k], quad);
                        }
                    }
                    let dots = sixteen_combined(dots);
                    let dots = _mm512_sub_ps(dots, _mm512_mul_ps(zero, _mm512_set1_ps(input.sum)));
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(input.scale));
                    let out = out[place..].first_chunk_mut::<WIDTH>().expect("a vector of each row");
                    // SAFETY: sixteen values are as long as the vector, on the way there and back.
                    unsafe {
                        let total =
                            _mm512_add_ps(transmute::<[f32; 16], __m512>(*out), _mm512_mul_ps(scale, dots));
                        *out = transmute::<__m512, [f32; 16]>(total);
                    }
                }
            }
            self.portable(vectors * WIDTH, out);
        }
    }

    /// [`combined`](super::combined) of each output.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn eight_combined<const D: usize>(sums: [__m256i; D]) -> __m256 {
        let first = _mm256_cvtepi32_ps(sums[0]);
        if D == 1 {
            return first;
        }
        let rest = _mm256_add_epi32(_mm256_slli_epi32::<{ BASE.ilog2() as i32 }>(sums[1]), sums[2]);
        _mm256_add_ps(first, _mm256_mul_ps(_mm256_cvtepi32_ps(rest), _mm256_set1_ps(LAST)))
    }

    /// [`combined`](super::combined) of each output, from two parts of its sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sixteen_combined<const D: usize>([a, b]: [[__m512i; D]; 2]) -> __m512 {
        let first = _mm512_cvtepi32_ps(_mm512_add_epi32(a[0], b[0]));
        if D == 1 {
            return first;
        }
        let (second, third) = (_mm512_add_epi32(a[1], b[1]), _mm512_add_epi32(a[2], b[2]));
        let rest = _mm512_add_epi32(_mm512_slli_epi32::<{ BASE.ilog2() }>(second), third);
        _mm512_add_ps(first, _mm512_mul_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(LAST)))
    }

    /// Scales of the outputs of vector `v`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn eight_scales(scale: Scales<'_>, v: usize) -> __m256 {
        // SAFETY: eight values or halves are as long as their vector, and any bits are one.
        match scale {
            Scales::F32(scale) => unsafe { transmute::<[f32; 8], __m256>(scale.as_chunks().0[v]) },
            Scales::F16(scale) => {
                _mm256_cvtph_ps(unsafe { transmute::<[f16; 8], __m128i>(scale.as_chunks().0[v]) })
            }
        }
    }

    /// Scales of the outputs of vector `v`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sixteen_scales(scale: Scales<'_>, v: usize) -> __m512 {
        // SAFETY: sixteen values or halves are as long as their vector, and any bits are one.
        match scale {
            Scales::F32(scale) => unsafe { transmute::<[f32; 16], __m512>(scale.as_chunks().0[v]) },
            Scales::F16(scale) => {
                _mm512_cvtph_ps(unsafe { transmute::<[f16; 16], __m256i>(scale.as_chunks().0[v]) })
            }
        }
    }

    /// Sums of codes up to 15 times inputs. Eight products of two pairs stay in 16 bits: 8 * 2 * 15 * 127 = 30480.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn nibbles(codes: &[__m256i; 8], quads: &[i32; 8]) -> __m256i {
        let pairs = |k: usize| _mm256_maddubs_epi16(codes[k], _mm256_set1_epi32(quads[k]));
        let add = |a, b| _mm256_add_epi16(a, b);
        let left = add(add(pairs(0), pairs(1)), add(pairs(2), pairs(3)));
        let right = add(add(pairs(4), pairs(5)), add(pairs(6), pairs(7)));
        _mm256_madd_epi16(add(left, right), _mm256_set1_epi16(1))
    }

    /// Sums of codes up to 255 times inputs. Two such products would not fit in 16 bits: even and odd bytes are widened apart.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes(codes: &[__m256i; 8], quads: &[i32; 8]) -> __m256i {
        let even = _mm256_set1_epi16(0xff);
        let mut sums = [_mm256_setzero_si256(); 2];
        for (&codes, &quad) in codes.iter().zip(quads) {
            let quad = _mm256_set1_epi32(quad);
            let first = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quad));
            let second = _mm256_srai_epi16::<8>(quad);
            let products = _mm256_madd_epi16(_mm256_and_si256(codes, even), first);
            sums[0] = _mm256_add_epi32(sums[0], products);
            let products = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), second);
            sums[1] = _mm256_add_epi32(sums[1], products);
        }
        _mm256_add_epi32(sums[0], sums[1])
    }

    /// As [`bytes`], for digits up to 64: two products stay in 16 bits, 2 * 255 * 64 = 32640.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes_by_small(codes: &[__m256i; 8], quads: &[i32; 8]) -> __m256i {
        let mut sum = _mm256_setzero_si256();
        for (&codes, &quad) in codes.iter().zip(quads) {
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(quad));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use firebrick_core::Seed;
    use half::f16;

    use super::super::packed::{PackedInputs, Rows, Scales};
    use super::*;

    /// `x`, `[rows, d_in]`, times the matrix.
    fn product(x: &[f32], weight: &Weight<'_>, inputs: PackedInputs, level: Level) -> Vec<f32> {
        Rows::new(x, weight.layout, inputs).product(weight, level).storage::<f32>().to_vec()
    }

    const BOTH: [PackedInputs; 2] = [PackedInputs::Exact, PackedInputs::EightBits];

    struct Matrix {
        layout: PackedLayout,
        d_out: usize,
        // From the second word on: no vector of them is aligned.
        words: Vec<i32>,
        scale: Vec<f16>,
        zero: Vec<f32>,
    }

    impl Matrix {
        fn new(
            bits: usize,
            group: usize,
            d_in: usize,
            d_out: usize,
            shared: bool,
            code: Option<u32>,
        ) -> Self {
            let layout = PackedLayout { bits, group, d_in };
            let (per_word, groups) = (layout.per_word(), d_in.div_ceil(group));
            let draws = Seed(3).normal("codes", d_in.next_multiple_of(per_word) * d_out, 40.0);
            let mut words = vec![0u32; 1 + d_in.div_ceil(per_word) * d_out];
            for i in 0..d_in {
                for o in 0..d_out {
                    let drawn = draws[i * d_out + o].abs() as u32 % (1 << bits);
                    let shift = i % per_word * bits;
                    words[1 + i / per_word * d_out + o] |= code.unwrap_or(drawn) << shift;
                }
            }
            let scale = Seed(3).normal("scale", groups * d_out, 0.1).into_iter().map(f16::from_f32).collect();
            let zero = Seed(3).normal("zero", if shared { d_out } else { groups * d_out }, 3.0);
            Self { layout, d_out, words: words.into_iter().map(|w| w as i32).collect(), scale, zero }
        }

        fn weight(&self) -> Weight<'_> {
            let (layout, d_out) = (self.layout, self.d_out);
            Weight {
                words: &self.words[1..],
                scale: Scales::F16(&self.scale),
                zero: &self.zero,
                layout,
                d_out,
            }
        }

        fn code(&self, i: usize, o: usize) -> i64 {
            let PackedLayout { bits, .. } = self.layout;
            let word = self.words[1 + i / self.layout.per_word() * self.d_out + o] as u32;
            i64::from(word >> (i % self.layout.per_word() * bits) & self.layout.mask())
        }

        fn bits(&self, x: &[f32], inputs: PackedInputs, level: Level) -> Vec<u32> {
            product(x, &self.weight(), inputs, level).into_iter().map(f32::to_bits).collect()
        }

        /// The product in f64, of inputs rounded as they are to be.
        fn reference(&self, x: &[f32], inputs: PackedInputs) -> Vec<f64> {
            let PackedLayout { d_in, group, .. } = self.layout;
            let mut out = Vec::new();
            for row in x.chunks(d_in) {
                for o in 0..self.d_out {
                    let mut total = 0.0;
                    for (step, block) in row.chunks(STEP).enumerate() {
                        let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        let unit = (largest / 127.0).max(1e-30);
                        let value = |v: &f32| match inputs {
                            PackedInputs::Exact => f64::from(*v),
                            PackedInputs::EightBits => {
                                f64::from((v / unit).round_ties_even()) * f64::from(unit)
                            }
                        };
                        let g = step * STEP / group * self.d_out + o;
                        let zero = self.zero.get(g).copied().filter(|_| self.zero.len() > self.d_out);
                        let zero = f64::from(zero.unwrap_or(self.zero[o]));
                        let code = |i: usize| self.code(step * STEP + i, o) as f64;
                        let products = block.iter().enumerate().map(|(i, v)| value(v) * (code(i) - zero));
                        total += self.scale[g].to_f64() * products.sum::<f64>();
                    }
                    out.push(total);
                }
            }
            out
        }
    }

    // Bits, group, inputs, outputs.
    const SHAPES: [(usize, usize, usize, usize); 9] = [
        (4, 32, 1, 1),
        (8, 32, 1, 1),
        (4, 32, 32, 8),
        (8, 32, 32, 16),
        (4, 64, 131, 37),
        (8, 32, 97, 67),
        (4, 1000, 37, 17),
        (4, 32, 576, 293),
        (8, 64, 256, 150),
    ];

    #[test]
    fn every_level_of_instructions_gives_the_same_bits_and_the_reference() {
        for (bits, group, d_in, d_out) in SHAPES {
            for (rows, shared) in [(1, true), (1, false), (3, true), (17, false)] {
                let matrix = Matrix::new(bits, group, d_in, d_out, shared, None);
                // Not aligned either.
                let x = &Seed(4).normal("x", 1 + rows * d_in, 2.0)[1..];
                for inputs in BOTH {
                    let what = format!("{inputs:?}, {bits} bits, [{d_in}, {d_out}], {rows} rows");
                    let portable = matrix.bits(x, inputs, Level::Portable);
                    let want = matrix.reference(x, inputs);
                    let largest = want.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
                    for (&got, want) in portable.iter().zip(&want) {
                        let e = (f64::from(f32::from_bits(got)) - want).abs() / largest;
                        assert!(e < 3e-6, "{what}: off by {e:e}");
                    }
                    for level in Level::all() {
                        assert!(matrix.bits(x, inputs, level) == portable, "{level:?}, {what}");
                    }
                    // Control: another code of one weight shows.
                    let mut other = Matrix::new(bits, group, d_in, d_out, shared, None);
                    other.words[1] ^= 1;
                    assert!(other.bits(x, inputs, Level::best()) != portable);
                }
            }
        }
    }

    #[test]
    fn nothing_overflows_or_is_lost_at_the_ends_of_the_range() {
        for bits in [4, 8] {
            for code in [0, (1 << bits) - 1] {
                let matrix = Matrix::new(bits, 32, 64, 40, true, Some(code));
                // The last has the largest second and third digits.
                for value in [3.0, -3.0, 127.0, -127.0, 126.503_9] {
                    for inputs in BOTH {
                        let x = vec![value; 64];
                        let want = matrix.reference(&x, inputs);
                        for level in Level::all() {
                            let got = product(&x, &matrix.weight(), inputs, level);
                            for (got, want) in got.into_iter().zip(&want) {
                                let e = (f64::from(got) - want).abs() / want.abs().max(1e-3);
                                assert!(e < 1e-5, "{level:?}, {bits} bits, codes {code}: {got} for {want}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_give_zeros_and_what_is_not_finite_shows() {
        let matrix = Matrix::new(4, 32, 64, 19, false, None);
        for (level, inputs) in Level::all().into_iter().flat_map(|level| BOTH.map(|inputs| (level, inputs))) {
            let of = |x: &[f32]| product(x, &matrix.weight(), inputs, level);
            assert!(of(&[0.0; 64]).iter().all(|v| *v == 0.0));
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [1.0; 64];
                x[40] = odd;
                assert!(of(&x).iter().all(|v| !v.is_finite()), "{odd} is lost");
            }
        }
    }
}
