//! `firebrick convert`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_models::{Export, ExportType};
use firebrick_tensor::checkpoint::is_gguf_name;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Convert {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(value_name = "IN")]
    input: String,
    /// A path that ends in .gguf becomes a GGUF file, any other a Hugging Face folder.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Storage type: f32, f16, bf16, q8_0, q4_0, q4_1.
    #[arg(long = "type", default_value = "f32", value_name = "TYPE")]
    dtype: ExportType,
    /// PEFT adapter folder to merge into the weights; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
}

impl Convert {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.output, None, global)?;
        let gguf = is_gguf_name(&self.output);
        if self.dtype.dtype().is_packed() && !gguf {
            let what = format!("--type {}: packed types need an OUT that ends in .gguf", self.dtype.dtype());
            return Err(Usage(what).into());
        }
        let files = models::open(&self.input)?;
        if self.adapter.is_empty() {
            return self.write(Export::files(&files, self.dtype), global, terminal);
        }
        let device = models::device(global)?;
        let mut model = files.load(&device)?;
        for bank in models::adapters(&self.adapter, &model, &device)? {
            model.decoder = bank.merge(model.decoder, 1.0)?;
        }
        let export = Export::decoder(&model.name, &model.decoder, &model.tokenizer, self.dtype)
            .with_settings(json!({"adapters": self.adapter}));
        self.write(export, global, terminal)
    }

    fn write(&self, export: Export<'_>, global: &Global, terminal: &Terminal) -> Result<()> {
        let executor = models::executor(global, terminal);
        if global.dry_run {
            return models::planned(&export.plan(&self.output, &executor)?, terminal);
        }
        models::written(&export.write(&self.output, &executor)?, terminal)
    }
}
