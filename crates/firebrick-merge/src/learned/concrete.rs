//! Concrete subspace learning (Tang et al. 2023, arXiv 2312.06173): one relaxed binary mask over the parameters, shared by all
//! task vectors, learned on text without labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Progress, Seed, Site};
use firebrick_models::Decoder;
use firebrick_train::{Batch, Mixture, Schedule, TrainConfig, TrainReport, fit_passes, ordered_sum};

use super::adamerging::entropy;
use super::composed::{Coefficients, Composed, Granularity};
use crate::MergeError;

/// Below this mean a mask is not scaled up any further: a tensor whose mask nearly vanishes would blow up.
const LEAST_MEAN: f64 = 1e-3;

/// How far uniform draws stay away from 0 and 1, so that their logarithms are finite in `f32`.
const EDGE: f64 = 1.0 / 16_777_216.0;

/// Settings of [`concrete_merging`].
#[derive(Clone, Debug)]
pub struct ConcreteConfig {
    /// Coefficient of every masked task vector, or what the inner step starts from.
    pub scale: f64,
    /// Of the relaxation: the lower, the nearer to 0 and 1 a sample is.
    pub temperature: f64,
    /// None is concrete task arithmetic; else concrete AdaMerging, whose coefficients are fitted to the mask of each pass.
    pub inner: Option<InnerStep>,
    /// Steps, batches and the optimizer of the mask.
    pub train: TrainConfig,
}

/// The step of the coefficients that comes before each step of the mask: from [`ConcreteConfig::scale`], of a fixed length against the
/// sign of the gradient on rows of its own. That is the first step of Adam; its moments are not kept, so that a pass is a function of
/// its seed. No gradient of the mask goes through it (first order).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InnerStep {
    /// Which sites share a coefficient.
    pub granularity: Granularity,
    /// How far each coefficient moves.
    pub learning_rate: f64,
    /// Rows of each source.
    pub rows: usize,
}

impl Default for ConcreteConfig {
    fn default() -> Self {
        let train = TrainConfig {
            steps: 2000,
            batch: 16,
            learning_rate: 1e-3,
            schedule: Schedule::Constant,
            warmup: 0,
            weight_decay: 0.0,
            clip: None,
            ..TrainConfig::default()
        };
        ConcreteConfig { scale: 0.3, temperature: 0.5, inner: None, train }
    }
}

/// Logits of a mask, one for each element of the composed weights: the one thing that is trained. Memory: a model, and twice that for
/// an optimizer with two moments.
#[derive(Module, Debug)]
pub struct ConcreteMask {
    /// Of each composed site, in their order and in Hugging Face's layout.
    pub logits: Vec<Param<Tensor<2>>>,
    #[module(skip)]
    sites: Arc<Vec<Site>>,
    #[module(skip)]
    temperature: f64,
}

/// A relaxed sample and what its gradient needs.
struct Sample {
    /// In `0..1`.
    relaxed: Tensor<2>,
    /// `[1, 1]`, at least [`LEAST_MEAN`].
    mean: Tensor<2>,
    /// `[1, 1]`: 1 where the mean itself is divided by, 0 where the bound is.
    free: Tensor<2>,
}

impl Sample {
    /// `m = sigmoid((x + ln u - ln (1 - u)) / temperature)`.
    fn new(logits: Tensor<2>, noise: Tensor<2>, temperature: f64) -> Self {
        let relaxed = sigmoid((logits + noise) / temperature);
        let mean = mean(relaxed.clone());
        let free = mean.clone().greater_elem(LEAST_MEAN).float();
        Sample { relaxed, mean: mean.clamp_min(LEAST_MEAN), free }
    }

    /// The mask: scaled to mean 1.
    fn mask(&self) -> Tensor<2> {
        self.relaxed.clone() / self.mean.clone()
    }

    /// The gradient of the logits from that of the mask.
    fn backward(&self, gradient: Tensor<2>, temperature: f64) -> Tensor<2> {
        let n = gradient.shape().num_elements() as f64;
        // Of the mean, through which every element scales every other.
        let through = ordered_sum(gradient.clone() * self.mask()).reshape([1, 1]) * self.free.clone() / n;
        let relaxed = (gradient - through) / self.mean.clone();
        relaxed * self.relaxed.clone() * (self.relaxed.clone() * -1.0 + 1.0) / temperature
    }
}

