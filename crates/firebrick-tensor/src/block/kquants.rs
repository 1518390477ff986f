//! The K formats of ggml: super-blocks of 256 values in groups of 16 or 32, whose scales are small integer multiples of an f16.
//!
//! Q3_K and Q6_K are symmetric, `value = d s (q - half)`; Q2_K, Q4_K and Q5_K are affine, `value = d s q - dmin m`. The encoders fit
//! every group by least squares, then round its scale and minimum to multiples (in the affine ones to those, of the nearest, that leave
//! the least error), then fit `d` and `dmin` to what was chosen, unless all minima are 0.

use super::fit::*;
use super::{BlockError, DType};
use crate::grid::near;
use half::f16;

/// Values in a super-block.
const SUPER: usize = 256;

fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The whole blocks of `bytes`, beside their values.
fn blocks<'a, const B: usize>(
    bytes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; B], &'a mut [f32; SUPER])> {
    bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<SUPER>().0)
}

/// The super-blocks of `values` with their weights (1 where none are given), beside the bytes they become.
fn encode_each<const B: usize>(
    values: &[f32],
    weights: Option<&[f32]>,
    out: &mut [u8],
    encode: impl Fn(&[f32; SUPER], &[f32; SUPER], &mut [u8; B]),
) {
    let ones = [1.0; SUPER];
    let weights = weights.map(|w| w.as_chunks::<SUPER>().0);
    for (i, (x, o)) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0).enumerate() {
        encode(x, weights.map_or(&ones, |w| &w[i]), o);
    }
}

/// `codes` with the bits of `high` above the lowest `shift`.
fn join(codes: &mut [u8; SUPER], high: &[u8; SUPER], shift: usize) {
    codes.iter_mut().zip(high).for_each(|(c, h)| *c |= h << shift);
}

pub(super) fn decode_q2_k(bytes: &[u8], out: &mut [f32]) {
    let mut codes = [0; SUPER];
    for (b, o) in blocks::<84>(bytes, out) {
        unpack::<2, 32>(&b[16..80], &mut codes);
        let (d, dmin) = (scale(&b[80..]), scale(&b[82..]));
        for (g, (o, q)) in o.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
            let (dl, ml) = (d * f32::from(b[g] & 15), dmin * f32::from(b[g] >> 4));
            o.iter_mut().zip(q).for_each(|(o, q)| *o = dl * f32::from(*q) - ml);
        }
    }
}

pub(super) fn encode_q2_k(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<84>(values, weights, out, |x, w, o| {
        Affine::fit::<16>(x, w, 3.0, 15.0).block().put_q2_k(o);
    });
}

/// The 16 scales of 6 bits in Q3_K, less 32: low halves in 8 bytes, the upper 2 bits in 4 more.
fn unpack_q3_scales(bytes: &[u8]) -> [i8; 16] {
    std::array::from_fn(|j| {
        let low = bytes[j % 8] >> (j / 8 * 4) & 15;
        let high = bytes[8 + j % 4] >> (j / 4 * 2) & 3;
        (low | (high << 4)) as i8 - 32
    })
}

fn pack_q3_scales(scales: &[i8; 16], bytes: &mut [u8]) {
    bytes.fill(0);
    for (j, s) in scales.iter().enumerate() {
        let s = s.wrapping_add(32) as u8 & 63;
        bytes[j % 8] |= (s & 15) << (j / 8 * 4);
        bytes[8 + j % 4] |= (s >> 4) << (j / 4 * 2);
    }
}

pub(super) fn decode_q3_k(bytes: &[u8], out: &mut [f32]) {
    let (mut codes, mut high) = ([0; SUPER], [0; SUPER]);
    for (b, o) in blocks::<110>(bytes, out) {
        unpack::<1, 32>(&b[..32], &mut high);
        unpack::<2, 32>(&b[32..96], &mut codes);
        join(&mut codes, &high, 2);
        let (d, scales) = (scale(&b[108..]), unpack_q3_scales(&b[96..108]));
        for (g, (o, q)) in o.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
            let dl = d * f32::from(scales[g]);
            o.iter_mut().zip(q).for_each(|(o, q)| *o = dl * f32::from(*q as i8 - 4));
        }
    }
}

pub(super) fn encode_q3_k(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<110>(values, weights, out, |x, w, o| {
        let s = Signed::<16>::fit(x, w, -4.0, 0.1, -32.0, |v| signed(v, 4.0));
        s.block(|level| (level + 4) as u8).put_q3_k(o);
    });
}

