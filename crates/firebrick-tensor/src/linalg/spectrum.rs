//! Rank measures of a spectrum of singular values or eigenvalues.

/// Effective rank `exp(-sum p ln p)` with `p = sigma / sum sigma` (Roy and Vetterli 2007); between 1 and the rank.
///
/// Takes singular values of a weight or eigenvalues of a covariance (say which). 0 for a spectrum of zeros.
pub fn effective_rank(sigma: &[f64]) -> f64 {
    let total: f64 = sigma.iter().sum();
    if total <= 0.0 {
        return 0.0;
    }
    // A share may underflow to 0, whose logarithm would make the sum NaN.
    let shares = sigma.iter().map(|&s| s / total).filter(|&p| p > 0.0);
    shares.map(|p| -p * p.ln()).sum::<f64>().exp()
}

/// Stable rank `||A||_F^2 / ||A||_2^2 = sum sigma^2 / max sigma^2`; at most the rank. 0 for a spectrum of zeros.
pub fn stable_rank(sigma: &[f64]) -> f64 {
    let largest = sigma.iter().fold(0.0, |m: f64, &s| m.max(s));
    if largest <= 0.0 { 0.0 } else { sigma.iter().map(|&s| (s / largest).powi(2)).sum() }
}

/// Participation ratio `(sum v)^2 / sum v^2` of eigenvalues; at most their [`effective_rank`]. 0 for zeros.
pub fn participation_ratio(values: &[f64]) -> f64 {
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(a, b), &v| (a + v, b + v * v));
    if squares <= 0.0 { 0.0 } else { sum * sum / squares }
}
