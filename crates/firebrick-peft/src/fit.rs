//! Training a bank of adapters on text.

use burn::module::Module;
use firebrick_core::{Brick, Mode, Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{
    Batch, HeldOutLoss, Mixture, Rows, TextData, TrainConfig, TrainError, TrainReport, Wired, fit_mixture,
    fit_passes, held_out_loss, recompute,
};

use crate::LoraBank;

/// Trains `bank` on the windows of `data` over the frozen `decoder` and returns it; `below` are frozen bricks under the bank, such as
/// packed weights.
///
/// `decoder`, `below` and `bank` must be on a device that records gradients; only the bank has any.
///
/// # Errors
/// As [`fit_mixture`]; also if the text does not fill one window.
pub fn fit_lora(
    decoder: &Decoder,
    below: &[&dyn Brick],
    bank: LoraBank,
    config: &TrainConfig,
    data: &TextData,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(LoraBank, TrainReport), TrainError> {
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    let mixture = Mixture::text(data, config.window)?;
    fit_lora_mixture(decoder, below, bank, config, &mixture, None, progress, resume)
}

/// As [`fit_lora`], on a mixture of sources. With `held_out` rows their loss is taken as [`TrainConfig::eval_every`] says, and the
/// bank returned is the one with the lowest.
///
/// With [`TrainConfig::recompute`] blocks are computed again in the backward pass; bricks below that hand something from block to block
/// do not fit then ([`recompute`]).
///
/// # Errors
/// As [`fit_mixture`].
pub fn fit_lora_mixture(
    decoder: &Decoder,
    below: &[&dyn Brick],
    bank: LoraBank,
    config: &TrainConfig,
    data: &Mixture<'_>,
    held_out: Option<&Rows<'_>>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(LoraBank, TrainReport), TrainError> {
    let mut evaluate = |bank: &LoraBank| {
        let bank = bank.valid();
        let bricks: Vec<&dyn Brick> = below.iter().copied().chain([&bank as &dyn Brick]).collect();
        let rows = held_out.expect("only called where there are some");
        held_out_loss(decoder, &bricks, rows, config.batch, progress)
    };
    let evaluate: Option<&mut HeldOutLoss<'_, LoraBank>> = match held_out {
        Some(_) => Some(&mut evaluate),
        None => None,
    };
    if config.recompute {
        let pass = &mut |bank: &LoraBank, batch: &Batch, seed: Seed, passes: usize| {
            let untracked = bank.clone().no_grad();
            let [tracked, untracked] = [bank, &untracked]
                .map(|bank| below.iter().copied().chain([bank as &dyn Brick]).collect::<Vec<_>>());
            let [tracked, untracked] = [&tracked, &untracked].map(|bricks| Wired { decoder, bricks });
            recompute(tracked, untracked, bank, batch, seed, passes)
        };
        return fit_passes(bank, config, data, pass, evaluate, progress, resume);
    }
    let loss = &mut |bank: &LoraBank, batch: &Batch, seed: Seed| {
        let bricks: Vec<&dyn Brick> = below.iter().copied().chain([bank as &dyn Brick]).collect();
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (Mode::Train, seed);
        let loss = batch.nll(decoder, &mut run);
        match run.total_loss() {
            Some(auxiliary) => loss + auxiliary,
            None => loss,
        }
    };
    fit_mixture(bank, config, data, loss, evaluate, progress, resume)
}
