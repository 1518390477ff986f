use std::sync::Mutex;

use burn::module::{Module, Param, ParamGroup};
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Base, Brick, Event, Part, Progress, Run, Seed, Silent, Site, SiteSet};
use firebrick_models::Decoder;
use firebrick_train::{Group, TextData, TrainConfig, TrainError, fit};

use crate::tiny::{bits, decoder, loss, noise, pattern, settings, trainable};

#[test]
fn a_repeating_pattern_is_learned() {
    let (_, report) = fit(trainable(), &settings(60), &pattern(1000), &mut loss, &Silent, false).unwrap();
    assert_eq!((report.steps, report.tokens, report.losses.len()), (60, 60 * 4 * 16, 60));
    let (first, last) = (report.first_loss().unwrap(), report.final_loss().unwrap());
    assert!((first - 64f64.ln()).abs() < 0.1, "an untrained model guesses: {first}");
    assert!(last < 0.5 * first, "{first} -> {last}");
}

#[test]
fn a_learning_rate_of_0_changes_nothing() {
    let start = trainable();
    let still = TrainConfig { learning_rate: 0.0, ..settings(3) };
    let (after, _) = fit(start.clone(), &still, &noise(500), &mut loss, &Silent, false).unwrap();
    assert_eq!(bits(&after), bits(&start));
    let (moved, _) = fit(start.clone(), &settings(3), &noise(500), &mut loss, &Silent, false).unwrap();
    assert!(bits(&moved).iter().zip(&bits(&start)).all(|(a, b)| a != b), "every parameter moves otherwise");
}

#[test]
fn equal_runs_are_equal_and_the_seed_matters() {
    let data = noise(700);
    let run = |config: TrainConfig| {
        let (after, report) = fit(trainable(), &config, &data, &mut loss, &Silent, false).unwrap();
        (bits(&after), report.losses)
    };
    let once = run(settings(4));
    assert_eq!(once, run(settings(4)));
    assert_ne!(once.1, run(TrainConfig { seed: 9, ..settings(4) }).1);
}

#[test]
fn accumulation_equals_one_large_batch() {
    let data = noise(700);
    let run = |batch, accumulate| {
        let config = TrainConfig { batch, accumulate, warmup: 0, ..settings(3) };
        let (_, report) = fit(trainable(), &config, &data, &mut loss, &Silent, false).unwrap();
        (report.losses, report.tokens)
    };
    let (whole, parts, fewer) = (run(6, 1), run(2, 3), run(2, 1));
    assert_eq!(whole.1, parts.1);
    let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(close(&whole.0, &parts.0), "{whole:?} {parts:?}");
    assert!(!close(&whole.0, &fewer.0));
}

#[test]
fn clipping_shortens_the_step_and_the_norm_is_logged_before_it() {
    let data = noise(700);
    let start = trainable();
    let run = |clip, steps| {
        let folder = tempfile::tempdir().unwrap();
        let out = Some(folder.path().to_path_buf());
        // Adam forgets the size of gradients, but for a large eps.
        let config = TrainConfig { clip, out, warmup: 0, eps: 1e-2, weight_decay: 0.0, ..settings(steps) };
        let (after, _) = fit(start.clone(), &config, &data, &mut loss, &Silent, false).unwrap();
        let text = std::fs::read_to_string(folder.path().join("log.jsonl")).unwrap();
        let norm = |line: &str| -> f64 {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["grad_norm"].as_f64().unwrap()
        };
        let moved = values(&after).iter().zip(values(&start)).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        (text.lines().map(norm).collect::<Vec<_>>(), moved.sqrt())
    };
    let (free, clipped, wide) = (run(None, 1), run(Some(1e-3), 1), run(Some(1e3), 1));
    assert_eq!(free.0, clipped.0);
    assert!(free.0[0] > 1e-2);
    assert!(clipped.1 > 0.0 && clipped.1 < 0.1 * free.1, "{clipped:?} {free:?}");
    assert_eq!(wide, free, "control: nothing to clip");
    let (free, clipped) = (run(None, 3), run(Some(1e-3), 3));
    assert_eq!(free.0.len(), 3);
    assert!((free.0[1] - clipped.0[1]).abs() > 1e-4, "another first step: {free:?} {clipped:?}");
}

/// Every parameter's values in one row.
fn values(module: &Decoder) -> Vec<f64> {
    bits(module).into_iter().flatten().map(|b| f64::from(f32::from_bits(b))).collect()
}

/// Adds a trainable vector to the output of its site.
#[derive(Module, Debug)]
struct Shift {
    by: Param<Tensor<1>>,
    #[module(skip)]
    sites: SiteSet,
}

impl Brick for Shift {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }
    fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        base(x, run) + self.by.val().reshape([1, 1, -1])
    }
}

