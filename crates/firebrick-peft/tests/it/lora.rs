use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, LayerPlan, Mode, Part, Run, Seed, Settings, Silent, Site};
use firebrick_models::{Biases, Decoder, DecoderConfig};
use firebrick_moe::AdapterGates;
use firebrick_peft::{LoraBank, LoraConfig, LoraSettings, PeftError, fit_lora, fit_lora_mixture};
use firebrick_train::{Mixture, Rows, TextData, TrainConfig};

use crate::{decoder, fresh, largest, logits, tokens, trained};

#[test]
fn a_fresh_bank_changes_nothing() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = fresh(&decoder, &device);
    let base = logits(&decoder, &[]);
    assert_eq!(logits(&decoder, &[&bank]).into_data(), base.clone().into_data());
    let bank = trained(&decoder, &device);
    assert!(largest(logits(&decoder, &[&bank]), base) > 1e-2, "control: a trained one does");
}

#[test]
fn merged_equals_unmerged() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let with = logits(&decoder, &[&bank]);
    let merged = bank.merge(decoder.clone(), 1.0).unwrap();
    assert!(largest(logits(&merged, &[]), with.clone()) < 1e-5);
    let half = bank.merge(decoder.clone(), 0.5).unwrap();
    assert!(largest(logits(&half, &[]), with) > 1e-3, "control: the weight matters");
    let back = bank.unmerge(merged, 1.0).unwrap();
    assert!(largest(logits(&back, &[]), logits(&decoder, &[])) < 1e-5);
}

#[test]
fn merged_equals_unmerged_at_a_head_of_its_own() {
    let device = Device::flex();
    for tied_head in [false, true] {
        let config = DecoderConfig { tied_head, ..DecoderConfig::tiny(40) };
        let decoder = Decoder::random(config, Seed(5), &device).unwrap();
        let head = Site::global(Part::Head);
        let (d_in, d_out) = decoder.sites().linear(head).unwrap();
        let draw = |name: &str, shape: [usize; 2]| {
            let values = Seed(3).normal(name, shape[0] * shape[1], 0.1);
            Tensor::<2>::from_data(burn::tensor::TensorData::new(values, shape), &device)
        };
        let settings = LoraSettings { rank: 2, alpha: 4.0, rslora: false };
        let parts = vec![(head, settings, draw("a", [d_in, 2]), draw("b", [2, d_out]))];
        let bank = LoraBank::from_parts(parts, 0.0).unwrap();
        if tied_head {
            let error = bank.merge(decoder, 1.0).unwrap_err();
            assert!(matches!(error, PeftError::NotLinear { .. }), "{error}");
            continue;
        }
        let with = logits(&decoder, &[&bank]);
        assert!(largest(logits(&decoder, &[]), with.clone()) > 1e-3, "control: the adapter does something");
        assert!(largest(logits(&bank.merge(decoder, 1.0).unwrap(), &[]), with) < 1e-5);
    }
}

#[test]
fn merged_equals_unmerged_beside_biases_and_norms_on_heads() {
    let device = Device::flex();
    let config = DecoderConfig {
        model_type: "qwen3".into(),
        biases: Biases { qkv: true, o: true, mlp: false },
        qk_norm: true,
        ..DecoderConfig::tiny(40)
    };
    let decoder = Decoder::random(config, Seed(5), &device).unwrap();
    let biased = decoder.sites().all().filter(|s| Part::ALL.iter().any(|p| p.bias() == Some(s.part)));
    assert_eq!(biased.len(), 2 * 4);
    let decoder = biased.iter().fold(decoder, |decoder, site| {
        let bias = decoder.weight(site).unwrap();
        let [_, d] = bias.dims();
        let draw = burn::tensor::TensorData::new(Seed(7).normal(&site.to_string(), d, 0.3), [1, d]);
        decoder.with_weight(site, bias + Tensor::from_data(draw, &device))
    });
    let bank = trained(&decoder, &device);
    let with = logits(&decoder, &[&bank]);
    let merged = bank.merge(decoder.clone(), 1.0).unwrap();
    assert!(largest(logits(&merged, &[]), with.clone()) < 1e-5);
    assert!(largest(logits(&decoder, &[]), with) > 1e-3, "control: the adapter does something");
}

