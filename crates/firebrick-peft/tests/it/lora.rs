use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, LayerPlan, Mode, Run, Seed, Settings, Silent, Site};
use firebrick_moe::AdapterGates;
use firebrick_peft::{LoraConfig, PeftError, fit_lora};
use firebrick_train::{TextData, TrainConfig};

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
    let bank = firebrick_peft::LoraBank::from_parts(parts, 0.5).unwrap();
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
    let nothing = LayerPlan::from_sites([(site, Settings { bits: Some(4), ..Settings::default() })]);
    let nothing = nothing.resolve(decoder.sites()).unwrap();
    let error = LoraConfig::default().init_plan(decoder.sites(), &nothing, Seed(1), &device).unwrap_err();
    assert!(matches!(error, PeftError::Nothing));
    let norm = [Site::layer(0, firebrick_core::Part::AttnNorm)].into_iter().collect();
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
    let site: Site = "layers.1.attn.k".parse().unwrap();
    let factors = bank.get(site).unwrap().1;
    let analytic: f32 = gradients.get::<2>(factors.b.id).unwrap().slice([0..1, 0..1]).into_scalar();
    let nudged = |by: f32| -> f64 {
        let parts = bank
            .sites()
            .iter()
            .map(|s| {
                let (settings, f) = bank.get(s).unwrap();
                let mut b = f.b.val().inner();
                if s == site {
                    let corner = b.clone().slice([0..1, 0..1]) + by;
                    b = b.slice_assign([0..1, 0..1], corner);
                }
                (s, settings, f.a.val().inner(), b)
            })
            .collect();
        let bank = firebrick_peft::LoraBank::from_parts(parts, 0.0).unwrap();
        let bricks: [&dyn Brick; 1] = [&bank];
        let inner = decoder.valid();
        f64::from(inner.nll(tokens(&inner.device()), &mut Run::new(&bricks)).mean().into_scalar::<f32>())
    };
    let numeric = (nudged(0.02) - nudged(-0.02)) / 0.04;
    assert!(
        (f64::from(analytic) - numeric).abs() < 2e-3 * (1.0 + numeric.abs()),
        "{analytic} against {numeric}"
    );
    assert!(numeric.abs() > 1e-5, "control: the gradient is not just zero");
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
