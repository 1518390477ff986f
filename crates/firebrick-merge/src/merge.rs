//! A merge as a transformation on the streaming executor.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, Seed, read_file, read_text};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec};
use firebrick_tensor::stream::{Job, OutputSpec, Source, StreamError, Target, Transform};

use crate::config::MergeConfig;
use crate::{GlobalParameters, MergeError, MergeMethod, ModelParameters, TensorMerge, Values, prepare};

/// Files beside the tensors that a merged folder takes over from its base.
const SIDE_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];

/// Most bytes of one of them: far above any tokenizer.
const MAX_SIDE_FILE: u64 = 256 << 20;

/// A merge whose checkpoints are open and fit together.
#[derive(Debug)]
pub struct Merge {
    config: MergeConfig,
    text: String,
    /// One per entry of `names`.
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) names: Vec<String>,
    /// Position of the base among them.
    pub(crate) base: Option<usize>,
    layers: usize,
}

impl Merge {
    /// Reads a YAML file and opens its models; relative paths are taken from the current folder.
    ///
    /// # Errors
    /// Lists every problem of the configuration, and every tensor that is missing, of another shape or without a weight in some model.
    pub fn open(path: &Path) -> Result<Self, MergeError> {
        let text =
            read_text(path, MAX_SETTINGS).map_err(|source| MergeError::Io { path: path.into(), source })?;
        let config = MergeConfig::parse(&text)
            .map_err(|problems| MergeError::Config { path: path.into(), problems })?;
        let mut names: Vec<String> = config.models.iter().map(|m| m.model.clone()).collect();
        let base = config.base_model.as_ref().map(|base| {
            names.iter().position(|n| n == base).unwrap_or_else(|| {
                names.push(base.clone());
                names.len() - 1
            })
        });
        let checkpoints = names.iter().map(Checkpoint::open).collect::<Result<Vec<_>, _>>()?;
        let first = checkpoints[base.unwrap_or(0)].tensors();
        let layers = first.iter().filter_map(|t| layer_of(&t.name)).max().map_or(0, |l| l as usize + 1);
        let merge = Merge { config, text, checkpoints, names, base, layers };
        merge.check(path)?;
        Ok(merge)
    }

