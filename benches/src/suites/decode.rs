//! Generation: a prompt of 512 tokens in one pass, then 64 tokens one at a time; in f32, from weights in bf16 (products of f32 and of
//! bf16), and from the blocks of a Q4_0 file.

use std::path::PathBuf;

use anyhow::{Error, Result};
use firebrick_core::{Brick, Run, Site};
use firebrick_models::{Decoder, ExportType, ModelFiles};
use firebrick_quant::PackedLinear;
use firebrick_tensor::block::DType;
use firebrick_tensor::ops::{PackedInputs, Precision};

use super::{compute, forward_flop, head_flop, linear_weights, load, tokens};
use crate::{Bench, Bound, Case, Peer};

const PROMPT: usize = 512;
const TOKENS: usize = 64;

/// A model in one form.
struct Subject<'a> {
    /// Its name in the results.
    name: String,
    /// What it computes in.
    dtype: &'static str,
    files: &'a ModelFiles,
    decoder: &'a Decoder,
    bricks: &'a [&'a dyn Brick],
    /// Bytes of the weights that a token reads.
    weights: f64,
    /// The type of the file that the peer reads.
    stored: ExportType,
}

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        let decoder = load(files, &bench.device)?;
        let c = &files.config;
        let weights = 4.0 * (linear_weights(files.sites()) + (c.d_model * c.vocab) as f64);
        let (name, stored) = (name.to_string(), ExportType::F32);
        let decoder = &decoder;
        Subject { name, dtype: "f32", files, decoder, bricks: &[], weights, stored }.measure(bench)?;
    }
    for (name, files) in bench.models {
        let stored = ExportType::BF16;
        let half = ModelFiles::open(&bench.exported(files, stored, ".gguf")?)?;
        let (decoder, _) =
            Decoder::load_packed(files.config.clone(), &half.weights(), Precision::F32, &bench.device)?;
        let c = &files.config;
        let weights = 2.0 * (linear_weights(files.sites()) + (c.d_model * c.vocab) as f64);
        let decoder = &decoder;
        let of = |dtype, decoder| {
            let name = name.to_string();
            Subject { name, dtype, files, decoder, bricks: &[], weights, stored }
        };
        of("bf16 x f32", decoder).prompt(bench)?;
        of("bf16", &decoder.clone().with_precision(Precision::Bf16)).measure(bench)?;
    }
    for (name, files) in bench.models {
        let stored: ExportType = DType::Q4_0.name().parse().map_err(Error::msg)?;
        let packed_files = ModelFiles::open(&bench.exported(files, stored, ".gguf")?)?;
        let weights = packed_files.weights();
        let (decoder, packed) =
            Decoder::load_packed(files.config.clone(), &weights, Precision::F32, &bench.device)?;
        let dense = |site: Site| if packed.contains_key(&site) { None } else { files.sites().linear(site) };
        let sites = files.sites().entries().iter();
        let left: usize = sites.filter_map(|e| dense(e.site)).map(|(d_in, d_out)| 4 * d_in * d_out).sum();
        let brick = PackedLinear::from_packed(packed);
        let weights = (brick.bytes() + left) as f64;
        for (dtype, inputs) in [("q4_0", PackedInputs::Exact), ("q4_0 x int8", PackedInputs::EightBits)] {
            let brick = brick.clone().with_inputs(inputs);
            let bricks: [&dyn Brick; 1] = [&brick];
            let (name, decoder) = (name.to_string(), &decoder);
            Subject { name, dtype, files, decoder, bricks: &bricks, weights, stored }.measure(bench)?;
        }
    }
    Ok(())
}

impl Subject<'_> {
    fn measure(&self, bench: &Bench<'_>) -> Result<()> {
        self.prompt(bench)?;
        self.one_by_one(bench)
    }

    fn peer(&self, bench: &Bench<'_>, what: &str) -> Result<Option<Peer>> {
        if bench.peers.is_none() {
            return Ok(None);
        }
        let file: PathBuf = bench.exported(self.files, self.stored, ".gguf")?;
        bench.peer("decode.py", &[file.as_path(), what.as_ref()])
    }

    /// Whether the cache is of f16, as the peer's is.
    fn half_cache(&self) -> bool {
        self.dtype != "f32"
    }

    /// A run with an empty cache.
    fn begin(&self) -> Run<'_> {
        let mut run = Run::new(self.bricks);
        let cache = self.decoder.kv_cache(1, PROMPT + TOKENS);
        run.insert(if self.half_cache() { cache.in_f16() } else { cache });
        run
    }

    fn prompt(&self, bench: &Bench<'_>) -> Result<()> {
        let config = &self.files.config;
        let ids = tokens(config.vocab, 1, PROMPT, &bench.device);
        let flop = forward_flop(config, self.files.sites(), 1, PROMPT) + head_flop(config, 1);
        let case = Case {
            suite: "decode",
            name: format!("{} prompt {PROMPT}", self.name),
            dtype: self.dtype,
            unit: "tok/s",
            amount: PROMPT as f64,
            bound: compute(flop, self.decoder.precision()),
        };
        bench.measure(&case, || self.peer(bench, "prompt"), &mut || {
            bench.timed(|| {
                let mut run = self.begin();
                let hidden = self.decoder.hidden(ids.clone(), &mut run);
                self.decoder.logits(hidden.narrow(1, PROMPT - 1, 1), &mut run);
                Ok(())
            })
        })
    }

    /// Every token reads all weights, and the keys and values of the tokens before it.
    fn one_by_one(&self, bench: &Bench<'_>) -> Result<()> {
        let c = &self.files.config;
        let ids = tokens(c.vocab, 1, PROMPT + TOKENS, &bench.device);
        let size = if self.half_cache() { 2 } else { 4 };
        let cached = size * 2 * c.layers * c.kv_heads * c.head_dim * (PROMPT + TOKENS / 2);
        let case = Case {
            suite: "decode",
            name: format!("{} tokens {PROMPT}+{TOKENS}", self.name),
            dtype: self.dtype,
            unit: "tok/s",
            amount: TOKENS as f64,
            bound: Bound::Read((self.weights + cached as f64) * TOKENS as f64),
        };
        bench.measure(&case, || self.peer(bench, "tokens"), &mut || {
            let mut run = self.begin();
            self.decoder.hidden(ids.clone().narrow(1, 0, PROMPT), &mut run);
            bench.timed(|| {
                for i in PROMPT..PROMPT + TOKENS {
                    self.decoder.forward(ids.clone().narrow(1, i, 1), &mut run);
                }
                Ok(())
            })
        })
    }
}
