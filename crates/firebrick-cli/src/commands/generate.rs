//! `firebrick generate`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use clap::Args;
use firebrick_core::{Brick, Cancelled, Seed};
use firebrick_merge::logits_fusion::{Companion, FusionWeight, LogitsFusion, LogitsFusionConfig};
use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{GenerateOptions, Model, generate_with};
use firebrick_peft::LoraBank;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models::{self, Dtype, Packed};
use crate::ui::{Terminal, interrupted, print};

#[derive(Args)]
pub struct Generate {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Small model that was tuned from --expert-base, or a PEFT adapter folder for it: shifts the logits by what tuning changed
    /// there; may be given more than once, then the one that fits best is heard at each step.
    #[arg(long, value_name = "M", requires = "expert_base")]
    expert: Vec<String>,
    /// The small model that experts were tuned from; of the same vocabulary as --model.
    #[arg(long, value_name = "M", requires = "expert")]
    expert_base: Option<String>,
    /// The same weight for every expert at every step, instead of one that moves the prediction as far as tuning moved the small one's.
    #[arg(long, value_name = "W", requires = "expert", allow_negative_numbers = true)]
    expert_weight: Option<f64>,
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
    /// Keep keys and values as f16: half the memory, and faster with long texts.
    #[arg(long, conflicts_with = "no_cache")]
    cache_f16: bool,
    /// Compute with bf16 weights, and with the Q4_0, Q4_1 and Q8_0 blocks of a GGUF file; `exact` on the CPU if absent.
    #[arg(long, value_name = "HOW")]
    packed: Option<Packed>,
    /// Type that products of prompts take and other weights are stored in; bf16 is faster on CPUs with AMX and AMD's with AVX512-BF16.
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: Dtype,
}

impl Generate {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let device = models::device(global)?;
        let packed = self.packed.unwrap_or(Packed::default_for(&device));
        let files = models::open(&self.model)?;
        let precision = self.dtype.precision(&device, terminal);
        let (model, packed) = models::load_packed(files, packed, precision, &device)?;
        let banks = models::adapters(&self.adapter, &model, &device)?;
        let bricks = models::bricks(&packed, &banks);
        let tokenizer = &model.tokenizer;
        let experts = match &self.expert_base {
            Some(base) => Some(Experts::load(base, &self.expert, &model, &device)?),
            None => None,
        };
        let companions = experts.as_ref().map(Experts::bricks);
        let mut fusion = match experts.as_ref().zip(companions.as_ref()) {
            Some((experts, bricks)) => Some(experts.fusion(bricks, self.expert_weight)?),
            None => None,
        };
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
            half_cache: self.cache_f16,
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
        let adjust = &mut |history: &[u32], logits: &mut [f32]| match fusion.as_mut() {
            Some(fusion) => fusion.adjust(history, logits),
            None => Ok(()),
        };
        let ids = generate_with(&model.decoder, &bricks, &prompt, &mut sampler, &options, adjust, on_token)?;
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
        let mut output = json!({"prompt_ids": prompt, "ids": ids, "text": text});
        if let Some(fusion) = &fusion {
            output["expert_weights"] = fusion.steps().iter().map(|step| json!(step.weights)).collect();
        }
        terminal.result(&output, || text.clone())
    }
}

/// The small models of `--expert-base` and `--expert`.
struct Experts {
    base: Model,
    tuned: Vec<Expert>,
}

enum Expert {
    Whole(Box<Model>),
    Adapter(LoraBank),
}

impl Experts {
    fn load(base: &str, experts: &[String], large: &Model, device: &Device) -> Result<Experts> {
        let base = models::load(base, device)?;
        same_vocabulary(large, &base)?;
        let load = |name: &String| {
            if Path::new(name).join("adapter_config.json").exists() {
                let bank = models::adapters(&[name.into()], &base, device)?.remove(0);
                return Ok(Expert::Adapter(bank));
            }
            let model = models::load(name, device)?;
            same_vocabulary(large, &model)?;
            Ok(Expert::Whole(Box::new(model)))
        };
        let tuned = experts.iter().map(load).collect::<Result<_>>()?;
        Ok(Experts { base, tuned })
    }

    /// Of each expert.
    fn bricks(&self) -> Vec<Vec<&dyn Brick>> {
        let of = |expert| match expert {
            &Expert::Whole(_) => Vec::new(),
            Expert::Adapter(bank) => vec![bank as &dyn Brick],
        };
        self.tuned.iter().map(of).collect()
    }

    fn fusion<'a>(
        &'a self,
        bricks: &'a [Vec<&'a dyn Brick>],
        weight: Option<f64>,
    ) -> Result<LogitsFusion<'a>> {
        let of = |(expert, bricks): (&'a Expert, &'a Vec<&'a dyn Brick>)| {
            let decoder = match expert {
                Expert::Whole(model) => &model.decoder,
                Expert::Adapter(_) => &self.base.decoder,
            };
            Companion { decoder, bricks }
        };
        let companions: Vec<Companion<'a>> = self.tuned.iter().zip(bricks).map(of).collect();
        let mut config = LogitsFusionConfig::default();
        if let Some(weight) = weight {
            config.weight = FusionWeight::Fixed(vec![weight; companions.len()]);
        }
        let base = Companion { decoder: &self.base.decoder, bricks: &[] };
        Ok(LogitsFusion::new(base, &companions, config)?)
    }
}

/// Fails where a token means something else to the small model.
fn same_vocabulary(large: &Model, small: &Model) -> Result<()> {
    let (rows, other) = (large.decoder.config().vocab, small.decoder.config().vocab);
    let token = |model: &Model, id| model.tokenizer.token(id);
    if rows != other {
        let what = format!("{} has a vocabulary of {other} tokens, {} of {rows}", small.name, large.name);
        return Err(Usage(what).into());
    }
    if let Some(id) = (0..rows as u32).find(|id| token(large, *id) != token(small, *id)) {
        let what = format!("token {id} of {} is another one than that of {}", small.name, large.name);
        return Err(Usage(what).into());
    }
    Ok(())
}
