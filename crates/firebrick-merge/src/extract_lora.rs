//! Extract-LoRA: the low-rank part of a fine-tune, as an adapter of its base (mergekit's `mergekit-extract-lora`).
//!
//! Of each weight, `delta = tuned - base` is cut to its largest singular triplets `U S Vt` (the best approximation of that rank,
//! Eckart and Young 1936): `A = sqrt(S) Vt` and `B = U sqrt(S)`, with alpha = rank, so that the adapter adds `B A`. What has no
//! low-rank form (norms), and embeddings unless asked for, is saved whole. At full rank the adapter is the delta.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use firebrick_core::{
    Event, Part, Progress, ResolvedPlan, Seed, Selector, Site, SiteKind, SiteSet, Task, folder, sync_folder,
};
use firebrick_models::{GgufForm, ModelFiles, TensorSource};
use firebrick_peft::hf::{self, SiteFactors, WholeWeight};
use firebrick_peft::{LoraSettings, PeftError};
use firebrick_tensor::block::DType;
use firebrick_tensor::linalg::{LinalgError, Matrix, Svd, leading_svd};
use rayon::prelude::*;
use serde::Serialize;

use crate::MergeError;

/// Elements of the matrices that are decomposed side by side, unless a single one is larger.
const TOGETHER: usize = 1 << 25;

/// Singular values below this share of the largest are rounding in f64.
const ZERO: f64 = 1e-13;

/// What an adapter of the difference of two models is to hold.
#[derive(Clone, Debug, PartialEq)]
pub struct ExtractLora {
    /// Largest rank of a site.
    pub rank: usize,
    /// Singular values of at most this size are left out. A fine-tune stored in 16 bits differs from its base by rounding everywhere:
    /// with 0 that noise gets ranks, too.
    pub epsilon: f64,
    /// Whether both factors get `sqrt(S)`; otherwise `A = S Vt` and `B = U`.
    pub distribute: bool,
    /// Ranks by site in place of `rank`.
    pub plan: Option<ResolvedPlan>,
    /// Sites that stay as they are in the base.
    pub leave_out: Option<Selector>,
    /// Sites whose weight the adapter holds whole (PEFT's `modules_to_save`).
    pub save_whole: Option<Selector>,
    /// Whether the embedding gets factors instead of being saved whole; not where the head is tied to it, since merging such an
    /// adapter in peft would add its update twice.
    pub embedding: bool,
    /// Seed of the random projections.
    pub seed: Seed,
}

impl Default for ExtractLora {
    /// As mergekit: rank 128 and no threshold.
    fn default() -> Self {
        ExtractLora {
            rank: 128,
            epsilon: 0.0,
            distribute: true,
            plan: None,
            leave_out: None,
            save_whole: None,
            embedding: false,
            seed: Seed(0),
        }
    }
}

/// What became of the difference at one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Extracted {
    /// Factors of this rank.
    Rank(usize),
    /// The weight itself.
    Whole,
    /// Nothing: left out, or every singular value is at most epsilon.
    Nothing,
    /// There is none: the weights are equal.
    Equal,
}

/// One site of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExtractedSite {
    /// The site.
    pub site: Site,
    /// Hugging Face's name of its weight.
    pub tensor: String,
    /// What the adapter has of it.
    pub what: Extracted,
    /// Euclidean norm of the difference.
    pub norm: f64,
    /// Share of the difference's squared norm that the adapter has, in `[0, 1]`; 1 where there is no difference.
    pub kept: f64,
}

/// What an extraction found; [`fmt::Display`] prints it for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExtractReport {
    /// Every site with a weight, in the order data flows.
    pub sites: Vec<ExtractedSite>,
    /// Euclidean norm of the difference of the models.
    pub norm: f64,
    /// Share of its square that the adapter has.
    pub kept: f64,
    /// Numbers in the adapter.
    pub parameters: usize,
}

/// An adapter of the difference of two models, in memory; weights that are saved whole stay in the file of the fine-tune.
#[derive(Clone, Debug)]
pub struct Extraction<'a> {
    /// What was found.
    pub report: ExtractReport,
    /// Factors, in f32 and with alpha = rank.
    pub factors: Vec<SiteFactors>,
    /// Weights of the fine-tune.
    pub whole: Vec<WholeWeight<'a>>,
}

