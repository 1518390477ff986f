//! Plans from profiles: which linear layer gets how many bits, or which rank, under one budget, beside four baselines.
//!
//! The losses are expected rises of the negative log-likelihood: a layer's output error, weighted by the squared gradient of
//! each output. Output errors alone rank layers wrongly, because the residual stream has another length at every depth (on
//! SmolLM2-135M such a plan of 4 bits is worse than 4 bits everywhere). Rises are still those of single layers with the rest of the
//! model intact, and they are added; layers interact, so compare plans by what the whole model loses, at equal budget.

use std::collections::{BTreeMap, BTreeSet};

use firebrick_core::{Baseline, BudgetError, Choice, LayerPlan, Part, Seed, Settings, Site, SiteTable};
use firebrick_core::{allocate, allocate_baseline};
use serde::Serialize;

use crate::profile::{LinearProfile, Profile};
use crate::report::{Cell, Heatmap, Row, Scatter, Section, Table};
use crate::{AnalysisError, by_part};

/// Budgets of a front beside the least.
const STEPS: u8 = 12;

/// One allocation: the plan, and what it costs and loses by the profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Allocation {
    /// `bits` or `rank` of each site; a site of rank 0 gets no rule.
    pub plan: LayerPlan,
    /// Bits or rank of every site.
    pub levels: BTreeMap<Site, usize>,
    /// What it costs, in [`Plans::unit`].
    pub cost: u64,
    /// Sum of the sites' expected rises of the negative log-likelihood, in nats per token.
    pub loss: f64,
}

/// An allocation by profile beside the allocations no claim should be made without, all within one budget.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plans {
    /// What is allocated: `bits` or `rank`.
    pub setting: &'static str,
    /// Unit of budget and costs: bits of codes, or parameters of factors.
    pub unit: &'static str,
    /// The budget of each of them.
    pub budget: u64,
    /// Where it is needed most by the profile.
    pub planned: Allocation,
    /// The same everywhere, as far as the budget goes.
    pub uniform: Allocation,
    /// The first layers get the best choice.
    pub first: Allocation,
    /// The last layers get the best choice.
    pub last: Allocation,
    /// Layers in random order get the best choice, one allocation per seed.
    pub random: Vec<Allocation>,
}

/// How much may be spent on ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RankBudget {
    /// Parameters of all factors together.
    Parameters(u64),
    /// Parameters of this rank, which need not be whole, at every site.
    MeanRank(f64),
}

/// The bits of each linear layer in `table` so that their mean over weights is at most `mean_bits` and the summed
/// [`BitLoss::rise`](crate::BitLoss::rise) is smallest. `candidates` must have been profiled
/// (their errors hold for the group length of the profile). Scales are not counted: they cost the same for any choice.
///
/// # Errors
/// See [`bit_plans`].
pub fn allocate_bits(
    profile: &Profile,
    table: &SiteTable,
    mean_bits: f64,
    candidates: &[u8],
) -> Result<LayerPlan, AnalysisError> {
    let market = Market::bits(profile, table, mean_bits, candidates)?;
    Ok(market.allocation(allocate(&market.options, market.budget)?).plan)
}

/// [`allocate_bits`] and the four baselines, with a random one per seed.
///
/// # Errors
/// Candidates that were not profiled, sites the profile and the model do not share (all listed), and a budget
/// below the cheapest candidate everywhere.
pub fn bit_plans(
    profile: &Profile,
    table: &SiteTable,
    mean_bits: f64,
    candidates: &[u8],
    seeds: &[Seed],
) -> Result<Plans, AnalysisError> {
    Market::bits(profile, table, mean_bits, candidates)?.plans(seeds)
}

/// The rank of each linear layer in `table` within `budget` so that the summed
/// [`RankLoss::rise`](crate::RankLoss::rise) is smallest.
/// Candidates above the full rank of a layer are not offered there; a site that gets rank 0 has no rule in the plan.
///
/// # Errors
/// See [`rank_plans`].
pub fn allocate_ranks(
    profile: &Profile,
    table: &SiteTable,
    budget: RankBudget,
    candidates: &[usize],
) -> Result<LayerPlan, AnalysisError> {
    let market = Market::ranks(profile, table, budget, candidates)?;
    Ok(market.allocation(allocate(&market.options, market.budget)?).plan)
}

