//! How a run of blocks of each type becomes numbers and back. Lengths are checked by the callers.

use super::fit::{fit_affine, fit_scale, inverse, pack, signed, unpack};
use crate::grid::near;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use std::cmp::Ordering;

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes);
}

pub(super) fn encode_f32(values: &[f32], _: Option<&[f32]>, out: &mut [u8]) {
    out.copy_from_slice(bytemuck::cast_slice(values));
}

pub(super) fn decode_f64(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<8>().0.iter().zip(out) {
        *o = f64::from_le_bytes(*b) as f32;
    }
}

pub(super) fn encode_f64(values: &[f32], _: Option<&[f32]>, out: &mut [u8]) {
    for (v, o) in values.iter().zip(out.as_chunks_mut::<8>().0) {
        *o = f64::from(*v).to_le_bytes();
    }
}

// A mapped file may start a tensor at an odd byte, so halves pass through an aligned buffer that stays in L1.
const HALVES: usize = 512;

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut buffer = [f16::ZERO; HALVES];
    for (b, o) in bytes.chunks(2 * HALVES).zip(out.chunks_mut(HALVES)) {
        let halves = &mut buffer[..o.len()];
        bytemuck::cast_slice_mut::<f16, u8>(halves).copy_from_slice(b);
        halves.convert_to_f32_slice(o);
    }
}

pub(super) fn encode_f16(values: &[f32], _: Option<&[f32]>, out: &mut [u8]) {
    let mut buffer = [f16::ZERO; HALVES];
    for (v, o) in values.chunks(HALVES).zip(out.chunks_mut(2 * HALVES)) {
        let halves = &mut buffer[..v.len()];
        halves.convert_from_f32_slice(v);
        o.copy_from_slice(bytemuck::cast_slice(halves));
    }
}

// Written out because `half` has only a checked scalar loop for bf16 slices.
pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    struct Decode<'a>(&'a [[u8; 2]], &'a mut [f32]);
    impl WithSimd for Decode<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (b, o) in self.0.iter().zip(self.1) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
    }
    Arch::new().dispatch(Decode(bytes.as_chunks().0, out));
}

pub(super) fn encode_bf16(values: &[f32], _: Option<&[f32]>, out: &mut [u8]) {
    struct Encode<'a>(&'a [f32], &'a mut [[u8; 2]]);
    impl WithSimd for Encode<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (v, o) in self.0.iter().zip(self.1) {
                let bits = v.to_bits();
                let nearest_even = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
                let quiet_nan = (bits >> 16) | 0x40;
                let half = if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { nearest_even };
                *o = (half as u16).to_le_bytes();
            }
        }
    }
    Arch::new().dispatch(Encode(values, out.as_chunks_mut().0));
}

#[inline]
fn scale(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

// Smallest and largest value ignoring NaN. In lanes, because a plain fold must keep its order and does not vectorize.
#[inline]
fn extremes(x: &[f32; 32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::MAX; 8], [f32::MIN; 8]);
    for lane in x.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = if lane[i] < low[i] { lane[i] } else { low[i] };
            high[i] = if lane[i] > high[i] { lane[i] } else { high[i] };
        }
    }
    let min = low.into_iter().fold(f32::MAX, |m, v| if v < m { v } else { m });
    let max = high.into_iter().fold(f32::MIN, |m, v| if v > m { v } else { m });
    (min, max)
}

// Lanes lose which of two equal zeros came first, and its sign reaches the file.
#[inline]
fn first_zero(x: &[f32; 32], extreme: f32) -> f32 {
    if extreme == 0.0 { x.iter().copied().find(|&v| v == 0.0).unwrap_or(extreme) } else { extreme }
}

