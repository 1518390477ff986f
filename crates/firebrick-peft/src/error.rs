//! The error of this crate.

use std::path::PathBuf;

use firebrick_core::Site;
use firebrick_tensor::checkpoint::CheckpointError;

/// What can go wrong with an adapter or its files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// An adapter was asked for where there is no linear layer.
    #[error("`{site}` is not a linear layer, so it cannot carry an adapter")]
    NotLinear {
        /// The site.
        site: Site,
    },
    /// Nothing is left to adapt.
    #[error("no site to adapt: the plan gives no linear layer a rank")]
    Nothing,
    /// A setting is out of range.
    #[error("`{site}`: {what}")]
    Setting {
        /// The site.
        site: Site,
        /// The setting and its range.
        what: String,
    },
    /// Parts that make no bank; every problem is listed.
    #[error("not a bank of adapters: {}", problems.join("; "))]
    Parts {
        /// One line each, naming the site.
        problems: Vec<String>,
    },
    /// Two banks, or a bank and a model, do not fit together.
    #[error("`{site}`: adapter of shape {found:?} on a layer of shape {expected:?} (d_in, d_out)")]
    Shape {
        /// The site.
        site: Site,
        /// Widths `(d_in, d_out)` of the adapter.
        found: (usize, usize),
        /// Widths `(d_in, d_out)` of the layer.
        expected: (usize, usize),
    },
    /// An adapter folder is not one we can use; every problem is listed.
    #[error("{}: {}", path.display(), problems.join("; "))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problems: Vec<String>,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The adapter's tensors could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model refused a weight.
    #[error(transparent)]
    Model(#[from] firebrick_models::ModelError),
}
