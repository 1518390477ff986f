//! A mixture-of-experts layer of OLMoE's kind: 64 experts of width 384 over a width of 576, 8 for each of 512 tokens.

use anyhow::Result;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Seed, Site};
use firebrick_moe::{MoeLayer, RouterConfig};
use std::path::Path;

use crate::{Bench, Bound, Case};

const D_MODEL: usize = 576;
const D_FF: usize = 384;
const EXPERTS: usize = 64;
const TOP_K: usize = 8;
const TOKENS: usize = 512;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    forward(bench)?;
    both_ways(bench)
}

/// Of `passes` products of each weight with each of its tokens; routing is left out.
fn case(name: &str, passes: usize) -> Case {
    let flop = (2 * 3 * D_MODEL * D_FF * TOKENS * TOP_K * passes) as f64;
    Case {
        suite: "moe",
        name: format!("{EXPERTS}x{D_FF} top {TOP_K} {name}"),
        dtype: "f32",
        unit: "GFLOP/s",
        amount: flop / 1e9,
        bound: Bound::Compute(flop),
    }
}

fn layer(device: &Device) -> Result<(MoeLayer, Tensor<3>)> {
    let router = RouterConfig::new(EXPERTS, TOP_K, false);
    let layer = MoeLayer::random(&[0], D_MODEL, D_FF, &router, Seed(0), device)?;
    let x = Seed(0).normal("bench/x", TOKENS * D_MODEL, 1.0);
    Ok((layer, Tensor::from_data(TensorData::new(x, [1, TOKENS, D_MODEL]), device)))
}

fn apply(layer: &MoeLayer, x: &Tensor<3>) -> Tensor<3> {
    layer.at(Site::layer(0, Part::Mlp), x.clone(), &mut |x, _| x, &mut Run::default())
}

fn forward(bench: &Bench<'_>) -> Result<()> {
    let (layer, x) = layer(&bench.device)?;
    let peer = || bench.peer("moe.py", &[Path::new("forward")]);
    bench.measure(&case("forward", 1), peer, &mut || {
        bench.timed_awake(|| {
            apply(&layer, &x);
            Ok(())
        })
    })
}

/// With the gradients of the input and of every weight.
fn both_ways(bench: &Bench<'_>) -> Result<()> {
    let (layer, x) = layer(&bench.device.clone().autodiff())?;
    let x = x.require_grad();
    let peer = || bench.peer("moe.py", &[Path::new("both")]);
    bench.measure(&case("forward+backward", 3), peer, &mut || {
        bench.timed_awake(|| {
            let y = apply(&layer, &x);
            let gradients = (y.clone() * y).mean().backward();
            anyhow::ensure!(x.grad(&gradients).is_some(), "the input has no gradient");
            Ok(())
        })
    })
}