/// What a site is to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Rank(usize),
    Whole,
    Nothing,
}

/// A weight of both models.
struct Item {
    site: Site,
    tensor: String,
    shape: Vec<usize>,
    wanted: Wanted,
    /// Where the weight is read: the embedding for a head that is tied to it.
    base: Site,
    tuned: Site,
}

/// What is kept of an item.
type Kept<'a> = (ExtractedSite, Option<SiteFactors>, Option<WholeWeight<'a>>);

impl ExtractLora {
    /// Decomposes what `tuned` has beyond `base`, weight by weight and in f64; nothing is written.
    ///
    /// Where the rank is below a quarter of a matrix, by a random projection (Halko, Martinsson and Tropp 2011), which on a flat spectrum
    /// keeps about a hundredth less than the best factors would; else exactly. Holds
    /// the adapter and, beside it, at most 32 Mi elements at a time, or one matrix if that is larger, in about 40 bytes each. The
    /// result does not depend on the number of threads.
    ///
    /// What an adapter can't carry is said as a warning: settings of the configuration that differ, such as the base of rotary
    /// frequencies.
    ///
    /// # Errors
    /// Lists everything in which the models do not fit one another or the settings: families, numbers of layers, shapes, missing
    /// tensors, selectors that match nothing, biases that changed beside a matrix that gets factors (PEFT has a place for them only
    /// where the module is saved whole), and models that do not differ. Weights that are not finite; cancellation through `progress`.
    pub fn extract<'a>(
        &self,
        base: &ModelFiles,
        tuned: &'a ModelFiles,
        progress: &dyn Progress,
    ) -> Result<Extraction<'a>, MergeError> {
        let items = self.items(base, tuned)?;
        for text in settings_that_differ(base, tuned) {
            progress.on(Event::Warn(&text));
        }
        let task = Mutex::new(Task::begin(progress, "extract", Some(items.len() as u64), "weights"));
        let mut kept = Vec::with_capacity(items.len());
        let mut rest = &items[..];
        while !rest.is_empty() {
            let mut elements = 0;
            let fits = rest.iter().take_while(|item| {
                elements += item.shape.iter().product::<usize>();
                elements <= TOGETHER
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            let done: Vec<Kept<'a>> = now
                .par_iter()
                .map(|item| {
                    let found = self.item(item, base, tuned)?;
                    if let Ok(mut task) = task.lock() {
                        task.advance(1, &item.tensor)?;
                    }
                    Ok(found)
                })
                .collect::<Result<_, MergeError>>()?;
            kept.extend(done);
            rest = later;
        }
        drop(task);
        let (mut sites, mut factors, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        for (site, factor, weight) in kept {
            sites.push(site);
            factors.extend(factor);
            whole.extend(weight);
        }
        let problems = lost(&sites, &factors, base);
        if !problems.is_empty() {
            return Err(mismatch(tuned, problems));
        }
        // A tied head repeats the embedding.
        let own = |s: &&ExtractedSite| {
            !(s.site.part == Part::Head && base.config.tied_head && tuned.config.tied_head)
        };
        let squared: f64 = sites.iter().filter(own).map(|s| s.norm * s.norm).sum();
        let part: f64 = sites.iter().filter(own).map(|s| s.kept * s.norm * s.norm).sum();
        let numbers = |w: &WholeWeight<'_>| w.shape.iter().product::<usize>();
        let parameters = factors.iter().map(|f| f.a.len() + f.b.len()).sum::<usize>()
            + whole.iter().map(numbers).sum::<usize>();
        let report = ExtractReport { sites, norm: squared.sqrt(), kept: share(part, squared), parameters };
        Ok(Extraction { report, factors, whole })
    }

    /// Whether [`ExtractLora::extract`] would find two models that fit one another and the settings, without reading their weights.
    ///
    /// # Errors
    /// As there, but for what the weights themselves say.
    pub fn check(&self, base: &ModelFiles, tuned: &ModelFiles) -> Result<(), MergeError> {
        self.items(base, tuned).map(drop)
    }

    /// Every weight and what it is to get.
    fn items(&self, base: &ModelFiles, tuned: &ModelFiles) -> Result<Vec<Item>, MergeError> {
        let mut problems = Vec::new();
        if self.rank == 0 {
            problems.push("rank 0: at least 1 is needed".into());
        }
        if !(self.epsilon >= 0.0 && self.epsilon.is_finite()) {
            problems.push(format!("epsilon {}: a number from 0 on is needed", self.epsilon));
        }
        let mut chosen =
            |selector: &Option<Selector>| match selector.as_ref().map(|s| s.resolve(base.sites())) {
                Some(Ok(sites)) => sites,
                Some(Err(e)) => {
                    problems.push(e.to_string());
                    SiteSet::default()
                }
                None => SiteSet::default(),
            };
        let (leave_out, save_whole) = (chosen(&self.leave_out), chosen(&self.save_whole));
        let (embed, head) = (Site::global(Part::Embed), Site::global(Part::Head));
        let (tied, both_tied) = (base.config.tied_head, base.config.tied_head && tuned.config.tied_head);
        if self.embedding && tied {
            problems.push(
                "the head is tied to the embedding: an update of both would be merged twice by peft; save them whole".into(),
            );
        }
        if base.config.model_type != tuned.config.model_type {
            let (a, b) = (&base.config.model_type, &tuned.config.model_type);
            problems.push(format!("the base is of the family {a}, the fine-tune of {b}"));
        } else if base.config.layers != tuned.config.layers {
            let (a, b) = (base.config.layers, tuned.config.layers);
            problems.push(format!("the base has {a} layers, the fine-tune {b}"));
        }
        for (files, which) in [(base, "base"), (tuned, "fine-tune")] {
            problems.extend(files.problems()?.into_iter().map(|p| format!("{which}: {p}")));
        }
        let mut items = Vec::new();
        for entry in base.sites().entries() {
            let is_head = entry.site == head;
            // A tied head has no tensor, but a name under which peft knows it.
            let Some(tensor) =
                entry.tensor.clone().or_else(|| (is_head && tied).then(|| hf::TIED_HEAD.into()))
            else {
                continue;
            };
            let Some(shape) = entry.kind.weight_shape() else { continue };
            let Some(theirs) = tuned.sites().get(entry.site) else { continue };
            if theirs.kind != entry.kind {
                let theirs = theirs.kind.weight_shape().unwrap_or_default();
                problems.push(format!("`{tensor}` is {shape:?} in the base, {theirs:?} in the fine-tune"));
            }
            let read = |files: &ModelFiles| {
                if is_head && files.config.tied_head { embed } else { entry.site }
            };
            let planned = self.plan.as_ref().and_then(|p| p.sites.get(&entry.site)).and_then(|s| s.rank);
            let linear = matches!(entry.kind, SiteKind::Linear { .. }) && !(is_head && tied);
            // A weight that is tied is one weight, under either name.
            let one = both_tied && (is_head || entry.site == embed);
            let is_in = |set: &SiteSet| {
                set.contains(entry.site) || (one && (set.contains(embed) || set.contains(head)))
            };
            let wanted = if is_in(&leave_out) {
                Wanted::Nothing
            } else if is_in(&save_whole) {
                Wanted::Whole
            } else if linear || (self.embedding && entry.site == embed) {
                Wanted::Rank(planned.unwrap_or(self.rank))
            } else {
                Wanted::Whole
            };
            let (base, tuned) = (read(base), read(tuned));
            items.push(Item { site: entry.site, tensor, shape, wanted, base, tuned });
        }
        match problems.is_empty() {
            true => Ok(items),
            false => Err(mismatch(tuned, problems)),
        }
    }

    fn item<'a>(
        &self,
        item: &Item,
        base: &ModelFiles,
        tuned: &'a ModelFiles,
    ) -> Result<Kept<'a>, MergeError> {
        let fail = |e: LinalgError| MergeError::Numerics { tensor: item.tensor.clone(), what: e.to_string() };
        let before = base.weights().read_site(item.base, &item.shape)?;
        let after = tuned.weights().read_site(item.tuned, &item.shape)?;
        let delta = |(a, b): (&f32, &f32)| f64::from(*a) - f64::from(*b);
        let squared: f64 = after.iter().zip(&before).map(|pair| delta(pair).powi(2)).sum();
        if !squared.is_finite() {
            let what = "a weight of one of the models is not finite".into();
            return Err(MergeError::Numerics { tensor: item.tensor.clone(), what });
        }
        let found = |what, kept| ExtractedSite {
            site: item.site,
            tensor: item.tensor.clone(),
            what,
            norm: squared.sqrt(),
            kept,
        };
        if squared == 0.0 {
            return Ok((found(Extracted::Equal, 1.0), None, None));
        }
        let rank = match item.wanted {
            Wanted::Nothing => return Ok((found(Extracted::Nothing, 0.0), None, None)),
            Wanted::Whole => {
                let whole = whole(item, tuned, &after)?;
                return Ok((found(Extracted::Whole, 1.0), None, Some(whole)));
            }
            Wanted::Rank(rank) => rank,
        };
        let deltas = after.iter().zip(&before).map(delta).collect();
        let delta = Matrix::new(item.shape[0], item.shape[1], deltas).map_err(fail)?;
        drop((before, after));
        let top = leading_svd(&delta, rank, self.seed.derive(&item.tensor)).map_err(fail)?;
        drop(delta);
        let least = self.epsilon.max(ZERO * top.sigma.first().copied().unwrap_or(0.0));
        let rank = top.sigma.iter().filter(|s| **s > least).count();
        if rank == 0 {
            return Ok((found(Extracted::Nothing, 0.0), None, None));
        }
        let top = top.truncate(rank);
        let kept = share(top.sigma.iter().map(|s| s * s).sum(), squared);
        let settings = LoraSettings { rank, alpha: rank as f64, rslora: false };
        let (a, b) = factors(&top, self.distribute);
        Ok((found(Extracted::Rank(rank), kept), Some(SiteFactors { site: item.site, settings, a, b }), None))
    }
}

