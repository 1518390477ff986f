//! `firebrick train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_core::{LayerPlan, Seed};
use firebrick_peft::{LoraConfig, fit_lora, hf};
use firebrick_train::{TextData, TrainConfig};
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Train {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Text file; documents are separated by empty lines.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// What to train.
    #[arg(long, default_value = "lora", value_parser = ["lora"])]
    method: String,
    /// Rank of the adapters, where the plan is silent.
    #[arg(long, default_value_t = 8, value_name = "R")]
    rank: usize,
    /// Strength of the adapters; twice the rank if absent.
    #[arg(long, value_name = "A")]
    alpha: Option<f64>,
    /// Probability that an element of the adapters' input is dropped.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    dropout: f64,
    /// Ranks per site, as `firebrick profile` writes them.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 200, value_name = "N")]
    steps: usize,
    /// Windows per pass.
    #[arg(long, default_value_t = 4, value_name = "N")]
    batch: usize,
    /// Passes per step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    accumulate: usize,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 1e-3, value_name = "X")]
    learning_rate: f64,
    /// Steps between checkpoints to resume from; 0 for none but the last.
    #[arg(long, default_value_t = 50, value_name = "N")]
    checkpoint_every: usize,
    /// Adapter folder to write (Hugging Face PEFT).
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Train {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, global)?;
        let files = models::open(&self.model)?;
        let targets = files.sites().block_linears();
        let plan = match &self.plan {
            Some(path) => Some(LayerPlan::load(path)?.resolve(files.sites())?),
            None => None,
        };
        let data = TextData::from_file(&self.data, &files.tokenizer)?;
        let work = self.out.join(".train");
        if global.overwrite && work.exists() {
            std::fs::remove_dir_all(&work)?;
        }
        let config = TrainConfig {
            steps: self.steps,
            batch: self.batch,
            accumulate: self.accumulate,
            window: self.window,
            learning_rate: self.learning_rate,
            seed: global.seed,
            checkpoint_every: self.checkpoint_every,
            out: Some(work.clone()),
            ..TrainConfig::default()
        };
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(Usage(problems.join("; ")).into());
        }
        if global.dry_run {
            let tokens = self.steps * self.batch * self.accumulate * self.window;
            let facts =
                json!({"tokens_in_text": data.ids.len(), "tokens_to_train": tokens, "sites": targets.len()});
            return terminal
                .result(&facts, || format!("{tokens} tokens to train, the text has {}", data.ids.len()));
        }
        let device = models::device(global)?.autodiff();
        let model = files.load(&device)?;
        let lora = LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            dropout: self.dropout,
            rslora: false,
        };
        let seed = Seed(global.seed);
        let bank = match &plan {
            Some(plan) => lora.init_plan(model.decoder.sites(), plan, seed, &device)?,
            None => lora.init(model.decoder.sites(), &targets, seed, &device)?,
        };
        let (bank, report) = fit_lora(&model.decoder, &[], bank, &config, &data, terminal, global.resume)?;
        hf::save(&bank, model.decoder.sites(), &model.name, &self.out)?;
        std::fs::rename(work.join("log.jsonl"), self.out.join("log.jsonl"))?;
        std::fs::remove_dir_all(&work)?;
        let output = json!({
            "out": self.out,
            "steps": report.steps,
            "tokens": report.tokens,
            "first_loss": report.first_loss(),
            "final_loss": report.final_loss(),
            "seconds": report.seconds,
        });
        terminal.result(&output, || {
            let loss = |l: Option<f64>| l.map_or("-".into(), |l| format!("{l:.4}"));
            format!(
                "wrote {}: {} steps, loss {} -> {}",
                self.out.display(),
                report.steps,
                loss(report.first_loss()),
                loss(report.final_loss())
            )
        })
    }
}
