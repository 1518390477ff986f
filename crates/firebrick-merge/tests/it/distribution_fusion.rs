//! Distribution fusion: what comes over from one tokenizer to another, how it is fused, and what a student learns from it.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Brick, Part, Run, Seed, Silent, Site, SiteSet, Tap};
use firebrick_merge::distribution_fusion::{
    DistributionFusionConfig, FusedTargets, FusionRule, FusionTeacher, Predictions, carry, fuse, predictions,
};
use firebrick_merge::logits_fusion::Companion;
use firebrick_merge::token_alignment::{VocabMap, VocabRule, one_to_one};
use firebrick_models::tokenizer::{SPECIAL_TOKENS, Tokenizer, train_bpe};
use firebrick_models::{Decoder, DecoderConfig, ModelFiles, token_tensor};
use firebrick_train::{TextData, TrainConfig, domain, fit};

/// A tokenizer of so many tokens, trained on a part of a domain.
fn tokenizer(name: &str, part: usize, vocab: usize) -> Tokenizer {
    let text = domain(name).unwrap().train_text();
    let chars: Vec<char> = text.chars().skip(part * 20_000).take(20_000).collect();
    train_bpe([chars.iter().collect::<String>().as_str()], vocab).unwrap()
}

/// A decoder whose predictions differ from token to token.
fn decoder(config: DecoderConfig, seed: u64) -> Decoder {
    let decoder = Decoder::random(config, Seed(seed), &Device::flex()).unwrap();
    let sites = decoder.sites().block_linears();
    sites.iter().fold(decoder, |decoder, site| {
        let weight = decoder.weight(site).unwrap() * 20.0;
        decoder.with_weight(site, weight)
    })
}

fn bare(decoder: &Decoder) -> Companion<'_> {
    Companion { decoder, bricks: &[] }
}

/// Log-probabilities of every next token, in f64.
fn log_p(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f64>> {
    let all = decoder.forward(token_tensor(&[ids], &Device::flex()), &mut Run::default());
    let vocab = all.dims()[2];
    let logits: Vec<f64> = all.into_data().try_into_vec_as::<f64>().unwrap();
    let row = |z: &[f64]| {
        let sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        z.iter().map(|z| z - sum).collect()
    };
    logits.chunks(vocab).map(row).collect()
}

fn ids(n: u32, vocab: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i + 3) % vocab).collect()
}

#[test]
fn the_most_probable_tokens_are_kept() {
    let decoder = decoder(DecoderConfig::tiny(50), 1);
    let text = ids(20, 50);
    let known = log_p(&decoder, &text);
    let found = predictions(bare(&decoder), &[], &text, 7).unwrap();
    assert_eq!(found.steps.len(), 19);
    let nll: f64 = text[1..].iter().zip(&known).map(|(id, row)| -row[*id as usize]).sum();
    assert!((found.nll - nll).abs() < 1e-4, "{} {nll}", found.nll);
    for (step, row) in found.steps.iter().zip(&known) {
        let mut order: Vec<usize> = (0..50).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let mass: f64 = order[..7].iter().map(|id| row[*id].exp()).sum();
        assert!(mass < 0.99, "control: the rest is not nothing");
        for ((id, p), expected) in step.iter().zip(&order) {
            assert_eq!(*id as usize, *expected);
            assert!((f64::from(*p) - row[*expected].exp() / mass).abs() < 1e-5);
        }
    }
    // Behind a begin token: as in the text that has it.
    let behind = predictions(bare(&decoder), &text[..3], &text[3..], 7).unwrap();
    assert_eq!(behind.steps.len(), 16);
    assert_eq!(behind.steps, found.steps[3..]);
    assert_ne!(predictions(bare(&decoder), &[], &text[3..], 7).unwrap().steps, behind.steps, "control");
}

