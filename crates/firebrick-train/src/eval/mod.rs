//! Evaluation: perplexity of a text, distance from a reference model, and tasks by log-likelihood.

mod glosses;
mod loglikelihood;
mod metrics;
mod perplexity;
mod read;
mod reference;
mod results;
mod run;
mod score;
mod strided;
mod task;
mod template;

pub use loglikelihood::{Batching, Request, loglikelihoods};
pub use metrics::{ClassScore, Confusion, mean_and_error};
pub use perplexity::{EvalReport, perplexity};
pub use reference::{ReferenceReport, compare};
pub use results::results;
pub use run::{Sample, Score, TaskResult, TaskSettings, run_task};
pub use strided::strided_perplexity;
pub use task::{BUILT_IN, EvalTask, Metric, TaskItem, TaskKind};
