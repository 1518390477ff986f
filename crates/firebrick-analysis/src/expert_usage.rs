//! Which experts a router uses: load, co-activation and entropy, from its choices alone (measures of OLMoE, arXiv:2409.02060).

use serde::{Deserialize, Serialize};

use crate::AnalysisError;

/// Counts the choices of one router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertUsage {
    experts: usize,
    top_k: usize,
    tokens: u64,
    counts: Vec<u64>,
    /// `[experts, experts]`: tokens that use both.
    together: Vec<u64>,
}

/// How one layer's experts were used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertProfile {
    /// The layer.
    pub layer: usize,
    /// Tokens routed; slots where only counts of slots are known.
    pub tokens: u64,
    /// Share of all slots that each expert served, or of all weight where experts are weighed and not chosen; sums to 1.
    pub load: Vec<f64>,
    /// Squared coefficient of variation of the loads: 0 if balanced, `experts - 1` if one serves all.
    pub variation: f64,
    /// `max load * experts - 1`: by how much the busiest expert is above its share.
    pub violation: f64,
    /// Entropy of the loads over `ln experts`: 1 if balanced, 0 if one serves all.
    pub entropy: f64,
    /// Experts with less than a tenth of their share.
    pub dead: Vec<usize>,
    /// `co_activation[i][j]`: of the tokens of expert `i`, the share that also uses `j`; empty where only counts are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub co_activation: Vec<Vec<f64>>,
}

impl ExpertUsage {
    /// For a router that sends each token to `top_k` of `experts`.
    pub fn new(experts: usize, top_k: usize) -> Self {
        ExpertUsage {
            experts,
            top_k,
            tokens: 0,
            counts: vec![0; experts],
            together: vec![0; experts * experts],
        }
    }

    /// Adds the choices of some tokens: `choices[token * top_k + rank]`, an expert at most once a token.
    ///
    /// # Errors
    /// [`AnalysisError::Options`] if they are no whole tokens, or an expert is out of range or comes twice at a token; then nothing is
    /// added.
    pub fn add(&mut self, choices: &[usize]) -> Result<(), AnalysisError> {
        let mut problems = Vec::new();
        if self.top_k == 0 || !choices.len().is_multiple_of(self.top_k) {
            problems.push(format!("{} choices of {} a token", choices.len(), self.top_k));
        }
        for (token, chosen) in choices.chunks(self.top_k.max(1)).enumerate() {
            if let Some(e) = chosen.iter().find(|e| **e >= self.experts) {
                problems.push(format!("token {token} uses expert {e} of {}", self.experts));
            }
            if (1..chosen.len()).any(|i| chosen[..i].contains(&chosen[i])) {
                problems.push(format!("token {token} uses an expert twice: {chosen:?}"));
            }
        }
        if !problems.is_empty() {
            return Err(AnalysisError::Options { problems });
        }
        for chosen in choices.chunks(self.top_k) {
            self.tokens += 1;
            for &i in chosen {
                self.counts[i] += 1;
                chosen.iter().for_each(|&j| self.together[i * self.experts + j] += 1);
            }
        }
        Ok(())
    }

    /// What was counted, as that of `layer`.
    pub fn profile(&self, layer: usize) -> ExpertProfile {
        let share = |i: usize, j: usize| match self.counts[i] {
            0 => 0.0,
            n => self.together[i * self.experts + j] as f64 / n as f64,
        };
        let rows = (0..self.experts).map(|i| (0..self.experts).map(|j| share(i, j)).collect());
        ExpertProfile {
            tokens: self.tokens,
            co_activation: rows.collect(),
            ..ExpertProfile::from_counts(layer, &self.counts)
        }
    }
}

impl ExpertProfile {
    /// From how many slots each expert served, without co-activation.
    pub fn from_counts(layer: usize, counts: &[u64]) -> Self {
        let weights: Vec<f64> = counts.iter().map(|c| *c as f64).collect();
        Self::from_weights(layer, counts.iter().sum(), &weights)
    }

