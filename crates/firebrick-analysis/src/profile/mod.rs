//! Profiles: per-site numbers from one calibration pass.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use burn::tensor::Tensor;
use firebrick_core::{Brick, Event, Part, Progress, Run, Seed, Site, SiteSet, Task};
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::grid::{Grid, GridKind};
use serde::{Deserialize, Serialize};

use crate::activation_sparsity::ActivationProfile;
use crate::attention_pattern::AttentionProfile;
use crate::cka::Similarity;
use crate::expert_usage::ExpertProfile;
use crate::fisher::{FisherOptions, FisherProfile, Labels, fisher_traces};
use crate::hessian_trace::{HessianOptions, HessianProfile, hessian_traces};
use crate::logit_lens::LogitLens;
use crate::residual_flow::{ResidualFlow, TokenFlow};
use crate::stats::{Estimate, gini, mean, median, spearman};
use crate::{AnalysisError, Metric, SecondMoments, file};

mod gradients;
mod layers;
mod linear;
mod metric_sections;
mod sections;

/// Tokens of a window that are run backwards at most: what is held between the passes grows with them.
const BACKWARDS: usize = 256;

/// The version of the format written here.
const VERSION: u32 = 1;

/// What to measure, and on how much text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProfileOptions {
    /// Name of the model in the profile; the family's name if empty.
    pub model: String,
    /// What is measured beside the residual stream.
    pub metrics: BTreeSet<Metric>,
    /// Tokens per window; each is a text of its own.
    pub window: usize,
    /// At most so many windows; of a longer text they are drawn at random.
    pub max_windows: usize,
    /// Windows per forward pass.
    pub batch: usize,
    /// Windows that are also run backwards, up to their first 256 tokens, for what an error costs in nats; they are spread over the text.
    pub gradient_windows: usize,
    /// Tokens behind second moments for each input of the widest layer, evenly spread over the text; 0 for all tokens. The sums cost as much
    /// as the forward pass, and a mean over a few times as many tokens as it has rows changes little with more.
    pub tokens_per_input: usize,
    /// Leaves the first token of each window out of every number: it is an attention sink of another magnitude.
    pub skip_first_token: bool,
    /// Bit widths whose round-to-nearest error is measured, 2 to 8.
    pub bits: Vec<u8>,
    /// Weights that share a scale when rounding; 0 for a whole row.
    pub group: usize,
    /// How scales and zero points are chosen when rounding.
    pub kind: GridKind,
    /// Whether rounding clips, see [`Grid::clip`](firebrick_tensor::grid::Grid::clip).
    pub clip: bool,
    /// Ranks whose truncation error is measured; those above a layer's full rank are left out.
    pub ranks: Vec<usize>,
    /// At most so many queries of each window are looked at for what attention does, evenly spread.
    pub queries: usize,
    /// Tokens of the whole text whose neurons are looked at.
    pub neuron_tokens: usize,
    /// Groups the neurons of a layer are cut into.
    pub groups: usize,
    /// Tokens of the whole text that are predicted from every layer.
    pub lens_tokens: usize,
    /// Tokens of a minibatch on which layers are compared, and how many minibatches.
    pub similarity: [usize; 2],
    /// Random directions for the traces of the Hessian.
    pub directions: usize,
    /// Seed of the choice of windows and of every other draw.
    pub seed: Seed,
}

impl Default for ProfileOptions {
    fn default() -> Self {
        ProfileOptions {
            model: String::new(),
            metrics: Metric::one_pass(),
            window: 256,
            max_windows: 16,
            batch: 4,
            gradient_windows: 4,
            tokens_per_input: 4,
            skip_first_token: true,
            bits: vec![2, 3, 4, 8],
            group: 64,
            kind: GridKind::Asym,
            clip: true,
            ranks: vec![0, 2, 4, 8, 16, 32, 64, 128, 256, 512],
            queries: 128,
            neuron_tokens: 1024,
            groups: 8,
            lens_tokens: 256,
            similarity: [256, 8],
            directions: 8,
            seed: Seed(0),
        }
    }
}

