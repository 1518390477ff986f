//! An encoder on disk: checkpoint, configuration, tokenizer and what sentence-transformers keeps beside them.

use std::collections::HashSet;
use std::path::Path;

use burn::tensor::Device;
use firebrick_core::{MAX_SETTINGS, SiteTable, read_file};
use firebrick_tensor::checkpoint::{Checkpoint, TensorInfo};

use super::{Encoder, EncoderConfig, EncoderModel, SentenceConfig};
use crate::error::ModelError;
use crate::family::bert::{self, EncoderTensor};
use crate::tokenizer::Tokenizer;

/// What the names of an encoder's tensors begin with in the file of a model with heads (`BertForMaskedLM`).
const PREFIX: &str = "bert.";

/// The weights of a checkpoint, by what they are.
///
/// Knows the names of `BertModel`, of a model with heads on top of it, and TensorFlow's `gamma` and `beta`.
#[derive(Clone, Copy)]
pub struct EncoderWeights<'a> {
    checkpoint: &'a Checkpoint,
}

impl<'a> EncoderWeights<'a> {
    /// The weights in `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        EncoderWeights { checkpoint }
    }

    /// The tensor in the file, under whichever name it has there.
    pub fn find(&self, tensor: EncoderTensor) -> Option<&'a TensorInfo> {
        let name = tensor.name(self.checkpoint.format())?;
        let tensorflow = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        let tensorflow = tensorflow.replace("LayerNorm.bias", "LayerNorm.beta");
        let names = [name, tensorflow];
        let found = |name: &String| {
            self.checkpoint.get(name).or_else(|| self.checkpoint.get(&format!("{PREFIX}{name}")))
        };
        names.iter().find_map(found)
    }

    /// Whether [`EncoderWeights::read`] would find a tensor of this shape, without reading it.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape than `shape`.
    pub fn check(&self, tensor: EncoderTensor, shape: &[usize]) -> Result<&'a TensorInfo, ModelError> {
        let Some(info) = self.find(tensor) else {
            let name = tensor.name(self.checkpoint.format()).unwrap_or_else(|| format!("{tensor:?}"));
            return Err(ModelError::MissingTensor { name, path: self.checkpoint.path().into() });
        };
        if info.shape != shape {
            let (name, found) = (info.name.clone(), info.shape.clone());
            return Err(ModelError::Shape { name, expected: shape.into(), found });
        }
        Ok(info)
    }

    /// The values of a tensor, row-major in Hugging Face's layout.
    ///
    /// # Errors
    /// As [`EncoderWeights::check`], or if the tensor holds integers.
    pub fn read(&self, tensor: EncoderTensor, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let info = self.check(tensor, shape)?;
        Ok(self.checkpoint.read_f32(&info.name)?)
    }

    /// Tensors that the encoder would need and has no place for. Heads on top of it are none of its business, nor are
    /// the numbers of the positions that old versions of transformers saved.
    fn unclaimed(&self, config: &EncoderConfig) -> Vec<String> {
        let claimed: HashSet<&str> =
            bert::tensors(config).iter().filter_map(|(t, _)| Some(self.find(*t)?.name.as_str())).collect();
        let with_heads = self.checkpoint.tensors().iter().any(|t| t.name.starts_with(PREFIX));
        let tensors = self.checkpoint.tensors().iter().map(|t| t.name.as_str());
        tensors
            .filter(|name| !claimed.contains(name) && (!with_heads || name.starts_with(PREFIX)))
            .filter(|name| !name.ends_with("embeddings.position_ids"))
            .map(|name| format!("tensor `{name}` has no place in this architecture"))
            .collect()
    }
}

/// An encoder as it lies on disk, nothing on a device.
#[derive(Debug)]
pub struct EncoderFiles {
    /// What to call it in reports and file names.
    pub name: String,
    /// The tensors.
    pub checkpoint: Checkpoint,
    /// The shape.
    pub config: EncoderConfig,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// How a text becomes a vector.
    pub sentence: SentenceConfig,
    sites: SiteTable,
}

impl EncoderFiles {
    /// Whether the `config.json` of a Hugging Face folder names an encoder; false where there is none.
    pub fn is_encoder(path: &Path) -> bool {
        let text = read_file(&path.join("config.json"), MAX_SETTINGS).unwrap_or_default();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        value["model_type"] == bert::BERT
    }

    /// Opens a Hugging Face folder: `config.json`, `tokenizer.json`, safetensors, and where they are there
    /// sentence-transformers' `modules.json`, `1_Pooling/config.json` and `sentence_bert_config.json`.
    ///
    /// # Errors
    /// If a file is missing, damaged, or describes an architecture that is not supported; if the checkpoint has a tensor
    /// that the architecture has no place for, or the tokenizer more ids than the embedding has rows.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if !path.is_dir() {
            let what = "an encoder is a folder with config.json, tokenizer.json and safetensors";
            return Err(ModelError::Unsupported(format!("{}: {what}", path.display())));
        }
        let mut config = EncoderConfig::from_hf_file(&path.join("config.json"))?;
        let tokenizer = Tokenizer::from_folder(path)?;
        let sentence = SentenceConfig::from_folder(path)?;
        let checkpoint = Checkpoint::open(path)?;
        let weights = EncoderWeights::new(&checkpoint);
        config.pooler = weights.find(EncoderTensor::PoolerWeight).is_some();
        let mut problems = weights.unclaimed(&config);
        let (ids, rows) = (tokenizer.vocab_size(), config.vocab);
        if ids > rows {
            problems.push(format!("the tokenizer has ids up to {}, the embedding has {rows} rows", ids - 1));
        }
        if !problems.is_empty() {
            return Err(ModelError::Invalid { path: path.into(), problems });
        }
        let name = path.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        let sites = bert::site_table(&config);
        Ok(EncoderFiles { name, checkpoint, config, tokenizer, sentence, sites })
    }

    /// The sites of the model.
    pub fn sites(&self) -> &SiteTable {
        &self.sites
    }

    /// Reads the weights onto `device`.
    ///
    /// # Errors
    /// As [`Encoder::load`].
    pub fn load(self, device: &Device) -> Result<EncoderModel, ModelError> {
        let encoder = Encoder::load(self.config, &EncoderWeights::new(&self.checkpoint), device)?;
        let (name, tokenizer, sentence) = (self.name, self.tokenizer, self.sentence);
        Ok(EncoderModel { name, encoder, tokenizer, sentence })
    }
}
