//! Generation: a prompt of 256 tokens in one pass, then 32 tokens one at a time.

use anyhow::Result;
use firebrick_core::Run;
use firebrick_models::{Decoder, ExportType, ModelFiles};
use std::path::Path;

use super::{forward_flop, head_flop, linear_weights, load, tokens};
use crate::{Bench, Bound, Case, Peer};

const PROMPT: usize = 256;
const TOKENS: usize = 32;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        let decoder = load(files, &bench.device)?;
        prompt(bench, name, files, &decoder)?;
        one_by_one(bench, name, files, &decoder)?;
    }
    Ok(())
}

fn peer(bench: &Bench<'_>, files: &ModelFiles, what: &str) -> Result<Option<Peer>> {
    if bench.peers.is_none() {
        return Ok(None);
    }
    let file = bench.exported(files, ExportType::F32, ".gguf")?;
    bench.peer("decode.py", &[&file, Path::new(what)])
}

fn prompt(bench: &Bench<'_>, name: &str, files: &ModelFiles, decoder: &Decoder) -> Result<()> {
    let ids = tokens(files.config.vocab, 1, PROMPT, &bench.device);
    let flop = forward_flop(&files.config, files.sites(), 1, PROMPT) + head_flop(&files.config, 1);
    let case = Case {
        suite: "decode",
        name: format!("{name} prompt {PROMPT}"),
        dtype: "f32",
        unit: "tok/s",
        amount: PROMPT as f64,
        bound: Bound::Compute(flop),
    };
    bench.measure(&case, peer(bench, files, "prompt")?, &mut || {
        bench.timed(|| {
            let mut run = Run::default();
            run.insert(decoder.kv_cache(1, PROMPT + TOKENS));
            let hidden = decoder.hidden(ids.clone(), &mut run);
            decoder.logits(hidden.narrow(1, PROMPT - 1, 1), &mut run);
            Ok(())
        })
    })?;
    Ok(())
}

/// Every token reads all weights, and the keys and values of the tokens before it.
fn one_by_one(bench: &Bench<'_>, name: &str, files: &ModelFiles, decoder: &Decoder) -> Result<()> {
    let c = &files.config;
    let ids = tokens(c.vocab, 1, PROMPT + TOKENS, &bench.device);
    let cached = (2 * c.layers * c.kv_heads * c.head_dim * (PROMPT + TOKENS / 2)) as f64;
    let weights = linear_weights(files.sites()) + (c.d_model * c.vocab) as f64;
    let case = Case {
        suite: "decode",
        name: format!("{name} tokens {PROMPT}+{TOKENS}"),
        dtype: "f32",
        unit: "tok/s",
        amount: TOKENS as f64,
        bound: Bound::Read(4.0 * (weights + cached) * TOKENS as f64),
    };
    bench.measure(&case, peer(bench, files, "tokens")?, &mut || {
        let mut run = Run::default();
        run.insert(decoder.kv_cache(1, PROMPT + TOKENS));
        decoder.hidden(ids.clone().narrow(1, 0, PROMPT), &mut run);
        bench.timed(|| {
            for i in PROMPT..PROMPT + TOKENS {
                decoder.forward(ids.clone().narrow(1, i, 1), &mut run);
            }
            Ok(())
        })
    })?;
    Ok(())
}
