//! A model composed of task vectors, differentiable in its coefficients alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use firebrick_core::{Part, Progress, Seed, Site};
use firebrick_models::Decoder;
use firebrick_train::{Batch, Mixture, TrainConfig, TrainReport, fit_passes};
use serde::{Deserialize, Serialize};

use super::task_vector::{TaskVector, host};
use crate::MergeError;

/// Which sites share a coefficient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// All.
    Task,
    /// Those of a layer; the embedding, and what comes after the last layer, have their own.
    Layer,
    /// Those of so many runs of consecutive layers; the embedding goes with the first, what comes after the last layer with the last.
    LayerGroups(usize),
    /// None: each weight has its own.
    #[default]
    Tensor,
}

/// Sites in groups that share a coefficient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    of: BTreeMap<Site, usize>,
    names: Vec<String>,
}

impl Groups {
    /// The groups of `sites`, which come in the order of data, in a model of `layers` layers.
    pub fn new(sites: &[Site], layers: usize, granularity: Granularity) -> Self {
        let name = |site: Site| match (granularity, site.layer) {
            (Granularity::Task, _) => "all".to_string(),
            (Granularity::Tensor, _) => site.to_string(),
            (Granularity::Layer, Some(layer)) => format!("layers.{layer}"),
            (Granularity::Layer, None) if site.part == Part::Embed => "embed".into(),
            (Granularity::Layer, None) => "end".into(),
            (Granularity::LayerGroups(count), layer) => {
                let count = count.clamp(1, layers.max(1));
                let outside = if site.part == Part::Embed { 0 } else { layers.saturating_sub(1) };
                let run = layer.unwrap_or(outside) * count / layers.max(1);
                let first = |run: usize| (run * layers).div_ceil(count);
                format!("layers.{}-{}", first(run), first(run + 1).saturating_sub(1))
            }
        };
        let mut groups = Groups { of: BTreeMap::new(), names: Vec::new() };
        for &site in sites {
            let name = name(site);
            let group = groups.names.iter().position(|n| *n == name).unwrap_or_else(|| {
                groups.names.push(name);
                groups.names.len() - 1
            });
            groups.of.insert(site, group);
        }
        groups
    }

    /// The group of `site`, if it is in one.
    pub fn of(&self, site: Site) -> Option<usize> {
        self.of.get(&site).copied()
    }

    /// A name for each group, such as `layers.3` or `layers.0-5`.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// A random assignment of the elements of weights to `parts` classes with a coefficient each: one assignment for each shape, shared
/// by all weights of that shape.
#[derive(Clone, Debug)]
pub struct Partition {
    parts: usize,
    /// Class of each element, by shape.
    classes: HashMap<[usize; 2], Tensor<2, Int>>,
}

impl Partition {
    /// `parts` classes, at least 1, for weights of `shapes`.
    pub fn new(
        parts: usize,
        shapes: impl IntoIterator<Item = [usize; 2]>,
        seed: Seed,
        device: &Device,
    ) -> Self {
        let parts = parts.max(1);
        let mut classes = HashMap::new();
        for shape in shapes {
            classes.entry(shape).or_insert_with(|| {
                let name = format!("partition/{}x{}", shape[0], shape[1]);
                let draws = seed.uniform(&name, shape[0] * shape[1], 0.5);
                let class = |u: &f32| (((u + 0.5) * parts as f32) as i32).min(parts as i32 - 1);
                let drawn: Vec<i32> = draws.iter().map(class).collect();
                Tensor::from_data(TensorData::new(drawn, shape), device)
            });
        }
        Partition { parts, classes }
    }
}

/// Coefficients of task vectors, the one thing that is trained: a burn module.
#[derive(Module, Debug)]
pub struct Coefficients {
    /// `[vectors, groups * parts]`; the parts of a group lie side by side.
    pub values: Param<Tensor<2>>,
    #[module(skip)]
    layout: Arc<Layout>,
}

#[derive(Debug)]
struct Layout {
    groups: Groups,
    partition: Option<Partition>,
}

impl Layout {
    fn parts(&self) -> usize {
        self.partition.as_ref().map_or(1, |p| p.parts)
    }
}

impl Coefficients {
    /// The groups of sites that share a coefficient (with a partition, a coefficient for each part).
    pub fn groups(&self) -> &Groups {
        &self.layout.groups
    }

