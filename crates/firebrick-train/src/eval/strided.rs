//! Perplexity by a sliding window: every token counts once, with more context than a cut text gives it.

use burn::module::Module;
use firebrick_core::{Brick, Progress, Task};
use firebrick_models::Decoder;

use super::score::{Row, check_ids, score};
use super::{EvalReport, mean_and_error};
use crate::TrainError;

/// Evaluates `decoder` with `bricks` on `ids` by windows of `window` tokens that begin `stride` apart, `batch` at a time
/// (transformers' documentation, "Perplexity of fixed-length models").
///
/// A window scores the tokens that no window before it holds, so every token but the first counts once: those of the
/// first window with what is there, all later ones given `window - stride` to `window - 1` tokens. The last window may be
/// shorter. With `stride = window` the first token of each window goes without, as in [`perplexity`](crate::perplexity).
/// The mean is over the scored tokens (the documentation's script weighs each window by one token too few).
///
/// `bytes` of text stand behind `ids`, 0 if unknown. The nats are summed in `f64`; the standard error is over windows, that of a
/// ratio of sums.
///
/// # Errors
/// If there are fewer than 2 ids or one of them has no embedding, a brick is trainable (pass `bricks.valid()`), the device fails, or
/// the run is cancelled.
///
/// # Panics
/// If `window` is under 2, `batch` is 0, or `stride` is not in `1..=window`.
pub fn strided_perplexity(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    ids: &[u32],
    bytes: usize,
    window: usize,
    stride: usize,
    batch: usize,
    progress: &dyn Progress,
) -> Result<EvalReport, TrainError> {
    assert!(window > 1 && batch > 0, "a window predicts at least one token, a batch has a window");
    assert!((1..=window).contains(&stride), "a stride of {stride} leaves tokens out, or goes nowhere");
    if ids.len() < 2 {
        return Err(TrainError::TooShort { tokens: ids.len(), window: 2 });
    }
    check_ids(ids, decoder)?;
    let windows = windows(ids, window, stride);
    let decoder = decoder.valid();
    let mut task = Task::begin(progress, "evaluate", Some(windows.len() as u64), "windows");
    let mut sums: Vec<(f64, usize)> = Vec::with_capacity(windows.len());
    for windows in windows.chunks(batch) {
        let nats = score(&decoder, bricks, windows)?;
        sums.extend(nats.iter().map(|w| (w.iter().sum::<f64>(), w.len())));
        let (nats, tokens) = total(&sums);
        task.advance(windows.len() as u64, &format!("perplexity {:.3}", (nats / tokens as f64).exp()))?;
    }
    Ok(report(&sums, ids.len(), bytes))
}

/// The windows, each scoring what those before it do not hold.
fn windows(ids: &[u32], window: usize, stride: usize) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    let mut seen = 0;
    for begin in (0..ids.len()).step_by(stride) {
        let end = ids.len().min(begin + window);
        let first = seen.max(begin + 1);
        if first < end {
            rows.push(Row { ids: &ids[begin..end], first: first - begin });
        }
        if end == ids.len() {
            break;
        }
        seen = end;
    }
    rows
}

fn total(sums: &[(f64, usize)]) -> (f64, usize) {
    sums.iter().fold((0.0, 0), |(nats, tokens), (n, t)| (nats + n, tokens + t))
}

/// The report from the nats and tokens of each window.
fn report(sums: &[(f64, usize)], ids: usize, bytes: usize) -> EvalReport {
    let (nats, tokens) = total(sums);
    let mean_nll = nats / tokens as f64;
    // Linearized: each window's distance from what its tokens would have at the mean, relative to the mean window.
    let size = tokens as f64 / sums.len() as f64;
    let distances: Vec<f64> = sums.iter().map(|&(n, t)| (n - mean_nll * t as f64) / size).collect();
    EvalReport {
        tokens: tokens as u64,
        windows: sums.len(),
        mean_nll,
        standard_error: mean_and_error(&distances).1,
        perplexity: mean_nll.exp(),
        bits_per_byte: (bytes > 0).then(|| mean_nll / std::f64::consts::LN_2 * ids as f64 / bytes as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (begin, first scored token, end) of each window.
    fn cut(n: u32, window: usize, stride: usize) -> Vec<(u32, u32, u32)> {
        let ids: Vec<u32> = (0..n).collect();
        let place = |r: &Row<'_>| (r.ids[0], r.ids[r.first], r.ids[r.ids.len() - 1] + 1);
        windows(&ids, window, stride).iter().map(place).collect()
    }

    #[test]
    fn every_token_is_scored_once_with_the_context_it_is_promised() {
        assert_eq!(cut(10, 4, 2), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]);
        assert_eq!(cut(9, 4, 3), [(0, 1, 4), (3, 4, 7), (6, 7, 9)]);
        assert_eq!(cut(3, 8, 2), [(0, 1, 3)]);
        for (n, window, stride) in [(57, 10, 1), (57, 10, 3), (57, 10, 9), (58, 10, 10), (10, 10, 5)] {
            let cuts = cut(n, window, stride);
            let scored: Vec<u32> = cuts.iter().flat_map(|&(_, first, end)| first..end).collect();
            let skipped = |t: &u32| stride == window && t.is_multiple_of(window as u32);
            assert_eq!(scored, (1..n).filter(|t| !skipped(t)).collect::<Vec<_>>(), "{window} {stride}");
            for (begin, first, end) in &cuts[1..] {
                assert!(first - begin >= (window - stride).max(1) as u32 && end - begin <= window as u32);
            }
        }
        // A window of one token has nothing to predict.
        assert_eq!(cut(9, 4, 4), [(0, 1, 4), (4, 5, 8)]);
    }

    #[test]
    fn the_report_weighs_windows_by_their_tokens() {
        let r = report(&[(4.0, 4), (4.0, 2), (9.0, 3)], 10, 20);
        assert_eq!((r.tokens, r.windows), (9, 3));
        assert!((r.mean_nll - 17.0 / 9.0).abs() < 1e-15);
        let squares: f64 = [4.0 - 4.0 * 17.0 / 9.0, 4.0 - 2.0 * 17.0 / 9.0, 9.0 - 3.0 * 17.0 / 9.0]
            .iter()
            .map(|d: &f64| d * d)
            .sum();
        assert!((r.standard_error.unwrap() - (1.5 * squares).sqrt() / 9.0).abs() < 1e-15);
        assert!((r.bits_per_byte.unwrap() - r.mean_nll / std::f64::consts::LN_2 / 2.0).abs() < 1e-15);
        assert_eq!(report(&[(4.0, 4)], 5, 0).standard_error, None);
    }
}
