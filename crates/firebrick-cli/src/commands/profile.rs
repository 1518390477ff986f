//! `firebrick profile`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_analysis::{ProfileOptions, RankBudget, Report, bit_plans, profile, rank_plans};
use firebrick_core::Seed;
use firebrick_quant::{GptqConfig, gptq_bit_losses};
use serde_json::json;

use crate::args::{Global, Quantizer};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Profile {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many windows.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// Mean bits per weight of the plan it suggests.
    #[arg(long, default_value_t = 4.0, value_name = "BITS")]
    mean_bits: f64,
    /// What the bits are planned for; GPTQ runs on every layer at every number of bits, which takes a few times as long.
    #[arg(long, value_enum, default_value = "rtn")]
    quantizer: Quantizer,
    /// Mean rank of the plan it suggests.
    #[arg(long, default_value_t = 8.0, value_name = "RANK")]
    mean_rank: f64,
    /// Folder for profile.json, bits.toml, ranks.toml, report.json and report.html.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Profile {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, None, global)?;
        models::check_windows(self.window, self.windows)?;
        let files = models::open(&self.model)?;
        let data = models::text(&self.data, &files.tokenizer, self.window)?;
        if global.dry_run {
            let windows = data.spread(self.window, self.windows).len();
            let facts = json!({"tokens": windows * self.window, "linear_layers": files.sites().block_linears().len()});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        let model = files.load(&models::device(global)?)?;
        let options = ProfileOptions {
            model: model.name.clone(),
            window: self.window,
            max_windows: self.windows,
            seed: Seed(global.seed),
            ..ProfileOptions::default()
        };
        let found = profile(&model.decoder, &data.ids, &options, terminal)?;
        let found = match self.quantizer {
            Quantizer::Rtn => found,
            Quantizer::Gptq => {
                let text = data.spread(self.window, self.windows).concat();
                let settings = GptqConfig { act_order: true, ..GptqConfig::default() };
                gptq_bit_losses(found, &model.decoder, &text, settings, terminal)?
            }
        };
        let sites = model.decoder.sites();
        let seeds: Vec<Seed> = (0..3).map(|i| Seed(global.seed).derive(&format!("plan/{i}"))).collect();
        let bits = bit_plans(&found, sites, self.mean_bits, &options.bits, &seeds)?;
        let ranks = rank_plans(&found, sites, RankBudget::MeanRank(self.mean_rank), &options.ranks, &seeds)?;
        let report = Report::new(format!("Profile of {}", model.name))
            .fact("model", &model.name)
            .fact("tokens", found.tokens)
            .sections(found.sections())
            .section(bits.section(&format!("Bits, {} on average", self.mean_bits)))
            .section(ranks.section(&format!("Ranks, {} on average", self.mean_rank)));
        models::write_folder(&self.out, |folder| {
            found.save(folder.join("profile.json"))?;
            bits.planned.plan.save(folder.join("bits.toml"))?;
            ranks.planned.plan.save(folder.join("ranks.toml"))?;
            Ok(report.save(folder)?)
        })?;
        let output = json!({"out": self.out, "tokens": found.tokens, "layers": found.layers});
        terminal.result(&output, || format!("wrote {}", self.out.join("report.html").display()))
    }
}
