//! How few neurons of a feed-forward network do the work at a token (contextual sparsity, Liu et al. 2023, arXiv:2310.17157;
//! the error of dropping neurons after CETT, Zhang et al. 2024, arXiv:2402.03804).

use burn::tensor::{Tensor, TensorData};
use firebrick_core::Site;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::functional_partition::Partition;
use crate::sample::read;
use crate::stats::mean;

/// Shares of neurons whose loss is measured.
const DROPPED: [f64; 4] = [0.5, 0.7, 0.8, 0.9];
/// Share of a token's energy that counts as all of it.
const ENERGY: f64 = 0.95;
/// A neuron whose mean square is below this share of the mean over neurons never says anything.
const DEAD: f64 = 1e-6;

/// The neurons of one feed-forward network: the inputs of its down projection, `act(gate) * up` where it is gated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActivationProfile {
    /// The down projection.
    pub site: Site,
    /// Number of neurons.
    pub neurons: usize,
    /// Tokens looked at.
    pub tokens: usize,
    /// Share of activations that are exactly 0 (of a ReLU; next to nothing for SiLU and GELU).
    pub zeros: f64,
    /// Hoyer's sparsity `(sqrt(n) - |h|_1 / |h|_2) / (sqrt(n) - 1)`, mean over tokens: 0 if all neurons are as strong, 1 if one speaks.
    pub hoyer: f64,
    /// Smallest share of neurons that holds 95 % of a token's energy `|h|^2`, mean over tokens.
    pub active: f64,
    /// Neurons whose mean square over all tokens is below a millionth of the mean neuron's.
    pub dead: usize,
    /// What leaving out the weakest activations costs.
    pub dropped: Vec<DropLoss>,
    /// Neurons in groups that speak together; `None` where it was not looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<Partition>,
}

/// What it costs to leave out all activations below one threshold for the layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DropLoss {
    /// Share of activations left out.
    pub share: f64,
    /// The threshold: activations with `|h|` below it count as 0.
    pub threshold: f64,
    /// Length of what the left out ones would have added over the length of the output, root of the ratio of mean squares.
    pub error: f64,
}

/// Measures the activations `rows: [tokens, neurons]` in front of `down: [d_model, neurons]`; `mean_squares` is each
/// neuron's over all tokens.
///
/// # Errors
/// [`AnalysisError::Site`] if an activation is not finite, or there is none.
pub(crate) fn measure(
    site: Site,
    rows: Tensor<2>,
    down: Tensor<2>,
    mean_squares: &[f64],
) -> Result<(ActivationProfile, Vec<f32>), AnalysisError> {
    let [tokens, neurons] = rows.dims();
    let values = read(site, rows.clone())?;
    if values.iter().any(|v| !v.is_finite()) || values.is_empty() {
        return Err(AnalysisError::Site { site, what: "its inputs are not finite".into() });
    }
    let by_token: Vec<(f64, f64)> = values.par_chunks(neurons).map(|h| (hoyer(h), active(h))).collect();
    let (hoyer, active): (Vec<f64>, Vec<f64>) = by_token.into_iter().unzip();
    let zeros = values.iter().filter(|v| **v == 0.0).count();
    let usual = mean(mean_squares);
    let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    sorted.par_sort_unstable_by(f32::total_cmp);
    let output = energy(site, rows.clone().matmul(down.clone().transpose()))?;
    let mut dropped = Vec::with_capacity(DROPPED.len());
    for share in DROPPED {
        let threshold = sorted[((share * sorted.len() as f64) as usize).min(sorted.len() - 1)];
        let weak: Vec<f32> = values.iter().map(|v| if v.abs() < threshold { *v } else { 0.0 }).collect();
        let weak = Tensor::<2>::from_data(TensorData::new(weak, [tokens, neurons]), &rows.device());
        let lost = energy(site, weak.matmul(down.clone().transpose()))?;
        let error = if output > 0.0 { (lost / output).sqrt() } else { 0.0 };
        dropped.push(DropLoss { share, threshold: f64::from(threshold), error });
    }
    let profile = ActivationProfile {
        site,
        neurons,
        tokens,
        zeros: zeros as f64 / values.len() as f64,
        hoyer: mean(&hoyer),
        active: mean(&active),
        dead: mean_squares.iter().filter(|m| **m <= DEAD * usual).count(),
        dropped,
        partition: None,
    };
    Ok((profile, values))
}

/// The sum of the squares of a tensor.
fn energy(site: Site, x: Tensor<2>) -> Result<f64, AnalysisError> {
    Ok(read(site, x)?.iter().map(|v| f64::from(*v).powi(2)).sum())
}

/// Hoyer's sparsity of one token's activations; 0 of nothing and of zeros.
fn hoyer(h: &[f32]) -> f64 {
    let root = (h.len() as f64).sqrt();
    let (l1, l2): (f64, f64) =
        h.iter().map(|v| f64::from(v.abs())).fold((0.0, 0.0), |(a, b), v| (a + v, b + v * v));
    if l2 > 0.0 && root > 1.0 { (root - l1 / l2.sqrt()) / (root - 1.0) } else { 0.0 }
}

