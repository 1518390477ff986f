//! Identities of the wiring, each with a control that must fail.

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Seed, Selector, Site, SiteSet, Skip};
use firebrick_models::{Decoder, DecoderConfig, NormPlacement};

fn decoder(config: DecoderConfig) -> Decoder {
    Decoder::random(config, Seed(5), &Device::flex()).unwrap()
}

fn tokens(n: usize) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..2 * n as i32).map(|i| (i * 11 + 2) % 40).collect();
    Tensor::from_data(TensorData::new(ids, [2, n]), &Device::flex())
}

fn largest(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

#[test]
fn cached_steps_equal_one_pass() {
    for (kv_heads, tied_head) in [(1, true), (2, false), (4, true)] {
        let decoder = decoder(DecoderConfig { kv_heads, tied_head, ..DecoderConfig::tiny(40) });
        let whole = decoder.forward(tokens(9), &mut Run::default());
        let mut run = Run::default();
        run.insert(decoder.kv_cache(2, 9));
        let mut start = 0;
        for length in [4, 1, 1, 3] {
            let part = decoder.forward(tokens(9).narrow(1, start, length), &mut run);
            assert!(largest(part, whole.clone().narrow(1, start, length)) < 1e-5);
            start += length;
        }
        let alone = decoder.forward(tokens(9).narrow(1, 4, 5), &mut Run::default());
        assert!(
            largest(alone, whole.narrow(1, 4, 5)) > 1e-3,
            "control: without the cache the past is missing"
        );
    }
}

#[test]
fn attention_is_causal() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let whole = decoder.forward(tokens(8), &mut Run::default());
    let short = decoder.forward(tokens(8).narrow(1, 0, 5), &mut Run::default());
    assert!(largest(short.clone(), whole.clone().narrow(1, 0, 5)) < 1e-5);
    assert!(largest(short, whole.narrow(1, 3, 5)) > 1e-3, "control");
}

#[test]
fn nll_is_the_cross_entropy_of_the_logits() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let nll: Vec<f64> = decoder.nll(tokens(6), &mut Run::default()).into_data().try_into_vec_as().unwrap();
    let logits: Vec<f64> =
        decoder.forward(tokens(6), &mut Run::default()).into_data().try_into_vec_as().unwrap();
    let ids: Vec<i64> = tokens(6).into_data().iter().collect();
    for (i, found) in nll.iter().enumerate() {
        let (row, t) = (i / 5, i % 5);
        let z = &logits[(row * 6 + t) * 40..][..40];
        let lse = z.iter().map(|v| v.exp()).sum::<f64>().ln();
        let expected = lse - z[ids[row * 6 + t + 1] as usize];
        assert!((found - expected).abs() < 1e-5, "{found} against {expected}");
        assert!(
            (found - (lse - z[ids[row * 6 + t] as usize])).abs() > 1e-9,
            "control: the next token is predicted"
        );
    }
}

#[test]
fn nothing_selected_is_the_base_bit_for_bit() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let base = decoder.forward(tokens(5), &mut Run::default()).into_data();
    let nothing = Skip { sites: SiteSet::default() };
    let bricks: [&dyn Brick; 1] = [&nothing];
    assert_eq!(decoder.forward(tokens(5), &mut Run::new(&bricks)).into_data(), base);
    let selector: Selector = "layers.0.attn_sublayer".parse().unwrap();
    let sites = selector.resolve(decoder.sites()).unwrap().of_part(Part::AttnSublayer);
    let something = Skip { sites };
    let bricks: [&dyn Brick; 1] = [&something];
    assert_ne!(decoder.forward(tokens(5), &mut Run::new(&bricks)).into_data(), base, "control");
}

#[test]
fn a_sublayer_with_a_zero_output_projection_can_be_skipped() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let site = Site::layer(1, Part::MlpDown);
    let [d_out, d_in] = decoder.weight(site).unwrap().dims();
    let skip = Skip { sites: [Site::layer(1, Part::MlpSublayer)].into_iter().collect() };
    let bricks: [&dyn Brick; 1] = [&skip];
    let difference = |d: &Decoder| {
        largest(d.forward(tokens(5), &mut Run::default()), d.forward(tokens(5), &mut Run::new(&bricks)))
    };
    assert!(difference(&decoder) > 1e-4, "control: the sublayer does something");
    let zeroed = decoder.with_weight(site, Tensor::zeros([d_out, d_in], &Device::flex()));
    assert_eq!(difference(&zeroed), 0.0);
}

#[test]
fn peri_norms_act_on_the_branch() {
    let config = DecoderConfig { norm_placement: NormPlacement::Peri, ..DecoderConfig::tiny(40) };
    let peri = decoder(config);
    assert!(peri.sites().get(Site::layer(0, Part::AttnPostNorm)).is_some());
    // The branch is normed, so the size of the output projection does not matter, once it is large against epsilon.
    let site = Site::layer(0, Part::AttnO);
    let with = |d: &Decoder, factor: f64| {
        let scaled = d.clone().with_weight(site, d.weight(site).unwrap() * factor);
        scaled.forward(tokens(5), &mut Run::default())
    };
    assert!(largest(with(&peri, 1e3), with(&peri, 1e4)) < 1e-3);
    let pre = decoder(DecoderConfig::tiny(40));
    assert!(largest(with(&pre, 1.0), with(&pre, 1e3)) > 1e-2, "control: without the norm it does");
}

#[test]
fn impossible_shapes_are_refused_with_every_reason() {
    let config = DecoderConfig { heads: 3, kv_heads: 2, head_dim: 5, vocab: 0, ..DecoderConfig::tiny(40) };
    let text = Decoder::random(config, Seed(0), &Device::flex()).unwrap_err().to_string();
    for part in ["`vocab_size` is 0", "3 query heads", "`head_dim` is 5"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