// `v` in 0..256 without its fraction. Adding 2^23 leaves the nearest integer in the low bits; `as` would saturate,
// which does not vectorize. Other values give some number.
#[inline]
fn truncate(v: f32) -> u8 {
    const SHIFT: f32 = 8_388_608.0;
    let nearest = v + SHIFT;
    (nearest.to_bits() as u8).wrapping_sub(u8::from(nearest - SHIFT > v))
}

// The signed value of the largest |x|, the first of equals, so that it gets the lowest code exactly.
#[inline]
fn largest(x: &[f32; 32]) -> f32 {
    let (min, max) = extremes(x);
    match (-min).partial_cmp(&max) {
        _ if min >= 0.0 && max <= 0.0 => 0.0,
        Some(Ordering::Less) => max,
        Some(Ordering::Greater) => min,
        _ => x.iter().copied().find(|v| v.abs() == max).unwrap_or(0.0),
    }
}

// Codes `0..2 half` of `d (code - half)`, by weighted least squares.
fn symmetric(x: &[f32; 32], weights: &[f32], half: f32) -> (f16, [u8; 32]) {
    let d = f16::from_f32(fit_scale(x, weights, -half, 0.1, |v| signed(v, half)));
    let id = inverse(d.to_f32());
    (d, x.map(|v| (signed(v * id, half) + half) as u8))
}

// Codes `0..=top` of `d code + m`: over the range of the values as ggml's reference, or by weighted least squares.
#[inline]
fn asymmetric(x: &[f32; 32], weights: Option<&[f32]>, top: u8) -> (f16, f16, [u8; 32]) {
    if let Some(w) = weights {
        let (d, m) = fit_affine(x, w, f32::from(top), false);
        let (d, m) = (f16::from_f32(d), f16::from_f32(m));
        let (id, offset) = (inverse(d.to_f32()), m.to_f32());
        return (d, m, x.map(|v| near(((v - offset) * id).clamp(0.0, f32::from(top))) as u8));
    }
    let (min, max) = extremes(x);
    let (min, max) = (first_zero(x, min), first_zero(x, max));
    let d = (max - min) / f32::from(top);
    let id = inverse(d);
    (f16::from_f32(d), f16::from_f32(min), x.map(|v| truncate((v - min) * id + 0.5).min(top)))
}

// Codes whose fifth bits lie apart.
#[inline]
fn five_bits(high: &[u8], low: &[u8]) -> [u8; 32] {
    let (mut codes, mut tops) = ([0; 32], [0; 32]);
    unpack::<4, 16>(low, &mut codes);
    unpack::<1, 1>(high, &mut tops);
    codes.iter_mut().zip(tops).for_each(|(c, t)| *c |= t << 4);
    codes
}

pub(super) fn decode_q4_0(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = scale(b[0], b[1]);
        for j in 0..16 {
            o[j] = (i32::from(b[2 + j] & 15) - 8) as f32 * d;
            o[j + 16] = (i32::from(b[2 + j] >> 4) - 8) as f32 * d;
        }
    }
}

pub(super) fn encode_q4_0(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, o)) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<18>().0).enumerate() {
        let (d, codes) = match weights {
            Some(w) => symmetric(x, &w[32 * i..], 8.0),
            None => {
                let d = largest(x) / -8.0;
                let id = inverse(d);
                (f16::from_f32(d), x.map(|v| truncate(v * id + 8.5).min(15)))
            }
        };
        [o[0], o[1]] = d.to_le_bytes();
        pack::<4, 16>(&codes, &mut o[2..]);
    }
}

pub(super) fn decode_q4_1(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let (d, m) = (scale(b[0], b[1]), scale(b[2], b[3]));
        for j in 0..16 {
            o[j] = f32::from(b[4 + j] & 15) * d + m;
            o[j + 16] = f32::from(b[4 + j] >> 4) * d + m;
        }
    }
}

pub(super) fn encode_q4_1(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, o)) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<20>().0).enumerate() {
        let (d, m, codes) = asymmetric(x, weights.map(|w| &w[32 * i..]), 15);
        [o[0], o[1]] = d.to_le_bytes();
        [o[2], o[3]] = m.to_le_bytes();
        pack::<4, 16>(&codes, &mut o[4..]);
    }
}

