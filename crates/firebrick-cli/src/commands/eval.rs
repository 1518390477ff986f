//! `firebrick eval`.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::Args;
use firebrick_core::{Brick, Run, Task};
use firebrick_models::Decoder;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Metadata, TensorSpec, write_safetensors};
use firebrick_train::{EvalReport, TextData, perplexity, token_tensor};
use serde::Serialize;
use serde_json::json;

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
    /// Write the logits at the last position of every window, `logits: [windows, vocabulary]`, as safetensors.
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
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
        if let Some(out) = &self.logits {
            models::check_output(out, None, global)?;
        }
        let files = models::open(&self.model)?;
        // The text as one piece, without special tokens: windows mean the same as in transformers.
        let text = models::read_text(&self.data)?;
        let data = TextData::new(files.tokenizer.encode(&text, false)?, text.len());
        models::fills(data.ids.len(), self.window, &self.data)?;
        if global.dry_run {
            let facts = json!({"tokens": data.ids.len(), "windows": data.windows(self.window).len()});
            let writes: Vec<&Path> = self.logits.iter().map(PathBuf::as_path).collect();
            return models::preview(&files, &[&self.data], &writes, facts, terminal);
        }
        let device = models::device(global)?;
        let model = files.load(&device)?;
        let banks = models::adapters(&self.adapter, &model, &device)?;
        let bricks: Vec<&dyn Brick> = banks.iter().map(|b| b as &dyn Brick).collect();
        let report =
            perplexity(&model.decoder, &bricks, &data.ids, data.bytes, self.window, self.batch, terminal)?;
        if let Some(out) = &self.logits {
            self.save_logits(&model.decoder, &bricks, &data, out, terminal)?;
        }
        let output = Output { model: &model.name, dtype: &self.dtype, window: self.window, report: &report };
        terminal.result(&output, || {
            let bits = report.bits_per_byte.map_or(String::new(), |b| format!(", {b:.4} bits per byte"));
            format!("perplexity {:.4} on {} tokens{bits}", report.perplexity, report.tokens)
        })
    }

    fn save_logits(
        &self,
        decoder: &Decoder,
        bricks: &[&dyn Brick],
        data: &TextData,
        out: &Path,
        terminal: &Terminal,
    ) -> Result<()> {
        let windows: Vec<&[u32]> = data.windows(self.window).collect();
        let mut bytes = Vec::new();
        let mut task = Task::begin(terminal, "logits", Some(windows.len() as u64), "windows");
        for batch in windows.chunks(self.batch) {
            let mut run = Run::new(bricks);
            let hidden = decoder.hidden(token_tensor(batch, &decoder.device()), &mut run);
            let logits = decoder.logits(hidden.narrow(1, self.window - 1, 1), &mut run);
            let values = logits.into_data().try_into_vec_as::<f32>().map_err(|e| anyhow!("{e:?}"))?;
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            task.advance(batch.len() as u64, "")?;
        }
        let spec = TensorSpec::new("logits", DType::F32, [windows.len(), decoder.config().vocab]);
        Ok(write_safetensors(out, &Metadata::default(), &[(spec, bytes)])?)
    }
}