#[test]
fn one_tokenizer_brings_everything_over() {
    let (own, other) = (tokenizer("prose", 0, 400), tokenizer("scripture", 0, 300));
    let decoder = decoder(DecoderConfig::tiny(400), 1);
    let text = &domain("prose").unwrap().held_out_text()[..400];
    let source = own.encode(text, false).unwrap();
    let known = predictions(bare(&decoder), &[], &source, 10).unwrap();
    let mut map = VocabMap::new(&own, &own, VocabRule::Nearest);
    let (mut found, carried) = carry(&known, &source, &source, &mut map).unwrap();
    assert_eq!(carried, source.len() - 1);
    let mut sorted = known.clone();
    for steps in [&mut found.steps, &mut sorted.steps] {
        steps.iter_mut().for_each(|step| step.sort_by_key(|pair| pair.0));
    }
    for (a, b) in found.steps.iter().zip(&sorted.steps) {
        assert!(a.iter().zip(b).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6), "{a:?} {b:?}");
    }
    // Control: another tokenizer does not, and is certain of its own tokens there.
    let target = other.encode(text, false).unwrap();
    let mut map = VocabMap::new(&own, &other, VocabRule::Nearest);
    let (found, carried) = carry(&known, &source, &target, &mut map).unwrap();
    assert!(0 < carried && carried < target.len() - 1, "{carried} of {}", target.len());
    assert_eq!(found.steps.len(), target.len() - 1);
    let certain = found.steps.iter().zip(&target[1..]).filter(|(step, id)| **step == [(**id, 1.0)]).count();
    assert_eq!(certain, target.len() - 1 - carried);
    assert_eq!(found.nll, known.nll);
    for step in &found.steps {
        assert!((step.iter().map(|p| p.1).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn most_steps_of_other_tokenizers_come_over() {
    let embedded = ModelFiles::embedded().unwrap().tokenizer;
    let whole = |name: &str| train_bpe([domain(name).unwrap().train_text().as_str()], 2000).unwrap();
    let mut pairs = vec![("prose", whole("prose"), 0.6), ("scripture", whole("scripture"), 0.6)];
    // Its tokens are longer than the embedded model's: one of them is often several.
    let smollm2 = "../../target/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let smollm2 = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(smollm2);
    match smollm2.exists() {
        true => pairs.push(("SmolLM2", ModelFiles::open(&smollm2).unwrap().tokenizer, 0.5)),
        false => eprintln!("without SmolLM2: `cargo xtask model smollm2` fetches it"),
    }
    let text = ["prose", "scripture"].map(|name| domain(name).unwrap().held_out_text()).concat();
    let sentences: Vec<&str> =
        text.split_inclusive(['.', ';']).filter(|s| s.len() > 20).step_by(2).take(200).collect();
    assert_eq!(sentences.len(), 200);
    let target = &embedded;
    for (name, source, least) in pairs {
        let mut map = VocabMap::new(&source, target, VocabRule::Nearest);
        let (mut over, mut aligned, mut steps) = (0, 0, 0);
        for sentence in &sentences {
            let (from, to) =
                (source.encode(sentence, false).unwrap(), target.encode(sentence, false).unwrap());
            // Every step predicts some three tokens of the vocabulary.
            let vocab = source.vocab_size() as u32;
            let step = |id: u32| (0..3).map(|i| ((id * 7 + i * 131) % vocab, 1.0 / 3.0)).collect();
            let known = Predictions { steps: from[1..].iter().map(|id| step(*id)).collect(), nll: 1.0 };
            let (found, carried) = carry(&known, &from, &to, &mut map).unwrap();
            over += carried;
            aligned += one_to_one(&map.align(&from, &to), to.len()).iter().flatten().count() - 1;
            steps += to.len() - 1;
            let valid = |id: u32| target.token(id).is_some();
            assert!(found.steps.iter().flatten().all(|(id, _)| valid(*id)), "{name}");
        }
        let share = |n: usize| n as f64 / steps as f64;
        eprintln!("{name}: {:.3} aligned, {:.3} come over", share(aligned), share(over));
        assert!(share(aligned) > least && share(over) > 0.5 * share(aligned), "{name}");
        assert!(share(aligned) < 1.0, "control: {name}");
    }
}

#[test]
fn teachers_are_fused_by_what_they_know() {
    let teacher =
        |nll: f64, steps: [&[(u32, f32)]; 2]| Predictions { nll, steps: steps.map(<[_]>::to_vec).to_vec() };
    let good = teacher(1.0, [&[(3, 0.5), (1, 0.5)], &[(2, 1.0)]]);
    let bad = teacher(4.0, [&[(1, 0.25), (7, 0.75)], &[(2, 1.0)]]);
    let both = [bad.clone(), good.clone()];
    assert_eq!(fuse(FusionRule::MinCe, &both).unwrap(), good.steps);
    assert_ne!(fuse(FusionRule::MinCe, &both[..1]).unwrap(), good.steps, "control");
    let mixed = fuse(FusionRule::AvgCe, &both).unwrap();
    // Nats per step: 0.5 and 2.
    let (g, b) = ((-0.5f64).exp().exp(), (-2f64).exp().exp());
    let (g, b) = (g / (g + b), b / (g + b));
    let expected = [(1, 0.5 * g + 0.25 * b), (3, 0.5 * g), (7, 0.75 * b)];
    assert_eq!(mixed[0].len(), 3);
    for ((id, p), (other, q)) in mixed[0].iter().zip(expected) {
        assert!(*id == other && (f64::from(*p) - q).abs() < 1e-6, "{mixed:?}");
    }
    assert!(mixed[1][0].0 == 2 && (mixed[1][0].1 - 1.0).abs() < 1e-6);
    let alike = fuse(FusionRule::AvgCe, &[bad.clone(), bad.clone()]).unwrap();
    let near = |a: &(u32, f32), b: &(u32, f32)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
    assert!(alike.iter().flatten().zip(bad.steps.iter().flatten()).all(|(a, b)| near(a, b)));
}

#[test]
fn the_loss_is_that_of_dense_targets() {
    let tokenizer = tokenizer("prose", 0, 300);
    let text = tokenizer.encode(&domain("prose").unwrap().held_out_text()[..300], false).unwrap();
    let windows: Vec<&[u32]> = text.chunks_exact(24).take(3).collect();
    let plain = DecoderConfig::tiny(300);
    let (teacher, student) = (decoder(plain.clone(), 1), decoder(plain, 2));
    // Something at the head, although it changes nothing, needs whole logits.
    let tap = Tap { sites: SiteSet::from_iter([Site::global(Part::Head)]) };
    let watched: [&dyn Brick; 1] = [&tap];
    let new = |teacher: &Decoder, top, soft| {
        let config = DistributionFusionConfig { top, soft, ..DistributionFusionConfig::default() };
        let teachers = [FusionTeacher { model: bare(teacher), tokenizer: &tokenizer }];
        FusedTargets::new(&tokenizer, &teachers, windows.iter().copied(), &config, &Silent).unwrap()
    };
    let loss = |targets: &FusedTargets, bricks: &[&dyn Brick]| {
        let tokens = token_tensor(&windows, &Device::flex());
        f64::from(targets.loss(&student, &mut Run::new(bricks), tokens).into_scalar::<f32>())
    };
    for bricks in [&[][..], &watched] {
        for soft in [0.0, 0.1, 1.0] {
            let targets = new(&teacher, 10, soft);
            assert_eq!(targets.carried(), [1.0]);
            let (mut hard, mut kl) = (0.0, 0.0);
            for window in &windows {
                let rows = log_p(&student, window);
                for ((row, label), q) in rows.iter().zip(&window[1..]).zip(targets.window(window).unwrap()) {
                    hard -= row[*label as usize] / 69.0;
                    let term =
                        |(id, q): &(u32, f32)| f64::from(*q) * (f64::from(*q).ln() - row[*id as usize]);
                    kl += q.iter().map(term).sum::<f64>() / 69.0;
                }
            }
            let (found, expected) = (loss(&targets, bricks), (1.0 - soft) * hard + soft * kl);
            assert!((found - expected).abs() < 1e-4, "{soft}: {found} {expected}");
            assert!((hard - kl).abs() > 0.1, "control: the parts differ");
        }
    }
    // A model has nothing to learn from itself, from another it has.
    assert!(loss(&new(&student, 300, 1.0), &[]).abs() < 1e-5);
    assert!(loss(&new(&teacher, 300, 1.0), &[]) > 1e-3, "control");
}

#[test]
fn what_can_not_be_fused_is_all_listed() {
    let tokenizer = tokenizer("prose", 0, 300);
    let decoder = decoder(DecoderConfig { max_tokens: 8, ..DecoderConfig::tiny(50) }, 1);
    let text = |e: firebrick_merge::MergeError| e.to_string();
    let found = text(predictions(bare(&decoder), &[], &ids(9, 60), 0).unwrap_err());
    for part in ["context of 8", "token 52", "no token of a prediction"] {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert!(text(predictions(bare(&decoder), &[1], &[2], 1).unwrap_err()).contains("nothing to predict"));
    let config = DistributionFusionConfig { top: 0, soft: 1.5, ..DistributionFusionConfig::default() };
    let none: [&[u32]; 0] = [];
    let found = text(FusedTargets::new(&tokenizer, &[], none, &config, &Silent).unwrap_err());
    for part in ["soft 1.5", "no token of a prediction", "no teacher"] {
        assert!(found.contains(part), "{part}: {found}");
    }
    let known = Predictions { steps: vec![vec![(1, 1.0)]], nll: f64::NAN };
    let mut map = VocabMap::new(&tokenizer, &tokenizer, VocabRule::Equal);
    let found = text(carry(&known, &[1, 2, 3], &[], &mut map).unwrap_err());
    assert!(found.contains("1 predictions for a text of 3") && found.contains("no tokens"), "{found}");
    let longer = Predictions { steps: vec![Vec::new(); 2], nll: 1.0 };
    let found = text(fuse(FusionRule::AvgCe, &[known, longer]).unwrap_err());
    assert!(found.contains("likelihood of NaN") && found.contains("teacher 1 has 2 steps"), "{found}");
}

const WINDOW: usize = 48;

fn trained(
    decoder: Decoder,
    data: &TextData,
    steps: usize,
    seed: u64,
    loss: &mut dyn FnMut(&Decoder, Tensor<2, Int>) -> Tensor<1>,
) -> Decoder {
    let settings =
        TrainConfig { steps, batch: 8, window: WINDOW, learning_rate: 5e-3, seed, ..TrainConfig::default() };
    let decoder = decoder.train().trainable();
    let loss = &mut |d: &Decoder, tokens: Tensor<2, Int>, _: Seed| loss(d, tokens);
    fit(decoder, &settings, data, loss, &Silent, false).unwrap().0.valid()
}

/// The same tokenizer with its tokens, but for the special ones, in another order.
fn reordered(tokenizer: &Tokenizer, seed: u64) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let n = tokenizer.vocab_size();
    let keys = Seed(seed).normal("order", n, 1.0);
    let mut order: Vec<usize> = (SPECIAL_TOKENS.len()..n).collect();
    order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
    for (_, id) in json["model"]["vocab"].as_object_mut().unwrap() {
        let old = id.as_u64().unwrap() as usize;
        if let Some(place) = old.checked_sub(SPECIAL_TOKENS.len()) {
            *id = order[place].into();
        }
    }
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

#[test]
fn a_student_learns_more_from_fused_teachers_than_from_labels() {
    let device = Device::flex().autodiff();
    let of = |d: usize, vocab| DecoderConfig {
        d_model: d,
        d_ff: 2 * d,
        head_dim: d / 4,
        ..DecoderConfig::tiny(vocab)
    };
    let labels = &mut |d: &Decoder, tokens: Tensor<2, Int>| d.nll(tokens, &mut Run::default()).mean();
    let text: String = domain("prose").unwrap().train_text().chars().take(50_000).collect();
    // Teachers with vocabularies in orders of their own, trained on all of the text.
    let own = tokenizer("prose", 0, 340);
    let read = [1, 2].map(|seed| reordered(&own, seed));
    let all = TextData::from_text(&text, &own).unwrap().ids;
    assert_ne!(all, TextData::from_text(&text, &read[0]).unwrap().ids, "control: other orders");
    let teachers: Vec<Decoder> = (0u64..)
        .zip(&read)
        .map(|(seed, tokenizer)| {
            let data = TextData::from_text(&text, tokenizer).unwrap();
            let decoder = Decoder::random(of(64, tokenizer.vocab_size()), Seed(seed), &device).unwrap();
            trained(decoder, &data, 300, seed, labels)
        })
        .collect();
    let tenth = TextData::new(all[..all.len() / 10].to_vec(), 0);
    let held = TextData::from_text(&domain("prose").unwrap().held_out_text(), &own).unwrap();
    let held = held.spread(WINDOW, 40);
    let teaching: Vec<FusionTeacher<'_>> = teachers
        .iter()
        .zip(&read)
        .map(|(decoder, tokenizer)| FusionTeacher { model: bare(decoder), tokenizer })
        .collect();
    // English is far from certain of its next token: ten tokens would be half of a prediction.
    let config = DistributionFusionConfig { top: 60, soft: 0.9, ..DistributionFusionConfig::default() };
    let targets = FusedTargets::new(&own, &teaching, tenth.windows(WINDOW), &config, &Silent).unwrap();
    assert_eq!(targets.carried(), [1.0, 1.0]);
    for seed in 0..3 {
        let student = Decoder::random(of(48, own.vocab_size()), Seed(seed), &device).unwrap();
        let nll = |decoder: &Decoder| {
            let tokens = token_tensor(&held, &Device::flex());
            decoder.nll(tokens, &mut Run::default()).mean().into_scalar::<f32>()
        };
        let alone = nll(&trained(student.clone(), &tenth, 150, seed, labels));
        let fused = &mut |d: &Decoder, tokens: Tensor<2, Int>| targets.loss(d, &mut Run::default(), tokens);
        let taught = nll(&trained(student, &tenth, 150, seed, fused));
        eprintln!("seed {seed}: labels {alone:.3}, fused {taught:.3}");
        assert!(taught < alone - 0.05, "seed {seed}: {taught} against {alone}");
    }
}
