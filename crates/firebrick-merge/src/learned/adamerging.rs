//! AdaMerging (Yang et al. 2023, arXiv 2310.02575): merge coefficients that make the merged model sure of itself on text without
//! labels.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;
use firebrick_core::{Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{Batch, Mixture, Schedule, TrainConfig, TrainReport};

use super::composed::{Coefficients, Composed, Granularity, learn};
use crate::MergeError;

/// Settings of [`adamerging`]; the defaults are the paper's layer-wise form. AdaMerging++ is the same over vectors that are
/// [`trimmed`](super::TaskVector::trimmed) and [`elect`](super::elect)ed.
#[derive(Clone, Debug)]
pub struct AdaMergingConfig {
    /// [`Granularity::Task`] is the paper's task-wise form, [`Granularity::Tensor`] its layer-wise one.
    pub granularity: Granularity,
    /// What every coefficient is at first.
    pub start: f64,
    /// Steps, batches and the optimizer; a step has rows of all tasks.
    pub train: TrainConfig,
}

impl Default for AdaMergingConfig {
    fn default() -> Self {
        let train = TrainConfig {
            steps: 1000,
            batch: 16,
            learning_rate: 1e-3,
            schedule: Schedule::Constant,
            warmup: 0,
            weight_decay: 0.0,
            clip: None,
            ..TrainConfig::default()
        };
        AdaMergingConfig { granularity: Granularity::Tensor, start: 0.3, train }
    }
}

/// Learns the coefficients of `composed` on `data`, one source for each task, whose labels are not used: the loss is the mean
/// [`entropy`] of the predictions. The text is seen in learning, so what is measured on it afterwards is not held out.
///
/// # Errors
/// As [`learn`].
pub fn adamerging(
    composed: &Composed,
    config: &AdaMergingConfig,
    data: &Mixture<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    let start = composed.coefficients(config.granularity, config.start, 1, Seed(config.train.seed));
    let objective = &mut |decoder: &Decoder, batch: &Batch, _: Seed| entropy(decoder, batch);
    learn(composed, start, &config.train, data, objective, progress, resume)
}

/// The mean entropy `[1]` in nats of the predictions of the tokens to learn of a batch, from the whole distribution; holds
/// logits `[rows, window - 1, vocab]`.
pub fn entropy(decoder: &Decoder, batch: &Batch) -> Tensor<1> {
    let mut run = Run::default();
    if let Some(segments) = &batch.segments {
        run.insert(segments.clone());
    }
    let [rows, window] = batch.tokens.dims();
    let hidden = decoder.hidden(batch.tokens.clone(), &mut run).narrow(1, 0, window - 1);
    let logp = log_softmax(decoder.logits(hidden, &mut run), 2);
    let each = -(logp.clone().exp() * logp).sum_dim(2);
    batch.mean(each.reshape([rows, window - 1]))
}
