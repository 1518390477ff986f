//! Traces of the Hessian of the loss, block by block, by random directions (Hutchinson 1990; as a measure of sensitivity HAWQ-V2,
//! arXiv:1911.03852).
//!
//! burn differentiates once: the Hessian times a direction is the difference of two gradients.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use firebrick_core::{Progress, Run, Seed, Site, SiteSet, Task};
use firebrick_models::{Decoder, token_tensor};
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::sample::{read, spread};
use crate::stats::Estimate;
use crate::weight_gradients::weight_gradients;

/// Blocks of parameters, `[rows, cols]` each.
pub type Blocks = BTreeMap<Site, Tensor<2>>;

/// How the trace is estimated.
#[derive(Clone, Debug, PartialEq)]
pub struct HessianOptions {
    /// Tokens per window; each is a text of its own.
    pub window: usize,
    /// At most so many windows, spread over the text; all of them go through together.
    pub windows: usize,
    /// Random directions; each costs two gradients.
    pub probes: usize,
    /// How far a weight moves, relative to the root mean square of its layer: small against the curvature of the curvature, large
    /// against the rounding of f32 gradients.
    pub step: f64,
    /// Seed of the directions.
    pub seed: Seed,
}

impl Default for HessianOptions {
    fn default() -> Self {
        HessianOptions { window: 256, windows: 2, probes: 8, step: 1e-2, seed: Seed(0) }
    }
}

/// The trace of the Hessian of one layer's weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HessianProfile {
    /// The linear layer.
    pub site: Site,
    /// Number of weights.
    pub parameters: u64,
    /// Trace of the block of the Hessian of the mean negative log-likelihood, in nats; the error is that over directions. Over
    /// `parameters` it is HAWQ-V2's sensitivity. It can be negative: a language model is at no minimum of a text's loss.
    pub trace: Estimate,
}

/// The trace of every block of the Hessian of a function whose gradient at some parameters `gradient` gives.
///
/// A direction has a sign for each parameter; one pair of gradients at `theta ± direction` serves all blocks (other blocks
/// add variance, no bias). Exact for a quadratic whose Hessian is diagonal, at any `step`; gradients are f32, their difference and
/// product with the signs f64.
///
/// # Errors
/// Those of `gradient`, a trace that is not finite, a gradient that misses a block, and [`AnalysisError::Cancelled`].
pub fn hutchinson(
    theta: &Blocks,
    gradient: &mut dyn FnMut(&Blocks) -> Result<Blocks, AnalysisError>,
    probes: usize,
    step: f64,
    seed: Seed,
    progress: &dyn Progress,
) -> Result<Vec<HessianProfile>, AnalysisError> {
    let mut steps = BTreeMap::new();
    for (site, block) in theta {
        let values = read(*site, block.clone())?;
        let square: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let size = (square / values.len().max(1) as f64).sqrt();
        steps.insert(*site, step * if size > 0.0 { size } else { 1.0 });
    }
    let mut traces: BTreeMap<Site, Vec<Vec<f64>>> = theta.keys().map(|s| (*s, Vec::new())).collect();
    let mut task = Task::begin(progress, "hessian", Some(probes as u64), "directions");
    for probe in 0..probes {
        let signs = |site: Site, n: usize| -> Vec<f32> {
            let draws = seed.uniform(&format!("hessian/{probe}/{site}"), n, 1.0);
            draws.into_iter().map(|v| if v < 0.0 { -1.0 } else { 1.0 }).collect()
        };
        let mut moved = |direction: f64| -> Result<BTreeMap<Site, Vec<f32>>, AnalysisError> {
            let at: Blocks = theta
                .iter()
                .map(|(site, block)| {
                    let shape = block.dims();
                    let signs = TensorData::new(signs(*site, shape[0] * shape[1]), shape);
                    let signs = Tensor::<2>::from_data(signs, &block.device());
                    (*site, block.clone() + signs * (direction * steps[site]))
                })
                .collect();
            gradient(&at)?.into_iter().map(|(site, g)| Ok((site, read(site, g)?))).collect()
        };
        let (plus, minus) = (moved(1.0)?, moved(-1.0)?);
        for (site, found) in &mut traces {
            let fail = |what: &str| AnalysisError::Site { site: *site, what: what.into() };
            let (Some(a), Some(b)) = (plus.get(site), minus.get(site)) else {
                return Err(fail("the loss does not depend on it"));
            };
            let signs = signs(*site, a.len());
            let dot: f64 = a
                .iter()
                .zip(b)
                .zip(&signs)
                .map(|((a, b), v)| (f64::from(*a) - f64::from(*b)) * f64::from(*v))
                .sum();
            let trace = dot / (2.0 * steps[site]);
            if !trace.is_finite() {
                return Err(fail("its gradient is not finite"));
            }
            found.push(vec![trace]);
        }
        task.advance(1, "")?;
    }
    let profile = |(site, traces): (Site, Vec<Vec<f64>>)| HessianProfile {
        site,
        parameters: theta[&site].dims().iter().product::<usize>() as u64,
        trace: Estimate::of(&traces),
    };
    Ok(traces.into_iter().map(profile).collect())
}

