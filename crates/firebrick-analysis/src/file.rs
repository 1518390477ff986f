//! Text files that appear whole or not at all.

use std::path::Path;

use firebrick_core::{read_text, write_atomic};
use serde::de::DeserializeOwned;

use crate::AnalysisError;

/// Most bytes of a profile or report that is read.
const MAX_FILE: u64 = 256 << 20;

/// Writes `text` to `path`, over an older file once it is complete.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), AnalysisError> {
    write_atomic(path, text.as_bytes()).map_err(|error| AnalysisError::Io { path: path.into(), error })
}

/// Reads a text file.
pub(crate) fn read(path: &Path) -> Result<String, AnalysisError> {
    read_text(path, MAX_FILE).map_err(|error| AnalysisError::Io { path: path.into(), error })
}

/// Reads JSON with a `version`; that of another version is refused as such, whatever else it holds.
pub(crate) fn versioned<T: DeserializeOwned>(text: &str, expected: u32) -> Result<T, AnalysisError> {
    let value: serde_json::Value = serde_json::from_str(text)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(found) if found != u64::from(expected) => Err(AnalysisError::Version { found, expected }),
        _ => Ok(serde_json::from_value(value)?),
    }
}
