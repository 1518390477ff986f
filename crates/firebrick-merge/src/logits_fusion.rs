//! Dynamic Logits Fusion (Fan et al. 2024, arXiv 2406.15480): small experts steer a large model while it decodes.
//!
//! At each step the large model's logits `M` are shifted by what tuning did to a small model of the same vocabulary:
//! `M + sum_t a_t (E_t - B)`, with the logits `E_t` of small experts and `B` of their common base. Proxy tuning (Liu et al.
//! 2024, arXiv 2401.08565) keeps every weight `a_t` at 1; here they are chosen at each step so that the shift changes the
//! large model's prediction as much, in Kullback-Leibler divergence, as tuning changed the small one's.
//!
//! With `D = E_t - B` and `A(a) = ln sum_v P_v exp(a D_v)`, where `P` is the large model's prediction and `P~` the shifted one,
//! `KL(P~ || P) = a A'(a) - A(a)` has the slope `a Var_P~(D)` and `KL(P || P~) = A(a) - a A'(0)` the slope `A'(a) - A'(0)`: both
//! rise from 0, so each meets its target at most once, and bisection with Newton's steps finds where; the paper searches a
//! grid. Where both directions count, the weight lies between the two. Targets of several experts act as their mean, since
//! `sum_t (x - c_t)^2` and `T (x - mean c)^2` differ by a constant.

use firebrick_core::{Brick, Run};
use firebrick_models::{Decoder, ModelError, token_tensor};
use firebrick_tensor::ops::KvCache;
use rayon::prelude::*;

use crate::MergeError;

/// How far the large model is shifted towards an expert.
#[derive(Clone, Debug, PartialEq)]
pub enum FusionWeight {
    /// The same at every step, one weight for each expert; all 1 is proxy tuning.
    Fixed(Vec<f64>),
    /// At each step such that the large model's prediction moves as far as the small one's; 0 where the experts agree with
    /// their base, up to what f32 rounds.
    KlMatched {
        /// Largest weight, which also holds where no weight moves the prediction far enough; the paper has 2.
        max: f64,
        /// Both directions of the divergence count, as in the paper: the sum of their squared misses is least. Else
        /// `KL(P~ || P)` alone meets its target.
        two_sided: bool,
    },
}

/// Which of several experts are heard at a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertRule {
    /// One: that whose weight misses the targets least, in both directions; the first of equals. The paper's rule.
    #[default]
    BestSingle,
    /// All, their weights found one after the other from the best single one on; dearer by some tens of passes over the
    /// vocabulary for each expert, and never further from the targets.
    Joint,
}

/// Settings of logits fusion; the default is the paper's.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsFusionConfig {
    /// How the weights are chosen.
    pub weight: FusionWeight,
    /// Which experts have one, where weights are chosen at each step.
    pub experts: ExpertRule,
}

impl Default for LogitsFusionConfig {
    fn default() -> Self {
        LogitsFusionConfig {
            weight: FusionWeight::KlMatched { max: 2.0, two_sided: true },
            experts: ExpertRule::BestSingle,
        }
    }
}

