//! Importance matrices against plain loops.

use std::cell::RefCell;

use burn::tensor::Tensor;
use firebrick_analysis::{AnalysisError, importance};
use firebrick_core::{Base, Brick, Part, Run, Silent, Site, SiteSet};
use firebrick_models::token_tensor;

use crate::{decoder, ids, on_threads};

/// Keeps the inputs of one site.
struct Inputs {
    sites: SiteSet,
    seen: RefCell<Vec<Vec<f32>>>,
}

impl Brick for Inputs {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let d = x.dims()[2];
        let values = x.clone().into_data().try_into_vec_as::<f32>().unwrap();
        self.seen.borrow_mut().extend(values.chunks(d).map(<[f32]>::to_vec));
        base(x, run)
    }
}

#[test]
fn importances_are_the_mean_squares_of_the_inputs() {
    let (decoder, ids, window) = (decoder(), ids(100), 24);
    let found = importance(&decoder, &ids, window, &Silent).unwrap();
    assert_eq!((found.chunks, found.chunk_size, found.entries.len()), (4, 24, 4 * 7));
    for (site, name) in [
        (Site::layer(0, Part::AttnK), "blk.0.attn_k.weight"),
        (Site::layer(3, Part::MlpDown), "blk.3.ffn_down.weight"),
    ] {
        let inputs = Inputs { sites: [site].into_iter().collect(), seen: RefCell::default() };
        for text in ids.chunks_exact(window) {
            decoder.forward(token_tensor(&[text], &decoder.device()), &mut Run::new(&[&inputs]));
        }
        let seen = inputs.seen.into_inner();
        assert_eq!(seen.len(), 96);
        let means = found.entries[name].means(0).unwrap();
        assert_eq!(means.len(), seen[0].len());
        for (j, mean) in means.iter().enumerate() {
            let expected = seen.iter().map(|x| f64::from(x[j]).powi(2)).sum::<f64>() / 96.0;
            assert!((f64::from(*mean) / expected - 1.0).abs() < 1e-4, "{name} {j}: {mean} and {expected}");
        }
    }
    let same = |a: &str, b: &str| found.entries[a] == found.entries[b];
    assert!(same("blk.1.attn_q.weight", "blk.1.attn_v.weight"), "they read the same");
    assert!(!same("blk.1.attn_q.weight", "blk.1.ffn_up.weight"), "control: these do not");
    assert!(found == on_threads(3, || importance(&decoder, &ids, window, &Silent).unwrap()));

    let short = importance(&decoder, &ids[..20], window, &Silent);
    assert!(matches!(short, Err(AnalysisError::TooFewTokens { have: 20, need: 24 })));
    let outside = importance(&decoder, &[1, 2, 64, 3], 4, &Silent);
    assert!(matches!(outside, Err(AnalysisError::Tokens { id: 64, .. })));
}