/// [`allocate_ranks`] and the four baselines, with a random one per seed.
///
/// # Errors
/// As [`bit_plans`].
pub fn rank_plans(
    profile: &Profile,
    table: &SiteTable,
    budget: RankBudget,
    candidates: &[usize],
    seeds: &[Seed],
) -> Result<Plans, AnalysisError> {
    Market::ranks(profile, table, budget, candidates)?.plans(seeds)
}

/// Expected rise against size at a series of budgets, planned and uniform: what the plan gains where.
///
/// # Errors
/// See [`bit_plans`].
pub fn bit_front(profile: &Profile, table: &SiteTable, candidates: &[u8]) -> Result<Scatter, AnalysisError> {
    let (low, high) = (candidates.iter().min().copied(), candidates.iter().max().copied());
    let (low, high) = (f64::from(low.unwrap_or(0)), f64::from(high.unwrap_or(0)));
    let mut chart = Scatter::new("Size and expected rise of the loss", "MB of codes", "nats per token").log();
    for i in 0..=STEPS {
        let mean_bits = low + (high - low) * (f64::from(i) / f64::from(STEPS)).powi(2);
        let plans = bit_plans(profile, table, mean_bits, candidates, &[])?;
        for (kind, a) in [("planned", &plans.planned), ("uniform", &plans.uniform)] {
            let label = format!("{kind}, {mean_bits:.2} bits");
            chart = chart.point(kind, label, a.cost as f64 / 8e6, a.loss);
        }
    }
    Ok(chart.front())
}

/// Sites, their choices, and what each choice sets.
struct Market {
    setting: &'static str,
    unit: &'static str,
    sites: Vec<Site>,
    options: Vec<Vec<Choice>>,
    levels: Vec<Vec<usize>>,
    budget: u64,
}

impl Market {
    fn bits(
        profile: &Profile,
        table: &SiteTable,
        mean_bits: f64,
        candidates: &[u8],
    ) -> Result<Self, AnalysisError> {
        let linear = shared(profile, table)?;
        let wanted: BTreeSet<usize> = candidates.iter().map(|b| usize::from(*b)).collect();
        let mut problems = positive("mean_bits", mean_bits);
        problems.extend(missing("bits", &wanted, profile.options.bits.iter().map(|b| usize::from(*b))));
        if !problems.is_empty() {
            return Err(AnalysisError::Options { problems });
        }
        let weights = |l: &LinearProfile| (l.d_in * l.d_out) as u64;
        let total: u64 = linear.iter().map(|l| weights(l)).sum();
        let offered = |l: &LinearProfile| {
            let measured = l.bits.iter().filter(|b| wanted.contains(&usize::from(b.bits)));
            let choice = |b: &crate::BitLoss| Choice { cost: u64::from(b.bits) * weights(l), loss: b.rise };
            measured.map(|b| (usize::from(b.bits), choice(b))).collect()
        };
        Ok(Market::new("bits", "bits of codes", &linear, offered, spend(mean_bits, total)))
    }

    fn ranks(
        profile: &Profile,
        table: &SiteTable,
        budget: RankBudget,
        candidates: &[usize],
    ) -> Result<Self, AnalysisError> {
        let linear = shared(profile, table)?;
        let wanted: BTreeSet<usize> = candidates.iter().copied().collect();
        let mut problems = match budget {
            RankBudget::MeanRank(mean) => positive("the mean rank", mean),
            RankBudget::Parameters(_) => Vec::new(),
        };
        problems.extend(missing("rank", &wanted, profile.options.ranks.iter().copied()));
        if !problems.is_empty() {
            return Err(AnalysisError::Options { problems });
        }
        let budget = match budget {
            RankBudget::Parameters(n) => n,
            RankBudget::MeanRank(mean) => spend(mean, linear.iter().map(|l| (l.d_in + l.d_out) as u64).sum()),
        };
        let offered = |l: &LinearProfile| {
            let measured = l.ranks.iter().filter(|r| wanted.contains(&r.rank));
            measured.map(|r| (r.rank, Choice { cost: r.size, loss: r.rise })).collect()
        };
        Ok(Market::new("rank", "parameters", &linear, offered, budget))
    }

