//! `firebrick train`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_core::Seed;
use firebrick_peft::{LoraConfig, fit_lora, hf};
use firebrick_train::TrainConfig;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Train {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Text file, one document; or .jsonl, one document a line under `text`.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// What to train.
    #[arg(long, default_value = "lora", value_parser = ["lora"])]
    method: String,
    /// Rank of the adapters, if there is no plan.
    #[arg(long, default_value_t = 8, value_name = "R")]
    rank: usize,
    /// Strength of the adapters; twice the rank if absent.
    #[arg(long, value_name = "A")]
    alpha: Option<f64>,
    /// Probability that an element of the adapters' input is dropped.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    dropout: f64,
    /// Ranks per site, as `firebrick profile` writes them; where it gives none there is no adapter.
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
        let work = self.out.join(".train");
        models::check_output(&self.out, Some(&work), global)?;
        let lora = LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            dropout: self.dropout,
            rslora: false,
        };
        if lora.rank == 0 || !lora.alpha.is_finite() || !(0.0..1.0).contains(&lora.dropout) {
            let what = "--rank must be at least 1, --alpha a number, and --dropout at least 0 and below 1";
            return Err(Usage(what.into()).into());
        }
        let mut config = TrainConfig {
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
        let files = models::open(&self.model)?;
        let targets = files.sites().block_linears();
        let plan = match &self.plan {
            Some(path) => Some(models::plan(path, &files)?),
            None => None,
        };
        let data = models::text(&self.data, &files.tokenizer, self.window)?;
        if global.dry_run {
            let tokens = [self.batch, self.accumulate, self.window]
                .into_iter()
                .fold(self.steps, usize::saturating_mul);
            let facts =
                json!({"tokens_in_text": data.ids.len(), "tokens_to_train": tokens, "sites": targets.len()});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        let alphas: Vec<String> = targets
            .iter()
            .filter_map(|site| Some(format!(", {site} {}", plan.as_ref()?.get(site)?.alpha?)))
            .collect();
        config.identity = Some(format!(
            "model {}, rank {}, alpha {}, dropout {}{}",
            files.digest()?,
            lora.rank,
            lora.alpha,
            lora.dropout,
            alphas.concat()
        ));
        if global.resume && work.exists() {
            models::sweep(&self.out)?;
        } else if global.overwrite {
            models::discard(&work)?;
        }
        let device = models::device(global)?.autodiff();
        let model = files.load(&device)?;
        let seed = Seed(global.seed);
        let bank = match &plan {
            Some(plan) => lora.init_plan(model.decoder.sites(), plan, seed, &device)?,
            None => lora.init(model.decoder.sites(), &targets, seed, &device)?,
        };
        let (bank, report) = fit_lora(&model.decoder, &[], bank, &config, &data, terminal, global.resume)?;
        hf::save(&bank, model.decoder.sites(), &model.name, &self.out)?;
        models::copy_log(&work.join("log.jsonl"), &self.out.join("log.jsonl"))?;
        models::discard(&work)?;
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
