//! Text files that appear whole or not at all.

use std::io::Write;
use std::path::Path;

use firebrick_tensor::checkpoint::AtomicFile;

use crate::AnalysisError;

/// Writes `text` to `path`, over an older file once it is complete.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), AnalysisError> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes()).map_err(|error| AnalysisError::Io { path: path.into(), error })?;
    Ok(file.commit()?)
}

/// Reads a text file.
pub(crate) fn read(path: &Path) -> Result<String, AnalysisError> {
    std::fs::read_to_string(path).map_err(|error| AnalysisError::Io { path: path.into(), error })
}
