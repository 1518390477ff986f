use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, Part, Run, Silent, Site, SiteSet, Skip};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_train::eval::{ReferenceReport, compare, mean_and_error};
use firebrick_train::{TrainError, perplexity};

use crate::plain::log_probs;
use crate::tiny::{VOCAB, decoder, noise};

/// Another decoder with the same tokens.
fn other(vocab: u32) -> Decoder {
    let mut config: DecoderConfig = decoder(&Device::flex()).config().clone();
    config.vocab = vocab as usize;
    Decoder::random(config, firebrick_core::Seed(2), &Device::flex()).unwrap()
}

fn against(decoder: &Decoder, bricks: &[&dyn Brick], reference: &Decoder, batch: usize) -> ReferenceReport {
    compare(decoder, bricks, (reference, &[]), &noise(107).ids, 10, batch, &Silent).unwrap()
}

#[test]
fn a_model_is_no_way_from_itself() {
    let model = decoder(&Device::flex());
    let r = against(&model, &[], &model, 4);
    assert_eq!((r.tokens, r.mean_kl, r.median_kl, r.p99_kl, r.max_kl), (90, 0.0, 0.0, 0.0, 0.0));
    assert_eq!(
        (r.top1_agreement, r.perplexity_ratio, r.perplexity_ratio_standard_error),
        (1.0, 1.0, Some(0.0))
    );
    let plain = perplexity(&model, &[], &noise(107).ids, 0, 10, 4, &Silent).unwrap();
    assert!((r.perplexity - plain.perplexity).abs() < 1e-4 && r.rms_probability_change == 0.0);
    // The control.
    let r = against(&other(VOCAB), &[], &model, 4);
    assert!(r.mean_kl > 1e-4 && r.top1_agreement < 0.5, "{r:?}");
}

#[test]
fn it_equals_the_reference_in_f64_for_any_batch() {
    let (model, base) = (other(VOCAB), decoder(&Device::flex()));
    let (mut kl, mut agree, mut difference) = (Vec::new(), Vec::new(), Vec::new());
    for window in noise(107).ids.chunks_exact(10) {
        let (q, p) = (log_probs(&model, window), log_probs(&base, window));
        for j in 0..9 {
            kl.push(p[j].iter().zip(&q[j]).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
            let top = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            agree.push(f64::from(u8::from(top(&p[j]) == top(&q[j]))));
            let target = window[j + 1] as usize;
            difference.push(p[j][target] - q[j][target]);
        }
    }
    let (ratio, error) = mean_and_error(&difference);
    let mean = mean_and_error(&kl);
    kl.sort_by(f64::total_cmp);
    for batch in [1, 4, 100] {
        let r = against(&model, &[], &base, batch);
        assert!((r.mean_kl - mean.0).abs() < 1e-6, "{} {}", r.mean_kl, mean.0);
        assert!((r.mean_kl_standard_error.unwrap() - mean.1.unwrap()).abs() < 1e-6);
        assert!((r.median_kl - (kl[44] + kl[45]) / 2.0).abs() < 1e-6 && (r.max_kl - kl[89]).abs() < 1e-6);
        assert!((r.p99_kl - (kl[88] + 0.11 * (kl[89] - kl[88]))).abs() < 1e-6);
        assert!((r.top1_agreement - mean_and_error(&agree).0).abs() < 1e-12);
        assert!((r.perplexity_ratio - ratio.exp()).abs() < 1e-5);
        assert!((r.perplexity_ratio_standard_error.unwrap() - error.unwrap()).abs() < 1e-4);
    }
}

#[test]
fn the_direction_is_from_the_reference() {
    let (a, b) = (other(VOCAB), decoder(&Device::flex()));
    let (there, back) = (against(&a, &[], &b, 4), against(&b, &[], &a, 4));
    assert!((there.mean_kl - back.mean_kl).abs() > 1e-6, "{} {}", there.mean_kl, back.mean_kl);
    assert!((there.perplexity_ratio * back.perplexity_ratio - 1.0).abs() < 1e-6);
}

/// Adds 1 to the logit of token 0, and sees the whole batch.
struct Nudge(SiteSet);

impl Brick for Nudge {
    fn sites(&self) -> &SiteSet {
        &self.0
    }

    fn at(&self, _: Site, x: Tensor<3>, base: &mut firebrick_core::Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        assert_eq!(x.dims()[..2], run.tokens.as_ref().unwrap().dims(), "gates would stand beside the tokens");
        let logits = base(x, run);
        let first = logits.clone().narrow(2, 0, 1) + 1.0;
        Tensor::cat(vec![first, logits.narrow(2, 1, VOCAB as usize - 1)], 2)
    }
}

#[test]
fn bricks_count_at_the_head_too() {
    let model = decoder(&Device::flex());
    let skip = Skip { sites: [Site::layer(1, Part::Block)].into_iter().collect() };
    assert!(against(&model, &[&skip], &model, 4).mean_kl > 1e-5);
    let nudge = Nudge([Site::global(Part::Head)].into_iter().collect());
    let r = against(&model, &[&nudge], &model, 4);
    // Each distribution is tilted by e at token 0 alone: KL = ln(1 + p (e - 1)) - p, for p = p(token 0).
    let p: Vec<f64> = noise(107)
        .ids
        .chunks_exact(10)
        .flat_map(|w| log_probs(&model, &w[..9]))
        .map(|row| row[0].exp())
        .collect();
    let kl = |p: f64| (p * (1f64.exp() - 1.0)).ln_1p() - p;
    let want = p.iter().map(|&p| kl(p)).sum::<f64>() / p.len() as f64;
    assert!((r.mean_kl - want).abs() < 1e-6, "{} {want}", r.mean_kl);
}

#[test]
fn other_vocabularies_and_short_texts_are_errors() {
    let model = decoder(&Device::flex());
    let fail = |reference: &Decoder, ids: &[u32]| {
        compare(&model, &[], (reference, &[]), ids, 10, 4, &Silent).unwrap_err()
    };
    let error = fail(&other(VOCAB + 1), &[1; 20]);
    assert!(matches!(error, TrainError::Vocabularies { vocab: 64, reference: 65 }), "{error}");
    assert!(matches!(fail(&model, &[1; 9]), TrainError::TooShort { .. }));
    assert!(matches!(fail(&model, &[VOCAB; 20]), TrainError::UnknownToken { .. }));
}