impl LogitsFusionConfig {
    /// What is wrong with these settings for so many experts; empty if nothing is.
    fn problems(&self, experts: usize) -> Vec<String> {
        let mut problems = Vec::new();
        if experts == 0 {
            problems.push("there is no expert".into());
        }
        match &self.weight {
            FusionWeight::Fixed(weights) => {
                if weights.len() != experts {
                    problems.push(format!("{} fixed weights for {experts} experts", weights.len()));
                }
                let odd = weights.iter().filter(|w| !w.is_finite());
                problems.extend(odd.map(|w| format!("a fixed weight is {w}")));
            }
            FusionWeight::KlMatched { max, two_sided } => {
                if !(max.is_finite() && *max > 0.0) {
                    problems.push(format!("the largest weight is {max}; it should be more than 0"));
                }
                if self.experts == ExpertRule::Joint && !two_sided {
                    let why = "weights of several experts need both directions: one expert alone meets one";
                    problems.push(why.into());
                }
            }
        }
        problems
    }
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedStep {
    /// The weight of each expert.
    pub weights: Vec<f64>,
    /// How far the large model's prediction moved, in nats: `KL(P~ || P)` and `KL(P || P~)`.
    pub moved: [f64; 2],
    /// How far tuning moved the small model's, mean over the experts: `KL(Q_t || Q)` and `KL(Q || Q_t)`.
    pub wanted: [f64; 2],
}

/// Shifts the logits of one step, `large: [vocab]`, by `base` and `experts` (`[vocab]` each).
///
/// A token that any of the models excludes (a logit of minus infinity) is excluded from all, before anything is subtracted. Where
/// experts and base agree, the large model's logits stay what they were, bit for bit.
///
/// # Errors
/// [`MergeError::Fusion`] with all that is wrong: settings, vocabularies of different sizes, a logit that is NaN or plus
/// infinity, no token that all models allow.
pub fn fuse_logits(
    large: &mut [f32],
    base: &[f32],
    experts: &[&[f32]],
    config: &LogitsFusionConfig,
) -> Result<FusedStep, MergeError> {
    let mut problems = config.problems(experts.len());
    let all = [("large model".to_string(), &*large), ("base".to_string(), base)];
    let named = experts.iter().enumerate().map(|(t, logits)| (format!("expert {t}"), *logits));
    for (name, logits) in all.into_iter().chain(named) {
        if logits.len() != large.len() {
            problems.push(format!("the {name} has {} logits, the large model {}", logits.len(), large.len()));
        }
        if let Some(bad) = logits.iter().find(|l| l.is_nan() || **l == f32::INFINITY) {
            problems.push(format!("a logit of the {name} is {bad}"));
        }
    }
    if !problems.is_empty() {
        return Err(MergeError::Fusion { problems });
    }
    let mut allowed = vec![true; large.len()];
    for logits in [&*large, base].iter().chain(experts) {
        allowed.iter_mut().zip(logits.iter()).for_each(|(a, l)| *a &= *l != f32::NEG_INFINITY);
    }
    if !allowed.contains(&true) {
        return Err(MergeError::Fusion { problems: vec!["no token is allowed by all models".into()] });
    }
    let step = Step::new(large, base, experts, &allowed);
    let weights = match &config.weight {
        FusionWeight::Fixed(weights) => weights.clone(),
        FusionWeight::KlMatched { max, two_sided } => step.weights(*max, *two_sided, config.experts),
    };
    let heard: Vec<(f64, &[f32])> =
        weights.iter().copied().zip(experts.iter().copied()).filter(|(a, _)| *a != 0.0).collect();
    for (v, logit) in large.iter_mut().enumerate() {
        if !allowed[v] {
            *logit = f32::NEG_INFINITY;
            continue;
        }
        let mut shift = 0.0;
        for (a, expert) in &heard {
            shift += a * (f64::from(expert[v]) - f64::from(base[v]));
        }
        // Adding 0 would turn -0 into +0.
        if shift != 0.0 {
            *logit = (f64::from(*logit) + shift) as f32;
        }
    }
    let moved = step.moved(&weights);
    Ok(FusedStep { weights, moved, wanted: step.wanted })
}

/// A prediction over the tokens that all models allow.
struct Prediction {
    log_p: Vec<f64>,
    p: Vec<f64>,
}

impl Prediction {
    fn of(mut logits: Vec<f64>) -> Prediction {
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut p = vec![0.0; logits.len()];
        let sums: Vec<f64> = p
            .par_chunks_mut(PART)
            .zip(logits.par_chunks(PART))
            .map(|(p, logits)| {
                p.iter_mut().zip(logits).for_each(|(p, l)| *p = (l - top).exp());
                p.iter().sum()
            })
            .collect();
        let sum: f64 = sums.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        let log_sum = top + sum.ln();
        logits.iter_mut().for_each(|l| *l -= log_sum);
        Prediction { log_p: logits, p }
    }

