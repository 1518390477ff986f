//! A merge as a transformation on the streaming executor.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, Seed, read_text};
use firebrick_models::GgufForm;
use firebrick_models::tokenizer::Tokenizer;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::TensorSpec;
use firebrick_tensor::stream::{Card, Input, Job, OutputSpec, Source, StreamError, Target, Transform};

use crate::config::MergeConfig;
use crate::input::InputModel;
use crate::plan::{self, MergePlan, PlannedSource, PlannedTensor};
use crate::rows::Rows;
use crate::vocabulary::Vocabulary;
use crate::yaml::Problems;
use crate::{GlobalParameters, MergeError, ModelParameters, Numerics, TensorMerge, Values, folder, prepare};

/// Elements of inputs that are put together before they are merged.
const CHUNK: usize = 1 << 15;

/// A merge whose checkpoints are open and fit together.
#[derive(Debug)]
pub struct Merge {
    pub(crate) config: MergeConfig,
    pub(crate) text: String,
    /// One for each of [`MergeConfig::models`].
    pub(crate) models: Vec<InputModel>,
    pub(crate) plan: MergePlan,
    pub(crate) vocabulary: Option<Vocabulary>,
    pub(crate) chat_template: Option<String>,
}

impl Merge {
    /// Reads a YAML file of one document and opens its models; relative paths are taken from the current folder.
    ///
    /// # Errors
    /// Lists every problem of the configuration with line and column; then every model that cannot be opened; then everything in
    /// which the models do not fit the configuration and one another.
    pub fn open(path: &Path) -> Result<Self, MergeError> {
        let text =
            read_text(path, MAX_SETTINGS).map_err(|source| MergeError::Io { path: path.into(), source })?;
        let config = MergeConfig::parse(&text)
            .map_err(|problems| MergeError::Config { path: path.into(), problems })?;
        Self::new(config, text, path)
    }

