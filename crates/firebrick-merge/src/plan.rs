//! What a merge writes, tensor by tensor, and from what: slices, stacked layers, parameters and their precedence.
//!
//! The rules are mergekit's, as far as they can be told from outside. Layer `i` of a slice of `n` layers lies at `i / (n - 1)` of a
//! gradient, or at its end if `n` is 1; tensors before and after the layers lie at its start, so the head gets the first value of a
//! gradient. Tensors before the layers come from the first slice, those after them from the last one, even if that has no layers.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use firebrick_core::{Part, Selector, Site, SiteEntry};
use firebrick_models::GgufForm;
use firebrick_tensor::block::DType;
use serde::Serialize;

use crate::config::{MergeConfig, Module, Parameters, Slice, SliceSource, knows_a_base};
use crate::input::InputModel;
use crate::methods::{MergeMethod, magprune_fits};
use crate::names;
use crate::vocabulary::Vocabulary;
use crate::yaml::{Place, Problems};

/// Parameters by name; switches are 0 and 1.
pub type ParameterValues = BTreeMap<&'static str, f64>;

/// Everything that a merge writes. [`Display`](fmt::Display) gives one line for each tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergePlan {
    /// mergekit's name of the method.
    pub method: &'static str,
    /// Every tensor, in order.
    pub tensors: Vec<PlannedTensor>,
    /// Layers of the output, by what stands before their numbers.
    pub layers: Vec<(String, usize)>,
    /// Tensors of the models that no tensor is made from: model, tensor.
    pub unused: Vec<(String, String)>,
    /// For each layer of the first module the model and layer that it is made from first.
    #[serde(skip)]
    pub(crate) stacked: Vec<(usize, usize)>,
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// What it is made from, in order.
    pub sources: Vec<PlannedSource>,
    /// Which of them is the base, if the method sets it apart.
    pub base: Option<usize>,
    /// Parameters that hold for all of them.
    pub global: ParameterValues,
    /// Integers that all models have alike.
    pub copied: bool,
    /// Whether its rows are those of the vocabulary that the output gets.
    pub vocabulary: bool,
}

/// One input of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlannedSource {
    /// The model as the configuration names it.
    pub name: String,
    /// The tensor, by Hugging Face's name.
    pub tensor: String,
    /// Parameters for this model.
    pub parameters: ParameterValues,
    #[serde(skip)]
    pub(crate) model: usize,
    /// Name in the file.
    #[serde(skip)]
    pub(crate) stored: String,
    #[serde(skip)]
    pub(crate) form: GgufForm,
}

impl fmt::Display for MergePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tensors.iter().try_for_each(|tensor| writeln!(f, "{tensor}"))?;
        self.unused.iter().try_for_each(|(model, tensor)| writeln!(f, "unused {model}/{tensor}"))
    }
}

impl fmt::Display for PlannedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = |f: &mut fmt::Formatter<'_>, values: &ParameterValues| {
            values.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
        };
        write!(f, "{} {} {:?}", self.name, self.dtype, self.shape)?;
        values(f, &self.global)?;
        for (i, source) in self.sources.iter().enumerate() {
            f.write_str(if i == 0 { " <- " } else { " + " })?;
            write!(f, "{}/{}", source.name, source.tensor)?;
            values(f, &source.parameters)?;
            f.write_str(if Some(i) == self.base { " (base)" } else { "" })?;
        }
        Ok(())
    }
}

