//! The suites, one file each.

use anyhow::Result;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::SiteTable;
use firebrick_models::{Decoder, DecoderConfig, ModelFiles};
use firebrick_tensor::ops::Precision;

use crate::{Bench, Bound};

mod checkpoint;
mod choices;
mod decode;
mod forward;
mod merge;
mod moe;
mod profile;
mod quantize;
mod roofline;
mod train;

/// A group of cases.
pub struct Suite {
    /// How it is asked for.
    pub name: &'static str,
    /// What it measures, in a few words.
    pub what: &'static str,
    /// Whether its work knows no device, so that it runs once.
    pub on_host: bool,
    /// Measures its cases.
    pub run: fn(&Bench<'_>) -> Result<()>,
}

/// Every suite, in the order in which they run; `roofline` comes first and always.
pub const SUITES: &[Suite] = &[
    Suite { name: "forward", what: "a forward pass without the head", on_host: false, run: forward::run },
    Suite { name: "train", what: "a step of all weights, and one of LoRA", on_host: false, run: train::run },
    Suite { name: "decode", what: "a prompt, and tokens one by one", on_host: false, run: decode::run },
    Suite {
        name: "choices",
        what: "log-likelihoods of choices beside one sequence at a time",
        on_host: false,
        run: choices::run,
    },
    Suite { name: "moe", what: "a mixture of 64 experts, top 8", on_host: false, run: moe::run },
    Suite {
        name: "profile",
        what: "the profile beside its own forward passes",
        on_host: false,
        run: profile::run,
    },
    Suite { name: "quantize", what: "RTN and GPTQ, a layer and a model", on_host: true, run: quantize::run },
    Suite { name: "merge", what: "three bf16 checkpoints into one", on_host: true, run: merge::run },
    Suite {
        name: "checkpoint",
        what: "converting, opening and reading models",
        on_host: true,
        run: checkpoint::run,
    },
];

pub use roofline::{Product, measure as roofline};

/// The name of the type that products take.
fn dtype(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

/// What bounds so many floating-point operations in such products.
fn compute(flop: f64, precision: Precision) -> Bound {
    match precision {
        Precision::F32 => Bound::Compute(flop),
        Precision::Bf16 => Bound::ComputeBf16(flop),
    }
}

/// `[batch, tokens]` ids that are the same in every run and for every peer.
fn tokens(vocab: usize, batch: usize, length: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..batch * length).map(|i| (i * 7919 % vocab) as i32).collect();
    Tensor::from_data(TensorData::new(ids, [batch, length]), device)
}

fn load(files: &ModelFiles, device: &Device) -> Result<Decoder> {
    Ok(Decoder::load(files.config.clone(), &files.weights(), device)?)
}

/// As [`load`], to compute in `precision` with weights that do not train.
fn load_in(files: &ModelFiles, precision: Precision, device: &Device) -> Result<Decoder> {
    match precision {
        Precision::Bf16 if precision.available() => {
            Ok(Decoder::load_in_bf16(files.config.clone(), &files.weights(), device)?)
        }
        _ => load(files, device),
    }
}

/// Weights of the linear layers inside the blocks.
fn linear_weights(sites: &SiteTable) -> f64 {
    let sizes = sites.block_linears();
    sizes.iter().filter_map(|s| sites.linear(s)).map(|(d_in, d_out)| d_in * d_out).sum::<usize>() as f64
}

/// Floating-point operations of a forward pass without the head: the linear layers, and the half of attention's two products
/// that a causal mask leaves.
fn forward_flop(config: &DecoderConfig, sites: &SiteTable, batch: usize, length: usize) -> f64 {
    let pairs = length * (length + 1) / 2;
    let attention = config.layers * 2 * config.heads * config.head_dim * pairs;
    let tokens = (batch * length) as f64;
    2.0 * (linear_weights(sites) * tokens + (batch * attention) as f64)
}

/// Floating-point operations of the head for `tokens` tokens.
fn head_flop(config: &DecoderConfig, tokens: usize) -> f64 {
    2.0 * (config.d_model * config.vocab * tokens) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Roofline;

    #[test]
    fn operations_are_counted_as_by_hand() {
        let files = ModelFiles::embedded().unwrap();
        let (c, sites) = (&files.config, files.sites());
        let (heads, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layer = c.d_model * (2 * heads + 2 * kv) + 3 * c.d_model * c.d_ff;
        assert_eq!(linear_weights(sites), (c.layers * layer) as f64);
        // One token attends to itself alone: a score and a value, each of `head_dim` multiply-adds, per head.
        assert_eq!(forward_flop(c, sites, 1, 1), (2 * c.layers * (layer + 2 * heads)) as f64);
        let (one, two) = (forward_flop(c, sites, 1, 64), forward_flop(c, sites, 2, 64));
        assert_eq!(two, 2.0 * one);
        assert!(forward_flop(c, sites, 1, 128) > two, "control: attention grows with the square");
        assert_eq!(head_flop(c, 3), (6 * c.d_model * c.vocab) as f64);
    }

    #[test]
    fn suites_have_names_of_their_own() {
        for (i, suite) in SUITES.iter().enumerate() {
            assert!(SUITES[..i].iter().all(|other| other.name != suite.name), "{}", suite.name);
        }
    }

    #[test]
    fn a_suite_gives_figures_on_the_cpu() {
        let models = [("embedded", ModelFiles::embedded().unwrap())];
        let folder = tempfile::tempdir().unwrap();
        let bench = Bench {
            device: Device::flex(),
            name: "flex".into(),
            models: &models,
            only: Vec::new(),
            repeats: 1,
            peers: None,
            cache: folder.path().into(),
            roofline: Some(Roofline { gflops: 100.0, gflops_bf16: 200.0, read: 10.0, copy: 10.0 }),
            limit_in_turns: false,
            measured: &|_| {},
            note: &|_| {},
            results: Default::default(),
        };
        let suite = SUITES.iter().find(|s| s.name == "forward").unwrap();
        (suite.run)(&bench).unwrap();
        let dtypes: Vec<&str> = bench.precisions().iter().map(|p| dtype(*p)).collect();
        let results = bench.results.into_inner();
        assert!(
            results.iter().map(|m| m.dtype.as_str()).eq(dtypes),
            "a case for each precision: {results:?}"
        );
        for m in &results {
            assert_eq!((m.case.as_str(), m.repeats, m.device.as_str()), ("embedded 2x256", 1, "flex"));
            assert!(m.median > 0.0 && m.gflops.is_some_and(|g| g > 0.0), "{m:?}");
            let peak = if m.dtype == "f32" { 100.0 } else { 200.0 };
            assert_eq!(m.share_of_peak, m.gflops.map(|g| g / peak));
        }
    }
}