/// The traces of the Hessian of the mean negative log-likelihood of the text `ids` with respect to the weights of `sites`.
///
/// Memory: the weights of `sites` twice more, and a gradient of each.
///
/// # Errors
/// Too short a text, a site without a weight, and those of [`hutchinson`].
pub fn hessian_traces(
    decoder: &Decoder,
    ids: &[u32],
    sites: &SiteSet,
    options: &HessianOptions,
    progress: &dyn Progress,
) -> Result<Vec<HessianProfile>, AnalysisError> {
    let window = options.window.min(ids.len());
    if window < 2 || options.windows == 0 {
        return Err(AnalysisError::TooFewTokens { have: window, need: 2 });
    }
    let chosen = spread(0, ids.len() / window, options.windows);
    let windows: Vec<&[u32]> = chosen.iter().map(|at| &ids[at * window..(at + 1) * window]).collect();
    let weight = |site: Site| {
        let weight = decoder.weight(site).map(Tensor::without_autodiff);
        weight
            .map(|w| (site, w))
            .ok_or(AnalysisError::Site { site, what: "the model has no weight here".into() })
    };
    let theta: Blocks = sites.iter().map(weight).collect::<Result<_, _>>()?;
    let device = decoder.device();
    let mut gradient = |at: &Blocks| -> Result<Blocks, AnalysisError> {
        let moved = at.iter().fold(decoder.clone(), |d, (site, block)| d.with_weight(*site, block.clone()));
        let mut sums = Blocks::new();
        // One window at a time: what is held between the passes is that of one.
        for text in &windows {
            let loss = |hidden: Tensor<3>| {
                let targets = token_tensor(&[&text[1..]], &hidden.device()).reshape([window - 1]);
                moved.cross_entropy(hidden.narrow(1, 0, window - 1), targets, &mut Run::default()).sum()
            };
            let tokens = token_tensor(&[text], &device.clone().autodiff());
            for (site, g) in weight_gradients(&moved, tokens, sites, &loss) {
                let sum = match sums.remove(&site) {
                    Some(sum) => sum + g,
                    None => g,
                };
                sums.insert(site, sum);
            }
            progress.check()?;
        }
        let tokens = (windows.len() * (window - 1)) as f64;
        Ok(sums.into_iter().map(|(site, sum)| (site, sum / tokens)).collect())
    };
    hutchinson(&theta, &mut gradient, options.probes, options.step, options.seed, progress)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::{Part, Silent};
    use firebrick_models::DecoderConfig;
    use firebrick_tensor::linalg::Matrix;

    fn block(values: &[f64], shape: [usize; 2]) -> Tensor<2> {
        let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn host(x: &Tensor<2>) -> Vec<f64> {
        x.clone().into_data().try_into_vec_as::<f32>().unwrap().iter().map(|v| f64::from(*v)).collect()
    }

    fn sites() -> [Site; 2] {
        [Site::layer(0, Part::MlpUp), Site::layer(0, Part::MlpDown)]
    }

    /// Traces of `1/2 x' A x` over two blocks of 20 and 9 parameters.
    fn quadratic(a: &Matrix, probes: usize) -> Vec<HessianProfile> {
        let [first, second] = sites();
        let x = Seed(2).normal("x", 29, 0.5);
        let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let theta: Blocks =
            [(first, block(&x[..20], [4, 5])), (second, block(&x[20..], [3, 3]))].into_iter().collect();
        let mut gradient = |at: &Blocks| -> Result<Blocks, AnalysisError> {
            let x = [host(&at[&first]), host(&at[&second])].concat();
            let g = a.matmul(&Matrix::new(29, 1, x).unwrap()).unwrap();
            Ok([(first, block(&g.data()[..20], [4, 5])), (second, block(&g.data()[20..], [3, 3]))].into())
        };
        hutchinson(&theta, &mut gradient, probes, 1e-2, Seed(7), &Silent).unwrap()
    }

    #[test]
    fn a_quadratic_has_the_trace_of_its_matrix() {
        let n = 29;
        let b = Matrix::random_normal(n, n, Seed(1), "b");
        let a =
            Matrix::from_fn(n, n, |i, j| b[(i, j)] + b[(j, i)] + if i == j { 10.0 + i as f64 } else { 0.0 });
        let diagonal = Matrix::from_fn(n, n, |i, j| if i == j { a[(i, i)] } else { 0.0 });
        let [first, second] = sites();
        let trace = |from: usize, to: usize| (from..to).map(|i| a[(i, i)]).sum::<f64>();
        let expected = BTreeMap::from([(first, trace(0, 20)), (second, trace(20, n))]);
        for found in quadratic(&diagonal, 1) {
            let exact = expected[&found.site];
            assert!((found.trace.mean / exact - 1.0).abs() < 1e-3, "{found:?} {exact}");
        }
        for found in quadratic(&a, 400) {
            let (exact, error) = (expected[&found.site], found.trace.error);
            assert!((found.trace.mean - exact).abs() < 3.0 * error, "{found:?} {exact}");
            assert!(error < 0.05 * exact, "{found:?}");
        }
        // Negative control: one direction is not enough once the matrix is not diagonal.
        assert!(quadratic(&a, 1).iter().any(|f| (f.trace.mean / expected[&f.site] - 1.0).abs() > 0.01));
        assert_eq!(quadratic(&a, 3), quadratic(&a, 3));
    }

    #[test]
    fn logistic_regression_has_its_closed_form() {
        let (n, d) = (40, 6);
        let x = Matrix::random_normal(n, d, Seed(3), "x");
        let labels: Vec<f64> =
            (0..n).map(|i| f64::from(u8::from(x[(i, 0)] + 0.5 * x[(i, 1)] > 0.2))).collect();
        let site = sites()[0];
        let w: Vec<f64> = Seed(3).normal("w", d, 0.8).iter().map(|v| f64::from(*v)).collect();
        let p = |w: &[f64], i: usize| {
            1.0 / (1.0 + (-x.row(i).iter().zip(w).map(|(a, b)| a * b).sum::<f64>()).exp())
        };
        let theta: Blocks = [(site, block(&w, [1, d]))].into();
        let mut gradient = |at: &Blocks| -> Result<Blocks, AnalysisError> {
            let w = host(&at[&site]);
            let g: Vec<f64> = (0..d)
                .map(|j| (0..n).map(|i| (p(&w, i) - labels[i]) * x[(i, j)]).sum::<f64>() / n as f64)
                .collect();
            Ok([(site, block(&g, [1, d]))].into())
        };
        let found = hutchinson(&theta, &mut gradient, 600, 1e-2, Seed(1), &Silent).unwrap().remove(0);
        let square = |i: usize| x.row(i).iter().map(|v| v * v).sum::<f64>();
        let exact: f64 = (0..n).map(|i| p(&w, i) * (1.0 - p(&w, i)) * square(i)).sum::<f64>() / n as f64;
        assert!((found.trace.mean - exact).abs() < 3.0 * found.trace.error, "{found:?} {exact}");
        assert!(found.trace.error < 0.02 * exact);
    }

    #[test]
    fn a_decoder_has_the_trace_of_explicit_differences() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
        });
        let mut decoder =
            Decoder::random(DecoderConfig::from_hf(&config).unwrap(), Seed(1), &Device::flex()).unwrap();
        for site in decoder.sites().block_linears().iter() {
            let weight = decoder.weight(site).unwrap() * 20.0;
            decoder = decoder.with_weight(site, weight);
        }
        let ids: Vec<u32> = (0..10).map(|i| (i * 7 + 3) % 12).collect();
        let site = Site::layer(0, Part::MlpDown);
        let one: SiteSet = [site].into_iter().collect();
        let options = HessianOptions { window: 10, windows: 1, probes: 400, ..HessianOptions::default() };
        let found = hessian_traces(&decoder, &ids, &one, &options, &Silent).unwrap().remove(0);
        // Each weight on its own, second differences of the loss summed in f64.
        let weight = decoder.weight(site).unwrap();
        let values = host(&weight);
        let loss = |at: usize, by: f64| -> f64 {
            let mut moved = values.clone();
            moved[at] += by;
            let moved = decoder.clone().with_weight(site, block(&moved, weight.dims()));
            let nll = moved.nll(token_tensor(&[&ids], &Device::flex()), &mut Run::default());
            host(&nll).iter().sum::<f64>() / 9.0
        };
        let (h, centre) = (0.15, loss(0, 0.0));
        let exact: f64 = (0..values.len()).map(|i| (loss(i, h) - 2.0 * centre + loss(i, -h)) / (h * h)).sum();
        assert!(
            (found.trace.mean - exact).abs() < 3.0 * found.trace.error + 0.02 * exact.abs(),
            "{found:?} {exact}"
        );
        assert!(found.trace.error < 0.3 * exact.abs(), "{found:?} {exact}");
        // All layers from the same directions: the same number within both errors.
        let all =
            hessian_traces(&decoder, &ids, &decoder.sites().block_linears(), &options, &Silent).unwrap();
        assert_eq!(all.len(), 7);
        let again = all.iter().find(|f| f.site == site).unwrap();
        let both = (again.trace.error.powi(2) + found.trace.error.powi(2)).sqrt();
        assert!((again.trace.mean - found.trace.mean).abs() < 3.0 * both, "{again:?} {found:?}");
        // Negative control: the layers are told apart.
        let apart = |f: &&HessianProfile| {
            (f.trace.mean - exact).abs() > 4.0 * (f.trace.error.powi(2) + found.trace.error.powi(2)).sqrt()
        };
        assert!(all.iter().filter(apart).count() >= 2, "{exact} {found:?} {all:?}");
    }
}