    /// Coefficients of a group, 1 without a partition.
    pub fn parts(&self) -> usize {
        self.layout.parts()
    }

    /// How many numbers there are.
    pub fn count(&self) -> usize {
        self.values.val().dims().iter().product()
    }

    /// The numbers, by vector, group and part; one read-back.
    ///
    /// # Errors
    /// If it fails.
    pub fn read(&self) -> Result<Vec<Vec<f32>>, MergeError> {
        let values = self.values.val().without_autodiff();
        let row = values.dims()[1].max(1);
        Ok(host(values)?.chunks(row).map(<[f32]>::to_vec).collect())
    }

    /// The same with other numbers, in the order of [`Coefficients::read`].
    ///
    /// # Errors
    /// [`MergeError::Settings`] if there are not as many.
    pub fn with(&self, numbers: &[f32]) -> Result<Self, MergeError> {
        let dims = self.values.val().dims();
        if numbers.len() != dims[0] * dims[1] {
            let problems = vec![format!("{} coefficients for {}", numbers.len(), dims[0] * dims[1])];
            return Err(MergeError::Settings { problems });
        }
        let device = self.values.val().device().without_autodiff();
        Ok(self.at(Tensor::from_data(TensorData::new(numbers.to_vec(), dims), &device)))
    }

    /// The same with other numbers.
    pub(crate) fn at(&self, values: Tensor<2>) -> Self {
        let values = Param::from_tensor(values.autodiff()).set_require_grad(true);
        Coefficients { values, layout: self.layout.clone() }
    }
}

/// The loss `[1]` of a merged model on a batch, with a seed of this pass.
pub type Objective<'a> = dyn FnMut(&Decoder, &Batch, Seed) -> Tensor<1> + 'a;

/// `theta(c)_l = theta_{0,l} + sum_i c_{i,l} tau_{i,l}`.
///
/// Its gradients reach the coefficients alone, by `dL/dc_{i,l} = <dL/dtheta_l, tau_{i,l}>`: the pass runs over the merged weights
/// as leaves, and no graph holds the sum. Memory: the base, the task vectors, one merged model, and its gradients while
/// they are taken.
#[derive(Clone, Debug)]
pub struct Composed {
    base: Decoder,
    vectors: Vec<TaskVector>,
    /// Sites at which a vector has something, in the order of data.
    sites: Vec<Site>,
}

impl Composed {
    /// `vectors` over `base`; the sites at which none has anything stay as they are.
    ///
    /// # Errors
    /// [`MergeError::Settings`] with every site at which a vector has another shape than the base, or if there is no vector or
    /// no site.
    pub fn new(base: &Decoder, vectors: Vec<TaskVector>) -> Result<Self, MergeError> {
        let base = base.valid();
        let mut problems = Vec::new();
        for (i, vector) in vectors.iter().enumerate() {
            for (site, delta) in &vector.deltas {
                match base.weight(*site).map(|w| w.dims()) {
                    Some(dims) if dims == delta.dims() => {}
                    found => problems.push(format!(
                        "task vector {i} has {:?} at `{site}`, the base {}",
                        delta.dims(),
                        found.map_or("no weight".into(), |dims| format!("{dims:?}"))
                    )),
                }
            }
        }
        let entries = base.sites().entries().iter().map(|e| e.site);
        let sites: Vec<Site> = entries.filter(|s| vectors.iter().any(|v| v.deltas.contains_key(s))).collect();
        if sites.is_empty() {
            problems.push("there is nothing to compose: no task vector has a weight of this model".into());
        }
        match problems.is_empty() {
            true => Ok(Composed { base, vectors, sites }),
            false => Err(MergeError::Settings { problems }),
        }
    }

    /// The base.
    pub fn base(&self) -> &Decoder {
        &self.base
    }

    /// The task vectors.
    pub fn vectors(&self) -> &[TaskVector] {
        &self.vectors
    }