    /// The folder `path`, with the configuration and tokenizer of the base (or of the first model): from its folder, or from beside
    /// its file.
    ///
    /// # Errors
    /// If one of these files is there but cannot be read.
    pub fn target(&self, path: &Path) -> Result<Target, MergeError> {
        let model = Path::new(&self.names[self.base.unwrap_or(0)]);
        let from = if model.is_dir() { model } else { model.parent().unwrap_or(model) };
        let mut files = vec![("mergekit_config.yml".to_string(), self.text.clone().into_bytes())];
        for name in SIDE_FILES {
            let file = from.join(name);
            match read_file(&file, MAX_SIDE_FILE) {
                Ok(bytes) if *name == "config.json" => files.push((name.to_string(), self.retyped(bytes))),
                Ok(bytes) => files.push((name.to_string(), bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(MergeError::Io { path: file, source }),
            }
        }
        Ok(Target::Folder { path: path.into(), stem: "model".into(), side_files: files })
    }

    /// `config.json` with the type of the output.
    fn retyped(&self, bytes: Vec<u8>) -> Vec<u8> {
        let name = match self.config.out_dtype.or(self.config.dtype) {
            Some(DType::F32) => "float32",
            Some(DType::F16) => "float16",
            Some(DType::BF16) => "bfloat16",
            _ => return bytes,
        };
        let Ok(mut json) = serde_json::from_slice::<serde_json::Value>(&bytes) else { return bytes };
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = json.get_mut(key) {
                *value = name.into();
            }
        }
        serde_json::to_vec_pretty(&json).unwrap_or(bytes)
    }

    fn check(&self, path: &Path) -> Result<(), MergeError> {
        let mut problems = Vec::new();
        let first = &self.checkpoints[self.base.unwrap_or(0)];
        for (other, name) in self.checkpoints.iter().zip(&self.names) {
            for info in first.tensors() {
                match other.get(&info.name) {
                    None => problems.push(format!("`{}` is missing from {name}", info.name)),
                    Some(o) if o.shape != info.shape => problems.push(format!(
                        "`{}` has shape {:?} in {name} and {:?} in {}",
                        info.name,
                        o.shape,
                        info.shape,
                        self.names[self.base.unwrap_or(0)]
                    )),
                    Some(o) if !o.dtype.is_float() => problems
                        .push(format!("`{}` of {name} holds {}, which cannot be merged", info.name, o.dtype)),
                    Some(_) => {}
                }
            }
            let extra = other.tensors().iter().filter(|t| first.get(&t.name).is_none());
            problems.extend(
                extra.map(|t| format!("`{}` of {name} would be lost: the base has no such tensor", t.name)),
            );
        }
        for info in first.tensors() {
            match self.parameters(&info.name) {
                Err(problem) => problems.push(format!("`{}`: {problem}", info.name)),
                Ok((own, global)) if self.config.method == MergeMethod::Linear && global.normalize => {
                    if own.iter().map(|p| p.weight).sum::<f64>() == 0.0 {
                        problems.push(format!("the weights of `{}` add up to 0", info.name));
                    }
                }
                Ok(_) => {}
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(MergeError::Mismatch { path: path.into(), problems }) }
    }

    /// The models that take part, in their order; a base that is not listed is one for the methods that know a base.
    fn merged(&self) -> Vec<usize> {
        let beside = self.config.method == MergeMethod::Linear;
        (0..self.names.len()).filter(|i| !beside || *i < self.config.models.len()).collect()
    }

    /// The base among them.
    fn base_of(&self, merged: &[usize]) -> Option<usize> {
        merged.iter().position(|i| Some(*i) == self.base)
    }

    /// What holds for each of [`merged`](Self::merged), and for all, at a tensor.
    fn parameters(&self, tensor: &str) -> Result<(Vec<ModelParameters>, GlobalParameters), String> {
        let (method, depth) = (self.config.method, self.depth(tensor));
        let all = |name: &str| self.config.parameters.get(name).and_then(|v| v.at(tensor, depth));
        let mut problems = Vec::new();
        let mut own = Vec::new();
        for i in self.merged() {
            let entry = self.config.models.get(i).map(|m| &m.parameters);
            let value = |name: &str| {
                let given = entry.and_then(|e| e.get(name)).and_then(|v| v.at(tensor, depth));
                given.or_else(|| all(name))
            };
            let is_base = Some(i) == self.base && method != MergeMethod::Linear;
            match ModelParameters::new(method, |name| value(name).or(is_base.then_some(0.0))) {
                Ok(parameters) => own.push(parameters),
                Err(problem) => {
                    problems.push(format!("{} of {}: no filter matches it", problem, self.names[i]))
                }
            }
        }
        match (GlobalParameters::new(method, all), problems.is_empty()) {
            (Ok(global), true) => Ok((own, global)),
            (Err(problem), _) => Err(problems.into_iter().chain([problem]).collect::<Vec<_>>().join("; ")),
            (_, false) => Err(problems.join("; ")),
        }
    }

    /// 0 at the first layer, 1 at the last; 0 for tensors outside the layers.
    fn depth(&self, tensor: &str) -> f64 {
        match layer_of(tensor) {
            Some(_) if self.layers <= 1 => 1.0,
            Some(layer) => f64::from(layer) / (self.layers - 1) as f64,
            None => 0.0,
        }
    }
}

/// The first number that is a whole part of a dotted name; a larger one than any layer's counts as none.
fn layer_of(tensor: &str) -> Option<u32> {
    let digits = |part: &&str| part.bytes().all(|b| b.is_ascii_digit());
    tensor.split('.').filter(digits).find_map(|part| part.parse().ok())
}

impl Transform for Merge {
    fn name(&self) -> &str {
        self.config.method.label()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let pairs = self.names.iter().zip(&self.checkpoints);
        pairs.map(|(name, checkpoint)| Source { name: name.clone(), checkpoint }).collect()
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let first = &self.checkpoints[self.base.unwrap_or(0)];
        let spec = |info: &firebrick_tensor::checkpoint::TensorInfo| {
            let dtype = self.config.out_dtype.or(self.config.dtype).unwrap_or(info.dtype);
            let merged = self.merged();
            let reads = merged.iter().map(|i| (*i, info.name.clone())).collect();
            let scratch = self.config.method.scratch_bytes(info.elements(), merged.len());
            let spec = TensorSpec::new(info.name.clone(), dtype, info.shape.clone());
            if self.config.method.elementwise() {
                OutputSpec::elementwise(spec, reads)
            } else {
                OutputSpec::whole(spec, reads, scratch)
            }
        };
        Ok(first.tensors().iter().map(spec).collect())
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::json!({ "config": self.text })
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let (method, spec) = (self.config.method, job.spec());
        let merged = self.merged();
        let (per_model, global) = self.parameters(&spec.tensor.name).map_err(StreamError::transform)?;
        let base = self.base_of(&merged);
        // Inputs in another type than `dtype` are rounded to it first, as mergekit loads them.
        let load = self.config.dtype;
        let values = job.inputs().iter().map(|i| {
            let values = Values::encoded(i.info.dtype, i.bytes, i.info.elements())?;
            Ok(load.map_or(values, |dtype| values.rounded_to(dtype)))
        });
        let inputs = values.collect::<Result<Vec<_>, String>>().map_err(StreamError::transform)?;
        let tensor = TensorMerge {
            inputs: &inputs,
            base,
            shape: &spec.tensor.shape,
            per_model: &per_model,
            global: &global,
            seed: Seed(self.config.seed).derive(&spec.tensor.name),
            numerics: self.config.numerics,
            dtype: load.unwrap_or(job.input(base.unwrap_or(0))?.info.dtype),
            masks: None,
        };
        let merge = prepare(method, &tensor).map_err(StreamError::transform)?;
        let (range, write) = (job.range(), |values: &[f32]| job.write_f32(values));
        merge.run(&inputs, range, write, StreamError::transform)
    }
}
