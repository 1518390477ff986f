//! Weighted mean of models (model soups, arXiv 2203.05482): `y = sum w_m x_m`, divided by `sum w_m` when normalized.

use super::{Kernel, Numerics, TensorMerge};

/// In [`Numerics::F32`] models of weight 0 do not take part, so that weights (1, 0) return the first model bit for bit. In
/// [`Numerics::Mergekit`] every term is fused and the sum begins at 0, which loses the sign of a zero; the sum is rounded once.
///
/// A sum of weights of 0 gives infinities or NaN when normalizing, as mergekit does; [`Merge::open`](crate::Merge::open) refuses it.
pub(super) fn linear(tensor: &TensorMerge<'_>) -> Kernel {
    let weights: Vec<f32> = tensor.per_model.iter().map(|p| p.weight as f32).collect();
    let total: f32 = weights.iter().sum();
    let (normalize, numerics, round) = (tensor.global.normalize, tensor.numerics, tensor.rounding());
    Box::new(move |_, inputs, out| {
        let terms = inputs.iter().zip(&weights);
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
        if normalize {
            out.iter_mut().for_each(|y| *y = round.round(*y / total));
        } else {
            out.iter_mut().for_each(|y| *y = round.round(*y));
        }
    })
}
