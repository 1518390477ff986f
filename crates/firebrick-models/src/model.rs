//! A model on disk, and a model on a device.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_core::{Part, Site, SiteTable};
use firebrick_tensor::checkpoint::{Checkpoint, Format};
use firebrick_tensor::ops::{PackedMatrix, Precision};

use crate::config::{DecoderConfig, GgufTensors};
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use crate::weights::{CheckpointWeights, TensorSource, weight_shape};

/// The model trained by this project and built into this crate; see `docs/guide/start.md`.
static EMBEDDED: &[u8] = include_bytes!("../data/embedded.gguf");

/// The embedding's name in GGUF.
const EMBEDDING: &str = "token_embd.weight";

/// What GGUF divides rotary frequencies by, in Llama 3's scaling.
pub(crate) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// A model as it lies on disk: checkpoint, configuration and tokenizer, nothing on a device.
#[derive(Debug)]
pub struct ModelFiles {
    /// What to call it in reports and file names.
    pub name: String,
    /// The tensors.
    pub checkpoint: Checkpoint,
    /// The shape.
    pub config: DecoderConfig,
    /// The tokenizer, with its chat template.
    pub tokenizer: Tokenizer,
    sites: SiteTable,
}

/// A model on a device, ready to run.
#[derive(Debug)]
pub struct Model {
    /// What to call it in reports and file names.
    pub name: String,
    /// The wiring with its weights, as constants.
    pub decoder: Decoder,
    /// The tokenizer, with its chat template.
    pub tokenizer: Tokenizer,
}

