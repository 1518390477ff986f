//! Identities of the wiring, each with a control that must fail.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Base, Brick, Part, Run, Seed, Selector, Site, SiteSet, Skip};
use firebrick_models::{Decoder, DecoderConfig, ModelError, NormPlacement, TensorSource};
use firebrick_tensor::ops::{KvCache, rms_norm};

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
fn a_cleared_cache_begins_a_new_text() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let mut run = Run::default();
    run.insert(decoder.kv_cache(2, 9));
    let first = decoder.forward(tokens(4), &mut run).into_data();
    let later = decoder.forward(tokens(4), &mut run).into_data();
    assert_ne!(later, first, "control: the second pass comes after the first");
    run.get_mut::<KvCache>().unwrap().clear();
    assert_eq!(decoder.forward(tokens(4), &mut run).into_data(), first);
    run.insert(decoder.kv_cache(2, 9));
    assert_eq!(decoder.forward(tokens(4), &mut run).into_data(), first, "another cache");
}

#[test]
fn a_skipped_layer_does_not_hold_the_position_back() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let skip = Skip { sites: [Site::layer(0, Part::Block)].into_iter().collect() };
    let bricks: [&dyn Brick; 1] = [&skip];
    let whole = decoder.forward(tokens(6), &mut Run::new(&bricks));
    let mut run = Run::new(&bricks);
    run.insert(decoder.kv_cache(2, 6));
    decoder.forward(tokens(6).narrow(1, 0, 4), &mut run);
    let part = decoder.forward(tokens(6).narrow(1, 4, 2), &mut run);
    assert!(largest(part, whole.clone().narrow(1, 4, 2)) < 1e-5);
    let alone = decoder.forward(tokens(6).narrow(1, 4, 2), &mut Run::new(&bricks));
    assert!(largest(alone, whole.narrow(1, 4, 2)) > 1e-3, "control");
}

#[test]
fn blocks_by_hand_equal_the_hidden_state() {
    let decoder = decoder(DecoderConfig { layers: 3, ..DecoderConfig::tiny(40) });
    let by_hand = |layers: &[usize]| {
        let mut run = Run::default();
        let mut x = decoder.embed(tokens(5), &mut run);
        for layer in layers {
            x = decoder.block(*layer, x, &mut run);
        }
        let gamma = decoder.weight(Site::global(Part::Norm)).unwrap().squeeze_dim(0);
        rms_norm(x, gamma, decoder.config().norm_eps)
    };
    let hidden = decoder.hidden(tokens(5), &mut Run::default());
    assert_eq!(largest(by_hand(&[0, 1, 2]), hidden.clone()), 0.0);
    for skipped in [&[1, 2][..], &[0, 2], &[0, 1], &[1, 0, 2]] {
        assert!(largest(by_hand(skipped), hidden.clone()) > 1e-4, "control: {skipped:?}");
    }
}

#[test]
fn repeated_layers_are_parameters_of_their_own() {
    struct Ids(Vec<ParamId>);
    impl ModuleVisitor for Ids {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.id);
        }
    }
    let ids = |d: &Decoder| {
        let mut ids = Ids(Vec::new());
        d.visit(&mut ids);
        ids.0
    };
    let two = decoder(DecoderConfig::tiny(40));
    let three = two.clone().with_layers(&[1, 0, 1]);
    let unique: HashSet<ParamId> = ids(&three).into_iter().collect();
    assert_eq!(unique.len(), ids(&three).len());
    assert!(ids(&two).iter().all(|id| unique.contains(id)), "the first of each keeps its ids");
    let q = |l| three.weight(Site::layer(l, Part::AttnQ)).unwrap().into_data();
    assert_eq!(q(0), q(2));
    assert_ne!(q(0), q(1), "control");
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

/// Scales what its sites give.
struct Scale(SiteSet, f64);

impl Brick for Scale {
    fn sites(&self) -> &SiteSet {
        &self.0
    }
    fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        base(x, run) * self.1
    }
}

#[test]
fn nll_passes_the_bricks_at_the_head() {
    let decoder = decoder(DecoderConfig::tiny(40));
    let nll = |factor| {
        let scale = Scale([Site::global(Part::Head)].into_iter().collect(), factor);
        let bricks: [&dyn Brick; 1] = [&scale];
        decoder.nll(tokens(6), &mut Run::new(&bricks))
    };
    let far = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
    let bare = decoder.nll(tokens(6), &mut Run::default());
    assert!(far(nll(1.0), bare.clone()) < 1e-6);
    assert!(far(nll(3.0), bare) > 1e-3, "control");
    assert!(far(nll(0.0), Tensor::full([2, 5], 40f64.ln(), &Device::flex())) < 1e-6, "equal logits");
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

/// Says no to every site, and must not be read.
struct Nothing;

impl TensorSource for Nothing {
    fn read_site(&self, site: Site, _: &[usize]) -> Result<Vec<f32>, ModelError> {
        panic!("{site} is read before all shapes are checked")
    }
    fn check_site(&self, site: Site, _: &[usize]) -> Result<(), ModelError> {
        if site == Site::global(Part::Norm) { Ok(()) } else { Err(ModelError::NoWeight { site }) }
    }
}

#[test]
fn sizes_that_no_weight_bears_out_are_not_allocated() {
    let huge = DecoderConfig { vocab: 1 << 22, d_model: 1 << 17, d_ff: 1 << 20, ..DecoderConfig::tiny(40) };
    let error = Decoder::load(huge, &Nothing, &Device::flex()).unwrap_err();
    let ModelError::Weights { problems } = error else { panic!("{error}") };
    assert_eq!(problems.len(), 1 + 2 * 9, "every weight but the norm");
}

#[test]
fn impossible_shapes_are_refused_with_every_reason() {
    let config = DecoderConfig { heads: 3, kv_heads: 2, head_dim: 5, vocab: 0, ..DecoderConfig::tiny(40) };
    let text = Decoder::random(config, Seed(0), &Device::flex()).unwrap_err().to_string();
    for part in ["`vocab_size` is 0", "3 query heads", "`head_dim` is 5"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
