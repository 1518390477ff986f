//! Integration tests of profiles, allocations and reports on small random decoders.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod allocations;
mod importance;
mod profiles;
mod smollm2;

use burn::tensor::Device;
use firebrick_analysis::{Profile, ProfileOptions, profile};
use firebrick_core::{Seed, Silent};
use firebrick_models::{Decoder, DecoderConfig};
use rayon::ThreadPoolBuilder;

/// A small decoder whose weights are large enough to matter.
fn decoder() -> Decoder {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
    });
    let config = DecoderConfig::from_hf(&config).unwrap();
    let mut decoder = Decoder::random(config, Seed(5), &Device::flex()).unwrap();
    for site in decoder.sites().block_linears().iter() {
        // Another scale at every layer: equal layers would leave nothing to allocate.
        let gain = 3.0 + 2.0 * site.layer.unwrap() as f64 + (site.part as u8) as f64 / 8.0;
        let weight = decoder.weight(site).unwrap() * gain;
        decoder = decoder.with_weight(site, weight);
    }
    decoder
}

fn ids(n: usize) -> Vec<u32> {
    Seed(9).uniform("ids", n, 32.0).into_iter().map(|u| (u + 32.0) as u32 % 64).collect()
}

fn options() -> ProfileOptions {
    ProfileOptions { window: 24, max_windows: 6, batch: 4, group: 16, ..ProfileOptions::default() }
}

fn measured(decoder: &Decoder) -> Profile {
    profile(decoder, &ids(200), &options(), &Silent).unwrap()
}

fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}
