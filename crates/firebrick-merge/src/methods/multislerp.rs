//! Spherical mean of several models, or task vectors where there is a base, in the tangent space at their mean direction: a projection,
//! not the logarithm that [`karcher`](super::MergeMethod::Karcher) iterates.

use super::gram::{Grouping, Rounded, combination, gram};
use super::rounding::Rounding;
use super::{Kernel, TensorMerge};

pub(super) fn multislerp(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let of = tensor.others();
    if let [only] = (0..tensor.inputs.len()).collect::<Vec<_>>()[..] {
        return Ok(combination(Grouping::Whole, vec![only], None, &[vec![1.0]]));
    }
    let round = tensor.rounding();
    let r = |v: f64| if round == Rounding::Exact { v } else { f64::from(round.scalar(v)) };
    let mut weights: Vec<f64> = tensor.weights(&of).into_iter().map(r).collect();
    let total = r(weights.iter().sum());
    if tensor.global.normalize_weights {
        if total == 0.0 {
            return Err("multislerp: the weights add up to 0".into());
        }
        weights.iter_mut().for_each(|w| *w = r(*w / total));
    }
    let eps = tensor.global.eps;
    if let Some(rounded) = Rounded::load(tensor, &of, tensor.base)? {
        return mean_rounded(&rounded, &weights, eps);
    }
    let gram = &gram(tensor.inputs, tensor.elements(), Grouping::Whole, &of, tensor.base)?[0];
    let norms: Vec<f64> = (0..of.len()).map(|m| gram.norm(m)).collect();
    let inverse: Vec<f64> = norms.iter().map(|n| 1.0 / (n + eps)).collect();
    let cosines = gram.scaled(&inverse);
    let length = cosines.norm_of(&weights);
    if length < eps {
        let plain: Vec<Vec<f64>> = weights.iter().map(|w| vec![*w]).collect();
        return cancelled(&weights, &norms).map(|()| combination(Grouping::Whole, of, tensor.base, &plain));
    }
    let centre: Vec<f64> = weights.iter().map(|w| w / length).collect();
    let along: f64 = cosines.times(&centre).iter().zip(&weights).map(|(d, w)| d * w).sum();
    let tangent: Vec<f64> = weights.iter().zip(&centre).map(|(w, c)| w - along * c).collect();
    let step = cosines.norm_of(&tangent) + eps;
    let norm: f64 = weights.iter().zip(&norms).map(|(w, n)| w * n).sum();
    let coefficient =
        |m: usize| norm * (centre[m] * step.cos() + tangent[m] * step.sin() / step) * inverse[m];
    let coefficients: Vec<Vec<f64>> = (0..of.len()).map(|m| vec![coefficient(m)]).collect();
    Ok(combination(Grouping::Whole, of, tensor.base, &coefficients))
}

/// Directions that cancel have no mean; two are interpolated linearly, and vectors of no length have a sum all the same.
fn cancelled(weights: &[f64], norms: &[f64]) -> Result<(), String> {
    match weights.len() == 2 || norms.iter().all(|norm| *norm == 0.0) {
        true => Ok(()),
        false => Err("multislerp: the directions of the models cancel".into()),
    }
}

/// The same with every intermediate result rounded.
fn mean_rounded(rounded: &Rounded, weights: &[f64], eps: f64) -> Result<Kernel, String> {
    let r = |v: f64| rounded.r(v);
    let n = rounded.vectors[0].len();
    let sum = |vectors: &[Vec<f32>]| -> Vec<f32> {
        let at = |i: usize| weights.iter().zip(vectors).map(|(w, v)| r(w * f64::from(v[i]))).sum::<f64>();
        (0..n).map(|i| r(at(i)) as f32).collect()
    };
    let norms: Vec<f64> = rounded.vectors.iter().map(|v| rounded.norm(v)).collect();
    let units: Vec<Vec<f32>> =
        rounded.vectors.iter().zip(&norms).map(|(v, norm)| rounded.map(v, |v| v / r(norm + eps))).collect();
    let centre = sum(&units);
    let length = rounded.norm(&centre);
    if length < eps {
        return cancelled(weights, &norms).map(|()| rounded.kernel(sum(&rounded.vectors)));
    }
    let centre = rounded.map(&centre, |c| c / length);
    let tangents: Vec<Vec<f32>> = units
        .iter()
        .map(|u| {
            let d = rounded.dot(u, &centre);
            rounded.zip(u, &centre, |u, c| u - r(d * c))
        })
        .collect();
    let tangent = sum(&tangents);
    let step = r(rounded.norm(&tangent) + eps);
    let (cosine, sine) = (r(step.cos()), r(step.sin()));
    let norm = r(weights.iter().zip(&norms).map(|(w, n)| r(w * n)).sum());
    let merged = rounded.zip(&centre, &tangent, |c, t| r(r(c * cosine) + r(r(t * sine) / step)) * norm);
    Ok(rounded.kernel(merged))
}