    /// `delta` less its mean under this prediction, so that `A'(0)` is 0.
    fn centred(&self, delta: &[f64]) -> Vec<f64> {
        let mean = dot(&self.p, delta);
        delta.iter().map(|d| d - mean).collect()
    }
}

/// One step.
struct Step {
    /// The large model's prediction.
    prior: Prediction,
    /// Expert minus base, centred under the large model.
    deltas: Vec<Vec<f64>>,
    /// How far each expert moved from its base, both directions.
    targets: Vec<[f64; 2]>,
    /// Their mean.
    wanted: [f64; 2],
}

impl Step {
    fn new(large: &[f32], base: &[f32], experts: &[&[f32]], allowed: &[bool]) -> Step {
        let all = allowed.iter().all(|a| *a);
        let of = |logits: &[f32]| -> Vec<f64> {
            match all {
                true => logits.iter().map(|l| f64::from(*l)).collect(),
                false => {
                    logits.iter().zip(allowed).filter(|(_, a)| **a).map(|(l, _)| f64::from(*l)).collect()
                }
            }
        };
        let (prior, base) = (Prediction::of(of(large)), of(base));
        let small = Prediction::of(base.clone());
        let rounding = ROUNDING * base.iter().fold(0.0, |top, b| b.abs().max(top));
        let (mut deltas, mut targets) = (Vec::new(), Vec::new());
        for expert in experts {
            let mut delta: Vec<f64> = of(expert).iter().zip(&base).map(|(e, b)| e - b).collect();
            // What two ways to compute one model differ by is no tuning: however small, a weight would be matched to it.
            if spread(&delta) <= rounding {
                delta.fill(0.0);
            }
            targets.push(Tilt::of(&small.log_p, &small.centred(&delta), 1.0).divergences(1.0));
            deltas.push(prior.centred(&delta));
        }
        let mean = |i: usize| targets.iter().map(|t| t[i]).sum::<f64>() / targets.len() as f64;
        let wanted = [mean(0), mean(1)];
        Step { prior, deltas, targets, wanted }
    }

    /// How far the large model's prediction moves with these weights.
    fn moved(&self, weights: &[f64]) -> [f64; 2] {
        Tilt::of(&self.prior.log_p, &self.shift(weights), 1.0).divergences(1.0)
    }

    fn shift(&self, weights: &[f64]) -> Vec<f64> {
        let mut shift = vec![0.0; self.prior.p.len()];
        for (weight, delta) in weights.iter().zip(&self.deltas) {
            shift.iter_mut().zip(delta).for_each(|(s, d)| *s += weight * d);
        }
        shift
    }

    /// The sum over experts of the squared misses in both directions.
    fn miss(&self, moved: [f64; 2]) -> f64 {
        self.targets.iter().map(|t| (moved[0] - t[0]).powi(2) + (moved[1] - t[1]).powi(2)).sum()
    }

    fn weights(&self, max: f64, two_sided: bool, rule: ExpertRule) -> Vec<f64> {
        let mut best: Option<(f64, usize, f64)> = None;
        for (t, delta) in self.deltas.iter().enumerate() {
            // Constant or nothing: the prediction does not move.
            let weight = if spread(delta) == 0.0 { 0.0 } else { self.matched(delta, max, two_sided) };
            let miss = self.miss(Tilt::of(&self.prior.log_p, delta, weight).divergences(weight));
            if best.is_none_or(|(least, ..)| miss < least) {
                best = Some((miss, t, weight));
            }
        }
        let mut weights = vec![0.0; self.deltas.len()];
        if let Some((_, t, weight)) = best {
            weights[t] = weight;
        }
        match rule {
            ExpertRule::BestSingle => weights,
            ExpertRule::Joint => self.joint(weights, max),
        }
    }

    /// The weight in `0..=max` of one expert alone.
    fn matched(&self, delta: &[f64], max: f64, two_sided: bool) -> f64 {
        let at = |a: f64| Tilt::of(&self.prior.log_p, delta, a);
        let first = rise_to(self.wanted[0], max, &mut |a| {
            let tilt = at(a);
            (tilt.divergences(a)[0], a * tilt.variance)
        });
        if !two_sided {
            return first;
        }
        let second = rise_to(self.wanted[1], max, &mut |a| {
            let tilt = at(a);
            (tilt.divergences(a)[1], tilt.mean)
        });
        least(first.min(second), first.max(second), &mut |a| {
            let tilt = at(a);
            let [f, g] = tilt.divergences(a);
            let (x, y) = (f - self.wanted[0], g - self.wanted[1]);
            (x * x + y * y, x * a * tilt.variance + y * tilt.mean)
        })
    }