/// Plans `config` over `models`, one for each of [`MergeConfig::models`]; what keeps it from being done goes to `problems`.
pub(crate) fn plan(
    config: &MergeConfig,
    models: &[InputModel],
    vocabulary: Option<&Vocabulary>,
    problems: &mut Problems,
) -> MergePlan {
    let mut planner = Planner {
        config,
        models,
        vocabulary,
        tally: BTreeMap::new(),
        selected: RefCell::default(),
        tensors: Vec::new(),
        stacked: Vec::new(),
        layers: Vec::new(),
    };
    planner.modules();
    planner.check_selectors();
    let (tensors, stacked, layers) = (planner.tensors, planner.stacked, planner.layers);
    for ((place, what), found) in planner.tally {
        const SHOWN: usize = 8;
        let mut list = found.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        if found.len() > SHOWN {
            list += &format!(" and {} more", found.len() - SHOWN);
        }
        problems.add(place, format!("{what}{list}"));
    }
    let used: HashSet<(usize, &str)> =
        tensors.iter().flat_map(|t| t.sources.iter().map(|s| (s.model, s.tensor.as_str()))).collect();
    let merged: BTreeSet<usize> = used.iter().map(|(model, _)| *model).collect();
    let unused = merged
        .iter()
        .flat_map(|m| models[*m].tensors.keys().chain(&models[*m].derived).map(move |name| (*m, name)))
        .filter(|(m, name)| !used.contains(&(*m, name.as_str())))
        .map(|(m, name)| (models[m].reference.to_string(), name.clone()))
        .collect();
    MergePlan { method: config.method.name(), tensors, layers, unused, stacked }
}

struct Planner<'a> {
    config: &'a MergeConfig,
    models: &'a [InputModel],
    vocabulary: Option<&'a Vocabulary>,
    /// Problems that many tensors share: place and kind, and the tensors.
    tally: BTreeMap<(Place, String), Vec<String>>,
    /// Selectors that took a tensor.
    selected: RefCell<HashSet<String>>,
    tensors: Vec<PlannedTensor>,
    stacked: Vec<(usize, usize)>,
    layers: Vec<(String, usize)>,
}

/// Where in a merge a tensor lies.
#[derive(Clone, Copy)]
struct Spot<'a> {
    module: &'a Module,
    slice: &'a Slice,
    /// From 0 at the first layer of the slice to 1 at the last.
    depth: f64,
}

impl<'a> Planner<'a> {
    fn note(&mut self, place: Place, what: impl Into<String>, tensor: impl Into<String>) {
        self.tally.entry((place, what.into())).or_default().push(tensor.into());
    }

    fn model(&self, source: &SliceSource) -> usize {
        self.models.iter().position(|m| m.reference == source.model).unwrap_or(0)
    }

    fn modules(&mut self) {
        let sources = || self.config.modules.iter().flat_map(|m| &m.slices).flat_map(|s| &s.sources);
        let merged: Vec<usize> =
            sources().map(|s| self.model(s)).collect::<BTreeSet<_>>().into_iter().collect();
        let prefixes = prefixes(merged.iter().map(|m| &self.models[*m]));
        let names = prefixes.iter().map(|p| format!("`{p}`")).collect::<Vec<_>>().join(", ");
        let mut taken: Vec<(&Module, String)> = Vec::new();
        for module in &self.config.modules {
            let sliced = module.slices.iter().any(|s| s.sources.iter().any(|s| s.layers.is_some()));
            let found: Vec<&String> = match &module.name {
                None => prefixes.iter().collect(),
                Some(name) => prefixes.iter().filter(|p| is_module(p, name)).collect(),
            };
            match (&module.name, found.len()) {
                (Some(name), 0) => self.note(
                    module.place,
                    format!("there is no module `{name}`; there are layers behind "),
                    &names,
                ),
                (None, 2..) if sliced => {
                    let text = "slices of a model with several modules: say which under `modules`; there are layers behind ";
                    self.note(module.place, text, &names);
                }
                (_, _) => taken.extend(found.into_iter().map(|p| (module, p.clone()))),
            }
            if prefixes.is_empty() && module.name.is_none() {
                taken.push((module, String::new()));
                if sliced {
                    self.note(module.place, "slices of a model without layers", "");
                }
            }
        }
        for prefix in &prefixes {
            let count = taken.iter().filter(|(_, p)| p == prefix).count();
            let missing = self.config.modules.iter().all(|m| m.name.is_some()) && count == 0;
            if missing {
                self.note(
                    self.config.place,
                    "the layers of no module are those behind ",
                    format!("`{prefix}`"),
                );
            } else if count > 1 {
                self.note(self.config.place, "two modules have the layers behind ", format!("`{prefix}`"));
            }
        }
        for (module, prefix) in taken {
            self.module(module, &prefix, &prefixes);
        }
    }

