//! The error of this crate.

use firebrick_core::{Cancelled, Site};

/// What can go wrong while quantizing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A setting is out of range.
    #[error("{0}")]
    Setting(String),
    /// Settings no model can be quantized with; every problem is listed.
    #[error("quantization settings: {}", problems.join("; "))]
    Invalid {
        /// One line each.
        problems: Vec<String>,
    },
    /// A number is infinite or NaN.
    #[error("the {what} is not finite")]
    NotFinite {
        /// `weight` or `Hessian`.
        what: &'static str,
    },
    /// A Hessian that no damping makes positive definite.
    #[error("the Hessian is not positive definite even with damping 1: {0}")]
    NotDefinite(String),
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
    /// The weights or second moments of a site cannot be read.
    #[error(transparent)]
    Analysis(#[from] firebrick_analysis::AnalysisError),
    /// Stopped from outside.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}
