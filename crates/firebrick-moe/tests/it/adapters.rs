use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Seed, Silent, Site};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_moe::{AdapterGates, AdapterRouter, fit_adapter_router};
use firebrick_train::{TextData, TrainError};

fn decoder() -> Decoder {
    let config =
        DecoderConfig { d_model: 64, heads: 4, kv_heads: 2, head_dim: 16, ..DecoderConfig::tiny(32) };
    Decoder::random(config, Seed(1), &Device::flex()).unwrap()
}

/// A text of ids from `first..first + 16`.
fn text(first: u32, tokens: usize) -> TextData {
    let draws = Seed(first as u64).uniform("text", tokens, 8.0);
    TextData::new(draws.iter().map(|u| first + ((u + 8.0) as u32).min(15)).collect(), tokens)
}

fn other_text(first: u32) -> TextData {
    let draws = Seed(77 + u64::from(first)).uniform("text", 200, 8.0);
    TextData::new(draws.iter().map(|u| first + ((u + 8.0) as u32).min(15)).collect(), 200)
}

fn router(top_k: Option<usize>) -> AdapterRouter {
    AdapterRouter::new(64, 2, top_k, Seed(3), &Device::flex().autodiff())
}

fn fit(
    router: AdapterRouter,
    data: &[TextData],
    learning_rate: f64,
) -> Result<(AdapterRouter, f64), TrainError> {
    // Other draws of the same texts.
    let held: Vec<TextData> = (0..data.len() as u32).map(|i| other_text(16 * i)).collect();
    fit_adapter_router(&decoder(), router, data, &held, 40, 4, 24, learning_rate, Seed(9), &Silent)
}

/// Gates `[tokens, 2]` that `router` leaves for `ids`, passed in these pieces through one run.
fn gates(router: &AdapterRouter, pieces: &[&[i32]]) -> Vec<f32> {
    let decoder = decoder();
    let bricks: [&dyn Brick; 1] = [router];
    let mut run = Run::new(&bricks);
    let mut all = Vec::new();
    for ids in pieces {
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), &Device::flex());
        decoder.embed(ids, &mut run);
        all.extend(run.get::<AdapterGates>().unwrap().weights().into_data().iter::<f32>());
    }
    all
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_router_learns_to_tell_texts_apart() {
    // Of different lengths, so that drawing evenly is not drawing all.
    let data = [text(0, 2000), text(16, 300)];
    let (_, before) = fit(router(None), &data, 0.0).unwrap();
    let (first, accuracy) = fit(router(None), &data, 0.05).unwrap();
    assert!(accuracy > 0.99 && before < 0.9, "{before} -> {accuracy}");
    let (second, again) = fit(router(None), &data, 0.05).unwrap();
    assert_eq!(accuracy, again);
    let bits = |r: AdapterRouter| {
        let (weight, bias) = r.valid().parameters();
        let (weight, bias) = (weight.into_data(), bias.into_data());
        weight.iter::<f32>().chain(bias.iter::<f32>()).map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(first), bits(second), "the same bits every time");
}

#[test]
fn gates_sum_to_1_and_never_look_ahead() {
    let (trained, _) = fit(router(None), &[text(0, 600), text(16, 600)], 0.05).unwrap();
    let trained = trained.valid();
    let ids = [1, 20, 3, 4, 22, 17, 30, 8, 9];
    let base = gates(&trained, &[&ids]);
    for pair in base.chunks(2) {
        assert!((pair[0] + pair[1] - 1.0).abs() < 1e-6);
    }
    let mut later = ids;
    later[5..].copy_from_slice(&[0, 2, 5, 6]);
    let changed = gates(&trained, &[&later]);
    assert_eq!(base[..10], changed[..10], "later tokens do not matter");
    assert!(gap(&base[10..], &changed[10..]) > 1e-2);
    let mut earlier = ids;
    earlier[0] = 25;
    assert!(gap(&base[10..], &gates(&trained, &[&earlier])[10..]) > 1e-3, "earlier tokens do");

    let split = gates(&trained, &[&ids[..4], &ids[4..8], &ids[8..]]);
    assert!(gap(&base, &split) < 1e-5, "pieces through one run are one text");
    let apart = [gates(&trained, &[&ids[..4]]), gates(&trained, &[&ids[4..]])].concat();
    assert!(gap(&base, &apart) > 1e-2, "two runs are two texts");
}

