//! LoRA (arXiv 2106.09685) in activation space: `y = base(x) + scale * (x A) B`.
//!
//! The dense `A B` is never formed in a forward or backward pass, unlike weight-space LoRA, which pays a dense product and a
//! dense gradient per layer and step.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{
    Base, Brick, LowRank, Mode, ResolvedPlan, Run, Seed, Settings, Site, SiteSet, SiteTable,
};
use firebrick_models::Decoder;
use firebrick_moe::AdapterGates;
use firebrick_tensor::ops::{Precision, linear, linear_add};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::PeftError;

/// What every site of a bank gets unless a plan says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank `r` of the update.
    pub rank: usize,
    /// Strength: the update is scaled by `alpha / r`, or `alpha / sqrt(r)` with `rslora`.
    pub alpha: f64,
    /// Probability that an element of the adapter's input is dropped in training.
    pub dropout: f64,
    /// Rank-stabilized scale (arXiv 2312.03732).
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig { rank: 8, alpha: 16.0, dropout: 0.0, rslora: false }
    }
}

/// Rank and strength at one site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSettings {
    /// Rank `r`.
    pub rank: usize,
    /// Strength.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(r)` instead of `alpha / r`.
    pub rslora: bool,
}

impl LoraSettings {
    /// The factor of the update.
    pub fn scale(&self) -> f64 {
        let r = self.rank as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }
}

/// The two factors of one site's update.
#[derive(Module, Debug)]
pub struct LoraFactors {
    /// `A: [d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// `B: [rank, d_out]`.
    pub b: Param<Tensor<2>>,
}

/// LoRA adapters over a set of linear layers, with rank and alpha per site.
///
/// If the [`Run`] carries [`AdapterGates`] and the bank has a slot, the update of each token is scaled by its gate.
#[derive(Module, Debug)]
pub struct LoraBank {
    factors: Vec<LoraFactors>,
    #[module(skip)]
    layout: Layout,
}

#[derive(Clone, Debug)]
struct Layout {
    sites: SiteSet,
    index: BTreeMap<Site, usize>,
    settings: Vec<LoraSettings>,
    dropout: f64,
    slot: Option<usize>,
}

impl LoraConfig {
    /// Adapters of this rank and strength on every site of `targets`.
    ///
    /// # Errors
    /// If `targets` is empty or holds a site without a linear layer, or the rank, alpha or dropout is out of range.
    pub fn init(
        &self,
        sites: &SiteTable,
        targets: &SiteSet,
        seed: Seed,
        device: &Device,
    ) -> Result<LoraBank, PeftError> {
        let same = LoraSettings { rank: self.rank, alpha: self.alpha, rslora: self.rslora };
        self.init_each(sites, targets.iter().map(|s| (s, same)), seed, device)
    }

    /// Adapters as `plan` says: its `rank` and `alpha` per linear layer inside the blocks; sites without a rank, or of rank 0, get no
    /// adapter. Where the plan is silent on alpha, the site gets the alpha that makes its scale the one of this configuration,
    /// so that ranks do not change how strongly a site is adapted.
    ///
    /// # Errors
    /// As [`LoraConfig::init`].
    pub fn init_plan(
        &self,
        sites: &SiteTable,
        plan: &ResolvedPlan,
        seed: Seed,
        device: &Device,
    ) -> Result<LoraBank, PeftError> {
        let of = |s: &Settings| {
            let rank = s.rank?;
            let same = LoraSettings { rank: self.rank.max(1), alpha: self.alpha, rslora: self.rslora };
            let alpha =
                s.alpha.unwrap_or_else(|| same.scale() / LoraSettings { rank, alpha: 1.0, ..same }.scale());
            (rank > 0).then_some(LoraSettings { rank, alpha, ..same })
        };
        let linears = sites.block_linears();
        let each = linears.iter().filter_map(|site| Some((site, plan.get(site).and_then(of)?)));
        self.init_each(sites, each, seed, device)
    }

