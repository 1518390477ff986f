//! `firebrick eval`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_core::Brick;
use firebrick_train::{EvalReport, TextData, perplexity};
use serde::Serialize;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Eval {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Text file.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 512, value_name = "N")]
    window: usize,
    /// Windows at a time.
    #[arg(long, default_value_t = 4, value_name = "N")]
    batch: usize,
    /// Type to compute in.
    #[arg(long, default_value = "f32", value_parser = ["f32"])]
    dtype: String,
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    dtype: &'a str,
    window: usize,
    #[serde(flatten)]
    report: &'a EvalReport,
}

impl Eval {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        if self.window < 2 || self.batch == 0 {
            return Err(Usage("--window must be at least 2 and --batch at least 1".into()).into());
        }
        let device = models::device(global)?;
        let model = models::load(&self.model, &device)?;
        let banks = models::adapters(&self.adapter, &model, &device)?;
        let bricks: Vec<&dyn Brick> = banks.iter().map(|b| b as &dyn Brick).collect();
        // The text as one piece, without special tokens: windows mean the same as in transformers.
        let text = models::read_text(&self.data)?;
        let data = TextData::new(model.tokenizer.encode(&text, false)?, text.len());
        let report =
            perplexity(&model.decoder, &bricks, &data.ids, data.bytes, self.window, self.batch, terminal)?;
        let output = Output { model: &model.name, dtype: &self.dtype, window: self.window, report: &report };
        terminal.result(&output, || {
            let bits = report.bits_per_byte.map_or(String::new(), |b| format!(", {b:.4} bits per byte"));
            format!("perplexity {:.4} on {} tokens{bits}", report.perplexity, report.tokens)
        })
    }
}
