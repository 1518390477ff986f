//! Arcee fusion: the base takes over the elements of another model that matter most, those whose importance `|x - b| KL(row)` is at
//! least the median plus 1.5 times the distance between quartiles of all importances of the tensor. A quartile is an element, the next
//! lower one.

use super::rounding::Rounding;
use super::select::keys_at;
use super::values::map;
use super::{Kernel, TensorMerge};

/// Added to every probability.
const FLOOR: f64 = 1e-8;

/// mergekit draws a million importances where there are more, for the quartiles; these are of all.
pub(super) fn arcee_fusion(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let (base, other, n, columns) = (tensor.base()?, tensor.others()[0], tensor.elements(), tensor.columns());
    if n == 0 {
        return Ok(Box::new(|_, _, _| {}));
    }
    let round = tensor.rounding();
    let divergences: Vec<f32> = map(tensor.inputs, n, columns, |_, views| {
        let rows = views[other].chunks_exact(columns).zip(views[base].chunks_exact(columns));
        rows.map(|(x, b)| divergence(x, b, round)).collect::<Vec<f32>>()
    })?
    .concat();
    let importance =
        move |i: usize, x: f32, b: f32| round.round(round.round(x - b).abs() * divergences[i / columns]);
    let ranks = [1, 2, 3].map(|quarter| (0, (quarter as f64 / 4.0 * (n - 1) as f64) as usize));
    let keys = keys_at(tensor.inputs, n, &ranks, |_, range, views, out| {
        for (i, key) in out.iter_mut().enumerate() {
            *key = importance(range.start + i, views[other][i], views[base][i]).to_bits();
        }
    })?;
    let [low, median, high] = [0, 1, 2].map(|i| f64::from(keys[i].magnitude()));
    let r = |v: f64| f64::from(round.scalar(v));
    let threshold = r(median + r(1.5 * r(high - low))) as f32;
    Ok(Box::new(move |start, inputs, out| {
        for (i, y) in out.iter_mut().enumerate() {
            let (x, b) = (inputs[other][i], inputs[base][i]);
            let taken = importance(start + i, x, b) >= threshold;
            *y = if taken { b + round.round(x - b) } else { b };
        }
    }))
}

/// `sum p ln(p / q)` of the softmax of two rows.
fn divergence(x: &[f32], b: &[f32], round: Rounding) -> f32 {
    let norm = |v: &[f32]| {
        let top = v.iter().fold(f32::NEG_INFINITY, |top, v| top.max(*v));
        (f64::from(top), v.iter().map(|v| f64::from(v - top).exp()).sum::<f64>())
    };
    let r = |v: f64| if round == Rounding::Exact { v } else { f64::from(round.scalar(v)) };
    let ((top_x, sum_x), (top_b, sum_b)) = (norm(x), norm(b));
    let terms = x.iter().zip(b).map(|(x, b)| {
        let p = r(r((f64::from(*x) - top_x).exp() / sum_x) + FLOOR);
        let q = r(r((f64::from(*b) - top_b).exp() / sum_b) + FLOOR);
        r(p * r(r(p / q).ln()))
    });
    // With the floor it may end below 0 by a hair.
    round.scalar(terms.sum::<f64>().max(0.0))
}
