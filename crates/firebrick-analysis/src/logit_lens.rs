//! The logit lens: what each layer would predict if it were the last (nostalgebraist 2020; prediction depth after Baldock et
//! al. 2021, arXiv:2106.09647).

use burn::tensor::{Int, Tensor, TensorData};
use firebrick_core::{Part, Progress, Run, Site, Task};
use firebrick_models::Decoder;
use firebrick_tensor::ops::{Divergence, cross_entropy, kl};
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::sample::read;

/// Logits held at a time.
const CHUNK: usize = 1 << 22;
/// Rows of what is kept per layer and token: nll, entropy, divergence, agreement.
const ROWS: usize = 4;

/// What every layer predicts through the last norm and the head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LogitLens {
    /// Tokens looked at.
    pub tokens: usize,
    /// Before the first layer, and after each.
    pub layers: Vec<LensLayer>,
    /// From how many layers on the most likely token stays what it finally is, averaged over tokens; 0 if the embedding
    /// already says so, the number of layers if only the last does.
    pub prediction_depth: f64,
}

/// Means over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LensLayer {
    /// Negative log-likelihood of the text's own next token, in nats.
    pub nll: f64,
    /// Entropy of the prediction, in nats.
    pub entropy: f64,
    /// Kullback-Leibler divergence of the prediction from the final one, `KL(final || here)`, in nats.
    pub kl: f64,
    /// Share of tokens whose most likely next token is the final one.
    pub agreement: f64,
}

