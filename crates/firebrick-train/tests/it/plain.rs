//! What evaluations should find, one sequence at a time and in `f64`.

use burn::tensor::Device;
use firebrick_core::Run;
use firebrick_models::Decoder;
use firebrick_train::token_tensor;

/// Log-probabilities of every next token after each token of `ids`, `[tokens][vocab]`.
pub fn log_probs(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f64>> {
    let logits = decoder.forward(token_tensor(&[ids], &Device::flex()), &mut Run::default());
    let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
    let row = |row: &[f64]| {
        let top = row.iter().copied().fold(f64::MIN, f64::max);
        let sum = top + row.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
        row.iter().map(|l| l - sum).collect()
    };
    logits.chunks_exact(decoder.config().vocab).map(row).collect()
}

/// Nats of the tokens of `ids` from `first` on.
pub fn nats(decoder: &Decoder, ids: &[u32], first: usize) -> Vec<f64> {
    let log_probs = log_probs(decoder, &ids[..ids.len() - 1]);
    (first..ids.len()).map(|j| -log_probs[j - 1][ids[j] as usize]).collect()
}