#[test]
fn a_brick_trains_over_a_frozen_base() {
    let base = decoder(&Device::flex().autodiff());
    let before = bits(&base);
    let by = Param::from_tensor(Tensor::<1>::zeros([16], &Device::flex().autodiff()));
    let shift = Shift { by, sites: [Site::layer(1, Part::Block)].into_iter().collect() };
    // Both are in the module that trains: only what requires a gradient may move.
    let mut loss = |(base, shift): &(Decoder, Shift), tokens: Tensor<2, Int>, seed: Seed| {
        let bricks: [&dyn Brick; 1] = [shift];
        let mut run = Run::new(&bricks);
        run.seed = seed;
        base.nll(tokens, &mut run).mean()
    };
    let config = TrainConfig { learning_rate: 0.3, ..settings(30) };
    let pair = (base.clone(), shift.clone());
    let ((base, trained), report) = fit(pair, &config, &pattern(500), &mut loss, &Silent, false).unwrap();
    // The random head lets one shift of the stream favour the 8 tokens of the pattern only so much.
    assert!(report.final_loss().unwrap() < report.first_loss().unwrap() - 0.15, "{:?}", report.losses);
    assert_eq!(bits(&base), before);
    assert_ne!(bits(&trained), bits(&shift));
    let pair = (base.trainable(), shift);
    let ((base, _), _) = fit(pair, &settings(3), &pattern(500), &mut loss, &Silent, false).unwrap();
    assert_ne!(bits(&base), before, "control: a base that requires gradients moves");
}

#[test]
fn a_group_that_matches_nothing_is_refused() {
    let group = |params| Group { params, learning_rate: 2.0, weight_decay: None };
    let run = |groups| {
        let config = TrainConfig { groups, ..settings(1) };
        fit(trainable(), &config, &noise(500), &mut loss, &Silent, false).map(drop)
    };
    run(vec![group(ParamGroup::from_predicate("norm")), group(ParamGroup::all())]).unwrap();
    let error = run(vec![group(ParamGroup::all()), group(ParamGroup::from_predicate("nrom"))]).unwrap_err();
    assert!(matches!(error, TrainError::Config { .. }));
    assert!(error.to_string().contains("`groups[1]`"), "{error}");
}

#[test]
fn the_loss_draws_from_its_own_seed_every_pass() {
    let mut seeds = Vec::new();
    let mut loss = |decoder: &Decoder, tokens, seed: Seed| {
        seeds.push(seed.0);
        loss(decoder, tokens, seed)
    };
    let config = TrainConfig { accumulate: 2, ..settings(3) };
    fit(trainable(), &config, &noise(500), &mut loss, &Silent, false).unwrap();
    let drawn = seeds.len();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!((drawn, seeds.len()), (6, 6));
}

#[test]
fn a_loss_that_is_not_finite_names_its_step() {
    let mut steps = 0;
    let mut broken = |decoder: &Decoder, tokens, seed| {
        steps += 1;
        loss(decoder, tokens, seed) * if steps == 3 { f32::NAN } else { 1.0 }
    };
    let error = fit(trainable(), &settings(9), &noise(500), &mut broken, &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 3, what: "loss", .. }), "{error}");
}

#[test]
fn what_cannot_train_is_refused() {
    let data = noise(500);
    let fail = |model: Decoder, config: &TrainConfig, data: &TextData| {
        fit(model, config, data, &mut loss, &Silent, false).unwrap_err()
    };
    assert!(matches!(fail(decoder(&Device::flex()), &settings(1), &data), TrainError::NothingToTrain));
    let frozen = decoder(&Device::flex().autodiff());
    assert!(matches!(fail(frozen, &settings(1), &data), TrainError::NothingToTrain));
    let short = fail(trainable(), &settings(1), &noise(10));
    assert_eq!(short.to_string(), "10 tokens do not fill one window of 16");
    let bad = fail(trainable(), &TrainConfig { batch: 0, ..settings(1) }, &data);
    assert!(matches!(bad, TrainError::Config { .. }));
    let mut constant = |_: &Decoder, tokens: Tensor<2, Int>, _| tokens.float().mean();
    let error = fit(trainable(), &settings(1), &data, &mut constant, &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::Untracked { step: 1 }), "{error}");
}

#[test]
fn progress_is_told() {
    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);
    impl Progress for Notes {
        fn on(&self, event: Event<'_>) {
            self.0.lock().unwrap().push(format!("{event:?}"));
        }
    }
    let notes = Notes::default();
    fit(trainable(), &settings(2), &noise(500), &mut loss, &notes, false).unwrap();
    let notes = notes.0.into_inner().unwrap();
    assert_eq!(notes.len(), 4);
    assert!(notes[0].contains("total: Some(2)") && notes[2].contains("loss "), "{notes:?}");
}
