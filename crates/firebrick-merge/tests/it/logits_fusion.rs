//! Dynamic Logits Fusion: its identities, against plain sums and a fine grid, and beside the models it runs.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed, Site};
use firebrick_merge::logits_fusion::{
    Companion, ExpertRule, FusionWeight, LogitsFusion, LogitsFusionConfig, fuse_logits,
};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{Decoder, DecoderConfig, GenerateOptions, ModelError, generate_with, token_tensor};
use firebrick_peft::{LoraBank, LoraSettings};

const VOCAB: usize = 300;

fn logits(name: &str, seed: u64, scale: f64) -> Vec<f32> {
    Seed(seed).normal(name, VOCAB, scale)
}

fn plus(base: &[f32], name: &str, seed: u64, scale: f64) -> Vec<f32> {
    base.iter().zip(logits(name, seed, scale)).map(|(b, d)| b + d).collect()
}

fn matched(two_sided: bool, experts: ExpertRule) -> LogitsFusionConfig {
    LogitsFusionConfig { weight: FusionWeight::KlMatched { max: 2.0, two_sided }, experts }
}

fn fixed(weights: &[f64]) -> LogitsFusionConfig {
    LogitsFusionConfig { weight: FusionWeight::Fixed(weights.to_vec()), ..LogitsFusionConfig::default() }
}

fn log_softmax(logits: impl Iterator<Item = f64>) -> Vec<f64> {
    let logits: Vec<f64> = logits.collect();
    let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
    logits.iter().map(|l| l - sum).collect()
}