    /// A merge of `config`; `text` goes to the output, and `path` names it in errors.
    ///
    /// # Errors
    /// As [`Merge::open`].
    pub fn new(config: MergeConfig, text: String, path: &Path) -> Result<Self, MergeError> {
        let mut problems = Problems::default();
        let mut models = Vec::new();
        for reference in config.models() {
            match InputModel::open(reference) {
                Ok(model) => models.push(model),
                Err(error) => problems.add(config.place_of(reference), error),
            }
        }
        let fail =
            |problems: Problems| MergeError::Mismatch { path: path.into(), problems: problems.into_lines() };
        if !problems.is_empty() {
            return Err(fail(problems));
        }
        let tokenizer = config.tokenizer.as_ref();
        let vocabulary = tokenizer.and_then(|t| Vocabulary::new(&config, t, &models, &mut problems));
        let plan = plan::plan(&config, &models, vocabulary.as_ref(), &mut problems);
        for tensor in plan.tensors.iter().filter(|t| t.vocabulary) {
            // Rows may also come from a model that only the tokenizer names.
            let merged = |m: usize| tensor.sources.iter().any(|s| s.model == m);
            for (m, model) in models.iter().enumerate() {
                let (place, reference) = (config.place_of(&model.reference), &model.reference);
                let read = !merged(m) && vocabulary.as_ref().is_some_and(|v| v.reads(m));
                match model.tensor(&tensor.name) {
                    Some((name, _)) if model.update(name).is_some() => problems.add(
                        place,
                        format!("the adapter of `{reference}` changes `{name}`, whose rows change places"),
                    ),
                    Some((name, stored)) if read && stored.shape.get(1..) != tensor.shape.get(1..) => {
                        let (theirs, ours) = (&stored.shape, &tensor.shape);
                        problems.add(
                            place,
                            format!("rows of `{name}` {theirs:?} of `{reference}` do not fit the output's {ours:?}"),
                        );
                    }
                    None if read => problems.add(
                        place,
                        format!("`{reference}` has tokens that the output takes, but no `{}`", tensor.name),
                    ),
                    _ => {}
                }
            }
        }
        let chat_template = folder::chat_template(&config, &models, &mut problems);
        if problems.is_empty() && plan.tensors.is_empty() {
            problems.add(config.place, "the models have no tensors");
        }
        match problems.is_empty() {
            true => Ok(Merge { config, text, models, plan, vocabulary, chat_template }),
            false => Err(fail(problems)),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &MergeConfig {
        &self.config
    }

    /// What is written, tensor by tensor, and from what.
    pub fn plan(&self) -> &MergePlan {
        &self.plan
    }

    /// The tokenizer of the base, or of the first model.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer, MergeError> {
        let model = folder::config_model(&self.config, &self.models);
        let fail = |what| MergeError::Mismatch { path: model.folder(), problems: vec![what] };
        model.tokenizer().map_err(fail)
    }

    /// The folder `path`, with the configuration and tokenizer of the base (or of the first model), changed to what the output is.
    ///
    /// # Errors
    /// If one of these files is there but cannot be read.
    pub fn target(&self, path: &Path) -> Result<Target, MergeError> {
        let side_files = folder::side_files(self)?;
        Ok(Target::Folder { path: path.into(), stem: "model".into(), side_files })
    }

    /// The embeddings, or heads, that the rows of a vocabulary are read from: model and name in its file.
    fn token_inputs(&self, tensor: &PlannedTensor) -> Vec<(usize, String)> {
        let found = self.models.iter().enumerate();
        found.filter_map(|(m, model)| Some((m, model.tensor(&tensor.name)?.1.name.clone()))).collect()
    }

    /// Whether an input is read as it is stored.
    fn is_plain(&self, tensor: &PlannedTensor, source: &PlannedSource) -> bool {
        source.form == GgufForm::Same
            && !(tensor.vocabulary && self.rows_of(source).is_some())
            && self.models[source.model].update(&source.tensor).is_none()
    }

    fn rows_of(&self, source: &PlannedSource) -> Option<&[crate::vocabulary::Row]> {
        self.vocabulary.as_ref()?.of(source.model)
    }

    /// An input of a job as rows.
    fn rows<'j>(
        &'j self,
        tensor: &PlannedTensor,
        source: &PlannedSource,
        inputs: &'j [Input<'j>],
    ) -> Result<Rows<'j>, String> {
        let find =
            |model: usize, name: &str| inputs.iter().find(|i| i.source == model && i.info.name == name);
        if tensor.vocabulary
            && let Some(rows) = self.rows_of(source)
        {
            let all = self.token_inputs(tensor);
            let found = all.iter().filter_map(|(model, name)| Some((*model, find(*model, name)?)));
            return Rows::vocabulary(found.collect(), rows, &tensor.shape);
        }
        let input = find(source.model, &source.stored).ok_or("an input that is not declared")?;
        Ok(Rows::stored(input, source.form, self.models[source.model].update(&source.tensor)))
    }

    /// The parameters of a tensor: of each source, and of all.
    pub(crate) fn parameters(
        &self,
        tensor: &PlannedTensor,
    ) -> Result<(Vec<ModelParameters>, GlobalParameters), String> {
        let method = self.config.method;
        let own = tensor.sources.iter().enumerate().map(|(i, source)| {
            // The base needs none.
            let base = (tensor.base == Some(i)).then_some(0.0);
            ModelParameters::new(method, |name| source.parameters.get(name).copied().or(base))
        });
        let own = own.collect::<Result<Vec<_>, _>>()?;
        Ok((own, GlobalParameters::new(method, |name| tensor.global.get(name).copied())?))
    }

    /// What a method takes to merge a whole tensor.
    pub(crate) fn tensor_merge<'a>(
        &self,
        tensor: &'a PlannedTensor,
        inputs: &'a [Values<'a>],
        per_model: &'a [ModelParameters],
        global: &'a GlobalParameters,
    ) -> TensorMerge<'a> {
        TensorMerge {
            inputs,
            base: tensor.base,
            shape: &tensor.shape,
            per_model,
            global,
            seed: Seed(self.config.seed).derive(&tensor.name),
            numerics: self.config.numerics,
            dtype: self.held(tensor),
            masks: None,
        }
    }

    /// The type in which mergekit holds the models: that of the base, else one that holds them all.
    fn held(&self, tensor: &PlannedTensor) -> DType {
        let stored = |source: &PlannedSource| {
            self.models[source.model].checkpoint.get(&source.stored).map_or(DType::F32, |info| info.dtype)
        };
        let first = stored(&tensor.sources[tensor.base.unwrap_or(0)]);
        let alike = tensor.base.is_some() || tensor.sources.iter().all(|s| stored(s) == first);
        self.config.dtype.unwrap_or(if alike { first } else { DType::F32 })
    }

    fn merge(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let fail = |problem: String| StreamError::transform(problem);
        let method = self.config.method;
        let tensor = &self.plan.tensors[job.index()];
        if tensor.copied {
            return job.copy();
        }
        let inputs = job.inputs();
        let (per_model, global) = self.parameters(tensor).map_err(fail)?;
        let load = self.config.dtype;
        let of = |source: &PlannedSource| {
            inputs.iter().find(|i| i.source == source.model && i.info.name == source.stored)
        };
        let common = self.tensor_merge(tensor, &[], &per_model, &global);
        // Inputs in another type than `dtype` are rounded to it first, as mergekit loads them.
        let plain: Vec<bool> = tensor.sources.iter().map(|s| self.is_plain(tensor, s)).collect();
        if plain.iter().all(|p| *p) {
            let values = tensor.sources.iter().map(|s| {
                let input = of(s).ok_or("an input that is not declared")?;
                let values = Values::encoded(input.info.dtype, input.bytes, input.info.elements())?;
                Ok(load.map_or(values, |dtype| values.rounded_to(dtype)))
            });
            let values = values.collect::<Result<Vec<_>, String>>().map_err(fail)?;
            let prepared = prepare(method, &TensorMerge { inputs: &values, ..common }).map_err(fail)?;
            let (range, write) = (job.range(), |values: &[f32]| job.write_f32(values));
            return prepared.run(&values, range, write, fail);
        }
        let rows = tensor.sources.iter().map(|s| self.rows(tensor, s, inputs));
        let rows = rows.collect::<Result<Vec<_>, _>>().map_err(fail)?;
        let elements: usize = tensor.shape.iter().product();
        let columns = elements.checked_div(*tensor.shape.first().unwrap_or(&1)).unwrap_or(1).max(1);
        // A method that needs the whole tensor gets it at once, the others as many rows as make a chunk.
        let step = if method.elementwise() { (CHUNK / columns).max(1) } else { (elements / columns).max(1) };
        let mut buffers: Vec<Vec<f32>> = vec![Vec::new(); rows.len()];
        for start in (0..elements / columns).step_by(step) {
            let count = step.min(elements / columns - start);
            for (rows, buffer) in rows.iter().zip(&mut buffers) {
                buffer.resize(count * columns, 0.0);
                rows.read(start..start + count, buffer).map_err(fail)?;
            }
            let values: Vec<Values<'_>> = buffers
                .iter()
                .map(|b| load.map_or(Values::from(&b[..]), |dtype| Values::from(&b[..]).rounded_to(dtype)))
                .collect();
            let len = [count * columns];
            let shape = if method.elementwise() { &len[..] } else { &tensor.shape };
            let part = TensorMerge { inputs: &values, shape, ..common };
            let prepared = prepare(method, &part).map_err(fail)?;
            prepared.run(&values, 0..count * columns, |values| job.write_f32(values), fail)?;
        }
        Ok(())
    }
}

