//! Products of packed weights with inputs as integers: integer dot products, scaled once a block.
//!
//! An input is one digit of 8 bits, or three with 21 bits between them, each with products of its own: as close to the largest input of
//! its block as f32 sums come, for a third of the instructions that codes made f32 take.
//!
//! A 32-bit word holds four or eight codes of one output, so that a vector of words is as many outputs: four codes of each
//! are multiplied with the same four inputs, and nothing is summed across a vector. Every level of instructions gives the same bits: sums of
//! integers are exact, and the f32 operations are the same ones in the same order.

#[cfg(target_arch = "x86_64")]
mod x86;

use pulp::{Arch, Simd, WithSimd};

use super::awake;
use super::packed::{OfPanel, PANEL, PackedLayout, Panel, Weight, put};

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
#[derive(Clone)]
pub(super) struct Block<const D: usize> {
    /// Of each digit, four inputs a number, in the order in which words hold their codes.
    quads: [[i32; 8]; D],
    /// What the first digit is a multiple of.
    scale: f32,
    /// The sum of the inputs over `scale`.
    sum: f32,
}

/// Rows of inputs, to be taken apart.
struct Split<'a, const D: usize> {
    x: &'a [f32],
    layout: PackedLayout,
    blocks: &'a mut [Block<D>],
}

impl<const D: usize> WithSimd for Split<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let PackedLayout { bits, d_in, .. } = self.layout;
        let rows = self.x.chunks_exact(d_in).zip(self.blocks.chunks_exact_mut(steps(self.layout)));
        // Loops, as closures would be compiled without the instructions of `S`.
        for (x, blocks) in rows {
            for (x, block) in x.chunks(STEP).zip(blocks) {
                let mut values = [0.0; STEP];
                values[..x.len()].copy_from_slice(x);
                *block = Block::new(values, bits);
            }
        }
    }
}

impl<const D: usize> Block<D> {
    /// The digits of `rest`. The first is a multiple of a power of two if there are several, so that nothing is lost on the way.
    #[inline(always)]
    fn new(mut rest: [f32; STEP], bits: usize) -> Self {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // Sizes are ordered as their bits are, what is not finite last; integers need no care for it.
        let mut largest = 0;
        for v in &rest {
            largest = largest.max(v.abs().to_bits());
        }
        let scale = f32::from_bits(largest) / LARGEST;
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
    /// Rows of a task.
    const ROWS: usize = 16;
    let rows = x.len() / layout.d_in;
    let mut blocks = vec![Block { quads: [[0; 8]; D], scale: 0.0, sum: 0.0 }; rows * steps(layout)];
    let split = |x: &[f32], blocks: &mut [Block<D>]| Arch::new().dispatch(Split { x, layout, blocks });
    match rows {
        0..=ROWS => split(x, &mut blocks),
        _ => awake::parts(&mut blocks, ROWS * steps(layout), |i, blocks| {
            let first = i * ROWS;
            split(&x[first * layout.d_in..(first + ROWS).min(rows) * layout.d_in], blocks);
        }),
    }
    blocks
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
    for (i, eight) in bytemuck::cast::<[i8; STEP], [u64; STEP / 8]>(*digits).into_iter().enumerate() {
        let eight = u64::from_le(eight);
        [quads[2 * i], quads[2 * i + 1]] = match bits {
            4 => [even_bytes(eight), even_bytes(eight >> 8)],
            _ => [eight as i32, (eight >> 32) as i32],
        };
    }
    quads
}

#[inline(always)]
fn even_bytes(eight: u64) -> i32 {
    let pairs = eight & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    (fours | fours >> 16) as i32
}

/// Writes outputs `first..` of rows of inputs to `out`, `[rows, columns]`.
pub(super) fn panels<const D: usize>(
    inputs: &[Block<D>],
    weight: &Weight<'_>,
    level: Level,
    first: usize,
    columns: usize,
    out: &mut [f32],
) {
    for column in (0..columns).step_by(PANEL) {
        let panel = weight.panel((first + column) / PANEL);
        Task { inputs, panel, layout: weight.layout, out: Out { values: &mut out[..], columns, column } }
            .run(level);
    }
}

/// Blocks of a row.
pub(super) fn steps(layout: PackedLayout) -> usize {
    layout.d_in.div_ceil(STEP)
}

/// All rows, times the outputs of a panel.
struct Task<'a, const D: usize> {
    inputs: &'a [Block<D>],
    panel: Panel<'a>,
    layout: PackedLayout,
    out: Out<'a>,
}

/// Where results go: rows of `columns`, from `column` on.
struct Out<'a> {
    values: &'a mut [f32],
    columns: usize,
    column: usize,
}

impl Out<'_> {
    fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    #[inline(always)]
    fn put(&mut self, row: usize, values: &OfPanel<f32>) {
        let row = &mut self.values[row * self.columns..][..self.columns];
        let end = self.columns.min(self.column + PANEL);
        put(values, &mut row[self.column..end]);
    }
}

