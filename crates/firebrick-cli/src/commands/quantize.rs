//! `firebrick quantize`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use firebrick_models::{Export, ExportType};
use firebrick_quant::{GptqConfig, Method, Packing, QuantConfig, gguf_weights, quantize};
use firebrick_tensor::checkpoint::is_gguf_name;
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_train::TextData;
use serde_json::json;

use crate::args::{Global, Quantizer, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
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
    method: Quantizer,
    /// Bits per code: 2, 3, 4 or 8. GGUF stores codes of 2 to 4 bits in 4-bit blocks, unless groups are 256 long or --k-quants is given.
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
    /// Shrink the range of each group to the least squared error; on for gptq and off for rtn if absent.
    #[arg(long, value_enum, value_name = "on|off")]
    clip: Option<Switch>,
    /// Bits per site, as `firebrick profile` writes them.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Tokens per calibration window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many calibration windows, spread over the text.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// Store codes of 2 and 3 bits as Q2_K and Q3_K where rows are a multiple of 256, with the scales rounded once more.
    #[arg(long)]
    k_quants: bool,
    /// A path that ends in .gguf gets packed weights, any other path a folder with what they stand for.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
}

impl Quantize {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, None, global)?;
        self.check()?;
        let files = models::open(&self.model)?;
        let (method, data) = match self.method {
            Quantizer::Rtn => (Method::Rtn, TextData::from_file(&self.data, &files.tokenizer)?),
            Quantizer::Gptq => {
                let config = GptqConfig { act_order: self.act_order, ..Default::default() };
                (Method::Gptq(config), models::text(&self.data, &files.tokenizer, self.window)?)
            }
        };
        let plan = match &self.plan {
            Some(path) => Some(models::plan(path, &files)?),
            None => None,
        };
        // Spread over the whole text: its beginning may be of one kind, and GPTQ fits what it is shown.
        let text = data.spread(self.window, self.windows).concat();
        if global.dry_run {
            let facts =
                json!({"calibration_tokens": text.len(), "sites": files.sites().block_linears().len()});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        let gguf = is_gguf_name(&self.out);
        let dtype = if gguf { ExportType::F16 } else { ExportType::F32 };
        models::check_export(Export::files(&files, dtype), &self.out, global, terminal)?;
        let model = files.load(&models::device(global)?)?;
        let config = QuantConfig {
            method,
            grid: Grid {
                bits: self.bits,
                group: self.group,
                kind: if self.asymmetric { GridKind::Asym } else { GridKind::SymHalf },
                clip: self.clip.unwrap_or(match self.method {
                    Quantizer::Rtn => Switch::Off,
                    Quantizer::Gptq => Switch::On,
                }) == Switch::On,
            },
            plan,
            true_sequential: false,
            window: self.window,
        };
        let quantized = quantize(model.decoder, &text, &config, terminal)?;
        let packing = if self.k_quants { Packing::Small } else { Packing::Exact };
        let (encoded, fallback) =
            if gguf { gguf_weights(&quantized.matrices, packing) } else { Default::default() };
        let stored = models::stored_bytes(&quantized.matrices, &encoded);
        if !fallback.is_empty() {
            let count = fallback.len();
            terminal.say(&format!("warning: {count} layers fit no GGUF block type and are written as f16"));
        }
        let settings = json!({"method": format!("{:?}", config.method), "grid": config.grid});
        let report = Export::decoder(&model.name, &quantized.decoder, &model.tokenizer, dtype)
            .with_encoded(encoded)
            .with_settings(settings)
            .write(&self.out, &models::executor(global, terminal))?;
        let weights: f64 = quantized.matrices.values().map(|m| m.codes.len() as f64).sum();
        let bits: f64 =
            quantized.matrices.values().map(|m| m.codes.len() as f64 * m.bits_per_weight()).sum::<f64>()
                / weights;
        let codes: f64 =
            quantized.matrices.values().map(|m| m.codes.len() as f64 * f64::from(m.grid.bits)).sum::<f64>()
                / weights;
        // A folder holds what the codes stand for, in single precision.
        let stored = if gguf { 8.0 * stored as f64 / weights } else { 32.0 };
        let output = json!({
            "out": self.out,
            "code_bits_per_weight": codes,
            "bits_per_weight": bits,
            "stored_bits_per_weight": stored,
            "stored_as_f16": fallback,
            "written_bytes": report.written_bytes,
            "sites": quantized.reports,
        });
        terminal.result(&output, || {
            format!(
                "wrote {}: codes of {codes:.2} bits ({bits:.2} with scales), stored in {stored:.2} bits per quantized weight, \
                 {} bytes in all",
                self.out.display(),
                report.written_bytes
            )
        })
    }

    /// What makes no sense, before anything is read.
    fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Usage(what).into());
        if ![2, 3, 4, 8].contains(&self.bits) {
            return wrong(format!("--bits {}: choose 2, 3, 4 or 8", self.bits));
        }
        models::check_windows(self.window, self.windows)?;
        if self.k_quants && !is_gguf_name(&self.out) {
            return wrong("--k-quants: block types need an --out that ends in .gguf".into());
        }
        if self.act_order && matches!(self.method, Quantizer::Rtn) {
            return wrong("--act-order is an order of GPTQ; --method rtn has none".into());
        }
        Ok(())
    }
}
