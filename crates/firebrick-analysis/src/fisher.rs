//! The diagonal of the Fisher information of linear weights: how much the loss minds a change of each.

use std::collections::BTreeMap;

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor, TensorData};
use firebrick_core::{Progress, Run, Seed, Site, SiteSet, Task};
use firebrick_models::{Decoder, token_tensor};
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::sample::{read, spread};
use crate::stats::Estimate;
use crate::weight_gradients::weight_gradients;

/// Probabilities held at a time.
const CHUNK: usize = 1 << 22;

/// Whose next tokens the gradients are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Labels {
    /// Drawn from the model's own predictions: the Fisher information proper, the curvature of the loss at the model.
    #[default]
    Model,
    /// The text's: the empirical Fisher, another quantity (Kunstner et al. 2019, arXiv:1905.12558).
    Text,
}

/// Where the Fisher information is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct FisherOptions {
    /// Tokens per window; each is a text of its own.
    pub window: usize,
    /// At most so many windows, spread over the text.
    pub windows: usize,
    /// Whose next tokens.
    pub labels: Labels,
    /// Seed of the draws of [`Labels::Model`].
    pub seed: Seed,
}

impl Default for FisherOptions {
    fn default() -> Self {
        FisherOptions { window: 256, windows: 4, labels: Labels::default(), seed: Seed(0) }
    }
}

/// The trace of one layer's Fisher information.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FisherProfile {
    /// The linear layer.
    pub site: Site,
    /// Number of weights.
    pub parameters: u64,
    /// Sum over weights of `E[g^2]` per token, in nats^2; the error is that over windows.
    pub trace: Estimate,
}

/// The trace of the Fisher information of each of `sites`.
///
/// # Errors
/// See [`fisher_diagonal`].
pub fn fisher_traces(
    decoder: &Decoder,
    ids: &[u32],
    sites: &SiteSet,
    options: &FisherOptions,
    progress: &dyn Progress,
) -> Result<Vec<FisherProfile>, AnalysisError> {
    let mut found: BTreeMap<Site, (u64, Vec<Vec<f64>>)> = BTreeMap::new();
    each_window(decoder, ids, sites, options, progress, &mut |site, gradient, tokens| {
        let [d_out, d_in] = gradient.dims();
        let squares = (gradient.clone() * gradient).sum_dim(1);
        let sum: f64 = read(site, squares)?.iter().map(|v| f64::from(*v)).sum();
        let entry = found.entry(site).or_insert_with(|| ((d_out * d_in) as u64, Vec::new()));
        entry.1.push(vec![sum / tokens as f64]);
        Ok(())
    })?;
    let profile = |(site, (parameters, windows)): (Site, (u64, Vec<Vec<f64>>))| {
        let trace = Estimate::of(&windows);
        match trace.mean.is_finite() {
            true => Ok(FisherProfile { site, parameters, trace }),
            false => Err(AnalysisError::Site { site, what: "its gradient is not finite".into() }),
        }
    };
    found.into_iter().map(profile).collect()
}

/// The diagonal of the Fisher information of each of `sites`, `[d_out, d_in]`: for each weight `E[g^2]` per token in nats^2, `g` the
/// gradient of a window's summed negative log-likelihood.
///
/// One window at a time, forwards and backwards. With [`Labels::Model`] the labels of a window's tokens are independent, so that the
/// square of the sum has no cross terms on average; squaring the mean over several texts would lose all but one of them.
/// Memory: the sites' weights once more.
///
/// # Errors
/// Too short a text, and [`AnalysisError::Cancelled`].
pub fn fisher_diagonal(
    decoder: &Decoder,
    ids: &[u32],
    sites: &SiteSet,
    options: &FisherOptions,
    progress: &dyn Progress,
) -> Result<BTreeMap<Site, Tensor<2>>, AnalysisError> {
    let mut sums: BTreeMap<Site, Tensor<2>> = BTreeMap::new();
    let all = each_window(decoder, ids, sites, options, progress, &mut |site, gradient, _| {
        let square = gradient.clone() * gradient;
        let sum = match sums.remove(&site) {
            Some(sum) => sum + square,
            None => square,
        };
        sums.insert(site, sum);
        Ok(())
    })?;
    Ok(sums.into_iter().map(|(site, sum)| (site, sum / all as f64)).collect())
}

/// What is done with the gradient `[d_out, d_in]` of a window of so many predicted tokens.
type Visit<'a> = dyn FnMut(Site, Tensor<2>, usize) -> Result<(), AnalysisError> + 'a;

