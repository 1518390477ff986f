//! Profiles: per-site numbers from one calibration pass.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use burn::tensor::Tensor;
use firebrick_core::{Brick, Event, Part, Progress, Run, Seed, Site, SiteSet, Task};
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::grid::{Grid, GridKind};
use serde::{Deserialize, Serialize};

use crate::residual_flow::{ResidualFlow, TokenFlow};
use crate::stats::{Estimate, gini, mean, median, spearman};
use crate::{AnalysisError, SecondMoments, file};

mod gradients;
mod linear;
mod sections;

/// The version of the format written here.
const VERSION: u32 = 1;

/// What to measure, and on how much text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProfileOptions {
    /// Name of the model in the profile; the family's name if empty.
    pub model: String,
    /// Tokens per window; each is a text of its own.
    pub window: usize,
    /// At most so many windows; of a longer text they are drawn at random.
    pub max_windows: usize,
    /// Windows per forward pass.
    pub batch: usize,
    /// Windows that are also run backwards, for what an error costs in nats; they are spread over the text.
    pub gradient_windows: usize,
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
    /// Seed of the choice of windows.
    pub seed: Seed,
}

impl Default for ProfileOptions {
    fn default() -> Self {
        ProfileOptions {
            model: String::new(),
            window: 256,
            max_windows: 16,
            batch: 4,
            gradient_windows: 4,
            skip_first_token: true,
            bits: vec![2, 3, 4, 8],
            group: 64,
            kind: GridKind::Asym,
            clip: true,
            ranks: vec![0, 2, 4, 8, 16, 32, 64, 128, 256, 512],
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
    /// Tokens behind every mean.
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
        ];
        problems.extend(sizes.iter().filter(|s| s.1 == 0).map(|s| format!("{} is 0; it is at least 1", s.0)));
        problems.extend(self.bits.iter().filter_map(|bits| self.grid(*bits).check().err()));
        problems
    }

    /// The grid that weights are rounded on at `bits` bits.
    pub fn grid(&self, bits: u8) -> Grid {
        Grid { bits, group: self.group, kind: self.kind, clip: self.clip }
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
/// First [`ProfileOptions::gradient_windows`] windows go through the whole model and back, one at a time, for the curvature of
/// each output. Then one forward pass, block by block over all windows: the second moments of one block are all that is held beside the
/// residual streams (`4 (3 d_model^2 + d_ff^2)` bytes on the device and twice that here, not times the number of layers).
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
    check(decoder, ids, options)?;
    let windows = options.windows(ids.len());
    let mut streams = embed(decoder, ids, &windows, options.batch);
    let skipped = options.skipped();
    let tokens = windows.iter().map(|w| w.len() - skipped).sum();
    let layers = decoder.sites().layers();
    let count = options.gradient_windows.min(windows.len());
    let spread: Vec<Range<usize>> = (0..count).map(|j| windows[j * windows.len() / count].clone()).collect();
    let curvature = gradients::measure(decoder, ids, &spread, options, progress)?;
    let (mut residual, mut linear) = (Vec::new(), Vec::new());
    let mut flows: Vec<(Site, TokenFlow)> = Vec::new();
    let mut task = Task::begin(progress, "profile", Some(layers as u64), "layers");
    for layer in 0..layers {
        let here = decoder.sites().all().filter(|s| s.layer == Some(layer));
        let weighted = decoder.sites().block_linears().filter(|s| here.contains(s));
        let changed: SiteSet =
            here.filter(|s| matches!(s.part, Part::Block | Part::AttnSublayer | Part::MlpSublayer));
        let moments = SecondMoments::new(&weighted).skipping(skipped);
        let flow = ResidualFlow::new(&changed);
        let bricks: [&dyn Brick; 2] = [&moments, &flow];
        for x in &mut streams {
            *x = decoder.block(layer, x.clone(), &mut Run::new(&bricks));
            progress.check()?;
        }
        for site in changed.iter() {
            let flow = flow.read(site, skipped)?;
            let (influence, update) = (Estimate::of(&flow.influence), Estimate::of(&flow.update));
            residual.push(ResidualProfile { site, influence, update });
            flows.push((site, flow));
        }
        let unseen = weighted.filter(|s| moments.sum(s).is_none() || !curvature.contains_key(&s));
        for site in unseen.iter() {
            progress.on(Event::Warn(&format!("no token passed {site}; the profile leaves it out")));
        }
        let seen = weighted.filter(|s| !unseen.contains(s));
        linear.extend(linear::measure(decoder, &seen, &moments, &curvature, tokens, options)?);
        task.advance(1, "")?;
    }
    // Only now: weights that are not finite were reported at their own layer by then.
    if let Some((site, _)) = curvature.iter().find(|(_, c)| c.iter().any(|v| !v.is_finite())) {
        return Err(AnalysisError::Site {
            site: *site,
            what: "the gradient of its output is not finite".into(),
        });
    }
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
        split_half: split_half(&flows),
        residual,
        linear,
    })
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

/// The embedded windows, `[batch, window, d_model]` each.
pub(crate) fn embed(
    decoder: &Decoder,
    ids: &[u32],
    windows: &[Range<usize>],
    batch: usize,
) -> Vec<Tensor<3>> {
    let embed = |windows: &[Range<usize>]| {
        let windows: Vec<&[u32]> = windows.iter().map(|w| &ids[w.clone()]).collect();
        decoder.embed(token_tensor(&windows, &decoder.device()), &mut Run::default())
    };
    windows.chunks(batch).map(embed).collect()
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

fn split_half(flows: &[(Site, TokenFlow)]) -> SplitHalf {
    let halves = |windows: &[Vec<f64>]| -> (f64, f64) {
        let every = |start: usize| {
            mean(&windows.iter().skip(start).step_by(2).flatten().copied().collect::<Vec<_>>())
        };
        match windows {
            [only] => (mean(&only[..only.len() / 2]), mean(&only[only.len() / 2..])),
            _ => (every(0), every(1)),
        }
    };
    let correlation = |blocks: bool| {
        let of = flows.iter().filter(|(site, _)| (site.part == Part::Block) == blocks);
        let (a, b): (Vec<f64>, Vec<f64>) = of.map(|(_, flow)| halves(&flow.influence)).unzip();
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
        // A number of layers that nothing stands behind would be allocated for in every report.
        let sites = profile.residual.iter().map(|r| r.site).chain(profile.linear.iter().map(|l| l.site));
        let listed = sites.filter_map(|s| s.layer).max().map_or(0, |l| l.saturating_add(1));
        if listed != profile.layers || profile.weight_skew.layers.len() != listed {
            let skew = profile.weight_skew.layers.len();
            let what = format!("{} layers, sites of {listed}, weight norms of {skew}", profile.layers);
            return Err(<serde_json::Error as serde::de::Error>::custom(what).into());
        }
        Ok(profile)
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
            (Site::layer(layer, Part::Block), TokenFlow { update: influence.clone(), influence })
        };
        let agree = split_half(&[flow(0, 1.0, 1.1), flow(1, 2.0, 2.5), flow(2, 3.0, 2.9)]);
        assert_eq!(agree, SplitHalf { blocks: Some(1.0), sublayers: None });
        let differ = split_half(&[flow(0, 1.0, 3.0), flow(1, 2.0, 2.5), flow(2, 3.0, 1.9)]);
        assert_eq!(differ.blocks, Some(-1.0));
    }
}
