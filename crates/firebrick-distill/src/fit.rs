//! Training a student's adapters against a teacher.

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Mode, Part, Progress, Run, Seed, Site};
use firebrick_models::Decoder;
use firebrick_peft::LoraBank;
use firebrick_train::{TextData, TrainConfig, TrainError, TrainReport, fit};

use crate::{LogitKd, Teacher};

/// Trains `bank` over the frozen `student` to predict what `teacher` predicts on `data`.
///
/// `student` and `bank` must be on a device that records gradients, the teacher on one that does not.
///
/// # Errors
/// [`TrainError::Config`] if the two have different vocabularies, a brick sits at a head, logits are capped, or windows have fewer than 2 tokens (every problem
/// is listed); else as [`fit`].
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
    let (theirs, ours) = (teacher.decoder.config().vocab, student.config().vocab);
    let head = Site::global(Part::Head);
    let mut problems = Vec::new();
    if theirs != ours {
        problems.push(format!("a teacher of {theirs} tokens for a student of {ours}"));
    }
    if !Run::new(teacher.bricks).is_bare(head) || bank.sites().contains(head) {
        problems.push("a brick sits at a head".into());
    }
    if [teacher.decoder, student].iter().any(|d| d.config().final_softcap.is_some()) {
        problems.push("a model caps its logits".into());
    }
    if config.window < 2 {
        problems.push(format!("`window` is {}; there is nothing to predict", config.window));
    }
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    let loss = &mut |bank: &LoraBank, tokens: Tensor<2, Int>, seed: Seed| {
        let bricks: [&dyn Brick; 1] = [bank];
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (Mode::Train, seed);
        kd.loss(student, &mut run, teacher, tokens)
    };
    fit(bank, config, data, loss, progress, resume)
}
