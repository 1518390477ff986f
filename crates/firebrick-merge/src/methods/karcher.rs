//! The Riemannian centre of mass on the sphere of the directions of several models, times their mean norm.

use super::gram::{Gram, Grouping, Rounded, combination, gram, whole};
use super::values::dot;
use super::{Kernel, TensorMerge};

/// The centre stays a combination of the models, so that the steps need their inner products only.
pub(super) fn karcher(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let of: Vec<usize> = (0..tensor.inputs.len()).collect();
    if let Some(rounded) = Rounded::load(tensor, &of, None)? {
        return Ok(whole(centre_rounded(tensor, &rounded)));
    }
    let gram = &gram(tensor.inputs, tensor.elements(), Grouping::Whole, &of, None)?[0];
    let norms: Vec<f64> = of.iter().map(|m| gram.norm(*m)).collect();
    let inverse: Vec<f64> =
        norms.iter().map(|n| if *n > tensor.global.tol { 1.0 / n } else { 0.0 }).collect();
    let centre = centre(&gram.scaled(&inverse), &inverse, tensor.global.max_iter as usize, tensor.global.tol);
    // Models of no length count for the norm, not for the direction.
    let norm = norms.iter().sum::<f64>() / norms.len() as f64;
    let coefficients: Vec<Vec<f64>> =
        centre.iter().zip(&inverse).map(|(c, inverse)| vec![norm * c * inverse]).collect();
    Ok(combination(Grouping::Whole, of, None, &coefficients))
}

/// The coefficients of the centre of the unit vectors whose `inverse` norm is not 0.
fn centre(cosines: &Gram, inverse: &[f64], steps: usize, tol: f64) -> Vec<f64> {
    let kept: Vec<usize> = (0..inverse.len()).filter(|m| inverse[*m] != 0.0).collect();
    let mut c = vec![0.0; inverse.len()];
    let Some(first) = kept.first() else { return c };
    let alpha = 1.0 / kept.len() as f64;
    kept.iter().for_each(|m| c[*m] = alpha);
    let norm = cosines.norm_of(&c);
    if norm <= tol {
        c.fill(0.0);
        c[*first] = 1.0;
    } else {
        c.iter_mut().for_each(|c| *c /= norm);
    }
    for _ in 0..steps {
        let along = cosines.times(&c);
        let mut step = vec![0.0; c.len()];
        for m in &kept {
            let d = along[*m].clamp(-1.0, 1.0);
            let angle = d.acos();
            if angle < tol || angle.sin() == 0.0 {
                continue;
            }
            let factor = alpha * angle / angle.sin();
            step.iter_mut().zip(&c).for_each(|(s, c)| *s -= factor * d * c);
            step[*m] += factor;
        }
        let length = cosines.norm_of(&step);
        // With a `tol` of 0 a step of no length is the last one too.
        if length <= tol {
            break;
        }
        c.iter_mut().zip(step).for_each(|(c, s)| *c = length.cos() * *c + length.sin() * s / length);
        let norm = cosines.norm_of(&c);
        if norm > 0.0 {
            c.iter_mut().for_each(|c| *c /= norm);
        }
    }
    c
}

/// The same with intermediate results rounded: angles near 0 vanish. Norms are in f32, and rounded where they multiply a vector, not
/// where they divide one.
fn centre_rounded(tensor: &TensorMerge<'_>, rounded: &Rounded) -> Vec<f32> {
    let r = |v: f64| rounded.r(v);
    let norm = |v: &[f32]| dot(v, v).sqrt();
    let tol = tensor.global.tol;
    let n = tensor.elements();
    let norms: Vec<f64> = rounded.vectors.iter().map(|v| norm(v)).collect();
    let units: Vec<Vec<f32>> = rounded
        .vectors
        .iter()
        .zip(&norms)
        .filter(|(_, norm)| **norm > tol)
        .map(|(v, norm)| rounded.map(v, |v| v / norm))
        .collect();
    let Some(first) = units.first() else { return vec![0.0; n] };
    let alpha = 1.0 / units.len() as f64;
    let mut u = vec![0.0; n];
    for unit in &units {
        u = rounded.zip(&u, unit, |u, v| u + r(alpha * v));
    }
    let length = norm(&u);
    u = if length <= tol { first.clone() } else { rounded.map(&u, |u| u / length) };
    for _ in 0..tensor.global.max_iter as usize {
        let mut step = vec![0.0; n];
        for unit in &units {
            let d = rounded.dot_once(&u, unit).clamp(-1.0, 1.0);
            let angle = r(d.acos());
            if angle < tol || angle.sin() == 0.0 {
                continue;
            }
            let factor = r(alpha * r(angle / r(angle.sin())));
            let tangent = rounded.zip(unit, &u, |v, u| v - r(d * u));
            step = rounded.zip(&step, &tangent, |s, t| s + r(factor * t));
        }
        let length = norm(&step);
        if length <= tol {
            break;
        }
        let (cosine, sine) = (r(length.cos()), r(length.sin()));
        u = rounded.zip(&u, &step, |u, s| r(cosine * u) + r(sine * r(s / length)));
        let after = norm(&u);
        if after > tol {
            u = rounded.map(&u, |u| u / after);
        }
    }
    let mean = r(norms.iter().sum::<f64>() / norms.len() as f64);
    rounded.map(&u, |u| mean * u)
}
