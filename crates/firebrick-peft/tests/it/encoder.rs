//! Adapters on an encoder: the same bank, the same sites.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed};
use firebrick_models::{Encoder, EncoderConfig, Padding, Pooling, cosine_matrix, pool};
use firebrick_peft::{LoraBank, LoraConfig, hf};
use firebrick_train::AdamW;

fn encoder(device: &Device) -> Encoder {
    Encoder::random(EncoderConfig::tiny(40), Seed(5), device).unwrap()
}

fn bank(encoder: &Encoder, device: &Device) -> LoraBank {
    let targets = encoder.sites().block_linears();
    assert_eq!(targets.len(), 2 * 6);
    LoraConfig { rank: 4, ..LoraConfig::default() }.init(encoder.sites(), &targets, Seed(1), device).unwrap()
}

fn texts(device: &Device) -> (Tensor<2, Int>, Padding) {
    let ids: Vec<i32> = (0..24).map(|i| (i * 11 + 2) % 40).collect();
    (Tensor::from_data(TensorData::new(ids, [4, 6]), device), Padding::new(vec![6, 4, 5, 6]))
}

fn vectors(encoder: &Encoder, bricks: &[&dyn Brick]) -> Tensor<2> {
    let (tokens, padding) = texts(&encoder.device());
    let mut run = Run::new(bricks);
    run.insert(padding);
    let hidden = encoder.hidden(tokens, &mut run);
    pool(hidden, run.get::<Padding>(), Pooling::Mean)
}

/// Texts 0 and 1 belong together, and so do 2 and 3: the negative logarithm of a softmax over cosines.
fn loss(encoder: &Encoder, bricks: &[&dyn Brick]) -> Tensor<1> {
    let x = vectors(encoder, bricks);
    let d = x.dims()[1];
    let halves = x.reshape([2, 2 * d]);
    let (a, b) = (halves.clone().narrow(1, 0, d), halves.narrow(1, d, d));
    let scores = cosine_matrix(a, b) * 5.0;
    let log = burn::tensor::activation::log_softmax(scores, 1);
    let eye = Tensor::<2>::eye(2, &log.device());
    -(log * eye).sum() / 2.0
}

fn all_values<M: Module>(module: &M) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let data = param.val().without_autodiff().into_data();
            self.0.extend(data.try_into_vec_as::<f32>().unwrap());
        }
    }
    let mut values = Values(Vec::new());
    module.visit(&mut values);
    values.0
}

#[test]
fn a_fresh_bank_changes_no_vector() {
    let encoder = encoder(&Device::flex());
    let bank = bank(&encoder, &Device::flex());
    let base = vectors(&encoder, &[]).into_data();
    assert_eq!(vectors(&encoder, &[&bank]).into_data(), base);
}

#[test]
fn training_changes_the_bank_and_nothing_else() {
    let device = Device::flex().autodiff();
    let encoder = encoder(&device);
    let (before, first) = (all_values(&encoder), loss(&encoder, &[]).into_scalar::<f32>());
    let mut bank = bank(&encoder, &device);
    let fresh = all_values(&bank);
    let mut optimizer = AdamW::default();
    for step in 0..8 {
        let of_encoder = GradientsParams::from_grads(loss(&encoder, &[&bank]).backward(), &encoder);
        assert_eq!(of_encoder.len(), 0, "the encoder has no gradients");
        let grads = GradientsParams::from_grads(loss(&encoder, &[&bank]).backward(), &bank);
        // At first `B` is zero, and so are the gradients of `A`; every factor gets one.
        assert_eq!(grads.len(), 2 * 12, "step {step}");
        bank = optimizer.step(1e-2, bank, grads);
    }
    let last = loss(&encoder, &[&bank]).into_scalar::<f32>();
    assert!(last < first - 0.1, "the loss falls: {first} to {last}");
    assert_eq!(all_values(&encoder), before, "the encoder is as it was, bit for bit");
    assert_ne!(all_values(&bank), fresh, "control: the bank is not");
    assert_eq!(loss(&encoder, &[]).into_scalar::<f32>(), first, "without the bank nothing has changed");

    // The same loss trains the encoder itself, if that is asked for.
    let trainable = encoder.trainable();
    let grads = GradientsParams::from_grads(loss(&trainable, &[]).backward(), &trainable);
    assert!(grads.len() > 2 * 16, "{} parameters have a gradient", grads.len());
}

#[test]
fn adapters_go_through_files() {
    let device = Device::flex();
    let encoder = encoder(&device);
    let parts = bank(&encoder, &device);
    let parts = Brick::sites(&parts).iter().map(|site| {
        let (settings, f) = parts.get(site).unwrap();
        (site, settings, f.a.val(), f.b.val() + 0.05)
    });
    let bank = LoraBank::from_parts(parts.collect(), 0.0).unwrap();
    let with = vectors(&encoder, &[&bank]);
    let dir = tempfile::tempdir().unwrap();
    hf::save(&bank, encoder.sites(), "minilm", dir.path()).unwrap();
    let loaded = hf::load(dir.path(), encoder.sites(), &device).unwrap().0;
    let off = |bricks: &[&dyn Brick]| -> f32 {
        (with.clone() - vectors(&encoder, bricks)).abs().max().into_scalar()
    };
    assert!(off(&[&loaded]) < 1e-6);
    assert!(off(&[]) > 1e-3, "control: the bank matters");
}
