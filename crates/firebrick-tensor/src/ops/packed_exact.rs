//! Products with packed weights in f32: codes are decoded as they are read, or tile by tile for a dense product.

use burn_backend::Shape;
use burn_flex::FlexTensor;
use faer::MatRef;
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::packed::{COLUMNS, Weight};
use super::packed_dots::{self, Level};

/// Inputs whose codes are read together: the words of a task's outputs for them stay in the first-level cache.
const STEP: usize = 32;

/// Outputs whose sums stay in registers.
const LANES: usize = 16;

/// Inputs of a tile, which with its outputs stays in the second-level cache.
const TILE: usize = 256;

#[inline(always)]
fn code(word: i32, shift: u32, mask: u32) -> f32 {
    // Through i32: its conversion to a float is one vector instruction, that of u32 is not.
    ((word as u32 >> shift) & mask) as i32 as f32
}

/// The dense matrix `[d_in, d_out]`.
pub(super) fn unpack(weight: &Weight<'_>) -> FlexTensor {
    let (d_in, d_out) = (weight.layout.d_in, weight.d_out);
    let mut out = vec![0.0; d_in * d_out];
    cpu::blocks(&mut out, d_out, cpu::block_rows(d_out), |first, out| {
        Arch::new().dispatch(Decode { weight, input: first, output: 0, columns: d_out, out });
    });
    cpu::tensor(out, Shape::new([d_in, d_out]))
}

/// `x`, `[rows, d_in]`, times the matrix, its weights decoded once for four rows at most.
pub(super) fn few_rows(x: &[f32], weight: &Weight<'_>, level: Level) -> FlexTensor {
    #[cfg(target_arch = "x86_64")]
    if level != Level::Portable && packed_dots::applies(weight.layout) {
        let (rows, d_out) = (x.len() / weight.layout.d_in, weight.d_out);
        let inputs = x86::inputs(x, weight.layout);
        return cpu::by_columns(rows, d_out, weight.task(), |first, out| {
            let columns = out.len() / rows;
            // SAFETY: every level but the portable one is made where the processor has AVX2, FMA and F16C.
            unsafe { x86::few_rows(&inputs, weight, first, columns, out) };
        });
    }
    let _ = level;
    few_rows_on(x, weight, Arch::new())
}

/// [`few_rows`] of any layout.
fn few_rows_on(x: &[f32], weight: &Weight<'_>, arch: Arch) -> FlexTensor {
    let (d_in, d_out) = (weight.layout.d_in, weight.d_out);
    cpu::by_columns(x.len() / d_in, d_out, weight.task(), |first, out| {
        arch.dispatch(Direct { x, weight, first, out });
    })
}

/// `x`, `[rows, d_in]`, times the matrix, as dense products with tiles of it.
pub(super) fn many_rows(x: &[f32], weight: &Weight<'_>, arch: Arch) -> FlexTensor {
    let (d_in, d_out) = (weight.layout.d_in, weight.d_out);
    let rows = x.len() / d_in;
    let columns = (d_out / 8).next_multiple_of(16).clamp(32, 128);
    cpu::by_columns(rows, d_out, columns, |output, out| {
        let columns = out.len() / rows;
        let mut tile = vec![0.0; TILE.min(d_in) * columns];
        for input in (0..d_in).step_by(TILE) {
            let inputs = TILE.min(d_in - input);
            let tile = &mut tile[..inputs * columns];
            arch.dispatch(Decode { weight, input, output, columns, out: &mut *tile });
            let x = MatRef::from_row_major_slice_with_stride(&x[input..], rows, inputs, d_in);
            cpu::gemm(out, true, x, MatRef::from_row_major_slice(tile, inputs, columns), 1.0);
        }
    })
}

/// Weights of inputs `input..` and outputs `output..`, `[inputs, columns]`.
struct Decode<'a> {
    weight: &'a Weight<'a>,
    input: usize,
    output: usize,
    columns: usize,
    out: &'a mut [f32],
}