    /// The sites that are composed, in the order of data.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// All coefficients `value`, with `parts` random classes of elements for each group.
    pub fn coefficients(
        &self,
        granularity: Granularity,
        value: f64,
        parts: usize,
        seed: Seed,
    ) -> Coefficients {
        let groups = Groups::new(&self.sites, self.base.config().layers, granularity);
        let device = self.base.device();
        let shapes = self.sites.iter().filter_map(|s| Some(self.base.weight(*s)?.dims()));
        let partition = (parts > 1).then(|| Partition::new(parts, shapes, seed, &device));
        let layout = Layout { groups, partition };
        let dims = [self.vectors.len(), layout.groups.names.len() * layout.parts()];
        let values = Tensor::full(dims, value, &device.autodiff());
        Coefficients { values: Param::from_tensor(values).set_require_grad(true), layout: Arc::new(layout) }
    }

    /// The same with every task vector times `masks`, element by element.
    pub fn masked(&self, masks: &BTreeMap<Site, Tensor<2>>) -> Self {
        let vectors = self.vectors.iter().map(|v| v.masked(masks)).collect();
        Composed { base: self.base.clone(), vectors, sites: self.sites.clone() }
    }

    /// The merged model, as constants: where all coefficients are 0 it is the base bit for bit.
    ///
    /// # Errors
    /// If the coefficients can't be read.
    pub fn merge(&self, coefficients: &Coefficients) -> Result<Decoder, MergeError> {
        let numbers = coefficients.read()?;
        let parts = coefficients.parts();
        let used = |i: usize, group: usize| numbers[i][group * parts..][..parts].iter().any(|c| *c != 0.0);
        let values = coefficients.values.val().without_autodiff();
        let weights = self.compose(&coefficients.layout, &values, &used);
        Ok(with_weights(&self.base, &self.sites, weights, false))
    }

    /// The value `[1]` of `loss` at the merged model, and its gradient with respect to the coefficients, shaped as
    /// [`Coefficients::values`]; nothing if the loss depends on no composed weight. Nothing is read back.
    pub fn gradient(
        &self,
        coefficients: &Coefficients,
        loss: &mut dyn FnMut(&Decoder) -> Tensor<1>,
    ) -> Option<(Tensor<1>, Tensor<2>)> {
        let values = coefficients.values.val().without_autodiff();
        let layout = &coefficients.layout;
        let weights = self.compose(layout, &values, &|_, _| true);
        let parts = layout.parts();
        let mut sums: Vec<Option<Tensor<1>>> =
            vec![None; self.vectors.len() * layout.groups.names.len() * parts];
        let value = self.backward(weights, loss, &mut |site, gradient| {
            let Some(group) = layout.groups.of(site) else { return };
            for (i, vector) in self.vectors.iter().enumerate() {
                let Some(delta) = vector.deltas.get(&site) else { continue };
                let product = gradient.clone() * delta.clone();
                for part in 0..parts {
                    let share = match &layout.partition {
                        Some(p) => {
                            let others = p.classes[&product.dims()].clone().not_equal_elem(part as i32);
                            product.clone().mask_fill(others, 0.0).sum()
                        }
                        None => product.clone().sum(),
                    };
                    let at = (i * layout.groups.names.len() + group) * parts + part;
                    sums[at] = Some(match sums[at].take() {
                        Some(sum) => sum + share,
                        None => share,
                    });
                }
            }
        })?;
        let zero = || Tensor::<1>::zeros([1], &values.device());
        let all = Tensor::cat(sums.into_iter().map(|s| s.unwrap_or_else(zero)).collect(), 0);
        Some((value, all.reshape(values.dims())))
    }

    /// Weights of all composed sites, in their order; `used` says which coefficients may differ from 0.
    fn compose(
        &self,
        layout: &Layout,
        values: &Tensor<2>,
        used: &dyn Fn(usize, usize) -> bool,
    ) -> Vec<Tensor<2>> {
        let weight = |site: &Site| {
            let base = self.base.weight(*site).expect("composed sites have weights");
            match self.delta(*site, layout, values, used) {
                Some(delta) => base + delta,
                None => base,
            }
        };
        self.sites.iter().map(weight).collect()
    }

