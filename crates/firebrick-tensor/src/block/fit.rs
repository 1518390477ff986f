//! Scales of a few values by weighted least squares, and codes of a few bits in bytes.

use crate::grid::near;
use half::f16;

/// Values summed side by side: a plain sum must keep its order and does not vectorize.
const LANES: usize = 8;

/// `sum f(i)` over `0..n`, a multiple of [`LANES`], for several sums at once.
#[inline(always)]
pub(super) fn sums<const S: usize>(n: usize, f: impl Fn(usize) -> [f32; S]) -> [f32; S] {
    let mut lanes = [[0.0; LANES]; S];
    for start in (0..n).step_by(LANES) {
        for l in 0..LANES {
            let terms = f(start + l);
            for s in 0..S {
                lanes[s][l] += terms[s];
            }
        }
    }
    lanes.map(|l| l.iter().sum())
}

/// The level nearest to `v` of the whole numbers `-half..half`.
#[inline(always)]
pub(super) fn signed(v: f32, half: f32) -> f32 {
    near(v.clamp(-half, half - 1.0))
}

/// `1 / v`, and 0 for 0.
#[inline(always)]
pub(super) fn inverse(v: f32) -> f32 {
    if v == 0.0 { 0.0 } else { 1.0 / v }
}

/// `v` as an f16 keeps it.
pub(super) fn halved(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// `v` as the nearest f16 that is no smaller in size: whole multiples of it reach as far as those of `v`.
pub(super) fn halved_up(v: f32) -> f32 {
    let nearest = f16::from_f32(v);
    let short = nearest.to_f32().abs() < v.abs();
    f16::from_bits(nearest.to_bits() + u16::from(short)).to_f32()
}

/// `sum w (scale level - x)^2` with the levels nearest to `x`.
#[inline(always)]
pub(super) fn scale_error(x: &[f32], w: &[f32], scale: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let (w, inverse) = (&w[..x.len()], inverse(scale));
    sums(x.len(), |i| [w[i] * (scale * nearest(x[i] * inverse) - x[i]).powi(2)])[0]
}

/// The scale with which `scale * level` comes nearest to `x` by squares weighted with `w`.
///
/// Tried are ranges in which the largest value meets a level near the lowest, `first`, in 19 steps of `step`; of each, the levels
/// of all values give the best scale in closed form.
#[inline(always)]
pub(super) fn fit_scale(x: &[f32], w: &[f32], first: f32, step: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let w = &w[..x.len()];
    let largest = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let (mut explained, mut best) = (0.0, 0.0);
    for k in -9..=9 {
        let inverse = (first + step * k as f32) / largest;
        let [xl, ll] = sums(x.len(), |i| {
            let level = nearest(x[i] * inverse);
            [w[i] * x[i] * level, w[i] * level * level]
        });
        if ll > 0.0 && xl * xl > explained * ll {
            (explained, best) = (xl * xl / ll, xl / ll);
        }
    }
    best
}

/// `sum w (scale code + offset - x)^2` with the codes of `0..=top` nearest to `x`.
#[inline(always)]
pub(super) fn affine_error(x: &[f32], w: &[f32], scale: f32, offset: f32, top: f32) -> f32 {
    let (w, inverse) = (&w[..x.len()], inverse(scale));
    sums(x.len(), |i| {
        let code = near(((x[i] - offset) * inverse).clamp(0.0, top));
        [w[i] * (scale * code + offset - x[i]).powi(2)]
    })[0]
}

/// Scale and offset with which `scale * code + offset`, codes `0..=top`, comes nearest to `x` by squares weighted with `w`; with
/// `below` the offset is at most 0.
///
/// Tried are 11 ranges around that of the values; of each, the codes of all values give the best line in closed form.
#[inline(always)]
pub(super) fn fit_affine(x: &[f32], w: &[f32], top: f32, below: bool) -> (f32, f32) {
    let w = &w[..x.len()];
    let mut low = x.iter().fold(f32::MAX, |m, &v| m.min(v));
    let high = x.iter().fold(f32::MIN, |m, &v| m.max(v));
    if below {
        low = low.min(0.0);
    }
    if high <= low {
        return (0.0, low);
    }
    let mut best = ((high - low) / top, low);
    let mut least = affine_error(x, w, best.0, best.1, top);
    // From `low`, so that an offset far from 0 costs no digits.
    let [sw, sy] = sums(x.len(), |i| [w[i], w[i] * (x[i] - low)]);
    for k in -5..=5 {
        let inverse = (top + 0.2 * k as f32) / (high - low);
        let [sc, scc, syc] = sums(x.len(), |i| {
            let y = x[i] - low;
            let code = near((y * inverse).clamp(0.0, top));
            [w[i] * code, w[i] * code * code, w[i] * y * code]
        });
        let determinant = sw * scc - sc * sc;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (sw * syc - sy * sc) / determinant;
        let mut offset = (scc * sy - sc * syc) / determinant + low;
        if below && offset > 0.0 {
            // x = y + low, and the line through 0 has no offset.
            (scale, offset) = ((syc + low * sc) / scc, 0.0);
        }
        let error = affine_error(x, w, scale, offset, top);
        if scale > 0.0 && error < least {
            (least, best) = (error, (scale, offset));
        }
    }
    best
}

/// Codes of `BITS` bits out of bytes in which the codes of one byte lie `RUN` apart.
#[inline(always)]
pub(super) fn unpack<const BITS: usize, const RUN: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mask = ((1u16 << BITS) - 1) as u8;
    for (b, c) in bytes.chunks_exact(RUN).zip(codes.chunks_exact_mut(RUN * 8 / BITS)) {
        for (k, run) in c.chunks_exact_mut(RUN).enumerate() {
            for i in 0..RUN {
                run[i] = (b[i] >> (k * BITS)) & mask;
            }
        }
    }
}

