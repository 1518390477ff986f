//! The base moved by `t` towards another model, and no further than it: `y = w x + (1 - w) b`, `w = t / |x - b|` within 0 and 1.

use super::rounding::Rounding;
use super::{Kernel, TensorMerge};

pub(super) fn nearswap(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let (base, round) = (tensor.base()?, tensor.rounding());
    let other = tensor.others()[0];
    let t = tensor.global.t as f32;
    Ok(Box::new(move |_, inputs, out| {
        let r = |v: f32| round.round(v);
        for ((y, b), x) in out.iter_mut().zip(inputs[base]).zip(inputs[other]) {
            let distance = r((b - x).abs()).max(r(1e-6));
            // PyTorch divides a number by a tensor through its inverse.
            let ratio = if round == Rounding::Exact { t / distance } else { r(t * r(1.0 / distance)) };
            let w = ratio.clamp(0.0, 1.0);
            // At the ends the model itself, whatever the other holds.
            *y = if w == 1.0 {
                *x
            } else if w == 0.0 {
                *b
            } else {
                r(r(w * x) + r(r(1.0 - w) * b))
            };
        }
    }))
}
