//! Spherical interpolation of two models: `y = (sin((1-t) a) v0 + sin(t a) v1) / sin a` with the angle `a` between them, each tensor
//! taken as one vector. Almost parallel ones (|cos a| > 0.9995) are interpolated linearly.

use super::gram::{Grouping, combination, gram};
use super::{Kernel, TensorMerge};

/// The base is at `t = 0`. mergekit computes this in f32 whatever the type of the models.
pub(super) fn slerp(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let base = tensor.base()?;
    let Some(other) = tensor.others().first().copied() else {
        return Ok(combination(Grouping::Whole, vec![base], None, &[vec![1.0]]));
    };
    let (of, t) = (vec![base, other], tensor.global.t);
    let gram = &gram(tensor.inputs, tensor.elements(), Grouping::Whole, &of, None)?[0];
    // A vector of almost no length is not normalized.
    let unit = |m: usize| if gram.norm(m) > 1e-8 { gram.norm(m) } else { 1.0 };
    let cosine = gram.get(0, 1) / unit(0) / unit(1);
    let (c0, c1) = if cosine.abs() > 0.9995 { (1.0 - t, t) } else { arc(cosine.acos(), t) };
    Ok(combination(Grouping::Whole, of, None, &[vec![c0], vec![c1]]))
}

/// The coefficients at `t` of two vectors at this angle.
pub(super) fn arc(angle: f64, t: f64) -> (f64, f64) {
    ((angle - angle * t).sin() / angle.sin(), (angle * t).sin() / angle.sin())
}
