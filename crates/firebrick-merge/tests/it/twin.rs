//! Twin-Merging: the identities in every family, and what it gains on the embedded model.

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed};
use firebrick_merge::task_vectors::TaskVector;
use firebrick_merge::twin::{Twin, TwinRouter, mean_hidden};
use firebrick_models::{Activation, Biases, Decoder, DecoderConfig, Model, NormPlacement, token_tensor};
use firebrick_moe::AdapterGates;
use firebrick_tensor::linalg::Matrix;
use firebrick_train::domain;

use crate::specialists;

const VOCAB: usize = 24;

/// Decoders that have every kind of weight between them.
pub fn families() -> [DecoderConfig; 3] {
    let tiny = DecoderConfig::tiny(VOCAB);
    let qwen2 = DecoderConfig {
        model_type: "qwen2".into(),
        biases: Biases { qkv: true, ..Biases::default() },
        tied_head: false,
        ..tiny.clone()
    };
    let gemma = DecoderConfig {
        model_type: "gemma3_text".into(),
        norm_placement: NormPlacement::Peri,
        qk_norm: true,
        norm_plus_one: true,
        scaled_embedding: true,
        activation: Activation::GeluTanh,
        local_theta: Some(10_000.0),
        window: Some(6),
        windowed: vec![true, false],
        ..tiny.clone()
    };
    [tiny, qwen2, gemma]
}

/// Every family with three seeds.
pub fn cases() -> impl Iterator<Item = (DecoderConfig, u64)> {
    families().into_iter().cycle().zip(0..9)
}

/// Weights far enough from those of an untrained model that every one of them matters.
pub fn weights(config: &DecoderConfig, seed: u64) -> TaskVector {
    let decoder = Decoder::random(config.clone(), Seed(seed), &Device::flex()).unwrap();
    let mut weights = TaskVector::of(&decoder).unwrap();
    for (site, m) in &mut weights.sites {
        let noise = Matrix::random_normal(m.rows(), m.cols(), Seed(seed), &format!("weights/{site}"));
        m.data_mut().iter_mut().zip(noise.data()).for_each(|(w, n)| *w += 0.2 * n);
    }
    weights
}

pub fn tokens(rows: usize, length: usize, seed: u64) -> Tensor<2, Int> {
    let ids: Vec<i32> =
        Seed(seed).uniform("tokens", rows * length, 0.5).iter().map(|u| ((u + 0.5) * 23.0) as i32).collect();
    Tensor::from_data(TensorData::new(ids, [rows, length]), &Device::flex())
}

pub fn logits(decoder: &Decoder, tokens: &Tensor<2, Int>) -> Tensor<3> {
    decoder.forward(tokens.clone(), &mut Run::default())
}

