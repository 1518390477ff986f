//! Writing models: Hugging Face folders and GGUF files, from checkpoints or from weights on a device.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use firebrick_core::{Site, SiteTable};
use firebrick_tensor::block::{DType, encode_weighted};
use firebrick_tensor::checkpoint::gguf::Value;
use firebrick_tensor::checkpoint::{Format, TensorSpec, is_gguf_name};
use firebrick_tensor::imatrix::ImportanceMatrix;
use firebrick_tensor::stream::{
    Executor, Job, OutputSpec, Source, StreamError, StreamPlan, StreamReport, Target, Transform,
};
use indexmap::IndexMap;

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::model::{ModelFiles, ROPE_DIVISORS};
use crate::tokenizer::Tokenizer;
use crate::weights::{GgufForm, TensorSource, interleaved_row, permute_rows, weight_shape};

/// A weight that is already encoded, row-major in Hugging Face's order of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedWeight {
    /// Storage type.
    pub dtype: DType,
    /// The bytes of all rows.
    pub bytes: Vec<u8>,
}

/// Where the weights of an export come from.
#[derive(Clone, Copy)]
enum Weights<'a> {
    Files(&'a ModelFiles),
    Decoder(&'a Decoder),
}

/// A model about to be written, as a transformation on the streaming executor.
///
/// Norms stay f32 in GGUF. With a packed type the embedding and head become `Q8_0`, or `Q6_K` with a type of super-blocks. Where the
/// blocks of a type do not divide the rows, another stands in: see [`Export::fallbacks`].
/// An output that ends in `.gguf` is a GGUF file, anything else a Hugging Face folder.
pub struct Export<'a> {
    name: String,
    weights: Weights<'a>,
    config: DecoderConfig,
    sites: SiteTable,
    tokenizer: &'a Tokenizer,
    dtype: DType,
    format: Format,
    encoded: BTreeMap<Site, EncodedWeight>,
    /// Layer `i` of the output is layer `layers[i]` of the source.
    layers: Vec<usize>,
    /// Weights of the errors in each column, by site of the source.
    importance: BTreeMap<Site, Vec<f32>>,
    settings: serde_json::Value,
    /// Hash of the weights that no source file of the executor holds.
    content: Option<String>,
}

/// The storage types a model can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportType(DType);

impl ExportType {
    /// Every type, by name.
    pub const NAMES: &'static str =
        "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs";
    /// Single precision.
    pub const F32: ExportType = ExportType(DType::F32);
    /// Half precision.
    pub const F16: ExportType = ExportType(DType::F16);
    /// Brain floating point.
    pub const BF16: ExportType = ExportType(DType::BF16);
    /// 8-bit blocks.
    pub const Q8_0: ExportType = ExportType(DType::Q8_0);

    /// The storage type.
    pub fn dtype(self) -> DType {
        self.0
    }
}

impl FromStr for ExportType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = text.parse::<DType>().ok().filter(|d| d.is_real() && *d != DType::F64);
        found.map(ExportType).ok_or_else(|| format!("`{text}` is not one of {}", Self::NAMES))
    }
}

impl<'a> Export<'a> {
    /// Writes a model that lies on disk, tensor by tensor.
    pub fn files(files: &'a ModelFiles, dtype: ExportType) -> Self {
        Self::new(&files.name, Weights::Files(files), files.config.clone(), &files.tokenizer, dtype)
    }

    /// Writes the weights of a decoder.
    pub fn decoder(name: &str, decoder: &'a Decoder, tokenizer: &'a Tokenizer, dtype: ExportType) -> Self {
        Self::new(name, Weights::Decoder(decoder), decoder.config().clone(), tokenizer, dtype)
    }

