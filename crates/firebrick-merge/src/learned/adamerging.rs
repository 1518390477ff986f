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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learned::testing::{Family, WINDOW, decoder};
    use firebrick_core::Silent;
    use firebrick_train::{Average, Document, Rows};

    /// The entropies in nats of the rows of `logits`.
    fn entropies(logits: Tensor<3>) -> Vec<f64> {
        let vocab = logits.dims()[2];
        let values = logits.into_data().try_into_vec_as::<f32>().unwrap();
        let row = |row: &[f32]| {
            let exp: Vec<f64> = row.iter().map(|v| f64::from(*v).exp()).collect();
            let sum: f64 = exp.iter().sum();
            -exp.iter().map(|e| e / sum * (e / sum).ln()).sum::<f64>()
        };
        values.chunks(vocab).map(row).collect()
    }

    #[test]
    fn entropy_is_that_of_the_tokens_to_learn() {
        let model = decoder(false, 1);
        let document = |from: u32, learn: &[bool]| Document {
            ids: (0..learn.len() as u32).map(|i| (from + 3 * i) % 24).collect(),
            learn: learn.to_vec(),
            bytes: 0,
        };
        let documents = [document(1, &[false, true, true, false, true]), document(2, &[true, false, true])];
        let rows = Rows::pack(&documents, 8, 0, Average::Token).unwrap();
        let got = entropy(&model, &rows.batch(&[0], &model.device())).into_scalar::<f32>();
        let mut want = Vec::new();
        for document in &documents {
            let tokens = firebrick_models::token_tensor(&[&document.ids], &model.device());
            let each = entropies(model.forward(tokens, &mut Run::default()));
            want.extend((1..document.ids.len()).filter(|i| document.learn[*i]).map(|i| each[i - 1]));
        }
        let mean = want.iter().sum::<f64>() / want.len() as f64;
        assert_eq!(want.len(), 4);
        assert!((f64::from(got) - mean).abs() < 1e-5, "{got} {mean}");
    }

    #[test]
    fn learned_coefficients_close_more_of_the_gap() {
        let (mut task_wise, mut layer_wise) = (0.0, 0.0);
        for seed in 0..3 {
            let family = Family::new(seed);
            let (composed, data) = (family.composed(), family.mixture());
            let fixed =
                |scale| composed.merge(&composed.coefficients(Granularity::Task, scale, 1, Seed(0))).unwrap();
            let (average, arithmetic) =
                (family.gap_closed(&fixed(1.0 / 3.0)), family.gap_closed(&fixed(0.3)));
            let learned = |granularity| {
                let default = AdaMergingConfig::default();
                let train = TrainConfig {
                    steps: 60,
                    batch: 12,
                    window: WINDOW,
                    learning_rate: 1e-2,
                    ..default.train
                };
                let config = AdaMergingConfig { granularity, start: 0.3, train };
                let (c, report) = adamerging(&composed, &config, &data, &Silent, false).unwrap();
                (family.gap_closed(&composed.merge(&c).unwrap()), report)
            };
            let (task, _) = learned(Granularity::Task);
            let (layer, report) = learned(Granularity::Tensor);
            let (first, last) = (report.first_loss().unwrap(), report.final_loss().unwrap());
            assert!(last < 0.8 * first, "seed {seed}: entropy {first} {last}");
            assert!(task > f64::max(average, arithmetic) + 0.1, "seed {seed}: {task} {average} {arithmetic}");
            assert!(
                layer > f64::max(average, arithmetic) + 0.1,
                "seed {seed}: {layer} {average} {arithmetic}"
            );
            (task_wise, layer_wise) = (task_wise + task, layer_wise + layer);
        }
        assert!(layer_wise > task_wise, "on average over the seeds: {layer_wise} {task_wise}");
    }
}
