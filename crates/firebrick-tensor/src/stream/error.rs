//! What can go wrong in a streamed transformation.

use crate::block::BlockError;
use crate::checkpoint::CheckpointError;
use crate::linalg::LinalgError;
use firebrick_core::Cancelled;
use std::path::{Path, PathBuf};

/// An error of a plan or a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The transformation can't run as asked; every problem found is listed, and nothing was computed.
    #[error("{transform} can't run: {}", problems.join("\n  "))]
    Plan {
        /// [`Transform::name`](super::Transform::name).
        transform: String,
        /// One line each, naming the tensor.
        problems: Vec<String>,
    },
    /// The output is there already and may not be replaced; it is untouched.
    #[error("{path}: exists already")]
    Exists {
        /// File or folder.
        path: PathBuf,
    },
    /// Overwriting the folder would delete files that no run of this program wrote; it is untouched.
    #[error("{path}: overwriting would delete files that are not listed in its firebrick.json: {}", files.join(", "))]
    WouldDelete {
        /// Folder.
        path: PathBuf,
        /// The first of their names.
        files: Vec<String>,
    },
    /// Another run works on the same output.
    #[error("{path}: another run is writing here")]
    Busy {
        /// Staging folder.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Computing one output failed.
    #[error("tensor `{output}`: {source}")]
    Output {
        /// Name of the output.
        output: String,
        /// Cause.
        source: Box<StreamError>,
    },
    /// An input does not have the number of elements that the computation needs.
    #[error("input `{input}` has {elements} elements, the output has {expected}")]
    Elements {
        /// Name of the input.
        input: String,
        /// Its number of elements.
        elements: usize,
        /// The number of elements of the output.
        expected: usize,
    },
    /// An output was asked for an input that it did not declare.
    #[error("input {index} was not declared ({declared} are)")]
    Undeclared {
        /// Position asked for.
        index: usize,
        /// Number of declared inputs.
        declared: usize,
    },
    /// A computation wrote too few or too many bytes.
    #[error("{written} bytes were written, {expected} are due")]
    Length {
        /// Bytes written, or that would have been.
        written: u64,
        /// Bytes of the part asked for.
        expected: u64,
    },
    /// Bytes of a tensor can't be read or written as numbers.
    #[error("`{tensor}`: {source}")]
    Block {
        /// Input or output.
        tensor: String,
        /// Cause.
        source: BlockError,
    },
    /// A checkpoint can't be read, or the output not be laid out.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A decomposition failed.
    #[error(transparent)]
    Linalg(#[from] LinalgError),
    /// The transformation itself failed.
    #[error("{0}")]
    Transform(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The run was stopped from outside; finished parts stay in the staging folder.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl StreamError {
    /// An error of the transformation itself.
    pub fn transform(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        StreamError::Transform(error.into())
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StreamError {
        let path = path.to_owned();
        move |source| StreamError::Io { path, source }
    }

    pub(super) fn of(self, output: &str) -> StreamError {
        StreamError::Output { output: output.to_owned(), source: Box::new(self) }
    }
}
