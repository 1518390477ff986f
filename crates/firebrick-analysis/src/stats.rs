//! The few statistics of a profile: means with standard errors, rank correlation, inequality.

use serde::{Deserialize, Serialize};

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean over all tokens.
    pub mean: f64,
    /// Standard error of the mean: from the means of the windows (tokens of a window are not independent), or from the
    /// tokens where there is only one window.
    pub error: f64,
}

impl Estimate {
    /// The mean over windows of equal length; `windows` holds one value per token.
    pub(crate) fn of(windows: &[Vec<f64>]) -> Self {
        let means: Vec<f64> = windows.iter().map(|w| mean(w)).collect();
        match windows {
            [only] => Estimate { mean: means[0], error: standard_error(only) },
            _ => Estimate { mean: mean(&means), error: standard_error(&means) },
        }
    }
}

/// The arithmetic mean, 0 of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

fn standard_error(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if values.len() < 2 {
        return 0.0;
    }
    let centre = mean(values);
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    (squares / (n - 1.0) / n).sqrt()
}

/// Spearman's rank correlation, ties at their mean rank; `None` for fewer than two pairs or a constant side.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    let n = a.len().min(b.len());
    let (a, b) = (ranks(&a[..n]), ranks(&b[..n]));
    let centre = (n as f64 - 1.0) / 2.0;
    let product =
        |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x - centre) * (y - centre)).sum() };
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    (scale > 0.0).then(|| product(&a, &b) / scale)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|i, j| values[*i].total_cmp(&values[*j]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..].iter().take_while(|i| values[**i] == values[order[start]]).count().max(1);
        for i in &order[start..start + same] {
            ranks[*i] = start as f64 + (same as f64 - 1.0) / 2.0;
        }
        start += same;
    }
    ranks
}

/// Gini coefficient of non-negative values: 0 if all are equal, `1 - 1/n` if one holds everything, 0 of zeros.
pub fn gini(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let total: f64 = sorted.iter().sum();
    let n = sorted.len() as f64;
    if total <= 0.0 {
        return 0.0;
    }
    let weighted: f64 = sorted.iter().enumerate().map(|(i, v)| (2.0 * (i as f64 + 1.0) - n - 1.0) * v).sum();
    weighted / (n * total)
}

/// The middle value, the mean of the two middle ones of an even number; 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spearman_sees_order_only() {
        let a = [1.0, 2.0, 3.0, 10.0];
        assert_eq!(spearman(&a, &[0.1, 0.2, 0.9, 1.0]), Some(1.0));
        assert_eq!(spearman(&a, &[4.0, 3.0, 2.0, -9.0]), Some(-1.0));
        assert_eq!(spearman(&a, &[5.0; 4]), None);
        assert_eq!(spearman(&a[..1], &a[..1]), None);
        // By hand: ranks (0, 1.5, 1.5, 3) against (0, 1, 2, 3): 4.5 / sqrt(4.5 * 5).
        let tied = spearman(&[1.0, 2.0, 2.0, 3.0], &[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert!((tied - 4.5 / 22.5f64.sqrt()).abs() < 1e-14);
    }

    #[test]
    fn gini_runs_from_equal_to_one_holder() {
        assert!(gini(&[3.0; 5]).abs() < 1e-15);
        assert!((gini(&[0.0, 0.0, 0.0, 7.0]) - 0.75).abs() < 1e-15);
        assert!((gini(&[1.0, 3.0]) - 0.25).abs() < 1e-15);
        assert_eq!(gini(&[]), 0.0);
    }

    #[test]
    fn errors_come_from_windows() {
        // Tokens of a window are equal: five tokens tell no more than one.
        let windows = [vec![1.0; 5], vec![3.0; 5]];
        let e = Estimate::of(&windows);
        assert_eq!((e.mean, e.error), (2.0, 1.0));
        let one = Estimate::of(&[vec![1.0, 1.0, 3.0, 3.0]]);
        assert!((one.error - (4.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 2.5));
    }
}