pub(super) fn decode_q5_0(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<22>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = scale(b[0], b[1]);
        let codes = five_bits(&b[2..6], &b[6..]);
        o.iter_mut().zip(codes).for_each(|(o, q)| *o = (i32::from(q) - 16) as f32 * d);
    }
}

pub(super) fn encode_q5_0(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, o)) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<22>().0).enumerate() {
        let (d, codes) = match weights {
            Some(w) => symmetric(x, &w[32 * i..], 16.0),
            None => {
                let d = largest(x) / -16.0;
                let id = inverse(d);
                (f16::from_f32(d), x.map(|v| truncate(v * id + 16.5).min(31)))
            }
        };
        [o[0], o[1]] = d.to_le_bytes();
        pack::<1, 1>(&codes.map(|q| q >> 4), &mut o[2..6]);
        pack::<4, 16>(&codes, &mut o[6..]);
    }
}

pub(super) fn decode_q5_1(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<24>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let (d, m) = (scale(b[0], b[1]), scale(b[2], b[3]));
        let codes = five_bits(&b[4..8], &b[8..]);
        o.iter_mut().zip(codes).for_each(|(o, q)| *o = f32::from(q) * d + m);
    }
}

pub(super) fn encode_q5_1(values: &[f32], weights: Option<&[f32]>, out: &mut [u8]) {
    for (i, (x, o)) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<24>().0).enumerate() {
        let (d, m, codes) = asymmetric(x, weights.map(|w| &w[32 * i..]), 31);
        [o[0], o[1]] = d.to_le_bytes();
        [o[2], o[3]] = m.to_le_bytes();
        pack::<1, 1>(&codes.map(|q| q >> 4), &mut o[4..8]);
        pack::<4, 16>(&codes, &mut o[8..]);
    }
}

pub(super) fn decode_q8_0(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = scale(b[0], b[1]);
        for j in 0..32 {
            o[j] = f32::from(b[2 + j] as i8) * d;
        }
    }
}