    fn new(
        name: &str,
        weights: Weights<'a>,
        config: DecoderConfig,
        tokenizer: &'a Tokenizer,
        dtype: ExportType,
    ) -> Self {
        let sites = config.family().site_table(&config);
        let layers = (0..config.layers).collect();
        Export {
            name: name.to_string(),
            weights,
            config,
            sites,
            tokenizer,
            dtype: dtype.0,
            format: Format::Safetensors,
            encoded: BTreeMap::new(),
            layers,
            importance: BTreeMap::new(),
            settings: serde_json::Value::Null,
            content: None,
        }
    }

    /// Takes these weights instead of the source's, by site of the source; in GGUF as they are, in a folder they must not be packed.
    pub fn with_encoded(mut self, encoded: BTreeMap<Site, EncodedWeight>) -> Self {
        self.encoded = encoded;
        self
    }

    /// Weighs the errors of packed types by the mean squares of the inputs in `matrix` (see [`encode_weighted`]); weights that it does
    /// not name are rounded as without it.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] if it names no weight of this model.
    pub fn with_imatrix(mut self, matrix: &ImportanceMatrix) -> Result<Self, ModelError> {
        let family = self.config.family();
        let named = |site: Site| matrix.entries.get(&family.gguf_name(site)?)?.means(0);
        let sites = self.weights().into_iter().map(|(site, _)| self.source_site(site));
        self.importance = sites.filter_map(|site| Some((site, named(site)?))).collect();
        if self.importance.is_empty() {
            let what = format!("an importance matrix that names no weight of {}", self.name);
            return Err(ModelError::Unsupported(what));
        }
        Ok(self)
    }

    /// Writes only these layers of the source, in this order; a layer may appear more than once.
    ///
    /// # Panics
    /// In [`Export::plan`] and [`Export::write`], if there is no such layer.
    pub fn with_layers(mut self, layers: Vec<usize>) -> Self {
        self.config = self.config.with_layers(&layers);
        self.sites = self.config.family().site_table(&self.config);
        self.layers = layers;
        self
    }

    /// Records how the weights were made, for provenance and resume.
    pub fn with_settings(mut self, settings: serde_json::Value) -> Self {
        self.settings = settings;
        self
    }

    /// The weights whose rows the blocks of the type do not divide, and the types they become in its place: as in llama.cpp, `Q5_0`
    /// for `Q4_K`, `Q5_1` for `Q5_K`, `Q8_0` for `Q6_K`, `IQ4_NL` for `Q2_K`, `Q3_K` and `IQ4_XS`, and `F16` where 32 does not divide
    /// the rows either.
    pub fn fallbacks(&self) -> Vec<(Site, DType)> {
        let weights = self.weights().into_iter().filter(|(site, shape)| {
            self.dtype.is_packed() && shape.len() == 2 && !self.encoded.contains_key(&self.source_site(*site))
        });
        let found = weights.map(|(site, shape)| (site, fitting(self.wanted(site), shape[1])));
        found.filter(|(site, dtype)| *dtype != self.wanted(*site)).collect()
    }

    /// What [`Export::write`] would read, write and need.
    ///
    /// # Errors
    /// As [`Export::write`], but for what only the writing itself finds.
    pub fn plan(mut self, path: &Path, executor: &Executor<'_>) -> Result<StreamPlan, ModelError> {
        let target = self.target(path)?;
        Ok(executor.plan(&self, &target)?)
    }

    /// Fails where [`Export::write`] would fail before it computes anything; reads no weights and writes nothing.
    ///
    /// # Errors
    /// As [`Export::write`], but for what only the writing itself finds.
    pub fn check(mut self, path: &Path, executor: &Executor<'_>) -> Result<(), ModelError> {
        let target = self.target(path)?;
        Ok(executor.check(&self, &target)?)
    }

    /// Writes the model to `path`. Weights that are not read from files are hashed first, so that an interrupted export
    /// of other weights is not taken up.
    ///
    /// # Errors
    /// If a packed type is asked for in a folder, a weight is missing, the tokenizer has no equal in the format, or
    /// reading or writing fails.
    pub fn write(mut self, path: &Path, executor: &Executor<'_>) -> Result<StreamReport, ModelError> {
        let target = self.target(path)?;
        self.content = self.hash_content()?;
        Ok(executor.run(&self, &target)?)
    }