    /// Weights of all experts, one after the other, from these on; no change but for the better.
    fn joint(&self, mut weights: Vec<f64>, max: f64) -> Vec<f64> {
        const ROUNDS: usize = 3;
        const GRID: usize = 20;
        let mut lowest = self.miss(self.moved(&weights));
        for _ in 0..ROUNDS {
            let before = lowest;
            for t in 0..weights.len() {
                let rest = {
                    let mut others = weights.clone();
                    others[t] = 0.0;
                    self.shift(&others)
                };
                let miss = |a: f64| {
                    let shift: Vec<f64> = rest.iter().zip(&self.deltas[t]).map(|(r, d)| r + a * d).collect();
                    self.miss(Tilt::of(&self.prior.log_p, &shift, 1.0).divergences(1.0))
                };
                let cell = max / GRID as f64;
                let grid = (0..=GRID).map(|i| cell * i as f64).map(|a| (miss(a), a));
                let (_, near) = grid.min_by(|a, b| a.0.total_cmp(&b.0)).expect("a grid has points");
                let (mut low, mut high) = ((near - cell).max(0.0), (near + cell).min(max));
                // Golden section: the miss has no simple slope here.
                let ratio = (5f64.sqrt() - 1.0) / 2.0;
                while high - low > 1e-4 * max {
                    let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
                    if miss(a) < miss(b) { high = b } else { low = a }
                }
                let found = 0.5 * (low + high);
                for (value, a) in [(miss(found), found), (miss(near), near)] {
                    if value < lowest {
                        (lowest, weights[t]) = (value, a);
                    }
                }
            }
            if before - lowest <= 1e-6 * before {
                break;
            }
        }
        weights
    }
}

/// The large model's prediction times `exp(a D)`: `A(a)`, and mean and variance of `D` under it.
#[derive(Clone, Copy)]
struct Tilt {
    log_sum: f64,
    mean: f64,
    variance: f64,
}

/// Tokens that one thread takes at a time; sums are taken part by part, so that they do not depend on the number of threads.
const PART: usize = 1 << 13;

impl Tilt {
    fn of(prior: &[f64], delta: &[f64], a: f64) -> Tilt {
        let parts = || prior.par_chunks(PART).zip(delta.par_chunks(PART));
        let largest = |(p, d): (&[f64], &[f64])| {
            let mut top = f64::NEG_INFINITY;
            for (p, d) in p.iter().zip(d) {
                top = top.max(p + a * d);
            }
            top
        };
        let top = parts().map(largest).reduce(|| f64::NEG_INFINITY, f64::max);
        let sums: Vec<[f64; 3]> = parts()
            .map(|(p, d)| {
                let mut sums = [0.0; 3];
                for (p, d) in p.iter().zip(d) {
                    let w = (p + a * d - top).exp();
                    sums[0] += w;
                    sums[1] += w * d;
                    sums[2] += w * d * d;
                }
                sums
            })
            .collect();
        let total = |i: usize| sums.iter().map(|s| s[i]).sum::<f64>();
        let (mass, mean) = (total(0), total(1) / total(0));
        Tilt { log_sum: top + mass.ln(), mean, variance: (total(2) / mass - mean * mean).max(0.0) }
    }

    /// `KL(P~ || P)` and `KL(P || P~)` where `D` has mean 0 under `P`.
    fn divergences(self, a: f64) -> [f64; 2] {
        [(a * self.mean - self.log_sum).max(0.0), self.log_sum.max(0.0)]
    }
}

/// The sum of the products of two lists, the same for any number of threads.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let part = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let parts: Vec<f64> = a.par_chunks(PART).zip(b.par_chunks(PART)).map(part).collect();
    parts.iter().sum()
}

/// Largest less smallest.
fn spread(delta: &[f64]) -> f64 {
    let (low, high) =
        delta.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), d| (l.min(*d), h.max(*d)));
    high - low
}

/// What logits in f32 differ by when a model is computed in another order, as a share of the largest.
const ROUNDING: f64 = 1e-5;

/// Differences of weights that do not matter.
const TOLERANCE: f64 = 1e-8;

