//! Where the output of a transformation goes, and the files it consists of.

use super::{PROVENANCE_FILE, StreamError};
use crate::checkpoint::{
    CheckpointError, Layout, Metadata, TensorInfo, TensorSpec, gguf, is_plain_file_name,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

pub(super) const MODEL_CARD: &str = "README.md";

/// Where the output goes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Target {
    /// A folder as Hugging Face's loaders expect it: `model.safetensors`, or shards with their index.
    Folder {
        /// The folder; its parents are created.
        path: PathBuf,
        /// Name of the safetensors file without its ending: `model`, `adapter_model`.
        stem: String,
        /// Further files, such as `config.json`, by name. A `README.md` among them replaces the model card.
        side_files: Vec<(String, Vec<u8>)>,
    },
    /// One GGUF file, with `NAME.firebrick.json` beside it.
    Gguf {
        /// The file; its parents are created.
        path: PathBuf,
        /// Its metadata.
        metadata: gguf::Metadata,
    },
}

impl Target {
    /// A folder with `model.safetensors` or its shards.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Target::Folder { path: path.into(), stem: "model".into(), side_files: Vec::new() }
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match self {
            Target::Folder { path, .. } | Target::Gguf { path, .. } => path,
        }
    }

    pub(super) fn file_name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The folder that holds the target.
    pub(super) fn parent(&self) -> &Path {
        firebrick_core::folder(self.path())
    }

    /// Where the provenance goes.
    pub(super) fn provenance(&self) -> PathBuf {
        let name = super::provenance::file_name(self);
        match self {
            Target::Folder { path, .. } => path.join(name),
            Target::Gguf { .. } => self.parent().join(name),
        }
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.parent().join(format!(".{}.partial", self.file_name()))
    }

    /// Lays out the files of `tensors`; what can't be is added to `problems`.
    pub(super) fn files(
        &self,
        tensors: &[TensorSpec],
        shard_bytes: u64,
        problems: &mut Vec<String>,
    ) -> Vec<OutputFile> {
        if self.path().file_name().is_none() {
            problems.push(format!("{}: not a path that can be written to", self.path().display()));
        }
        let mut lay = |name: String, layout: Result<Layout, CheckpointError>| match layout {
            Ok(layout) => Some(OutputFile { name, layout }),
            Err(CheckpointError::Layout { problems: found }) => {
                problems.extend(found);
                None
            }
            Err(error) => {
                problems.push(error.to_string());
                None
            }
        };
        match self {
            Target::Gguf { metadata, .. } => {
                lay(self.file_name(), Layout::gguf(metadata, tensors)).into_iter().collect()
            }
            Target::Folder { stem, side_files, .. } => {
                let shards = shards(tensors, shard_bytes);
                let many = shards.len();
                let files: Vec<OutputFile> = shards
                    .into_iter()
                    .enumerate()
                    .filter_map(|(i, shard)| {
                        let name = match many {
                            1 => format!("{stem}.safetensors"),
                            _ => format!("{stem}-{:05}-of-{many:05}.safetensors", i + 1),
                        };
                        lay(name, Layout::safetensors(&Metadata::new(), shard))
                    })
                    .collect();
                let mut taken: BTreeSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
                let index = index_name(stem);
                taken.extend([PROVENANCE_FILE, index.as_str()]);
                for (name, _) in side_files {
                    if !is_plain_file_name(name) {
                        problems.push(format!("side file `{name}` is not a plain file name"));
                    } else if !taken.insert(name) {
                        problems.push(format!("side file `{name}` is written twice"));
                    }
                }
                if !is_plain_file_name(stem) {
                    problems.push(format!("`{stem}` is not a plain file name"));
                }
                files
            }
        }
    }

    /// What is lost if the target is replaced: an error unless that is nothing, or our own and `overwrite` is set.
    pub(super) fn check(&self, overwrite: bool) -> Result<(), StreamError> {
        let path = self.path();
        if matches!(self, Target::Gguf { .. }) {
            let stands = |path: &PathBuf| {
                std::fs::symlink_metadata(path).is_ok_and(|metadata| !overwrite || metadata.is_dir())
            };
            let files = [path.to_owned(), self.provenance()];
            return files.into_iter().find(stands).map_or(Ok(()), |path| Err(StreamError::Exists { path }));
        }
        let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
        let exists = || StreamError::Exists { path: path.to_owned() };
        if !metadata.is_dir() {
            return Err(exists());
        }
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(path).map_err(StreamError::io(path))? {
            let entry = entry.map_err(StreamError::io(path))?;
            found.insert(entry.file_name().to_string_lossy().into_owned());
        }
        if found.is_empty() {
            return Ok(());
        }
        if !overwrite {
            return Err(exists());
        }
        let written = super::provenance::files_listed(&self.provenance());
        let files: Vec<String> = found.difference(&written).take(8).cloned().collect();
        if files.is_empty() { Ok(()) } else { Err(StreamError::WouldDelete { path: path.to_owned(), files }) }
    }
}

fn index_name(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

/// Runs of tensors of at most `shard_bytes` each, or of one tensor that is larger.
fn shards(tensors: &[TensorSpec], shard_bytes: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let more = tensor.dtype.bytes_for_shape(&tensor.shape).unwrap_or(0) as u64;
        if i > start && bytes.saturating_add(more) > shard_bytes {
            shards.push(&tensors[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(more);
    }
    shards.push(&tensors[start..]);
    shards
}

/// A file of the output that holds tensors.
#[derive(Clone, Debug)]
pub(super) struct OutputFile {
    pub(super) name: String,
    pub(super) layout: Layout,
}

/// Which file each tensor is in, and where.
pub(super) fn places(files: &[OutputFile]) -> HashMap<&str, (usize, &TensorInfo)> {
    files
        .iter()
        .enumerate()
        .flat_map(|(i, file)| file.layout.tensors().iter().map(move |t| (t.name.as_str(), (i, t))))
        .collect()
}

/// The index beside several shards: its name and text.
pub(super) fn index(stem: &str, files: &[OutputFile]) -> Option<(String, Vec<u8>)> {
    if files.len() < 2 {
        return None;
    }
    let places: BTreeMap<&str, (usize, &TensorInfo)> = places(files).into_iter().collect();
    let total: u64 = places.values().map(|(_, t)| t.len as u64).sum();
    let weights: serde_json::Map<String, Value> =
        places.into_iter().map(|(name, (i, _))| (name.to_owned(), json!(files[i].name))).collect();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weights });
    Some((index_name(stem), pretty(&index)))
}

/// JSON as people read it, with a line break at the end.
pub(super) fn pretty(value: &impl serde::Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain data is JSON");
    text.push(b'\n');
    text
}