    /// The tensors of one module: those before its layers, its layers, those after them.
    fn module(&mut self, module: &'a Module, prefix: &str, prefixes: &[String]) {
        let mut merged = Vec::new();
        for source in module.slices.iter().flat_map(|s| &s.sources) {
            let model = self.model(source);
            if !merged.contains(&model) {
                merged.push(model);
            }
        }
        let mut loose: Vec<String> = Vec::new();
        let mut rests: HashMap<(usize, usize), Vec<&'a str>> = HashMap::new();
        let mut seen: HashSet<&str> = HashSet::new();
        for &m in &merged {
            for name in self.models[m].tensors.keys() {
                if let Some(found) = names::behind(name, prefix) {
                    rests.entry((m, found.layer)).or_default().push(found.rest);
                } else if prefixes.iter().all(|p| names::behind(name, p).is_none())
                    && nearest(name, prefixes).is_none_or(|p| p == prefix)
                    && seen.insert(name)
                {
                    loose.push(name.clone());
                }
            }
        }
        let (before, after): (Vec<_>, Vec<_>) = loose.into_iter().partition(|n| names::is_before_layers(n));
        let (Some(first), Some(last)) = (module.slices.first(), module.slices.last()) else { return };
        let spot = |slice, depth| Spot { module, slice, depth };
        for name in &before {
            let inputs: Vec<_> = first.sources.iter().map(|s| (s, name.clone())).collect();
            self.tensor(name, &inputs, spot(first, 0.0));
        }
        let mut output = 0;
        for slice in &module.slices {
            if let Some(range) = self.ranges(slice, prefix) {
                output = self.slice(module, slice, prefix, &range, &rests, output);
            }
        }
        if !prefix.is_empty() {
            self.layers.push((prefix.to_owned(), output));
        }
        // mergekit pairs the sources of the last slice with those of the first and loses what is over.
        let count = if self.config.compat { first.sources.len() } else { usize::MAX };
        for name in &after {
            let inputs: Vec<_> = last.sources.iter().take(count).map(|s| (s, name.clone())).collect();
            self.tensor(name, &inputs, spot(last, 0.0));
        }
    }

    /// The first layer of each source of a slice and how many there are; nothing if that does not fit.
    fn ranges(&mut self, slice: &Slice, prefix: &str) -> Option<(Vec<usize>, usize)> {
        let has: Vec<usize> =
            slice.sources.iter().map(|s| self.models[self.model(s)].layers(prefix)).collect();
        let mut fits = true;
        for (source, has) in slice.sources.iter().zip(&has) {
            let wrong = match &source.layers {
                Some(range) if range.end > *has => Some(format!(
                    "`{}` has {has} layers, there are none up to {} as `layer_range` says",
                    source.model, range.end
                )),
                None if *has != self.models[self.model(&slice.sources[0])].layers(prefix) => {
                    let first = &slice.sources[0].model;
                    let count = self.models[self.model(&slice.sources[0])].layers(prefix);
                    Some(format!("`{}` has {has} layers, `{first}` has {count}", source.model))
                }
                _ => None,
            };
            if let Some(text) = wrong {
                self.note(source.place, text, "");
                fits = false;
            }
        }
        let count = slice.sources.first()?.layers.as_ref().map_or(*has.first()?, |r| r.len());
        let starts = slice.sources.iter().map(|s| s.layers.as_ref().map_or(0, |r| r.start));
        fits.then(|| (starts.collect(), count))
    }

    /// Plans the layers of one slice from `output` on; gives the next layer of the output.
    fn slice(
        &mut self,
        module: &'a Module,
        slice: &'a Slice,
        prefix: &str,
        (starts, count): &(Vec<usize>, usize),
        rests: &HashMap<(usize, usize), Vec<&'a str>>,
        output: usize,
    ) -> usize {
        let first_module = self.layers.is_empty();
        for i in 0..*count {
            let depth = if *count > 1 { i as f64 / (count - 1) as f64 } else { 1.0 };
            let mut all: Vec<&str> = Vec::new();
            let mut known: HashSet<&str> = HashSet::new();
            for (source, start) in slice.sources.iter().zip(starts) {
                let found = rests.get(&(self.model(source), start + i)).map_or(&[][..], Vec::as_slice);
                all.extend(found.iter().filter(|rest| known.insert(rest)));
            }
            if first_module {
                self.stacked.push((self.model(&slice.sources[0]), starts[0] + i));
            }
            for rest in all {
                let name = format!("{prefix}.{}.{rest}", output + i);
                let input = |(source, start): (&'a SliceSource, &usize)| {
                    (source, format!("{prefix}.{}.{rest}", start + i))
                };
                let inputs: Vec<_> = slice.sources.iter().zip(starts).map(input).collect();
                self.tensor(&name, &inputs, Spot { module, slice, depth });
            }
        }
        output + count
    }

