//! Specialists of the embedded model in its domains, and their texts: for measurements of what merges of them are worth.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use firebrick_core::{Run, Seed, Silent};
use firebrick_models::{Decoder, Model};
use firebrick_peft::{LoraBank, LoraConfig, fit_lora};
use firebrick_train::{Domain, TextData, TrainConfig, fit};

/// Tokens of a window.
pub const WINDOW: usize = 64;

/// What is held out of `domain`, or the rest of it, in tokens of `model`.
pub fn text(model: &Model, domain: &Domain, held_out: bool) -> TextData {
    let text = if held_out { domain.held_out_text() } else { domain.train_text() };
    TextData::from_text(&text, &model.tokenizer).unwrap()
}

pub fn settings(steps: usize, batch: usize, learning_rate: f64, seed: u64) -> TrainConfig {
    TrainConfig {
        steps,
        batch,
        window: WINDOW,
        learning_rate,
        warmup: steps / 10,
        seed,
        ..TrainConfig::default()
    }
}

/// `base` with all weights trained on `text`.
pub fn fine_tuned(base: &Decoder, text: &TextData, settings: &TrainConfig) -> Decoder {
    let loss = &mut |d: &Decoder, ids: Tensor<2, Int>, _| d.nll(ids, &mut Run::default()).mean();
    let start = base.clone().train().trainable();
    fit(start, settings, text, loss, &Silent, false).unwrap().0.valid()
}

/// `base` with an adapter of rank 8 on the linear layers of its blocks, trained on `text` and merged.
pub fn adapted(base: &Decoder, text: &TextData, settings: &TrainConfig) -> Decoder {
    let frozen = base.clone().train().no_grad();
    let sites = frozen.sites();
    let bank: LoraBank = LoraConfig::default()
        .init(sites, &sites.block_linears(), Seed(settings.seed), &frozen.device())
        .unwrap();
    let (bank, _) = fit_lora(&frozen, &[], bank, settings, text, &Silent, false).unwrap();
    bank.valid().merge(base.clone(), 1.0).unwrap()
}
