//! How far a model is from a reference, token by token.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Progress, Run, Site, Task};
use firebrick_models::Decoder;
use firebrick_tensor::ops::{self, Divergence};
use serde::{Deserialize, Serialize};

use super::mean_and_error;
use super::score::{check_ids, read};
use crate::{TrainError, token_tensor};

/// Logits of each model held at a time.
const CHUNK: usize = 1 << 22;

/// A model beside a reference, on the same tokens (what llama.cpp's `--kl-divergence` reports).
///
/// Standard errors take the tokens as independent, as llama.cpp does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReferenceReport {
    /// Predicted tokens.
    pub tokens: u64,
    /// Mean of `KL(reference || model)` over tokens, in nats.
    pub mean_kl: f64,
    /// Standard error of the mean; none for a single token.
    pub mean_kl_standard_error: Option<f64>,
    /// Median, in nats.
    pub median_kl: f64,
    /// 99th percentile, in nats, linear between order statistics.
    pub p99_kl: f64,
    /// Largest, in nats.
    pub max_kl: f64,
    /// Share of tokens where both models find the same token likeliest.
    pub top1_agreement: f64,
    /// Standard error of the share.
    pub top1_agreement_standard_error: Option<f64>,
    /// Perplexity of the model.
    pub perplexity: f64,
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
    /// The first by the second.
    pub perplexity_ratio: f64,
    /// Standard error of the ratio, from the differences of the two models' nats token by token.
    pub perplexity_ratio_standard_error: Option<f64>,
    /// Root mean square of how much the probability of the text's token differs.
    pub rms_probability_change: f64,
}

/// Compares `decoder` with `bricks` to `reference` (a decoder with its bricks, on the same device) on non-overlapping windows of
/// `window` tokens of `ids`, `batch` at a time; an incomplete last window is dropped.
///
/// Both predict the same tokens as in [`perplexity`](crate::perplexity) (llama.cpp scores the second half of each window only). About 4
/// million logits of each model exist at a time, unless a brick sits at the head, which takes the logits of a batch.
///
/// # Errors
/// If the vocabularies differ in size, the ids do not fill one window or one of them has no embedding, a brick is trainable (pass
/// `bricks.valid()`), the device fails, or the run is cancelled.
///
/// # Panics
/// If `window` is under 2 or `batch` is 0.
pub fn compare(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    reference: (&Decoder, &[&dyn Brick]),
    ids: &[u32],
    window: usize,
    batch: usize,
    progress: &dyn Progress,
) -> Result<ReferenceReport, TrainError> {
    assert!(window > 1 && batch > 0, "a window predicts at least one token, a batch has a window");
    let (vocab, other) = (decoder.config().vocab, reference.0.config().vocab);
    if vocab != other {
        return Err(TrainError::Vocabularies { vocab, reference: other });
    }
    let windows: Vec<&[u32]> = ids.chunks_exact(window).collect();
    if windows.is_empty() {
        return Err(TrainError::TooShort { tokens: ids.len(), window });
    }
    check_ids(ids, decoder)?;
    let (decoder, reference, ref_bricks) = (decoder.valid(), reference.0.valid(), reference.1);
    let mut task = Task::begin(progress, "compare", Some(windows.len() as u64), "windows");
    let mut tokens = Tokens::default();
    for windows in windows.chunks(batch) {
        let model = Head::new(&decoder, bricks, windows);
        let teacher = Head::new(&reference, ref_bricks, windows);
        let targets: Vec<i32> = windows.iter().flat_map(|w| w[1..].iter().map(|&id| id as i32)).collect();
        tokens.extend(&model, &teacher, &targets, vocab)?;
        task.advance(windows.len() as u64, &format!("KL {:.4}", mean_and_error(&tokens.kl).0))?;
    }
    Ok(tokens.report())
}

/// The logits of a batch of windows, some rows at a time.
struct Head {
    /// Hidden states `[n, d_model]`, or logits `[n, vocab]` as the bricks at the head left them.
    rows: Tensor<2>,
    /// The head's weight `[d_model, vocab]`, if `rows` are hidden states.
    weight: Option<Tensor<2>>,
}

impl Head {
    fn new(decoder: &Decoder, bricks: &[&dyn Brick], windows: &[&[u32]]) -> Self {
        let fed: Vec<&[u32]> = windows.iter().map(|w| &w[..w.len() - 1]).collect();
        let mut run = Run::new(bricks);
        let hidden = decoder.hidden(token_tensor(&fed, &decoder.device()), &mut run);
        let flat = |x: Tensor<3>| {
            let [rows, tokens, width] = x.dims();
            x.reshape([rows * tokens, width])
        };
        match run.is_bare(Site::global(Part::Head)) {
            true => Head { rows: flat(hidden), weight: Some(decoder.head_weight()) },
            false => Head { rows: flat(decoder.logits(hidden, &mut run)), weight: None },
        }
    }

    fn logits(&self, rows: &Range<usize>) -> Tensor<2> {
        let rows = self.rows.clone().narrow(0, rows.start, rows.len());
        match &self.weight {
            Some(weight) => rows.matmul(weight.clone()),
            None => rows,
        }
    }
}

