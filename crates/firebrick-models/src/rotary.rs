//! Rotary positions: the angles of a pass, and how a context longer than the first one was reached.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// How rotary frequencies were changed for a longer context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All frequencies divided by one factor (arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original_max_tokens / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_tokens / high_freq_factor` stay.
        high_freq_factor: f64,
        /// The context before, in tokens.
        original_max_tokens: usize,
    },
}

impl RopeScaling {
    /// Whether frequencies are as the base says.
    pub fn is_none(&self) -> bool {
        *self == RopeScaling::None
    }

    /// What each of the `head_dim / 2` frequencies of base `theta` is divided by.
    pub fn divisors(&self, theta: f64, head_dim: usize) -> Vec<f64> {
        let frequencies = (0..head_dim / 2).map(|j| frequency(theta, head_dim, j));
        match *self {
            RopeScaling::None => vec![1.0; head_dim / 2],
            RopeScaling::Linear { factor } => vec![factor; head_dim / 2],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_tokens } => {
                let turns = |f: f64| original_max_tokens as f64 * f / std::f64::consts::TAU;
                let divisor = |f| {
                    let kept = (turns(f) - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = kept.clamp(0.0, 1.0);
                    1.0 / ((1.0 - kept) / factor + kept)
                };
                frequencies.map(divisor).collect()
            }
        }
    }

    /// The Llama 3 scaling that has these divisors, as GGUF's `rope_freqs.weight` gives them; `original_max_tokens` is
    /// 8192 in every published model, as the two factors are 1 and 4.
    pub(crate) fn from_divisors(
        divisors: &[f32],
        theta: f64,
        head_dim: usize,
        original_max_tokens: usize,
    ) -> Option<Self> {
        let factor = f64::from(divisors.iter().copied().fold(0.0, f32::max));
        let scaling =
            RopeScaling::Llama3 { factor, low_freq_factor: LOW, high_freq_factor: HIGH, original_max_tokens };
        let expected = scaling.divisors(theta, head_dim);
        let near = |(a, b): (&f32, &f64)| (f64::from(*a) / b - 1.0).abs() < 1e-4;
        let same = divisors.len() == expected.len() && divisors.iter().zip(&expected).all(near);
        (same && scaling.problem().is_none()).then_some(scaling)
    }

    /// Whether [`RopeScaling::from_divisors`] finds these settings again.
    pub(crate) fn follows_from_divisors(&self, theta: f64, head_dim: usize) -> bool {
        let RopeScaling::Llama3 { original_max_tokens, .. } = *self else { return false };
        let divisors: Vec<f32> = self.divisors(theta, head_dim).iter().map(|d| *d as f32).collect();
        RopeScaling::from_divisors(&divisors, theta, head_dim, original_max_tokens).is_some()
    }

    /// Why this can't be meant.
    pub(crate) fn problem(&self) -> Option<String> {
        let good = |factor: f64| factor.is_finite() && factor >= 1.0;
        match *self {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => {
                (!good(factor)).then(|| format!("rotary `factor` is {factor}; it should be at least 1"))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_tokens } => {
                let ordered = low_freq_factor > 0.0 && low_freq_factor < high_freq_factor;
                let fits = good(factor) && ordered && high_freq_factor.is_finite() && original_max_tokens > 0;
                (!fits).then(|| {
                    format!(
                        "rotary scaling with `factor` {factor}, `low_freq_factor` {low_freq_factor}, `high_freq_factor` \
                         {high_freq_factor} and `original_max_position_embeddings` {original_max_tokens} can't be meant"
                    )
                })
            }
        }
    }
}

const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;

/// Frequency `j` of `head_dim / 2`, in radians per token.
fn frequency(theta: f64, head_dim: usize, j: usize) -> f64 {
    theta.powf(-2.0 * j as f64 / head_dim as f64)
}

/// Cosines and sines of the rotary positions of one pass, each `[positions, head_dim / 2]`.
pub(crate) struct Rotary {
    pub cos: Tensor<2>,
    pub sin: Tensor<2>,
}

impl Rotary {
    /// A row for each of `positions`.
    pub fn new(
        theta: f64,
        scaling: RopeScaling,
        head_dim: usize,
        positions: &[usize],
        device: &Device,
    ) -> Self {
        let half = head_dim / 2;
        let divisors = scaling.divisors(theta, head_dim);
        let frequencies: Vec<f64> = (0..half).map(|j| frequency(theta, head_dim, j) / divisors[j]).collect();
        let first = positions.iter().copied().min().unwrap_or(0);
        let count = positions.iter().copied().max().map_or(0, |last| last + 1 - first);
        let angle = |i: usize| (first + i / half) as f64 * frequencies[i % half];
        // Rows of several documents repeat their positions: each is computed once.
        let table = |f: fn(f64) -> f64| {
            let rows: Vec<f32> = (0..count * half).map(|i| f(angle(i)) as f32).collect();
            let row = |p: &usize| &rows[(p - first) * half..][..half];
            let values: Vec<f32> = positions.iter().flat_map(row).copied().collect();
            Tensor::<2>::from_data(TensorData::new(values, [positions.len(), half]), device)
        };
        Rotary { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_3_2: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_tokens: 8192,
    };

    #[test]
    fn llama_3_keeps_high_frequencies_and_divides_low_ones() {
        let divisors = LLAMA_3_2.divisors(500_000.0, 64);
        assert_eq!((divisors[0], divisors[31]), (1.0, 32.0));
        assert!(divisors.is_sorted() && divisors.iter().any(|d| (2.0..31.0).contains(d)));
        // Frequency 16 turns 8192 / (2 pi sqrt(500000)) = 1.843849 times: 0.281283 of it is kept.
        assert!((divisors[16] - 1.0 / (0.718_717 / 32.0 + 0.281_283)).abs() < 1e-4, "{}", divisors[16]);
        assert_eq!(RopeScaling::None.divisors(500_000.0, 64), vec![1.0; 32]);
        assert_eq!(RopeScaling::Linear { factor: 8.0 }.divisors(1e6, 8), vec![8.0; 4]);
    }

    #[test]
    fn settings_follow_from_the_divisors() {
        let divisors: Vec<f32> = LLAMA_3_2.divisors(500_000.0, 64).iter().map(|d| *d as f32).collect();
        let found = |original| RopeScaling::from_divisors(&divisors, 500_000.0, 64, original);
        assert_eq!(found(8192), Some(LLAMA_3_2));
        assert_eq!(found(4096), None, "control: another context");
        assert!(LLAMA_3_2.follows_from_divisors(500_000.0, 64));
        let other = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 2.0,
            high_freq_factor: 4.0,
            original_max_tokens: 8192,
        };
        assert!(!other.follows_from_divisors(500_000.0, 64), "GGUF has no place for other factors");
        assert!(
            LLAMA_3_2.follows_from_divisors(10.0, 4),
            "no frequency is low enough to change: factor 1 is the same"
        );
    }

    #[test]
    fn what_can_not_be_meant_is_said() {
        let llama = |factor, low, high, original| RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_tokens: original,
        };
        for bad in [
            llama(0.5, 1.0, 4.0, 8),
            llama(2.0, 4.0, 4.0, 8),
            llama(2.0, 0.0, 4.0, 8),
            llama(2.0, 1.0, 4.0, 0),
        ] {
            assert!(bad.problem().is_some(), "{bad:?}");
        }
        assert!(RopeScaling::Linear { factor: f64::NAN }.problem().is_some());
        assert!(LLAMA_3_2.problem().is_none() && RopeScaling::Linear { factor: 1.0 }.problem().is_none());
    }
}