    fn target(&mut self, path: &Path) -> Result<Target, ModelError> {
        if is_gguf_name(path) {
            self.format = Format::Gguf;
            let problems = self.config.gguf_problems();
            if !problems.is_empty() {
                return Err(ModelError::Unsupported(problems.join("; ")));
            }
            return Ok(Target::Gguf { path: path.into(), metadata: self.gguf_metadata()? });
        }
        self.format = Format::Safetensors;
        if self.dtype.is_packed() {
            return Err(ModelError::Unsupported(format!(
                "{} in a Hugging Face folder; packed types need an output that ends in .gguf",
                self.dtype
            )));
        }
        Ok(Target::Folder { path: path.into(), stem: "model".into(), side_files: self.side_files()? })
    }

    /// BLAKE3 of the weights that come from a decoder or are encoded already; none where there are none.
    fn hash_content(&self) -> Result<Option<String>, ModelError> {
        if self.encoded.is_empty() && matches!(self.weights, Weights::Files(_)) {
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        for (site, shape) in self.weights() {
            let from = self.source_site(site);
            if let Some(encoded) = self.encoded.get(&from) {
                hasher.update(&encoded.bytes);
            } else if let Weights::Decoder(decoder) = self.weights {
                for chunk in decoder.read_site(from, &shape)?.chunks(1 << 14) {
                    hasher.update(&chunk.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
                }
            }
        }
        Ok(Some(hasher.finalize().to_hex().to_string()))
    }

    /// `config.json` and the tokenizer's files.
    fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let dtype = match self.dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let mut config = self.config.to_hf(dtype);
        self.tokenizer.put_ids(&mut config);
        let pretty = |v: &serde_json::Value| {
            let mut text = serde_json::to_string_pretty(v).expect("a map of plain values");
            text.push('\n');
            text.into_bytes()
        };
        let mut files = vec![("config.json".to_string(), pretty(&config))];
        files.extend(self.tokenizer.files()?);
        Ok(files)
    }

    fn gguf_metadata(&self) -> Result<IndexMap<String, Value>, ModelError> {
        let mut map = self.config.to_gguf(&self.name);
        map.extend(self.tokenizer.gguf_metadata_padded(self.config.vocab)?);
        // A GGUF source keeps its own keys and their order; what the export says replaces what the source said.
        if let Weights::Files(files) = self.weights
            && let Some(source) = files.checkpoint.gguf()
        {
            let mut kept = source.metadata.clone();
            kept.retain(|key, _| !key.starts_with("tokenizer.") || map.contains_key(key));
            // The last follows from the number of layers where a file is silent.
            let by_layer = ["block_count", "attention.sliding_window_pattern", "attention.scale"]
                .map(|key| format!("{}.{key}", self.config.family().gguf));
            let ours = |key: &str| {
                key.starts_with("tokenizer.") || key == "general.name" || by_layer.iter().any(|k| k == key)
            };
            kept.extend(map.into_iter().filter(|(key, _)| ours(key)));
            map = kept;
        }
        let file_type = match self.dtype {
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q8_0 => 7,
            DType::Q5_0 => 8,
            DType::Q5_1 => 9,
            DType::Q2K => 10,
            DType::Q3K => 11,
            DType::Q4K => 14,
            DType::Q5K => 16,
            DType::Q6K => 18,
            DType::Iq4Nl => 25,
            DType::Iq4Xs => 30,
            DType::BF16 => 32,
            _ => 0,
        };
        map.insert("general.file_type".into(), Value::U32(file_type));
        map.insert("general.quantization_version".into(), Value::U32(2));
        Ok(map)
    }

    /// The site of the source behind a site of the output.
    fn source_site(&self, site: Site) -> Site {
        Site { layer: site.layer.map(|l| self.layers[l]), ..site }
    }

    fn output_name(&self, site: Site) -> String {
        let family = self.config.family();
        let name = if self.format == Format::Gguf { family.gguf_name(site) } else { family.hf_name(site) };
        name.expect("the family names every weight of its table")
    }

    /// The packed type of a matrix at `site` if its blocks divide the rows.
    fn wanted(&self, site: Site) -> DType {
        match site.layer {
            Some(_) => self.dtype,
            None if self.dtype.block_len() > DType::Q8_0.block_len() => DType::Q6K,
            None => DType::Q8_0,
        }
    }

    /// The weights of the columns of `from`, if they have a say in how it becomes `dtype`.
    fn importance_of(&self, from: Site, dtype: DType) -> Option<&[f32]> {
        let importance = self.importance.get(&from).filter(|_| dtype.is_packed())?;
        let stored = match self.weights {
            Weights::Files(files) => files.tensor_name(from).and_then(|n| files.checkpoint.get(&n)),
            Weights::Decoder(_) => None,
        };
        // What is packed so already is copied.
        (stored.map(|t| t.dtype) != Some(dtype)).then_some(importance)
    }

    fn output_dtype(&self, site: Site, shape: &[usize]) -> DType {
        if let Some(encoded) = self.encoded.get(&self.source_site(site)) {
            return encoded.dtype;
        }
        let gguf = self.format == Format::Gguf;
        match shape {
            [_] if gguf => DType::F32,
            [_, columns] if self.dtype.is_packed() => fitting(self.wanted(site), *columns),
            _ => self.dtype,
        }
    }

    /// The weights to write: site of the output and shape, in Hugging Face's layout.
    fn weights(&self) -> Vec<(Site, Vec<usize>)> {
        let entries = self.sites.entries().iter();
        entries.filter_map(|e| Some((e.site, weight_shape(&self.sites, e.site)?))).collect()
    }
}

impl Transform for Export<'_> {
    fn name(&self) -> &str {
        "export"
    }