impl Transform for Merge {
    fn name(&self) -> &str {
        self.config.method.label()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let models = self.models.iter();
        models.map(|m| Source { name: m.reference.to_string(), checkpoint: &m.checkpoint }).collect()
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let method = self.config.method;
        let spec = |tensor: &PlannedTensor| {
            let mut reads: Vec<(usize, String)> = Vec::new();
            let own = tensor.sources.iter().map(|s| (s.model, s.stored.clone()));
            let tokens = if tensor.vocabulary { self.token_inputs(tensor) } else { Vec::new() };
            for read in own.chain(tokens) {
                if !reads.contains(&read) {
                    reads.push(read);
                }
            }
            let elements: usize = tensor.shape.iter().product();
            let spec = TensorSpec::new(tensor.name.clone(), tensor.dtype, tensor.shape.clone());
            let count = tensor.sources.len();
            let plain = tensor.sources.iter().all(|s| self.is_plain(tensor, s));
            let rounded = self.config.numerics == Numerics::Mergekit
                && matches!(self.held(tensor), DType::BF16 | DType::F16);
            let scratch = method.scratch_bytes(elements, count, rounded);
            let columns = elements / tensor.shape.first().copied().unwrap_or(1).max(1);
            match (plain, tensor.copied || method.elementwise()) {
                (true, true) => OutputSpec::elementwise(spec, reads),
                (true, false) => OutputSpec::whole(spec, reads, scratch),
                (false, true) => {
                    OutputSpec::whole(spec, reads, scratch + (4 * (CHUNK + 4 * columns) * count) as u64)
                }
                (false, false) => OutputSpec::whole(spec, reads, scratch + 4 * (elements * count) as u64),
            }
        };
        Ok(self.plan.tensors.iter().map(spec).collect())
    }

    fn settings(&self) -> serde_json::Value {
        let adapters = self.models.iter().filter_map(|m| Some(&m.adapter.as_ref()?.sha256));
        let adapters: Vec<&String> = adapters.collect();
        match adapters.is_empty() {
            true => serde_json::json!({ "config": self.text }),
            false => serde_json::json!({ "config": self.text, "adapters": adapters }),
        }
    }

    fn card(&self) -> Card {
        folder::card(self)
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        self.merge(job)
    }
}