impl WithSimd for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (layout, columns) = (self.weight.layout, self.columns);
        let mut scale = vec![0.0; columns];
        let mut known = None;
        for (row, out) in self.out.chunks_exact_mut(columns).enumerate() {
            let row = self.input + row;
            let group = row / layout.group;
            if known != Some(group) {
                self.weight.scales(group, self.output, columns).widen(&mut scale);
                known = Some(group);
            }
            let zero = self.weight.zeros(group, self.output, columns);
            let shift = (row % layout.per_word() * layout.bits) as u32;
            let words = self.weight.word_row(row / layout.per_word(), self.output, columns);
            for j in 0..columns {
                out[j] = scale[j] * (code(words[j], shift, layout.mask()) - zero[j]);
            }
        }
    }
}

/// Outputs `first..` of all rows, `[rows, columns]`, zero at first.
struct Direct<'a> {
    x: &'a [f32],
    weight: &'a Weight<'a>,
    first: usize,
    out: &'a mut [f32],
}

impl WithSimd for Direct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match self.weight.layout.bits {
            // With a constant, shifts are constants.
            4 => self.run(simd, 4),
            8 => self.run(simd, 8),
            bits => self.run(simd, bits),
        }
    }
}

impl Direct<'_> {
    #[inline(always)]
    fn run<S: Simd>(&mut self, simd: S, bits: usize) {
        let d_in = self.weight.layout.d_in;
        let rows = self.x.len() / d_in;
        let columns = self.out.len() / rows;
        let mut row = 0;
        while row < rows {
            let n = if rows - row >= 4 { 4 } else { 1 };
            let x = &self.x[row * d_in..][..n * d_in];
            let out = &mut self.out[row * columns..][..n * columns];
            let block = Block { x, weight: self.weight, first: self.first, columns };
            match n {
                4 => block.run::<S, 4>(simd, bits, out),
                _ => block.run::<S, 1>(simd, bits, out),
            }
            row += n;
        }
    }
}

/// Some rows of a [`Direct`].
struct Block<'a> {
    x: &'a [f32],
    weight: &'a Weight<'a>,
    first: usize,
    columns: usize,
}

