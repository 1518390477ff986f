//! The kernels of x86.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::f16;

use super::super::cpu;
use super::super::packed::{OfPanel, PANEL, Scales};
use super::{BASE, Block, LAST, Task};

/// Rows whose sums stay in registers of AVX-512 through all blocks; fewer are multiplied one by one.
const TILE: usize = 4;

/// Word rows from those that are multiplied to those that are asked for, in the next panel maybe: 4 KB.
const AHEAD: usize = 64;

impl<const D: usize> Task<'_, D> {
    /// Asks for what a later block has.
    #[inline(always)]
    fn ask<const W: usize>(&self, step: usize) {
        let words = self.panel.words.as_ptr().wrapping_add(step * W + AHEAD);
        for k in 0..W {
            cpu::prefetch(words.wrapping_add(k));
        }
        let group = self.group(step + AHEAD / W);
        match self.panel.scale {
            Scales::F32(scale) => cpu::prefetch(scale.as_ptr().wrapping_add(group)),
            Scales::F16(scale) => cpu::prefetch(scale.as_ptr().wrapping_add(group)),
        }
        if self.panel.zero.len() > 1 {
            cpu::prefetch(self.panel.zero.as_ptr().wrapping_add(group));
        }
    }

    #[target_feature(enable = "avx2,f16c,fma")]
    pub(super) fn avx2(self) {
        match self.layout.bits {
            4 => self.avx2_of::<4>(),
            _ => self.avx2_of::<8>(),
        }
    }

    #[target_feature(enable = "avx2,f16c,fma")]
    fn avx2_of<const W: usize>(mut self) {
        /// Rows that take their turn while the codes of a block are in registers.
        const ROWS: usize = 16;
        let (rows, mut row) = (self.out.rows(), 0);
        while row < rows {
            row += match rows - row {
                ROWS.. => self.avx2_rows::<W, ROWS>(row),
                _ => self.avx2_rows::<W, 1>(row),
            };
        }
    }

    /// `R` rows from `row` on; returns how many they are.
    #[inline]
    #[target_feature(enable = "avx2,f16c,fma")]
    fn avx2_rows<const W: usize, const R: usize>(&mut self, row: usize) -> usize {
        let mut values = [[0.0; PANEL]; R];
        for half in 0..2 {
            let mut totals = [_mm256_setzero_ps(); R];
            for step in 0..super::steps(self.layout) {
                if R == 1 && half == 0 {
                    self.ask::<W>(step);
                }
                let weights = self.eight::<W>(step, half);
                for (r, total) in totals.iter_mut().enumerate() {
                    *total = weights.add_to::<W, D>(*total, &self.row(row + r)[step]);
                }
            }
            for (values, total) in values.iter_mut().zip(totals) {
                // SAFETY: eight values are as long as the vector.
                values.as_chunks_mut().0[half] = unsafe { transmute::<__m256, [f32; 8]>(total) };
            }
        }
        for (r, values) in values.iter().enumerate() {
            self.out.put(row + r, values);
        }
        R
    }

    /// What eight outputs, the first or the second half of the panel, have in a block.
    #[inline]
    #[target_feature(enable = "avx2,f16c,fma")]
    fn eight<const W: usize>(&self, step: usize, half: usize) -> Eight {
        let (words, group) = (self.words::<W>(step), self.group(step));
        let low = _mm256_set1_epi8(15);
        let mut codes = [_mm256_setzero_si256(); 8];
        for (k, words) in words.into_iter().enumerate() {
            // SAFETY: eight words are as long as the vector, and any bits are one.
            let words = unsafe { transmute::<[i32; 8], __m256i>(words.as_chunks().0[half]) };
            if W == 4 {
                codes[2 * k] = _mm256_and_si256(words, low);
                codes[2 * k + 1] = _mm256_and_si256(_mm256_srli_epi16::<4>(words), low);
            } else {
                codes[k] = words;
            }
        }
        // SAFETY: eight values or halves are as long as their vector, and any bits are one.
        let scale = match self.panel.scale {
            Scales::F32(scale) => unsafe { transmute::<[f32; 8], __m256>(scale[group].as_chunks().0[half]) },
            Scales::F16(scale) => {
                _mm256_cvtph_ps(unsafe { transmute::<[f16; 8], __m128i>(scale[group].as_chunks().0[half]) })
            }
        };
        // SAFETY: as above.
        let zero = unsafe { transmute::<[f32; 8], __m256>(self.panel.zero(group).as_chunks().0[half]) };
        Eight { codes, scale, zero }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni(self) {
        match self.layout.bits {
            4 => self.vnni_of::<4>(),
            _ => self.vnni_of::<8>(),
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn vnni_of<const W: usize>(mut self) {
        let rows = self.out.rows();
        if rows < TILE {
            for row in 0..rows {
                let mut total = _mm512_setzero_ps();
                for (step, input) in self.row(row).iter().enumerate() {
                    self.ask::<W>(step);
                    total = self.sixteen::<W>(step).add_to(total, input);
                }
                self.out.put(row, &floats(total));
            }
            return;
        }
        let steps = super::steps(self.layout);
        let mut weights = Vec::with_capacity(steps);
        for step in 0..steps {
            weights.push(self.sixteen::<W>(step));
        }
        let mut row = 0;
        while row < rows {
            row += match rows - row {
                TILE.. => self.vnni_tile::<TILE>(&weights, row),
                _ => self.vnni_tile::<1>(&weights, row),
            };
        }
    }

    /// `R` rows from `row` on; returns how many they are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn vnni_tile<const R: usize>(&mut self, weights: &[Sixteen], row: usize) -> usize {
        let mut totals = [_mm512_setzero_ps(); R];
        let mut inputs = [&self.inputs[..0]; R];
        for (r, inputs) in inputs.iter_mut().enumerate() {
            *inputs = &self.row(row + r)[..weights.len()];
        }
        for (step, weights) in weights.iter().enumerate() {
            for (total, inputs) in totals.iter_mut().zip(&inputs) {
                *total = weights.add_to(*total, &inputs[step]);
            }
        }
        for (r, total) in totals.into_iter().enumerate() {
            self.out.put(row + r, &floats(total));
        }
        R
    }

    /// What the outputs have in a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn sixteen<const W: usize>(&self, step: usize) -> Sixteen {
        let (words, group) = (self.words::<W>(step), self.group(step));
        let low = _mm512_set1_epi32(0x0f0f_0f0f);
        let mut codes = [_mm512_setzero_si512(); 8];
        for (k, words) in words.into_iter().enumerate() {
            // SAFETY: sixteen words are as long as the vector, and any bits are one.
            let words = unsafe { transmute::<OfPanel<i32>, __m512i>(*words) };
            if W == 4 {
                codes[2 * k] = _mm512_and_si512(words, low);
                codes[2 * k + 1] = _mm512_and_si512(_mm512_srli_epi32::<4>(words), low);
            } else {
                codes[k] = words;
            }
        }
        // SAFETY: sixteen values or halves are as long as their vector, and any bits are one.
        let scale = match self.panel.scale {
            Scales::F32(scale) => unsafe { transmute::<OfPanel<f32>, __m512>(scale[group]) },
            Scales::F16(scale) => {
                _mm512_cvtph_ps(unsafe { transmute::<OfPanel<f16>, __m256i>(scale[group]) })
            }
        };
        // SAFETY: as above.
        let zero = unsafe { transmute::<OfPanel<f32>, __m512>(*self.panel.zero(group)) };
        Sixteen { codes, scale, zero }
    }
}