/// The 8 scales and 8 minima of 6 bits in Q4_K and Q5_K: those of the first four groups whole in 8 bytes, the lower halves of the
/// others in 4 more, their upper 2 bits above the first.
fn unpack_q4_scales(b: &[u8]) -> ([u8; 8], [u8; 8]) {
    let scales = |j: usize| match j {
        0..4 => b[j] & 63,
        _ => (b[4 + j] & 15) | (b[j - 4] >> 6 << 4),
    };
    let mins = |j: usize| match j {
        0..4 => b[4 + j] & 63,
        _ => (b[4 + j] >> 4) | (b[j] >> 6 << 4),
    };
    (std::array::from_fn(scales), std::array::from_fn(mins))
}

fn pack_q4_scales(scales: &[u8], mins: &[u8], b: &mut [u8]) {
    for j in 0..4 {
        b[j] = scales[j] | (scales[4 + j] >> 4 << 6);
        b[4 + j] = mins[j] | (mins[4 + j] >> 4 << 6);
        b[8 + j] = (scales[4 + j] & 15) | (mins[4 + j] << 4);
    }
}

/// `value = d s q - dmin m`, in groups of 32.
fn affine_values(head: &[u8], codes: &[u8; SUPER], out: &mut [f32; SUPER]) {
    let (d, dmin) = (scale(head), scale(&head[2..]));
    let (scales, mins) = unpack_q4_scales(&head[4..16]);
    for (g, (o, q)) in out.chunks_exact_mut(32).zip(codes.chunks_exact(32)).enumerate() {
        let (dl, ml) = (d * f32::from(scales[g]), dmin * f32::from(mins[g]));
        o.iter_mut().zip(q).for_each(|(o, q)| *o = dl * f32::from(*q) - ml);
    }
}

pub(super) fn decode_q4_k(bytes: &[u8], out: &mut [f32]) {
    let mut codes = [0; SUPER];
    for (b, o) in blocks::<144>(bytes, out) {
        unpack::<4, 32>(&b[16..], &mut codes);
        affine_values(&b[..16], &codes, o);
    }
}

pub(super) fn encode_q4_k(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<144>(values, weights, out, |x, w, o| {
        Affine::fit::<32>(x, w, 15.0, 63.0).block().put_q4_k(o);
    });
}

pub(super) fn decode_q5_k(bytes: &[u8], out: &mut [f32]) {
    let (mut codes, mut high) = ([0; SUPER], [0; SUPER]);
    for (b, o) in blocks::<176>(bytes, out) {
        unpack::<1, 32>(&b[16..48], &mut high);
        unpack::<4, 32>(&b[48..], &mut codes);
        join(&mut codes, &high, 4);
        affine_values(&b[..16], &codes, o);
    }
}

pub(super) fn encode_q5_k(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<176>(values, weights, out, |x, w, o| {
        Affine::fit::<32>(x, w, 31.0, 63.0).block().put_q5_k(o);
    });
}

pub(super) fn decode_q6_k(bytes: &[u8], out: &mut [f32]) {
    let (mut codes, mut high) = ([0; SUPER], [0; SUPER]);
    for (b, o) in blocks::<210>(bytes, out) {
        unpack::<4, 64>(&b[..128], &mut codes);
        unpack::<2, 32>(&b[128..192], &mut high);
        join(&mut codes, &high, 4);
        let d = scale(&b[208..]);
        for (g, (o, q)) in o.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate() {
            let dl = d * f32::from(b[192 + g] as i8);
            o.iter_mut().zip(q).for_each(|(o, q)| *o = dl * f32::from(*q as i8 - 32));
        }
    }
}

pub(super) fn encode_q6_k(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<210>(values, weights, out, |x, w, o| {
        let s = Signed::<16>::fit(x, w, -32.0, 0.1, -128.0, |v| signed(v, 32.0));
        s.block(|level| (level + 32) as u8).put_q6_k(o);
    });
}

/// The levels of IQ4_NL and IQ4_XS: denser around 0, where weights are.
const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The code of the level of [`IQ4_LEVELS`] nearest to `v`.
#[inline(always)]
fn iq4_code(v: f32) -> u8 {
    (1..16)
        .map(|i| u8::from(2.0 * v > f32::from(i16::from(IQ4_LEVELS[i - 1]) + i16::from(IQ4_LEVELS[i]))))
        .sum()
}

/// The level itself, in arithmetic that vectorizes.
#[inline(always)]
fn iq4_level(v: f32) -> f32 {
    let step = |i: usize| {
        let (low, high) = (f32::from(IQ4_LEVELS[i - 1]), f32::from(IQ4_LEVELS[i]));
        if 2.0 * v > low + high { high - low } else { 0.0 }
    };
    (1..16).fold(f32::from(IQ4_LEVELS[0]), |level, i| level + step(i))
}

