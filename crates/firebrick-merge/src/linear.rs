//! Weighted mean of models (model soups, arXiv 2203.05482): `y = sum w_m x_m`, divided by `sum w_m` when normalized.

/// One chunk of the mean: `inputs[m]` and `out` have the same length; `add(sum, w, x)` is `sum + w x`, fused or not, and `round` is applied
/// once, to the result.
///
/// A sum of weights of 0 gives infinities or NaN, as mergekit does; the caller refuses it beforehand.
pub fn linear(
    inputs: &[&[f32]],
    weights: &[f32],
    normalize: bool,
    out: &mut [f32],
    add: impl Fn(f32, f32, f32) -> f32,
    round: impl Fn(f32) -> f32,
) {
    let total: f32 = weights.iter().sum();
    for (i, y) in out.iter_mut().enumerate() {
        let sum = inputs.iter().zip(weights).fold(0.0, |sum, (x, w)| add(sum, *w, x[i]));
        *y = round(if normalize { sum / total } else { sum });
    }
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
        linear(&[&x1, &x2], &[0.5, 0.3], true, &mut y, |s, w, x| s + w * x, |v| v);
        // Computed by mergekit 0.1.5.
        let known = [0.113625, -0.182250, 0.245125, -0.476125, 0.751250, -0.580125, 0.754750, -0.753500];
        assert!(y.iter().zip(known).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{y:?}");
        linear(&[&x1, &x2], &[1.0, 0.0], true, &mut y, |s, w, x| s + w * x, |v| v);
        assert_eq!(y.as_slice(), x1, "weights (1, 0) return the first model bit for bit");
        linear(&[&x1, &x2], &[0.0, 1.0], true, &mut y, |s, w, x| s + w * x, |v| v);
        assert_ne!(y.as_slice(), x1, "control");
    }
}
