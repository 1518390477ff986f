use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, Cancelled, Event, Part, Progress, Run, Silent, Site, Skip};
use firebrick_train::{EvalReport, TrainError, perplexity, token_tensor};

use crate::tiny::{VOCAB, decoder, noise, trainable};

/// The mean nats per predicted token in `f64`, from the logits of one window at a time.
fn reference(ids: &[u32], window: usize) -> f64 {
    let device = Device::flex();
    let decoder = decoder(&device);
    let (mut sum, mut count) = (0.0, 0);
    for window in ids.chunks_exact(window) {
        let logits = decoder.forward(token_tensor(&[window], &device), &mut Run::default());
        let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
        for (row, &target) in logits.chunks_exact(VOCAB as usize).zip(&window[1..]) {
            let top = row.iter().copied().fold(f64::MIN, f64::max);
            sum += top + row.iter().map(|l| (l - top).exp()).sum::<f64>().ln() - row[target as usize];
            count += 1;
        }
    }
    sum / count as f64
}

fn evaluate(batch: usize, bricks: &[&dyn Brick]) -> EvalReport {
    let data = noise(107);
    perplexity(&decoder(&Device::flex()), bricks, &data.ids, data.bytes, 10, batch, &Silent).unwrap()
}

#[test]
fn perplexity_equals_the_reference_for_any_batch() {
    let (one, many) = (evaluate(1, &[]), evaluate(4, &[]));
    let want = reference(&noise(107).ids, 10);
    for report in [&one, &many] {
        assert_eq!((report.windows, report.tokens), (10, 90));
        assert!((report.mean_nll - want).abs() < 1e-6, "{} {want}", report.mean_nll);
        assert_eq!(report.perplexity, report.mean_nll.exp());
        let bits = want / std::f64::consts::LN_2 / 3.0;
        assert!((report.bits_per_byte.unwrap() - bits).abs() < 1e-6);
        let error = report.standard_error.unwrap();
        assert!(error > 0.0 && error < 0.1);
    }
    assert!((reference(&noise(107).ids, 20) - want).abs() > 1e-6, "the window matters");
}

#[test]
fn bricks_count() {
    let skip =
        Skip { sites: [Site::layer(0, Part::Block), Site::layer(1, Part::Block)].into_iter().collect() };
    let nowhere = Skip::default();
    assert_eq!(evaluate(4, &[&nowhere]), evaluate(4, &[]));
    assert_ne!(evaluate(4, &[&skip]), evaluate(4, &[]));
}

#[test]
fn a_trainable_decoder_is_evaluated_like_a_frozen_one() {
    let data = noise(107);
    let report = perplexity(&trainable(), &[], &data.ids, data.bytes, 10, 4, &Silent).unwrap();
    assert_eq!(report, evaluate(4, &[]));
}

#[test]
fn too_few_tokens_and_cancellation_are_errors() {
    struct Stop;
    impl Progress for Stop {
        fn on(&self, _: Event<'_>) {}
        fn cancelled(&self) -> bool {
            true
        }
    }
    let decoder = decoder(&Device::flex());
    let fail = |ids: &[u32], progress: &dyn Progress| {
        perplexity(&decoder, &[], ids, 0, 10, 4, progress).unwrap_err()
    };
    assert!(matches!(fail(&[1; 9], &Silent), TrainError::TooShort { tokens: 9, window: 10 }));
    assert!(matches!(fail(&[1; 90], &Stop), TrainError::Cancelled(Cancelled)));
    let mut ids = [1; 90];
    ids[50] = VOCAB;
    let error = fail(&ids, &Silent);
    assert!(matches!(error, TrainError::UnknownToken { id: VOCAB, .. }), "{error}");
}

#[test]
fn a_trainable_brick_is_refused() {
    struct Track(firebrick_core::SiteSet, Tensor<1>);
    impl Brick for Track {
        fn sites(&self) -> &firebrick_core::SiteSet {
            &self.0
        }
        fn at(
            &self,
            _: Site,
            x: Tensor<3>,
            base: &mut firebrick_core::Base<'_>,
            run: &mut Run<'_>,
        ) -> Tensor<3> {
            base(x, run) * self.1.clone().reshape([1, 1, 1])
        }
    }
    let factor = Tensor::<1>::ones([1], &Device::flex().autodiff()).require_grad();
    let track = Track([Site::layer(0, Part::Mlp)].into_iter().collect(), factor);
    let error = perplexity(&decoder(&Device::flex()), &[&track], &[1; 20], 0, 10, 1, &Silent).unwrap_err();
    assert!(matches!(error, TrainError::Tracked), "{error}");
}
