//! Round-to-nearest and GPTQ to 4 bits in groups of 64: one layer of SmolLM2's largest shape, and the embedded model.

use anyhow::Result;
use burn::tensor::Device;
use firebrick_core::{Seed, Silent};
use firebrick_models::ModelFiles;
use firebrick_quant::{GptqConfig, Method, QuantConfig, gptq, quantize, rtn};
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_tensor::linalg::Matrix;

use super::load;
use crate::{Bench, Bound, Case};

const D_OUT: usize = 576;
const D_IN: usize = 1536;
const GRID: Grid = Grid { bits: 4, group: 64, kind: GridKind::Asym, clip: false };
/// Calibration text of the model, in tokens.
const TOKENS: usize = 2048;
const WINDOW: usize = 256;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    layer(bench)?;
    model(bench, "rtn", Method::Rtn, 0)?;
    model(bench, "gptq", Method::Gptq(GptqConfig::default()), TOKENS)
}

fn case(name: String, dtype: &'static str, bound: Bound) -> Case {
    let (unit, amount) = ("Mweight/s", (D_OUT * D_IN) as f64 / 1e6);
    Case { suite: "quantize", name, dtype, unit, amount, bound }
}

fn layer(bench: &Bench<'_>) -> Result<()> {
    let weight = Seed(0).normal("bench/weight", D_OUT * D_IN, 0.02);
    // Read as f32; a code is a byte.
    let bytes = Bound::Copy(5.0 * (D_OUT * D_IN) as f64);
    bench.measure(&case(format!("rtn {D_OUT}x{D_IN}"), "f32", bytes), || Ok(None), &mut || {
        bench.timed(|| {
            rtn(&weight, D_IN, GRID)?;
            Ok(())
        })
    })?;
    let x = Matrix::random_normal(2 * D_IN, D_IN, Seed(0), "bench/inputs");
    let hessian = x.transpose().matmul(&x)?;
    // Two Cholesky factorizations and an inverse, then the updates of the columns that come later.
    let (m, n) = (D_OUT as f64, D_IN as f64);
    let flop = Bound::Compute(4.0 / 3.0 * n.powi(3) + m * n * n);
    bench.measure(&case(format!("gptq {D_OUT}x{D_IN}"), "f64", flop), || Ok(None), &mut || {
        bench.timed(|| {
            gptq(&weight, D_IN, &hessian, GRID, GptqConfig::default())?;
            Ok(())
        })
    })
}

fn model(bench: &Bench<'_>, name: &str, method: Method, tokens: usize) -> Result<()> {
    let files = ModelFiles::embedded()?;
    let decoder = load(&files, &Device::flex())?;
    let text: Vec<u32> = (0..tokens).map(|i| (i * 7919 % files.config.vocab) as u32).collect();
    let config = QuantConfig { method, grid: GRID, plan: None, true_sequential: false, window: WINDOW };
    let case = Case { unit: "s", amount: 1.0, ..case(format!("embedded {name}"), "f32", Bound::Unknown) };
    bench.measure(&case, || Ok(None), &mut || {
        let decoder = decoder.clone();
        bench.timed(|| {
            quantize(decoder, &text, &config, &Silent)?;
            Ok(())
        })
    })
}