impl Extraction<'_> {
    /// Writes a PEFT adapter folder, which appears whole or not at all; `base` and `base_name` are what it belongs to.
    ///
    /// # Errors
    /// A folder that is there and not empty, and files that cannot be written.
    pub fn save(&self, base: &ModelFiles, base_name: &str, dir: &Path) -> Result<(), MergeError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| MergeError::Io { path, source }
        };
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let staging = folder(dir).join(format!(".{name}.extract-lora"));
        if staging.exists() {
            std::fs::remove_dir_all(&staging).map_err(io(&staging))?;
        }
        let written = hf::write(&self.factors, &self.whole, base.sites(), base_name, &staging);
        let written = written.map_err(|e| match e {
            PeftError::Io { path, source } => MergeError::Io { path, source },
            PeftError::Checkpoint(e) => MergeError::Checkpoint(e),
            other => MergeError::Mismatch { path: dir.into(), problems: vec![other.to_string()] },
        });
        let placed = written.and_then(|()| {
            if dir.is_dir() {
                // Refuses one that is not empty.
                std::fs::remove_dir(dir).map_err(io(dir))?;
            }
            std::fs::rename(&staging, dir).map_err(io(dir))
        });
        match placed {
            Ok(()) => sync_folder(folder(dir)),
            // The error is what counts.
            Err(_) => drop(std::fs::remove_dir_all(&staging)),
        }
        placed
    }
}

