//! A merge as a transformation on the streaming executor.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, read_file, read_text};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec};
use firebrick_tensor::stream::{Job, OutputSpec, Source, StreamError, Target, Transform};
use half::{bf16, f16};

use crate::config::{MergeConfig, MergeMethod, Numerics, Value};
use crate::{MergeError, linear, task_arithmetic};

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
        for i in self.weighed() {
            let without = first.tensors().iter().filter(|t| self.weight(i, &t.name).is_none());
            problems.extend(
                without.map(|t| {
                    format!("`{}` of {} has no weight: no filter matches it", t.name, self.names[i])
                }),
            );
        }
        for info in first.tensors() {
            if self.config.method == MergeMethod::Linear && self.normalize(&info.name) {
                let total: f32 = self.weights(&info.name).iter().sum();
                if total == 0.0 {
                    problems.push(format!("the weights of `{}` add up to 0", info.name));
                }
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(MergeError::Mismatch { path: path.into(), problems }) }
    }

    /// The models that are weighed: all for `linear`, all but the base for task vectors.
    fn weighed(&self) -> Vec<usize> {
        let count = self.config.models.len();
        let skip = (self.config.method == MergeMethod::TaskArithmetic).then_some(self.base).flatten();
        (0..count).filter(|i| Some(*i) != skip).collect()
    }

    fn weights(&self, tensor: &str) -> Vec<f32> {
        // `open` made sure that there is one.
        self.weighed().into_iter().map(|i| self.weight(i, tensor).unwrap_or(0.0) as f32).collect()
    }

    /// The weight of model `i` at a tensor; `None` if no filter matches.
    fn weight(&self, i: usize, tensor: &str) -> Option<f64> {
        let own = &self.config.models[i].weight;
        self.value(own, tensor).or_else(|| self.value(&self.config.weight, tensor))
    }

    fn normalize(&self, tensor: &str) -> bool {
        let default = self.config.method == MergeMethod::Linear;
        self.value(&self.config.normalize, tensor).map_or(default, |v| v != 0.0)
    }

    fn value(&self, value: &Option<Value>, tensor: &str) -> Option<f64> {
        value.as_ref().and_then(|v| v.at(tensor, self.depth(tensor)))
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

/// Rounding to the type in which mergekit would hold an intermediate result.
fn rounding(dtype: DType) -> fn(f32) -> f32 {
    match dtype {
        DType::BF16 => |v| bf16::from_f32(v).to_f32(),
        DType::F16 => |v| f16::from_f32(v).to_f32(),
        _ => |v| v,
    }
}

impl Transform for Merge {
    fn name(&self) -> &str {
        match self.config.method {
            MergeMethod::Linear => "merge linear",
            MergeMethod::TaskArithmetic => "merge task_arithmetic",
        }
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let pairs = self.names.iter().zip(&self.checkpoints);
        pairs.map(|(name, checkpoint)| Source { name: name.clone(), checkpoint }).collect()
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let first = &self.checkpoints[self.base.unwrap_or(0)];
        let spec = |info: &firebrick_tensor::checkpoint::TensorInfo| {
            let dtype = self.config.out_dtype.or(self.config.dtype).unwrap_or(info.dtype);
            let base = (self.config.method == MergeMethod::TaskArithmetic).then_some(self.base).flatten();
            let reads = base.into_iter().chain(self.weighed()).map(|i| (i, info.name.clone())).collect();
            OutputSpec::elementwise(TensorSpec::new(info.name.clone(), dtype, info.shape.clone()), reads)
        };
        Ok(first.tensors().iter().map(spec).collect())
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::json!({ "config": self.text })
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let name = job.spec().tensor.name.clone();
        let stored = job.input(0)?.info.dtype;
        let load = rounding(self.config.dtype.unwrap_or(stored));
        let round = match self.config.numerics {
            Numerics::Mergekit => load,
            Numerics::F32 => |v| v,
        };
        let mut weights = self.weights(&name);
        if self.config.method == MergeMethod::TaskArithmetic {
            weights.iter_mut().for_each(|w| *w = round(*w));
        }
        let normalize = self.normalize(&name);
        let lambda = self.value(&self.config.lambda, &name).unwrap_or(1.0) as f32;
        // Inputs in another type than `dtype` are rounded to it first, as mergekit loads them.
        let cast = self.config.dtype.is_some_and(|d| job.inputs().iter().any(|i| i.info.dtype != d));
        job.elementwise(|_, inputs, out| {
            let rounded: Vec<Vec<f32>>;
            let mut views = inputs.to_vec();
            if cast {
                rounded = inputs.iter().map(|x| x.iter().map(|v| load(*v)).collect()).collect();
                views = rounded.iter().map(|v| &v[..]).collect();
            }
            match self.config.method {
                // mergekit's linear sums in f32 and rounds once; its task vectors are in the type of the models.
                MergeMethod::Linear => {
                    linear(&views, &weights, normalize, out, self.config.numerics, round);
                }
                MergeMethod::TaskArithmetic => {
                    task_arithmetic(&views, &weights, normalize, lambda, out, round)
                }
            }
        })
    }
}