    fn sources(&self) -> Vec<Source<'_>> {
        match self.weights {
            Weights::Files(files) => {
                vec![Source { name: files.name.clone(), checkpoint: &files.checkpoint }]
            }
            Weights::Decoder(_) => Vec::new(),
        }
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let mut problems = Vec::new();
        let mut outputs = Vec::new();
        for (site, shape) in self.weights() {
            let from = self.source_site(site);
            let dtype = self.output_dtype(site, &shape);
            let elements: usize = shape.iter().product();
            let importance = self.importance_of(from, dtype);
            if let Some(columns) = importance.map(<[f32]>::len).filter(|n| shape.last() != Some(n)) {
                problems
                    .push(format!("the importance of `{from}` is {columns} numbers for inputs of {shape:?}"));
            }
            let tensor = TensorSpec::new(self.output_name(site), dtype, shape);
            let reads = match self.weights {
                Weights::Files(files) if !self.encoded.contains_key(&from) => {
                    match files.tensor_name(from).filter(|n| files.checkpoint.get(n).is_some()) {
                        Some(name) => {
                            if let Err(e) = files.weights().check_site(from, &tensor.shape) {
                                problems.push(format!("{}: {e}", files.checkpoint.path().display()));
                            }
                            vec![(0, name)]
                        }
                        None => {
                            problems.push(format!("the weight of `{from}` is missing from {}", files.name));
                            continue;
                        }
                    }
                }
                _ => Vec::new(),
            };
            let whole = self.reforms(site) || importance.is_some();
            let spec = if !reads.is_empty() && !whole {
                OutputSpec::elementwise(tensor, reads)
            } else {
                OutputSpec::whole(tensor, reads, elements as u64 * 8)
            };
            outputs.push(spec);
        }
        if let Some(divisors) = self.rope_divisors() {
            let tensor = TensorSpec::new(ROPE_DIVISORS, DType::F32, [divisors.len()]);
            outputs.push(OutputSpec::whole(tensor, Vec::new(), 0));
        }
        if problems.is_empty() {
            Ok(outputs)
        } else {
            Err(StreamError::Plan { transform: self.name().into(), problems })
        }
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::json!({
            "type": self.dtype.name(),
            // Divisors of rotary angles and the order of rows follow from it.
            "config": serde_json::to_vec(&self.config).ok().map(|c| blake3::hash(&c).to_hex().to_string()),
            "layers": self.layers,
            "encoded": self.encoded.iter().map(|(s, e)| (s.to_string(), e.dtype.name())).collect::<Vec<_>>(),
            "content": self.content,
            "importance": self.importance_digest(),
            "how": self.settings,
        })
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let mut weights = self.weights();
        if job.index() == weights.len() {
            return job.write_f32(&self.rope_divisors().expect("it is an output"));
        }
        let (site, shape) = weights.swap_remove(job.index());
        let from = self.source_site(site);
        let form = GgufForm::of(&self.config, &self.sites, site);
        let to_gguf = self.format == Format::Gguf;
        if let Some(encoded) = self.encoded.get(&from) {
            return match form {
                GgufForm::Interleaved { heads } if to_gguf => {
                    let width = encoded.bytes.len() / shape[0];
                    let order = interleaved_row(shape[0], heads);
                    job.write_bytes(&permute_rows(&encoded.bytes, width, shape[0], order))
                }
                _ => job.write_bytes(&encoded.bytes),
            };
        }
        let dtype = job.spec().tensor.dtype;
        let importance = self.importance_of(from, dtype);
        let values = match self.weights {
            Weights::Files(_) if !self.reforms(site) => match importance {
                Some(_) => job.read_f32(0)?.into_owned(),
                None => return job.copy(),
            },
            Weights::Files(files) => {
                let values = job.read_f32(0)?.into_owned();
                // Exactly one side has GGUF's form, or `reforms` would be false.
                match files.checkpoint.format() {
                    Format::Gguf => form.undo(values, shape[0]),
                    _ => form.make(values, shape[0]),
                }
            }
            Weights::Decoder(decoder) => {
                let values = decoder.read_site(from, &shape).map_err(StreamError::transform)?;
                if to_gguf { form.make(values, shape[0]) } else { values }
            }
        };
        let Some(importance) = importance else { return job.write_f32(&values) };
        let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap_or(0)];
        encode_weighted(dtype, &values, importance, &mut bytes).map_err(StreamError::transform)?;
        job.write_bytes(&bytes)
    }
}

