//! `firebrick specialize`: the whole way on one model and a set of text domains.

mod evaluate;
mod pipeline;
mod report;
mod results;
mod stages;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use firebrick_models::ModelFiles;
use firebrick_train::{TextData, domains};
use serde_json::json;

use crate::args::{Global, NamedFile, Usage};
use crate::models;
use crate::ui::Terminal;
use pipeline::{Domain, Pipeline, Start};

#[derive(Args)]
pub struct Specialize {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, default_value = "embedded", value_name = "M")]
    model: String,
    /// A domain and its text; the embedded five domains if there is none.
    #[arg(long, value_name = "NAME=FILE", num_args = 1..)]
    data: Vec<NamedFile>,
    /// Folder for adapters, merged checkpoint, GGUF, student and report.
    #[arg(long, default_value = "firebrick-out", value_name = "DIR")]
    out: PathBuf,
    /// Optimizer steps per adapter.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Mean rank of the adapters.
    #[arg(long, default_value_t = 8, value_name = "R")]
    rank: usize,
    /// Mean bits per weight of the quantized model.
    #[arg(long, default_value_t = 3.0, value_name = "BITS")]
    bits: f64,
    /// Blocks that the distilled student goes without; a quarter of them if absent.
    #[arg(long, value_name = "N")]
    drop_blocks: Option<usize>,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// Windows per training pass.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Highest learning rate of the adapters.
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// At most this many held-out tokens per domain and evaluation.
    #[arg(long, value_name = "N")]
    eval_tokens: Option<usize>,
}

/// Settings with every default filled in.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Settings {
    pub seed: u64,
    pub steps: usize,
    pub student_steps: usize,
    pub rank: usize,
    pub bits: f64,
    pub drop_blocks: usize,
    pub window: usize,
    pub batch: usize,
    pub learning_rate: f64,
    pub eval_tokens: usize,
    /// Whether the model is small enough to try every plan and every adapter on every domain.
    pub thorough: bool,
}

impl Settings {
    /// What is wrong with these settings for a model of `layers` layers.
    fn problems(&self, layers: usize) -> Vec<String> {
        let checks = [
            (self.window >= 2, "--window must be at least 2".to_string()),
            (self.batch >= 1, "--batch must be at least 1".to_string()),
            (self.steps >= 1, "--steps must be at least 1".to_string()),
            ((2..=32).contains(&self.rank), format!("--rank {} is not between 2 and 32", self.rank)),
            ((2.0..=8.0).contains(&self.bits), format!("--bits {} is not between 2 and 8", self.bits)),
            (
                self.learning_rate.is_finite() && self.learning_rate > 0.0,
                format!("--learning-rate {} is not more than 0", self.learning_rate),
            ),
            (
                self.drop_blocks.saturating_add(2) <= layers,
                format!("--drop-blocks {} leaves no layer between the first and the last", self.drop_blocks),
            ),
        ];
        checks.into_iter().filter(|(fine, _)| !fine).map(|(_, problem)| problem).collect()
    }
}

impl Specialize {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let files = models::open(&self.model)?;
        let parameters = models::parameters(&files);
        let small = parameters < 20_000_000;
        let settings = Settings {
            seed: global.seed,
            steps: self.steps.unwrap_or(if small { 40 } else { 24 }),
            student_steps: self.steps.unwrap_or(if small { 40 } else { 12 }),
            rank: self.rank,
            bits: self.bits,
            drop_blocks: self.drop_blocks.unwrap_or(files.config.layers / 4),
            window: self.window.min(files.config.max_tokens),
            batch: self.batch.unwrap_or(if small { 8 } else { 4 }),
            learning_rate: self.learning_rate.unwrap_or(if small { 1e-2 } else { 1e-3 }),
            eval_tokens: self.eval_tokens.unwrap_or(if small { 8192 } else { 4096 }),
            thorough: small,
        };
        let problems = settings.problems(files.config.layers);
        if !problems.is_empty() {
            return Err(Usage(problems.join("; ")).into());
        }
        let domains = self.domains(&files, settings.window)?;
        if global.dry_run {
            let tokens = [settings.batch, settings.window, domains.len()]
                .into_iter()
                .fold(settings.steps, usize::saturating_mul);
            let names: Vec<&str> = domains.iter().map(|d| d.name.as_str()).collect();
            let facts = json!({"settings": settings, "domains": names, "tokens_to_train": tokens});
            let texts: Vec<&Path> = self.data.iter().map(|d| d.path.as_path()).collect();
            return models::preview(&files, &texts, &[&self.out], facts, terminal);
        }
        let mut summary = match Pipeline::begin(files, domains, settings, &self.out, global, terminal)? {
            Start::Run(pipeline) => pipeline.run()?,
            Start::Complete(summary) => summary,
        };
        // Not in the file: the same run has the same bytes wherever it lies.
        summary.out = Some(self.out.clone());
        terminal.result(&summary, || summary.to_string())
    }

    fn domains(&self, files: &ModelFiles, window: usize) -> Result<Vec<Domain>> {
        let tokenizer = &files.tokenizer;
        if self.data.is_empty() {
            return domains()
                .iter()
                .map(|d| {
                    let train = TextData::from_documents(d.train_documents(), tokenizer)?;
                    let held = TextData::from_documents(d.held_out_documents(), tokenizer)?;
                    Ok(Domain { name: d.name.into(), train, held })
                })
                .collect();
        }
        let mut names: Vec<&str> = self.data.iter().map(|d| d.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Usage(format!("--data: the name `{}` is given twice", twice[0])).into());
        }
        self.data
            .iter()
            .map(|d| {
                let all = TextData::from_file(&d.path, tokenizer)?;
                let short = || {
                    let (name, path) = (&d.name, d.path.display());
                    format!(
                        "domain `{name}` ({path}) is too short for --window {window}, held-out part included"
                    )
                };
                let (train, held) = all.split(0.15, window).with_context(short)?;
                Ok(Domain { name: d.name.clone(), train, held })
            })
            .collect()
    }
}
