//! The kernels of x86.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::f16;

use super::super::cpu;
use super::{Ahead, BASE, Block, LAST, Pass, Scales, Task};

/// Rows whose sums of sixteen outputs stay in registers through all blocks.
pub(super) const TILE: usize = 4;

impl<const D: usize> Pass<'_, D> {
    /// Asks for what the sixteen outputs from `first` on have in a later block.
    #[inline(always)]
    fn prefetch(&self, first: usize) {
        let Ahead { words, scale, zero } = self.ahead;
        for k in 0..if self.nibbles { 4 } else { 8 } {
            cpu::prefetch(words.wrapping_add(k * self.word_stride + first));
        }
        let width = match self.scale {
            Scales::F32(_) => size_of::<f32>(),
            Scales::F16(_) => size_of::<f16>(),
        };
        cpu::prefetch(scale.wrapping_add(first * width));
        cpu::prefetch(zero.wrapping_add(first));
    }

    #[target_feature(enable = "avx2,f16c,fma")]
    pub(super) fn avx2(&self, out: &mut [f32]) {
        match self.nibbles {
            true => self.avx2_of::<true>(out),
            false => self.avx2_of::<false>(out),
        }
    }

    #[target_feature(enable = "avx2,f16c,fma")]
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
                let (input, place) = (&self.inputs[row * self.steps], row * self.stride + v * WIDTH);
                let mut dots = [_mm256_setzero_si256(); D];
                for (digit, quads) in input.quads.iter().enumerate() {
                    dots[digit] = match (NIBBLES, digit) {
                        (true, _) => nibbles(&codes, quads),
                        (false, 0) => bytes(&codes, quads),
                        (false, _) => bytes_by_small(&codes, quads),
                    };
                }
                let dots = _mm256_fnmadd_ps(zero, _mm256_set1_ps(input.sum), eight_combined(dots));
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(input.scale));
                let out = out[place..].first_chunk_mut::<WIDTH>().expect("a vector of each row");
                // SAFETY: eight values are as long as the vector, on the way there and back.
                unsafe {
                    let total = _mm256_fmadd_ps(scale, dots, transmute::<[f32; 8], __m256>(*out));
                    *out = transmute::<__m256, [f32; 8]>(total);
                }
            }
        }
        self.portable(vectors * WIDTH, out);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni(&self, out: &mut [f32]) {
        let vectors = self.columns / SIXTEEN;
        for v in 0..vectors {
            self.prefetch(v * SIXTEEN);
            let weights = self.sixteen(v);
            for row in 0..self.rows {
                let out =
                    out[row * self.stride + v * SIXTEEN..].first_chunk_mut().expect("a vector of each row");
                *out = floats(weights.add_to(vector(*out), &self.inputs[row * self.steps]));
            }
        }
        self.portable(vectors * SIXTEEN, out);
    }

    /// What sixteen outputs have in this block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn sixteen(&self, v: usize) -> Sixteen {
        let low = _mm512_set1_epi32(0x0f0f_0f0f);
        let mut codes = [_mm512_setzero_si512(); 8];
        // SAFETY: sixteen words are as long as the vector, and any bits are one.
        let load = |k: usize| unsafe { transmute::<[i32; SIXTEEN], __m512i>(self.words[k].as_chunks().0[v]) };
        if self.nibbles {
            for k in 0..4 {
                let words = load(k);
                codes[2 * k] = _mm512_and_si512(words, low);
                codes[2 * k + 1] = _mm512_and_si512(_mm512_srli_epi32::<4>(words), low);
            }
        } else {
            for (k, codes) in codes.iter_mut().enumerate() {
                *codes = load(k);
            }
        }
        let zero = vector(self.zero.as_chunks().0[v]);
        Sixteen { codes, scale: sixteen_scales(self.scale, v), zero }
    }
}

/// Outputs of a vector.
const SIXTEEN: usize = 16;

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

impl<const D: usize> Task<'_, D> {
    /// Sixteen outputs of all rows, then the next; of some rows at a time, whose sums stay in registers through all blocks.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni_tiles(&self, out: &mut [f32]) {
        let vectors = self.columns / SIXTEEN;
        let passes: Vec<Pass<'_, D>> = (0..self.steps).map(|step| self.pass(0, self.rows, step)).collect();
        let mut weights = Vec::with_capacity(self.steps);
        for v in 0..vectors {
            weights.clear();
            for pass in &passes {
                weights.push(pass.sixteen(v));
            }
            let out = &mut out[v * SIXTEEN..];
            let mut row = 0;
            while row < self.rows {
                row += match self.rows - row {
                    TILE.. => self.vnni_tile::<TILE>(&weights, row, out),
                    _ => self.vnni_tile::<1>(&weights, row, out),
                };
            }
        }
        for pass in &passes {
            pass.portable(vectors * SIXTEEN, out);
        }
    }

    /// Adds to sixteen outputs of `R` rows, which it returns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn vnni_tile<const R: usize>(&self, weights: &[Sixteen], row: usize, out: &mut [f32]) -> usize {
        let mut totals = [_mm512_setzero_ps(); R];
        let mut inputs = [&self.inputs[..0]; R];
        for (r, (total, inputs)) in totals.iter_mut().zip(&mut inputs).enumerate() {
            *total = vector(*out[(row + r) * self.stride..].first_chunk().expect("a vector of each row"));
            *inputs = &self.inputs[(row + r) * self.steps..][..weights.len()];
        }
        for (step, weights) in weights.iter().enumerate() {
            for (total, inputs) in totals.iter_mut().zip(&inputs) {
                *total = weights.add_to(*total, &inputs[step]);
            }
        }
        for (r, total) in totals.iter().enumerate() {
            *out[(row + r) * self.stride..].first_chunk_mut().expect("a vector of each row") = floats(*total);
        }
        R
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn vector(values: [f32; SIXTEEN]) -> __m512 {
    // SAFETY: sixteen values are as long as the vector.
    unsafe { transmute::<[f32; SIXTEEN], __m512>(values) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn floats(vector: __m512) -> [f32; SIXTEEN] {
    // SAFETY: sixteen values are as long as the vector.
    unsafe { transmute::<__m512, [f32; SIXTEEN]>(vector) }
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