/// The mean of all elements as `[1, 1]`, the same for any number of threads.
fn mean(x: Tensor<2>) -> Tensor<2> {
    let n = x.shape().num_elements() as f64;
    (ordered_sum(x) / n).reshape([1, 1])
}

/// `ln u - ln (1 - u)` for uniform `u`, from the stream of `site`.
fn logistic(site: Site, dims: [usize; 2], seed: Seed, device: &Device) -> Tensor<2> {
    let draws = seed.uniform(&format!("concrete/{site}"), dims[0] * dims[1], 0.5);
    let u = Tensor::<2>::from_data(TensorData::new(draws, dims), device) + 0.5;
    let u = u.clamp(EDGE, 1.0 - EDGE);
    u.clone().log() - (u * -1.0 + 1.0).log()
}

impl ConcreteMask {
    /// Logits of 0: every element is kept with probability one half.
    pub fn new(composed: &Composed, temperature: f64) -> Self {
        let device = composed.base().device().autodiff();
        let zeros = |site: &Site| {
            let dims = composed.base().weight(*site).expect("composed sites have weights").dims();
            Param::from_tensor(Tensor::zeros(dims, &device)).set_require_grad(true)
        };
        let logits = composed.sites().iter().map(zeros).collect();
        ConcreteMask { logits, sites: Arc::new(composed.sites().to_vec()), temperature }
    }

    fn samples(&self, seed: Seed) -> Vec<Sample> {
        let sample = |(site, logits): (&Site, &Param<Tensor<2>>)| {
            let logits = logits.val().without_autodiff();
            let noise = logistic(*site, logits.dims(), seed, &logits.device());
            Sample::new(logits, noise, self.temperature)
        };
        self.sites.iter().zip(&self.logits).map(sample).collect()
    }

    /// A relaxed sample by site, each with mean 1.
    pub fn sample(&self, seed: Seed) -> BTreeMap<Site, Tensor<2>> {
        self.sites.iter().copied().zip(self.samples(seed).iter().map(Sample::mask)).collect()
    }

    /// The binary mask of the elements that are more likely kept than not (a logit above 0), scaled to mean 1; nothing is kept
    /// of a site that has no such element.
    pub fn binary(&self) -> BTreeMap<Site, Tensor<2>> {
        let mask = |logits: &Param<Tensor<2>>| {
            let kept = logits.val().without_autodiff().greater_elem(0.0).float();
            let mean = mean(kept.clone()).clamp_min(LEAST_MEAN);
            kept / mean
        };
        self.sites.iter().copied().zip(self.logits.iter().map(mask)).collect()
    }
}