/// Per-site numbers of one model on one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Version of the format: 1.
    pub version: u32,
    /// Name of the model.
    pub model: String,
    /// Number of layers.
    pub layers: usize,
    /// How it was measured.
    pub options: ProfileOptions,
    /// What chose the codes behind the bit losses: `rtn`, or what has replaced them since (`gptq`).
    #[serde(default = "nearest")]
    pub quantizer: String,
    /// Windows that were run.
    pub windows: usize,
    /// Tokens behind every mean, but for those of samples (see the options).
    pub tokens: usize,
    /// BLAKE3 of all token ids of the text, as little-endian 32-bit numbers.
    pub text_hash: String,
    /// Blocks and sublayers, in the order data flows through them.
    pub residual: Vec<ResidualProfile>,
    /// Linear layers inside the blocks, in the order data flows through them.
    pub linear: Vec<LinearProfile>,
    /// How unequal the layers' weights are.
    pub weight_skew: WeightSkew,
    /// Whether more text would change the order of the layers.
    pub split_half: SplitHalf,
    /// Attention, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attention: Vec<AttentionProfile>,
    /// The neurons of the feed-forward networks, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub activation: Vec<ActivationProfile>,
    /// Every layer beside every other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub similarity: Option<Similarity>,
    /// What every layer would predict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lens: Option<LogitLens>,
    /// Fisher information of the linear layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fisher: Vec<FisherProfile>,
    /// Hessian of the linear layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hessian: Vec<HessianProfile>,
    /// Experts, or adapters that a router weighs, layer by layer; whoever ran the router puts them here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertProfile>,
    /// Names of the experts, where they have any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_names: Vec<String>,
}

/// What a block or sublayer does to the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualProfile {
    /// A block, an attention sublayer or an MLP sublayer.
    pub site: Site,
    /// `1 - E[cos(in, out)]`: ShortGPT's block influence, LLM-Drop's importance. Blind to changes of length, and the
    /// last layers look less important than they are.
    pub influence: Estimate,
    /// `E[|out - in| / |in|]`.
    pub update: Estimate,
}

/// One linear layer `y = W x`, `W: [d_out, d_in]`, and its inputs. `H = E[x x^T]` is not centred.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearProfile {
    /// The layer.
    pub site: Site,
    /// Width of the input.
    pub d_in: usize,
    /// Width of the output.
    pub d_out: usize,
    /// `tr H = E[|x|^2]`.
    pub input_energy: f64,
    /// Effective rank of the eigenvalues of `H`, between 1 and `d_in`.
    pub activation_rank: f64,
    /// Participation ratio `(tr H)^2 / |H|_F^2` of the eigenvalues of `H`; at most `activation_rank`.
    pub participation_ratio: f64,
    /// Frobenius norm of `W`.
    pub weight_norm: f64,
    /// Effective rank of the singular values of `W`.
    pub weight_rank: f64,
    /// `|W|_F^2 / |W|_2^2`.
    pub stable_rank: f64,
    /// `tr(W H W^T) = E[|y|^2]`, in which the errors below are measured.
    pub output_energy: f64,
    /// `E[|g|^2]` in nats^2, `g` the gradient of the text's negative log-likelihood with respect to `y`.
    pub gradient_energy: f64,
    /// Error of rounding the weight, by bits.
    pub bits: Vec<BitLoss>,
    /// Error of truncating the weight, by rank.
    pub ranks: Vec<RankLoss>,
}

/// What rounding a weight to codes of `bits` bits costs, see [`Profile::quantizer`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BitLoss {
    /// Bits per code.
    pub bits: u8,
    /// Bits of the packed weight with its scales.
    pub size: u64,
    /// `tr(D H D^T) = E[|D x|^2]` with `D` the rounding error.
    pub error: f64,
    /// The error as a share of the output energy.
    pub relative: f64,
    /// Expected rise of the negative log-likelihood in nats per token, all other layers intact:
    /// `1/2 sum_o E[g_o^2] (D H D^T)_oo`, to second order, with the empirical Fisher diagonal of the outputs as curvature.
    pub rise: f64,
}

