//! `firebrick generate`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use firebrick_core::{Cancelled, Seed};
use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{GenerateOptions, generate};
use serde_json::json;

use crate::args::Global;
use crate::models::{self, Packed};
use crate::ui::{Terminal, interrupted, print};

#[derive(Args)]
pub struct Generate {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Text to continue, or with --chat a message to answer.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Put the prompt into the model's chat template.
    #[arg(long)]
    chat: bool,
    /// At most this many new tokens.
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f64,
    /// Sample among the K likeliest tokens only; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Sample among the likeliest tokens that make up this probability.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// Run the whole text again for every token instead of keeping keys and values.
    #[arg(long)]
    no_cache: bool,
    /// Compute with the Q4_0, Q4_1 and Q8_0 blocks of a GGUF file; `exact` on the CPU if absent.
    #[arg(long, value_name = "HOW")]
    packed: Option<Packed>,
}

impl Generate {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let device = models::device(global)?;
        let packed = self.packed.unwrap_or(Packed::default_for(&device));
        let (model, packed) = models::load_packed(models::open(&self.model)?, packed, &device)?;
        let banks = models::adapters(&self.adapter, &model, &device)?;
        let bricks = models::bricks(&packed, &banks);
        let tokenizer = &model.tokenizer;
        let prompt = match self.chat {
            true => {
                let text = ChatTemplate::of(tokenizer)
                    .and_then(|t| t.render(&[Message::user(&self.prompt)], &ChatOptions::answer()))
                    .with_context(|| self.model.clone())?;
                // The template writes its special tokens itself.
                tokenizer.encode(&text, false)?
            }
            false => tokenizer.encode(&self.prompt, true)?,
        };
        let settings = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: Seed(global.seed),
            ..Sampling::default()
        };
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            stop: tokenizer.eos_ids().to_vec(),
            use_cache: !self.no_cache,
        };
        let mut stream = tokenizer.decode_stream(true);
        let live = !global.json && !global.quiet;
        let on_token = &mut |token| {
            let mut heard = true;
            if live && let Ok(Some(text)) = stream.step(token) {
                let mut out = std::io::stdout().lock();
                heard = out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok();
            }
            if interrupted() || !heard { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut sampler = Sampler::new(settings)?;
        let ids = generate(&model.decoder, &bricks, &prompt, &mut sampler, &options, on_token)?;
        if live {
            print("")?;
        }
        if interrupted() {
            return Err(Cancelled.into());
        }
        if live {
            return Ok(());
        }
        let text = tokenizer.decode(&ids, true)?;
        let output = json!({"prompt_ids": prompt, "ids": ids, "text": text});
        terminal.result(&output, || text.clone())
    }
}