/// The smallest share of neurons that holds [`ENERGY`] of one token's energy; 0 of zeros.
fn active(h: &[f32]) -> f64 {
    let mut squares: Vec<f32> = h.iter().map(|v| v * v).collect();
    squares.sort_unstable_by(|a, b| b.total_cmp(a));
    let total: f64 = squares.iter().map(|v| f64::from(*v)).sum();
    let mut held = 0.0;
    let count = squares.iter().take_while(|v| {
        let before = held;
        held += f64::from(**v);
        before < ENERGY * total
    });
    count.count() as f64 / h.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::{Part, Seed};

    fn run(values: Vec<f32>, neurons: usize, down: Vec<f32>) -> ActivationProfile {
        let (device, n) = (Device::flex(), values.len() / neurons);
        let site = Site::layer(0, Part::MlpDown);
        let squares: Vec<f64> = (0..neurons)
            .map(|j| values.chunks(neurons).map(|h| f64::from(h[j]).powi(2)).sum::<f64>() / n as f64)
            .collect();
        let rows = Tensor::from_data(TensorData::new(values, [n, neurons]), &device);
        let d = down.len() / neurons;
        let down = Tensor::from_data(TensorData::new(down, [d, neurons]), &device);
        measure(site, rows, down, &squares).unwrap().0
    }

    #[test]
    fn one_neuron_is_sparse_and_all_alike_are_not() {
        let one: Vec<f32> = (0..20 * 64).map(|i| if i % 64 == i / 64 { -3.0 } else { 0.0 }).collect();
        let found = run(one, 64, vec![1.0; 64]);
        assert!((found.hoyer - 1.0).abs() < 1e-6 && (found.active - 1.0 / 64.0).abs() < 1e-12);
        assert_eq!(found.zeros, 63.0 / 64.0);
        assert_eq!(found.dead, 44, "tokens 0 to 19 use neurons 0 to 19");
        assert!(found.dropped.iter().all(|d| d.error == 0.0), "zeros cost nothing");
        let flat = run(vec![2.0; 20 * 64], 64, vec![1.0; 64]);
        assert!(flat.hoyer.abs() < 1e-6 && (flat.active - 61.0 / 64.0).abs() < 1e-12, "{flat:?}");
        assert_eq!((flat.zeros, flat.dead), (0.0, 0));
    }

    #[test]
    fn normal_activations_have_the_sparsity_of_the_normal_distribution() {
        let n = 400;
        let found = run(Seed(2).normal("h", 200 * n, 0.7), n, Seed(2).normal("w", 8 * n, 1.0));
        // E|h| / sqrt(E h^2) = sqrt(2 / pi).
        let root = (n as f64).sqrt();
        let expected = root * (1.0 - (2.0 / std::f64::consts::PI).sqrt()) / (root - 1.0);
        assert!((found.hoyer - expected).abs() < 0.005, "{} {expected}", found.hoyer);
        // 95 % of the energy lies beyond |h| = 0.5932 sd, where 55.3 % of the draws are.
        assert!((found.active - 0.553).abs() < 0.01, "{}", found.active);
    }

    #[test]
    fn dropped_activations_cost_what_they_would_have_added() {
        let (n, neurons, d) = (30, 50, 6);
        let (h, w) = (Seed(3).normal("h", n * neurons, 1.0), Seed(3).normal("w", d * neurons, 1.0));
        let found = run(h.clone(), neurons, w.clone());
        let mut last = 0.0;
        for loss in &found.dropped {
            let product = |keep: &dyn Fn(f64) -> bool| -> f64 {
                let out = |row: &[f32], o: usize| -> f64 {
                    let term = |j: usize| f64::from(row[j]) * f64::from(w[o * neurons + j]);
                    (0..neurons).filter(|j| keep(f64::from(row[*j]))).map(term).sum()
                };
                h.chunks(neurons).map(|row| (0..d).map(|o| out(row, o).powi(2)).sum::<f64>()).sum()
            };
            let expected = (product(&|v| v.abs() < loss.threshold) / product(&|_| true)).sqrt();
            assert!((loss.error - expected).abs() < 1e-5, "{loss:?} {expected}");
            let below = h.iter().filter(|v| f64::from(v.abs()) < loss.threshold).count();
            assert!((below as f64 / h.len() as f64 - loss.share).abs() < 1e-3);
            assert!(loss.error > last, "more dropped, more lost");
            last = loss.error;
        }
        // Negative control: leaving out the strongest half costs more than the weakest half.
        let strong =
            h.iter().map(|v| f64::from(*v).powi(2)).filter(|v| v.sqrt() >= found.dropped[0].threshold);
        let total: f64 = h.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((strong.sum::<f64>() / total).sqrt() > 1.5 * found.dropped[0].error);
    }
}
