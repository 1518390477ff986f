//! SCE (arXiv 2408.07990): of the task vectors the positions that vary most between models are selected, each is weighted by its
//! energy, and the signs that are outvoted are erased.

use std::ops::Range;

use super::select::{Key, keys_at};
use super::values::{count, map};
use super::{Kernel, TensorMerge};

/// Smallest sum of weights to divide by, and of mean squares to weigh by: below it, which small task vectors are, all weigh the same.
const SMALLEST: f64 = 1e-6;

pub(super) fn sce(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let (base, of, n, round) = (tensor.base()?, tensor.others(), tensor.elements(), tensor.rounding());
    let models = of.len();
    if models == 0 || n == 0 {
        return Ok(Box::new(move |_, inputs, out| out.copy_from_slice(inputs[base])));
    }
    let deltas = |i: usize, inputs: &[&[f32]], out: &mut [f32]| {
        out.iter_mut().zip(&of).for_each(|(d, m)| *d = round.round(inputs[*m][i] - inputs[base][i]));
    };
    // The population variance between the models.
    let variance = move |deltas: &[f32]| {
        let mean = deltas.iter().map(|d| f64::from(*d)).sum::<f64>() / models as f64;
        let squares: f64 = deltas.iter().map(|d| (f64::from(*d) - mean).powi(2)).sum();
        round.scalar(squares / models as f64)
    };
    // Positions from this key on are selected; none where there is no key to reach.
    let mut selected = Some(None);
    if tensor.global.select_topk < 1.0 {
        let varying = count(tensor.inputs, n, 1, |range, views, counts| {
            let mut row = vec![0.0; models];
            for i in 0..range.len() {
                deltas(i, views, &mut row);
                counts[0] += u32::from(variance(&row) != 0.0);
            }
        })?[0];
        let kept = (varying as f64 * tensor.global.select_topk.max(0.0)) as usize;
        selected = match kept {
            0 => None,
            _ => Some(Some(
                keys_at(tensor.inputs, n, &[(0, n - kept)], |_, range: &Range<usize>, views, out| {
                    let mut row = vec![0.0; models];
                    for (i, key) in out.iter_mut().enumerate().take(range.len()) {
                        deltas(i, views, &mut row);
                        *key = variance(&row).to_bits();
                    }
                })?[0],
            )),
        };
    }
    let takes = move |index: usize, deltas: &[f32]| match selected {
        None => false,
        Some(None) => true,
        Some(Some(key)) => Key { bits: variance(deltas).to_bits(), index } >= key,
    };
    let squares = map(tensor.inputs, n, 1, |range, views| {
        let (mut sums, mut row) = (vec![0.0f64; models], vec![0.0; models]);
        for i in 0..range.len() {
            deltas(i, views, &mut row);
            if takes(range.start + i, &row) {
                sums.iter_mut().zip(&row).for_each(|(s, d)| *s += f64::from(round.round(d * d)));
            }
        }
        sums
    })?;
    let mean = |m: usize| f64::from(round.scalar(squares.iter().map(|s| s[m]).sum::<f64>() / n as f64));
    let means: Vec<f64> = (0..models).map(mean).collect();
    let total = f64::from(round.scalar(means.iter().sum()));
    let weight = |mean: f64| if total < SMALLEST { 1.0 / models as f64 } else { mean / total };
    let weights: Vec<f32> = means.into_iter().map(|mean| round.scalar(weight(mean))).collect();
    let of = of.clone();
    Ok(Box::new(move |start, inputs, out| {
        let r = |v: f32| round.round(v);
        let mut row = vec![0.0; models];
        for (i, y) in out.iter_mut().enumerate() {
            let b = inputs[base][i];
            row.iter_mut().zip(&of).for_each(|(d, m)| *d = r(inputs[*m][i] - b));
            if !takes(start + i, &row) {
                *y = b;
                continue;
            }
            let up = r(row.iter().sum()) >= 0.0;
            let agrees = |d: f32| if up { d > 0.0 } else { d < 0.0 };
            let agreeing = || row.iter().zip(&weights).filter(|(d, _)| agrees(**d));
            let sum = r(agreeing().map(|(d, w)| r(d * w)).sum());
            let by = r(agreeing().map(|(_, w)| *w).sum()).max(r(SMALLEST as f32));
            *y = r(b + r(sum / by));
        }
    }))
}