impl ModelFiles {
    /// Opens a Hugging Face folder (`config.json`, `tokenizer.json`, safetensors) or a GGUF file.
    ///
    /// # Errors
    /// If a file is missing, damaged, or describes an architecture that is not supported; if the checkpoint has a tensor
    /// that the architecture has no place for, or the tokenizer more ids than the embedding has rows.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::read(path)?.checked()
    }

    /// Opens a model like [`ModelFiles::open`], whatever is wrong with its tensors: [`ModelFiles::problems`] lists that.
    ///
    /// # Errors
    /// If a file is missing, damaged, or describes an architecture that is not supported.
    pub fn open_unchecked(path: &Path) -> Result<Self, ModelError> {
        Self::read(path)
    }

    /// Everything that keeps the model from being loaded: tensors that are missing, have no place in the architecture, or have another
    /// shape than the configuration asks for, and more token ids than the embedding has rows.
    ///
    /// # Errors
    /// If the checkpoint can't be read.
    pub fn problems(&self) -> Result<Vec<String>, ModelError> {
        let mut problems = self.strangers()?;
        let weights = self.weights();
        let sites = self.sites.entries().iter().map(|e| e.site);
        let shapes = sites.filter_map(|site| Some((site, weight_shape(&self.sites, site)?)));
        let wrong = shapes.filter_map(|(site, shape)| weights.check_site(site, &shape).err());
        problems.extend(wrong.map(|e| e.to_string()));
        Ok(problems)
    }

    fn read(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            let config = DecoderConfig::from_hf_file(&path.join("config.json"))?;
            let tokenizer = Tokenizer::from_folder(path)?;
            let name = path.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
            return Ok(Self::new(name, Checkpoint::open(path)?, config, tokenizer));
        }
        let checkpoint = Checkpoint::open(path)?;
        if checkpoint.format() != Format::Gguf {
            return Err(ModelError::Unsupported(format!(
                "{}: a single .safetensors file says nothing about its architecture; give the folder with config.json",
                path.display()
            )));
        }
        Self::from_gguf(checkpoint, path)
    }

    /// The model built into this crate.
    ///
    /// # Errors
    /// If the bytes in this crate are damaged.
    pub fn embedded() -> Result<Self, ModelError> {
        let path = PathBuf::from("embedded.gguf");
        let mut files = Self::from_gguf(Checkpoint::from_static(EMBEDDED, &path)?, &path)?.checked()?;
        files.name = "embedded".into();
        Ok(files)
    }

    fn from_gguf(checkpoint: Checkpoint, path: &Path) -> Result<Self, ModelError> {
        let gguf = checkpoint.gguf().expect("the format was checked");
        let missing = || ModelError::MissingTensor { name: EMBEDDING.into(), path: path.into() };
        let [vocab, _] = checkpoint.get(EMBEDDING).ok_or_else(missing)?.shape[..] else {
            let problems = vec![format!("tensor `{EMBEDDING}` is not a matrix")];
            return Err(ModelError::Invalid { path: path.into(), problems });
        };
        let has = |name: &str| checkpoint.get(name).is_some();
        let rope_divisors = has(ROPE_DIVISORS).then(|| checkpoint.read_f32(ROPE_DIVISORS)).transpose()?;
        let config = DecoderConfig::from_gguf(gguf, &GgufTensors { vocab, has: &has, rope_divisors }, path)?;
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        let stem = path.file_stem().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        let name = gguf.str("general.name").map_or(stem, String::from);
        Ok(Self::new(name, checkpoint, config, tokenizer))
    }

    fn new(name: String, checkpoint: Checkpoint, config: DecoderConfig, tokenizer: Tokenizer) -> Self {
        let sites = config.family().site_table(&config);
        ModelFiles { name, checkpoint, config, tokenizer, sites }
    }

    fn checked(self) -> Result<Self, ModelError> {
        let problems = self.strangers()?;
        match problems.is_empty() {
            true => Ok(self),
            false => Err(ModelError::Invalid { path: self.checkpoint.path().into(), problems }),
        }
    }

    /// Tensors and token ids that the architecture has no place for.
    fn strangers(&self) -> Result<Vec<String>, ModelError> {
        let mut problems = self.unclaimed()?;
        let (ids, rows) = (self.tokenizer.vocab_size(), self.config.vocab);
        if ids > rows {
            problems.push(format!("the tokenizer has ids up to {}, the embedding has {rows} rows", ids - 1));
        }
        Ok(problems)
    }

    /// Tensors that no site takes: a model that has them computes something else than the wiring does.
    fn unclaimed(&self) -> Result<Vec<String>, ModelError> {
        let entries = self.sites.entries().iter().filter(|e| e.tensor.is_some());
        let claimed: HashSet<String> = entries.filter_map(|e| self.tensor_name(e.site)).collect();
        let mut problems = Vec::new();
        for tensor in self.checkpoint.tensors().iter().filter(|t| !claimed.contains(&t.name)) {
            let name = tensor.name.as_str();
            let known = match self.checkpoint.format() {
                // The configuration was read from it.
                Format::Gguf => name == ROPE_DIVISORS,
                // Frequencies that follow from `rope_theta`, which old versions of transformers saved.
                _ => name.ends_with(".rotary_emb.inv_freq") || self.is_copied_head(name)?,
            };
            if !known {
                problems.push(format!("tensor `{name}` has no place in this architecture"));
            }
        }
        Ok(problems)
    }

    /// Whether `name` is a tied head that was saved nevertheless, equal to the embedding.
    fn is_copied_head(&self, name: &str) -> Result<bool, ModelError> {
        let of = |part| self.config.family().hf_name(Site::global(part));
        if !self.config.tied_head || of(Part::Head).as_deref() != Some(name) {
            return Ok(false);
        }
        let Some(embedding) = of(Part::Embed).filter(|e| self.checkpoint.get(e).is_some()) else {
            return Ok(false);
        };
        Ok(self.checkpoint.bytes(name)? == self.checkpoint.bytes(&embedding)?)
    }

    /// A digest of everything the model computes with, 64 hexadecimal digits: BLAKE3 of the configuration, and of every
    /// tensor in order of name with its type, shape and bytes.
    ///
    /// # Errors
    /// If the checkpoint can't be read.
    pub fn digest(&self) -> Result<String, ModelError> {
        let config = serde_json::to_vec(&self.config).map_err(|e| ModelError::Config(e.to_string()))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(config.len() as u64).to_le_bytes()).update(&config);
        let mut tensors: Vec<_> = self.checkpoint.tensors().iter().collect();
        tensors.sort_by_key(|t| &t.name);
        for tensor in tensors {
            let head = format!("{:?} {} {:?}", tensor.name, tensor.dtype, tensor.shape);
            let bytes = self.checkpoint.bytes(&tensor.name)?;
            hasher.update(&(head.len() as u64).to_le_bytes()).update(head.as_bytes()).update(bytes);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The sites of the model.
    pub fn sites(&self) -> &SiteTable {
        &self.sites
    }

    /// The weights by site.
    pub fn weights(&self) -> CheckpointWeights<'_> {
        CheckpointWeights { checkpoint: &self.checkpoint, config: &self.config, sites: &self.sites }
    }

    /// The tensor of `site` in the checkpoint, if the site has a weight.
    pub(crate) fn tensor_name(&self, site: Site) -> Option<String> {
        self.weights().tensor_name(site)
    }

    /// Reads the weights onto `device`.
    ///
    /// # Errors
    /// As [`Decoder::load`], with the path of the checkpoint.
    pub fn load(self, device: &Device) -> Result<Model, ModelError> {
        let decoder = Decoder::load(self.config.clone(), &self.weights(), device);
        let decoder = decoder.map_err(|e| self.named(e))?;
        Ok(Model { name: self.name, decoder, tokenizer: self.tokenizer })
    }

    /// Reads the weights onto `device`, a CPU, as [`Decoder::load_in_bf16`] does.
    ///
    /// # Errors
    /// As [`ModelFiles::load`].
    pub fn load_in_bf16(self, device: &Device) -> Result<Model, ModelError> {
        let decoder = Decoder::load_in_bf16(self.config.clone(), &self.weights(), device);
        let decoder = decoder.map_err(|e| self.named(e))?;
        Ok(Model { name: self.name, decoder, tokenizer: self.tokenizer })
    }

    /// Reads the weights onto `device` as [`ModelFiles::load`] does, those of linear layers in GGUF blocks of `Q4_0`, `Q4_1` and `Q8_0`
    /// as they are, for a brick to compute with (`firebrick_quant::PackedLinear`); a file without such gives none. On the CPU matrices in
    /// bf16 stay in bf16, and those of other types become it with [`Precision::Bf16`].
    ///
    /// # Errors
    /// As [`ModelFiles::load`].
    pub fn load_packed(
        self,
        precision: Precision,
        device: &Device,
    ) -> Result<(Model, BTreeMap<Site, PackedMatrix>), ModelError> {
        let loaded = Decoder::load_packed(self.config.clone(), &self.weights(), precision, device);
        let (decoder, packed) = loaded.map_err(|e| self.named(e))?;
        Ok((Model { name: self.name, decoder, tokenizer: self.tokenizer }, packed))
    }

    /// The error with the path of the checkpoint.
    fn named(&self, error: ModelError) -> ModelError {
        match error {
            ModelError::Weights { problems } => {
                ModelError::Invalid { path: self.checkpoint.path().into(), problems }
            }
            other => other,
        }
    }
}

impl Model {
    /// Opens and loads a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    /// As [`ModelFiles::open`] and [`Decoder::load`].
    pub fn open(path: &Path, device: &Device) -> Result<Self, ModelError> {
        ModelFiles::open(path)?.load(device)
    }

    /// Loads the model built into this crate.
    ///
    /// # Errors
    /// As [`ModelFiles::embedded`].
    pub fn embedded(device: &Device) -> Result<Self, ModelError> {
        ModelFiles::embedded()?.load(device)
    }
}
