//! Task arithmetic (arXiv 2212.04089): `y = base + lambda * sum w_m (x_m - base)`.

/// One chunk: `inputs[0]` is the base, the others the models of `weights`; `round` is applied to every intermediate result.
///
/// # Panics
/// If `inputs` is empty.
pub fn task_arithmetic(
    inputs: &[&[f32]],
    weights: &[f32],
    normalize: bool,
    lambda: f32,
    out: &mut [f32],
    round: impl Fn(f32) -> f32,
) {
    let (base, models) = inputs.split_first().expect("the base is an input");
    let total = weights.iter().sum::<f32>();
    // mergekit's guard against weights that cancel.
    let divisor = if total.abs() < 1e-8 { 1.0 } else { round(total) };
    for (i, y) in out.iter_mut().enumerate() {
        let terms = models.iter().zip(weights).map(|(x, w)| round(w * round(x[i] - base[i])));
        let mut mix = round(terms.sum());
        if normalize {
            mix = round(mix / divisor);
        }
        if lambda != 1.0 {
            mix = round(mix * lambda);
        }
        *y = round(base[i] + mix);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_and_identities() {
        let base = [0.1f32, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8];
        let deltas = [
            [0.050, -0.031, -0.101, 0.0, 0.402, 0.0, -0.063, 0.117],
            [-0.047, 0.099, 0.022, -0.203, 0.0, 0.053, 0.251, -0.071],
            [0.021, -0.012, 0.207, 0.103, 0.0, 0.0, 0.008, 0.197],
        ];
        let x = deltas.map(|d: [f32; 8]| base.iter().zip(d).map(|(b, d)| b + d).collect::<Vec<f32>>());
        let inputs: Vec<&[f32]> = std::iter::once(&base[..]).chain(x.iter().map(|v| &v[..])).collect();
        let mut y = [0.0; 8];
        task_arithmetic(&inputs, &[0.5, 0.3, 0.4], false, 0.7, &mut y, |v| v);
        // Computed by mergekit 0.1.5.
        let known = [0.113510, -0.193420, 0.327230, -0.413790, 0.640700, -0.588870, 0.732900, -0.718800];
        assert!(y.iter().zip(known).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{y:?}");
        task_arithmetic(&inputs[..2], &[1.0], false, 1.0, &mut y, |v| v);
        assert!(
            y.iter().zip(&x[0]).all(|(a, b)| (a - b).abs() <= f32::EPSILON),
            "one task at 1 is its fine-tune"
        );
        task_arithmetic(&inputs[..2], &[0.0], false, 1.0, &mut y, |v| v);
        assert_eq!(y, base, "control: weight 0 is the base");
    }
}
