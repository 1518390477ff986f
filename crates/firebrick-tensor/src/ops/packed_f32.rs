//! Products with packed weights in f32: codes are decoded as they are read, or tile by tile for a dense product.

use burn_backend::Shape;
use burn_flex::FlexTensor;
use faer::MatRef;
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::gemm_f32::gemm;
use super::packed::{OfPanel, PANEL, PackedLayout, Panel, Weight, put};

/// Inputs whose products are added up before they are scaled.
const STEP: usize = 32;

/// Inputs of a tile, which with its outputs stays in the second-level cache.
const TILE: usize = 256;

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
        Arch::new().dispatch(Decode { weight, input: first, output: 0, columns: d_out, out });
    });
    cpu::tensor(out, Shape::new([d_in, d_out]))
}

/// Writes outputs `first..` of all rows of `x` to `out`, `[rows, columns]`; a weight is decoded once for four rows at most.
pub(super) fn columns(x: &[f32], weight: &Weight<'_>, arch: Arch, first: usize, out: &mut [f32]) {
    arch.dispatch(Direct { x, weight, first, out });
}

/// `x`, `[rows, d_in]`, times the matrix, as dense products with tiles of it.
pub(super) fn many_rows(x: &[f32], weight: &Weight<'_>, arch: Arch) -> FlexTensor {
    let PackedLayout { d_in, d_out, .. } = weight.layout;
    let rows = x.len() / d_in;
    let columns = (d_out / 8).next_multiple_of(PANEL).clamp(32, 128);
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

/// Weights of inputs `input..` and outputs `output..`, from the beginning of a panel on, `[inputs, columns]`.
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
    fn with_simd<S: Simd>(mut self, _: S) {
        match self.weight.layout.bits {
            // With a constant, shifts are constants.
            4 => self.run(4),
            8 => self.run(8),
            bits => self.run(bits),
        }
    }
}

impl Decode<'_> {
    #[inline(always)]
    fn run(&mut self, bits: usize) {
        let (layout, columns) = (self.weight.layout, self.columns);
        for first in (0..columns).step_by(PANEL) {
            let panel = self.weight.panel((self.output + first) / PANEL);
            let (mut known, mut scale) = (usize::MAX, [0.0; PANEL]);
            for (row, out) in self.out.chunks_exact_mut(columns).enumerate() {
                let (input, group) = (self.input + row, (self.input + row) / layout.group);
                if known != group {
                    (known, scale) = (group, panel.scale.of(group));
                }
                let mut weights = shifted(&panel, layout, bits, input, panel.zero(group));
                for lane in 0..PANEL {
                    weights[lane] *= scale[lane];
                }
                put(&weights, &mut out[first..columns.min(first + PANEL)]);
            }
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
                    check(format!("tiles, {arch:?}"), many_rows(x, &weight, arch));
                }
            }
        }
    }
}