#[test]
fn gates_scale_each_token() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device).with_slot(1);
    let bricks: [&dyn Brick; 1] = [&bank];
    let gated = |weights: &[f32]| {
        let mut run = Run::new(&bricks);
        run.insert(AdapterGates::fixed(weights, &device));
        decoder.forward(tokens(&device), &mut run)
    };
    let (base, with) = (logits(&decoder, &[]), logits(&decoder, &bricks));
    assert!(largest(gated(&[1.0, 0.0]), base.clone()) < 1e-6, "gate 0 is the base");
    assert!(largest(gated(&[0.0, 1.0]), with.clone()) < 1e-6, "gate 1 is the adapter");
    assert!(largest(gated(&[0.0, 0.5]), with) > 1e-3, "control");
    // A gate on the first token alone leaves the other texts of the batch as they were.
    let mut weights = vec![0.0; 2 * 7 * 2];
    weights[1] = 1.0;
    let mut run = Run::new(&bricks);
    let values = burn::tensor::TensorData::new(weights, [2, 7, 2]);
    run.insert(AdapterGates::new(Tensor::from_data(values, &device)));
    let some = decoder.forward(tokens(&device), &mut run);
    assert!(largest(some.clone().narrow(0, 1, 1), base.clone().narrow(0, 1, 1)) < 1e-6);
    assert!(largest(some.narrow(0, 0, 1), base.narrow(0, 0, 1)) > 1e-4, "control");
}

#[test]
fn dropout_is_seeded_and_off_in_inference() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let targets = decoder.sites().block_linears();
    let config = LoraConfig { dropout: 0.5, ..LoraConfig::default() };
    let bank = config.init(decoder.sites(), &targets, Seed(1), &device).unwrap();
    // Give B something to say.
    let parts = bank
        .sites()
        .iter()
        .map(|s| {
            let (settings, f) = bank.get(s).unwrap();
            (s, settings, f.a.val(), f.b.val() + 0.05)
        })
        .collect();
    let bank = LoraBank::from_parts(parts, 0.5).unwrap();
    let run = |mode, seed| {
        let bricks: [&dyn Brick; 1] = [&bank];
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (mode, Seed(seed));
        decoder.forward(tokens(&device), &mut run).into_data()
    };
    assert_eq!(run(Mode::Train, 1), run(Mode::Train, 1));
    assert_ne!(run(Mode::Train, 1), run(Mode::Train, 2));
    assert_eq!(run(Mode::Infer, 1), run(Mode::Infer, 2));
    assert_ne!(run(Mode::Infer, 1), run(Mode::Train, 1), "control");
}

