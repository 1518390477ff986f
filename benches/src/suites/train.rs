//! A training step, 2 x 256 tokens, AdamW: of all weights, and of LoRA of rank 8 on every linear layer.

use anyhow::Result;
use burn::optim::GradientsParams;
use firebrick_core::{Brick, Run, Seed};
use firebrick_models::ModelFiles;
use firebrick_peft::LoraConfig;
use firebrick_tensor::ops::Precision;
use firebrick_train::AdamW;

use super::{compute, dtype, forward_flop, head_flop, load, load_in, tokens};
use crate::{Bench, Case};

const BATCH: usize = 2;
const LENGTH: usize = 256;
const RANK: usize = 8;
const LEARNING_RATE: f64 = 1e-4;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        for precision in bench.precisions() {
            full(bench, name, files, precision)?;
            lora(bench, name, files, precision)?;
        }
    }
    Ok(())
}

fn case(name: &str, what: &str, flop: f64, precision: Precision) -> Case {
    Case {
        suite: "train",
        name: format!("{name} {what} {BATCH}x{LENGTH}"),
        dtype: dtype(precision),
        unit: "tok/s",
        amount: (BATCH * LENGTH) as f64,
        bound: compute(flop, precision),
    }
}

/// Of the forward pass and the head.
fn pass_flop(files: &ModelFiles) -> f64 {
    let head = head_flop(&files.config, BATCH * (LENGTH - 1));
    forward_flop(&files.config, files.sites(), BATCH, LENGTH) + head
}

/// Backwards there is a product for the gradient of each input and one for that of each weight.
fn full(bench: &Bench<'_>, name: &str, files: &ModelFiles, precision: Precision) -> Result<()> {
    let device = bench.device.clone().autodiff();
    let mut decoder = Some(load(files, &device)?.trainable().with_precision(precision));
    let ids = tokens(files.config.vocab, BATCH, LENGTH, &device);
    let mut optimizer = AdamW::default();
    let peer = || bench.model_peer("train.py", files, &["full", dtype(precision)]);
    bench.measure(&case(name, "full", 3.0 * pass_flop(files), precision), peer, &mut || {
        bench.timed_awake(|| {
            let current = decoder.take().expect("put back below");
            let loss = current.nll(ids.clone(), &mut Run::default()).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &current);
            decoder = Some(optimizer.step(LEARNING_RATE, current, gradients));
            Ok(())
        })
    })
}

/// The weights are frozen: backwards there is only the product for the gradient of the input, but for the adapters'.
fn lora(bench: &Bench<'_>, name: &str, files: &ModelFiles, precision: Precision) -> Result<()> {
    let device = bench.device.clone().autodiff();
    let decoder = load_in(files, precision, &device)?;
    let targets = decoder.sites().block_linears();
    let widths: usize =
        targets.iter().filter_map(|s| decoder.sites().linear(s)).map(|(d_in, d_out)| d_in + d_out).sum();
    let adapters = 2.0 * (RANK * widths * BATCH * LENGTH) as f64;
    let config = LoraConfig { rank: RANK, ..LoraConfig::default() };
    let mut bank = Some(config.init(decoder.sites(), &targets, Seed(0), &device)?);
    let ids = tokens(files.config.vocab, BATCH, LENGTH, &device);
    let mut optimizer = AdamW::default();
    let peer = || bench.model_peer("train.py", files, &["lora", dtype(precision)]);
    bench.measure(&case(name, "lora", 2.0 * pass_flop(files) + 3.0 * adapters, precision), peer, &mut || {
        bench.timed_awake(|| {
            let current = bank.take().expect("put back below");
            let bricks: [&dyn Brick; 1] = [&current];
            let loss = decoder.nll(ids.clone(), &mut Run::new(&bricks)).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &current);
            bank = Some(optimizer.step(LEARNING_RATE, current, gradients));
            Ok(())
        })
    })
}