impl<const D: usize> Task<'_, D> {
    fn run(self, level: Level) {
        const { assert!(D == 1 || D == EXACT) };
        match level {
            Level::Portable => self.portable(),
            // SAFETY: `Level::all` makes this level only where the processor has AVX2, FMA and F16C.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { self.avx2() },
            // SAFETY: likewise AVX-512F and AVX-512-VNNI.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => unsafe { self.vnni() },
        }
    }

    /// The blocks of a row.
    #[inline(always)]
    fn row(&self, row: usize) -> &[Block<D>] {
        let steps = steps(self.layout);
        &self.inputs[row * steps..][..steps]
    }

    /// The group that block `step` is of.
    #[inline(always)]
    fn group(&self, step: usize) -> usize {
        match self.layout.group {
            // A division takes about as long as a block of one row.
            STEP => step,
            group => step * STEP / group,
        }
    }

    /// The `W` words that an output has in block `step`. Those that the last block lacks meet inputs of zero: any other will do.
    #[inline(always)]
    fn words<const W: usize>(&self, step: usize) -> [&OfPanel<i32>; W] {
        let from = &self.panel.words[step * W..];
        match from.first_chunk::<W>() {
            Some(words) => words.each_ref(),
            None => std::array::from_fn(|k| &from[k.min(from.len() - 1)]),
        }
    }

    /// The kernel that every processor runs.
    fn portable(mut self) {
        for row in 0..self.out.rows() {
            let mut totals = [0.0; PANEL];
            for (step, input) in self.row(row).iter().enumerate() {
                let codes: [OfPanel<u32>; 8] = match self.layout.bits {
                    4 => {
                        let words = self.words::<4>(step);
                        std::array::from_fn(|k| words[k / 2].map(|w| w as u32 >> (4 * (k % 2)) & 0x0f0f_0f0f))
                    }
                    _ => self.words::<8>(step).map(|words| words.map(|w| w as u32)),
                };
                let group = self.group(step);
                let (scale, zero) = (self.panel.scale.of(group), self.panel.zero(group));
                let mut dots = [[0i32; D]; PANEL];
                for (digit, quads) in input.quads.iter().enumerate() {
                    for (codes, quad) in codes.iter().zip(quads) {
                        for (byte, x) in quad.to_le_bytes().into_iter().enumerate() {
                            for (dot, code) in dots.iter_mut().zip(codes) {
                                dot[digit] += (code >> (8 * byte) & 0xff) as i32 * i32::from(x as i8);
                            }
                        }
                    }
                }
                for (lane, total) in totals.iter_mut().enumerate() {
                    let dots = (-zero[lane]).mul_add(input.sum, combined(dots[lane]));
                    *total = (scale[lane] * input.scale).mul_add(dots, *total);
                }
            }
            self.out.put(row, &totals);
        }
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
        // From the second word on: no vector of them is aligned.
        words: Vec<i32>,
        scale: Vec<OfPanel<f16>>,
        zero: Vec<OfPanel<f32>>,
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
            let layout = PackedLayout { bits, group, d_in, d_out };
            let (per_word, rows, filled) = (layout.per_word(), layout.word_rows(), layout.panels() * PANEL);
            let groups = layout.groups();
            let draws = Seed(3).normal("codes", d_in * filled, 40.0);
            let mut words = vec![0u32; 1 + rows * filled];
            for i in 0..d_in {
                for o in 0..filled {
                    let drawn = draws[i * filled + o].abs() as u32 % (1 << bits);
                    let at = (o / PANEL * rows + i / per_word) * PANEL + o % PANEL;
                    words[1 + at] |= code.unwrap_or(drawn) << (i % per_word * bits);
                }
            }
            let scale: Vec<f16> =
                Seed(3).normal("scale", groups * filled, 0.1).into_iter().map(f16::from_f32).collect();
            let zero = Seed(3).normal("zero", if shared { filled } else { groups * filled }, 3.0);
            let words = words.into_iter().map(|w| w as i32).collect();
            Self { layout, words, scale: scale.as_chunks().0.to_vec(), zero: zero.as_chunks().0.to_vec() }
        }

        fn weight(&self) -> Weight<'_> {
            Weight {
                words: self.words[1..].as_chunks().0,
                scale: Scales::F16(&self.scale),
                zero: &self.zero,
                layout: self.layout,
            }
        }

        fn code(&self, i: usize, o: usize) -> i64 {
            let (bits, per_word) = (self.layout.bits, self.layout.per_word());
            let word = self.weight().panel(o / PANEL).words[i / per_word][o % PANEL] as u32;
            i64::from(word >> (i % per_word * bits) & self.layout.mask())
        }

        fn bits(&self, x: &[f32], inputs: PackedInputs, level: Level) -> Vec<u32> {
            product(x, &self.weight(), inputs, level).into_iter().map(f32::to_bits).collect()
        }

        /// The product in f64, of inputs rounded as they are to be.
        fn reference(&self, x: &[f32], inputs: PackedInputs) -> Vec<f64> {
            let PackedLayout { d_in, d_out, group, .. } = self.layout;
            let mut out = Vec::new();
            for row in x.chunks(d_in) {
                for o in 0..d_out {
                    let panel = self.weight().panel(o / PANEL);
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
                        let g = step * STEP / group;
                        let zero =
                            f64::from(panel.zero[if panel.zero.len() == 1 { 0 } else { g }][o % PANEL]);
                        let scale = f64::from(panel.scale.of(g)[o % PANEL]);
                        let code = |i: usize| self.code(step * STEP + i, o) as f64;
                        let products = block.iter().enumerate().map(|(i, v)| value(v) * (code(i) - zero));
                        total += scale * products.sum::<f64>();
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
            for (rows, shared) in [(1, true), (1, false), (3, true), (17, false), (131, false)] {
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
