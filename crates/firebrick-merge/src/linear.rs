//! Weighted mean of models (model soups, arXiv 2203.05482): `y = sum w_m x_m`, divided by `sum w_m` when normalized.

use crate::Numerics;

/// One chunk of the mean: `inputs[m]` and `out` have the same length; `round` is applied once, to the result.
///
/// In [`Numerics::F32`] models of weight 0 do not take part, so that weights (1, 0) return the first model bit for bit. In
/// [`Numerics::Mergekit`] every term is fused and the sum begins at 0, which loses the sign of a zero.
///
/// A sum of weights of 0 gives infinities or NaN when normalizing, as mergekit does; [`Merge::open`](crate::Merge::open) refuses it.
pub fn linear(
    inputs: &[&[f32]],
    weights: &[f32],
    normalize: bool,
    out: &mut [f32],
    numerics: Numerics,
    round: impl Fn(f32) -> f32,
) {
    let total: f32 = weights.iter().sum();
    let terms = inputs.iter().zip(weights);
    match numerics {
        Numerics::Mergekit => {
            out.fill(0.0);
            for (x, w) in terms {
                out.iter_mut().zip(*x).for_each(|(y, x)| *y = w.mul_add(*x, *y));
            }
        }
        Numerics::F32 => {
            let mut terms = terms.filter(|(_, w)| **w != 0.0);
            match terms.next() {
                Some((x, w)) => out.iter_mut().zip(*x).for_each(|(y, x)| *y = w * x),
                None => out.fill(0.0),
            }
            for (x, w) in terms {
                out.iter_mut().zip(*x).for_each(|(y, x)| *y += w * x);
            }
        }
    }
    out.iter_mut().for_each(|y| *y = round(if normalize { *y / total } else { *y }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_and_identities() {
        let base = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8];
        let d1 = [0.050, -0.031, -0.101, 0.0, 0.402, 0.0, -0.063, 0.117];
        let d2 = [-0.047, 0.099, 0.022, -0.203, 0.0, 0.053, 0.251, -0.071];
        let x = |d: [f32; 8]| -> Vec<f32> { base.iter().zip(d).map(|(b, d)| b + d).collect() };
        let (x1, x2) = (x(d1), x(d2));
        let mut y = [0.0; 8];
        linear(&[&x1, &x2], &[0.5, 0.3], true, &mut y, Numerics::F32, |v| v);
        // Computed by mergekit 0.1.5.
        let known = [0.113625, -0.182250, 0.245125, -0.476125, 0.751250, -0.580125, 0.754750, -0.753500];
        assert!(y.iter().zip(known).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{y:?}");
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let (signed, infinite) = ([-0.0, 0.0, 1.5, -2.5], [1.0, -1.0, f32::INFINITY, f32::NAN]);
        let mut z = [7.0; 4];
        for normalize in [false, true] {
            linear(&[&signed, &infinite], &[1.0, 0.0], normalize, &mut z, Numerics::F32, |v| v);
            assert_eq!(bits(&z), bits(&signed), "weights (1, 0) return the first model bit for bit");
            linear(&[&infinite, &signed], &[0.0, 1.0], normalize, &mut z, Numerics::F32, |v| v);
            assert_eq!(bits(&z), bits(&signed), "and (0, 1) the second");
            linear(&[&signed, &x1[..4]], &[1.0, 0.0], normalize, &mut z, Numerics::Mergekit, |v| v);
            assert_ne!(bits(&z), bits(&signed), "control: mergekit loses the sign of zero");
        }
        linear(&[&x1, &x2], &[0.0, 1.0], true, &mut y, Numerics::F32, |v| v);
        assert_ne!(bits(&y), bits(&x1), "control: the other model is another one");
        linear(&[&x1, &x2], &[0.0, 0.0], false, &mut y, Numerics::F32, |v| v);
        assert_eq!(y, [0.0; 8]);
    }
}