pub(super) fn encode_q8_0(values: &[f32], _: Option<&[f32]>, out: &mut [u8]) {
    for (x, o) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let (min, max) = extremes(x);
        let d = if -min > max { -min } else { max.abs() } / 127.0;
        let id = inverse(d);
        [o[0], o[1]] = f16::from_f32(d).to_le_bytes();
        for j in 0..32 {
            let v = x[j] * id;
            // Half away from zero: adding the float below 1/2 to |v| and truncating is exact.
            let q = truncate(v.abs() + 0.499_999_97);
            o[2 + j] = if v < 0.0 { q.wrapping_neg() } else { q };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{DType, decode, encode, encode_weighted};
    use firebrick_core::Seed;
    use proptest::prelude::*;
    use rand::Rng;
    use rand_distr::StandardNormal;

    // Those whose encoders follow ggml's reference bit for bit.
    const EXACT: [DType; 5] = [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0];

    fn encoded(dtype: DType, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap()];
        encode(dtype, values, &mut bytes).unwrap();
        bytes
    }

    fn decoded(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
        decode(dtype, bytes, &mut values).unwrap();
        values
    }

    // The reference quantizers as they are written down, one value after the other.
    fn plain(dtype: DType, x: &[f32]) -> Vec<u8> {
        let half = |v: f32| f16::from_f32(v).to_le_bytes();
        let id = |d: f32| if d != 0.0 { 1.0 / d } else { 0.0 };
        let nibbles = |q: &[u8]| (0..16).map(|j| (q[j] & 15) | ((q[j + 16] & 15) << 4)).collect::<Vec<_>>();
        let fifths = |q: &[u8]| {
            (0..32).fold(0u32, |bits, j| bits | (u32::from(q[j] >> 4) << j)).to_le_bytes().to_vec()
        };
        match dtype {
            DType::Q4_0 | DType::Q5_0 => {
                let (mut amax, mut max) = (0.0, 0.0);
                for &v in x {
                    if v.abs() > amax {
                        (amax, max) = (v.abs(), v);
                    }
                }
                let half_way = if dtype == DType::Q4_0 { 8.0 } else { 16.0 };
                let d = max / -half_way;
                let top = 2 * half_way as i8 - 1;
                let code = |v: &f32| ((v * id(d) + (half_way + 0.5)).trunc() as i8).min(top) as u8;
                let q: Vec<u8> = x.iter().map(code).collect();
                let high = if top == 31 { fifths(&q) } else { Vec::new() };
                [&half(d)[..], &high, &nibbles(&q)].concat()
            }
            DType::Q4_1 | DType::Q5_1 => {
                let (mut min, mut max) = (f32::MAX, f32::MIN);
                for &v in x {
                    if v < min {
                        min = v;
                    }
                    if v > max {
                        max = v;
                    }
                }
                let top = if dtype == DType::Q4_1 { 15i8 } else { 31 };
                let d = (max - min) / f32::from(top);
                let code = |v: &f32| (((v - min) * id(d) + 0.5).trunc() as i8).min(top) as u8;
                let q: Vec<u8> = x.iter().map(code).collect();
                let high = if top == 31 { fifths(&q) } else { Vec::new() };
                [&half(d)[..], &half(min), &high, &nibbles(&q)].concat()
            }
            DType::Q8_0 => {
                let d = x.iter().fold(0.0, |m: f32, v| m.max(v.abs())) / 127.0;
                let q: Vec<u8> = x.iter().map(|v| (v * id(d)).round() as i8 as u8).collect();
                [&half(d)[..], &q].concat()
            }
            _ => unreachable!("packed types only"),
        }
    }

    #[test]
    fn truncation_and_rounding_are_exact_next_to_every_tie() {
        for i in 0..=255u8 {
            let at = f32::from(i) / 2.0;
            for v in [at.next_down().max(0.0), at, at.next_up()] {
                assert_eq!(truncate(v), v as u8, "{v}");
                assert_eq!(truncate(v + 0.499_999_97), v.round() as u8, "{v}");
            }
        }
    }

    // Magnitudes that keep 1/d finite; below that ggml's own result is undefined.
    fn value() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -4.0f32..4.0,
            1 => prop::sample::select(vec![0.0f32, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 127.0, -127.0]),
            1 => (-30i32..16, any::<bool>()).prop_map(|(e, s)| (e as f32).exp2() * if s { -1.0 } else { 1.0 }),
        ]
    }

    proptest! {
        #[test]
        fn encoders_equal_the_plain_reference(x in prop::collection::vec(value(), 32)) {
            for dtype in EXACT {
                prop_assert_eq!(encoded(dtype, &x), plain(dtype, &x), "{}", dtype);
            }
        }

        #[test]
        fn no_bits_panic(bits in prop::collection::vec(any::<u32>(), 256), bytes in prop::collection::vec(any::<u8>(), 2048)) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            for dtype in DType::all().filter(|d| d.is_real()) {
                let size = encoded(dtype, &x).len();
                prop_assert_eq!(decoded(dtype, &bytes[..size]).len(), 256);
                let importance: Vec<f32> = x.iter().rev().copied().collect();
                encode_weighted(dtype, &x, &importance, &mut vec![0; size]).unwrap();
            }
        }

        // `enc(dec(b)) == b` for blocks an encoder can produce: the extreme codes are present and the scale is normal.
        #[test]
        fn encoding_undoes_decoding(
            mut codes in prop::collection::vec(any::<u8>(), 32),
            d in 0.001f32..8.0,
            negative in any::<bool>(),
            m in -30.0f32..30.0,
            extremes in (0usize..32, 1usize..32),
        ) {
            let (low, high) = (extremes.0, (extremes.0 + extremes.1) % 32);
            let half = |v: f32| f16::from_f32(v).to_le_bytes();
            let nibbles = |q: &[u8]| (0..16).map(|j| (q[j] & 15) | (q[j + 16] << 4)).collect::<Vec<_>>();
            let signed = if negative { -d } else { d };

            codes[low] = 127u8;
            let q8: Vec<u8> = codes.iter().map(|&q| if q == 128 { 129 } else { q }).collect();
            let block = [&half(d)[..], &q8].concat();
            prop_assert_eq!(encoded(DType::Q8_0, &decoded(DType::Q8_0, &block)), block);

            codes[low] = 0;
            let block = [&half(signed)[..], &nibbles(&codes)].concat();
            prop_assert_eq!(encoded(DType::Q4_0, &decoded(DType::Q4_0, &block)), block);

            codes[high] = 15;
            let block = [&half(d)[..], &half(m * d), &nibbles(&codes)].concat();
            prop_assert_eq!(encoded(DType::Q4_1, &decoded(DType::Q4_1, &block)), block);
        }
    }

    #[test]
    fn encoding_does_not_undo_decoding_of_a_block_without_its_largest_code() {
        let mut block = [1u8; 34];
        [block[0], block[1]] = f16::ONE.to_le_bytes();
        assert_ne!(encoded(DType::Q8_0, &decoded(DType::Q8_0, &block)), block);
    }

    #[test]
    fn halves_convert_like_the_half_crate_at_any_alignment() {
        let mut rng = Seed(1).stream("halves");
        let mut x: Vec<f32> = (0..3000).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 65504.0, 65520.0, 1e-8, 3e-5, f32::MAX]);
        // Exact ties and the neighbours of ties.
        x.extend((0..64).flat_map(|i| {
            [0x3f80_8000, 0x3f80_7fff, 0x3f80_8001].map(|b: u32| f32::from_bits(b + (i << 15)))
        }));
        let (f, b) = (encoded(DType::F16, &x), encoded(DType::BF16, &x));
        let back = |dtype, bytes: &[u8]| {
            let mut shifted = vec![0u8];
            shifted.extend_from_slice(bytes);
            let mut out = vec![0.0; x.len()];
            decode(dtype, &shifted[1..], &mut out).unwrap();
            out
        };
        let (from_f, from_b) = (back(DType::F16, &f), back(DType::BF16, &b));
        for (i, &v) in x.iter().enumerate() {
            let (hf, hb) = (f16::from_f32(v), half::bf16::from_f32(v));
            assert_eq!(f[2 * i..2 * i + 2], hf.to_le_bytes(), "{v}");
            assert_eq!(b[2 * i..2 * i + 2], hb.to_le_bytes(), "{v}");
            assert_eq!((from_f[i], from_b[i]), (hf.to_f32(), hb.to_f32()), "{v}");
        }
        let nan = decoded(DType::BF16, &encoded(DType::BF16, &[f32::from_bits(0x7f80_0001)]));
        assert!(nan[0].is_nan());
    }

    // Relative mean squared errors of the formats on standard normal weights, computed independently in numpy.
    #[test]
    fn errors_on_normal_weights_are_the_known_ones() {
        let mut rng = Seed(0).stream("weights");
        let x: Vec<f32> = (0..1024 * 768).map(|_| rng.sample(StandardNormal)).collect();
        let power: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        for (dtype, expected) in [(DType::Q4_0, 0.00738), (DType::Q4_1, 0.00611), (DType::Q8_0, 2.87e-5)] {
            let y = decoded(dtype, &encoded(dtype, &x));
            let error: f64 = x.iter().zip(&y).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let relative = error / power;
            assert!((relative / expected - 1.0).abs() < 0.02, "{dtype}: {relative}, expected {expected}");
        }
    }
}
