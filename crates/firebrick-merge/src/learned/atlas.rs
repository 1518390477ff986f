//! aTLAS (Zhang et al. 2024, arXiv 2407.02880): task vectors with a learned coefficient for each block of parameters.

use firebrick_core::{Progress, Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{Batch, Mixture, Rows, Schedule, TrainConfig, TrainReport};

use super::composed::{Coefficients, Composed, Granularity, learn};
use crate::MergeError;

/// Settings of [`atlas`] and [`atlas_negation`]; the defaults are the paper's for few examples.
#[derive(Clone, Debug)]
pub struct AtlasConfig {
    /// Which weights are a block.
    pub granularity: Granularity,
    /// `K` of "aTLAS x K": random classes into which the elements of each weight are split, with a coefficient each; 1 for none.
    pub parts: usize,
    /// Steps, batches and the optimizer.
    pub train: TrainConfig,
}

impl Default for AtlasConfig {
    fn default() -> Self {
        let train = TrainConfig {
            steps: 100,
            learning_rate: 0.1,
            schedule: Schedule::Cosine { floor: 0.0 },
            warmup: 0,
            weight_decay: 0.1,
            clip: Some(1.0),
            ..TrainConfig::default()
        };
        AtlasConfig { granularity: Granularity::Tensor, parts: 1, train }
    }
}

impl AtlasConfig {
    /// Zero coefficients: the base.
    fn start(&self, composed: &Composed) -> Coefficients {
        composed.coefficients(self.granularity, 0.0, self.parts, Seed(self.train.seed))
    }
}

/// Learns coefficients from 0 on labelled text: of several tasks whose vectors are added, or of few examples of a new one
/// that is composed of the vectors of others.
///
/// # Errors
/// As [`learn`].
pub fn atlas(
    composed: &Composed,
    config: &AtlasConfig,
    data: &Mixture<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    let objective = &mut |decoder: &Decoder, batch: &Batch, _: Seed| batch.nll(decoder, &mut Run::default());
    learn(composed, config.start(composed), &config.train, data, objective, progress, resume)
}

/// Learns coefficients that take the task of `target` away and leave that of `control` as it is: the loss is the negative
/// log-likelihood of `control` minus that of `target`, which has no lower bound, so that steps and weight decay are what ends it. A pass
/// has as many rows of `control` as of `target`.
///
/// # Errors
/// As [`learn`]; [`MergeError::Settings`] if `control` has rows of another length.
pub fn atlas_negation(
    composed: &Composed,
    config: &AtlasConfig,
    target: &Mixture<'_>,
    control: &Rows<'_>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, TrainReport), MergeError> {
    if control.window() != config.train.window {
        let (window, rows) = (config.train.window, control.window());
        let problems = vec![format!("`window` is {window}, the control has rows of {rows}")];
        return Err(MergeError::Settings { problems });
    }
    let objective = &mut |decoder: &Decoder, batch: &Batch, seed: Seed| {
        let rows = control.draw(batch.tokens.dims()[0], seed, "control");
        let kept = control.batch(&rows, &batch.tokens.device()).nll(decoder, &mut Run::default());
        kept - batch.nll(decoder, &mut Run::default())
    };
    learn(composed, config.start(composed), &config.train, target, objective, progress, resume)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learned::testing::{Family, WINDOW};
    use firebrick_core::Silent;

    fn config(parts: usize, steps: usize) -> AtlasConfig {
        let default = AtlasConfig::default();
        let train = TrainConfig { steps, batch: 12, window: WINDOW, ..default.train };
        AtlasConfig { parts, train, ..default }
    }

    #[test]
    fn more_parts_fit_better_and_blocks_beat_one_scale() {
        for seed in 0..3 {
            let family = Family::new(seed);
            let (composed, data) = (family.composed(), family.mixture());
            let fit = |parts| {
                let (c, report) = atlas(&composed, &config(parts, 100), &data, &Silent, false).unwrap();
                (c.count(), report.final_loss().unwrap(), family.gap_closed(&composed.merge(&c).unwrap()))
            };
            let (few, one, closed) = fit(1);
            let (many, eight, closed8) = fit(8);
            let best = (0..=20).map(|i| {
                let c = composed.coefficients(Granularity::Task, 0.05 * f64::from(i), 1, Seed(0));
                family.gap_closed(&composed.merge(&c).unwrap())
            });
            let best = best.fold(f64::MIN, f64::max);
            assert_eq!((few, many), (3 * composed.sites().len(), 24 * composed.sites().len()));
            assert!(eight < one, "seed {seed}: training loss {one} with 1 part, {eight} with 8");
            assert!(closed > best + 0.03 && closed8 > best + 0.03, "seed {seed}: {closed} {closed8} {best}");
        }
    }

    #[test]
    fn negation_takes_one_kind_away_and_leaves_the_others() {
        for seed in 0..3 {
            let family = Family::new(seed);
            let vector = family.vectors().remove(0);
            // The specialist is the model; its own vector is what can be taken away.
            let composed = Composed::new(&family.experts[0], vec![vector]).unwrap();
            let target = Mixture::text(&family.texts[0], WINDOW).unwrap();
            let control = Rows::windows(&family.texts[1], WINDOW).unwrap();
            let (c, _) =
                atlas_negation(&composed, &config(1, 25), &target, &control, &Silent, false).unwrap();
            let (before, after) =
                (family.nats(&family.experts[0]), family.nats(&composed.merge(&c).unwrap()));
            assert!(after[0] > before[0] + 0.3, "seed {seed}: the kind is forgotten: {before:?} {after:?}");
            assert!(after[1] < before[1] + 0.02, "seed {seed}: the control is kept: {before:?} {after:?}");
            let short = Rows::windows(&family.texts[1], WINDOW - 1).unwrap();
            let error =
                atlas_negation(&composed, &config(1, 1), &target, &short, &Silent, false).unwrap_err();
            assert!(error.to_string().contains("`window`"), "{error}");
        }
    }
}