/// What the best approximation of rank `rank` loses (activation-aware: truncated SVD of `W H^(1/2)`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankLoss {
    /// The rank.
    pub rank: usize,
    /// Parameters of the factors: `rank (d_in + d_out)`.
    pub size: u64,
    /// Tail energy: the sum of the squared singular values of `W H^(1/2)` after the first `rank`.
    pub error: f64,
    /// The error as a share of the output energy.
    pub relative: f64,
    /// Expected rise of the negative log-likelihood in nats per token: the error at half the layer's mean curvature
    /// (`E[g_o^2]` averaged over outputs by their energy).
    pub rise: f64,
}

/// Inequality of the weight norms over layers (the observation LISA rests on, arXiv 2403.17919).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WeightSkew {
    /// Mean Frobenius norm of each layer's linear weights.
    pub layers: Vec<f64>,
    /// Largest over median.
    pub max_over_median: f64,
    /// Gini coefficient.
    pub gini: f64,
}

/// Spearman correlation of the influences measured on two halves of the text; take more text below 0.9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitHalf {
    /// Over the blocks.
    pub blocks: Option<f64>,
    /// Over all attention and MLP sublayers.
    pub sublayers: Option<f64>,
}

impl ProfileOptions {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let sizes = [
            ("window", self.window),
            ("max_windows", self.max_windows),
            ("batch", self.batch),
            ("gradient_windows", self.gradient_windows),
            ("queries", self.queries),
            ("neuron_tokens", self.neuron_tokens),
            ("groups", self.groups),
            ("lens_tokens", self.lens_tokens),
            ("similarity[0]", self.similarity[0]),
            ("similarity[1]", self.similarity[1]),
            ("directions", self.directions),
        ];
        problems.extend(sizes.iter().filter(|s| s.1 == 0).map(|s| format!("{} is 0; it is at least 1", s.0)));
        problems.extend(self.bits.iter().filter_map(|bits| self.grid(*bits).check().err()));
        problems
    }

    /// What cannot be measured with these bricks in force.
    fn problems_with(&self, bricks: &[&dyn Brick]) -> Vec<String> {
        let curvature = [Metric::Fisher, Metric::Hessian].into_iter().filter(|m| self.wants(*m));
        let mut problems: Vec<String> = match bricks.is_empty() {
            true => Vec::new(),
            false => curvature.map(|m| format!("{m} is measured without bricks only")).collect(),
        };
        let last = [Part::Norm, Part::Head].map(Site::global);
        let at_last = bricks.iter().flat_map(|b| last.into_iter().filter(|s| b.sites().contains(*s)));
        if self.wants(Metric::Lens) {
            problems.extend(at_last.map(|site| format!("lens is measured without bricks at {site} only")));
        }
        problems
    }

    /// The grid that weights are rounded on at `bits` bits.
    pub fn grid(&self, bits: u8) -> Grid {
        Grid { bits, group: self.group, kind: self.kind, clip: self.clip }
    }

    fn wants(&self, metric: Metric) -> bool {
        self.metrics.contains(&metric)
    }

    /// How many tokens of each of `windows` windows second moments are summed over, at most.
    fn moment_tokens(&self, decoder: &Decoder, windows: usize) -> usize {
        let sites = decoder.sites();
        let widest = sites.block_linears().iter().filter_map(|s| sites.linear(s)).map(|(d_in, _)| d_in).max();
        match self.tokens_per_input {
            0 => usize::MAX,
            n => (n * widest.unwrap_or(0)).div_ceil(windows.max(1)).max(1),
        }
    }

    fn skipped(&self) -> usize {
        usize::from(self.skip_first_token)
    }

    /// The windows of a text of `tokens` tokens, in its order.
    fn windows(&self, tokens: usize) -> Vec<Range<usize>> {
        let window = self.window.min(tokens);
        let count = tokens / window;
        let keys = self.seed.uniform("profile/windows", count, 1.0);
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|i, j| keys[*i].total_cmp(&keys[*j]));
        order.truncate(self.max_windows);
        order.sort_unstable();
        order.into_iter().map(|i| i * window..(i + 1) * window).collect()
    }
}

