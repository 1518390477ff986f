//! How far the outputs of the models of a merge, and of what it gives, are from those of the base, on a text.

use std::fmt;

use burn::tensor::Device;
use firebrick_core::{Progress, Task};
use firebrick_train::eval::{ReferenceReport, compare};
use serde::Serialize;

use crate::in_memory::Which;
use crate::{Merge, MergeError};

/// Output drift on a text: measured, not predicted, with all weights in memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drift {
    /// What the others are compared with: the base model, or the first model where there is none.
    pub reference: String,
    /// Tokens of a window.
    pub window: usize,
    /// Each other model by name, `KL(reference || model)` in nats per token and what else there is to say.
    pub models: Vec<(String, ReferenceReport)>,
    /// The same of the model that the merge would write, rounded as it would be stored.
    pub merged: ReferenceReport,
}

impl Merge {
    /// Bytes that [`Merge::drift`] holds: the weights of two models in f32, beside logits and hidden states of a batch.
    pub fn drift_bytes(&self) -> u64 {
        2 * self.model_bytes()
    }

    /// Measures on the windows of `window` tokens of `ids`, `batch` at a time, how far each model and the merge itself (whatever its
    /// method) are from the base. Nothing is written; the reference and one other model are in memory at a time.
    ///
    /// # Errors
    /// [`MergeError::Settings`] with everything that keeps this from being a merge of whole decoders; as [`compare`]; cancellation.
    ///
    /// # Panics
    /// If `window` is under 2 or `batch` is 0.
    pub fn drift(
        &self,
        ids: &[u32],
        window: usize,
        batch: usize,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Drift, MergeError> {
        let problems = self.whole_problems();
        if !problems.is_empty() {
            return Err(MergeError::Settings { problems });
        }
        let at = self.reference();
        let sources = &self.plan.tensors[0].sources;
        let name = |i: usize| self.models[sources[i].model].reference.to_string();
        let mut task = Task::begin(progress, "drift", Some(sources.len() as u64), "models");
        let base = self.decoder(Which::Source(at), device)?;
        let mut from_base = |which: Which, note: &str| -> Result<ReferenceReport, MergeError> {
            let decoder = self.decoder(which, device)?;
            let report = compare(&decoder, &[], (&base, &[]), ids, window, batch, progress)?;
            task.advance(1, &format!("{note}: KL {:.4}", report.mean_kl))?;
            Ok(report)
        };
        let others = (0..sources.len()).filter(|i| *i != at);
        let models = others.map(|i| Ok((name(i), from_base(Which::Source(i), &name(i))?)));
        let models = models.collect::<Result<_, MergeError>>()?;
        let merged = from_base(Which::Result, "the merge")?;
        Ok(Drift { reference: name(at), window, models, merged })
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "output drift from {}, on {} tokens:", self.reference, self.merged.tokens)?;
        let merged = std::iter::once(("the merge", &self.merged));
        for (name, report) in self.models.iter().map(|(name, report)| (name.as_str(), report)).chain(merged) {
            writeln!(
                f,
                "  {name}: KL {:.5} nats a token, same likeliest token {:.2} %, perplexity ratio {:.4}",
                report.mean_kl,
                100.0 * report.top1_agreement,
                report.perplexity_ratio
            )?;
        }
        Ok(())
    }
}