/// The type, or the one that stands in for it where its blocks do not divide rows of `columns`.
fn fitting(dtype: DType, columns: usize) -> DType {
    let in_short_blocks = match dtype {
        DType::Q2K | DType::Q3K | DType::Iq4Xs => DType::Iq4Nl,
        DType::Q4K => DType::Q5_0,
        DType::Q5K => DType::Q5_1,
        DType::Q6K => DType::Q8_0,
        other => other,
    };
    let divides = |d: &DType| columns.is_multiple_of(d.block_len());
    [dtype, in_short_blocks].into_iter().find(divides).unwrap_or(DType::F16)
}

impl Export<'_> {
    /// BLAKE3 of the importances, if there are any.
    fn importance_digest(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        for (site, values) in &self.importance {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hasher.update(format!("{site} {}\n", values.len()).as_bytes()).update(&bytes);
        }
        (!self.importance.is_empty()).then(|| hasher.finalize().to_hex().to_string())
    }

    /// Whether this weight of the output changes its form on the way from the source's file.
    fn reforms(&self, site: Site) -> bool {
        match self.weights {
            Weights::Files(files) => {
                let same = GgufForm::of(&self.config, &self.sites, site) == GgufForm::Same;
                let gguf = [files.checkpoint.format(), self.format].map(|f| f == Format::Gguf);
                !same && gguf[0] != gguf[1]
            }
            Weights::Decoder(_) => false,
        }
    }

    /// The values of [`ROPE_DIVISORS`], if the output has it.
    fn rope_divisors(&self) -> Option<Vec<f32>> {
        if self.format == Format::Gguf { self.config.rope_divisors() } else { None }
    }
}