    fn new(
        setting: &'static str,
        unit: &'static str,
        linear: &[&LinearProfile],
        offered: impl Fn(&LinearProfile) -> Vec<(usize, Choice)>,
        budget: u64,
    ) -> Self {
        let (levels, options) = linear.iter().map(|l| offered(l).into_iter().unzip()).unzip();
        let sites = linear.iter().map(|l| l.site).collect();
        Market { setting, unit, sites, options, levels, budget }
    }

    fn plans(&self, seeds: &[Seed]) -> Result<Plans, AnalysisError> {
        let baseline = |b: Baseline| -> Result<Allocation, BudgetError> {
            Ok(self.allocation(allocate_baseline(&self.options, self.budget, b)?))
        };
        Ok(Plans {
            setting: self.setting,
            unit: self.unit,
            budget: self.budget,
            planned: self.allocation(allocate(&self.options, self.budget)?),
            uniform: baseline(Baseline::Uniform)?,
            first: baseline(Baseline::First)?,
            last: baseline(Baseline::Last)?,
            random: seeds.iter().map(|s| baseline(Baseline::Random(*s))).collect::<Result<_, _>>()?,
        })
    }

    fn allocation(&self, picked: Vec<usize>) -> Allocation {
        let chosen: Vec<(Site, usize, Choice)> = (0..self.sites.len())
            .map(|s| (self.sites[s], self.levels[s][picked[s]], self.options[s][picked[s]]))
            .collect();
        let settings = |level: usize| match self.setting {
            "bits" => Settings { bits: u32::try_from(level).ok(), ..Settings::default() },
            _ => Settings { rank: Some(level), ..Settings::default() },
        };
        let rules = chosen.iter().filter(|c| c.1 > 0).map(|c| (c.0, settings(c.1)));
        Allocation {
            plan: LayerPlan::from_sites(rules),
            levels: chosen.iter().map(|c| (c.0, c.1)).collect(),
            cost: chosen.iter().map(|c| c.2.cost).sum(),
            loss: chosen.iter().map(|c| c.2.loss).sum(),
        }
    }
}

/// The profiled layers; an error lists those the table lacks or knows with other widths, and those without a profile.
fn shared<'a>(profile: &'a Profile, table: &SiteTable) -> Result<Vec<&'a LinearProfile>, AnalysisError> {
    let mut problems = Vec::new();
    for l in &profile.linear {
        match table.linear(l.site) {
            Some((d_in, d_out)) if (d_in, d_out) == (l.d_in, l.d_out) => {}
            Some((d_in, d_out)) => problems.push(format!(
                "{}: {} x {} in the profile, {d_out} x {d_in} in the model",
                l.site, l.d_out, l.d_in
            )),
            None => problems.push(format!("{}: no linear layer in the model", l.site)),
        }
    }
    let profiled: BTreeSet<Site> = profile.linear.iter().map(|l| l.site).collect();
    let linears = table.block_linears();
    problems.extend(linears.iter().filter(|s| !profiled.contains(s)).map(|s| format!("{s}: not profiled")));
    match problems.is_empty() {
        true => Ok(profile.linear.iter().collect()),
        false => Err(AnalysisError::Mismatch { problems }),
    }
}

fn positive(name: &str, value: f64) -> Vec<String> {
    let fine = value.is_finite() && value >= 0.0;
    if fine { Vec::new() } else { vec![format!("{name} is {value}; it is a number of at least 0")] }
}

fn missing(name: &str, wanted: &BTreeSet<usize>, measured: impl Iterator<Item = usize>) -> Vec<String> {
    let measured: BTreeSet<usize> = measured.collect();
    let mut problems: Vec<String> = wanted
        .difference(&measured)
        .map(|v| format!("{name} {v} was not profiled; there are {measured:?}"))
        .collect();
    if wanted.is_empty() {
        problems.push(format!("no candidates for {name}; there are {measured:?}"));
    }
    problems
}