/// Measures every block, sublayer and linear layer of `decoder` on the text `ids`.
///
/// With [`Metric::Linear`], first [`ProfileOptions::gradient_windows`] windows go through the whole model and back, one at a time, for the
/// curvature of each output. Then one forward pass, block by block over all windows: the second moments of one block are all
/// that is held beside the residual streams (`4 (3 d_model^2 + d_ff^2)` bytes on the device and twice that here, not times the
/// number of layers), and samples of fixed size for the other metrics.
/// Sums are kept on the device in f32 and read once per block; the linear algebra runs here in f64, the sites of a block
/// side by side. Its cost per block is about `4/3 d_ff^3` operations for the spectrum of the widest input and
/// `2 (bits + 3) d_out d_in^2` per linear layer. The same numbers for any thread count.
///
/// ```
/// use burn::tensor::Device;
/// use firebrick_analysis::{ProfileOptions, profile};
/// use firebrick_core::Silent;
/// use firebrick_models::Model;
///
/// let model = Model::embedded(&Device::flex())?;
/// let ids: Vec<u32> = (0..64).map(|i| 20 + i % 50).collect();
/// let options = ProfileOptions { window: 32, ..ProfileOptions::default() };
/// let profile = profile(&model.decoder, &ids, &options, &Silent)?;
/// assert_eq!(profile.tokens, 2 * 31);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Wrong options, too short a text, ids outside the vocabulary, weights or activations that are not finite, and
/// [`AnalysisError::Cancelled`] once `progress` says so.
pub fn profile(
    decoder: &Decoder,
    ids: &[u32],
    options: &ProfileOptions,
    progress: &dyn Progress,
) -> Result<Profile, AnalysisError> {
    profile_with(decoder, &[], &[], ids, options, progress)
}

