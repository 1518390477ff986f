//! A folder of shards, safetensors or PyTorch's, with the index Hugging Face writes beside them.

use super::error::{CheckpointError, Result};
use super::{Checkpoint, Format, Metadata, pytorch};
use firebrick_core::read_file;
use indexmap::IndexMap;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Component, Path};

/// The file of an unsharded checkpoint in its folder, and the file that tells which shard holds which tensor.
const KNOWN: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

const MAX_INDEX: u64 = 100_000_000;

#[derive(serde::Deserialize)]
struct Index {
    weight_map: IndexMap<String, String>,
}

pub(super) fn open(folder: &Path) -> Result<Checkpoint> {
    let mut index = None;
    for (single, with_shards) in KNOWN {
        let (single, with_shards) = (folder.join(single), folder.join(with_shards));
        if single.is_file() {
            return Checkpoint::open(single)
                .map(|checkpoint| Checkpoint { path: folder.to_owned(), ..checkpoint });
        }
        if with_shards.is_file() {
            index = Some(with_shards);
            break;
        }
    }
    let Some(index) = index else {
        let known: Vec<&str> = KNOWN.iter().flat_map(|(single, index)| [*single, *index]).collect();
        let what = format!("the folder holds none of {}", known.join(", "));
        return Err(CheckpointError::NotACheckpoint { path: folder.to_owned(), what });
    };
    let mut weight_map = read_index(&index)?;
    if !index.ends_with(KNOWN[0].1) {
        // What PyTorch's files call by old names is read under the new ones.
        let current = |(name, shard): (String, String)| (pytorch::current_name(&name), shard);
        weight_map = weight_map.into_iter().map(current).collect();
    }
    let problems = |problems| CheckpointError::Problems { path: index.clone(), problems };

    let distinct: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let names: Vec<&str> = distinct.into_iter().collect();
    let outside: Vec<String> = names
        .iter()
        .filter(|name| !is_plain_file_name(name))
        .map(|name| format!("shard `{name}` is not a plain file name"))
        .collect();
    if !outside.is_empty() {
        return Err(problems(outside));
    }

    let mut checkpoint = Checkpoint {
        path: folder.to_owned(),
        format: Format::Safetensors,
        files: Vec::new(),
        maps: Vec::new(),
        tensors: Vec::new(),
        by_name: HashMap::new(),
        metadata: Metadata::new(),
        gguf: None,
    };
    let mut found = Vec::new();
    let mut unreadable = BTreeSet::new();
    for (file, name) in names.iter().enumerate() {
        let path = folder.join(name);
        let shard = super::map(&path).and_then(|map| {
            let (metadata, tensors) = super::read_file(&path, &map, file)?;
            Ok((map, metadata, tensors))
        });
        match shard {
            Ok((map, metadata, tensors)) => {
                if checkpoint.metadata.is_empty() {
                    checkpoint.metadata = metadata;
                }
                checkpoint.maps.push(map);
                checkpoint.tensors.extend(tensors);
            }
            Err(error) => {
                found.push(format!("shard `{name}`: {error}"));
                unreadable.insert(*name);
            }
        }
        checkpoint.files.push(path);
    }
    let mut seen = HashSet::new();
    for tensor in &checkpoint.tensors {
        let shard = names[tensor.file];
        seen.insert(tensor.name.as_str());
        match weight_map.get(&tensor.name) {
            Some(named) if named == shard => {}
            Some(named) => {
                found.push(format!("tensor `{}` is in `{shard}`, the index says `{named}`", tensor.name))
            }
            None => found.push(format!("tensor `{}` of `{shard}` is not in the index", tensor.name)),
        }
    }
    for (tensor, shard) in &weight_map {
        // A shard that can't be read is one problem, not one per tensor.
        if !seen.contains(tensor.as_str()) && !unreadable.contains(shard.as_str()) {
            found.push(format!("tensor `{tensor}` is not in `{shard}`, where the index puts it"));
        }
    }
    if found.is_empty() { Ok(checkpoint.indexed()) } else { Err(problems(found)) }
}

fn read_index(path: &Path) -> Result<IndexMap<String, String>> {
    let io = |e| CheckpointError::io(path, e);
    let text = read_file(path, MAX_INDEX).map_err(io)?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| {
        CheckpointError::malformed(path, 0, format!("the index is not what it should be: {e}"))
    })?;
    if index.weight_map.is_empty() {
        return Err(CheckpointError::malformed(path, 0, "the index names no tensors"));
    }
    Ok(index.weight_map)
}

/// No folders, drives or `..`: neither an index nor a target may lead outside its own folder.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    matches!(first, Some(Component::Normal(part)) if part == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
}