fn wide(logits: &[f32]) -> Vec<f64> {
    log_softmax(logits.iter().map(|&l| f64::from(l)))
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// The objective of the paper, by its formula, for the shift of one expert.
fn objective(large: &[f32], base: &[f32], experts: &[&[f32]], weights: &[f64]) -> f64 {
    let shifted = log_softmax((0..large.len()).map(|v| {
        let shift = weights.iter().zip(experts).map(|(a, e)| a * f64::from(e[v] - base[v])).sum::<f64>();
        f64::from(large[v]) + shift
    }));
    let (p, q) = (wide(large), wide(base));
    let miss = |expert: &&[f32]| {
        let tuned = wide(expert);
        (kl(&shifted, &p) - kl(&tuned, &q)).powi(2) + (kl(&p, &shifted) - kl(&q, &tuned)).powi(2)
    };
    experts.iter().map(miss).sum()
}

/// The lowest objective of one expert alone on 201 weights in 0..=2: objective, weight.
fn grid(large: &[f32], base: &[f32], experts: &[&[f32]], active: usize) -> (f64, f64) {
    let at = |i: i32| {
        let mut weights = vec![0.0; experts.len()];
        weights[active] = f64::from(i) * 0.01;
        (objective(large, base, experts, &weights), weights[active])
    };
    (0..=200).map(at).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

#[test]
fn experts_that_are_the_base_leave_the_logits_as_they_were() {
    let mut large = logits("large", 1, 3.0);
    large[7] = -0.0;
    let base = logits("base", 1, 2.0);
    let other = plus(&base, "tuning", 1, 1.0);
    for config in [
        matched(true, ExpertRule::BestSingle),
        matched(false, ExpertRule::BestSingle),
        matched(true, ExpertRule::Joint),
        fixed(&[1.0, 0.5]),
    ] {
        let fuse = |experts: &[&[f32]]| {
            let mut fused = large.clone();
            let step = fuse_logits(&mut fused, &base, experts, &config).unwrap();
            (fused, step)
        };
        let (fused, step) = fuse(&[&base, &base]);
        assert_eq!(bits(&fused), bits(&large), "{config:?}");
        assert!(step.moved.iter().chain(&step.wanted).all(|kl| *kl < 1e-12), "{step:?}");
        let (fused, step) = fuse(&[&other, &base]);
        assert_ne!(bits(&fused), bits(&large), "control: {config:?}");
        assert!(step.moved[0] > 0.0 && step.wanted[1] > 0.0);
    }
    // A constant more on every logit is no change either.
    let lifted: Vec<f32> = base.iter().map(|b| b.round() + 1.0).collect();
    let even: Vec<f32> = base.iter().map(|b| b.round()).collect();
    let mut fused = large.clone();
    let step = fuse_logits(&mut fused, &even, &[&lifted], &LogitsFusionConfig::default()).unwrap();
    assert_eq!((bits(&fused), step.weights), (bits(&large), vec![0.0]));
    // Nor is what another order of the same sums rounds.
    for (share, tuned) in [(1e-6, false), (1e-3, true)] {
        let rounded = plus(&base, "rounding", 1, share);
        let mut fused = large.clone();
        let step = fuse_logits(&mut fused, &base, &[&rounded], &LogitsFusionConfig::default()).unwrap();
        assert_eq!(bits(&fused) != bits(&large), tuned, "{step:?}");
        assert_eq!(step.weights[0] > 0.0, tuned, "{step:?}");
    }
}

#[test]
fn a_fixed_weight_is_proxy_tuning() {
    let (large, base) = (logits("large", 2, 3.0), logits("base", 2, 2.0));
    let experts = [plus(&base, "a", 2, 1.0), plus(&base, "b", 2, 1.0)];
    let mut fused = large.clone();
    let step = fuse_logits(&mut fused, &base, &[&experts[0], &experts[1]], &fixed(&[1.0, -0.5])).unwrap();
    assert_eq!(step.weights, [1.0, -0.5]);
    for v in 0..VOCAB {
        let wide = |x: &[f32]| f64::from(x[v]);
        let shift = wide(&experts[0]) - wide(&base) - 0.5 * (wide(&experts[1]) - wide(&base));
        assert!((f64::from(fused[v]) - wide(&large) - shift).abs() < 1e-6);
    }
}

#[test]
fn a_large_model_that_is_the_base_becomes_the_expert() {
    for seed in 0..3 {
        for scale in [0.05, 1.0, 4.0] {
            let base = logits("base", seed, 2.0);
            let expert = plus(&base, "tuning", seed, scale);
            for config in [matched(true, ExpertRule::BestSingle), matched(false, ExpertRule::BestSingle)] {
                let mut fused = base.clone();
                let step = fuse_logits(&mut fused, &base, &[&expert], &config).unwrap();
                assert!((step.weights[0] - 1.0).abs() < 1e-4, "{step:?}");
                let (found, wanted) = (wide(&fused), wide(&expert));
                let far =
                    found.iter().zip(&wanted).map(|(a, b)| (a.exp() - b.exp()).abs()).fold(0.0, f64::max);
                assert!(far < 1e-4, "{far}");
                assert!(objective(&base, &base, &[&expert], &step.weights) < 1e-12);
            }
            assert!(objective(&base, &base, &[&expert], &[0.9]) > 1e-9, "control");
        }
    }
}

#[test]
fn the_prediction_moves_as_far_as_that_of_the_small_model() {
    let mut missed = 0;
    for seed in 0..3 {
        for (scale, tuning) in [(1.0, 1.0), (3.0, 0.5), (3.0, 2.0), (5.0, 3.0)] {
            let (large, base) = (logits("large", seed, scale), logits("base", seed, 2.0));
            let expert = plus(&base, "tuning", seed, tuning);
            let mut fused = large.clone();
            let config = matched(false, ExpertRule::BestSingle);
            let step = fuse_logits(&mut fused, &base, &[&expert], &config).unwrap();
            let (p, q) = (wide(&large), wide(&base));
            let (moved, wanted) = (kl(&wide(&fused), &p), kl(&wide(&expert), &q));
            assert!((step.moved[0] - moved).abs() < 1e-5 && (step.wanted[0] - wanted).abs() < 1e-9);
            if step.weights[0] < 2.0 {
                assert!((moved - wanted).abs() < 1e-5 * (1.0 + wanted), "{moved} for {wanted}");
            } else {
                assert!(moved < wanted, "only what no weight reaches stops at the largest");
            }
            // Control: a weight of one does not do that.
            let mut proxy = large.clone();
            fuse_logits(&mut proxy, &base, &[&expert], &fixed(&[1.0])).unwrap();
            missed += usize::from((kl(&wide(&proxy), &p) - wanted).abs() > 1e-2 * wanted);
        }
    }
    assert!(missed >= 10, "control: {missed} of 12");
}

#[test]
fn no_grid_finds_a_better_weight() {
    let mut weights = Vec::new();
    for seed in 0..3 {
        for (scale, tuning) in [(0.5, 1.0), (2.0, 0.1), (3.0, 1.0), (6.0, 2.0), (1.0, 4.0)] {
            let (large, base) = (logits("large", seed, scale), logits("base", seed, 2.0));
            let expert = plus(&base, "tuning", seed, tuning);
            let step =
                fuse_logits(&mut large.clone(), &base, &[&expert], &LogitsFusionConfig::default()).unwrap();
            let found = objective(&large, &base, &[&expert], &step.weights);
            let (lowest, at) = grid(&large, &base, &[&expert], 0);
            assert!(found <= lowest + 1e-6, "{found} at {:?}, {lowest} at {at}", step.weights);
            weights.push(step.weights[0]);
        }
        // A large model of other sharpness than the base, which tuning sharpened.
        let base = logits("base", seed, 2.0);
        let sharper: Vec<f32> = base.iter().map(|b| b * 1.5).collect();
        let expert = plus(&sharper, "tuning", seed, 0.2);
        for factor in [0.5, 2.0] {
            let large: Vec<f32> = base.iter().map(|b| b * factor).collect();
            let step =
                fuse_logits(&mut large.clone(), &base, &[&expert], &LogitsFusionConfig::default()).unwrap();
            let (_, at) = grid(&large, &base, &[&expert], 0);
            assert!((step.weights[0] - at).abs() < 0.02, "{:?} for {at}", step.weights);
            assert!((at - 1.0).abs() > 0.05, "control: the weight is not one, {at}");
        }
    }
    assert!(weights.iter().any(|w| *w < 0.9) && weights.iter().any(|w| *w > 1.1), "control: {weights:?}");
}

#[test]
fn the_best_of_several_experts_is_heard_or_all_are() {
    let mut seen = [0; 3];
    for seed in 0..6 {
        let (large, base) = (logits("large", seed, 3.0), logits("base", seed, 2.0));
        let experts: Vec<Vec<f32>> =
            ["a", "b", "c"].iter().zip([0.5, 1.0, 1.5]).map(|(n, s)| plus(&base, n, seed, s)).collect();
        let experts: Vec<&[f32]> = experts.iter().map(Vec::as_slice).collect();
        let fuse = |rule| {
            let step = fuse_logits(&mut large.clone(), &base, &experts, &matched(true, rule)).unwrap();
            (objective(&large, &base, &experts, &step.weights), step.weights)
        };
        let (single, weights) = fuse(ExpertRule::BestSingle);
        let active: Vec<usize> = (0..3).filter(|t| weights[*t] != 0.0).collect();
        assert_eq!(active.len(), 1, "{weights:?}");
        seen[active[0]] += 1;
        let grids: Vec<f64> = (0..3).map(|t| grid(&large, &base, &experts, t).0).collect();
        assert!(grids.iter().all(|lowest| single <= lowest + 1e-6), "{single} {grids:?}");
        assert!(grids.iter().any(|lowest| *lowest > single + 1e-4), "control: the choice matters");
        let (joint, weights) = fuse(ExpertRule::Joint);
        assert!(joint <= single + 1e-9, "{joint} {single}");
        assert!(weights.iter().all(|w| (0.0..=2.0).contains(w)), "{weights:?}");
    }
    assert!(seen.iter().filter(|n| **n > 0).count() > 1, "control: not always the same, {seen:?}");
}

#[test]
fn what_one_model_excludes_all_exclude() {
    let (mut large, mut base) = (logits("large", 3, 3.0), logits("base", 3, 2.0));
    let mut expert = plus(&base, "tuning", 3, 1.0);
    large[0] = f32::NEG_INFINITY;
    for logits in [&mut base, &mut expert] {
        logits[1] = f32::NEG_INFINITY;
    }
    base[2] = f32::NEG_INFINITY;
    expert[3] = f32::NEG_INFINITY;
    let without = |x: &[f32]| x[4..].to_vec();
    for config in [LogitsFusionConfig::default(), fixed(&[1.0])] {
        let mut fused = large.clone();
        let step = fuse_logits(&mut fused, &base, &[&expert], &config).unwrap();
        assert!(
            fused[..4].iter().all(|l| *l == f32::NEG_INFINITY) && fused[4..].iter().all(|l| l.is_finite())
        );
        let mut rest = without(&large);
        let alone = fuse_logits(&mut rest, &without(&base), &[&without(&expert)], &config).unwrap();
        assert_eq!((step, &fused[4..]), (alone, &rest[..]), "as if those tokens were not there");
    }
}

#[test]
fn what_can_not_be_fused_is_all_listed() {
    let (large, base) = (logits("large", 4, 1.0), logits("base", 4, 1.0));
    let fuse = |base: &[f32], experts: &[&[f32]], config: &LogitsFusionConfig| {
        fuse_logits(&mut large.clone(), base, experts, config).unwrap_err().to_string()
    };
    let (mut nan, short) = (base.clone(), &base[..VOCAB - 1]);
    nan[3] = f32::NAN;
    let text = fuse(&nan, &[short], &fixed(&[1.0, f64::INFINITY]));
    for part in ["2 fixed weights", "weight is inf", "expert 0 has 299 logits", "of the base is NaN"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(fuse(&base, &[], &LogitsFusionConfig::default()).contains("no expert"));
    let nothing = vec![f32::NEG_INFINITY; VOCAB];
    assert!(fuse(&base, &[&nothing], &LogitsFusionConfig::default()).contains("no token"));
    for max in [0.0, f64::NAN] {
        let weight = FusionWeight::KlMatched { max, two_sided: false };
        let text = fuse(&base, &[&base], &LogitsFusionConfig { weight, experts: ExpertRule::Joint });
        assert!(text.contains("largest weight") && text.contains("both directions"), "{text}");
    }
    let (small, other) = (decoder(8, 1), decoder(9, 1));
    let companion = |decoder| Companion { decoder, bricks: &[] };
    let experts = [companion(&other), companion(&small)];
    let config = fixed(&[1.0]);
    let text = LogitsFusion::new(companion(&small), &experts, config).err().unwrap().to_string();
    assert!(text.contains("expert 0 has a vocabulary of 9") && text.contains("1 fixed weights"), "{text}");
}

/// A decoder with logits that differ by some units.
fn decoder(vocab: usize, seed: u64) -> Decoder {
    let config = DecoderConfig { max_tokens: 40, ..DecoderConfig::tiny(vocab) };
    let decoder = Decoder::random(config, Seed(seed), &Device::flex()).unwrap();
    let sites = decoder.sites().block_linears();
    sites.iter().fold(decoder, |decoder, site| {
        let weight = decoder.weight(site).unwrap() * 20.0;
        decoder.with_weight(site, weight)
    })
}

/// An adapter that changes what the model says.
fn bank(decoder: &Decoder, seed: u64) -> LoraBank {
    let factor = |site: Site, name: &str, shape: [usize; 2]| {
        let values = Seed(seed).normal(&format!("{site}/{name}"), shape[0] * shape[1], 0.3);
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    };
    let settings = LoraSettings { rank: 2, alpha: 4.0, rslora: false };
    let part = |site: Site| {
        let (d_in, d_out) = decoder.sites().linear(site).unwrap();
        (site, settings, factor(site, "a", [d_in, 2]), factor(site, "b", [2, d_out]))
    };
    LoraBank::from_parts(decoder.sites().block_linears().iter().map(part).collect(), 0.0).unwrap()
}

/// The logits of the token after `history`, without a cache.
fn last_logits(decoder: &Decoder, bricks: &[&dyn Brick], history: &[u32]) -> Vec<f32> {
    let all = decoder.forward(token_tensor(&[history], &Device::flex()), &mut Run::new(bricks));
    all.narrow(1, history.len() - 1, 1).into_data().try_into_vec_as::<f32>().unwrap()
}

/// Tokens, and the logits that each was drawn of.
type Steps = (Vec<u32>, Vec<Vec<f32>>);

fn generated(large: &Decoder, fusion: Option<&mut LogitsFusion<'_>>, prompt: &[u32], n: usize) -> Steps {
    let mut seen = Vec::new();
    let mut fusion = fusion;
    let adjust = &mut |history: &[u32], logits: &mut [f32]| {
        if let Some(fusion) = fusion.as_deref_mut() {
            fusion.adjust(history, logits)?;
        }
        seen.push(logits.to_vec());
        Ok::<(), ModelError>(())
    };
    let mut sampler =
        Sampler::new(Sampling { temperature: 1.0, seed: Seed(1), ..Sampling::default() }).unwrap();
    let options = GenerateOptions { max_tokens: n, ..GenerateOptions::default() };
    let go = &mut |_| ControlFlow::Continue(());
    let ids = generate_with(large, &[], prompt, &mut sampler, &options, adjust, go).unwrap();
    (ids, seen)
}

#[test]
fn companions_read_along_with_caches_of_their_own() {
    let (large, base, other) = (decoder(30, 1), decoder(30, 2), decoder(30, 3));
    let bank = bank(&base, 4);
    let tuned: [&dyn Brick; 1] = [&bank];
    let expert = Companion { decoder: &base, bricks: &tuned };
    let base_alone = Companion { decoder: &base, bricks: &[] };
    let second = Companion { decoder: &other, bricks: &[] };
    let config = LogitsFusionConfig::default();
    let mut fusion = LogitsFusion::new(base_alone, &[expert, second], config.clone()).unwrap();
    let (plain, _) = generated(&large, None, &[1, 2, 3], 12);
    let mut drawn = Vec::new();
    // The second text is another one, the third goes on from it.
    let texts = [vec![1, 2, 3], vec![9, 8, 7, 6, 5], vec![9, 8, 7, 6, 5, 1, 1, 1]];
    for prompt in texts {
        let (ids, seen) = generated(&large, Some(&mut fusion), &prompt, 12);
        for (step, found) in seen.iter().enumerate() {
            let history = [&prompt[..], &ids[..step]].concat();
            let mut expected = last_logits(&large, &[], &history);
            let of = |c: Companion<'_>| last_logits(c.decoder, c.bricks, &history);
            fuse_logits(&mut expected, &of(base_alone), &[&of(expert), &of(second)], &config).unwrap();
            let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-3, "step {step}: {far}");
            if step == 5 {
                let without = last_logits(&large, &[], &history);
                let far = found.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far > 0.1, "control: {far}");
            }
        }
        drawn.push(ids);
    }
    assert_ne!(drawn[0], plain, "control: experts change what is said");
    assert_eq!(fusion.steps().len(), 36);
}

#[test]
fn caches_grow_with_the_text() {
    let wide = |seed| {
        let config = DecoderConfig { max_tokens: 400, ..DecoderConfig::tiny(30) };
        Decoder::random(config, Seed(seed), &Device::flex()).unwrap()
    };
    let (base, expert) = (wide(5), wide(6));
    let companion = |decoder| Companion { decoder, bricks: &[] };
    let mut fusion = LogitsFusion::new(companion(&base), &[companion(&expert)], fixed(&[20.0])).unwrap();
    let text: Vec<u32> = (0..300).map(|i| i * i % 30).collect();
    for n in [100, 101, 129, 300] {
        let mut found = vec![0.0; 30];
        fusion.adjust(&text[..n], &mut found).unwrap();
        let of = |decoder: &Decoder| last_logits(decoder, &[], &text[..n]);
        let mut expected = vec![0.0; 30];
        fuse_logits(&mut expected, &of(&base), &[&of(&expert)], &fixed(&[20.0])).unwrap();
        let far = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let large = expected.iter().fold(0.0, |m: f32, l| m.max(l.abs()));
        assert!(far < 1e-4 * large && large > 0.1, "{n}: {far} of {large}");
    }
}

#[test]
fn a_zero_delta_generates_what_the_large_model_does() {
    let (large, base) = (decoder(30, 1), decoder(30, 2));
    let companion = Companion { decoder: &base, bricks: &[] };
    for config in [LogitsFusionConfig::default(), fixed(&[1.0])] {
        let mut fusion = LogitsFusion::new(companion, &[companion], config).unwrap();
        let (ids, seen) = generated(&large, Some(&mut fusion), &[1, 2, 3], 15);
        let (plain, alone) = generated(&large, None, &[1, 2, 3], 15);
        assert_eq!(ids, plain);
        assert!(seen.iter().zip(&alone).all(|(a, b)| bits(a) == bits(b)));
        assert_eq!(fusion.steps().len(), 15);
    }
}

#[test]
fn texts_that_companions_can_not_read_are_refused() {
    let base = decoder(30, 2);
    let companion = Companion { decoder: &base, bricks: &[] };
    let mut fusion = LogitsFusion::new(companion, &[companion], fixed(&[1.0])).unwrap();
    let mut adjust = |history: &[u32], vocab: usize| {
        fusion.adjust(history, &mut vec![0.0; vocab]).map_err(|e| e.to_string())
    };
    assert!(adjust(&[], 30).unwrap_err().contains("0 tokens"));
    assert!(adjust(&[1; 41], 30).unwrap_err().contains("context of 40"));
    assert!(adjust(&[1, 30], 30).unwrap_err().contains("token 30"));
    assert!(adjust(&[1], 31).unwrap_err().contains("31 tokens, the small ones 30"));
    assert_eq!(adjust(&[1; 40], 30), Ok(()));
}
