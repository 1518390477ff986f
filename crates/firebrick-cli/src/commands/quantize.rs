//! `firebrick quantize`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use firebrick_core::LayerPlan;
use firebrick_models::{Export, ExportType};
use firebrick_quant::{GptqConfig, Method, QuantConfig, encode, quantize};
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_train::TextData;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Clone, Copy, ValueEnum)]
enum How {
    Rtn,
    Gptq,
}

#[derive(Args)]
pub struct Quantize {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// How codes are chosen.
    #[arg(long, value_enum, default_value = "gptq")]
    method: How,
    /// Bits per weight: 2, 3, 4 or 8.
    #[arg(long, default_value_t = 4, value_name = "B")]
    bits: u8,
    /// Weights that share a scale; 0 for a whole row.
    #[arg(long, default_value_t = 64, value_name = "G")]
    group: usize,
    /// Give every group a zero point of its own.
    #[arg(long)]
    asymmetric: bool,
    /// Quantize the columns with the largest activations first.
    #[arg(long)]
    act_order: bool,
    /// Bits per site, as `firebrick profile` writes them.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Tokens per calibration window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many calibration windows, spread over the text.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// A path that ends in .gguf gets packed weights, any other path a folder with what they stand for.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
}

impl Quantize {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, global)?;
        if ![2, 3, 4, 8].contains(&self.bits) {
            return Err(Usage(format!("--bits {}: choose 2, 3, 4 or 8", self.bits)).into());
        }
        let model = models::load(&self.model, &models::device(global)?)?;
        let data = TextData::from_file(&self.data, &model.tokenizer)?;
        let plan = match &self.plan {
            Some(path) => Some(LayerPlan::load(path)?.resolve(model.decoder.sites())?),
            None => None,
        };
        let config = QuantConfig {
            method: match self.method {
                How::Rtn => Method::Rtn,
                How::Gptq => Method::Gptq(GptqConfig { act_order: self.act_order, ..Default::default() }),
            },
            grid: Grid {
                bits: self.bits,
                group: self.group,
                kind: if self.asymmetric { GridKind::Asym } else { GridKind::SymHalf },
                clip: false,
            },
            plan,
            true_sequential: false,
            window: self.window,
        };
        // Spread over the whole text: its beginning may be of one kind, and GPTQ fits what it is shown.
        let all: Vec<&[u32]> = data.windows(self.window.max(2)).collect();
        let count = self.windows.min(all.len());
        let text: Vec<u32> = match count {
            0 => data.ids.clone(),
            _ => (0..count).flat_map(|i| all[i * all.len() / count]).copied().collect(),
        };
        let quantized = quantize(model.decoder, &text, &config, terminal)?;
        let gguf = self.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        let encoded = if gguf { encode(&quantized.matrices) } else { BTreeMap::new() };
        let missing = if gguf { quantized.matrices.len() - encoded.len() } else { 0 };
        if missing > 0 {
            terminal.say(&format!("warning: {missing} layers fit no GGUF block type and are written as f16"));
        }
        let dtype = if gguf { ExportType::F16 } else { ExportType::F32 };
        let settings = json!({"method": format!("{:?}", config.method), "grid": config.grid});
        let report = Export::decoder(&model.name, &quantized.decoder, &model.tokenizer, dtype)
            .with_encoded(encoded)
            .with_settings(settings)
            .write(&self.out, &models::executor(global, terminal))?;
        let weights: f64 = quantized.matrices.values().map(|m| m.codes.len() as f64).sum();
        let bits: f64 =
            quantized.matrices.values().map(|m| m.codes.len() as f64 * m.bits_per_weight()).sum::<f64>()
                / weights;
        let output = json!({
            "out": self.out,
            "bits_per_weight": bits,
            "written_bytes": report.written_bytes,
            "sites": quantized.reports,
        });
        terminal.result(&output, || {
            format!(
                "wrote {}: {bits:.2} bits per quantized weight, {} bytes in all",
                self.out.display(),
                report.written_bytes
            )
        })
    }
}