/// Learns a mask on `data`, one source for each task, whose labels are not used: the loss is the mean entropy of the predictions of
/// the model merged with the masked task vectors, one sample of the mask in each pass.
///
/// What is merged then is [`Composed::masked`] with [`ConcreteMask::sample`] (as in the paper) or [`ConcreteMask::binary`]: by
/// task arithmetic with the same scale, or by AdaMerging anew.
///
/// # Errors
/// As [`fit_passes`]; [`MergeError::Settings`] with everything that is wrong with the other settings.
pub fn concrete_merging(
    composed: &Composed,
    config: &ConcreteConfig,
    data: &Mixture<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(ConcreteMask, TrainReport), MergeError> {
    let mut problems = Vec::new();
    if !config.scale.is_finite() {
        problems.push(format!("`scale` is {}", config.scale));
    }
    if !(config.temperature.is_finite() && config.temperature > 0.0) {
        problems.push(format!("`temperature` is {}", config.temperature));
    }
    if config.inner.is_some_and(|i| i.rows == 0) {
        problems.push("`inner.rows` is 0".into());
    }
    if !problems.is_empty() {
        return Err(MergeError::Settings { problems });
    }
    let mask = ConcreteMask::new(composed, config.temperature);
    let granularity = config.inner.map_or(Granularity::Task, |inner| inner.granularity);
    let start = composed.coefficients(granularity, config.scale, 1, Seed(0));
    let pass = &mut |mask: &ConcreteMask, batch: &Batch, seed: Seed, passes: usize| {
        let samples = mask.samples(seed);
        let masks: Vec<Tensor<2>> = samples.iter().map(Sample::mask).collect();
        let coefficients = match config.inner {
            Some(inner) => {
                let by_site = composed.sites().iter().copied().zip(masks.iter().cloned()).collect();
                inner_step(&composed.masked(&by_site), &start, inner, data, seed, &batch.tokens.device())?
            }
            None => start.clone(),
        };
        let deltas = composed.deltas(&coefficients);
        let weight = |((site, delta), mask): ((&Site, &Tensor<2>), Tensor<2>)| {
            composed.base().weight(*site).expect("composed sites have weights") + delta.clone() * mask
        };
        let weights = composed.sites().iter().zip(&deltas).zip(masks).map(weight).collect();
        let places: BTreeMap<Site, usize> =
            composed.sites().iter().enumerate().map(|(at, site)| (*site, at)).collect();
        let mut gradients = GradientsParams::new();
        let loss = &mut |decoder: &Decoder| entropy(decoder, batch) / passes as f64;
        let value = composed.backward(weights, loss, &mut |site, gradient| {
            let at = places[&site];
            let gradient = samples[at].backward(gradient * deltas[at].clone(), mask.temperature);
            gradients.register(mask.logits[at].id, gradient);
        })?;
        Some((value, gradients))
    };
    Ok(fit_passes(mask, &config.train, data, pass, None, progress, resume)?)
}

/// The coefficients after one step from `start`, on rows of every source that `seed` draws.
fn inner_step(
    masked: &Composed,
    start: &Coefficients,
    inner: InnerStep,
    data: &Mixture<'_>,
    seed: Seed,
    device: &Device,
) -> Option<Coefficients> {
    let mut total: Option<Tensor<2>> = None;
    for (name, rows) in data.sources() {
        let drawn = rows.draw(inner.rows, seed, &format!("concrete/inner/{name}"));
        let batch = rows.batch(&drawn, device);
        let (_, gradient) = masked.gradient(start, &mut |decoder| entropy(decoder, &batch))?;
        total = Some(match total {
            Some(sum) => sum + gradient,
            None => gradient,
        });
    }
    let step = total?.sign() * inner.learning_rate;
    Some(start.at(start.values.val().without_autodiff() - step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learned::task_vector::host;
    use crate::learned::testing::{Family, WINDOW, far};
    use firebrick_core::{Part, Silent};

    const SITE: Site = Site { layer: Some(0), part: Part::AttnQ, expert: None };

    /// `E[m]` of a sample at temperature 1/2 and the logit `x`, with `a = e^x` and `q = 1 + a^2`.
    fn expected(x: f64) -> f64 {
        let a = x.exp();
        let q = 1.0 + a * a;
        2.0 * a * a * x / (q * q) + a * a / q + std::f64::consts::PI * a * (1.0 - a * a) / (2.0 * q * q)
    }

    #[test]
    fn samples_and_their_slopes_have_the_expectations_of_the_closed_form() {
        let device = Device::flex();
        let n = 40_000;
        for x in [-1.5, 0.0, 0.4, 2.0] {
            let logits = Tensor::<2>::full([1, n], x, &device);
            let noise = logistic(SITE, [1, n], Seed(3), &device);
            let sample = Sample::new(logits, noise, 0.5);
            let m = host(sample.relaxed.clone()).unwrap();
            let slope: Vec<f32> = m.iter().map(|m| m * (1.0 - m) / 0.5).collect();
            let derivative = (expected(x + 1e-4) - expected(x - 1e-4)) / 2e-4;
            for (values, want) in [(m, expected(x)), (slope, derivative)] {
                let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
                let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n as f64;
                let error = (variance / n as f64).sqrt();
                assert!((mean - want).abs() < 4.0 * error, "{x}: {mean} {want} {error}");
                // Control: the probability of keeping, to which samples only tend at low temperatures.
                let hard = 1.0 / (1.0 + (-x).exp());
                assert!(x == 0.0 || (mean - hard).abs() > 4.0 * error, "{x}: {mean} {hard}");
            }
        }
    }

    #[test]
    fn the_gradient_of_the_scaled_sample_is_that_of_its_graph() {
        let device = Device::flex();
        let random = |seed: u64, std| {
            let values = Seed(seed).normal("x", 35, std);
            Tensor::<2>::from_data(TensorData::new(values, [5, 7]), &device)
        };
        // The second has a mean below the bound.
        for (shift, bound) in [(0.0, false), (-9.0, true)] {
            let (logits, noise, above) = (random(1, 1.0) + shift, random(2, 1.0), random(3, 1.0));
            let sample = Sample::new(logits.clone(), noise.clone(), 0.5);
            let own = host(sample.backward(above.clone(), 0.5)).unwrap();
            let x = logits.autodiff().require_grad();
            let m = sigmoid((x.clone() + noise.autodiff()) / 0.5);
            let mean = m.clone().mean().reshape([1, 1]).clamp_min(LEAST_MEAN);
            assert_eq!(mean.clone().into_scalar::<f32>() <= LEAST_MEAN as f32, bound);
            let loss = (m / mean * above.autodiff()).sum();
            let graph = host(x.grad(&loss.backward()).unwrap()).unwrap();
            assert!(far(&own, &graph) < 1e-5, "{}", far(&own, &graph));
        }
    }

    #[test]
    fn masks_have_mean_1_and_are_drawn_by_seed_and_site() {
        let family = Family::new(0);
        let mask = ConcreteMask::new(&family.composed(), 0.5);
        let (a, b, other) = (mask.sample(Seed(1)), mask.sample(Seed(1)), mask.sample(Seed(2)));
        assert_eq!(a.len(), family.composed().sites().len());
        for (site, m) in &a {
            let values = host(m.clone()).unwrap();
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            assert!((mean - 1.0).abs() < 1e-5 && values.iter().all(|v| *v > 0.0), "{site}: {mean}");
            assert_eq!(values, host(b[site].clone()).unwrap());
            assert_ne!(values, host(other[site].clone()).unwrap());
        }
        assert_ne!(host(a[&SITE].clone()).unwrap(), host(a[&Site::layer(1, Part::AttnQ)].clone()).unwrap());
        // Nothing is more likely kept than not, until a logit is raised.
        let binary = |mask: &ConcreteMask| host(mask.binary()[&SITE].clone()).unwrap();
        assert!(binary(&mask).iter().all(|v| *v == 0.0));
        let at = mask.sites.iter().position(|s| *s == SITE).unwrap();
        let mut raised = mask;
        let logits = raised.logits[at].val().without_autodiff();
        let n = logits.shape().num_elements();
        let first = Tensor::ones([1, 1], &logits.device());
        raised.logits[at] = Param::from_tensor(logits.slice_assign([0..1, 0..1], first));
        let kept = binary(&raised);
        assert!((kept[0] - n as f32).abs() < 1e-2 && kept[1..].iter().all(|v| *v == 0.0), "{}", kept[0]);
    }

    /// The masks with their elements in another order.
    fn shuffled(masks: &BTreeMap<Site, Tensor<2>>, seed: u64) -> BTreeMap<Site, Tensor<2>> {
        let shuffle = |(site, mask): (&Site, &Tensor<2>)| {
            let (dims, values) = (mask.dims(), host(mask.clone()).unwrap());
            let draws = Seed(seed).uniform(&format!("shuffle/{site}"), values.len(), 0.5);
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|a, b| draws[*a].total_cmp(&draws[*b]));
            let moved: Vec<f32> = order.iter().map(|i| values[*i]).collect();
            (*site, Tensor::from_data(TensorData::new(moved, dims), &mask.device()))
        };
        masks.iter().map(shuffle).collect()
    }

    #[test]
    fn a_mask_of_1_is_task_arithmetic() {
        let composed = Family::new(1).composed();
        let ones = composed.sites().iter().map(|s| (*s, composed.base().weight(*s).unwrap().ones_like()));
        let masked = composed.masked(&ones.collect());
        let c = composed.coefficients(Granularity::Task, 0.3, 1, Seed(0));
        let (a, b) = (composed.merge(&c).unwrap(), masked.merge(&c).unwrap());
        let of = |d: &Decoder, s: Site| host(d.weight(s).unwrap()).unwrap();
        assert!(composed.sites().iter().all(|s| of(&a, *s) == of(&b, *s)));
        let mask = ConcreteMask::new(&composed, 0.5).sample(Seed(0));
        let other = composed.masked(&mask).merge(&c).unwrap();
        assert_ne!(of(&a, SITE), of(&other, SITE), "control");
    }

    #[test]
    fn learned_masks_gain_and_shuffled_ones_do_not() {
        for seed in 0..3 {
            let family = Family::new(seed);
            let (composed, data) = (family.composed(), family.mixture());
            let c = composed.coefficients(Granularity::Task, 0.3, 1, Seed(0));
            let closed = |composed: &Composed| family.gap_closed(&composed.merge(&c).unwrap());
            let (mask, report) =
                concrete_merging(&composed, &config(100, None), &data, &Silent, false).unwrap();
            let (first, last) = (report.first_loss().unwrap(), report.final_loss().unwrap());
            assert!(last < 0.95 * first, "seed {seed}: entropy {first} {last}");
            let sample = mask.sample(Seed(77));
            let (plain, masked) = (closed(&composed), closed(&composed.masked(&sample)));
            assert!(masked > plain + 0.03, "seed {seed}: {plain} {masked}");
            let control = closed(&composed.masked(&shuffled(&sample, 5)));
            assert!(control < plain, "seed {seed}: {plain} {control}");
        }
    }

    fn config(steps: usize, inner: Option<InnerStep>) -> ConcreteConfig {
        let default = ConcreteConfig::default();
        // Steps times rate as in the paper.
        let train = TrainConfig { steps, batch: 12, window: WINDOW, learning_rate: 2e-2, ..default.train };
        ConcreteConfig { inner, train, ..default }
    }

    #[test]
    fn the_inner_step_fits_the_coefficients_to_the_mask() {
        let family = Family::new(2);
        let (composed, data) = (family.composed(), family.mixture());
        let masked = composed.masked(&ConcreteMask::new(&composed, 0.5).sample(Seed(1)));
        let start = masked.coefficients(Granularity::Tensor, 0.3, 1, Seed(0));
        let inner = |learning_rate| InnerStep { granularity: Granularity::Tensor, learning_rate, rows: 4 };
        let device = composed.base().device();
        let stepped = inner_step(&masked, &start, inner(0.1), &data, Seed(3), &device).unwrap();
        let moved = stepped.read().unwrap().concat();
        assert!(moved.iter().all(|c| (c - 0.2).abs() < 1e-6 || (c - 0.4).abs() < 1e-6), "{moved:?}");
        let rows: Vec<usize> = (0..40).collect();
        let batch = data.sources()[0].1.batch(&rows, &device);
        let at = |c: &Coefficients| entropy(&masked.merge(c).unwrap(), &batch).into_scalar::<f32>();
        assert!(at(&stepped) < at(&start), "{} {}", at(&stepped), at(&start));
        // A step of length 0 is concrete task arithmetic; another length is not.
        let learned = |inner| {
            let (mask, _) = concrete_merging(&composed, &config(3, inner), &data, &Silent, false).unwrap();
            mask.logits.iter().flat_map(|l| host(l.val().without_autodiff()).unwrap()).collect::<Vec<f32>>()
        };
        let plain = learned(None);
        assert_eq!(learned(Some(inner(0.0))), plain);
        assert_ne!(learned(Some(inner(0.1))), plain, "control");
    }

    #[test]
    fn settings_are_checked() {
        let family = Family::new(2);
        let inner = InnerStep { granularity: Granularity::Task, learning_rate: 0.1, rows: 0 };
        let bad = ConcreteConfig { scale: f64::NAN, temperature: 0.0, ..config(1, Some(inner)) };
        let error =
            concrete_merging(&family.composed(), &bad, &family.mixture(), &Silent, false).unwrap_err();
        let error = error.to_string();
        assert!(["`scale`", "`temperature`", "`inner.rows`"].iter().all(|p| error.contains(p)), "{error}");
    }
}