/// `A: [rank, d_in]` and `B: [d_out, rank]`.
fn factors(top: &Svd, distribute: bool) -> (Vec<f32>, Vec<f32>) {
    let rank = top.sigma.len();
    let root = |k: usize| top.sigma[k].sqrt();
    let columns = top.vt.cols();
    let a = top.vt.data().iter().enumerate().map(|(i, v)| {
        let k = i / columns;
        (v * if distribute { root(k) } else { top.sigma[k] }) as f32
    });
    let b = top
        .u
        .data()
        .iter()
        .enumerate()
        .map(|(i, u)| (u * if distribute { root(i % rank) } else { 1.0 }) as f32);
    (a.collect(), b.collect())
}

/// The weight of the fine-tune, as its file has it where that is Hugging Face's form.
fn whole<'a>(item: &Item, tuned: &'a ModelFiles, values: &[f32]) -> Result<WholeWeight<'a>, MergeError> {
    let (tensor, shape) = (item.tensor.clone(), item.shape.clone());
    let weights = tuned.weights();
    if weights.form(item.tuned) == GgufForm::Same
        && let Some(info) = weights.tensor_name(item.tuned).and_then(|n| tuned.checkpoint.get(&n))
        && matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16)
    {
        let bytes = Cow::Borrowed(tuned.checkpoint.bytes(&info.name)?);
        return Ok(WholeWeight { tensor, dtype: info.dtype, shape, bytes });
    }
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(WholeWeight { tensor, dtype: DType::F32, shape, bytes: Cow::Owned(bytes) })
}

