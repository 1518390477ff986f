//! Text files that appear whole or not at all.

use std::path::Path;

use firebrick_core::write_atomic;

use crate::AnalysisError;

/// Writes `text` to `path`, over an older file once it is complete.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), AnalysisError> {
    write_atomic(path, text.as_bytes()).map_err(|error| AnalysisError::Io { path: path.into(), error })
}

/// Reads a text file.
pub(crate) fn read(path: &Path) -> Result<String, AnalysisError> {
    std::fs::read_to_string(path).map_err(|error| AnalysisError::Io { path: path.into(), error })
}
