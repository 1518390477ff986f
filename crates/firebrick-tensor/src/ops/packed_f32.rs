//! Products with packed weights in f32: codes are decoded as they are read, or tile by tile for a dense product.

use burn_backend::Shape;
use burn_flex::FlexTensor;
use faer::MatRef;
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::gemm_f32::gemm;
use super::packed::{COLUMNS, Weight};

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

/// Adds outputs `first..` of all rows of `x` to `out`, `[rows, columns]`; a weight is decoded once for four rows at most.
pub(super) fn columns(x: &[f32], weight: &Weight<'_>, arch: Arch, first: usize, out: &mut [f32]) {
    arch.dispatch(Direct { x, weight, first, out });
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
            gemm(out, true, x, MatRef::from_row_major_slice(tile, inputs, columns), 1.0);
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
                    let direct = cpu::by_columns(rows, d_out, weight.task(), |first, out| {
                        columns(x, &weight, arch, first, out);
                    });
                    check(format!("{arch:?}"), direct);
                    check(format!("tiles, {arch:?}"), many_rows(x, &weight, arch));
                }
            }
        }
    }
}
