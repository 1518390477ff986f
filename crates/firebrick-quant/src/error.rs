//! The error of this crate.

use firebrick_core::{Cancelled, Site};

/// What can go wrong while quantizing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A setting is out of range.
    #[error("{0}")]
    Setting(String),
    /// Sizes of a weight and its Hessian or codes disagree.
    #[error("{what}: expected {expected}, found {found}")]
    Size {
        /// What was measured.
        what: &'static str,
        /// The size it should have.
        expected: usize,
        /// The size it has.
        found: usize,
    },
    /// There is no calibration text to quantize with.
    #[error("GPTQ needs calibration text: {tokens} tokens do not fill one window of {window}")]
    NoCalibration {
        /// Tokens given.
        tokens: usize,
        /// Length of a window.
        window: usize,
    },
    /// A site cannot be quantized.
    #[error("`{site}`: {what}")]
    Site {
        /// The site.
        site: Site,
        /// Why not.
        what: String,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] firebrick_models::ModelError),
    /// A file could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] firebrick_tensor::checkpoint::CheckpointError),
    /// Stopped from outside.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}