#[test]
fn plans_decide_where_and_how_much() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let text = "version = 1\n[[rules]]\nselect = \"layers.*.attn.{q,v}\"\nrank = 2\n[[rules]]\nselect = \"layers.1.mlp.{gate,down}\"\nrank = 4\nalpha = 3.0\n";
    let plan = LayerPlan::from_toml(text).unwrap().resolve(decoder.sites()).unwrap();
    let bank = LoraConfig::default().init_plan(decoder.sites(), &plan, Seed(1), &device).unwrap();
    let names: Vec<String> = bank.sites().iter().map(|s| s.to_string()).collect();
    let expected = [
        "layers.0.attn.q",
        "layers.0.attn.v",
        "layers.1.attn.q",
        "layers.1.attn.v",
        "layers.1.mlp.gate",
        "layers.1.mlp.down",
    ];
    assert_eq!(names, expected);
    let site: Site = "layers.1.mlp.down".parse().unwrap();
    assert_eq!((bank.get(site).unwrap().0.rank, bank.get(site).unwrap().0.alpha), (4, 3.0));
    // Where the plan is silent on alpha, the scale is the configuration's at any rank.
    for rslora in [false, true] {
        let config = LoraConfig { rslora, ..LoraConfig::default() };
        let bank = config.init_plan(decoder.sites(), &plan, Seed(1), &device).unwrap();
        let scale = LoraSettings { rank: config.rank, alpha: config.alpha, rslora }.scale();
        let at = |site: &str| bank.get(site.parse().unwrap()).unwrap().0;
        let silent = at("layers.0.attn.q");
        assert_eq!(silent.rank, 2);
        assert!((silent.scale() / scale - 1.0).abs() < 1e-12, "{silent:?}");
        assert!(
            (at("layers.1.mlp.down").scale() / scale - 1.0).abs() > 0.1,
            "control: a plan's alpha counts"
        );
    }
    let nothing = LayerPlan::from_sites([(site, Settings { bits: Some(4), ..Settings::default() })]);
    let nothing = nothing.resolve(decoder.sites()).unwrap();
    let error = LoraConfig::default().init_plan(decoder.sites(), &nothing, Seed(1), &device).unwrap_err();
    assert!(matches!(error, PeftError::Nothing));
    let norm = [Site::layer(0, Part::AttnNorm)].into_iter().collect();
    assert!(LoraConfig::default().init(decoder.sites(), &norm, Seed(1), &device).is_err());
}

#[test]
fn gradients_are_those_of_the_composed_weight() {
    let device = Device::flex().autodiff();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let bricks: [&dyn Brick; 1] = [&bank];
    let loss = decoder.nll(tokens(&device), &mut Run::new(&bricks)).mean();
    let gradients = GradientsParams::from_grads(loss.backward(), &bank);
    let site: Site = "layers.1.mlp.down".parse().unwrap();
    let factors = bank.get(site).unwrap().1;
    // The loss with `by` added to one element of a factor.
    let nudged = |of_a: bool, [row, column]: [usize; 2], by: f32| -> f64 {
        let part = |s| {
            let (settings, f) = bank.get(s).unwrap();
            let (mut a, mut b) = (f.a.val().inner(), f.b.val().inner());
            if s == site {
                let factor = if of_a { &mut a } else { &mut b };
                let at = [row..row + 1, column..column + 1];
                let element = factor.clone().slice(at.clone()) + by;
                *factor = factor.clone().slice_assign(at, element);
            }
            (s, settings, a, b)
        };
        let bank = LoraBank::from_parts(bank.sites().iter().map(part).collect(), 0.0).unwrap();
        let bricks: [&dyn Brick; 1] = [&bank];
        let inner = decoder.valid();
        let nll = inner.nll(tokens(&inner.device()), &mut Run::new(&bricks)).into_data();
        nll.iter::<f32>().map(f64::from).sum::<f64>() / 12.0
    };
    for (of_a, factor) in [(true, &factors.a), (false, &factors.b)] {
        let gradient = gradients.get::<2>(factor.id).unwrap().into_data();
        let [_, columns] = factor.val().dims();
        let values: Vec<f32> = gradient.iter::<f32>().collect();
        // Where it is largest: a difference of losses says nothing about small ones.
        let largest = (0..values.len()).max_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs())).unwrap();
        let analytic = f64::from(values[largest]);
        let at = [largest / columns, largest % columns];
        let numeric = (nudged(of_a, at, 0.05) - nudged(of_a, at, -0.05)) / 0.1;
        assert!((analytic / numeric - 1.0).abs() < 0.02, "A {of_a} {at:?}: {analytic} against {numeric}");
        let other = f64::from(values[(largest + 1) % values.len()]);
        assert!(
            (other / numeric - 1.0).abs() > 0.2,
            "control: another element has another gradient: {other}"
        );
    }
}