/// Eight outputs of a block.
struct Eight {
    codes: [__m256i; 8],
    scale: __m256,
    zero: __m256,
}

impl Eight {
    /// The products with a block of inputs, added to `total`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn add_to<const W: usize, const D: usize>(&self, total: __m256, input: &Block<D>) -> __m256 {
        let mut dots = [_mm256_setzero_si256(); D];
        for (digit, quads) in input.quads.iter().enumerate() {
            dots[digit] = match (W, digit) {
                (4, _) => nibbles(&self.codes, quads),
                (_, 0) => bytes(&self.codes, quads),
                _ => bytes_by_small(&self.codes, quads),
            };
        }
        let dots = _mm256_fnmadd_ps(self.zero, _mm256_set1_ps(input.sum), eight_combined(dots));
        let scale = _mm256_mul_ps(self.scale, _mm256_set1_ps(input.scale));
        _mm256_fmadd_ps(scale, dots, total)
    }
}

/// Sixteen outputs of a block.
struct Sixteen {
    codes: [__m512i; 8],
    scale: __m512,
    zero: __m512,
}

impl Sixteen {
    /// The products with a block of inputs, added to `total`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add_to<const D: usize>(&self, total: __m512, input: &Block<D>) -> __m512 {
        // Two sums of each digit, so that additions overlap.
        let mut dots = [[_mm512_setzero_si512(); D]; 2];
        for k in 0..8 {
            for (digit, quads) in input.quads.iter().enumerate() {
                let quad = _mm512_set1_epi32(quads[k]);
                dots[k % 2][digit] = _mm512_dpbusd_epi32(dots[k % 2][digit], self.codes[k], quad);
            }
        }
        let dots = _mm512_fnmadd_ps(self.zero, _mm512_set1_ps(input.sum), sixteen_combined(dots));
        let scale = _mm512_mul_ps(self.scale, _mm512_set1_ps(input.scale));
        _mm512_fmadd_ps(scale, dots, total)
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn floats(vector: __m512) -> OfPanel<f32> {
    // SAFETY: sixteen values are as long as the vector.
    unsafe { transmute::<__m512, OfPanel<f32>>(vector) }
}

/// [`combined`](super::combined) of each output.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn eight_combined<const D: usize>(sums: [__m256i; D]) -> __m256 {
    let first = _mm256_cvtepi32_ps(sums[0]);
    if D == 1 {
        return first;
    }
    let rest = _mm256_add_epi32(_mm256_slli_epi32::<{ BASE.ilog2() as i32 }>(sums[1]), sums[2]);
    // A product with a power of two is exact, fused or not.
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(rest), _mm256_set1_ps(LAST), first)
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
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(LAST), first)
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