    /// From the sum over `tokens` tokens of the weight that each expert got, such as the gates of adapters; without co-activation.
    pub fn from_weights(layer: usize, tokens: u64, weights: &[f64]) -> Self {
        let (total, n) = (weights.iter().sum::<f64>(), weights.len() as f64);
        let used = total > 0.0;
        let load: Vec<f64> = weights.iter().map(|w| if used { w / total } else { 0.0 }).collect();
        let squares: f64 = load.iter().map(|f| (f * n - 1.0).powi(2)).sum();
        let entropy: f64 = load.iter().filter(|f| **f > 0.0).map(|f| -f * f.ln()).sum();
        ExpertProfile {
            layer,
            tokens,
            variation: if used { squares / n } else { 0.0 },
            violation: if used { load.iter().copied().fold(0.0, f64::max) * n - 1.0 } else { 0.0 },
            entropy: if n > 1.0 { entropy / n.ln() } else { 0.0 },
            dead: (0..weights.len()).filter(|e| load[*e] < 0.1 / n).collect(),
            load,
            co_activation: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;
    use rand::Rng;

    #[test]
    fn balanced_and_collapsed_routers_are_at_the_ends() {
        let mut even = ExpertUsage::new(4, 2);
        even.add(&[0, 1, 2, 3, 1, 2, 3, 0]).unwrap();
        let even = even.profile(7);
        assert_eq!((even.layer, even.tokens, even.dead.len()), (7, 4, 0));
        assert!(
            (even.entropy - 1.0).abs() < 1e-12
                && even.variation.abs() < 1e-12
                && even.violation.abs() < 1e-12
        );
        assert_eq!(even.co_activation[0], [1.0, 0.5, 0.0, 0.5]);
        let mut one = ExpertUsage::new(4, 1);
        one.add(&[2; 9]).unwrap();
        let one = one.profile(0);
        assert_eq!((one.entropy, one.variation, one.violation), (0.0, 3.0, 3.0));
        assert_eq!((one.dead, one.load), (vec![0, 1, 3], vec![0.0, 0.0, 1.0, 0.0]));
        assert_eq!(one.co_activation[0], [0.0; 4], "an expert without tokens has no company");
        let gates = ExpertProfile::from_weights(1, 9, &[0.0, 0.0, 9.0, 0.0]);
        assert_eq!((gates.tokens, &gates.load, gates.entropy), (9, &vec![0.0, 0.0, 1.0, 0.0], 0.0));
        let soft = ExpertProfile::from_weights(1, 8, &[1.0, 3.0, 2.0, 2.0]);
        assert_eq!((soft.load.iter().sum::<f64>(), soft.violation), (1.0, 0.5));
        assert_eq!(soft, ExpertProfile::from_counts(1, &[1, 3, 2, 2]));
        let none = ExpertProfile::from_counts(0, &[0, 0]);
        assert_eq!((none.entropy, none.variation, none.violation), (0.0, 0.0, 0.0));
    }

    #[test]
    fn random_routers_are_nearly_balanced_and_pairs_independent() {
        let (experts, tokens) = (8, 20_000);
        let mut rng = Seed(3).stream("router");
        let mut usage = ExpertUsage::new(experts, 2);
        for _ in 0..tokens {
            let (a, b) = (rng.random_range(0..experts), rng.random_range(0..experts - 1));
            usage.add(&[a, b + usize::from(b >= a)]).unwrap();
        }
        let random = usage.profile(0);
        assert!(random.entropy > 0.9999 && random.variation < 1e-3);
        // Of the other seven, each comes along with 1/7 of the tokens.
        let pairs = (0..experts).flat_map(|i| (0..experts).filter(move |j| *j != i).map(move |j| (i, j)));
        assert!(pairs.into_iter().all(|(i, j)| (random.co_activation[i][j] - 1.0 / 7.0).abs() < 0.03));
        // Negative control: a router whose experts come in fixed pairs.
        let mut paired = ExpertUsage::new(experts, 2);
        (0..800).for_each(|t| paired.add(&[2 * (t % 4), 2 * (t % 4) + 1]).unwrap());
        let paired = paired.profile(0);
        assert!(paired.entropy > 0.9999, "its loads give nothing away");
        assert_eq!((paired.co_activation[0][1], paired.co_activation[0][2]), (1.0, 0.0));
    }

    #[test]
    fn wrong_choices_are_all_named_and_not_counted() {
        let mut usage = ExpertUsage::new(3, 2);
        let Err(AnalysisError::Options { problems }) = usage.add(&[0, 3, 1, 1, 2]) else {
            panic!("accepted")
        };
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert_eq!(usage, ExpertUsage::new(3, 2));
    }
}