/// The number of predicted tokens of all windows.
fn each_window(
    decoder: &Decoder,
    ids: &[u32],
    sites: &SiteSet,
    options: &FisherOptions,
    progress: &dyn Progress,
    visit: &mut Visit<'_>,
) -> Result<usize, AnalysisError> {
    let window = options.window.min(ids.len());
    if window < 2 || options.windows == 0 {
        return Err(AnalysisError::TooFewTokens { have: window, need: 2 });
    }
    let chosen = spread(0, ids.len() / window, options.windows);
    let all = chosen.len() * (window - 1);
    let mut task = Task::begin(progress, "fisher", Some(chosen.len() as u64), "windows");
    let device = decoder.device();
    for at in chosen {
        let text = &ids[at * window..(at + 1) * window];
        let labels: Vec<i32> = match options.labels {
            Labels::Text => text[1..].iter().map(|id| *id as i32).collect(),
            Labels::Model => {
                let hidden = decoder.hidden(token_tensor(&[text], &device), &mut Run::default());
                let hidden = hidden.squeeze_dim::<2>(0).narrow(0, 0, window - 1);
                let draws = options.seed.uniform(&format!("fisher/labels/{at}"), window - 1, 0.5);
                draw(decoder, hidden, &draws)?
            }
        };
        let loss = |hidden: Tensor<3>| {
            let hidden = hidden.narrow(1, 0, window - 1);
            let labels =
                Tensor::<1, Int>::from_data(TensorData::new(labels.clone(), [window - 1]), &hidden.device());
            decoder.cross_entropy(hidden, labels, &mut Run::default()).sum()
        };
        let tokens = token_tensor(&[text], &device.clone().autodiff());
        for (site, gradient) in weight_gradients(decoder, tokens, sites, &loss) {
            visit(site, gradient, window - 1)?;
        }
        task.advance(1, "")?;
    }
    Ok(all)
}

