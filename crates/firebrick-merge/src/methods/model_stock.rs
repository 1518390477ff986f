//! Model stock (arXiv 2403.19522): `y = t mean(x) + (1 - t) base` with `t = N c / (1 + (N - 1) c)`, where `c` is the mean cosine between
//! the N task vectors; of a tensor, or of each of its rows (`filter_wise`).

use super::gram::{Gram, Grouping, Rounded, combination, gram, whole};
use super::{Kernel, TensorMerge};

/// Smallest product of two norms.
const SMALLEST: f64 = 1e-6;

pub(super) fn model_stock(tensor: &TensorMerge<'_>) -> Result<Kernel, String> {
    let (base, of, n) = (tensor.base()?, tensor.others(), tensor.elements());
    let rows = tensor.global.filter_wise && tensor.shape.len() > 1 && n > 0;
    let grouping = if rows { Grouping::Rows(tensor.columns()) } else { Grouping::Whole };
    if let Some(rounded) = Rounded::load(tensor, &of, Some(base))? {
        return stock_rounded(tensor, &rounded, rows);
    }
    let count = of.len() as f64;
    let share = |gram: &Gram| {
        let mut cosines = Vec::new();
        for a in 0..of.len() {
            for b in a + 1..of.len() {
                let norms = (gram.norm(a) * gram.norm(b)).max(SMALLEST);
                cosines.push((gram.get(a, b) / norms).clamp(-1.0, 1.0));
            }
        }
        let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let t = count * cosine / (1.0 + (count - 1.0) * cosine);
        if t.is_finite() { Ok(t / count) } else { Err("model_stock: the task vectors cancel".to_string()) }
    };
    let groups = gram(tensor.inputs, n, grouping, &of, Some(base))?;
    let shares = groups.iter().map(share).collect::<Result<Vec<f64>, _>>()?;
    let coefficients = vec![shares; of.len()];
    Ok(combination(grouping, of, Some(base), &coefficients))
}

/// The same with every intermediate result rounded.
fn stock_rounded(tensor: &TensorMerge<'_>, rounded: &Rounded, rows: bool) -> Result<Kernel, String> {
    let r = |v: f64| rounded.r(v);
    let n = tensor.elements();
    let length = if rows { tensor.columns() } else { n };
    let models = tensor.others();
    let values = models.iter().map(|m| tensor.inputs[*m].to_vec()).collect::<Result<Vec<_>, _>>()?;
    let base = rounded.base.as_deref().unwrap_or(&[]);
    let count = models.len() as f64;
    let mut out = Vec::with_capacity(n);
    for start in (0..n).step_by(length.max(1)) {
        let part = |v: &Vec<f32>| v[start..start + length].to_vec();
        let deltas: Vec<Vec<f32>> = rounded.vectors.iter().map(part).collect();
        let mut cosines = Vec::new();
        for a in 0..deltas.len() {
            for b in a + 1..deltas.len() {
                let norms = r(rounded.norm(&deltas[a]) * rounded.norm(&deltas[b])).max(SMALLEST);
                cosines.push(r(rounded.dot(&deltas[a], &deltas[b]) / norms).clamp(-1.0, 1.0));
            }
        }
        let cosine = r(cosines.iter().sum::<f64>() / cosines.len() as f64);
        let t = r(r(count * cosine) / r(1.0 + r((count - 1.0) * cosine)));
        if !t.is_finite() {
            return Err("model_stock: the task vectors cancel".into());
        }
        out.extend((start..start + length).map(|i| {
            let mean = r(values.iter().fold(0.0, |sum, v| r(sum + f64::from(v[i]))) / count);
            r(r(t * mean) + r(r(1.0 - t) * f64::from(base[i]))) as f32
        }));
    }
    Ok(whole(out))
}