    /// `sum_i c_i tau_i` at each composed site, in their order.
    pub(crate) fn deltas(&self, coefficients: &Coefficients) -> Vec<Tensor<2>> {
        let values = coefficients.values.val().without_autodiff();
        let delta = |site: &Site| self.delta(*site, &coefficients.layout, &values, &|_, _| true);
        self.sites.iter().map(|site| delta(site).expect("a composed site has a vector")).collect()
    }

    /// `sum_i c_i tau_i` at `site`, over the vectors that are `used` there, if there is any.
    fn delta(
        &self,
        site: Site,
        layout: &Layout,
        values: &Tensor<2>,
        used: &dyn Fn(usize, usize) -> bool,
    ) -> Option<Tensor<2>> {
        let (parts, group) = (layout.parts(), layout.groups.of(site)?);
        let scaled = |(i, vector): (usize, &TaskVector)| {
            let delta = vector.deltas.get(&site).filter(|_| used(i, group))?;
            let own = values.clone().slice([i..i + 1, group * parts..(group + 1) * parts]);
            let field = match &layout.partition {
                Some(p) => {
                    let [rows, cols] = delta.dims();
                    let classes = p.classes[&[rows, cols]].clone().reshape([rows * cols]);
                    own.reshape([parts]).select(0, classes).reshape([rows, cols])
                }
                None => own,
            };
            Some(delta.clone() * field)
        };
        self.vectors.iter().enumerate().filter_map(scaled).reduce(|a, b| a + b)
    }

    /// The value `[1]` of `loss` at the base with `weights` at the composed sites; hands the gradient of each to `each`.
    pub(crate) fn backward(
        &self,
        weights: Vec<Tensor<2>>,
        loss: &mut dyn FnMut(&Decoder) -> Tensor<1>,
        each: &mut dyn FnMut(Site, Tensor<2>),
    ) -> Option<Tensor<1>> {
        let decoder = with_weights(&self.base, &self.sites, weights, true);
        let value = loss(&decoder);
        if !value.is_tracked() {
            return None;
        }
        let gradients = value.backward();
        let paths = paths(&self.base, &self.sites);
        decoder.visit(&mut Leaves { path: Vec::new(), sites: &paths, gradients, each });
        Some(value.inner())
    }
}

/// Sites by the path of their parameter in the module.
fn paths(decoder: &Decoder, sites: &[Site]) -> HashMap<String, Site> {
    sites.iter().filter_map(|site| Some((decoder.parameter(*site)?, *site))).collect()
}

/// Whether the module holds the weight of `site` as `[d_in, d_out]`.
fn is_transposed<const D: usize>(site: Site) -> bool {
    D == 2 && site.part != Part::Embed
}

/// `decoder` with other weights at `sites`, constants or leaves that record gradients.
pub(crate) fn with_weights(
    decoder: &Decoder,
    sites: &[Site],
    weights: Vec<Tensor<2>>,
    tracked: bool,
) -> Decoder {
    let of_path = sites.iter().zip(weights).filter_map(|(site, weight)| {
        let path = decoder.parameter(*site)?;
        Some((path, (*site, weight)))
    });
    decoder.clone().map(&mut Replace { path: Vec::new(), weights: of_path.collect(), tracked })
}

/// Puts weights in place of parameters.
struct Replace {
    path: Vec<String>,
    weights: HashMap<String, (Site, Tensor<2>)>,
    tracked: bool,
}

impl ModuleMapper for Replace {
    fn enter_module(&mut self, name: &str, _kind: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _kind: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((site, weight)) = self.weights.remove(&self.path.join(".")) else { return param };
        let (id, old, mapper) = param.consume();
        let weight = if is_transposed::<D>(site) { weight.transpose() } else { weight };
        let weight: Tensor<D> = weight.reshape(old.dims());
        let weight = if self.tracked { weight.autodiff().require_grad() } else { weight };
        Param::from_mapped_value(id, weight, mapper)
    }
}

/// Takes the gradients of parameters.
struct Leaves<'a> {
    path: Vec<String>,
    sites: &'a HashMap<String, Site>,
    gradients: Gradients,
    each: &'a mut dyn FnMut(Site, Tensor<2>),
}

