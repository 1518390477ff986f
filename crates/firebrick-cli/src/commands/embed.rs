//! `firebrick embed`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_core::Brick;
use firebrick_models::{EmbedOptions, Pooling};
use firebrick_peft::hf;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::{Terminal, print};

#[derive(Args)]
pub struct Embed {
    /// Encoder: a Hugging Face folder of the BERT family, or a fetched name (`minilm`).
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Text file; every line is a text.
    #[arg(long, value_name = "FILE", required_unless_present = "text", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Texts.
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    text: Vec<String>,
    /// How the vectors of the tokens become one, if not as the model says: mean, cls or max.
    #[arg(long, value_name = "HOW")]
    pooling: Option<Pooling>,
    /// Texts at a time.
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch: usize,
}

impl Embed {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        if self.batch == 0 {
            return Err(Usage("--batch must be at least 1".into()).into());
        }
        let lines = match &self.data {
            Some(path) => models::read_text(path)?,
            None => String::new(),
        };
        let texts: Vec<&str> = match self.data {
            Some(_) => lines.lines().collect(),
            None => self.text.iter().map(String::as_str).collect(),
        };
        let device = models::device(global)?;
        let model = models::open_encoder(&self.model)?.load(&device)?;
        let sites = model.encoder.sites();
        let banks = self.adapter.iter().map(|dir| Ok(hf::load(dir, sites, &device)?.0));
        let banks = banks.collect::<Result<Vec<_>>>()?;
        let bricks: Vec<&dyn Brick> = banks.iter().map(|b| b as &dyn Brick).collect();
        let options = EmbedOptions { batch: self.batch, pooling: self.pooling, normalize: None };
        let vectors = model.embed(&texts, &bricks, &options, terminal)?;
        // One line a text: an object with --json, else the numbers.
        for (text, vector) in texts.iter().zip(&vectors) {
            let line = match global.json {
                true => serde_json::to_string(&json!({"text": text, "embedding": vector}))?,
                false => vector.iter().map(f32::to_string).collect::<Vec<_>>().join(" "),
            };
            print(&line)?;
        }
        Ok(())
    }
}
