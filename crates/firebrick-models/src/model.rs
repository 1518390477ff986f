//! A model on disk, and a model on a device.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_core::{Site, SiteTable};
use firebrick_tensor::checkpoint::{Checkpoint, Format};

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use crate::weights::CheckpointWeights;

/// The model trained by this project and built into this crate; see `docs/guide/start.md`.
static EMBEDDED: &[u8] = include_bytes!("../data/embedded.gguf");

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
    /// If a file is missing, damaged, or describes an architecture that is not supported.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
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
    pub fn embedded() -> Result<Self, ModelError> {
        let path = PathBuf::from("embedded.gguf");
        let mut files = Self::from_gguf(Checkpoint::from_static(EMBEDDED, &path)?, &path)?;
        files.name = "embedded".into();
        Ok(files)
    }

    fn from_gguf(checkpoint: Checkpoint, path: &Path) -> Result<Self, ModelError> {
        let gguf = checkpoint.gguf().expect("the format was checked");
        let vocab = checkpoint.get("token_embd.weight").map(|t| t.shape[0]);
        let missing = || ModelError::MissingTensor { name: "token_embd.weight".into(), path: path.into() };
        let tied = checkpoint.get("output.weight").is_none();
        let config = DecoderConfig::from_gguf(gguf, vocab.ok_or_else(missing)?, tied, path)?;
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        let stem = path.file_stem().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        let name = gguf.str("general.name").map_or(stem, String::from);
        Ok(Self::new(name, checkpoint, config, tokenizer))
    }

    fn new(name: String, checkpoint: Checkpoint, config: DecoderConfig, tokenizer: Tokenizer) -> Self {
        let sites = config.family().site_table(&config);
        ModelFiles { name, checkpoint, config, tokenizer, sites }
    }

    /// The sites of the model.
    pub fn sites(&self) -> &SiteTable {
        &self.sites
    }

    /// The weights by site.
    pub fn weights(&self) -> CheckpointWeights<'_> {
        CheckpointWeights { checkpoint: &self.checkpoint, config: &self.config }
    }

    /// The tensor of `site` in the checkpoint, if the site has a weight.
    pub fn tensor_name(&self, site: Site) -> Option<String> {
        self.weights().tensor_name(site)
    }

    /// Reads the weights onto `device`.
    pub fn load(self, device: &Device) -> Result<Model, ModelError> {
        let decoder = Decoder::load(self.config.clone(), &self.weights(), device)?;
        Ok(Model { name: self.name, decoder, tokenizer: self.tokenizer })
    }
}

impl Model {
    /// Opens and loads a Hugging Face folder or a GGUF file; see [`ModelFiles::open`].
    pub fn open(path: &Path, device: &Device) -> Result<Self, ModelError> {
        ModelFiles::open(path)?.load(device)
    }

    /// Loads the model built into this crate.
    pub fn embedded(device: &Device) -> Result<Self, ModelError> {
        ModelFiles::embedded()?.load(device)
    }
}