pub fn far(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

fn full(_: firebrick_core::Site, m: &Matrix) -> usize {
    m.rows().min(m.cols())
}

#[test]
fn routing_to_one_expert_at_full_rank_is_that_expert() {
    let device = Device::flex();
    for (config, seed) in cases() {
        assert_eq!(config.problems(), Vec::<String>::new());
        let experts = [0, 1, 2].map(|e| weights(&config, 10 * seed + e));
        let mean = experts[0].plus(&experts[1], 1.0).unwrap().plus(&experts[2], 1.0).unwrap().times(0.3);
        let twin = Twin::new(mean, &experts, full).unwrap();
        let shared = twin.shared.decoder(config.clone(), &device).unwrap();
        let bank = twin.bank(&config, &device);
        let bricks: [&dyn Brick; 1] = [&bank];
        let ids = tokens(3, 9, seed);
        // Without gates nothing is added: the same bits.
        let plain = shared.forward(ids.clone(), &mut Run::new(&bricks));
        assert_eq!(far(plain.clone(), logits(&shared, &ids)), 0.0);
        // One text for each expert, in one batch.
        let mut run = Run::new(&bricks);
        let one_hot = Tensor::<2>::eye(3, &device).reshape([3, 1, 3]);
        run.insert(AdapterGates::new(one_hot));
        let routed = shared.forward(ids.clone(), &mut run);
        for e in 0..3 {
            let alone = logits(&experts[e].decoder(config.clone(), &device).unwrap(), &ids).narrow(0, e, 1);
            let gap = far(routed.clone().narrow(0, e, 1), alone.clone());
            let size: f32 = alone.clone().abs().max().into_scalar();
            assert!(gap < 1e-5 * size.max(1.0), "{}: {gap} of {size}", config.model_type);
            let other = logits(&experts[(e + 1) % 3].decoder(config.clone(), &device).unwrap(), &ids);
            assert!(far(other.narrow(0, e, 1), alone.clone()) > 0.1, "control: experts differ");
            assert!(far(plain.clone().narrow(0, e, 1), alone) > 0.1, "control: so does the shared model");
        }
    }
}

#[test]
fn factors_compute_what_rebuilt_weights_do() {
    let device = Device::flex();
    for (config, seed) in cases() {
        let experts = [0, 1].map(|e| weights(&config, 10 * seed + e));
        let shared = experts[0].plus(&experts[1], 1.0).unwrap().times(0.5);
        let twin = Twin::new(shared, &experts, |_, m| m.rows().min(m.cols()) / 4).unwrap();
        let ids = tokens(2, 9, seed);
        let shared = twin.shared.decoder(config.clone(), &device).unwrap();
        let bank = twin.bank(&config, &device);
        let bricks: [&dyn Brick; 1] = [&bank];
        for weights in [[0.7, 0.3], [1.0, 0.0]] {
            let mut run = Run::new(&bricks);
            run.insert(AdapterGates::fixed(&weights.map(|w| w as f32), &device));
            let factors = shared.forward(ids.clone(), &mut run);
            let rebuilt =
                logits(&twin.merged(&weights).unwrap().decoder(config.clone(), &device).unwrap(), &ids);
            let size: f32 = rebuilt.clone().abs().max().into_scalar();
            assert!(far(factors.clone(), rebuilt) < 1e-5 * size.max(1.0));
            let expert = logits(&experts[0].decoder(config.clone(), &device).unwrap(), &ids);
            assert!(far(factors, expert) > 0.05, "control: a quarter of the directions is not all");
        }
    }
}

#[test]
fn what_is_held_is_counted_and_misfits_are_listed() {
    let config = DecoderConfig::tiny(VOCAB);
    let experts = [0, 1, 2, 3].map(|e| weights(&config, e));
    let twin = Twin::new(experts[0].clone(), &experts[1..], |_, _| 2).unwrap();
    let sizes = |f: &dyn Fn(&Matrix) -> usize| experts[0].sites.values().map(f).sum::<usize>();
    let each = sizes(&|m| if m.rows() == 1 { m.cols() } else { 2 * (m.rows() + m.cols()) });
    let whole = sizes(&|m| m.data().len());
    assert_eq!(twin.numbers(), whole + 3 * each);
    assert!(twin.merged(&[1.0]).is_err());
    let mut bad = experts[1].clone();
    let _ = bad.sites.pop_first();
    let _ = bad.sites.pop_last();
    let error = Twin::new(experts[0].clone(), &[bad], |_, _| 2).unwrap_err().to_string();
    assert_eq!(error.matches("lacks").count(), 2, "{error}");
}

#[test]
fn routers_learn_and_refuse_wrong_labels() {
    let device = Device::flex();
    let labels: Vec<usize> = (0..60).map(|i| i % 3).collect();
    // Three clouds, off the origin and of very different scales.
    let features = |seed: u64| {
        let noise = Seed(seed).normal("noise", 60 * 4, 1.0);
        let centres = Seed(9).normal("centres", 3 * 4, 3.0);
        let scales = [1e-3, 1.0, 1e3, 10.0];
        let values: Vec<f32> =
            (0..240).map(|i| (5.0 + centres[i / 4 % 3 * 4 + i % 4] + noise[i]) * scales[i % 4]).collect();
        Tensor::<2>::from_data(TensorData::new(values, [60, 4]), &device)
    };
    let right = |router: &TwinRouter| {
        let best = router.scores(features(1)).argmax(1).into_data();
        best.iter::<i64>().zip(&labels).filter(|(b, l)| *b as usize == **l).count()
    };
    let fit = |labels: &[usize], steps| TwinRouter::fit(features(0), labels, 3, steps, 1e-2, Seed(0));
    let (trained, fresh) = (fit(&labels, 100).unwrap(), fit(&labels, 0).unwrap());
    assert!(
        right(&trained) >= 57 && right(&fresh) < 50,
        "{} of 60, {} before",
        right(&trained),
        right(&fresh)
    );
    let gates = trained.gates(features(1)).weights();
    assert_eq!(gates.dims(), [60, 1, 3]);
    assert!((gates.sum().into_scalar::<f32>() - 60.0).abs() < 1e-3);
    let error = fit(&[3; 59], 1).unwrap_err().to_string();
    assert!(error.contains("59 labels") && error.contains("label 3"), "{error}");
}

/// Fine-tunes of the embedded model, task arithmetic and Twin-Merging over them, on held-out windows of each domain, three seeds:
/// the share of the nats between base and specialists, summed over the domains, that each takes.
#[test]
fn most_of_the_specialists_gain_comes_back() {
    let device = Device::flex();
    let model = Model::embedded(&device).unwrap();
    let config = model.decoder.config().clone();
    let base = TaskVector::of(&model.decoder).unwrap();
    let text = |name: &str, held: bool| specialists::text(&model, domain(name).unwrap(), held);
    let names = ["glosses", "rust", "arithmetic"];
    let data = names.map(|n| text(n, false));
    let held = names.map(|n| token_tensor(&text(n, true).spread(specialists::WINDOW, 6), &device));
    let nll =
        |decoder: &Decoder, bricks: &[&dyn Brick], gates: Option<AdapterGates>, ids: &Tensor<2, Int>| {
            let mut run = Run::new(bricks);
            gates.into_iter().for_each(|g| run.insert(g));
            f64::from(decoder.nll(ids.clone(), &mut run).mean().into_scalar::<f32>())
        };
    for seed in 0..3 {
        let experts = data.each_ref().map(|text| {
            let settings = specialists::settings(20, 2, 1e-3, seed);
            TaskVector::of(&specialists::fine_tuned(&model.decoder, text, &settings)).unwrap()
        });
        let task = |e| TaskVector::between(&base, e).unwrap();
        let shared = experts.iter().fold(base.clone(), |sum, e| sum.plus(&task(e), 0.3).unwrap());
        let twin = Twin::new(shared, &experts, |_, m| m.rows().min(m.cols()) / 10).unwrap();
        let decoder = twin.shared.decoder(config.clone(), &device).unwrap();
        let bank = twin.bank(&config, &device);
        let windows: Vec<&[u32]> = data.iter().flat_map(|t| t.spread(specialists::WINDOW, 16)).collect();
        let labels: Vec<usize> = (0..windows.len()).map(|i| i / 16).collect();
        let seen = mean_hidden(&decoder, token_tensor(&windows, &device));
        let router = TwinRouter::fit(seen, &labels, 3, 60, 5e-4, Seed(seed)).unwrap();
        let (mut gap, mut taken, mut right) = (0.0, [0.0; 3], 0);
        for (d, ids) in held.iter().enumerate() {
            let expert = experts[d].decoder(config.clone(), &device).unwrap();
            let start = nll(&model.decoder, &[], None, ids);
            gap += start - nll(&expert, &[], None, ids);
            let seen = mean_hidden(&decoder, ids.clone());
            let best = router.scores(seen.clone()).argmax(1).into_data();
            right += best.iter::<i64>().filter(|b| *b as usize == d).count();
            let routed = nll(&decoder, &[&bank], Some(router.gates(seen)), ids);
            let other = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]][d];
            let astray = nll(&decoder, &[&bank], Some(AdapterGates::fixed(&other, &device)), ids);
            let found = [nll(&decoder, &[], None, ids), routed, astray];
            taken.iter_mut().zip(found).for_each(|(t, found)| *t += start - found);
        }
        let [arithmetic, routed, astray] = taken.map(|t| t / gap);
        let exclusive: usize = twin.exclusive.iter().map(|e| e.numbers()).sum();
        let held = twin.numbers() as f64 / (3 * (twin.numbers() - exclusive)) as f64;
        let says = format!(
            "seed {seed}: of {gap:.2} nats {arithmetic:.3} by task arithmetic, {routed:.3} by Twin-Merging, \
             {astray:.3} with the wrong expert; {right} of 18 routed right; {held:.3} of the experts' numbers held"
        );
        assert!(routed > 0.9 && routed > arithmetic + 0.1 && astray < arithmetic, "{says}");
        assert!(right >= 17 && held < 0.6, "{says}");
    }
}
