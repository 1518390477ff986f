//! Training a student's adapters against a teacher.

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Mode, Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_peft::LoraBank;
use firebrick_train::{TextData, TrainConfig, TrainError, TrainReport, fit};

use crate::{LogitKd, Teacher};

/// Trains `bank` over the frozen `student` to predict what `teacher` predicts on `data`.
///
/// `student` and `bank` must be on a device that records gradients, the teacher on one that does not.
pub fn distill_lora(
    kd: LogitKd,
    teacher: &Teacher<'_>,
    student: &Decoder,
    bank: LoraBank,
    config: &TrainConfig,
    data: &TextData,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(LoraBank, TrainReport), TrainError> {
    let loss = &mut |bank: &LoraBank, tokens: Tensor<2, Int>, seed: Seed| {
        let bricks: [&dyn Brick; 1] = [bank];
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (Mode::Train, seed);
        kd.loss(student, &mut run, teacher, tokens)
    };
    fit(bank, config, data, loss, progress, resume)
}
