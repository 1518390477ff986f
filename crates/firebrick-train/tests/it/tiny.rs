//! A decoder of a few thousand parameters, and what the tests ask of it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Mode, Run, Seed};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_train::{Schedule, TextData, TrainConfig};

pub const VOCAB: u32 = 64;

pub fn decoder(device: &Device) -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": false
    });
    Decoder::random(DecoderConfig::from_hf(&config).unwrap(), Seed(1), device).unwrap()
}

pub fn trainable() -> Decoder {
    decoder(&Device::flex().autodiff()).trainable()
}

/// A pattern that repeats every 8 tokens.
pub fn pattern(tokens: usize) -> TextData {
    TextData::new((0..tokens).map(|i| [3, 14, 15, 9, 26, 53, 58, 32][i % 8]).collect(), tokens)
}

/// Ids without a pattern.
pub fn noise(tokens: usize) -> TextData {
    let id = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u32 % VOCAB;
    TextData::new((0..tokens).map(id).collect(), 3 * tokens)
}

pub fn settings(steps: usize) -> TrainConfig {
    TrainConfig {
        steps,
        batch: 4,
        window: 16,
        learning_rate: 1e-2,
        schedule: Schedule::Cosine { floor: 0.1 },
        warmup: 2,
        log_every: 1,
        ..TrainConfig::default()
    }
}

pub fn loss(decoder: &Decoder, tokens: Tensor<2, Int>, seed: Seed) -> Tensor<1> {
    let mut run = Run::new(&[]);
    (run.seed, run.mode) = (seed, Mode::Train);
    decoder.nll(tokens, &mut run).mean()
}

/// The bits of every parameter, in module order.
pub fn bits<M: Module>(module: &M) -> Vec<Vec<u32>> {
    struct Bits(Vec<Vec<u32>>);
    impl ModuleVisitor for Bits {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let data = param.val().inner().into_data();
            self.0.push(data.iter::<f32>().map(f32::to_bits).collect());
        }
    }
    let mut bits = Bits(Vec::new());
    module.visit(&mut bits);
    bits.0
}

/// The gradients of every parameter that has one, in module order.
pub fn gradients<M: Module>(module: &M, gradients: &GradientsParams) -> Vec<Vec<f64>> {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f64>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = self.0.get::<D>(param.id);
            self.1.extend(gradient.map(|g| g.into_data().iter::<f64>().collect()));
        }
    }
    let mut collect = Collect(gradients, Vec::new());
    module.visit(&mut collect);
    collect.1
}

/// The largest difference, relative to the largest value.
pub fn far(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    let largest = b.iter().flatten().fold(1e-30, |m: f64, v| m.max(v.abs()));
    a.iter().flatten().zip(b.iter().flatten()).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / largest
}
