//! `firebrick imatrix`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_analysis::importance;
use serde_json::json;

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Imatrix {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many windows, spread over the text.
    #[arg(long, default_value_t = 64, value_name = "N")]
    windows: usize,
    /// Importance matrix in llama.cpp's GGUF form.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Imatrix {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_file(&self.out, global)?;
        models::check_windows(self.window, self.windows)?;
        let files = models::open(&self.model)?;
        let data = models::text(&self.data, &files.tokenizer, self.window)?;
        let text = data.spread(self.window, self.windows).concat();
        if global.dry_run {
            let facts = json!({"tokens": text.len(), "linear_layers": files.sites().block_linears().len()});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        let model = files.load(&models::device(global)?)?;
        let mut found = importance(&model.decoder, &text, self.window, terminal)?;
        found.datasets =
            self.data.file_name().map(|n| n.to_string_lossy().into_owned()).into_iter().collect();
        found.write(&self.out)?;
        let output = json!({"out": self.out, "entries": found.entries.len(), "tokens": text.len()});
        terminal.result(&output, || {
            format!("wrote {}: {} layers over {} tokens", self.out.display(), found.entries.len(), text.len())
        })
    }
}
