//! Products with packed weights in f32: codes are decoded as they are read, or panel by panel for a dense product.

use std::ops::Range;

use burn_backend::Shape;
use burn_flex::FlexTensor;
use faer::MatRef;
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::gemm_f32::{Row, gemm_of_panels};
use super::matmul::filled;
use super::packed::{OfPanel, PANEL, PackedLayout, Panel, Weight, put};

/// Inputs whose products are added up before they are scaled.
const STEP: usize = 32;

/// The codes of input `i`, less the zero points of its group.
#[inline(always)]
fn shifted(
    panel: &Panel<'_>,
    layout: PackedLayout,
    bits: usize,
    i: usize,
    zero: &OfPanel<f32>,
) -> OfPanel<f32> {
    let (per_word, mask) = (32 / bits, layout.mask());
    let (words, shift) = (&panel.words[i / per_word], (i % per_word * bits) as u32);
    let mut codes = [0.0; PANEL];
    for lane in 0..PANEL {
        // Through i32: its conversion to a float is one vector instruction, that of u32 is not.
        codes[lane] = ((words[lane] as u32 >> shift) & mask) as i32 as f32 - zero[lane];
    }
    codes
}

/// The dense matrix `[d_in, d_out]`.
pub(super) fn unpack(weight: &Weight<'_>) -> FlexTensor {
    let PackedLayout { d_in, d_out, .. } = weight.layout;
    let mut out = vec![0.0; d_in * d_out];
    cpu::blocks(&mut out, d_out, cpu::block_rows(d_out), |first, out| {
        Arch::new().dispatch(Decode { weight, first, out });
    });
    cpu::tensor(out, Shape::new([d_in, d_out]))
}

/// Writes outputs `first..` of all rows of `x` to `out`, `[rows, columns]`; a weight is decoded once for four rows at most.
pub(super) fn columns(x: &[f32], weight: &Weight<'_>, arch: Arch, first: usize, out: &mut [f32]) {
    arch.dispatch(Direct { x, weight, first, out });
}

/// `x`, `[rows, d_in]`, times the matrix: each panel of a dense product is decoded where it is multiplied by.
pub(super) fn many_rows(x: &[f32], weight: &Weight<'_>, arch: Arch, threads: usize) -> FlexTensor {
    let PackedLayout { d_in, d_out, .. } = weight.layout;
    let x = MatRef::from_row_major_slice(x, x.len() / d_in, d_in);
    filled([x.nrows(), d_out], |out| {
        gemm_of_panels(out, false, x, d_out, threads, |outputs, rows| {
            arch.dispatch(Wide { weight, outputs, rows });
        });
    })
}

/// Weights of one panel, input by input.
struct Decoder<'a> {
    panel: Panel<'a>,
    layout: PackedLayout,
    /// The group whose scales are at hand.
    group: usize,
    scale: OfPanel<f32>,
}

impl<'a> Decoder<'a> {
    #[inline(always)]
    fn new(weight: &Weight<'a>, panel: usize) -> Self {
        let panel = weight.panel(panel);
        Self { panel, layout: weight.layout, group: 0, scale: panel.scale.of(0) }
    }

    /// Those of `input`.
    #[inline(always)]
    fn weights(&mut self, bits: usize, input: usize) -> OfPanel<f32> {
        let group = input / self.layout.group;
        if self.group != group {
            (self.group, self.scale) = (group, self.panel.scale.of(group));
        }
        let mut weights = shifted(&self.panel, self.layout, bits, input, self.panel.zero(group));
        for lane in 0..PANEL {
            weights[lane] *= self.scale[lane];
        }
        weights
    }
}

/// All outputs of the inputs from `first` on, `[inputs, d_out]`.
struct Decode<'a> {
    weight: &'a Weight<'a>,
    first: usize,
    out: &'a mut [f32],
}

impl WithSimd for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let PackedLayout { bits, d_out, .. } = self.weight.layout;
        for first in (0..d_out).step_by(PANEL) {
            let mut decoder = Decoder::new(self.weight, first / PANEL);
            for (row, out) in self.out.chunks_exact_mut(d_out).enumerate() {
                put(&decoder.weights(bits, self.first + row), &mut out[first..d_out.min(first + PANEL)]);
            }
        }
    }
}

/// Rows of some outputs, for a dense product.
struct Wide<'a> {
    weight: &'a Weight<'a>,
    outputs: Range<usize>,
    rows: &'a mut Vec<Row>,
}

impl WithSimd for Wide<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        match self.weight.layout.bits {
            // With a constant, shifts are constants.
            4 => self.run(4),
            8 => self.run(8),
            bits => self.run(bits),
        }
    }
}

