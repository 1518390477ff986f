//! aTLAS (Zhang et al. 2024, arXiv 2407.02880): task vectors with a learned coefficient for each block of parameters.

use firebrick_core::{Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{Batch, Mixture, Rows, Schedule, TrainConfig, TrainReport};

use super::composed::{Coefficients, Composed, Granularity, learn};
use crate::MergeError;

/// Settings of [`atlas`] and [`atlas_negation`]; the defaults are the paper's for few examples.
#[derive(Clone, Debug)]
pub struct AtlasConfig {
    /// Which weights are a block.
    pub granularity: Granularity,
    /// `K` of "aTLAS x K": random classes into which the elements of each weight are split, with a coefficient each; 1 for none.
    pub parts: usize,
    /// Steps, batches and the optimizer.
    pub train: TrainConfig,
}

impl Default for AtlasConfig {
    fn default() -> Self {
        let train = TrainConfig {
            steps: 100,
            learning_rate: 0.1,
            schedule: Schedule::Cosine { floor: 0.0 },
            warmup: 0,
            weight_decay: 0.1,
            clip: Some(1.0),
            ..TrainConfig::default()
        };
        AtlasConfig { granularity: Granularity::Tensor, parts: 1, train }
    }
}

impl AtlasConfig {
    /// Zero coefficients: the base.
    fn start(&self, composed: &Composed) -> Coefficients {
        composed.coefficients(self.granularity, 0.0, self.parts, Seed(self.train.seed))
    }
}

/// Learns coefficients from 0 on labelled text: of several tasks whose vectors are added, or of few examples of a new one
/// that is composed of the vectors of others.
///
/// # Errors
/// As [`learn`].
pub fn atlas(
    composed: &Composed,
    config: &AtlasConfig,
    data: &Mixture<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    let objective = &mut |decoder: &Decoder, batch: &Batch, _: Seed| batch.nll(decoder, &mut Run::default());
    learn(composed, config.start(composed), &config.train, data, objective, progress, resume)
}

/// Learns coefficients that take the task of `target` away and leave that of `control` as it is: the loss is the negative
/// log-likelihood of `control` minus that of `target`, which has no lower bound, so that steps and weight decay are what ends it. A pass
/// has as many rows of `control` as of `target`.
///
/// # Errors
/// As [`learn`]; [`MergeError::Settings`] if `control` has rows of another length.
pub fn atlas_negation(
    composed: &Composed,
    config: &AtlasConfig,
    target: &Mixture<'_>,
    control: &Rows<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    if control.window() != config.train.window {
        let (window, rows) = (config.train.window, control.window());
        let problems = vec![format!("`window` is {window}, the control has rows of {rows}")];
        return Err(MergeError::Settings { problems });
    }
    let objective = &mut |decoder: &Decoder, batch: &Batch, seed: Seed| {
        let rows = seed.uniform("control", batch.tokens.dims()[0], 0.5);
        let count = control.count();
        let rows: Vec<usize> =
            rows.iter().map(|u| (((u + 0.5) * count as f32) as usize).min(count - 1)).collect();
        let kept = control.batch(&rows, &batch.tokens.device()).nll(decoder, &mut Run::default());
        kept - batch.nll(decoder, &mut Run::default())
    };
    learn(composed, config.start(composed), &config.train, target, objective, progress, resume)
}
