//! Training a bank of adapters on text.

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Mode, Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{TextData, TrainConfig, TrainError, TrainReport, fit};

use crate::LoraBank;

/// Trains `bank` on `data` over the frozen `decoder` and returns it; `below` are frozen bricks under the bank, such as packed weights.
///
/// `decoder`, `below` and `bank` must be on a device that records gradients; only the bank has any.
///
/// # Errors
/// As [`fit`].
pub fn fit_lora(
    decoder: &Decoder,
    below: &[&dyn Brick],
    bank: LoraBank,
    config: &TrainConfig,
    data: &TextData,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(LoraBank, TrainReport), TrainError> {
    let loss = &mut |bank: &LoraBank, tokens: Tensor<2, Int>, seed: Seed| {
        let bricks: Vec<&dyn Brick> = below.iter().copied().chain([bank as &dyn Brick]).collect();
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (Mode::Train, seed);
        let loss = decoder.nll(tokens, &mut run).mean();
        match run.total_loss() {
            Some(auxiliary) => loss + auxiliary,
            None => loss,
        }
    };
    fit(bank, config, data, loss, progress, resume)
}
