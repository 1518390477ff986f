//! Stages that are done once: a finished stage leaves a record, and a resumed run reads it instead of working again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::args::{Global, Usage};

/// The records of one run, in a hidden folder of its output until the run is complete.
pub struct Stages {
    folder: PathBuf,
}

impl Stages {
    /// Begins or resumes a run in `out`; `identity` is all that changes its results.
    pub fn begin(out: &Path, identity: &serde_json::Value, global: &Global) -> Result<Self> {
        let folder = out.join(".stages");
        let record = folder.join("run.json");
        let identity = serde_json::to_string_pretty(identity)? + "\n";
        if out.exists() && std::fs::read_dir(out)?.next().is_some() {
            let same = std::fs::read_to_string(&record).ok().map(|found| found == identity);
            match (global.overwrite, global.resume, same) {
                (true, ..) => clear(out)?,
                (_, true, Some(true)) => return Ok(Stages { folder }),
                (_, true, Some(false)) => {
                    let what =
                        "was begun with another model, text, seed or setting; say --overwrite to start anew";
                    return Err(Usage(format!("{} {what}", out.display())).into());
                }
                (_, true, None) => {
                    let what = "holds no interrupted run; say --overwrite to replace what is there";
                    return Err(Usage(format!("{} {what}", out.display())).into());
                }
                _ => {
                    let what = "exists; say --resume to go on or --overwrite to start anew";
                    return Err(Usage(format!("{} {what}", out.display())).into());
                }
            }
        }
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        write_atomic(&record, identity.as_bytes())?;
        Ok(Stages { folder })
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
        // Read back, so that a resumed run goes on from the very same numbers.
        let text = serde_json::to_string_pretty(&value)? + "\n";
        write_atomic(&record, text.as_bytes())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A folder for work in progress, removed at the end.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The run is complete: removes the records.
    pub fn finish(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).with_context(|| self.folder.display().to_string())
    }
}

/// What a run writes into its folder; anything else is somebody else's and must not be deleted.
const OURS: &[&str] = &[
    ".stages",
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

fn clear(out: &Path) -> Result<()> {
    let mut ours = Vec::new();
    for entry in std::fs::read_dir(out)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let staging = name.starts_with('.') && name.ends_with(".partial");
        if !OURS.contains(&name.as_str()) && !staging {
            return Err(
                Usage(format!("{} holds `{name}`, which is not ours to delete", out.display())).into()
            );
        }
        ours.push(entry.path());
    }
    for path in ours {
        if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, bytes).with_context(|| partial.display().to_string())?;
    std::fs::rename(&partial, path).with_context(|| path.display().to_string())
}
