//! What a profile measures beside the residual stream.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A part of a profile that can be left out. Influence and update of every block and sublayer are always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Metric {
    /// Energies, effective ranks and what fewer bits or a lower rank cost each linear layer; plans need it.
    Linear,
    /// Entropy, sink and distance of attention heads.
    Attention,
    /// Sparsity of the neurons, and the groups they fall into.
    Sparsity,
    /// Alignment of every layer with every other.
    Similarity,
    /// What each layer would predict.
    Lens,
    /// Trace of the Fisher information of each linear layer: another pass, forwards and backwards.
    Fisher,
    /// Trace of the Hessian of each linear layer: a pair of passes for each random direction.
    Hessian,
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 7] = [
        Metric::Linear,
        Metric::Attention,
        Metric::Sparsity,
        Metric::Similarity,
        Metric::Lens,
        Metric::Fisher,
        Metric::Hessian,
    ];

    /// Those that the one calibration pass gives.
    pub fn one_pass() -> BTreeSet<Metric> {
        Self::ALL.into_iter().filter(|m| !matches!(m, Metric::Fisher | Metric::Hessian)).collect()
    }

    /// The name on command lines and in files.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Linear => "linear",
            Metric::Attention => "attention",
            Metric::Sparsity => "sparsity",
            Metric::Similarity => "similarity",
            Metric::Lens => "lens",
            Metric::Fisher => "fisher",
            Metric::Hessian => "hessian",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Metric {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Metric::name);
        let found = Self::ALL.into_iter().find(|m| m.name() == text);
        found.ok_or_else(|| format!("`{text}` is none of the metrics {}", names.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for metric in Metric::ALL {
            assert_eq!(metric.to_string().parse(), Ok(metric));
            assert_eq!(serde_json::to_string(&metric).unwrap(), format!("\"{metric}\""));
        }
        assert!("entropy".parse::<Metric>().unwrap_err().contains("linear, attention"));
        assert_eq!(Metric::one_pass().len(), 5);
    }
}
