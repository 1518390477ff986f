//! Spherical interpolation by weights, `t = w_2 / (w_1 + w_2)`: of models, or of task vectors where there is a base; of whole tensors,
//! or of each of their rows or columns.

use super::gram::{Gram, Grouping, Rounded, combination, gram};
use super::slerp::arc;
use super::{Kernel, TensorMerge};

/// Below this sine of the angle vectors are interpolated linearly.
const PARALLEL: f64 = 1e-8;
/// Smallest norm that a vector is divided by.
const SMALLEST: f64 = 1e-7;

pub(super) fn nuslerp(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let of = tensor.others();
    let weights = tensor.weights(&of);
    let total = weights[0] + weights[1];
    let t = if total.abs() < 1e-6 { 0.5 } else { weights[1] / total };
    let n = tensor.elements();
    let grouping = match tensor.shape {
        [] | [_] => Grouping::Whole,
        _ if n == 0 || tensor.global.nuslerp_flatten => Grouping::Whole,
        [rows, ..] if tensor.global.nuslerp_row_wise => Grouping::Columns(n / rows),
        _ => Grouping::Rows(tensor.columns()),
    };
    if let Some(rounded) = Rounded::load(tensor, &of, tensor.base)? {
        return Ok(interpolate_rounded(&rounded, grouping, t));
    }
    let coefficients = |gram: &Gram| {
        let cosine = gram.get(0, 1) / gram.norm(0).max(SMALLEST) / gram.norm(1).max(SMALLEST);
        let angle = cosine.clamp(-1.0, 1.0).acos();
        if angle.sin().abs() < PARALLEL { (1.0 - t, t) } else { arc(angle, t) }
    };
    let groups = gram(tensor.inputs, n, grouping, &of, tensor.base)?;
    let (first, second) = groups.iter().map(coefficients).unzip();
    Ok(combination(grouping, of, tensor.base, &[first, second]))
}

/// The same with every intermediate result rounded: cosines near 1 become 1.
fn interpolate_rounded(rounded: &Rounded, grouping: Grouping, t: f64) -> Kernel {
    let r = |v: f64| rounded.r(v);
    let n = rounded.vectors[0].len();
    let (groups, step) = match grouping {
        Grouping::Whole => (1, 1),
        Grouping::Rows(columns) => (n / columns, 1),
        Grouping::Columns(columns) => (columns, columns),
    };
    let length = n / groups.max(1);
    let mut out = vec![0.0; n];
    for group in 0..groups {
        let at = |i: usize| if step == 1 { group * length + i } else { group + i * step };
        let take = |v: &[f32]| (0..length).map(|i| v[at(i)]).collect::<Vec<f32>>();
        let (a, b) = (take(&rounded.vectors[0]), take(&rounded.vectors[1]));
        let unit = |v: &[f32]| {
            let norm = rounded.norm(v).max(SMALLEST);
            rounded.map(v, |v| v / norm)
        };
        let angle = r(rounded.dot(&unit(&a), &unit(&b)).clamp(-1.0, 1.0).acos());
        let sine = r(angle.sin());
        let merged = if sine.abs() < PARALLEL {
            rounded.zip(&a, &b, |a, b| r((1.0 - t) * a) + r(t * b))
        } else {
            let (p, q) = (r(r((1.0 - t) * angle).sin()), r(r(t * angle).sin()));
            rounded.zip(&a, &b, |a, b| r(r(p * a) + r(q * b)) / sine)
        };
        (0..length).for_each(|i| out[at(i)] = merged[i]);
    }
    rounded.kernel(out)
}
