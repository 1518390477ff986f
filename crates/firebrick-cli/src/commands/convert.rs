//! `firebrick convert`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_models::{Export, ExportType};
use firebrick_tensor::checkpoint::is_gguf_name;
use firebrick_tensor::imatrix::ImportanceMatrix;
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
    /// Storage type: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs.
    #[arg(long = "type", default_value = "f32", value_name = "TYPE")]
    dtype: ExportType,
    /// PEFT adapter folder to merge into the weights; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Importance matrix, as `firebrick imatrix` or llama.cpp writes it: packed types round what matters most best.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
}

impl Convert {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.output, None, global)?;
        let gguf = is_gguf_name(&self.output);
        if self.dtype.dtype().is_packed() && !gguf {
            let what = format!("--type {}: packed types need an OUT that ends in .gguf", self.dtype.dtype());
            return Err(Usage(what).into());
        }
        if self.imatrix.is_some() && !self.dtype.dtype().is_packed() {
            return Err(Usage(format!("--imatrix: {} has no blocks to weigh", self.dtype.dtype())).into());
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

    fn write(&self, mut export: Export<'_>, global: &Global, terminal: &Terminal) -> Result<()> {
        if let Some(path) = &self.imatrix {
            export = export.with_imatrix(&ImportanceMatrix::read(path)?)?;
        }
        let mut fallbacks = BTreeMap::<&str, usize>::new();
        export.fallbacks().iter().for_each(|(_, dtype)| *fallbacks.entry(dtype.name()).or_default() += 1);
        for (dtype, count) in fallbacks {
            let wanted = self.dtype.dtype();
            terminal.say(&format!("warning: the blocks of {wanted} do not divide the rows of {count} tensors, which become {dtype}"));
        }
        let executor = models::executor(global, terminal);
        if global.dry_run {
            return models::planned(&export.plan(&self.output, &executor)?, terminal);
        }
        models::written(&export.write(&self.output, &executor)?, terminal)
    }
}
