//! How much the loss minds an error in each output of each linear layer.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::Tensor;
use firebrick_core::{Brick, Progress, Run, Site, Task};
use firebrick_models::{Decoder, token_tensor};

use super::ProfileOptions;
use crate::AnalysisError;
use crate::sample::read;
use crate::weight_gradients::Probes;

/// For each linear layer and output `o`, `E[g_o^2]` over tokens: `g` is the gradient of the summed negative
/// log-likelihood of the text's own next tokens (the empirical Fisher diagonal of the layer's output, in nats^2).
///
/// One window at a time, the whole model forwards and backwards; no gradient of any weight is computed.
pub(super) fn measure(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    ids: &[u32],
    windows: &[Range<usize>],
    options: &ProfileOptions,
    progress: &dyn Progress,
) -> Result<BTreeMap<Site, Vec<f64>>, AnalysisError> {
    let sites = decoder.sites().block_linears();
    let device = decoder.device().autodiff();
    let skip = options.skipped();
    let tokens: usize = windows.iter().map(|w| w.len() - skip).sum();
    let mut sums: BTreeMap<Site, Tensor<1>> = BTreeMap::new();
    let mut task = Task::begin(progress, "gradients", Some(windows.len() as u64), "windows");
    for window in windows {
        let probes = Probes::new(&sites, false);
        let all: Vec<&dyn Brick> = bricks.iter().copied().chain([&probes as &dyn Brick]).collect();
        let nll = decoder.nll(token_tensor(&[&ids[window.clone()]], &device), &mut Run::new(&all));
        let gradients = nll.sum().backward();
        for probe in probes.into_seen() {
            let site = probe.site;
            let Some(g) = probe.zero.grad(&gradients) else { continue };
            let [batch, length, d_out] = g.dims();
            let g = g.narrow(1, skip, length - skip).reshape([batch * (length - skip), d_out]);
            let square = (g.clone() * g).sum_dim(0).reshape([d_out]);
            let sum = match sums.remove(&site) {
                Some(sum) => sum + square,
                None => square,
            };
            sums.insert(site, sum);
        }
        task.advance(1, "")?;
    }
    let mean = |(site, sum): (Site, Tensor<1>)| {
        Ok((site, read(site, sum)?.iter().map(|v| f64::from(*v) / tokens as f64).collect()))
    };
    sums.into_iter().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Int, TensorData};
    use firebrick_core::{Base, Part, Seed, Silent, SiteSet};
    use firebrick_models::DecoderConfig;

    /// Adds `by` to one output of one token.
    struct Nudge {
        sites: SiteSet,
        token: usize,
        output: usize,
        by: f32,
    }

    impl Brick for Nudge {
        fn sites(&self) -> &SiteSet {
            &self.sites
        }
        fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
            let y = base(x, run);
            let [_, tokens, d] = y.dims();
            let mut values = vec![0.0f32; tokens * d];
            values[self.token * d + self.output] = self.by;
            let nudge = Tensor::<3>::from_data(TensorData::new(values, [1, tokens, d]), &y.device());
            y + nudge
        }
    }

    #[test]
    fn squared_gradients_are_those_of_finite_differences() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
        });
        let device = Device::flex();
        let mut decoder =
            Decoder::random(DecoderConfig::from_hf(&config).unwrap(), Seed(1), &device).unwrap();
        for site in decoder.sites().block_linears().iter() {
            let weight = decoder.weight(site).unwrap() * 20.0;
            decoder = decoder.with_weight(site, weight);
        }
        let ids: Vec<u32> = (0..9).map(|i| (i * 7 + 3) % 20).collect();
        let options = ProfileOptions::default();
        let found = measure(&decoder, &[], &ids, std::slice::from_ref(&(0..9)), &options, &Silent).unwrap();
        assert_eq!(found.len(), 14);
        let loss = |site: Site, token: usize, output: usize, by: f32| -> f64 {
            let nudge = Nudge { sites: [site].into_iter().collect(), token, output, by };
            let tokens: Vec<i32> = ids.iter().map(|i| *i as i32).collect();
            let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, 9]), &device);
            let nll = decoder.nll(tokens, &mut Run::new(&[&nudge])).into_data();
            nll.try_into_vec_as::<f32>().unwrap().iter().map(|v| f64::from(*v)).sum()
        };
        let step = 1e-2;
        let mut shift = 0.0f64;
        for (layer, part, output) in [(1, Part::MlpDown, 3), (0, Part::AttnV, 2), (0, Part::MlpUp, 7)] {
            let site = Site::layer(layer, part);
            let slope = |t: usize| {
                (loss(site, t, output, step) - loss(site, t, output, -step)) / f64::from(2.0 * step)
            };
            let squares: Vec<f64> = (0..9).map(|t| slope(t).powi(2)).collect();
            let expected = squares[1..].iter().sum::<f64>() / 8.0;
            let value = found[&site][output];
            assert!((value / expected - 1.0).abs() < 0.03, "{site}: {value} {expected}");
            shift = shift.max((value / (squares.iter().sum::<f64>() / 9.0) - 1.0).abs());
        }
        assert!(shift > 0.05, "control: the first token would change a mean by {shift}");
    }
}