fn iq4_values(d: f32, bytes: &[u8], out: &mut [f32]) {
    let mut codes = [0; 32];
    unpack::<4, 16>(bytes, &mut codes);
    out.iter_mut().zip(codes).for_each(|(o, q)| *o = d * f32::from(IQ4_LEVELS[usize::from(q)]));
}

pub(super) fn decode_iq4_nl(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        iq4_values(scale(b), &b[2..], o);
    }
}

pub(super) fn encode_iq4_nl(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    let ones = [1.0; 32];
    for (i, (x, o)) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<18>().0).enumerate() {
        let w = weights.map_or(&ones[..], |w| &w[32 * i..32 * (i + 1)]);
        let d = halved(fit_scale(x, w, -127.0, 1.5, iq4_level));
        o[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        let inverse = inverse(d);
        pack::<4, 16>(&x.map(|v| iq4_code(v * inverse)), &mut o[2..]);
    }
}

pub(super) fn decode_iq4_xs(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in blocks::<136>(bytes, out) {
        let (d, high) = (scale(b), u16::from_le_bytes([b[2], b[3]]));
        for (g, (o, q)) in o.chunks_exact_mut(32).zip(b[8..].chunks_exact(16)).enumerate() {
            let low = b[4 + g / 2] >> (g % 2 * 4) & 15;
            let s = (low | ((high >> (2 * g) & 3) as u8) << 4) as i8 - 32;
            iq4_values(d * f32::from(s), q, o);
        }
    }
}

pub(super) fn encode_iq4_xs(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    encode_each::<136>(values, weights, out, |x, w, o| {
        let s = Signed::<32>::fit(x, w, -127.0, 1.5, -32.0, iq4_level);
        s.block(|level| iq4_code(f32::from(level))).put_iq4_xs(o);
    });
}

/// The numbers that a super-block of 256 values holds, for writing it.
///
/// With `d` and `dmin` (kept as f16), a group's multiples `s` and `t` and a code `q` a value is `d s (q - 4)` in Q3_K, `d s (q - 32)`
/// in Q6_K, `d s level[q]` in IQ4_XS, and `d s q - dmin t` in Q2_K, Q4_K and Q5_K.
#[derive(Clone, Debug, PartialEq)]
pub struct SuperBlock {
    /// The scale that all groups share.
    pub d: f32,
    /// The minimum that all groups share; for the affine types.
    pub dmin: f32,
    /// Multiples of the scale, of 16 groups or of the first 8: 0 to 15 in Q2_K, 0 to 63 in Q4_K and Q5_K, -32 to 31 in Q3_K and
    /// IQ4_XS, -128 to 127 in Q6_K.
    pub scales: [i8; 16],
    /// Multiples of the minimum, with the limits of the scales; for the affine types.
    pub mins: [u8; 16],
    /// One code per value.
    pub codes: [u8; SUPER],
}

impl SuperBlock {
    /// Appends the block to `out` as `dtype` stores it; numbers out of their limits lose their upper bits.
    ///
    /// # Errors
    /// When `dtype` has no super-blocks.
    pub fn write(&self, dtype: DType, out: &mut Vec<u8>) -> Result<(), BlockError> {
        let put = match dtype {
            DType::Q2K => Self::put_q2_k,
            DType::Q3K => Self::put_q3_k,
            DType::Q4K => Self::put_q4_k,
            DType::Q5K => Self::put_q5_k,
            DType::Q6K => Self::put_q6_k,
            DType::Iq4Xs => Self::put_iq4_xs,
            _ => return Err(BlockError::PartialBlock { dtype, elements: SUPER }),
        };
        let start = out.len();
        out.resize(start + dtype.block_bytes(), 0);
        put(self, &mut out[start..]);
        Ok(())
    }

    fn put_q2_k(&self, o: &mut [u8]) {
        for g in 0..16 {
            o[g] = (self.scales[g] as u8 & 15) | (self.mins[g] << 4);
        }
        pack::<2, 32>(&self.codes, &mut o[16..80]);
        put_f16(self.d, &mut o[80..82]);
        put_f16(self.dmin, &mut o[82..84]);
    }

    fn put_q3_k(&self, o: &mut [u8]) {
        pack::<1, 32>(&self.codes.map(|c| c >> 2), &mut o[..32]);
        pack::<2, 32>(&self.codes, &mut o[32..96]);
        pack_q3_scales(&self.scales, &mut o[96..108]);
        put_f16(self.d, &mut o[108..110]);
    }

