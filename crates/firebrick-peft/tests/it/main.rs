//! Adapters: identities with controls, and Hugging Face's files.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod encoder;
mod hf;
mod lora;

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed, Site};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_peft::{LoraBank, LoraConfig, LoraSettings};

fn decoder(device: &Device) -> Decoder {
    Decoder::random(DecoderConfig::tiny(40), Seed(5), device).unwrap()
}

fn tokens(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..14).map(|i| (i * 11 + 2) % 40).collect();
    Tensor::from_data(TensorData::new(ids, [2, 7]), device)
}

fn logits(decoder: &Decoder, bricks: &[&dyn Brick]) -> Tensor<3> {
    decoder.forward(tokens(&decoder.device()), &mut Run::new(bricks))
}

fn largest(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

/// A bank whose `B` is not zero, with another rank at every site.
fn trained(decoder: &Decoder, device: &Device) -> LoraBank {
    let sites = decoder.sites();
    let part = |(i, site): (usize, Site)| {
        let (d_in, d_out) = sites.linear(site).unwrap();
        let rank = 1 + i % 3;
        let settings = LoraSettings { rank, alpha: 4.0 + i as f64, rslora: false };
        let draw = |name: &str, rows: usize, cols: usize| {
            let values = Seed(3).normal(&format!("{name}/{site}"), rows * cols, 0.1);
            Tensor::<2>::from_data(TensorData::new(values, [rows, cols]), device)
        };
        (site, settings, draw("a", d_in, rank), draw("b", rank, d_out))
    };
    let parts = sites.block_linears().iter().enumerate().map(part).collect();
    LoraBank::from_parts(parts, 0.0).unwrap()
}

fn fresh(decoder: &Decoder, device: &Device) -> LoraBank {
    let targets = decoder.sites().block_linears();
    LoraConfig::default().init(decoder.sites(), &targets, Seed(1), device).unwrap()
}
