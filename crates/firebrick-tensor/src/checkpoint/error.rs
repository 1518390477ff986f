//! What can go wrong with checkpoint files.

use crate::block::BlockError;
use std::path::{Path, PathBuf};

/// Result of checkpoint functions.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// An error in reading or writing a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The path is not a checkpoint.
    #[error("{path}: not a checkpoint: {what}")]
    NotACheckpoint {
        /// File or folder.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// The structure of a file is broken at a known place.
    #[error("{path}: at byte {offset}: {what}")]
    Malformed {
        /// File.
        path: PathBuf,
        /// Byte offset from the start of the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The file can be parsed, but what it says can't be; every problem found is listed.
    #[error("{path}: {}", listed(problems))]
    Problems {
        /// File or folder.
        path: PathBuf,
        /// One line each, naming the tensor or shard.
        problems: Vec<String>,
    },
    /// No tensor has this name.
    #[error("{path}: no tensor named `{tensor}`")]
    NoTensor {
        /// Checkpoint.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// Elements were asked for that the tensor does not have.
    #[error("{path}: tensor `{tensor}`: elements {start}..{end} of {elements}")]
    Range {
        /// Checkpoint.
        path: PathBuf,
        /// Tensor.
        tensor: String,
        /// First element asked for.
        start: usize,
        /// One past the last element asked for.
        end: usize,
        /// Elements the tensor has.
        elements: usize,
    },
    /// A tensor's bytes can't be read as numbers.
    #[error("{path}: tensor `{tensor}`: {source}")]
    Block {
        /// Checkpoint.
        path: PathBuf,
        /// Tensor.
        tensor: String,
        /// Cause.
        source: BlockError,
    },
    /// GGUF metadata lacks a key.
    #[error("{path}: no metadata key `{key}` ({expected} expected)")]
    NoKey {
        /// File; empty when the metadata come from no file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A GGUF metadata key holds something else.
    #[error("{path}: metadata key `{key}` is {found}, {expected} expected")]
    KeyType {
        /// File; empty when the metadata come from no file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// A file can't be written as asked; every problem found is listed.
    #[error("can't write this checkpoint: {}", listed(problems))]
    Layout {
        /// One line each, naming the tensor or key.
        problems: Vec<String>,
    },
    /// The data of a tensor came out of order or in the wrong amount.
    #[error("writing tensor `{tensor}`: {what}")]
    Write {
        /// Tensor.
        tensor: String,
        /// What is wrong.
        what: String,
    },
    /// The output could not be written.
    #[error("writing: {0}")]
    Output(#[from] std::io::Error),
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        CheckpointError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, offset: usize, what: impl Into<String>) -> Self {
        CheckpointError::Malformed { path: path.to_owned(), offset: offset as u64, what: what.into() }
    }
}

fn listed(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => format!("{} problems:\n  {}", many.len(), many.join("\n  ")),
    }
}
