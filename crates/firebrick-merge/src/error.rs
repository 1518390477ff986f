//! The error of this crate.

use std::path::PathBuf;

/// What can go wrong with a merge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A configuration that is not valid; every problem is listed.
    #[error("{}: {}", path.display(), list(problems))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where they are known.
        problems: Vec<String>,
    },
    /// The checkpoints do not fit together; every problem is listed.
    #[error("{}: the models do not fit together: {}", path.display(), list(problems))]
    Mismatch {
        /// The configuration.
        path: PathBuf,
        /// One line per tensor.
        problems: Vec<String>,
    },
    /// Models or settings that cannot be fused; every problem is listed.
    #[error("fusion: {}", list(problems))]
    Fusion {
        /// One line each.
        problems: Vec<String>,
    },
    /// Models or settings with which no vocabulary can be transplanted; every problem is listed.
    #[error("vocabulary transplant: {}", list(problems))]
    Transplant {
        /// One line each.
        problems: Vec<String>,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// A tensor that cannot be computed with.
    #[error("tensor `{tensor}`: {what}")]
    Numerics {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// A checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] firebrick_tensor::checkpoint::CheckpointError),
    /// A model or tokenizer could not be used.
    #[error(transparent)]
    Model(#[from] firebrick_models::ModelError),
    /// The work was stopped from outside.
    #[error(transparent)]
    Cancelled(#[from] firebrick_core::Cancelled),
    /// The merge could not run.
    #[error(transparent)]
    Stream(#[from] firebrick_tensor::stream::StreamError),
    /// Models or settings with which coefficients can't be learned or searched; every problem is listed.
    #[error("merging: {}", list(problems))]
    Settings {
        /// One line each, naming the setting or the site.
        problems: Vec<String>,
    },
    /// Coefficients could not be learned.
    #[error(transparent)]
    Train(#[from] firebrick_train::TrainError),
}

fn list(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        many => many.iter().map(|p| format!("\n  - {p}")).collect(),
    }
}