impl Block<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(&self, simd: S, bits: usize, out: &mut [f32]) {
        let layout = self.weight.layout;
        let mut scale = [0.0; COLUMNS];
        let mut input = 0;
        while input < layout.d_in {
            let group = input / layout.group;
            let end = ((input / STEP + 1) * STEP).min((group + 1) * layout.group).min(layout.d_in);
            self.weight.scales(group, self.first, self.columns).widen(&mut scale[..self.columns]);
            let mut first = 0;
            while first < self.columns {
                let lanes = LANES.min(self.columns - first);
                match lanes {
                    LANES => self.lanes::<S, N>(simd, bits, input..end, &scale, first, LANES, out),
                    _ => self.lanes::<S, N>(simd, bits, input..end, &scale, first, lanes, out),
                }
                first += lanes;
            }
            input = end;
        }
    }

    /// Adds the products of some inputs of one group to some outputs.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn lanes<S: Simd, const N: usize>(
        &self,
        _: S,
        bits: usize,
        inputs: std::ops::Range<usize>,
        scale: &[f32; COLUMNS],
        first: usize,
        lanes: usize,
        out: &mut [f32],
    ) {
        let (d_in, per_word, mask) = (self.weight.layout.d_in, 32 / bits, (1u32 << bits) - 1);
        let zero = self.weight.zeros(inputs.start / self.weight.layout.group, self.first + first, lanes);
        let mut sums = [[0.0f32; LANES]; N];
        for i in inputs {
            let words = self.weight.word_row(i / per_word, self.first + first, lanes);
            let shift = (i % per_word * bits) as u32;
            let x: [f32; N] = std::array::from_fn(|row| self.x[row * d_in + i]);
            for j in 0..lanes {
                let w = code(words[j], shift, mask) - zero[j];
                for row in 0..N {
                    sums[row][j] += x[row] * w;
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let out = &mut out[row * self.columns + first..][..lanes];
            for j in 0..lanes {
                out[j] += scale[first + j] * sums[j];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::super::cpu;
    use super::super::packed::{COLUMNS, PackedLayout, Scales, Weight};
    use super::super::packed_dots::x86::{eight_scales, prefetch};
    use super::{STEP, code};

    /// Outputs of a vector.
    const WIDTH: usize = 8;

    /// A block of inputs of a row; what the last one lacks is zero.
    #[derive(Clone, Copy)]
    pub(super) struct Inputs {
        x: [f32; STEP],
        /// `x` divided by what the place of its code multiplies that with.
        scaled: [f32; STEP],
        sum: f32,
    }

    /// The blocks of all rows of `x`, `[rows, d_in]`, one row after the other.
    pub(super) fn inputs(x: &[f32], layout: PackedLayout) -> Vec<Inputs> {
        let unit: [f32; STEP] =
            std::array::from_fn(|i| 1.0 / (1u32 << place(layout.bits, i % layout.per_word())) as f32);
        let block = |values: &[f32]| {
            let mut x = [0.0; STEP];
            x[..values.len()].copy_from_slice(values);
            Inputs { x, scaled: std::array::from_fn(|i| x[i] * unit[i]), sum: cpu::sum(STEP, |i| x[i]) }
        };
        x.chunks_exact(layout.d_in).flat_map(|row| row.chunks(STEP)).map(block).collect()
    }

    /// Where slot `slot` of a word is read: its place, but that of the one before for the last slot, which would be a sign there.
    const fn place(bits: usize, slot: usize) -> usize {
        if (slot + 1) * bits == 32 { (slot - 1) * bits } else { slot * bits }
    }

    /// Adds to outputs `first..` of all rows, `[rows, columns]`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn few_rows(
        inputs: &[Inputs],
        weight: &Weight<'_>,
        first: usize,
        columns: usize,
        out: &mut [f32],
    ) {
        match weight.layout.bits {
            4 => steps::<4>(inputs, weight, first, columns, out),
            _ => steps::<8>(inputs, weight, first, columns, out),
        }
    }

    /// [`few_rows`] with codes of `BITS` bits.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn steps<const BITS: usize>(
        inputs: &[Inputs],
        weight: &Weight<'_>,
        first: usize,
        columns: usize,
        out: &mut [f32],
    ) {
        let (d_in, per_word) = (weight.layout.d_in, 32 / BITS);
        let last = d_in.div_ceil(per_word) - 1;
        let (steps, rows) = (d_in.div_ceil(STEP), out.len() / columns);
        for step in 0..steps {
            let group = step * STEP / weight.layout.group;
            // Word rows that the last block lacks meet inputs of zero: any other will do.
            let words: [&[i32]; BITS] =
                std::array::from_fn(|i| weight.word_row((step * BITS + i).min(last), first, columns));
            let block = Block {
                words: words.map(|row| row.as_chunks::<WIDTH>().0),
                zeros: weight.zeros(group, first, columns).as_chunks::<WIDTH>().0,
                scales: weight.scales(group, first, columns),
                ahead: weight.words.as_ptr().wrapping_add((step + 1) * BITS * weight.d_out + first),
                stride: weight.d_out,
                columns,
            };
            let mut row = 0;
            while row < rows {
                let inputs = |i: usize| &inputs[(row + i) * steps + step];
                let out = &mut out[row * columns..];
                if rows - row >= 4 {
                    block.four_rows(std::array::from_fn(inputs), out);
                    row += 4;
                } else {
                    block.one_row(inputs(0), out);
                    row += 1;
                }
            }
            let vectors = columns / WIDTH * WIDTH;
            if vectors == columns {
                continue;
            }
            let mut scale = [0.0; COLUMNS];
            block.scales.widen(&mut scale[..columns]);
            let zeros = weight.zeros(group, first, columns);
            for j in vectors..columns {
                for row in 0..rows {
                    let x = &inputs[row * steps + step].x;
                    let product = |i: usize| {
                        let shift = (i % per_word * BITS) as u32;
                        x[i] * (code(words[i / per_word][j], shift, weight.layout.mask()) - zeros[j])
                    };
                    out[row * columns + j] += scale[j] * (0..STEP).map(product).sum::<f32>();
                }
            }
        }
    }

    /// A block of inputs against vectors of outputs. Codes are read where they lie in their words, and zero points are taken off the
    /// sums: for eight codes an `and`, a conversion and a sum.
    struct Block<'a, const BITS: usize> {
        words: [&'a [[i32; WIDTH]]; BITS],
        zeros: &'a [[f32; WIDTH]],
        scales: Scales<'a>,
        /// Where the words of the next block are, for prefetching; past the end behind the last one.
        ahead: *const i32,
        /// From one word row to the next.
        stride: usize,
        columns: usize,
    }

    impl<const BITS: usize> Block<'_, BITS> {
        /// The codes of `word` in `slot`, times what their place multiplies them with.
        #[inline]
        #[target_feature(enable = "avx2")]
        fn codes(word: &[i32; WIDTH], slot: usize) -> __m256 {
            // SAFETY: eight words are as long as the vector, and any bits are one.
            let word = unsafe { transmute::<[i32; WIDTH], __m256i>(*word) };
            let down = if (slot + 1) * BITS == 32 { BITS as i32 } else { 0 };
            let word = _mm256_srlv_epi32(word, _mm256_set1_epi32(down));
            let mask = ((1u32 << BITS) - 1) << place(BITS, slot);
            _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(mask as i32)))
        }

        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn add(&self, v: usize, sum: __m256, input_sum: f32, out: &mut [f32]) {
            let out = out[v * WIDTH..].first_chunk_mut::<WIDTH>().expect("a vector of each row");
            // SAFETY: eight values are as long as the vector, on the way there and back.
            unsafe {
                let zero = transmute::<[f32; WIDTH], __m256>(self.zeros[v]);
                let sum = _mm256_fnmadd_ps(zero, _mm256_set1_ps(input_sum), sum);
                let scale = eight_scales(self.scales, v);
                let total = _mm256_fmadd_ps(scale, sum, transmute::<[f32; WIDTH], __m256>(*out));
                *out = transmute::<__m256, [f32; WIDTH]>(total);
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn one_row(&self, inputs: &Inputs, out: &mut [f32]) {
            self.spread_row(&inputs.scaled.map(|x| [x; WIDTH]), inputs.sum, out);
        }

        #[inline(never)] // inlined, inputs are spread again for each vector of outputs
        #[target_feature(enable = "avx2,fma,f16c")]
        fn spread_row(&self, inputs: &[[f32; WIDTH]; STEP], input_sum: f32, out: &mut [f32]) {
            for v in 0..self.zeros.len() {
                if v % 2 == 0 {
                    prefetch(self.ahead.wrapping_add(v * WIDTH), self.stride, BITS);
                }
                // Several sums of each output, so that additions overlap.
                let mut sums = [_mm256_setzero_ps(); 4];
                for (words, inputs) in self.words.iter().zip(inputs.chunks_exact(32 / BITS)) {
                    for (slot, x) in inputs.iter().enumerate() {
                        // SAFETY: eight values are as long as the vector, and any bits are one.
                        let x = unsafe { transmute::<[f32; WIDTH], __m256>(*x) };
                        sums[slot % 4] = _mm256_fmadd_ps(Self::codes(&words[v], slot), x, sums[slot % 4]);
                    }
                }
                let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
                self.add(v, sum, input_sum, out);
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        fn four_rows(&self, inputs: [&Inputs; 4], out: &mut [f32]) {
            for v in (0..self.zeros.len()).step_by(2) {
                prefetch(self.ahead.wrapping_add(v * WIDTH), self.stride, BITS);
                match self.zeros.len() - v {
                    1 => self.four_by::<1>(inputs, v, out),
                    _ => self.four_by::<2>(inputs, v, out),
                }
            }
        }

        /// Four rows by `V` vectors from vector `v` on.
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        #[allow(clippy::needless_range_loop)] // over iterators, the loops are not unrolled, and masks not constants
        fn four_by<const V: usize>(&self, inputs: [&Inputs; 4], v: usize, out: &mut [f32]) {
            let per_word = 32 / BITS;
            let mut sums = [[_mm256_setzero_ps(); V]; 4];
            for w in 0..BITS {
                for slot in 0..per_word {
                    let mut codes = [_mm256_setzero_ps(); V];
                    for i in 0..V {
                        codes[i] = Self::codes(&self.words[w][v + i], slot);
                    }
                    for row in 0..4 {
                        let x = _mm256_set1_ps(inputs[row].scaled[w * per_word + slot]);
                        for i in 0..V {
                            sums[row][i] = _mm256_fmadd_ps(codes[i], x, sums[row][i]);
                        }
                    }
                }
            }
            for (row, (sums, inputs)) in sums.into_iter().zip(inputs).enumerate() {
                for (i, sum) in sums.into_iter().enumerate() {
                    self.add(v + i, sum, inputs.sum, &mut out[row * self.columns..]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use firebrick_core::Seed;

    use super::super::packed::{PackedLayout, Scales};
    use super::*;

    /// The instructions that this processor has.
    fn levels() -> Vec<Arch> {
        let mut levels = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        levels.extend(pulp::x86::V3::try_new().map(Arch::V3));
        levels
    }

    #[test]
    fn every_level_of_instructions_agrees_with_f64() {
        for (bits, group, d_in, d_out) in [(4, 32, 291, 37), (8, 64, 97, 131), (3, 7, 31, 16), (4, 32, 1, 1)]
        {
            let layout = PackedLayout { bits, group, d_in };
            let (per_word, groups) = (layout.per_word(), d_in.div_ceil(group));
            let n = d_in.div_ceil(per_word) * d_out;
            let words: Vec<i32> = Seed(3).normal("words", 1 + n, 1e9).into_iter().map(|w| w as i32).collect();
            let scale = Seed(3).normal("scale", groups * d_out, 0.1);
            let zero = Seed(3).normal("zero", groups * d_out, 3.0);
            let weight =
                Weight { words: &words[1..], scale: Scales::F32(&scale), zero: &zero, layout, d_out };
            for rows in [1, 4, 7, 33] {
                let x = &Seed(4).normal("x", 1 + rows * d_in, 1.0)[1..];
                let value = |i: usize, o: usize| {
                    let code = words[1 + i / per_word * d_out + o] as u32 >> (i % per_word * bits);
                    let g = i / group * d_out + o;
                    f64::from(scale[g]) * (f64::from(code & layout.mask()) - f64::from(zero[g]))
                };
                let entry = |at: usize| -> f64 {
                    let (row, o) = (at / d_out, at % d_out);
                    (0..d_in).map(|i| f64::from(x[row * d_in + i]) * value(i, o)).sum()
                };
                let want: Vec<f64> = (0..rows * d_out).map(entry).collect();
                let largest = want.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
                let check = |what: String, got: FlexTensor| {
                    for (got, want) in got.storage::<f32>().iter().zip(&want) {
                        let e = (f64::from(*got) - want).abs() / largest;
                        assert!(e < 1e-5, "{what}, {bits} bits, {rows} rows: off by {e:e}");
                    }
                };
                for arch in levels() {
                    check(format!("{arch:?}"), few_rows_on(x, &weight, arch));
                    check(format!("tiles, {arch:?}"), many_rows(x, &weight, arch));
                }
                for level in Level::all() {
                    check(format!("{level:?}"), few_rows(x, &weight, level));
                }
            }
        }
    }
}