    /// `A` uniform in `±1/sqrt(d_in)` (Kaiming with a = sqrt 5, as PEFT), `B` zero: the bank changes nothing at first.
    fn init_each(
        &self,
        sites: &SiteTable,
        each: impl Iterator<Item = (Site, LoraSettings)>,
        seed: Seed,
        device: &Device,
    ) -> Result<LoraBank, PeftError> {
        let mut parts = Vec::new();
        for (site, settings) in each {
            let (d_in, d_out) = sites.linear(site).ok_or(PeftError::NotLinear { site })?;
            let r = settings.rank;
            if r == 0 || r > d_in.min(d_out) {
                let what = format!("rank {r} should lie in 1..={}", d_in.min(d_out));
                return Err(PeftError::Setting { site, what });
            }
            let bound = (d_in as f64).powf(-0.5);
            let a = seed.uniform(&format!("lora.init/{site}"), d_in * r, bound);
            let a = Tensor::<2>::from_data(TensorData::new(a, [d_in, r]), device);
            let b = Tensor::<2>::zeros([r, d_out], device);
            parts.push((site, settings, a, b));
        }
        LoraBank::from_parts(parts, self.dropout)
    }
}

impl LoraBank {
    /// A bank of given factors: site, settings, `A: [d_in, rank]`, `B: [rank, d_out]`; `dropout` lies in `0..1`.
    ///
    /// # Errors
    /// [`PeftError::Nothing`] without parts, else [`PeftError::Parts`] with every rank of 0, alpha that is not finite, factor of
    /// another shape, site that comes twice, and a dropout out of range.
    pub fn from_parts(
        parts: Vec<(Site, LoraSettings, Tensor<2>, Tensor<2>)>,
        dropout: f64,
    ) -> Result<Self, PeftError> {
        if parts.is_empty() {
            return Err(PeftError::Nothing);
        }
        let mut problems = Vec::new();
        if !(0.0..1.0).contains(&dropout) {
            problems.push(format!("dropout {dropout} should lie in 0..1"));
        }
        let mut sites = SiteSet::default();
        for (site, settings, a, b) in &parts {
            let LoraSettings { rank, alpha, .. } = *settings;
            if !sites.insert(*site) {
                problems.push(format!("`{site}` comes twice"));
            }
            if rank == 0 {
                problems.push(format!("`{site}`: rank 0"));
            }
            if !alpha.is_finite() {
                problems.push(format!("`{site}`: alpha {alpha}"));
            }
            if a.dims()[1] != rank || b.dims()[0] != rank {
                let (a, b) = (a.dims(), b.dims());
                problems.push(format!("`{site}`: factors {a:?} and {b:?} for rank {rank}"));
            }
        }
        if !problems.is_empty() {
            return Err(PeftError::Parts { problems });
        }
        let index = parts.iter().enumerate().map(|(i, p)| (p.0, i)).collect();
        let settings = parts.iter().map(|p| p.1).collect();
        let factors = parts
            .into_iter()
            .map(|(_, _, a, b)| LoraFactors { a: Param::from_tensor(a), b: Param::from_tensor(b) })
            .collect();
        Ok(LoraBank { factors, layout: Layout { sites, index, settings, dropout, slot: None } })
    }

    /// The same bank as adapter number `slot` of those that [`AdapterGates`] weigh.
    pub fn with_slot(mut self, slot: usize) -> Self {
        self.layout.slot = Some(slot);
        self
    }

    /// Settings and factors at `site`.
    pub fn get(&self, site: Site) -> Option<(LoraSettings, &LoraFactors)> {
        let i = *self.layout.index.get(&site)?;
        Some((self.layout.settings[i], &self.factors[i]))
    }

    /// The paths of the adapter's parameters at `site` in this module, by which optimizers know them; none without an adapter.
    pub fn parameters(&self, site: Site) -> Vec<String> {
        let index = self.layout.index.get(&site);
        index.map_or(Vec::new(), |i| ["a", "b"].map(|name| format!("factors.{i}.{name}")).to_vec())
    }

    /// Probability that an element of the adapters' input is dropped in training.
    pub fn dropout(&self) -> f64 {
        self.layout.dropout
    }