/// `mean * total`, rounded down but for the rounding error of a mean such as 3.3.
fn spend(mean: f64, total: u64) -> u64 {
    (mean * total as f64 * (1.0 + 4.0 * f64::EPSILON)) as u64
}

impl Plans {
    /// Every allocation with its name, the planned one first.
    pub fn all(&self) -> Vec<(String, &Allocation)> {
        let mut all = vec![
            ("planned".to_string(), &self.planned),
            ("uniform".to_string(), &self.uniform),
            ("first layers".to_string(), &self.first),
            ("last layers".to_string(), &self.last),
        ];
        all.extend(self.random.iter().enumerate().map(|(i, a)| (format!("random {}", i + 1), a)));
        all
    }

    /// A table of cost and loss of every allocation, and heat maps of what the planned and the uniform one give.
    pub fn section(&self, title: &str) -> Section {
        let mut table = Table::new("The same budget, spent in different ways")
            .text_column("allocation")
            .number_column(format!("cost ({})", self.unit))
            .number_column("share of the budget")
            .number_column("expected rise (nats per token)")
            .number_column("rise / uniform");
        for (name, a) in self.all() {
            let share = a.cost as f64 / (self.budget as f64).max(1.0);
            let ratio = (self.uniform.loss > 0.0).then(|| a.loss / self.uniform.loss);
            let numbers = [Some(a.cost as f64), Some(share), Some(a.loss), ratio].map(Cell::from);
            table = table.row(std::iter::once(Cell::from(name)).chain(numbers));
        }
        Section::new(title)
            .text(format!(
                "Every allocation may spend {} {}. The rise of the loss is that expected of each layer alone, added up; only a \
                 measurement of the whole model says whether the plan is better.",
                crate::report::number(self.budget as f64),
                self.unit
            ))
            .table(table.highlight(0))
            .heatmap(self.levels("planned", &self.planned))
            .heatmap(self.levels("uniform", &self.uniform))
    }

    /// What the planned allocation gives each layer, beside what the profile says of the layer.
    pub fn beside(&self, profile: &Profile) -> Heatmap {
        let layers = profile.layers;
        let mean_of = |values: &[f64]| (!values.is_empty()).then(|| crate::stats::mean(values));
        let levels = |l: usize| {
            let here = self.planned.levels.iter().filter(|(s, _)| s.layer == Some(l));
            mean_of(&here.map(|(_, v)| *v as f64).collect::<Vec<_>>())
        };
        let linear = |l: usize, value: fn(&LinearProfile) -> f64| {
            let here = profile.linear.iter().filter(|p| p.site.layer == Some(l));
            mean_of(&here.map(value).collect::<Vec<_>>())
        };
        let influence =
            |part: Part| move |l: usize| profile.residual_at(Site::layer(l, part)).map(|r| r.influence.mean);
        Heatmap::new(format!("Planned {} beside the profile", self.setting), "layer", layers)
            .row(Row::new(format!("planned {}, mean", self.setting), (0..layers).map(levels)))
            .row(Row::new("gradient energy", (0..layers).map(|l| linear(l, |p| p.gradient_energy))).log())
            .row(Row::new("rank of the inputs", (0..layers).map(|l| linear(l, |p| p.activation_rank))))
            .row(Row::new("block: influence", (0..layers).map(influence(Part::Block))).log())
            .row(Row::new("attention: influence", (0..layers).map(influence(Part::AttnSublayer))).log())
            .row(Row::new("feed-forward: influence", (0..layers).map(influence(Part::MlpSublayer))).log())
    }

    fn levels(&self, name: &str, allocation: &Allocation) -> Heatmap {
        let layers = allocation.levels.keys().filter_map(|s| s.layer).max().map_or(0, |l| l + 1);
        let rows = by_part(allocation.levels.iter().map(|(s, v)| (*s, *v as f64)), layers);
        let map = Heatmap::new(format!("{} by layer, {name}", self.setting), "layer", layers).shared_scale();
        rows.into_iter().fold(map, |map, (part, values)| map.row(Row::new(part, values)))
    }
}
