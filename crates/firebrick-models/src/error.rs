//! The error of this crate.

use std::path::{Path, PathBuf};

use firebrick_core::Site;
use firebrick_tensor::checkpoint::CheckpointError;

/// What can go wrong with a model, its tokenizer, its chat template or its files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A tokenizer could not be read, built, used or written.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template does not parse, fails on these messages, or exceeds its limits.
    #[error("chat template: {0}")]
    ChatTemplate(String),
    /// Sampling settings or logits that no token can be drawn from.
    #[error("sampling: {0}")]
    Sampling(String),
    /// A checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint could not be written.
    #[error(transparent)]
    Stream(#[from] firebrick_tensor::stream::StreamError),
    /// A model could not be fetched from the Hugging Face Hub.
    #[error("Hugging Face Hub: {0}")]
    Hub(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// A configuration with wrong or missing values; every problem is listed.
    #[error("configuration: {0}")]
    Config(String),
    /// A format or architecture that is understood but not supported.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A file that does not describe a model; every problem is listed.
    #[error("{}: {}", path.display(), list(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problems: Vec<String>,
    },
    /// Weights that are missing or have the wrong shape; every problem is listed.
    #[error("weights: {}", list(problems))]
    Weights {
        /// One line per tensor.
        problems: Vec<String>,
    },
    /// A checkpoint lacks a tensor.
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor {
        /// Name of the tensor.
        name: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// A tensor has the wrong shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor or site.
        name: String,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
        /// The shape that is there.
        found: Vec<usize>,
    },
    /// A site has no weight of its own.
    #[error("`{site}` has no weight of its own")]
    NoWeight {
        /// The site.
        site: Site,
    },
    /// Text cannot be generated with these settings.
    #[error("generate: {0}")]
    Generate(String),
    /// The compute backend failed.
    #[error("backend: {0}")]
    Backend(String),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> ModelError {
        ModelError::Io { path: path.to_path_buf(), source }
    }
}

fn list(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => many.iter().map(|p| format!("\n  - {p}")).collect(),
    }
}