/// Where a function that rises from 0 at 0 reaches `target`, or `max` if it does not below; `at` gives value and slope.
fn rise_to(target: f64, max: f64, at: &mut dyn FnMut(f64) -> (f64, f64)) -> f64 {
    if target <= 0.0 {
        return 0.0;
    }
    let (mut low, mut high, mut high_known) = (0.0, max, false);
    // Tuning alike moves alike.
    let mut a = f64::min(1.0, max);
    for _ in 0..200 {
        let (value, slope) = at(a);
        if value < target {
            if a == max {
                return max;
            }
            low = a;
        } else {
            (high, high_known) = (a, true);
        }
        // Newton's step for the root of the function, which is nearly a line near 0, where the function is a parabola.
        let root = value.sqrt();
        let newton = a + 2.0 * root * (target.sqrt() - root) / slope;
        if (newton - a).abs() < TOLERANCE * max {
            return newton.clamp(low, high);
        }
        let next = match newton {
            next if next > low && next < high => next,
            next if next >= high && !high_known => max,
            _ => 0.5 * (low + high),
        };
        if high - low < TOLERANCE * max {
            return next;
        }
        a = next;
    }
    0.5 * (low + high)
}

/// Where a function that falls at `low` and rises at `high` is least; `at` gives value and half the slope. It may have several
/// valleys: the deepest of a few points says which is followed.
fn least(low: f64, high: f64, at: &mut dyn FnMut(f64) -> (f64, f64)) -> f64 {
    const CELLS: usize = 4;
    let width = high - low;
    if width < TOLERANCE {
        return low;
    }
    let points: Vec<(f64, (f64, f64))> =
        (0..=CELLS).map(|i| low + width * i as f64 / CELLS as f64).map(|a| (a, at(a))).collect();
    let lowest = (0..=CELLS).min_by(|i, j| points[*i].1.0.total_cmp(&points[*j].1.0)).expect("not empty");
    // The valley lies on the side that the slope points down to.
    let (left, right) = match points[lowest].1.1 {
        slope if slope > 0.0 && lowest > 0 => (points[lowest - 1], points[lowest]),
        slope if slope < 0.0 && lowest < CELLS => (points[lowest], points[lowest + 1]),
        _ => return points[lowest].0,
    };
    // False position for the slope (Illinois): an end that stays again counts half.
    let ((mut a, (_, mut down)), (mut b, (_, mut up))) = (left, right);
    let (mut best, mut moved_up) = (points[lowest], None);
    for _ in 0..60 {
        if b - a < TOLERANCE.sqrt() * width {
            break;
        }
        let crossing = if down < 0.0 && up > 0.0 { a - down * (b - a) / (up - down) } else { 0.5 * (a + b) };
        let (value, slope) = at(crossing);
        let step = (crossing - best.0).abs();
        if value < best.1.0 {
            best = (crossing, (value, slope));
        }
        let again = moved_up == Some(slope <= 0.0);
        moved_up = Some(slope <= 0.0);
        let part = if again { 0.5 } else { 1.0 };
        if slope > 0.0 {
            (b, up, down) = (crossing, slope, down * part);
        } else {
            (a, down, up) = (crossing, slope, up * part);
        }
        if step < TOLERANCE.sqrt() * width {
            break;
        }
    }
    best.0
}

/// A small model that runs beside the large one, with the bricks that make it what it is: an expert can be the base with an
/// adapter.
#[derive(Clone, Copy)]
pub struct Companion<'a> {
    /// The wiring.
    pub decoder: &'a Decoder,
    /// Its bricks, the last one on top.
    pub bricks: &'a [&'a dyn Brick],
}

