//! `firebrick.json` and the model card: what an output was made from, and how.

use super::Transform;
use super::plan::Prepared;
use super::target::{MODEL_CARD, Target, pretty};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

/// Name of the file that tells what an output folder was made from; a GGUF file has `NAME.firebrick.json` beside it.
pub const PROVENANCE_FILE: &str = "firebrick.json";

/// A file that was read or written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Name without folders.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256 in hexadecimal, if hashing was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sha256: Option<String>,
}

#[derive(Serialize)]
struct SourceRecord {
    name: String,
    files: Vec<FileRecord>,
}

#[derive(Serialize)]
struct Provenance<'a> {
    firebrick: &'static str,
    transform: &'a str,
    settings: &'a serde_json::Value,
    sources: &'a [SourceRecord],
    tensors: usize,
    outputs: &'a [FileRecord],
}

pub(super) fn file_name(target: &Target) -> String {
    match target {
        Target::Folder { .. } => PROVENANCE_FILE.to_owned(),
        Target::Gguf { .. } => format!("{}.{PROVENANCE_FILE}", target.file_name()),
    }
}

/// Names of the files that a `firebrick.json` lists, its own among them; empty if there is none.
pub(super) fn files_listed(path: &Path) -> BTreeSet<String> {
    #[derive(Deserialize)]
    struct Listed {
        outputs: Vec<FileRecord>,
    }
    let text = firebrick_core::read_file(path, firebrick_core::MAX_SETTINGS).ok();
    let listed = text.and_then(|text| serde_json::from_slice::<Listed>(&text).ok());
    let names = listed.into_iter().flat_map(|l| l.outputs).map(|file| file.name);
    let mut names: BTreeSet<String> = names.collect();
    if !names.is_empty() {
        names.insert(PROVENANCE_FILE.to_owned());
    }
    names
}

/// The files that go beside the tensors, by name: model card, side files and provenance, the last of them.
///
/// `sources` holds the records of the files of each source, `outputs` those of the files written so far, to which the
/// new ones are added.
pub(super) fn files(
    transform: &dyn Transform,
    target: &Target,
    prepared: &Prepared<'_>,
    sources: Vec<Vec<FileRecord>>,
    outputs: &mut Vec<FileRecord>,
    sha256: bool,
) -> Vec<(String, Vec<u8>)> {
    let named = prepared.sources.iter().zip(sources);
    let sources: Vec<SourceRecord> =
        named.map(|(source, files)| SourceRecord { name: plain_name(&source.name), files }).collect();
    let settings = transform.settings();
    let mut beside = Vec::new();
    if let Target::Folder { stem, side_files, .. } = target {
        beside.extend(super::target::index(stem, &prepared.files));
        beside.extend(side_files.iter().cloned());
        if !side_files.iter().any(|(name, _)| name == MODEL_CARD) {
            let card = model_card(transform, &settings, &sources, prepared.outputs.len());
            beside.push((MODEL_CARD.to_owned(), card.into_bytes()));
        }
    }
    outputs.extend(beside.iter().map(|(name, bytes)| FileRecord {
        name: name.clone(),
        bytes: bytes.len() as u64,
        sha256: sha256.then(|| format!("{:x}", Sha256::digest(bytes))),
    }));
    let provenance = Provenance {
        firebrick: env!("CARGO_PKG_VERSION"),
        transform: transform.name(),
        settings: &settings,
        sources: &sources,
        tensors: prepared.outputs.len(),
        outputs,
    };
    beside.push((file_name(target), pretty(&provenance)));
    beside
}

/// Only the last part of an absolute path: where a model lay is nobody's business.
fn plain_name(name: &str) -> String {
    let path = Path::new(name);
    let last = path.file_name().filter(|_| path.is_absolute());
    last.map_or_else(|| name.to_owned(), |last| last.to_string_lossy().into_owned())
}

fn model_card(
    transform: &dyn Transform,
    settings: &serde_json::Value,
    sources: &[SourceRecord],
    tensors: usize,
) -> String {
    let (name, own) = (transform.name(), transform.card());
    let verb = name.split_whitespace().next().unwrap_or("convert");
    let version = env!("CARGO_PKG_VERSION");
    let mut card = "---\ntags:\n- firebrick\n".to_owned();
    for tag in std::iter::once(verb).chain(own.tags.iter().map(String::as_str)) {
        let _ = writeln!(card, "- {}", serde_json::Value::from(tag));
    }
    for line in &own.front_matter {
        let _ = writeln!(card, "{line}");
    }
    let _ = write!(card, "---\n\n# {name}\n\n");
    let s = if tensors == 1 { "" } else { "s" };
    let _ = write!(card, "{tensors} tensor{s}, written by Firebrick {version}.\n\n## Sources\n\n");
    card.push_str("| source | file | bytes | sha256 |\n|---|---|---:|---|\n");
    for SourceRecord { name, files } in sources {
        for file in files {
            let sha = file.sha256.as_ref().map_or_else(String::new, |sha| format!("`{sha}`"));
            let _ = writeln!(card, "| {} | {} | {} | {sha} |", cell(name), cell(&file.name), file.bytes);
        }
    }
    if !own.text.is_empty() {
        let _ = write!(card, "\n{}", own.text);
    } else if !settings.is_null() {
        let text = String::from_utf8_lossy(&pretty(settings)).into_owned();
        let _ = write!(card, "\n## Settings\n\n```json\n{text}```\n");
    }
    card
}

/// Text that stays inside one cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