/// The lowest `BITS` bits of codes into bytes; undone by [`unpack`].
#[inline(always)]
pub(super) fn pack<const BITS: usize, const RUN: usize>(codes: &[u8], bytes: &mut [u8]) {
    let mask = ((1u16 << BITS) - 1) as u8;
    bytes.fill(0);
    for (c, b) in codes.chunks_exact(RUN * 8 / BITS).zip(bytes.chunks_exact_mut(RUN)) {
        for (k, run) in c.chunks_exact(RUN).enumerate() {
            for i in 0..RUN {
                b[i] |= (run[i] & mask) << (k * BITS);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    #[test]
    fn halves_reach_as_far_as_the_number() {
        for v in [0.0f32, 1.0, -1.0, 1e-9, -1e-9, 2.5e-8, 0.1, -0.1, 1234.567, 65504.0] {
            let (up, near) = (halved_up(v), halved(v));
            assert!(up.abs() >= v.abs() && up.signum() == v.signum(), "{v}: {up}");
            assert!(up == near || near.abs() < v.abs(), "{v}: {up}, the nearest is {near}");
        }
        assert!(halved(1e-9) == 0.0, "control");
        assert!(halved_up(f32::NAN).is_nan() && halved_up(1e9).is_infinite());
    }

    #[test]
    fn packing_is_undone() {
        let codes: Vec<u8> = (0..256u32).map(|i| (i * 97 % 251) as u8).collect();
        fn check<const BITS: usize, const RUN: usize>(codes: &[u8]) {
            let mut bytes = vec![0xff; codes.len() * BITS / 8];
            pack::<BITS, RUN>(codes, &mut bytes);
            let mut back = vec![0; codes.len()];
            unpack::<BITS, RUN>(&bytes, &mut back);
            let masked: Vec<u8> = codes.iter().map(|c| c & ((1u16 << BITS) - 1) as u8).collect();
            assert_eq!(back, masked, "{BITS} bits, runs of {RUN}");
        }
        check::<1, 32>(&codes);
        check::<1, 1>(&codes);
        check::<2, 32>(&codes);
        check::<4, 16>(&codes);
        check::<4, 64>(&codes);
    }

    #[test]
    fn fitted_scales_are_near_the_best_on_a_fine_grid() {
        for half in [4.0f32, 8.0, 32.0] {
            let nearest = |v| signed(v, half);
            let (mut all, mut covering) = (0.0, 0.0);
            for seed in 0..20 {
                let x = Seed(seed).normal("x", 32, 1.0);
                let w: Vec<f32> = Seed(seed).normal("w", 32, 1.0).iter().map(|v| v.exp()).collect();
                let found = scale_error(&x, &w, fit_scale(&x, &w, -half, 0.1, nearest), nearest);
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let grid = (-3000..3000).map(|i| i as f32 * 0.001 * 2.0 * largest / half);
                let best = grid.map(|s| scale_error(&x, &w, s, nearest)).fold(f32::MAX, |m, e| m.min(e));
                assert!(found < 1.5 * best, "half {half}, seed {seed}: {found} against {best}");
                all += found;
                covering += scale_error(&x, &w, largest / (half - 1.0), nearest);
            }
            assert!(
                all < 0.8 * covering,
                "control: half {half}: {all}, {covering} with a range of all values"
            );
        }
    }

    #[test]
    fn fitted_lines_return_what_lies_on_a_line() {
        let codes = [0.0f32, 15.0, 3.0, 7.0, 7.0, 1.0, 12.0, 9.0];
        let w = [1.0; 8];
        for offset in [-2.0f32, 0.0, 5.0] {
            let x = codes.map(|c| 0.25 * c + offset);
            let (scale, found) = fit_affine(&x, &w, 15.0, false);
            assert!((scale - 0.25).abs() < 1e-6 && (found - offset).abs() < 1e-5, "{scale} {found}");
            let (_, below) = fit_affine(&x, &w, 15.0, true);
            assert!(below <= 0.0);
            assert_eq!(below < offset - 1.0, offset > 0.0, "control: the bound bites above 0 only");
        }
        assert_eq!(fit_affine(&[3.0; 8], &w, 15.0, false), (0.0, 3.0));
        assert_eq!(fit_affine(&[-3.0; 8], &w, 15.0, true).1, -3.0);
    }
}