    /// The update of the weight at `site`, `scale * A B: [d_in, d_out]`.
    pub fn delta(&self, site: Site) -> Option<Tensor<2>> {
        let (settings, f) = self.get(site)?;
        let (a, b) = (f.a.val().without_autodiff(), f.b.val().without_autodiff());
        Some(a.matmul(b) * settings.scale())
    }

    /// `decoder` with `weight` times the updates added to its weights; at weight 1 it computes without the bank what it computed with it.
    ///
    /// # Errors
    /// [`PeftError::NotLinear`] or [`PeftError::Shape`] if the decoder has no such layer.
    pub fn merge(&self, decoder: Decoder, weight: f64) -> Result<Decoder, PeftError> {
        self.shift(decoder, weight)
    }

    /// The inverse of [`LoraBank::merge`], up to rounding.
    ///
    /// # Errors
    /// As [`LoraBank::merge`].
    pub fn unmerge(&self, decoder: Decoder, weight: f64) -> Result<Decoder, PeftError> {
        self.shift(decoder, -weight)
    }

    fn shift(&self, mut decoder: Decoder, factor: f64) -> Result<Decoder, PeftError> {
        for site in self.layout.sites.iter() {
            let expected = decoder.sites().linear(site).ok_or(PeftError::NotLinear { site })?;
            let delta = self.delta(site).expect("a bank has factors at its own sites");
            let [d_in, d_out] = delta.dims();
            if (d_in, d_out) != expected {
                return Err(PeftError::Shape { site, found: (d_in, d_out), expected });
            }
            // A head that is the embedding has none.
            let weight = decoder.weight(site).ok_or(PeftError::NotLinear { site })?;
            let delta = delta.to_device(&weight.device()).transpose() * factor;
            decoder = decoder.with_weight(site, weight + delta);
        }
        Ok(decoder)
    }

    /// Whether inputs are dropped out in this run.
    fn drops(&self, run: &Run<'_>) -> bool {
        self.layout.dropout > 0.0 && run.mode == Mode::Train
    }

    /// The mask of inverted dropout for an input of this shape, from the run's seed.
    fn dropout_mask(&self, site: Site, shape: [usize; 3], run: &Run<'_>, device: &Device) -> Tensor<3> {
        let keep = 1.0 - self.layout.dropout;
        let mut rng = run.seed.stream(&format!("lora.dropout/{site}"));
        let n = shape.iter().product();
        let mask: Vec<f32> =
            (0..n).map(|_| if rng.random::<f64>() < keep { (1.0 / keep) as f32 } else { 0.0 }).collect();
        Tensor::from_data(TensorData::new(mask, shape), device)
    }
}

impl Brick for LoraBank {
    fn sites(&self) -> &SiteSet {
        &self.layout.sites
    }

    fn low_rank(&self, site: Site, run: &Run<'_>) -> Option<LowRank> {
        let gated = self.layout.slot.is_some() && run.get::<AdapterGates>().is_some();
        if gated || self.drops(run) {
            return None;
        }
        let (settings, f) = self.get(site)?;
        Some(LowRank { a: f.a.val(), b: f.b.val(), scale: settings.scale() })
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let (settings, f) = self.get(site).expect("called at its own sites");
        let y = base(x.clone(), run);
        let shape = x.dims();
        let x = if self.drops(run) {
            let mask = self.dropout_mask(site, shape, run, &x.device());
            x * mask
        } else {
            x
        };
        // Flattened, so that burn runs one product instead of one a batch row.
        let (rows, d_out) = (shape[0] * shape[1], y.dims()[2]);
        let flat = x.reshape([rows, shape[2]]);
        // Scaled where it is narrowest.
        let narrow = linear(flat, f.a.val(), Precision::F32) * settings.scale();
        match (self.layout.slot, run.get::<AdapterGates>()) {
            (Some(slot), Some(gates)) => {
                let update = linear(narrow, f.b.val(), Precision::F32);
                y + update.reshape([shape[0], shape[1], d_out]) * gates.of(slot)
            }
            _ => {
                let sum = linear_add(y.reshape([rows, d_out]), narrow, f.b.val(), Precision::F32);
                sum.reshape([shape[0], shape[1], d_out])
            }
        }
    }
}
