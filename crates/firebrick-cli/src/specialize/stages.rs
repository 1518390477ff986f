//! Stages that are done once: a finished stage leaves a record, and a resumed run reads it instead of working again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use firebrick_core::write_atomic;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::args::{Global, Usage};
use crate::models;

/// The records of a run, in its output until the run is complete.
const FOLDER: &str = ".stages";
/// The records while they are being made; a kill leaves nothing that looks like a run.
const NEW_FOLDER: &str = ".stages.new";
/// The records on their way out.
const OLD_FOLDER: &str = ".stages.old";
/// What the run is of, among the records.
const RUN: &str = "run.json";
/// What a complete run found; holds what it is of under `run`.
pub const SUMMARY: &str = "summary.json";

/// The records of one run.
pub struct Stages {
    folder: PathBuf,
}

/// Where a run stands.
pub enum Begun {
    /// It begins or goes on.
    Open(Stages),
    /// It was complete already: its summary.
    Complete(Value),
}

impl Stages {
    /// Begins or resumes a run in `out`; `identity` is all that changes its results.
    pub fn begin(out: &Path, identity: &Value, global: &Global) -> Result<Begun> {
        let folder = out.join(FOLDER);
        // Compared as it comes back from a file.
        let identity: &Value = &serde_json::from_str(&identity.to_string())?;
        let usage = |what: &str| Err(Usage(format!("{} {what}", out.display())).into());
        if holds_anything(out)? {
            let begun = read(&folder.join(RUN));
            let complete = read(&out.join(SUMMARY)).filter(|_| begun.is_none());
            let found = begun.as_ref().or(complete.as_ref().and_then(|c| c.get("run")));
            match (global.resume, found) {
                (true, Some(found)) if found == identity => {
                    models::sweep(out)?;
                    let Some(summary) = complete else { return Ok(Begun::Open(Stages { folder })) };
                    // What a kill in the last moment left.
                    models::discard(&folder)?;
                    return Ok(Begun::Complete(summary));
                }
                _ if global.overwrite => clear(out)?,
                (true, Some(_)) => {
                    return usage(
                        "was begun with another model, device, text, seed or setting; say --overwrite to start anew",
                    );
                }
                (true, None) => {
                    return usage("holds no run of ours; say --overwrite to replace it");
                }
                (false, _) => return usage("exists; say --resume to go on or --overwrite to start anew"),
            }
        }
        let new = out.join(NEW_FOLDER);
        std::fs::create_dir_all(&new).with_context(|| new.display().to_string())?;
        write_json(&new.join(RUN), identity)?;
        std::fs::rename(&new, &folder).with_context(|| folder.display().to_string())?;
        Ok(Begun::Open(Stages { folder }))
    }

    /// Does `work` unless an earlier run did, and returns what it found.
    pub fn once<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let record = self.folder.join(format!("{name}.json"));
        if let Ok(text) = std::fs::read_to_string(&record) {
            return serde_json::from_str(&text).with_context(|| record.display().to_string());
        }
        let value = work().with_context(|| format!("stage {name}"))?;
        let value = serde_json::to_value(&value).with_context(|| format!("stage {name}"))?;
        // Read back, so that a resumed run goes on from the very same numbers.
        let back = T::deserialize(&value).with_context(|| format!("stage {name} has no finite result"))?;
        write_json(&record, &value).with_context(|| format!("stage {name}"))?;
        Ok(back)
    }

    /// A folder for work in progress, removed at the end.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The run is complete: leaves `summary`, and removes the records.
    pub fn finish(self, out: &Path, summary: &impl Serialize) -> Result<()> {
        write_json(&out.join(SUMMARY), summary)?;
        models::discard(&self.folder)
    }
}

/// What a run writes into its folder; anything else is somebody else's and must not be deleted.
const OURS: &[&str] = &[
    // First, so that a kill on the way leaves nothing that looks complete.
    SUMMARY,
    FOLDER,
    NEW_FOLDER,
    OLD_FOLDER,
    "adapters",
    "bits.toml",
    "merged",
    "model.gguf",
    "model.gguf.firebrick.json",
    "profile.json",
    "ranks.toml",
    "report.html",
    "report.json",
    "router",
    "student",
];

/// Whether there is anything in `out` but what a kill in the first or last moment of a run leaves.
fn holds_anything(out: &Path) -> Result<bool> {
    if !out.is_dir() {
        return Ok(out.exists());
    }
    for entry in std::fs::read_dir(out).with_context(|| out.display().to_string())? {
        if entry?.file_name() != NEW_FOLDER {
            return Ok(true);
        }
    }
    Ok(false)
}

fn clear(out: &Path) -> Result<()> {
    let mut staging = Vec::new();
    for entry in std::fs::read_dir(out)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') && (name.ends_with(".partial") || name.ends_with(".part")) {
            staging.push(name);
        } else if !OURS.contains(&name.as_str()) {
            return Err(
                Usage(format!("{} holds `{name}`, which is not ours to delete", out.display())).into()
            );
        }
    }
    for name in OURS.iter().copied().chain(staging.iter().map(String::as_str)) {
        let path = out.join(name);
        let removed = match name {
            FOLDER => models::discard(&path),
            _ if path.is_dir() => std::fs::remove_dir_all(&path).map_err(Into::into),
            _ if path.exists() => std::fs::remove_file(&path).map_err(Into::into),
            _ => Ok(()),
        };
        removed.with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The JSON in a file; none if it is not there or not whole.
fn read(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    write_atomic(path, text.as_bytes()).with_context(|| path.display().to_string())
}