impl Wide<'_> {
    #[inline(always)]
    fn run(&mut self, bits: usize) {
        let first = self.outputs.start / PANEL;
        let last = self.weight.layout.panels() - 1;
        // Panels behind the last one are not read.
        let mut decoders: [Decoder<'_>; 4] =
            std::array::from_fn(|i| Decoder::new(self.weight, (first + i).min(last)));
        for input in 0..self.weight.layout.d_in {
            let mut row = [0.0; 4 * PANEL];
            for (decoder, row) in decoders.iter_mut().zip(row.as_chunks_mut().0) {
                *row = decoder.weights(bits, input);
            }
            self.rows.push(Row(row));
        }
    }
}

/// Outputs `first..` of all rows, `[rows, columns]`.
struct Direct<'a> {
    x: &'a [f32],
    weight: &'a Weight<'a>,
    first: usize,
    out: &'a mut [f32],
}

impl WithSimd for Direct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        match self.weight.layout.bits {
            4 => self.run(4),
            8 => self.run(8),
            bits => self.run(bits),
        }
    }
}

impl Direct<'_> {
    #[inline(always)]
    fn run(&mut self, bits: usize) {
        let rows = self.x.len() / self.weight.layout.d_in;
        let columns = self.out.len() / rows;
        for first in (0..columns).step_by(PANEL) {
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    4.. => self.panel::<4>(bits, row, first, columns),
                    _ => self.panel::<1>(bits, row, first, columns),
                };
            }
        }
    }

    /// A panel of some rows, which it returns the number of.
    #[inline(always)]
    fn panel<const N: usize>(&mut self, bits: usize, row: usize, first: usize, columns: usize) -> usize {
        let layout = self.weight.layout;
        let panel = self.weight.panel((self.first + first) / PANEL);
        let x = &self.x[row * layout.d_in..];
        let mut totals = [[0.0f32; PANEL]; N];
        let mut input = 0;
        while input < layout.d_in {
            let group = input / layout.group;
            let end = ((input / STEP + 1) * STEP).min((group + 1) * layout.group).min(layout.d_in);
            let (scale, zero) = (panel.scale.of(group), panel.zero(group));
            let mut sums = [[0.0f32; PANEL]; N];
            for i in input..end {
                let codes = shifted(&panel, layout, bits, i, zero);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x[r * layout.d_in + i];
                    for lane in 0..PANEL {
                        sums[lane] += x * codes[lane];
                    }
                }
            }
            for (totals, sums) in totals.iter_mut().zip(&sums) {
                for lane in 0..PANEL {
                    totals[lane] += scale[lane] * sums[lane];
                }
            }
            input = end;
        }
        for (r, totals) in totals.iter().enumerate() {
            put(totals, &mut self.out[(row + r) * columns..][first..columns.min(first + PANEL)]);
        }
        N
    }
}

#[cfg(test)]
mod tests {
    use firebrick_core::Seed;

    use super::super::packed::Scales;
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
            let layout = PackedLayout { bits, group, d_in, d_out };
            let (per_word, filled) = (layout.per_word(), layout.panels() * PANEL);
            let n = layout.word_rows() * filled;
            let words: Vec<i32> = Seed(3).normal("words", 1 + n, 1e9).into_iter().map(|w| w as i32).collect();
            let scale = Seed(3).normal("scale", layout.groups() * filled, 0.1);
            let zero = Seed(3).normal("zero", layout.groups() * filled, 3.0);
            let (scale, zero) = (scale.as_chunks().0, zero.as_chunks().0);
            let weight = Weight { words: words[1..].as_chunks().0, scale: Scales::F32(scale), zero, layout };
            for rows in [1, 4, 7, 33] {
                let x = &Seed(4).normal("x", 1 + rows * d_in, 1.0)[1..];
                let value = |i: usize, o: usize| {
                    let (panel, lane, g) = (weight.panel(o / PANEL), o % PANEL, i / group);
                    let code = panel.words[i / per_word][lane] as u32 >> (i % per_word * bits);
                    f64::from(panel.scale.of(g)[lane])
                        * (f64::from(code & layout.mask()) - f64::from(panel.zero[g][lane]))
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
                    let dense = |threads| many_rows(x, &weight, arch, threads);
                    check(format!("panels, {arch:?}"), dense(1));
                    for threads in [2, 5] {
                        assert!(dense(threads).storage::<f32>() == dense(1).storage::<f32>());
                    }
                }
            }
        }
    }
}