    fn put_q4_k(&self, o: &mut [u8]) {
        self.put_affine_head(&mut o[..16]);
        pack::<4, 32>(&self.codes, &mut o[16..]);
    }

    fn put_q5_k(&self, o: &mut [u8]) {
        self.put_affine_head(&mut o[..16]);
        pack::<1, 32>(&self.codes.map(|c| c >> 4), &mut o[16..48]);
        pack::<4, 32>(&self.codes, &mut o[48..]);
    }

    fn put_affine_head(&self, head: &mut [u8]) {
        put_f16(self.d, &mut head[..2]);
        put_f16(self.dmin, &mut head[2..4]);
        pack_q4_scales(&self.scales.map(|s| s as u8 & 63), &self.mins.map(|m| m & 63), &mut head[4..16]);
    }

    fn put_q6_k(&self, o: &mut [u8]) {
        pack::<4, 64>(&self.codes, &mut o[..128]);
        pack::<2, 32>(&self.codes.map(|c| c >> 4), &mut o[128..192]);
        o[192..208].copy_from_slice(bytemuck::cast_slice(&self.scales));
        put_f16(self.d, &mut o[208..210]);
    }

    fn put_iq4_xs(&self, o: &mut [u8]) {
        o[2..8].fill(0);
        put_f16(self.d, &mut o[..2]);
        for g in 0..8 {
            let scale = self.scales[g].wrapping_add(32) as u8 & 63;
            o[4 + g / 2] |= (scale & 15) << (g % 2 * 4);
            o[2 + g / 4] |= (scale >> 4) << (g % 4 * 2);
        }
        pack::<4, 16>(&self.codes, &mut o[8..]);
    }
}

