use burn::tensor::Device;
use firebrick_core::{Silent, Site, Skip};
use firebrick_train::eval::strided_perplexity;
use firebrick_train::{EvalReport, TrainError, perplexity};

use crate::plain::nats;
use crate::tiny::{VOCAB, decoder, noise, pattern};

fn strided(tokens: usize, window: usize, stride: usize, batch: usize) -> EvalReport {
    let (decoder, data) = (decoder(&Device::flex()), noise(tokens));
    strided_perplexity(&decoder, &[], &data.ids, data.bytes, window, stride, batch, &Silent).unwrap()
}

/// As the documentation of transformers has it: windows in turn, tokens of earlier windows masked out.
fn reference(ids: &[u32], window: usize, stride: usize) -> (f64, usize) {
    let decoder = decoder(&Device::flex());
    let (mut sum, mut count, mut before, mut begin) = (0.0, 0, 0, 0);
    loop {
        let end = ids.len().min(begin + window);
        let first = (end - begin) - (end - before);
        let found = nats(&decoder, &ids[begin..end], first.max(1));
        sum += found.iter().sum::<f64>();
        count += found.len();
        if end == ids.len() {
            return (sum, count);
        }
        (before, begin) = (end, begin + stride);
    }
}

#[test]
fn it_equals_the_reference_for_any_batch() {
    for (tokens, window, stride) in [(107, 20, 5), (107, 20, 19), (101, 20, 10), (13, 20, 5)] {
        let (sum, count) = reference(&noise(tokens).ids, window, stride);
        for batch in [1, 3, 50] {
            let r = strided(tokens, window, stride, batch);
            assert_eq!(r.tokens as usize, count, "{window} {stride}");
            assert_eq!(count, tokens - 1, "each token but the first, once");
            assert!((r.mean_nll - sum / count as f64).abs() < 1e-6, "{window} {stride}: {}", r.mean_nll);
            let bits = r.mean_nll / std::f64::consts::LN_2 / 3.0;
            assert!((r.bits_per_byte.unwrap() - bits).abs() < 1e-12);
        }
    }
}

#[test]
fn a_stride_of_a_window_is_the_plain_perplexity() {
    let (decoder, data) = (decoder(&Device::flex()), noise(100));
    let plain = perplexity(&decoder, &[], &data.ids, data.bytes, 20, 4, &Silent).unwrap();
    let same = strided(100, 20, 20, 4);
    assert_eq!((same.tokens, same.windows), (plain.tokens, plain.windows));
    assert!((same.mean_nll - plain.mean_nll).abs() < 1e-6);
    assert!((same.standard_error.unwrap() - plain.standard_error.unwrap()).abs() < 1e-6);
    // Controls: another stride is another number, and an incomplete last window counts.
    assert!((strided(100, 20, 10, 4).mean_nll - plain.mean_nll).abs() > 1e-5);
    assert_eq!((strided(107, 20, 20, 4).windows, strided(107, 20, 20, 4).tokens), (6, 95 + 6));
}

#[test]
fn what_cannot_be_evaluated_is_an_error() {
    let decoder = decoder(&Device::flex());
    let fail = |ids: &[u32]| strided_perplexity(&decoder, &[], ids, 0, 10, 5, 2, &Silent).unwrap_err();
    assert!(matches!(fail(&[3]), TrainError::TooShort { tokens: 1, .. }));
    assert!(matches!(fail(&[3, VOCAB, 3]), TrainError::UnknownToken { id: VOCAB, .. }));
    let skip = Skip { sites: [Site::layer(0, firebrick_core::Part::Block)].into_iter().collect() };
    let ids = pattern(50).ids;
    let with = |bricks: &[&dyn firebrick_core::Brick]| {
        strided_perplexity(&decoder, bricks, &ids, 0, 10, 5, 2, &Silent).unwrap().mean_nll
    };
    assert_ne!(with(&[&skip]), with(&[]), "bricks count");
}