/// Predicts from each of `streams`, the residual stream `[tokens, d_model]` of the same tokens before the first layer and
/// after each, in that order; `targets` are the tokens that follow.
///
/// Three times about 4 million logits exist at a time; the cost is `2 layers d_model vocab` operations a token.
///
/// # Errors
/// Numbers that are not finite, and [`AnalysisError::Cancelled`].
///
/// # Panics
/// If there are no streams, or not as many tokens as targets.
pub fn logit_lens(
    decoder: &Decoder,
    streams: &[Tensor<2>],
    targets: &[u32],
    progress: &dyn Progress,
) -> Result<LogitLens, AnalysisError> {
    let (last, n) = (streams.len() - 1, targets.len());
    assert!(streams.iter().all(|x| x.dims()[0] == n), "streams of as many tokens as there are targets");
    let step = (CHUNK / decoder.config().vocab.max(1)).max(1);
    let site = |layer: usize| match layer {
        0 => Site::global(Part::Embed),
        l => Site::layer(l - 1, Part::Block),
    };
    let predict = |x: &Tensor<2>, from: usize, rows: usize| -> Tensor<2> {
        let x = x.clone().narrow(0, from, rows).unsqueeze_dim::<3>(0);
        let x = decoder.final_norm(x, &mut Run::default());
        decoder.logits(x, &mut Run::default()).squeeze_dim::<2>(0)
    };
    // Divergences as ops of their own: see `kl` for what becomes of sums over long rows that are fused op by op.
    let divergence = |from: &Tensor<2>, to: &Tensor<2>| {
        kl(to.clone(), from.clone(), 1.0, Divergence::ForwardKl).unsqueeze_dim::<2>(1)
    };
    let most = (decoder.config().vocab as f64).ln();
    // By layer and row, token by token.
    let mut values = vec![vec![Vec::new(); ROWS]; streams.len()];
    let mut task = Task::begin(progress, "lens", Some(n as u64), "tokens");
    for from in (0..n).step_by(step) {
        let rows = step.min(n - from);
        let ids: Vec<i32> = targets[from..from + rows].iter().map(|id| *id as i32).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [rows]), &decoder.device());
        let target = predict(&streams[last], from, rows);
        let uniform = target.zeros_like();
        let best = target.clone().argmax(1);
        for (layer, x) in streams.iter().enumerate() {
            let here = if layer == last { target.clone() } else { predict(x, from, rows) };
            let nll = cross_entropy(here.clone(), ids.clone()).unsqueeze_dim::<2>(1);
            // What a divergence from even odds leaves of their entropy.
            let entropy = -(divergence(&here, &uniform) - most);
            let apart = divergence(&target, &here);
            let agreement = here.argmax(1).equal(best.clone()).float();
            let all = read(site(layer), Tensor::cat(vec![nll, entropy, apart, agreement], 1))?;
            if all.iter().any(|v| !v.is_finite()) {
                return Err(AnalysisError::Site {
                    site: site(layer),
                    what: "its logits are not finite".into(),
                });
            }
            for token in all.chunks(ROWS) {
                token.iter().enumerate().for_each(|(row, v)| values[layer][row].push(f64::from(*v)));
            }
        }
        task.advance(rows as u64, "")?;
    }
    let depth = |token: usize| (0..last).rev().take_while(|l| values[*l][3][token] > 0.0).count();
    let depths: f64 = (0..n).map(|token| (last - depth(token)) as f64).sum();
    let mean = |v: &Vec<f64>| crate::stats::mean(v);
    let layers = values.iter().map(|rows| LensLayer {
        nll: mean(&rows[0]),
        entropy: mean(&rows[1]),
        kl: mean(&rows[2]),
        agreement: mean(&rows[3]),
    });
    Ok(LogitLens { tokens: n, prediction_depth: depths / n.max(1) as f64, layers: layers.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::{Seed, Silent};
    use firebrick_models::{DecoderConfig, token_tensor};

    fn decoder() -> Decoder {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
        });
        let config = DecoderConfig::from_hf(&config).unwrap();
        let mut decoder = Decoder::random(config, Seed(4), &Device::flex()).unwrap();
        for site in decoder.sites().block_linears().iter() {
            let weight = decoder.weight(site).unwrap() * 12.0;
            decoder = decoder.with_weight(site, weight);
        }
        decoder
    }

    fn streams(decoder: &Decoder, ids: &[u32]) -> Vec<Tensor<2>> {
        let mut x = decoder.embed(token_tensor(&[ids], &Device::flex()), &mut Run::default());
        let mut all = vec![x.clone().squeeze_dim::<2>(0)];
        for layer in 0..decoder.sites().layers() {
            x = decoder.block(layer, x, &mut Run::default());
            all.push(x.clone().squeeze_dim::<2>(0));
        }
        let kept = ids.len() - 1;
        all.into_iter().map(|x| x.narrow(0, 0, kept)).collect()
    }

    #[test]
    fn the_last_layer_is_the_model() {
        let decoder = decoder();
        let ids: Vec<u32> = (0..33).map(|i| (i * 17 + 5) % 40).collect();
        let lens = logit_lens(&decoder, &streams(&decoder, &ids), &ids[1..], &Silent).unwrap();
        assert_eq!((lens.layers.len(), lens.tokens), (4, 32));
        let nll = decoder.nll(token_tensor(&[&ids], &Device::flex()), &mut Run::default());
        let nll = f64::from(nll.mean().into_scalar::<f32>());
        let end = lens.layers[3];
        assert!((end.nll - nll).abs() < 1e-5, "{end:?} {nll}");
        assert!(end.kl.abs() < 1e-6 && end.agreement == 1.0);
        // Negative control: no earlier layer is.
        for layer in &lens.layers[..3] {
            assert!(layer.kl > 1e-3 && layer.agreement < 1.0, "{layer:?}");
        }
        assert!(lens.prediction_depth > 0.0 && lens.prediction_depth <= 3.0);
    }

    #[test]
    fn every_layer_is_its_definition() {
        let decoder = decoder();
        let ids: Vec<u32> = (0..21).map(|i| (i * 11 + 2) % 40).collect();
        let streams = streams(&decoder, &ids);
        let lens = logit_lens(&decoder, &streams, &ids[1..], &Silent).unwrap();
        let host = |x: Tensor<2>| -> Vec<f64> {
            x.into_data().try_into_vec_as::<f32>().unwrap().iter().map(|v| f64::from(*v)).collect()
        };
        let gain = host(decoder.weight(Site::global(Part::Norm)).unwrap());
        let head = host(decoder.weight(Site::global(Part::Embed)).unwrap());
        let eps = decoder.config().norm_eps;
        let log_probs = |row: &[f64]| -> Vec<f64> {
            let scale = (row.iter().map(|v| v * v).sum::<f64>() / 16.0 + eps).sqrt();
            let x: Vec<f64> = row.iter().zip(&gain).map(|(v, g)| v / scale * g).collect();
            let logits: Vec<f64> =
                head.chunks(16).map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
            let z = logits.iter().map(|v| v.exp()).sum::<f64>().ln();
            logits.iter().map(|v| v - z).collect()
        };
        let best = |p: &[f64]| (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b])).unwrap();
        let all: Vec<Vec<Vec<f64>>> =
            streams.iter().map(|x| host(x.clone()).chunks(16).map(log_probs).collect()).collect();
        let mut depths = 0.0;
        for token in 0..20 {
            let finally = best(&all[3][token]);
            let first =
                (0..4).find(|l| all[*l..].iter().all(|layer| best(&layer[token]) == finally)).unwrap();
            depths += first as f64 / 20.0;
        }
        assert!((lens.prediction_depth - depths).abs() < 1e-12, "{} {depths}", lens.prediction_depth);
        for (layer, found) in all.iter().zip(&lens.layers) {
            let over = |f: &dyn Fn(usize) -> f64| (0..20).map(f).sum::<f64>() / 20.0;
            let nll = over(&|t| -layer[t][ids[t + 1] as usize]);
            let entropy = over(&|t| -layer[t].iter().map(|v| v.exp() * v).sum::<f64>());
            let kl = over(&|t| all[3][t].iter().zip(&layer[t]).map(|(p, q)| p.exp() * (p - q)).sum());
            for (a, b) in [(found.nll, nll), (found.entropy, entropy), (found.kl, kl)] {
                assert!((a - b).abs() < 1e-5, "{found:?} {nll} {entropy} {kl}");
            }
        }
    }
}