impl ModuleVisitor for Leaves<'_> {
    fn enter_module(&mut self, name: &str, _kind: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _kind: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(site) = self.sites.get(&self.path.join(".")) else { return };
        let Some(gradient) = param.val().grad_remove(&mut self.gradients) else { return };
        let dims = gradient.dims();
        let [rows, cols] = if D == 2 { [dims[0], dims[1]] } else { [1, dims[0]] };
        let gradient: Tensor<2> = gradient.reshape([rows, cols]);
        (self.each)(*site, if is_transposed::<D>(*site) { gradient.transpose() } else { gradient });
    }
}

/// Trains `coefficients` of `composed` to a low `objective` on `data`, with everything that [`fit_passes`] brings: optimizers,
/// schedules, clipping, logs, bit-exact resumption, progress and cancellation. A resumed run is not told if the models are
/// other ones: say so in [`TrainConfig::identity`].
///
/// # Errors
/// As [`fit_passes`].
pub fn learn(
    composed: &Composed,
    coefficients: Coefficients,
    config: &TrainConfig,
    data: &Mixture<'_>,
    objective: &mut Objective<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    let pass = &mut |coefficients: &Coefficients, batch: &Batch, seed: Seed, passes: usize| {
        let loss = &mut |decoder: &Decoder| objective(decoder, batch, seed) / passes as f64;
        let (value, gradient) = composed.gradient(coefficients, loss)?;
        let mut gradients = GradientsParams::new();
        gradients.register(coefficients.values.id, gradient);
        Some((value, gradients))
    };
    Ok(fit_passes(coefficients, config, data, pass, None, progress, resume)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learned::testing::{Family, KINDS, SYMBOLS, decoder, far};
    use firebrick_core::{Run, Silent};
    use firebrick_models::token_tensor;

    fn composed(tied: bool) -> (Composed, Vec<Decoder>) {
        let base = decoder(tied, 1);
        let tuned = vec![decoder(tied, 2), decoder(tied, 3)];
        let sites = base.sites().all();
        let vectors = tuned.iter().map(|t| TaskVector::between(&base, t, &sites).unwrap()).collect();
        (Composed::new(&base, vectors).unwrap(), tuned)
    }

    fn nll(decoder: &Decoder) -> Tensor<1> {
        let ids: Vec<u32> = (0..12).map(|i| (i * 7 + 5) % (SYMBOLS * KINDS) as u32).collect();
        decoder.nll(token_tensor(&[&ids], &decoder.device()), &mut Run::default()).mean()
    }

    fn numbers(c: &Coefficients) -> Vec<f32> {
        c.read().unwrap().concat()
    }

    /// Coefficients of which no two are equal.
    fn spread(c: &Coefficients) -> Coefficients {
        c.with(&Seed(4).uniform("spread", c.count(), 0.5)).unwrap()
    }

    #[test]
    fn gradients_are_inner_products_with_the_task_vectors() {
        for (tied, granularity, parts) in [
            (true, Granularity::Tensor, 1),
            (false, Granularity::Tensor, 3),
            (false, Granularity::Layer, 1),
            (true, Granularity::Task, 2),
        ] {
            let (composed, _) = composed(tied);
            let c = spread(&composed.coefficients(granularity, 0.0, parts, Seed(2)));
            let (value, gradient) = composed.gradient(&c, &mut nll).unwrap();
            let own = host(gradient).unwrap();
            // The same through a graph of the merged weights.
            let values = c.values.val();
            let weights = composed.compose(&c.layout, &values, &|_, _| true);
            let loss = nll(&with_weights(composed.base(), composed.sites(), weights, false));
            assert_eq!(value.into_scalar::<f32>(), loss.clone().into_scalar::<f32>());
            let graph = host(values.grad(&loss.backward()).unwrap()).unwrap();
            assert!(far(&own, &graph) < 1e-4, "{tied} {granularity:?} {parts}: {}", far(&own, &graph));
            // And by differences.
            let at = |i: usize, by: f32| -> f64 {
                let mut moved = numbers(&c);
                moved[i] += by;
                let merged = composed.merge(&c.with(&moved).unwrap()).unwrap();
                f64::from(nll(&merged).into_scalar::<f32>())
            };
            let largest = own.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
            for i in (0..own.len()).step_by(own.len().div_ceil(9)) {
                let slope = ((at(i, 5e-3) - at(i, -5e-3)) / 1e-2) as f32;
                assert!((slope - own[i]).abs() < 0.01 * largest, "{i}: {slope} {}", own[i]);
            }
            // Control: other vectors have other gradients.
            let swapped =
                Composed { vectors: composed.vectors.iter().rev().cloned().collect(), ..composed.clone() };
            let (_, other) = swapped.gradient(&c, &mut nll).unwrap();
            assert!(far(&own, &host(other).unwrap()) > 1e-2);
        }
    }

    fn bits(decoder: &Decoder, site: Site) -> Vec<u32> {
        host(decoder.weight(site).unwrap()).unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn zero_is_the_base_and_one_the_expert() {
        for (tied, parts) in [(true, 1), (false, 4)] {
            let (mut composed, tuned) = composed(tied);
            let site = Site::layer(0, Part::AttnQ);
            let dims = composed.base.weight(site).unwrap().dims();
            let zeros = Tensor::full(dims, -0.0, &composed.base.device());
            composed.base = composed.base.with_weight(site, zeros);
            assert!(bits(&composed.base, site).iter().all(|b| *b == 1 << 31));
            let c = composed.coefficients(Granularity::Tensor, 0.0, parts, Seed(0));
            let merged = composed.merge(&c).unwrap();
            for &site in composed.sites() {
                assert_eq!(bits(&merged, site), bits(composed.base(), site), "{site}");
            }
            let row = c.count() / 2;
            let one_hot: Vec<f32> = (0..2 * row).map(|i| if i >= row { 1.0 } else { 0.0 }).collect();
            let (fresh, _) = self::composed(tied);
            let merged = fresh.merge(&c.with(&one_hot).unwrap()).unwrap();
            for &site in fresh.sites() {
                let of = |d: &Decoder| host(d.weight(site).unwrap()).unwrap();
                let (got, want) = (of(&merged), of(&tuned[1]));
                assert!(far(&got, &want) < 2e-7, "{site}: {}", far(&got, &want));
                let varies = want.iter().any(|v| *v != want[0]);
                assert!(!varies || far(&got, &of(&tuned[0])) > 1e-3, "control: {site}");
            }
        }
    }

    #[test]
    fn one_coefficient_for_all_is_task_arithmetic() {
        let (composed, tuned) = composed(false);
        let c = composed.coefficients(Granularity::Task, 0.3, 1, Seed(0));
        assert_eq!(c.count(), 2);
        let merged = composed.merge(&c).unwrap();
        for &site in composed.sites() {
            let of = |d: &Decoder| host(d.weight(site).unwrap()).unwrap();
            let (base, a, b) = (of(composed.base()), of(&tuned[0]), of(&tuned[1]));
            let formula = |i: usize| base[i] + 0.3 * ((a[i] - base[i]) + (b[i] - base[i]));
            let want: Vec<f32> = (0..base.len()).map(formula).collect();
            assert!(far(&of(&merged), &want) < 1e-6, "{site}");
        }
        // The same from a coefficient for each weight, all of them equal.
        let each = composed.coefficients(Granularity::Tensor, 0.3, 5, Seed(0));
        let other = composed.merge(&each).unwrap();
        assert!(composed.sites().iter().all(|s| bits(&merged, *s) == bits(&other, *s)));
    }

    #[test]
    fn sites_fall_into_groups_in_the_order_of_data() {
        let (composed, _) = composed(false);
        let names = |g| Groups::new(composed.sites(), 2, g).names().to_vec();
        assert_eq!(names(Granularity::Task), ["all"]);
        assert_eq!(names(Granularity::Layer), ["embed", "layers.0", "layers.1", "end"]);
        assert_eq!(names(Granularity::LayerGroups(2)), ["layers.0-0", "layers.1-1"]);
        assert_eq!(names(Granularity::LayerGroups(9)), names(Granularity::LayerGroups(2)));
        let each = names(Granularity::Tensor);
        assert_eq!((each.len(), &*each[0]), (composed.sites().len(), "embed"));
        let runs: Vec<Site> = (0..30).map(|l| Site::layer(l, Part::MlpUp)).collect();
        let groups = Groups::new(&runs, 30, Granularity::LayerGroups(4));
        assert_eq!(groups.names(), ["layers.0-7", "layers.8-14", "layers.15-22", "layers.23-29"]);
        assert!((0..30).all(|l| {
            let name = &groups.names()[groups.of(runs[l]).unwrap()];
            let (a, b) = name.strip_prefix("layers.").unwrap().split_once('-').unwrap();
            (a.parse().unwrap()..=b.parse().unwrap()).contains(&l)
        }));
        assert_eq!(groups.of(Site::layer(0, Part::AttnQ)), None);
    }

    #[test]
    fn what_does_not_fit_is_listed() {
        let base = decoder(true, 1);
        let sites = base.sites().all();
        let other =
            Decoder::random(crate::learned::testing::config(true, 12), Seed(0), &base.device()).unwrap();
        let error = TaskVector::between(&base, &other, &sites).unwrap_err().to_string();
        assert!(error.lines().count() > 20 && error.contains("layers.1.mlp.down"), "{error}");
        let mut vector = TaskVector::between(&base, &decoder(true, 2), &sites).unwrap();
        let device = base.device();
        vector.deltas.insert(Site::global(Part::Norm), Tensor::zeros([2, 3], &device));
        vector.deltas.insert(Site::layer(7, Part::AttnQ), Tensor::zeros([2, 3], &device));
        let error = Composed::new(&base, vec![vector]).unwrap_err().to_string();
        assert!(error.contains("`norm`") && error.contains("`layers.7.attn.q`"), "{error}");
        assert!(Composed::new(&base, vec![TaskVector::default()]).is_err());
        let (composed, _) = composed(true);
        let c = composed.coefficients(Granularity::Layer, 0.0, 1, Seed(0));
        assert!(c.with(&[1.0]).is_err());
    }

    #[test]
    fn learning_resumes_bit_for_bit() {
        let family = Family::new(5);
        let composed = family.composed();
        let folder = tempfile::tempdir().unwrap();
        let config = |steps: usize, out: Option<&str>| TrainConfig {
            batch: 3,
            window: crate::learned::testing::WINDOW,
            learning_rate: 0.05,
            schedule: firebrick_train::Schedule::Constant,
            warmup: 0,
            steps,
            out: out.map(|o| folder.path().join(o)),
            ..TrainConfig::default()
        };
        let objective = &mut |d: &Decoder, batch: &Batch, _: Seed| batch.nll(d, &mut Run::default());
        let mixture = family.mixture();
        let mut go = |config: &TrainConfig, resume: bool, progress: &dyn Progress| {
            let start = composed.coefficients(Granularity::Tensor, 0.0, 2, Seed(0));
            learn(&composed, start, config, &mixture, objective, progress, resume)
        };
        let (whole, _) = go(&config(8, None), false, &Silent).unwrap();
        let stop = Stop(std::sync::atomic::AtomicUsize::new(0));
        let error = go(&config(8, Some("run")), false, &stop).unwrap_err();
        assert!(matches!(error, MergeError::Train(firebrick_train::TrainError::Cancelled(_))), "{error}");
        let (resumed, report) = go(&config(8, Some("run")), true, &Silent).unwrap();
        assert_eq!((numbers(&resumed), report.steps), (numbers(&whole), 8));
        assert_ne!(numbers(&whole), numbers(&go(&config(5, None), false, &Silent).unwrap().0), "control");
    }

    /// Stops after five steps.
    struct Stop(std::sync::atomic::AtomicUsize);

    impl Progress for Stop {
        fn on(&self, event: firebrick_core::Event<'_>) {
            if matches!(event, firebrick_core::Event::Advance { .. }) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }

        fn cancelled(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::Relaxed) >= 5
        }
    }
}
