//! The models of a merge, opened: tensors by Hugging Face's names, whatever file they are in.

use std::path::{Path, PathBuf};

use firebrick_core::{MAX_SETTINGS, SiteTable, read_text};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_models::{DecoderConfig, GgufForm, ModelFiles};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, is_gguf_name};
use indexmap::IndexMap;
use serde_json::Value as Json;

use crate::adapter::{Adapter, Update};
use crate::config::ModelRef;
use crate::names;

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    /// Its name in the file.
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub form: GgufForm,
}

/// A model that is merged, or whose tokenizer or configuration is used.
#[derive(Debug)]
pub(crate) struct InputModel {
    pub reference: ModelRef,
    pub checkpoint: Checkpoint,
    /// `config.json`, or what it would be; `None` where there is none.
    pub config: Option<Json>,
    /// Where its tensors belong, for families that are known.
    pub sites: Option<SiteTable>,
    /// By Hugging Face's name, in the order of the file.
    pub tensors: IndexMap<String, Stored>,
    /// Tensors that follow from the configuration: name.
    pub derived: Vec<String>,
    tokenizer: Option<Tokenizer>,
    /// What is added to its weights.
    pub adapter: Option<Adapter>,
}

impl InputModel {
    /// Opens a folder, a file of tensors or a GGUF file, and the adapter on it.
    pub fn open(reference: &ModelRef) -> Result<Self, String> {
        let mut model = Self::open_base(reference)?;
        if let Some(folder) = &reference.lora {
            let sites = model.sites.as_ref();
            let sites = sites.ok_or_else(|| {
                format!("an adapter needs a model whose layers are known, `{}` is none", reference.path)
            })?;
            let adapter = Adapter::open(Path::new(folder), sites)?;
            adapter.check(&model.tensors).map_err(|what| format!("{folder}: {what}"))?;
            model.adapter = Some(adapter);
        }
        Ok(model)
    }

    fn open_base(reference: &ModelRef) -> Result<Self, String> {
        let path = Path::new(&reference.path);
        if !path.exists() {
            return Err(format!("there is no folder or file `{}`", reference.path));
        }
        if path.is_file() && is_gguf(path) {
            return Self::open_gguf(reference, path);
        }
        let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
        let folder = folder_of(path);
        let file = folder.join("config.json");
        let config = match read_text(&file, MAX_SETTINGS) {
            Ok(text) => Some(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(format!("{}: {e}", file.display())),
        };
        // A family that is not known is merged by the names of its tensors all the same.
        let known = config.as_ref().and_then(|c| DecoderConfig::from_hf(c).ok());
        let sites = known.map(|c| c.family().site_table(&c));
        let mut tensors = IndexMap::new();
        let mut derived = Vec::new();
        for info in checkpoint.tensors() {
            if names::is_derived(&info.name) {
                derived.push(info.name.clone());
                continue;
            }
            let (name, shape) = (info.name.clone(), info.shape.clone());
            tensors.insert(name.clone(), Stored { name, dtype: info.dtype, shape, form: GgufForm::Same });
        }
        Ok(InputModel {
            reference: reference.clone(),
            checkpoint,
            config,
            sites,
            tensors,
            derived,
            tokenizer: None,
            adapter: None,
        })
    }

    fn open_gguf(reference: &ModelRef, path: &Path) -> Result<Self, String> {
        let files = ModelFiles::open_unchecked(path).map_err(|e| e.to_string())?;
        let problems = files.problems().map_err(|e| e.to_string())?;
        if !problems.is_empty() {
            return Err(problems.join("; "));
        }
        let mut tensors = IndexMap::new();
        let weights = files.weights();
        for entry in files.sites().entries() {
            let Some(name) = entry.tensor.clone() else { continue };
            let Some(info) = weights.tensor_name(entry.site).and_then(|n| files.checkpoint.get(&n)) else {
                continue;
            };
            let form = weights.form(entry.site);
            let (stored, shape) = (info.name.clone(), info.shape.clone());
            tensors.insert(name, Stored { name: stored, dtype: info.dtype, shape, form });
        }
        let mine = |name: &str| tensors.values().any(|t: &Stored| t.name == name);
        let names = files.checkpoint.tensors().iter().map(|t| t.name.clone());
        let derived = names.filter(|name| !mine(name)).collect();
        let (config, sites) = (files.config.to_hf("float32"), files.sites().clone());
        Ok(InputModel {
            reference: reference.clone(),
            config: Some(config),
            sites: Some(sites),
            tensors,
            derived,
            tokenizer: Some(files.tokenizer),
            checkpoint: files.checkpoint,
            adapter: None,
        })
    }

    /// The tensor `name`; the embedding in place of a head that is tied to it.
    pub fn tensor(&self, name: &str) -> Option<(&str, &Stored)> {
        if let Some((name, stored)) = self.tensors.get_key_value(name) {
            return Some((name, stored));
        }
        if !names::is_head(name) || !name.ends_with(".weight") || names::layer_name(name).is_some() {
            return None;
        }
        self.tensors.iter().find(|(n, _)| names::is_embedding(n)).map(|(n, stored)| (n.as_str(), stored))
    }

    /// What its adapter adds to the tensor `name`.
    pub fn update(&self, name: &str) -> Option<&Update> {
        self.adapter.as_ref()?.update(name)
    }

    /// Layers behind `prefix`.
    pub fn layers(&self, prefix: &str) -> usize {
        let numbers = self.tensors.keys().filter_map(|n| names::behind(n, prefix));
        numbers.map(|n| n.layer + 1).max().unwrap_or(0)
    }

    /// Its tokenizer, read when it is first asked for.
    pub fn tokenizer(&self) -> Result<Tokenizer, String> {
        match &self.tokenizer {
            Some(tokenizer) => Ok(tokenizer.clone()),
            None => Tokenizer::from_folder(self.folder()).map_err(|e| e.to_string()),
        }
    }

    /// The folder of its files.
    pub fn folder(&self) -> PathBuf {
        folder_of(Path::new(&self.reference.path))
    }

    /// Whether it came from a GGUF file, whose tokenizer and configuration are inside.
    pub fn is_gguf(&self) -> bool {
        self.tokenizer.is_some()
    }
}

fn folder_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.to_owned() } else { firebrick_core::folder(path).to_owned() }
}

/// By its name, or by its first bytes.
fn is_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    is_gguf_name(path)
        || std::fs::File::open(path)
            .and_then(|mut f| f.read_exact(&mut magic))
            .is_ok_and(|()| &magic == b"GGUF")
}
