//! What the calibration pass collects beside second moments: inside a layer, and across layers.

use std::ops::Range;

use burn::tensor::Tensor;
use firebrick_core::{Brick, Part, Progress, SiteSet};
use firebrick_models::Decoder;

use super::ProfileOptions;
use crate::activation_sparsity::{self, ActivationProfile};
use crate::attention_pattern::{AttentionPattern, AttentionProfile};
use crate::cka::{LayerGrams, Similarity, cka};
use crate::functional_partition::functional_partition;
use crate::logit_lens::{LogitLens, logit_lens};
use crate::sample::{SampledInputs, spread, tokens_at};
use crate::{AnalysisError, Metric, SecondMoments};

/// The bricks of one layer for attention and neurons.
pub(super) struct InsideLayer {
    attention: AttentionPattern,
    attention_sites: SiteSet,
    neurons: SampledInputs,
    neuron_sites: SiteSet,
}

impl InsideLayer {
    /// For the sites `here` of one layer and a text of `windows` windows.
    pub(super) fn new(here: &SiteSet, windows: usize, options: &ProfileOptions) -> Self {
        let of = |metric, part| if options.wants(metric) { here.of_part(part) } else { SiteSet::default() };
        let attention_sites = of(Metric::Attention, Part::Attn);
        let neuron_sites = of(Metric::Sparsity, Part::MlpDown);
        let each = options.neuron_tokens.div_ceil(windows.max(1));
        InsideLayer {
            attention: AttentionPattern::new(&attention_sites, options.queries, options.skipped()),
            neurons: SampledInputs::new(&neuron_sites, options.skipped(), each),
            attention_sites,
            neuron_sites,
        }
    }

    pub(super) fn bricks(&self) -> [&dyn Brick; 2] {
        [&self.attention, &self.neurons]
    }

    pub(super) fn attention(&self) -> Result<Vec<AttentionProfile>, AnalysisError> {
        let found = self.attention_sites.iter().map(|site| self.attention.profile(site));
        Ok(found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// `moments` may know the neurons' mean squares over all `tokens`; else those of the sample stand for them.
    pub(super) fn activation(
        &self,
        decoder: &Decoder,
        moments: &SecondMoments,
        tokens: usize,
        options: &ProfileOptions,
    ) -> Result<Vec<ActivationProfile>, AnalysisError> {
        let mut found = Vec::new();
        for site in self.neuron_sites.iter() {
            let Some(rows) = self.neurons.rows(site) else { continue };
            let [count, neurons] = rows.dims();
            let (sums, count) = match moments.has(site) {
                true => (moments.squares(site)?, tokens),
                false => {
                    let squares = (rows.clone() * rows.clone()).sum_dim(0);
                    let squares = crate::sample::read(site, squares)?;
                    (squares.into_iter().map(f64::from).collect(), count)
                }
            };
            let mean_squares: Vec<f64> = sums.iter().map(|s| s / count as f64).collect();
            let Some(down) = decoder.weight(site) else { continue };
            let (mut profile, values) = activation_sparsity::measure(site, rows, down, &mean_squares)?;
            let seed = options.seed.derive(&format!("partition/{site}"));
            profile.partition = functional_partition(&values, neurons, options.groups, seed)
                .map_err(|error| AnalysisError::Linalg { site, error })?;
            found.push(profile);
        }
        Ok(found)
    }
}

/// What compares layers: samples of the residual stream before the first and after each.
pub(super) struct AcrossLayers {
    skipped: usize,
    /// Tokens per minibatch and the batches of windows that are minibatches; none if layers are not compared.
    similarity: Option<(usize, Vec<usize>)>,
    grams: LayerGrams,
    /// Positions in each window that are predicted from every layer, and the tokens that follow.
    positions: Vec<usize>,
    targets: Vec<u32>,
    streams: Vec<Tensor<2>>,
}

impl AcrossLayers {
    pub(super) fn new(ids: &[u32], windows: &[Range<usize>], options: &ProfileOptions) -> Self {
        let skipped = options.skipped();
        let length = windows[0].len();
        let batches = windows.len().div_ceil(options.batch);
        let [tokens, most] = options.similarity;
        let similarity = options.wants(Metric::Similarity).then(|| (tokens, spread(0, batches, most)));
        let positions = match options.wants(Metric::Lens) {
            true => spread(skipped, length - 1, options.lens_tokens.div_ceil(windows.len())),
            false => Vec::new(),
        };
        let next = |w: &Range<usize>| positions.iter().map(|p| ids[w.start + p + 1]).collect::<Vec<_>>();
        let targets = windows.iter().flat_map(next).collect();
        AcrossLayers {
            skipped,
            similarity,
            grams: LayerGrams::default(),
            positions,
            targets,
            streams: Vec::new(),
        }
    }

    /// Looks at the residual stream of every batch of windows, `[batch, window, d_model]`, in front of layer `layer`.
    pub(super) fn see(&mut self, layer: usize, streams: &[Tensor<3>]) -> Result<(), AnalysisError> {
        if let Some((tokens, batches)) = &self.similarity {
            for batch in batches {
                self.grams.see(layer, &streams[*batch], self.skipped > 0, *tokens)?;
            }
        }
        if !self.positions.is_empty() {
            let rows = streams.iter().map(|x| {
                let [batch, _, d] = x.dims();
                tokens_at(x, &self.positions).reshape([batch * self.positions.len(), d])
            });
            self.streams.push(Tensor::cat(rows.collect(), 0));
        }
        Ok(())
    }

    pub(super) fn finish(
        self,
        decoder: &Decoder,
        progress: &dyn Progress,
    ) -> Result<(Option<Similarity>, Option<LogitLens>), AnalysisError> {
        // Nothing where windows are too short for either.
        let similarity = (!self.grams.is_empty()).then(|| cka(&self.grams, &self.grams)).transpose()?;
        let lens = (!self.streams.is_empty())
            .then(|| logit_lens(decoder, &self.streams, &self.targets, progress))
            .transpose()?;
        Ok((similarity, lens))
    }
}