fn put_f16(value: f32, bytes: &mut [u8]) {
    bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// A super-block of `value = d s level`, in groups of `LEN`.
struct Signed<const LEN: usize> {
    d: f32,
    scales: [i8; 16],
    levels: [i8; SUPER],
}

impl<const LEN: usize> Signed<LEN> {
    /// `first` and `step` as in [`fit_scale`]; multiples go from `lowest` to `-lowest - 1`.
    #[inline(always)]
    fn fit(
        x: &[f32; SUPER],
        w: &[f32; SUPER],
        first: f32,
        step: f32,
        lowest: f32,
        nearest: impl Fn(f32) -> f32 + Copy,
    ) -> Self {
        let groups = || x.chunks_exact(LEN).zip(w.chunks_exact(LEN));
        let mut fits = [0.0; 16];
        groups().zip(&mut fits).for_each(|((x, w), f)| *f = fit_scale(x, w, first, step, nearest));
        // The largest scale gets the lowest multiple, so that d's sign is free.
        let largest = fits.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        let (mut best, mut least) = Self::round(x, w, &fits, halved_up(largest / lowest), lowest, nearest);
        let [dot, square] = best.products(x, w);
        if square > 0.0 {
            let (again, error) = Self::round(x, w, &fits, halved(dot / square), lowest, nearest);
            if error < least {
                (best, least) = (again, error);
            }
        }
        debug_assert!(least.is_nan() || least >= 0.0);
        best
    }

    /// The multiples of `d` nearest to the fitted scales, and the error they leave.
    #[inline(always)]
    fn round(
        x: &[f32; SUPER],
        w: &[f32; SUPER],
        fits: &[f32; 16],
        d: f32,
        lowest: f32,
        nearest: impl Fn(f32) -> f32 + Copy,
    ) -> (Self, f32) {
        let mut block = Signed { d, scales: [0; 16], levels: [0; SUPER] };
        let mut total = 0.0;
        let groups = x.chunks_exact(LEN).zip(w.chunks_exact(LEN)).zip(block.levels.chunks_exact_mut(LEN));
        for (g, ((x, w), levels)) in groups.enumerate() {
            let at = near((fits[g] * inverse(d)).clamp(lowest, -lowest - 1.0));
            total += scale_error(x, w, d * at, nearest);
            block.scales[g] = at as i8;
            let inverse = inverse(d * at);
            x.iter().zip(levels).for_each(|(x, l)| *l = nearest(x * inverse) as i8);
        }
        (block, total)
    }

    fn block(&self, code: impl Fn(i8) -> u8) -> SuperBlock {
        SuperBlock { d: self.d, dmin: 0.0, scales: self.scales, mins: [0; 16], codes: self.levels.map(code) }
    }

    /// `sum w x a` and `sum w a a`, where the values are `d a`.
    fn products(&self, x: &[f32; SUPER], w: &[f32; SUPER]) -> [f32; 2] {
        let a = |i: usize| f32::from(self.scales[i / LEN]) * f32::from(self.levels[i]);
        sums(SUPER, |i| [w[i] * x[i] * a(i), w[i] * a(i) * a(i)])
    }
}

/// A super-block of `value = d s q - dmin m`.
struct Affine {
    d: f32,
    dmin: f32,
    scales: [u8; 16],
    mins: [u8; 16],
    codes: [u8; SUPER],
}

impl Affine {
    /// In groups of `LEN`: codes `0..=top`, multiples `0..=most`.
    #[inline(always)]
    fn fit<const LEN: usize>(x: &[f32; SUPER], w: &[f32; SUPER], top: f32, most: f32) -> Self {
        let mut fits = [(0.0, 0.0); 16];
        let groups = x.chunks_exact(LEN).zip(w.chunks_exact(LEN)).zip(&mut fits);
        groups.for_each(|((x, w), f)| *f = fit_affine(x, w, top, true));
        let largest = fits.iter().fold((0.0f32, 0.0f32), |m, f| (m.0.max(f.0), m.1.max(-f.1)));
        let (d, dmin) = (halved_up(largest.0 / most), halved_up(largest.1 / most));
        let (mut best, mut least) = Self::round::<LEN>(x, w, &fits, (d, dmin), top, most);
        if let Some((d, dmin)) = best.refit::<LEN>(x, w) {
            let (again, error) = Self::round::<LEN>(x, w, &fits, (halved(d), halved(dmin)), top, most);
            if error < least {
                (best, least) = (again, error);
            }
        }
        debug_assert!(least.is_nan() || least >= 0.0);
        best
    }

    /// The multiples of `d` and `dmin` next to the fitted ones that leave the least error, and that error.
    #[inline(always)]
    fn round<const LEN: usize>(
        x: &[f32; SUPER],
        w: &[f32; SUPER],
        fits: &[(f32, f32); 16],
        (d, dmin): (f32, f32),
        top: f32,
        most: f32,
    ) -> (Self, f32) {
        let mut block = Affine { d, dmin, scales: [0; 16], mins: [0; 16], codes: [0; SUPER] };
        let mut total = 0.0;
        let groups = x.chunks_exact(LEN).zip(w.chunks_exact(LEN)).zip(block.codes.chunks_exact_mut(LEN));
        for (g, ((x, w), codes)) in groups.enumerate() {
            let (scale, offset) = fits[g];
            let s_at = near((scale * inverse(d)).clamp(0.0, most));
            let m_at = near((-offset * inverse(dmin)).clamp(0.0, most));
            let (mut least, mut best) = (f32::INFINITY, (0.0, 0.0));
            for s in [s_at, s_at - 1.0, s_at + 1.0] {
                for m in [m_at, m_at - 1.0, m_at + 1.0] {
                    if s < 0.0 || m < 0.0 || s > most || m > most {
                        continue;
                    }
                    let error = affine_error(x, w, d * s, -dmin * m, top);
                    if error < least {
                        (least, best) = (error, (s, m));
                    }
                }
            }
            total += least;
            (block.scales[g], block.mins[g]) = (best.0 as u8, best.1 as u8);
            let (inverse, offset) = (inverse(d * best.0), -dmin * best.1);
            let code = |x: f32| near(((x - offset) * inverse).clamp(0.0, top)) as u8;
            x.iter().zip(codes).for_each(|(x, c)| *c = code(*x));
        }
        (block, total)
    }

    fn block(&self) -> SuperBlock {
        let Affine { d, dmin, scales, mins, codes } = *self;
        SuperBlock { d, dmin, scales: scales.map(|s| s as i8), mins, codes }
    }

    /// `d` and `dmin` of least squares for the multiples and codes that were chosen, if both come out positive.
    fn refit<const LEN: usize>(&self, x: &[f32; SUPER], w: &[f32; SUPER]) -> Option<(f32, f32)> {
        let [aa, ab, bb, xa, xb] = sums(SUPER, |i| {
            let a = f32::from(self.scales[i / LEN]) * f32::from(self.codes[i]);
            let b = -f32::from(self.mins[i / LEN]);
            [w[i] * a * a, w[i] * a * b, w[i] * b * b, w[i] * x[i] * a, w[i] * x[i] * b]
        });
        let determinant = aa * bb - ab * ab;
        let (d, dmin) = ((bb * xa - ab * xb) / determinant, (aa * xb - ab * xa) / determinant);
        (determinant > 0.0 && d > 0.0 && dmin > 0.0).then_some((d, dmin))
    }
}