/// Logits fusion as a companion of generation: runs the small models along, each with keys and values of its own.
///
/// ```
/// use std::ops::ControlFlow;
/// use burn::tensor::Device;
/// use firebrick_core::Seed;
/// use firebrick_merge::logits_fusion::{Companion, LogitsFusion, LogitsFusionConfig};
/// use firebrick_models::sampling::{Sampler, Sampling};
/// use firebrick_models::{Decoder, DecoderConfig, GenerateOptions, generate_with};
///
/// let small = |seed| Decoder::random(DecoderConfig::tiny(40), Seed(seed), &Device::flex());
/// let large = Decoder::random(DecoderConfig { d_model: 32, ..DecoderConfig::tiny(40) }, Seed(0), &Device::flex())?;
/// let (base, expert) = (small(1)?, small(2)?);
/// let companion = |decoder| Companion { decoder, bricks: &[] };
/// let mut fusion =
///     LogitsFusion::new(companion(&base), &[companion(&expert)], LogitsFusionConfig::default())?;
///
/// let mut sampler = Sampler::new(Sampling::default())?;
/// let options = GenerateOptions { max_tokens: 5, ..GenerateOptions::default() };
/// let adjust = &mut |history: &[u32], logits: &mut [f32]| fusion.adjust(history, logits);
/// let go = &mut |_| ControlFlow::Continue(());
/// let ids = generate_with(&large, &[], &[1, 2, 3], &mut sampler, &options, adjust, go)?;
/// assert_eq!((ids.len(), fusion.steps().len()), (5, 5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LogitsFusion<'a> {
    config: LogitsFusionConfig,
    base: Stream<'a>,
    experts: Vec<Stream<'a>>,
    steps: Vec<FusedStep>,
}

impl<'a> LogitsFusion<'a> {
    /// Fusion with these experts, all tuned from `base`.
    ///
    /// # Errors
    /// [`MergeError::Fusion`] with all that is wrong: settings, experts of other vocabularies than the base's.
    pub fn new(
        base: Companion<'a>,
        experts: &[Companion<'a>],
        config: LogitsFusionConfig,
    ) -> Result<Self, MergeError> {
        let mut problems = config.problems(experts.len());
        let vocab = base.decoder.config().vocab;
        for (t, expert) in experts.iter().enumerate() {
            let own = expert.decoder.config().vocab;
            if own != vocab {
                problems.push(format!("expert {t} has a vocabulary of {own} tokens, the base of {vocab}"));
            }
        }
        if !problems.is_empty() {
            return Err(MergeError::Fusion { problems });
        }
        let experts = experts.iter().map(|e| Stream::new(*e)).collect();
        Ok(LogitsFusion { config, base: Stream::new(base), experts, steps: Vec::new() })
    }

    /// Shifts the large model's `logits: [vocab]` of the token after `history`, see [`fuse_logits`]; a hook for
    /// [`generate_with`](firebrick_models::generate_with). A history that goes on from the last one runs its new tokens only.
    ///
    /// # Errors
    /// [`ModelError::Generate`] if the vocabularies differ, the history is empty or exceeds a small model's context, or as
    /// [`fuse_logits`].
    pub fn adjust(&mut self, history: &[u32], logits: &mut [f32]) -> Result<(), ModelError> {
        let vocab = self.base.companion.decoder.config().vocab;
        if logits.len() != vocab {
            let what = format!("the large model has {} tokens, the small ones {vocab}", logits.len());
            return Err(ModelError::Generate(what));
        }
        let base = self.base.logits(history)?;
        let experts: Vec<Vec<f32>> =
            self.experts.iter_mut().map(|e| e.logits(history)).collect::<Result<_, _>>()?;
        let experts: Vec<&[f32]> = experts.iter().map(Vec::as_slice).collect();
        let step = fuse_logits(logits, &base, &experts, &self.config)
            .map_err(|e| ModelError::Generate(e.to_string()))?;
        self.steps.push(step);
        Ok(())
    }

    /// What the steps so far came to.
    pub fn steps(&self) -> &[FusedStep] {
        &self.steps
    }
}

/// A companion and what it has read.
struct Stream<'a> {
    companion: Companion<'a>,
    run: Run<'a>,
    read: Vec<u32>,
    /// Tokens that the cache has room for.
    room: usize,
}

impl<'a> Stream<'a> {
    fn new(companion: Companion<'a>) -> Self {
        Stream { companion, run: Run::new(companion.bricks), read: Vec::new(), room: 0 }
    }

