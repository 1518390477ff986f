//! Perplexity of a decoder on a text.

use burn::module::Module;
use firebrick_core::{Brick, Progress, Run, Task};
use firebrick_models::Decoder;
use serde::{Deserialize, Serialize};

use super::mean_and_error;
use super::score::{check_ids, read};
use crate::{TrainError, token_tensor};

/// How well a decoder predicts a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Predicted tokens: all but the first of each window.
    pub tokens: u64,
    /// Windows.
    pub windows: usize,
    /// Mean negative log-likelihood per predicted token, in nats.
    pub mean_nll: f64,
    /// Standard error of the mean, over windows; none for a single window.
    pub standard_error: Option<f64>,
    /// `exp(mean_nll)`.
    pub perplexity: f64,
    /// Bits per byte of text: comparable between tokenizers. None if the number of bytes is unknown.
    pub bits_per_byte: Option<f64>,
}

/// Evaluates `decoder` with `bricks` on `ids`, which stand for `bytes` bytes of text (0 if unknown).
///
/// The ids are cut into non-overlapping windows of `window` tokens, each predicting its own tokens from the second on
/// (what transformers computes with `labels = input_ids`), `batch` at a time; an incomplete last window is
/// dropped. The nats are summed in `f64`. Bits per byte count every token of the text at the mean of those predicted.
///
/// # Errors
/// If the ids do not fill one window or one of them has no embedding, a brick is trainable (pass `bricks.valid()`), the device fails, or the run is
/// cancelled.
///
/// # Panics
/// If `window` is under 2 or `batch` is 0.
pub fn perplexity(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    ids: &[u32],
    bytes: usize,
    window: usize,
    batch: usize,
    progress: &dyn Progress,
) -> Result<EvalReport, TrainError> {
    assert!(window > 1 && batch > 0, "a window predicts at least one token, a batch has a window");
    let windows: Vec<&[u32]> = ids.chunks_exact(window).collect();
    if windows.is_empty() {
        return Err(TrainError::TooShort { tokens: ids.len(), window });
    }
    check_ids(ids, decoder)?;
    let decoder = decoder.valid();
    let device = decoder.device();
    let mut task = Task::begin(progress, "evaluate", Some(windows.len() as u64), "windows");
    let mut means = Vec::with_capacity(windows.len());
    for windows in windows.chunks(batch) {
        let values = read(decoder.nll(token_tensor(windows, &device), &mut Run::new(bricks)))?;
        means.extend(values.chunks_exact(window - 1).map(|w| w.iter().sum::<f64>() / w.len() as f64));
        let so_far = means.iter().sum::<f64>() / means.len() as f64;
        task.advance(windows.len() as u64, &format!("perplexity {:.3}", so_far.exp()))?;
    }
    Ok(report(&means, window, ids.len(), bytes))
}

/// The report from the mean nats of each window.
fn report(means: &[f64], window: usize, ids: usize, bytes: usize) -> EvalReport {
    let (mean_nll, standard_error) = mean_and_error(means);
    EvalReport {
        tokens: (means.len() * (window - 1)) as u64,
        windows: means.len(),
        mean_nll,
        standard_error,
        perplexity: mean_nll.exp(),
        bits_per_byte: (bytes > 0).then(|| mean_nll / std::f64::consts::LN_2 * ids as f64 / bytes as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_follows_its_definitions() {
        let r = report(&[1.0, 2.0, 3.0], 5, 17, 34);
        assert_eq!((r.tokens, r.windows, r.mean_nll), (12, 3, 2.0));
        assert_eq!(r.perplexity, 2f64.exp());
        assert!((r.standard_error.unwrap() - (1.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert!((r.bits_per_byte.unwrap() - 1.0 / std::f64::consts::LN_2).abs() < 1e-15);
        let single = report(&[1.0], 5, 5, 0);
        assert_eq!((single.standard_error, single.bits_per_byte), (None, None));
    }
}