/// What an adapter would silently lose or could not hold, once the deltas are known.
fn lost(sites: &[ExtractedSite], factors: &[SiteFactors], base: &ModelFiles) -> Vec<String> {
    let mut problems = Vec::new();
    for bias in sites.iter().filter(|s| s.what == Extracted::Whole) {
        let layer = bias_of(bias.site).find(|layer| base.sites().get(*layer).is_some());
        let Some(layer) = layer else { continue };
        let here = sites.iter().find(|s| s.site == layer);
        if here.is_some_and(|s| matches!(s.what, Extracted::Rank(_))) {
            problems.push(format!(
                "`{}` changed, and PEFT keeps a bias only of a module that is saved whole: save `{layer}` whole, or leave out `{}`",
                bias.tensor, bias.site
            ));
        }
    }
    if factors.is_empty() {
        let equal = sites.iter().all(|s| s.what == Extracted::Equal);
        let why = if equal { "the models do not differ" } else { "no linear layer is left that differs" };
        problems.push(format!("there is no adapter to write: {why}"));
    }
    problems
}

/// The layer that a bias belongs to, if the site is one.
fn bias_of(site: Site) -> impl Iterator<Item = Site> {
    Part::ALL.into_iter().filter(move |p| p.bias() == Some(site.part)).map(move |part| Site { part, ..site })
}

/// Keys of the configuration that say something else about what is computed.
fn settings_that_differ(base: &ModelFiles, tuned: &ModelFiles) -> Vec<String> {
    let of = |files: &ModelFiles| match serde_json::to_value(&files.config) {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    };
    let (base, tuned) = (of(base), of(tuned));
    let near = |a: &serde_json::Value, b: &serde_json::Value| match (a.as_f64(), b.as_f64()) {
        // GGUF has them in f32.
        (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * a.abs().max(b.abs()),
        _ => a == b,
    };
    let none = serde_json::Value::Null;
    let keys = base.keys().chain(tuned.keys().filter(|k| !base.contains_key(*k)));
    let differ = keys.filter(|k| !["max_tokens", "tied_head"].contains(&k.as_str())).filter_map(|key| {
        let (a, b) = (base.get(key).unwrap_or(&none), tuned.get(key).unwrap_or(&none));
        (!near(a, b)).then(|| {
            format!("`{key}` is {a} in the base and {b} in the fine-tune; an adapter does not carry that")
        })
    });
    differ.collect()
}

/// `part / whole`, in `[0, 1]` despite rounding.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole).min(1.0) } else { 1.0 }
}

fn mismatch(tuned: &ModelFiles, problems: Vec<String>) -> MergeError {
    MergeError::Mismatch { path: tuned.checkpoint.path().into(), problems }
}

impl fmt::Display for ExtractReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:40} {:>8} {:>12} {:>8}", "site", "rank", "norm", "kept")?;
        let (equal, rest): (Vec<_>, Vec<_>) = self.sites.iter().partition(|s| s.what == Extracted::Equal);
        for s in rest {
            let what = match s.what {
                Extracted::Rank(rank) => rank.to_string(),
                Extracted::Whole => "whole".into(),
                Extracted::Nothing | Extracted::Equal => "-".into(),
            };
            writeln!(f, "{:40} {what:>8} {:>12.4e} {:>7.2}%", s.site.to_string(), s.norm, 100.0 * s.kept)?;
        }
        if !equal.is_empty() {
            writeln!(f, "{} weights do not differ", equal.len())?;
        }
        write!(
            f,
            "{} numbers hold {:.2} % of the squared difference of norm {:.4e}",
            self.parameters,
            100.0 * self.kept,
            self.norm
        )
    }
}