    /// The logits of the token after `history`.
    fn logits(&mut self, history: &[u32]) -> Result<Vec<f32>, ModelError> {
        let decoder = self.companion.decoder;
        let (limit, vocab) = (decoder.config().max_tokens, decoder.config().vocab);
        if history.is_empty() || history.len() > limit {
            let what =
                format!("a text of {} tokens for a small model with a context of {limit}", history.len());
            return Err(ModelError::Generate(what));
        }
        if let Some(id) = history.iter().find(|id| **id as usize >= vocab) {
            return Err(ModelError::Generate(format!(
                "the text has token {id}, a small model knows {vocab}"
            )));
        }
        if !(history.len() > self.read.len() && history.starts_with(&self.read)) {
            *self = Stream::new(self.companion);
        }
        if history.len() > self.room {
            self.room = (2 * history.len()).max(128).min(limit);
            let cache = match self.run.take::<KvCache>() {
                Some(cache) => cache.select(&[0], self.room),
                None => decoder.kv_cache(1, self.room),
            };
            self.run.insert(cache);
        }
        let new = &history[self.read.len()..];
        let hidden = decoder.hidden(token_tensor(&[new], &decoder.device()), &mut self.run);
        let last = hidden.narrow(1, new.len() - 1, 1);
        let logits = decoder.logits(last, &mut self.run).into_data().try_into_vec_as::<f32>();
        self.read.extend_from_slice(new);
        logits.map_err(|e| ModelError::Backend(format!("{e:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    #[test]
    fn divergences_rise_with_the_slopes_that_newton_uses() {
        for seed in 0..3 {
            let logits = |name, scale| Seed(seed).normal_f64(name, 3 * PART / 2, scale).collect::<Vec<f64>>();
            let normalized = |logits: Vec<f64>| Prediction::of(logits).log_p;
            let prediction = Prediction::of(logits("large", 3.0));
            let delta = prediction.centred(&logits("delta", 1.5));
            let prior = prediction.log_p;
            let plain = |a: f64| {
                let tilted: Vec<f64> = prior.iter().zip(&delta).map(|(p, d)| p + a * d).collect();
                let tilted = normalized(tilted);
                let kl = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x.exp() * (x - y)).sum::<f64>();
                [kl(&tilted, &prior), kl(&prior, &tilted)]
            };
            let mut before = [0.0; 2];
            for i in 1..=20 {
                let a = 0.1 * f64::from(i);
                let tilt = Tilt::of(&prior, &delta, a);
                let found = tilt.divergences(a);
                let slopes = [a * tilt.variance, tilt.mean];
                let (up, down) = (plain(a + 1e-4), plain(a - 1e-4));
                for side in 0..2 {
                    assert!((found[side] - plain(a)[side]).abs() < 1e-9, "{found:?} at {a}");
                    assert!(found[side] > before[side], "rises");
                    let measured = (up[side] - down[side]) / 2e-4;
                    assert!((slopes[side] / measured - 1.0).abs() < 1e-5, "{} {measured}", slopes[side]);
                }
                assert!((slopes[0] / slopes[1] - 1.0).abs() > 1e-3, "control: the slopes differ");
                before = found;
            }
        }
    }

    #[test]
    fn roots_are_found_in_few_passes() {
        for (target, expected) in
            [(0.5, 1.0), (1e-12, 2f64.sqrt() * 1e-6), (1.9, 3.8f64.sqrt()), (7.0, 2.0), (0.0, 0.0)]
        {
            let mut passes = 0;
            let found = rise_to(target, 2.0, &mut |a| {
                passes += 1;
                (a * a / 2.0, a)
            });
            assert!((found - expected).abs() < 1e-7, "{found} for {target}");
            assert!(passes <= 3, "{passes} passes for {target}");
        }
        // Saturates: Newton's steps would leave the bracket.
        let found = rise_to(0.9, 10.0, &mut |a| (1.0 - (-a * a).exp(), 2.0 * a * (-a * a).exp()));
        assert!((found - 10f64.ln().sqrt()).abs() < 1e-6, "{found}");
    }

    #[test]
    fn the_deeper_of_two_valleys_is_found() {
        let f = |a: f64| ((a - 1.0) * (a - 2.0)).powi(2) + 0.05 * a;
        let slope = |a: f64| 2.0 * (a - 1.0) * (a - 2.0) * (2.0 * a - 3.0) + 0.05;
        let found = least(0.5, 2.5, &mut |a| (f(a), slope(a) / 2.0));
        let grid = (0..=20_000).map(|i| 0.5 + f64::from(i) * 1e-4).map(f).fold(f64::INFINITY, f64::min);
        assert!(f(found) < grid + 1e-9, "{found}");
        assert!(found < 1.5 && f(2.0) > grid + 1e-2, "control: the other valley is not as deep");
    }
}
