//! `firebrick extract-lora`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_core::{Seed, Selector};
use firebrick_merge::extract_lora::ExtractLora as Settings;
use serde_json::json;

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct ExtractLora {
    /// Base model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(value_name = "BASE")]
    base: String,
    /// Model that was made of it by fine-tuning.
    #[arg(value_name = "FINETUNED")]
    tuned: String,
    /// PEFT folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Largest rank of a layer.
    #[arg(long, default_value_t = Settings::default().rank, value_name = "N")]
    rank: usize,
    /// Plan with a `rank` for some layers, as `firebrick profile` writes one.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Leave out singular values of at most this size, such as the rounding of weights stored in 16 bits.
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    epsilon: f64,
    /// Sites that the adapter does not change, such as `embed, head`.
    #[arg(long, value_name = "SELECTOR")]
    leave_out: Option<Selector>,
    /// Sites whose weight the adapter holds whole (modules_to_save), such as `layers.-1.mlp`; norms and embeddings always are.
    #[arg(long, value_name = "SELECTOR")]
    save_whole: Option<Selector>,
    /// Give the embedding factors instead of saving it whole; not for models that tie their head to it.
    #[arg(long)]
    embedding: bool,
    /// Put the singular values into A alone instead of their roots into both factors.
    #[arg(long)]
    scale_in_a: bool,
    /// What adapter_config.json calls the base model; BASE if absent.
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
}

impl ExtractLora {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_folder(&self.out, global)?;
        // What is wrong with both is listed at once, with what does not fit.
        let (base, tuned) = (models::open_unchecked(&self.base)?, models::open_unchecked(&self.tuned)?);
        let settings = Settings {
            rank: self.rank,
            epsilon: self.epsilon,
            distribute: !self.scale_in_a,
            plan: self.plan.as_ref().map(|path| models::plan(path, &base)).transpose()?,
            leave_out: self.leave_out.clone(),
            save_whole: self.save_whole.clone(),
            embedding: self.embedding,
            seed: Seed(global.seed),
        };
        if global.dry_run {
            settings.check(&base, &tuned)?;
            let facts = json!({"fine_tune": tuned.name, "rank": self.rank});
            return models::preview(&base, &[], &[&self.out], facts, terminal);
        }
        let found = settings.extract(&base, &tuned, terminal)?;
        let name = self.base_name.as_deref().unwrap_or(&self.base);
        models::write_folder(&self.out, |folder| Ok(found.save(&base, name, folder)?))?;
        let mut output = serde_json::to_value(&found.report)?;
        output["out"] = json!(self.out);
        terminal.result(&output, || format!("{}\nwrote {}", found.report, self.out.display()))
    }
}
