//! What can go wrong in this crate.

use std::path::PathBuf;

use firebrick_core::{BudgetError, Cancelled, Site};
use firebrick_tensor::linalg::LinalgError;

/// A profile cannot be taken, read or spent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnalysisError {
    /// The calibration text is too short.
    #[error("the calibration text has {have} token(s); a profile needs at least {need}")]
    TooFewTokens {
        /// Tokens given.
        have: usize,
        /// Tokens needed.
        need: usize,
    },
    /// Token ids outside the vocabulary.
    #[error("{count} token id(s) lie outside the vocabulary of {vocab}, first {id} at position {position}")]
    Tokens {
        /// How many.
        count: usize,
        /// The first of them.
        id: u32,
        /// Its place in the text, from 0.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Options no profile or allocation can follow; every problem is listed.
    #[error("wrong options:{}", lines(problems))]
    Options {
        /// What is wrong.
        problems: Vec<String>,
    },
    /// The linear algebra of a site failed, mostly because a weight or an activation is not finite.
    #[error("{site}: {error}")]
    Linalg {
        /// The site.
        site: Site,
        /// What failed.
        #[source]
        error: LinalgError,
    },
    /// The numbers of a site cannot be read or are not finite.
    #[error("{site}: {what}")]
    Site {
        /// The site.
        site: Site,
        /// What is wrong there.
        what: String,
    },
    /// A profile and a model do not belong together; every problem is listed.
    #[error("the profile does not fit the model:{}", lines(problems))]
    Mismatch {
        /// What is wrong.
        problems: Vec<String>,
    },
    /// A budget cannot be spent.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The caller stopped the work.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// A profile or report is not JSON of the right form.
    #[error("not a profile or report of this release: {0}")]
    Json(#[from] serde_json::Error),
    /// The file was written by another version.
    #[error("version {found}; this release reads version {expected}")]
    Version {
        /// The version in the file.
        found: u64,
        /// The version this release reads.
        expected: u32,
    },
    /// A file cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
}

fn lines(problems: &[String]) -> String {
    problems.iter().map(|p| format!("\n- {p}")).collect()
}
