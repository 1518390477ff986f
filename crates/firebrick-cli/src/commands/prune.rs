//! `firebrick prune`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_analysis::{ProfileOptions, profile};
use firebrick_core::Seed;
use firebrick_elastic::{DropKind, DropPlan};
use firebrick_models::{Export, ExportType};
use firebrick_train::TextData;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Prune {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Text to measure influence on.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// What to leave out: attn, mlp, joint or block.
    #[arg(long, value_name = "KIND")]
    drop: DropKind,
    /// How many of them.
    #[arg(long, value_name = "N")]
    count: usize,
    /// Consider the first and the last layer, too.
    #[arg(long)]
    ends: bool,
    /// Storage type of the output.
    #[arg(long = "type", default_value = "f32", value_name = "TYPE")]
    dtype: ExportType,
    /// Model without the blocks; sublayers become a plan (TOML), since no file format can leave them out.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
}

impl Prune {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, global)?;
        let toml = self.out.extension().is_some_and(|e| e == "toml");
        if self.drop != DropKind::Block && !toml {
            return Err(Usage(
                "no file format can leave out sublayers; give an --out that ends in .toml for a plan".into(),
            )
            .into());
        }
        let model = models::load(&self.model, &models::device(global)?)?;
        let data = TextData::from_file(&self.data, &model.tokenizer)?;
        let options = ProfileOptions {
            model: model.name.clone(),
            seed: Seed(global.seed),
            ..ProfileOptions::default()
        };
        let found = profile(&model.decoder, &data.ids, &options, terminal)?;
        let plan = DropPlan::lowest(&found.influence(), self.drop, self.count, !self.ends)?;
        let names: Vec<String> = plan.sites.iter().map(|s| s.to_string()).collect();
        if toml {
            plan.to_layer_plan().save(&self.out)?;
        } else {
            let kept = plan.kept_layers(model.decoder.config().layers)?;
            Export::decoder(&model.name, &model.decoder, &model.tokenizer, self.dtype)
                .with_layers(kept)
                .write(&self.out, &models::executor(global, terminal))?;
        }
        let output = json!({"out": self.out, "dropped": names});
        terminal.result(&output, || format!("wrote {} without {}", self.out.display(), names.join(", ")))
    }
}
