use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed, Silent};
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

fn router(top_k: Option<usize>) -> AdapterRouter {
    AdapterRouter::new(64, 2, top_k, Seed(3), &Device::flex().autodiff())
}

fn fit(
    router: AdapterRouter,
    data: &[TextData],
    learning_rate: f64,
) -> Result<(AdapterRouter, f64), TrainError> {
    fit_adapter_router(&decoder(), router, data, 40, 4, 24, learning_rate, Seed(9), &Silent)
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
fn what_cannot_train_is_refused() {
    let data = [text(0, 200), text(16, 200)];
    let fail = |r, data: &[TextData]| fit(r, data, 0.05).unwrap_err();
    assert!(fail(router(None), &data[..1]).to_string().contains("1 texts for 2 adapters"));
    let narrow = AdapterRouter::new(8, 2, None, Seed(3), &Device::flex().autodiff());
    assert!(fail(narrow, &data).to_string().contains("width 8"));
    assert!(matches!(fail(router(None).valid(), &data), TrainError::NothingToTrain));
    let short = [text(0, 200), text(16, 10)];
    assert!(matches!(fail(router(None), &short), TrainError::TooShort { tokens: 10, window: 24 }));
}