    /// Plans the tensor `name` of the output.
    fn tensor(&mut self, name: &str, inputs: &[(&'a SliceSource, String)], spot: Spot<'a>) {
        let method = self.config.method;
        // A head that every model ties to its embedding is not written.
        let has = |(source, input): &(&SliceSource, String)| {
            self.models[self.model(source)].tensors.contains_key(input)
        };
        if names::is_head(name) && !inputs.iter().any(has) {
            return;
        }
        let base_model = self.config.base_of(spot.slice).filter(|_| knows_a_base(method));
        let base = inputs.iter().position(|(s, _)| Some(&s.model) == base_model);
        let mut sources = Vec::new();
        let mut shapes: Vec<(&str, Vec<usize>, DType)> = Vec::new();
        for (i, (source, input)) in inputs.iter().enumerate() {
            let m = self.model(source);
            let model = &self.models[m];
            let Some((tensor, stored)) = model.tensor(input) else {
                self.note(source.place, format!("`{}` lacks ", source.model), format!("`{input}`"));
                continue;
            };
            shapes.push((&model.reference.path, stored.shape.clone(), stored.dtype));
            let parameters = self.own(source, input, Some(i) == base, spot);
            sources.push(PlannedSource {
                name: source.model.to_string(),
                tensor: tensor.to_owned(),
                parameters,
                model: m,
                stored: stored.name.clone(),
                form: stored.form,
            });
        }
        let Some((first, shape, _)) = shapes.first().cloned() else { return };
        let global = self.global(name, spot);
        let copied = shapes.iter().any(|(_, _, dtype)| !dtype.is_real());
        let mut shape = shape;
        let by_token = !shape.is_empty() && (names::is_embedding(name) || names::is_head(name));
        let vocabulary =
            self.vocabulary.filter(|v| by_token && !copied && v.changes(sources.iter().map(|s| s.model)));
        let rows = usize::from(vocabulary.is_some());
        for (path, other, _) in shapes.iter().filter(|(_, other, _)| other.get(rows..) != shape.get(rows..)) {
            let hint = match by_token && vocabulary.is_none() {
                true => " (with a `tokenizer` the rows of the vocabularies are brought together)",
                false => "",
            };
            let text = format!("shape {other:?} in `{path}` and {shape:?} in `{first}`{hint}: ");
            self.note(spot.slice.place, text, format!("`{name}`"));
        }
        if let Some(vocabulary) = vocabulary {
            shape[0] = vocabulary.rows();
        }
        let dtype = self.dtype(name, copied, &shapes, base, spot);
        if copied {
            self.check_copies(name, &sources, spot);
        } else if sources.len() == inputs.len() && weights_cancel(method, &sources, base, &global) {
            self.note(spot.slice.place, "weights add up to 0 at ", format!("`{name}`"));
        }
        let vocabulary = vocabulary.is_some();
        self.tensors.push(PlannedTensor {
            name: name.to_owned(),
            dtype,
            shape,
            sources,
            base,
            global,
            copied,
            vocabulary,
        });
    }

    /// The type of an output: what was asked for, else that of the base, else the narrowest that holds every input.
    fn dtype(
        &mut self,
        name: &str,
        copied: bool,
        shapes: &[(&str, Vec<usize>, DType)],
        base: Option<usize>,
        spot: Spot<'_>,
    ) -> DType {
        let first = shapes[0].2;
        if copied {
            return first;
        }
        if let Some(dtype) = self.config.out_dtype.or(self.config.dtype) {
            return dtype;
        }
        if let Some((path, _, packed)) = shapes.iter().find(|(_, _, dtype)| dtype.is_packed()) {
            let text =
                format!("`{path}` is packed ({packed}): say the type of the output with `dtype`, for ");
            self.note(spot.slice.place, text, format!("`{name}`"));
        }
        match base.and_then(|base| shapes.get(base)) {
            Some((_, _, dtype)) => *dtype,
            None if shapes.iter().all(|(_, _, dtype)| *dtype == first) => first,
            None => DType::F32,
        }
    }

    /// Integers (position ids and the like) are taken over if all models have the same.
    fn check_copies(&mut self, name: &str, sources: &[PlannedSource], spot: Spot<'_>) {
        let bytes = |s: &PlannedSource| self.models[s.model].checkpoint.bytes(&s.stored).ok();
        if sources.iter().any(|s| bytes(s) != bytes(&sources[0])) {
            self.note(spot.slice.place, "integers that differ between the models: ", format!("`{name}`"));
        }
    }

    /// The parameters of one model at `input`.
    fn own(
        &mut self,
        source: &'a SliceSource,
        input: &str,
        is_base: bool,
        spot: Spot<'a>,
    ) -> ParameterValues {
        let above =
            [&source.parameters, &spot.slice.parameters, &spot.module.parameters, &self.config.parameters];
        let model = &self.models[self.model(source)];
        let selected = |selector: &Selector| self.takes(selector, model, input, input, None);
        let mut values = ParameterValues::new();
        let mut missing = Vec::new();
        for p in self.config.method.parameters().iter().filter(|p| p.per_model) {
            match look_up(&above, p.name, input, spot.depth, &selected).or(p.default) {
                Some(value) => {
                    values.insert(p.name, value);
                }
                None if is_base => {}
                None => missing.push(p.name),
            }
        }
        // DELLA's, which a gradient can take there in some layers only.
        if let (false, Some(density), Some(epsilon)) = (is_base, values.get("density"), values.get("epsilon"))
            && !magprune_fits(*density, *epsilon)
        {
            let text = format!("`density` of model `{}` is within `epsilon` of 0 or 1 at ", source.model);
            self.note(source.place, text, format!("`{input}`"));
        }
        for name in missing {
            self.note(
                source.place,
                format!("`{name}` of model `{}`: no filter takes ", source.model),
                format!("`{input}`"),
            );
        }
        values
    }

    /// The parameters of all models at the output `name`.
    fn global(&mut self, name: &str, spot: Spot<'a>) -> ParameterValues {
        let above = [&spot.slice.parameters, &spot.module.parameters, &self.config.parameters];
        let model = &self.models[self.model(&spot.slice.sources[0])];
        let total =
            spot.module.slices.iter().filter_map(|s| s.sources[0].layers.as_ref()).map(|r| r.len()).sum();
        let input = names::layer_name(name).map(|n| format!("{}.0.{}", n.prefix, n.rest));
        let input = input.as_deref().unwrap_or(name);
        let layer = names::layer_name(name).map(|n| n.layer);
        let sliced = spot.slice.sources[0].layers.is_some();
        let place = layer.filter(|_| sliced).map(|layer| (layer, total));
        let input = if sliced { input } else { name };
        let selected = |selector: &Selector| self.takes(selector, model, input, name, place);
        let mut values = ParameterValues::new();
        let mut missing = Vec::new();
        for p in self.config.method.parameters().iter().filter(|p| !p.per_model && p.name != "int8_mask") {
            match look_up(&above, p.name, name, spot.depth, &selected).or(p.default) {
                Some(value) => {
                    values.insert(p.name, value);
                }
                None => missing.push(p.name),
            }
        }
        for parameter in missing {
            self.note(spot.slice.place, format!("`{parameter}`: no filter takes "), format!("`{name}`"));
        }
        values
    }

    /// Whether `selector` takes a tensor: the site of `input` in `model`, at another layer of so many if `moved`.
    fn takes(
        &self,
        selector: &Selector,
        model: &InputModel,
        input: &str,
        name: &str,
        moved: Option<(usize, usize)>,
    ) -> bool {
        let Some(sites) = &model.sites else { return false };
        let head = names::is_head(input).then(|| Site::global(Part::Head));
        let Some(entry) = sites.by_tensor(input).or(head).and_then(|site| sites.get(site)) else {
            return false;
        };
        let mut entry: SiteEntry = entry.clone();
        entry.tensor = Some(name.to_owned());
        let mut layers = sites.layers();
        if let Some((layer, total)) = moved {
            (entry.site.layer, layers) = (Some(layer), total);
        }
        let takes = selector.matches_entry(&entry, layers);
        if takes {
            self.selected.borrow_mut().insert(selector.to_string());
        }
        takes
    }

    /// A selector that takes nothing is a mistake.
    fn check_selectors(&mut self) {
        let config = self.config;
        let slices = || config.modules.iter().flat_map(|m| &m.slices);
        let all = std::iter::once(&config.parameters)
            .chain(config.modules.iter().map(|m| &m.parameters))
            .chain(slices().map(|s| &s.parameters))
            .chain(slices().flat_map(|s| s.sources.iter().map(|s| &s.parameters)));
        let known = self.models.iter().any(|m| m.sites.is_some());
        for (name, value, place) in all.flat_map(|p| &p.0) {
            for selector in value.selectors() {
                if self.selected.borrow().contains(&selector.to_string()) {
                    continue;
                }
                let why = match known {
                    true => "no tensor that no earlier entry takes",
                    false => "nothing: the sites of these models are not known",
                };
                self.note(*place, format!("`{name}`: the selector `{selector}` takes {why}"), "");
            }
        }
    }
}

/// Whether a method would divide by a sum of weights that is 0.
fn weights_cancel(
    method: MergeMethod,
    sources: &[PlannedSource],
    base: Option<usize>,
    global: &ParameterValues,
) -> bool {
    let on = |switch: &str| global.get(switch).is_some_and(|v| *v != 0.0);
    let others = sources.iter().enumerate().filter(|(i, _)| Some(*i) != base);
    let weights: Option<Vec<f64>> = others.map(|(_, s)| s.parameters.get("weight").copied()).collect();
    let Some(weights) = weights else { return false };
    match method {
        // As the method adds them.
        MergeMethod::Linear => on("normalize") && weights.iter().map(|w| *w as f32).sum::<f32>() == 0.0,
        // A single model is taken as it is.
        MergeMethod::Multislerp => {
            on("normalize_weights") && sources.len() > 1 && weights.iter().sum::<f64>() == 0.0
        }
        _ => false,
    }
}

/// The first of `levels` that has a value.
fn look_up(
    levels: &[&Parameters],
    parameter: &str,
    tensor: &str,
    depth: f64,
    selected: &dyn Fn(&Selector) -> bool,
) -> Option<f64> {
    levels.iter().find_map(|level| level.get(parameter)?.at(tensor, depth, selected))
}

/// What stands before the numbers of layers in these models.
fn prefixes<'m>(models: impl Iterator<Item = &'m InputModel> + Clone) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let names = || models.clone().flat_map(|m| m.tensors.keys());
    for name in names().filter_map(|n| names::layer_name(n)) {
        if !found.iter().any(|p| p == name.prefix) {
            found.push(name.prefix.to_owned());
        }
    }
    if !found.is_empty() {
        return found;
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    names().filter_map(|n| names::numbered_name(n)).for_each(|n| *counts.entry(n.prefix).or_default() += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(prefix, _)| prefix.to_owned())
        .into_iter()
        .collect()
}

/// Whether `name` of a configuration means the layers behind `prefix`; mergekit has names of its own for the parts of a model.
fn is_module(prefix: &str, name: &str) -> bool {
    let other: &[&str] = match name {
        "text_decoder" => &["language_model", "text_model"],
        "vision_tower" => &["vision_model", "visual"],
        _ => &[],
    };
    prefix == name || prefix.contains(name) || other.iter().any(|n| prefix.contains(n))
}

/// The prefix that shares most parts with `name`, that of a text model if several do; `None` where there are none.
fn nearest<'p>(name: &str, prefixes: &'p [String]) -> Option<&'p str> {
    let shared = |p: &str| name.split('.').zip(p.split('.')).take_while(|(a, b)| a == b).count();
    let most = prefixes.iter().map(|p| shared(p)).max()?;
    let other = |p: &str| ["vision", "visual", "audio"].iter().any(|part| p.contains(part));
    let mut alike = prefixes.iter().map(String::as_str).filter(|p| shared(p) == most);
    let first = alike.clone().next();
    alike.find(|p| !other(p)).or(first)
}
