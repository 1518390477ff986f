//! Makes the embedded base model: a tokenizer and a small decoder trained on a corpus of permissively licensed text.
//!
//! `cargo xtask pretrain` runs it; the same corpus, settings and seed give the same file.
// A program that says how far it is.
#![allow(clippy::print_stderr)]

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Event, Progress, Run, Seed};
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType};
use firebrick_tensor::stream::Executor;
use firebrick_train::{Schedule, TextData, TrainConfig, fit, perplexity};

const USAGE: &str = "usage: pretrain --corpus DIR --out FILE.gguf [--steps N] [--batch N] [--learning-rate X] [--seed N] [--work DIR] [--resume]

DIR holds train.txt and held.txt as `cargo xtask data --corpus DIR` writes them.";

/// Prints one line every ten steps.
struct Lines;

impl Progress for Lines {
    fn on(&self, event: Event<'_>) {
        match event {
            Event::Advance { task, done, note } if done % 10 == 0 => eprintln!("{task} {done} {note}"),
            Event::Note(text) | Event::Warn(text) => eprintln!("{text}"),
            _ => {}
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = HashMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = if name == "--resume" { "yes".into() } else { arguments.next().ok_or(USAGE)? };
        options.insert(name, value);
    }
    let text = |name: &str| options.get(name).map(String::as_str);
    let number = |name: &str, default: f64| -> Result<f64, Box<dyn Error>> {
        Ok(text(name).map_or(Ok(default), str::parse)?)
    };
    let corpus = PathBuf::from(text("--corpus").ok_or(USAGE)?);
    let out = PathBuf::from(text("--out").ok_or(USAGE)?);
    let seed = Seed(number("--seed", 1.0)? as u64);

    let read = |name: &str| -> Result<Vec<String>, Box<dyn Error>> {
        let path = corpus.join(name);
        let whole = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(whole.split("\n\n").filter(|d| !d.is_empty()).map(String::from).collect())
    };
    let (train, held) = (read("train.txt")?, read("held.txt")?);
    eprintln!("training a tokenizer on {} documents", train.len());
    let tokenizer = train_bpe(train.iter().map(String::as_str), 2048)?;
    let data = TextData::from_documents(train.iter().map(String::as_str), &tokenizer)?;
    let held = TextData::from_documents(held.iter().map(String::as_str), &tokenizer)?;
    eprintln!("{} tokens, {:.2} bytes each", data.ids.len(), data.bytes as f64 / data.ids.len() as f64);

    let config = DecoderConfig {
        vocab: tokenizer.vocab_size().next_multiple_of(32),
        d_model: 192,
        d_ff: 384,
        layers: 8,
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        max_tokens: 1024,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        tied_head: true,
        ..DecoderConfig::tiny(0)
    };
    let device = Device::flex().autodiff();
    let decoder = Decoder::random(config, seed, &device)?.trainable();
    eprintln!("{} parameters", decoder.num_params());
    let settings = TrainConfig {
        steps: number("--steps", 3000.0)? as usize,
        batch: number("--batch", 8.0)? as usize,
        window: 256,
        learning_rate: number("--learning-rate", 2e-3)?,
        schedule: Schedule::Cosine { floor: 0.05 },
        warmup: 100,
        weight_decay: 0.05,
        betas: [0.9, 0.95],
        seed: seed.0,
        checkpoint_every: 100,
        out: text("--work").map(PathBuf::from),
        ..TrainConfig::default()
    };
    let loss =
        &mut |decoder: &Decoder, tokens: Tensor<2, Int>, _| decoder.nll(tokens, &mut Run::default()).mean();
    let resume = options.contains_key("--resume");
    let (decoder, report) = fit(decoder, &settings, &data, loss, &Lines, resume)?;
    let eval = perplexity(&decoder, &[], &held.ids, held.bytes, 256, 16, &firebrick_core::Silent)?;
    eprintln!(
        "{} steps in {:.0} s; held-out perplexity {:.2}, {:.3} bits per byte",
        report.steps,
        report.seconds,
        eval.perplexity,
        eval.bits_per_byte.unwrap_or(f64::NAN)
    );
    write(&out, &decoder.valid(), &tokenizer)
}

fn write(
    out: &Path,
    decoder: &Decoder,
    tokenizer: &firebrick_models::tokenizer::Tokenizer,
) -> Result<(), Box<dyn Error>> {
    let executor = Executor { overwrite: true, ..Executor::default() };
    Export::decoder("firebrick-embedded", decoder, tokenizer, ExportType::Q8_0).write(out, &executor)?;
    eprintln!("wrote {}", out.display());
    Ok(())
}