/// One label for each row of `hidden: [tokens, d_model]` from its prediction, `draws` uniform over `-0.5..0.5`.
fn draw(decoder: &Decoder, hidden: Tensor<2>, draws: &[f32]) -> Result<Vec<i32>, AnalysisError> {
    let (n, vocab) = (draws.len(), decoder.config().vocab);
    let step = (CHUNK / vocab.max(1)).max(1);
    let mut labels = Vec::with_capacity(n);
    for from in (0..n).step_by(step) {
        let rows = step.min(n - from);
        let hidden = hidden.clone().narrow(0, from, rows).unsqueeze_dim::<3>(0);
        let logits = decoder.logits(hidden, &mut Run::default()).squeeze_dim::<2>(0);
        let below = softmax(logits, 1).cumsum(1);
        let points: Vec<f32> = draws[from..from + rows].iter().map(|u| u + 0.5).collect();
        let points = Tensor::<2>::from_data(TensorData::new(points, [rows, 1]), &below.device());
        let count = below.lower_equal(points.expand([rows, vocab])).float().sum_dim(1);
        let site = Site::global(firebrick_core::Part::Head);
        // The last sum may stay below 1 by rounding.
        labels.extend(read(site, count)?.iter().map(|v| (*v as i32).clamp(0, vocab as i32 - 1)));
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::{Part, Silent};
    use firebrick_models::DecoderConfig;

    const VOCAB: usize = 12;

    fn decoder() -> Decoder {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
        });
        let device = Device::flex();
        let mut decoder =
            Decoder::random(DecoderConfig::from_hf(&config).unwrap(), Seed(1), &device).unwrap();
        for site in decoder.sites().block_linears().iter() {
            let weight = decoder.weight(site).unwrap() * 20.0;
            decoder = decoder.with_weight(site, weight);
        }
        decoder
    }

    fn host(x: Tensor<2>) -> Vec<f64> {
        x.into_data().try_into_vec_as::<f32>().unwrap().iter().map(|v| f64::from(*v)).collect()
    }

    /// The gradient of `-log p(label)` at one position.
    fn one(decoder: &Decoder, ids: &[u32], site: Site, position: usize, label: usize) -> Vec<f64> {
        let tokens = token_tensor(&[ids], &decoder.device().autodiff());
        let sites = [site].into_iter().collect();
        let found = weight_gradients(decoder, tokens, &sites, &|hidden| {
            let label = Tensor::<1, Int>::from_ints([label as i32], &hidden.device());
            decoder.cross_entropy(hidden.narrow(1, position, 1), label, &mut Run::default()).sum()
        });
        host(found.into_iter().next().unwrap().1)
    }

    #[test]
    fn sampled_labels_give_the_fisher_information_and_the_text_does_not() {
        let decoder = decoder();
        let ids: Vec<u32> = (0..6).map(|i| (i * 5 + 2) % VOCAB as u32).collect();
        let site = Site::layer(1, Part::MlpUp);
        let sites: SiteSet = [site].into_iter().collect();
        let logits = decoder.forward(token_tensor(&[&ids], &Device::flex()), &mut Run::default());
        let probs = host(softmax(logits, 2).squeeze_dim::<2>(0));
        // Every label at every position, weighted by its probability.
        let mut exact = vec![0.0; 96];
        for position in 0..5 {
            for label in 0..VOCAB {
                let p = probs[position * VOCAB + label];
                let g = one(&decoder, &ids, site, position, label);
                exact.iter_mut().zip(&g).for_each(|(e, g)| *e += p * g * g / 5.0);
            }
        }
        let expected: f64 = exact.iter().sum();
        let options = |labels, seed| FisherOptions { window: 6, windows: 1, labels, seed: Seed(seed) };
        let draws = 300;
        let traces: Vec<f64> = (0..draws)
            .map(|seed| {
                let o = options(Labels::Model, seed);
                fisher_traces(&decoder, &ids, &sites, &o, &Silent).unwrap()[0].trace.mean
            })
            .collect();
        let mean = traces.iter().sum::<f64>() / draws as f64;
        let variance = traces.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (draws - 1) as f64;
        let error = (variance / draws as f64).sqrt();
        assert!((mean - expected).abs() < 3.0 * error, "{mean} {expected} +- {error}");
        assert!(error < 0.1 * expected);
        let text = fisher_traces(&decoder, &ids, &sites, &options(Labels::Text, 0), &Silent).unwrap();
        assert!(
            (text[0].trace.mean - expected).abs() > 5.0 * error,
            "control: {} {expected}",
            text[0].trace.mean
        );
    }

    #[test]
    fn the_diagonal_is_the_squared_gradient_of_each_window() {
        let decoder = decoder();
        let ids: Vec<u32> = (0..14).map(|i| (i * 7 + 3) % VOCAB as u32).collect();
        let sites = decoder.sites().block_linears();
        let options =
            FisherOptions { window: 7, windows: 2, labels: Labels::Text, ..FisherOptions::default() };
        let found = fisher_diagonal(&decoder, &ids, &sites, &options, &Silent).unwrap();
        assert_eq!(found.len(), 14);
        let traces = fisher_traces(&decoder, &ids, &sites, &options, &Silent).unwrap();
        for profile in &traces {
            let diagonal = host(found[&profile.site].clone());
            assert_eq!(diagonal.len() as u64, profile.parameters);
            let sum: f64 = diagonal.iter().sum();
            assert!((sum / profile.trace.mean - 1.0).abs() < 1e-5, "{}", profile.site);
        }
        // By finite differences of the summed loss of each window.
        let site = Site::layer(0, Part::AttnV);
        let weight = decoder.weight(site).unwrap();
        let [rows, cols] = weight.dims();
        let loss = |at: usize, by: f32, window: &[u32]| -> f64 {
            let mut nudge = vec![0.0f32; rows * cols];
            nudge[at] = by;
            let nudge = Tensor::<2>::from_data(TensorData::new(nudge, [rows, cols]), &Device::flex());
            let nudged = decoder.clone().with_weight(site, weight.clone() + nudge);
            let nll = nudged.nll(token_tensor(&[window], &Device::flex()), &mut Run::default());
            host(nll).iter().sum()
        };
        let diagonal = host(found[&site].clone());
        let mut apart = 0.0f64;
        for at in [0, 5, 17, 30] {
            let slope = |w: &[u32]| (loss(at, 1e-2, w) - loss(at, -1e-2, w)) / 2e-2;
            let (a, b) = (slope(&ids[..7]), slope(&ids[7..]));
            let expected = (a * a + b * b) / 12.0;
            assert!((diagonal[at] - expected).abs() < 0.03 * expected + 1e-6, "{} {expected}", diagonal[at]);
            apart = apart.max(((a + b).powi(2) / 24.0 / expected - 1.0).abs());
        }
        assert!(apart > 0.2, "control: the square of the mean gradient is another number");
    }

    #[test]
    fn labels_are_drawn_as_predicted() {
        let decoder = decoder();
        let hidden =
            Tensor::<2>::from_data(TensorData::new(Seed(3).normal("h", 8, 30.0), [1, 8]), &Device::flex());
        let probs = host(softmax(
            decoder.logits(hidden.clone().unsqueeze_dim::<3>(0), &mut Run::default()).squeeze_dim::<2>(0),
            1,
        ));
        let n = 4000;
        let many = hidden.expand([n, 8]);
        let labels = draw(&decoder, many, &Seed(4).uniform("u", n, 0.5)).unwrap();
        for (label, p) in probs.iter().enumerate() {
            let share = labels.iter().filter(|l| **l == label as i32).count() as f64 / n as f64;
            assert!(
                (share - p).abs() < 4.0 * (p * (1.0 - p) / n as f64).sqrt() + 1e-9,
                "{label}: {share} {p}"
            );
        }
        let uneven = probs.iter().copied().fold(0.0, f64::max);
        assert!(uneven > 2.0 / VOCAB as f64, "control: uniform draws would not pass: {probs:?}");
    }
}