/// What is kept of every token.
#[derive(Default)]
struct Tokens {
    kl: Vec<f64>,
    agree: Vec<f64>,
    nats: Vec<f64>,
    reference_nats: Vec<f64>,
}

impl Tokens {
    fn extend(
        &mut self,
        model: &Head,
        reference: &Head,
        targets: &[i32],
        vocab: usize,
    ) -> Result<(), TrainError> {
        let step = (CHUNK / vocab.max(1)).max(1);
        let mut parts = Vec::new();
        for start in (0..targets.len()).step_by(step) {
            let rows = start..targets.len().min(start + step);
            let data = TensorData::new(targets[rows.clone()].to_vec(), [rows.len()]);
            let (model, reference) = (model.logits(&rows), reference.logits(&rows));
            let targets = Tensor::<1, Int>::from_data(data, &model.device());
            let agree = model.clone().argmax(1).equal(reference.clone().argmax(1)).float();
            let column = |x: Tensor<1>| x.reshape([rows.len(), 1]);
            let nats = |logits: &Tensor<2>| column(ops::cross_entropy(logits.clone(), targets.clone()));
            let (model_nats, reference_nats) = (nats(&model), nats(&reference));
            let kl = column(ops::kl(model, reference, 1.0, Divergence::ForwardKl));
            // All are [rows, 1]: one read-back for the batch.
            parts.push(Tensor::cat(vec![kl, agree, model_nats, reference_nats], 1));
        }
        for row in read(Tensor::cat(parts, 0))?.chunks_exact(4) {
            self.kl.push(row[0]);
            self.agree.push(row[1]);
            self.nats.push(row[2]);
            self.reference_nats.push(row[3]);
        }
        Ok(())
    }

    fn report(mut self) -> ReferenceReport {
        let (mean_kl, mean_kl_standard_error) = mean_and_error(&self.kl);
        self.kl.sort_by(f64::total_cmp);
        let (top1_agreement, top1_agreement_standard_error) = mean_and_error(&self.agree);
        let pairs = || self.nats.iter().zip(&self.reference_nats);
        let differences: Vec<f64> = pairs().map(|(q, p)| q - p).collect();
        let (log_ratio, error) = mean_and_error(&differences);
        let squares: Vec<f64> = pairs().map(|(q, p)| ((-q).exp() - (-p).exp()).powi(2)).collect();
        ReferenceReport {
            tokens: self.kl.len() as u64,
            mean_kl,
            mean_kl_standard_error,
            median_kl: quantile(&self.kl, 0.5),
            p99_kl: quantile(&self.kl, 0.99),
            max_kl: quantile(&self.kl, 1.0),
            top1_agreement,
            top1_agreement_standard_error,
            perplexity: mean_and_error(&self.nats).0.exp(),
            reference_perplexity: mean_and_error(&self.reference_nats).0.exp(),
            perplexity_ratio: log_ratio.exp(),
            perplexity_ratio_standard_error: error.map(|e| log_ratio.exp() * e),
            rms_probability_change: mean_and_error(&squares).0.sqrt(),
        }
    }
}

/// The quantile `share` of sorted values, linear between neighbours (numpy's and llama.cpp's).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let low = place as usize;
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + (place - low as f64) * (sorted[high] - sorted[low])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_numpys() {
        let sorted = [0.0, 1.0, 4.0, 10.0];
        assert_eq!(quantile(&sorted, 0.5), 2.5);
        assert!((quantile(&sorted, 0.99) - 9.82).abs() < 1e-12);
        assert_eq!(
            (quantile(&sorted, 0.0), quantile(&sorted, 1.0), quantile(&[3.0], 0.99)),
            (0.0, 10.0, 3.0)
        );
    }

    #[test]
    fn the_report_follows_its_definitions() {
        let tokens = Tokens {
            kl: vec![0.3, 0.1, 0.2],
            agree: vec![1.0, 0.0, 1.0],
            nats: vec![1.0, 2.0, 4.0],
            reference_nats: vec![1.0, 1.0, 2.0],
        };
        let r = tokens.report();
        assert!((r.mean_kl - 0.2).abs() < 1e-15 && (r.median_kl, r.max_kl) == (0.2, 0.3));
        assert!((r.top1_agreement - 2.0 / 3.0).abs() < 1e-15);
        assert!((r.perplexity.ln() - 7.0 / 3.0).abs() < 1e-12);
        assert!((r.perplexity_ratio - 1f64.exp()).abs() < 1e-12);
        // Differences 0, 1, 2: deviation 1, so the error of the log is 1 / sqrt(3).
        assert!((r.perplexity_ratio_standard_error.unwrap() - 1f64.exp() / 3f64.sqrt()).abs() < 1e-12);
        let change: f64 = [0.0, (-2f64).exp() - (-1f64).exp(), (-4f64).exp() - (-2f64).exp()]
            .iter()
            .map(|d: &f64| d * d / 3.0)
            .sum();
        assert!((r.rms_probability_change - change.sqrt()).abs() < 1e-15);
    }
}
