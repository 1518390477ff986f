//! What the stages find.

use std::path::{Path, PathBuf};

use firebrick_analysis::{Plans, Profile};
use serde::{Deserialize, Serialize};

/// Held-out perplexity of one variant on every domain, in the order of the domains; none where it was not measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variant {
    pub name: String,
    pub perplexity: Vec<Option<f64>>,
    /// Bytes of the linear layers' weights inside the blocks.
    pub bytes: Option<u64>,
}

/// One bit plan, tried out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TriedPlan {
    pub name: String,
    /// Bits per code.
    pub mean_bits: f64,
    /// Bytes of the blocks' linear layers in a GGUF file, which has 4-bit blocks for codes of 2 to 4 bits.
    pub file_bytes: u64,
    /// Mean over the domains of the nats per token.
    pub mean_nll: f64,
    pub perplexity: Vec<f64>,
}

/// How one adapter learned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Learned {
    pub first_loss: f64,
    pub final_loss: f64,
    pub losses: Vec<f64>,
    pub parameters: usize,
}

/// The router, after training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Routed {
    pub accuracy: f64,
}

/// The merged model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Merged {
    /// Weight of every task vector.
    pub weight: f64,
    /// Weight and mean nats per token of every candidate.
    pub tried: Vec<(f64, f64)>,
}

/// The student, after distillation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Student {
    pub dropped: Vec<String>,
    pub losses: Vec<f64>,
}

/// Everything the report shows.
pub struct Results {
    pub model: String,
    pub domains: Vec<String>,
    pub profile: Profile,
    pub ranks: Plans,
    pub bits: Plans,
    pub learned: Vec<Learned>,
    pub merged: Merged,
    pub routed: Routed,
    pub tried: Vec<TriedPlan>,
    pub student: Student,
    pub variants: Vec<Variant>,
}

/// What a finished run prints, and leaves as `summary.json`.
#[derive(Serialize, Deserialize)]
pub struct Summary {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    /// What the run was of.
    pub run: serde_json::Value,
    pub domains: Vec<String>,
    pub variants: Vec<Variant>,
    pub bit_plans: Vec<TriedPlan>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:24}", "held-out perplexity")?;
        for domain in &self.domains {
            write!(f, " {domain:>11.11}")?;
        }
        writeln!(f)?;
        for variant in &self.variants {
            write!(f, "{:24}", variant.name)?;
            for value in &variant.perplexity {
                match value {
                    Some(v) => write!(f, " {v:>11.3}")?,
                    None => write!(f, " {:>11}", "")?,
                }
            }
            writeln!(f)?;
        }
        let out = self.out.as_deref().unwrap_or(Path::new("."));
        write!(f, "report: {}", out.join("report.html").display())
    }
}
