//! `firebrick specialize`: the whole way on one model and a set of text domains.

mod pipeline;
mod report;
mod stages;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_train::{TextData, domains};
use serde_json::json;

use crate::args::{Global, NamedFile, Usage};
use crate::models;
use crate::ui::Terminal;
use pipeline::{Domain, Pipeline};

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

impl Specialize {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let files = models::open(&self.model)?;
        let domains = self.domains(&files)?;
        let parameters: usize = files.checkpoint.tensors().iter().map(|t| t.elements()).sum();
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
        if settings.window < 2 || settings.batch == 0 || settings.rank == 0 {
            return Err(Usage("--window must be at least 2, --batch and --rank at least 1".into()).into());
        }
        if settings.drop_blocks + 2 > files.config.layers {
            let what = format!(
                "--drop-blocks {} leaves no layer between the first and the last",
                settings.drop_blocks
            );
            return Err(Usage(what).into());
        }
        if global.dry_run {
            let tokens = settings.steps * settings.batch * settings.window * domains.len();
            let names: Vec<&str> = domains.iter().map(|d| d.name.as_str()).collect();
            let facts = json!({"settings": settings, "domains": names, "tokens_to_train": tokens});
            return terminal.result(&facts, || {
                format!(
                    "{} domains, {tokens} tokens to train, output in {}",
                    domains.len(),
                    self.out.display()
                )
            });
        }
        let pipeline = Pipeline::begin(files, domains, settings, &self.out, global, terminal)?;
        let summary = pipeline.run()?;
        terminal.result(&summary, || summary.to_string())
    }

    fn domains(&self, files: &firebrick_models::ModelFiles) -> Result<Vec<Domain>> {
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
                let (train, held) = all.split(0.15, self.window)?;
                Ok(Domain { name: d.name.clone(), train, held })
            })
            .collect()
    }
}