#[test]
fn the_best_gate_alone_counts_all() {
    let (trained, _) = fit(router(Some(1)), &[text(0, 600), text(16, 600)], 0.05).unwrap();
    let gates = gates(&trained.valid(), &[&[1, 20, 3, 4, 22, 17]]);
    for pair in gates.chunks(2) {
        assert!(pair.contains(&0.0) && (pair[0] + pair[1] - 1.0).abs() < 1e-6, "{pair:?}");
    }
}

#[test]
fn of_equal_gates_only_the_first_are_kept() {
    let router = AdapterRouter::new(8, 4, Some(2), Seed(3), &Device::flex());
    let bricks: [&dyn Brick; 1] = [&router];
    let gates = |x: Tensor<3>| {
        let mut run = Run::new(&bricks);
        run.at(Site::global(Part::Embed), x, &mut |x, _| x);
        run.get::<AdapterGates>().unwrap().weights().into_data().iter::<f32>().collect::<Vec<_>>()
    };
    // Nothing to go by: all scores are the bias, 0.
    let device = Device::flex();
    assert_eq!(gates(Tensor::zeros([1, 2, 8], &device)), [0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]);
    let values = Seed(4).normal("x", 3 * 8, 1.0);
    let found = gates(Tensor::from_data(TensorData::new(values, [1, 3, 8]), &device));
    for token in found.chunks(4) {
        assert_eq!(token.iter().filter(|g| **g > 0.0).count(), 2, "{token:?}");
        assert!((token.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
    assert!(found.chunks(4).any(|t| t[2] > 0.0 || t[3] > 0.0), "control: not always the first two");
}

#[test]
fn accuracy_is_that_on_the_held_out_texts() {
    let data = [text(0, 600), text(16, 600)];
    let accuracy = |held: [TextData; 2]| {
        let router = router(None);
        fit_adapter_router(&decoder(), router, &data, &held, 40, 4, 24, 0.05, Seed(9), &Silent).unwrap().1
    };
    let found = accuracy([other_text(0), other_text(16)]);
    assert!(found > 0.95, "{found}");
    let swapped = accuracy([other_text(16), other_text(0)]);
    assert!(
        (found + swapped - 1.0).abs() < 1e-9,
        "control: what is right of one adapter is wrong of the other: {swapped}"
    );
    // A text that fills no window counts as it is, and as much as a long one.
    let short = TextData::new(vec![20, 17, 30], 3);
    let wrong = accuracy([short.clone(), other_text(16)]);
    let right = accuracy([other_text(0), short]);
    assert!((wrong - 0.5).abs() < 0.05 && right > 0.95, "{wrong} {right}");
}

#[test]
fn what_cannot_train_is_refused() {
    let data = [text(0, 200), text(16, 200)];
    let fail = |r, data: &[TextData]| fit(r, data, 0.05).unwrap_err();
    assert!(fail(router(None), &data[..1]).to_string().contains("1 texts for 2 adapters"));
    let empty = [text(0, 200), TextData::new(Vec::new(), 0)];
    let error = fit_adapter_router(&decoder(), router(None), &data, &empty, 4, 4, 24, 0.05, Seed(9), &Silent);
    assert!(error.unwrap_err().to_string().contains("a held-out text is empty"));
    let narrow = AdapterRouter::new(8, 2, None, Seed(3), &Device::flex().autodiff());
    assert!(fail(narrow, &data).to_string().contains("width 8"));
    assert!(matches!(fail(router(None).valid(), &data), TrainError::NothingToTrain));
    let short = [text(0, 200), text(16, 10)];
    assert!(matches!(fail(router(None), &short), TrainError::TooShort { tokens: 10, window: 24 }));
}