/// [`profile`] of `decoder` with `bricks` in force, the last one on top; `taps` are there in the one forward pass only, which each batch
/// of windows goes through with a [`Run`] of its own, and see what bricks leave in it.
///
/// A linear layer's numbers are those of the decoder's weight, for the inputs and the gradients that it has under the bricks.
///
/// # Errors
/// As [`profile`]. With bricks no [`Metric::Fisher`] and [`Metric::Hessian`], and no [`Metric::Lens`] with bricks at the last norm or the
/// head: these run without them.
pub fn profile_with(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    taps: &[&dyn Brick],
    ids: &[u32],
    options: &ProfileOptions,
    progress: &dyn Progress,
) -> Result<Profile, AnalysisError> {
    check(decoder, ids, options)?;
    let problems = options.problems_with(bricks);
    if !problems.is_empty() {
        return Err(AnalysisError::Options { problems });
    }
    let windows = options.windows(ids.len());
    let skipped = options.skipped();
    let tokens = windows.iter().map(|w| w.len() - skipped).sum();
    let layers = decoder.sites().layers();
    // Tokens of each window behind second moments.
    let each = options.moment_tokens(decoder, windows.len()).min(windows[0].len() - skipped);
    let summed = each * windows.len();
    let curvature = match options.wants(Metric::Linear) {
        true => {
            let windows = spread_over(&windows, options);
            gradients::measure(decoder, bricks, ids, &windows, options, progress)?
        }
        false => BTreeMap::new(),
    };
    let company: Vec<&dyn Brick> = bricks.iter().chain(taps).copied().collect();
    let (mut streams, mut runs): (Vec<Tensor<3>>, Vec<Run<'static>>) =
        embed(decoder, &company, ids, &windows, options.batch).unzip();
    let mut across = layers::AcrossLayers::new(ids, &windows, options);
    across.see(0, &streams)?;
    let (mut residual, mut linear) = (Vec::new(), Vec::new());
    let (mut attention, mut activation) = (Vec::new(), Vec::new());
    let mut halved: Vec<(Site, [f64; 2])> = Vec::new();
    let mut task = Task::begin(progress, "profile", Some(layers as u64), "layers");
    for layer in 0..layers {
        let here = decoder.sites().all().filter(|s| s.layer == Some(layer));
        let weighted = match options.wants(Metric::Linear) {
            true => decoder.sites().block_linears().filter(|s| here.contains(s)),
            false => SiteSet::default(),
        };
        let changed: SiteSet =
            here.filter(|s| matches!(s.part, Part::Block | Part::AttnSublayer | Part::MlpSublayer));
        let moments = SecondMoments::new(&weighted).skipping(skipped).at_most(each);
        let flow = ResidualFlow::new(&changed);
        let inside = layers::InsideLayer::new(&here, windows.len(), options);
        let mut bricks = company.clone();
        bricks.extend([&moments as &dyn Brick, &flow]);
        bricks.extend(inside.bricks());
        for (x, run) in streams.iter_mut().zip(&mut runs) {
            let mut here = std::mem::take(run).with_bricks(&bricks);
            *x = decoder.block(layer, x.clone(), &mut here);
            *run = here.with_bricks(&[]);
            progress.check()?;
        }
        for site in changed.iter() {
            let flow = flow.read(site, skipped)?;
            let (influence, update) = (Estimate::of(&flow.influence), Estimate::of(&flow.update));
            residual.push(ResidualProfile { site, influence, update });
            halved.push((site, halves(&flow)));
        }
        across.see(layer + 1, &streams)?;
        attention.extend(inside.attention()?);
        activation.extend(inside.activation(decoder, &moments, summed, options)?);
        let unseen = weighted.filter(|s| !moments.has(s) || !curvature.contains_key(&s));
        for site in unseen.iter() {
            progress.on(Event::Warn(&format!("no token passed {site}; the profile leaves it out")));
        }
        let seen = weighted.filter(|s| !unseen.contains(s));
        linear.extend(linear::measure(decoder, &seen, &moments, &curvature, summed, options)?);
        task.advance(1, "")?;
    }
    drop(task);
    // Only now: weights that are not finite were reported at their own layer by then.
    if let Some((site, _)) = curvature.iter().find(|(_, c)| c.iter().any(|v| !v.is_finite())) {
        return Err(AnalysisError::Site {
            site: *site,
            what: "the gradient of its output is not finite".into(),
        });
    }
    drop((streams, runs));
    let (similarity, lens) = across.finish(decoder, progress)?;
    let name = if options.model.is_empty() { &decoder.config().model_type } else { &options.model };
    Ok(Profile {
        version: VERSION,
        model: name.clone(),
        layers,
        options: options.clone(),
        windows: windows.len(),
        tokens,
        text_hash: hash(ids),
        quantizer: nearest(),
        weight_skew: weight_skew(&linear, layers),
        split_half: split_half(&halved),
        residual,
        linear,
        attention,
        activation,
        similarity,
        lens,
        fisher: fisher(decoder, ids, &windows, options, progress)?,
        hessian: hessian(decoder, ids, &windows, options, progress)?,
        experts: Vec::new(),
        expert_names: Vec::new(),
    })
}

/// The windows that are also run backwards, as far as they are.
fn spread_over(windows: &[Range<usize>], options: &ProfileOptions) -> Vec<Range<usize>> {
    let count = options.gradient_windows.min(windows.len());
    let begin = |w: &Range<usize>| w.start..w.end.min(w.start + BACKWARDS);
    (0..count).map(|j| begin(&windows[j * windows.len() / count])).collect()
}

fn text_of(ids: &[u32], windows: &[Range<usize>]) -> Vec<u32> {
    windows.iter().flat_map(|w| &ids[w.clone()]).copied().collect()
}

fn fisher(
    decoder: &Decoder,
    ids: &[u32],
    windows: &[Range<usize>],
    options: &ProfileOptions,
    progress: &dyn Progress,
) -> Result<Vec<FisherProfile>, AnalysisError> {
    if !options.wants(Metric::Fisher) {
        return Ok(Vec::new());
    }
    let chosen = spread_over(windows, options);
    let settings = FisherOptions {
        window: chosen[0].len(),
        windows: chosen.len(),
        labels: Labels::Model,
        seed: options.seed.derive("fisher"),
    };
    let sites = decoder.sites().block_linears();
    fisher_traces(decoder, &text_of(ids, &chosen), &sites, &settings, progress)
}

fn hessian(
    decoder: &Decoder,
    ids: &[u32],
    windows: &[Range<usize>],
    options: &ProfileOptions,
    progress: &dyn Progress,
) -> Result<Vec<HessianProfile>, AnalysisError> {
    if !options.wants(Metric::Hessian) {
        return Ok(Vec::new());
    }
    let chosen = spread_over(windows, options);
    let settings = HessianOptions {
        window: chosen[0].len(),
        windows: chosen.len(),
        probes: options.directions,
        seed: options.seed.derive("hessian"),
        ..HessianOptions::default()
    };
    let sites = decoder.sites().block_linears();
    hessian_traces(decoder, &text_of(ids, &chosen), &sites, &settings, progress)
}

pub(crate) fn check(decoder: &Decoder, ids: &[u32], options: &ProfileOptions) -> Result<(), AnalysisError> {
    let problems = options.problems();
    if !problems.is_empty() {
        return Err(AnalysisError::Options { problems });
    }
    // One token to predict another from.
    let need = 2;
    if ids.len() < need || options.window < need {
        return Err(AnalysisError::TooFewTokens { have: ids.len().min(options.window), need });
    }
    let vocab = decoder.config().vocab;
    let mut outside = ids.iter().enumerate().filter(|(_, id)| **id as usize >= vocab);
    match outside.next() {
        None => Ok(()),
        Some((position, id)) => {
            Err(AnalysisError::Tokens { count: 1 + outside.count(), id: *id, position, vocab })
        }
    }
}

/// The embedded windows, `[batch, window, d_model]` each, and the runs that `bricks` were in.
pub(crate) fn embed(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    ids: &[u32],
    windows: &[Range<usize>],
    batch: usize,
) -> impl Iterator<Item = (Tensor<3>, Run<'static>)> {
    windows.chunks(batch).map(move |windows| {
        let windows: Vec<&[u32]> = windows.iter().map(|w| &ids[w.clone()]).collect();
        let mut run = Run::new(bricks);
        let x = decoder.embed(token_tensor(&windows, &decoder.device()), &mut run);
        (x, run.with_bricks(&[]))
    })
}

fn hash(ids: &[u32]) -> String {
    let mut hasher = blake3::Hasher::new();
    ids.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    hasher.finalize().to_hex().to_string()
}

fn nearest() -> String {
    "rtn".into()
}

fn weight_skew(linear: &[LinearProfile], layers: usize) -> WeightSkew {
    let norm = |layer: usize| {
        let of = linear.iter().filter(|l| l.site.layer == Some(layer));
        mean(&of.map(|l| l.weight_norm).collect::<Vec<_>>())
    };
    let norms: Vec<f64> = (0..layers).map(norm).collect();
    let (middle, largest) = (median(&norms), norms.iter().copied().fold(0.0, f64::max));
    WeightSkew {
        max_over_median: if middle > 0.0 { largest / middle } else { 0.0 },
        gini: gini(&norms),
        layers: norms,
    }
}

/// The mean influence on every other window, and on those between; of one window on its two halves.
fn halves(flow: &TokenFlow) -> [f64; 2] {
    let every = |start: usize| {
        mean(&flow.influence.iter().skip(start).step_by(2).flatten().copied().collect::<Vec<_>>())
    };
    match &flow.influence[..] {
        [only] => [mean(&only[..only.len() / 2]), mean(&only[only.len() / 2..])],
        _ => [every(0), every(1)],
    }
}

fn split_half(halved: &[(Site, [f64; 2])]) -> SplitHalf {
    let correlation = |blocks: bool| {
        let of = halved.iter().filter(|(site, _)| (site.part == Part::Block) == blocks);
        let (a, b): (Vec<f64>, Vec<f64>) = of.map(|(_, [a, b])| (*a, *b)).unzip();
        spearman(&a, &b)
    };
    SplitHalf { blocks: correlation(true), sublayers: correlation(false) }
}

impl Profile {
    /// What was measured at a block or sublayer.
    pub fn residual_at(&self, site: Site) -> Option<&ResidualProfile> {
        self.residual.iter().find(|r| r.site == site)
    }

    /// What was measured at a linear layer.
    pub fn linear_at(&self, site: Site) -> Option<&LinearProfile> {
        self.linear.iter().find(|l| l.site == site)
    }

    /// The influence of every block and sublayer.
    pub fn influence(&self) -> BTreeMap<Site, f64> {
        self.residual.iter().map(|r| (r.site, r.influence.mean)).collect()
    }

    /// The sites with this part by rising influence: the first are the first to leave out (LLM-Drop's order).
    pub fn least_influential(&self, part: Part) -> Vec<Site> {
        let mut found: Vec<&ResidualProfile> = self.residual.iter().filter(|r| r.site.part == part).collect();
        found.sort_by(|a, b| a.influence.mean.total_cmp(&b.influence.mean));
        found.into_iter().map(|r| r.site).collect()
    }

    /// Writes JSON, indented.
    pub fn to_json(&self) -> Result<String, AnalysisError> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// [`AnalysisError::Json`] for a file that is no profile or names sites outside its layers, [`AnalysisError::Version`] for one
    /// of another version.
    pub fn from_json(text: &str) -> Result<Self, AnalysisError> {
        let profile: Profile = file::versioned(text, VERSION)?;
        let problems = profile.problems();
        match problems.is_empty() {
            true => Ok(profile),
            false => Err(<serde_json::Error as serde::de::Error>::custom(problems.join("; ")).into()),
        }
    }

    /// What does not fit together; reports allocate by these numbers.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let sites = self.residual.iter().map(|r| r.site).chain(self.linear.iter().map(|l| l.site));
        let listed = sites.filter_map(|s| s.layer).max().map_or(0, |l| l.saturating_add(1));
        if listed != self.layers || self.weight_skew.layers.len() != listed {
            let skew = self.weight_skew.layers.len();
            problems.push(format!("{} layers, sites of {listed}, weight norms of {skew}", self.layers));
            return problems;
        }
        let sites = (self.attention.iter().map(|a| a.site))
            .chain(self.activation.iter().map(|a| a.site))
            .chain(self.fisher.iter().map(|f| f.site))
            .chain(self.hessian.iter().map(|h| h.site));
        let outside = sites.filter(|s| s.layer.is_none_or(|l| l >= self.layers));
        problems.extend(outside.map(|s| format!("{s} is outside its {} layers", self.layers)));
        let experts = self.experts.iter().filter(|e| e.layer >= self.layers);
        problems.extend(experts.map(|e| format!("experts of layer {} of {}", e.layer, self.layers)));
        if let Some(s) = &self.similarity
            && (s.cka.len() != self.layers + 1 || s.cka.iter().any(|row| row.len() != self.layers + 1))
        {
            problems.push(format!("similarity of {} layers, not {}", s.cka.len(), self.layers + 1));
        }
        if let Some(lens) = &self.lens
            && lens.layers.len() != self.layers + 1
        {
            problems.push(format!("a lens of {} layers, not {}", lens.layers.len(), self.layers + 1));
        }
        problems
    }

    /// Writes a JSON file; an interrupted run leaves the old one.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), AnalysisError> {
        file::write(path.as_ref(), &self.to_json()?)
    }

    /// Reads a JSON file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, AnalysisError> {
        Self::from_json(&file::read(path.as_ref())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_drawn_without_overlap() {
        let options = ProfileOptions { window: 10, max_windows: 3, ..ProfileOptions::default() };
        let drawn = options.windows(207);
        assert_eq!(drawn.len(), 3);
        assert!(drawn.iter().all(|w| w.len() == 10 && w.end <= 200));
        assert!(drawn.windows(2).all(|w| w[0].end <= w[1].start));
        assert_eq!(drawn, options.windows(207));
        let other = ProfileOptions { seed: Seed(1), ..options.clone() };
        assert_ne!(drawn, other.windows(207));
        assert_eq!(options.windows(7), std::slice::from_ref(&(0..7)), "a short text is one short window");
        assert_eq!(options.windows(29), [0..10, 10..20]);
    }

    #[test]
    fn halves_that_agree_correlate() {
        let flow = |layer: usize, a: f64, b: f64| {
            let influence = vec![vec![a; 4], vec![b; 4]];
            (Site::layer(layer, Part::Block), halves(&TokenFlow { update: influence.clone(), influence }))
        };
        let agree = split_half(&[flow(0, 1.0, 1.1), flow(1, 2.0, 2.5), flow(2, 3.0, 2.9)]);
        assert_eq!(agree, SplitHalf { blocks: Some(1.0), sublayers: None });
        let differ = split_half(&[flow(0, 1.0, 3.0), flow(1, 2.0, 2.5), flow(2, 3.0, 1.9)]);
        assert_eq!(differ.blocks, Some(-1.0));
    }
}