#[test]
fn training_lowers_the_loss_and_touches_only_the_bank() {
    let device = Device::flex().autodiff();
    let decoder = decoder(&device);
    let before = logits(&decoder, &[]).into_data();
    let bank = fresh(&decoder, &device);
    let data = TextData::new((0..600).map(|i| (i * 3) % 40).collect(), 0);
    let config = TrainConfig {
        steps: 30,
        batch: 4,
        window: 16,
        learning_rate: 2e-2,
        warmup: 3,
        ..TrainConfig::default()
    };
    let (bank, report) = fit_lora(&decoder, &[], bank, &config, &data, &Silent, false).unwrap();
    assert!(report.final_loss().unwrap() < 0.96 * report.first_loss().unwrap(), "{report:?}");
    assert_eq!(logits(&decoder, &[]).into_data(), before);
    let bank = bank.valid();
    let valid = decoder.valid();
    assert!(largest(logits(&valid, &[&bank]), logits(&valid, &[])) > 1e-2, "control");
}

#[test]
fn blocks_computed_again_train_the_same_bank() {
    let device = Device::flex().autodiff();
    let decoder = decoder(&device);
    let targets = decoder.sites().block_linears();
    let lora = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.2, rslora: false };
    let data = TextData::new((0..600).map(|i| (i * i) % 23).collect(), 0);
    let held = TextData::new((0..64).map(|i| (i * i) % 23).collect(), 0);
    let (mixture, rows) = (Mixture::text(&data, 16).unwrap(), Rows::windows(&held, 16).unwrap());
    let run = |recompute, dropout| {
        let lora = LoraConfig { dropout, ..lora };
        let bank = lora.init(decoder.sites(), &targets, Seed(1), &device).unwrap();
        let plain = TrainConfig { steps: 6, batch: 2, accumulate: 2, window: 16, ..TrainConfig::default() };
        let config = TrainConfig { learning_rate: 1e-2, warmup: 1, recompute, eval_every: 2, ..plain };
        let run = fit_lora_mixture(&decoder, &[], bank, &config, &mixture, Some(&rows), &Silent, false);
        let (bank, report) = run.unwrap();
        let site = bank.sites().iter().next().unwrap();
        let delta: Vec<f64> = bank.delta(site).unwrap().into_data().iter::<f64>().collect();
        (delta, report)
    };
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let ((whole, report), (parts, again)) = (run(false, 0.2), run(true, 0.2));
    println!("deltas differ by {:e}", far(&whole, &parts));
    assert!(far(&whole, &parts) < 1e-6);
    assert!(far(&report.losses, &again.losses) < 1e-6);
    assert_eq!(report.held_out.len(), 3);
    assert_eq!(report.best_step, again.best_step);
    assert!(far(&report.losses, &run(true, 0.0).1.losses) > 1e-4, "control: dropout is drawn in both");
}

#[test]
fn parts_that_make_no_bank_are_all_listed() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let sound = || -> Vec<_> {
        let part = |s| {
            let (settings, f) = bank.get(s).unwrap();
            (s, settings, f.a.val(), f.b.val())
        };
        bank.sites().iter().map(part).collect()
    };
    assert!(LoraBank::from_parts(sound(), 0.0).is_ok(), "control");
    let mut parts = sound();
    parts[0].1.rank = 0;
    parts[1].1.alpha = f64::INFINITY;
    parts[2].2 = parts[2].3.clone();
    let again = parts[3].clone();
    parts.push(again);
    let Err(PeftError::Parts { problems }) = LoraBank::from_parts(parts, 1.0) else { panic!("accepted") };
    // A rank of 0 fits no factors either.
    assert_eq!(problems.len(), 6, "{problems:?}");
    for part in ["dropout 1", "rank 0", "alpha inf", "comes twice", "for rank"] {
        assert!(problems.iter().any(|p| p.contains(part)), "{part} in {problems:?}");
    }
}
