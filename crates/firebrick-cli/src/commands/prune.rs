//! `firebrick prune`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_analysis::{ProfileOptions, profile};
use firebrick_core::{Part, Seed, Site};
use firebrick_elastic::{DropKind, DropPlan};
use firebrick_models::{Decoder, Export, ExportType};
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
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many windows.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// Storage type of the output.
    #[arg(long = "type", default_value = "f32", value_name = "TYPE")]
    dtype: ExportType,
    /// Folder or .gguf file: blocks are cut out, and sublayers write nothing into the residual stream (their last projection
    /// is zero). A path that ends in .toml gets a plan instead.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
}

impl Prune {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let to_plan = self.out.extension().is_some_and(|e| e == "toml");
        match to_plan {
            true => models::check_file(&self.out, global)?,
            false => models::check_output(&self.out, None, global)?,
        }
        models::check_windows(self.window, self.windows)?;
        let files = models::open(&self.model)?;
        let data = models::text(&self.data, &files.tokenizer, self.window)?;
        let layers = files.config.layers;
        let candidates = match (self.ends, self.drop) {
            (false, _) => layers.saturating_sub(2),
            // One block has to stay.
            (true, DropKind::Block) => layers - 1,
            (true, _) => layers,
        } * self.drop.parts().len();
        if self.count > candidates {
            let what = format!("--count {}: {} has {candidates} that may go", self.count, files.name);
            return Err(Usage(what).into());
        }
        if global.dry_run {
            let windows = data.spread(self.window, self.windows).len();
            let facts =
                json!({"tokens": windows * self.window, "candidates": candidates, "count": self.count});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        if !to_plan {
            models::check_export(Export::files(&files, self.dtype), &self.out, global, terminal)?;
        }
        let model = files.load(&models::device(global)?)?;
        let options = ProfileOptions {
            model: model.name.clone(),
            // Influence is all that decides.
            metrics: BTreeSet::new(),
            window: self.window,
            max_windows: self.windows,
            seed: Seed(global.seed),
            ..ProfileOptions::default()
        };
        let found = profile(&model.decoder, &data.ids, &options, terminal)?;
        let plan = DropPlan::lowest(&found.influence(), self.drop, self.count, !self.ends)?;
        let names: Vec<String> = plan.sites.iter().map(|s| s.to_string()).collect();
        if to_plan {
            plan.to_layer_plan().save(&self.out)?;
        } else {
            let (kept, decoder) = match self.drop {
                DropKind::Block => (plan.kept_layers(layers)?, model.decoder),
                _ => ((0..layers).collect(), silenced(model.decoder, &plan)),
            };
            Export::decoder(&model.name, &decoder, &model.tokenizer, self.dtype)
                .with_layers(kept)
                .with_settings(json!({"dropped": names}))
                .write(&self.out, &models::executor(global, terminal))?;
        }
        let output = json!({"out": self.out, "dropped": names});
        terminal.result(&output, || format!("wrote {} without {}", self.out.display(), names.join(", ")))
    }
}

/// `decoder` with zeros in the projections, and their biases, that the plan's sublayers end with, so that they add nothing.
fn silenced(decoder: Decoder, plan: &DropPlan) -> Decoder {
    plan.sites.iter().fold(decoder, |decoder, site| {
        let part = if site.part == Part::AttnSublayer { Part::AttnO } else { Part::MlpDown };
        let parts = [Some(part), part.bias()].into_iter().flatten();
        parts.map(|part| Site { part, ..site }).fold(decoder, |decoder, last| match decoder.weight(last) {
            Some(weight) => decoder.with_weight(last, weight.zeros_like()),
            None => decoder,
        })
    })
}
