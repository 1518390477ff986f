//! Auxiliary losses of routers, as values: the caller weighs them and adds them to the run.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::{Logits, Probs};

/// What the load of an expert is divided by; the two conventions differ by the factor `k`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxNorm {
    /// By the number of slots, `k` per token: balanced routing has loss 1 (DeepSeek, Megatron).
    #[default]
    PerSlot,
    /// By the number of tokens: balanced routing has loss `k` (Hugging Face).
    PerToken,
}

/// The balance loss `[1]` of the Switch transformer (arXiv 2101.03961), `E * sum_e f_e P_e`, of one layer.
///
/// `f_e` is the load of expert `e` (`counts`, the slots of each expert, has no gradient) and `P_e` its mean probability.
/// Losses of several layers are to be averaged: pooling their loads first lets opposite imbalances cancel.
///
/// # Panics
/// If there are not as many counts as experts.
pub fn switch_balance_loss(probs: &Probs, counts: &[usize], norm: AuxNorm) -> Tensor<1> {
    let probs = probs.tensor();
    let [tokens, experts] = probs.dims();
    assert_eq!(counts.len(), experts, "a count for every expert");
    let all = match norm {
        AuxNorm::PerSlot => counts.iter().sum(),
        AuxNorm::PerToken => tokens,
    };
    let loads: Vec<f32> = counts.iter().map(|&n| (n as f64 / all as f64) as f32).collect();
    let loads = Tensor::<2>::from_data(TensorData::new(loads, [1, experts]), &probs.device());
    (probs.mean_dim(0) * loads).sum() * experts as f64
}

/// The z-loss `[1]` of ST-MoE (arXiv 2202.08906), the mean squared log-sum-exp of a token's scores: it keeps scores small.
pub fn router_z_loss(logits: &Logits) -> Tensor<1> {
    let logits = logits.tensor();
    let most = logits.clone().detach().max_dim(1);
    let lse = (logits - most.clone()).exp().sum_dim(1).log() + most;
    lse.square().mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::Seed;

    fn logits(values: &[f32], experts: usize) -> Logits {
        let dims = [values.len() / experts, experts];
        let device = Device::flex().autodiff();
        Logits::new(Tensor::<2>::from_data(TensorData::new(values.to_vec(), dims), &device).require_grad())
    }

    /// Loss and gradient for the logits.
    fn with_gradient(logits: &Logits, loss: impl Fn(&Logits) -> Tensor<1>) -> (f64, Vec<f64>) {
        let loss = loss(logits);
        let value = loss.clone().into_scalar::<f32>() as f64;
        let gradient = logits.tensor().grad(&loss.backward()).unwrap();
        (value, gradient.into_data().iter::<f64>().collect())
    }

    fn softmax_rows(values: &[f32], experts: usize) -> Vec<f64> {
        let row = |row: &[f32]| {
            let powers: Vec<f64> = row.iter().map(|v| (*v as f64).exp()).collect();
            let sum: f64 = powers.iter().sum();
            powers.into_iter().map(move |p| p / sum)
        };
        values.chunks(experts).flat_map(row).collect()
    }

    #[test]
    fn balance_and_its_gradient_equal_the_closed_form() {
        let (experts, tokens, k) = (5, 12, 2);
        let values = Seed(4).normal("z", tokens * experts, 1.5);
        let counts = [9, 0, 4, 10, 1];
        for (norm, all) in [(AuxNorm::PerSlot, k * tokens), (AuxNorm::PerToken, tokens)] {
            let loss = |z: &Logits| switch_balance_loss(&z.probs(), &counts, norm);
            let (value, gradient) = with_gradient(&logits(&values, experts), loss);
            let p = softmax_rows(&values, experts);
            let f = counts.map(|n| n as f64 / all as f64);
            let mean = |e: usize| (0..tokens).map(|t| p[t * experts + e]).sum::<f64>() / tokens as f64;
            let want: f64 = (0..experts).map(|e| f[e] * mean(e)).sum::<f64>() * experts as f64;
            assert!((value - want).abs() < 1e-6, "{value} {want}");
            let mut ignoring_the_softmax: f64 = 0.0;
            for t in 0..tokens {
                let p = &p[t * experts..][..experts];
                let inner: f64 = (0..experts).map(|i| f[i] * p[i]).sum();
                for j in 0..experts {
                    let factor = experts as f64 / tokens as f64 * p[j];
                    let got = gradient[t * experts + j];
                    assert!((got - factor * (f[j] - inner)).abs() < 1e-6);
                    ignoring_the_softmax = ignoring_the_softmax.max((got - factor * f[j]).abs());
                }
            }
            assert!(ignoring_the_softmax > 1e-3);
        }
    }

    #[test]
    fn balanced_routing_has_loss_1_or_k_and_collapse_costs_e() {
        let even = logits(&[0.0; 24], 4).probs();
        let value = |probs: &Probs, counts: &[usize], norm| {
            switch_balance_loss(probs, counts, norm).into_scalar::<f32>() as f64
        };
        assert!((value(&even, &[3; 4], AuxNorm::PerSlot) - 1.0).abs() < 1e-6);
        assert!((value(&even, &[3; 4], AuxNorm::PerToken) - 2.0).abs() < 1e-6);
        let collapsed = logits(&[30.0, 0.0, 0.0, 0.0].repeat(6), 4).probs();
        assert!((value(&collapsed, &[6, 0, 0, 0], AuxNorm::PerSlot) - 4.0).abs() < 1e-6);
    }

    #[test]
    fn opposite_imbalances_cancel_only_when_layers_are_pooled() {
        let layer = |p: [f32; 2]| logits(&p.map(f32::ln).repeat(10), 2);
        let (one, other) = (layer([0.9, 0.1]), layer([0.1, 0.9]));
        let loss = |probs: &Probs, counts: &[usize]| {
            switch_balance_loss(probs, counts, AuxNorm::PerSlot).into_scalar::<f32>() as f64
        };
        let mean = (loss(&one.probs(), &[10, 0]) + loss(&other.probs(), &[0, 10])) / 2.0;
        assert!((mean - 1.8).abs() < 1e-6, "{mean}");
        let pooled = Logits::new(Tensor::cat(vec![one.tensor(), other.tensor()], 0));
        assert!((loss(&pooled.probs(), &[10, 10]) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn z_loss_and_its_gradient_equal_the_closed_form_and_large_scores_stay_finite() {
        let (experts, tokens) = (5, 7);
        let values = Seed(5).normal("z", tokens * experts, 2.0);
        let (value, gradient) = with_gradient(&logits(&values, experts), router_z_loss);
        let p = softmax_rows(&values, experts);
        let lse =
            |t: usize| values[t * experts..][..experts].iter().map(|v| (*v as f64).exp()).sum::<f64>().ln();
        let want = (0..tokens).map(|t| lse(t).powi(2)).sum::<f64>() / tokens as f64;
        assert!((value - want).abs() < 1e-5 * want);
        for i in 0..tokens * experts {
            let want = 2.0 / tokens as f64 * lse(i / experts) * p[i];
            assert!((gradient[i] - want).abs() < 1e-5, "{} {want}", gradient[i]);
        }
        let (value, gradient) = with_gradient(&logits(&[1e4, -1e4, 0.0], 3), router_z_loss);
        assert!((value - 1e8).abs() < 10.0 && gradient.iter().all(|g| g.is_finite()));
    }
}
