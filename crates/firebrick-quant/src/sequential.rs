//! Quantizing a whole model, block after block: each block is calibrated on what the quantized blocks before it produce.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use firebrick_analysis::{SecondMoments, input_site, output_energies, weight_on_host};
use firebrick_core::{Brick, Event, Progress, ResolvedPlan, Run, Site, SiteSet, Task};
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::grid::Grid;
use firebrick_tensor::linalg::{LinalgError, Matrix};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::gptq::{Factor, GptqConfig};
use crate::rtn::rtn;
use crate::{QuantError, QuantizedMatrix};

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Round to nearest; needs no text.
    Rtn,
    /// GPTQ on the second moments of calibration text.
    Gptq(GptqConfig),
}

/// How a model is quantized.
#[derive(Clone, Debug)]
pub struct QuantConfig {
    /// How codes are chosen.
    pub method: Method,
    /// The grid of every linear layer inside the blocks, unless the plan says otherwise.
    pub grid: Grid,
    /// Bits and group per site; sites whose plan says 16 bits or more stay as they are.
    pub plan: Option<ResolvedPlan>,
    /// Calibrate q/k/v, o, gate/up and down one after the other, each on what the already quantized ones produce (four passes
    /// over a block instead of one).
    pub true_sequential: bool,
    /// Length of a calibration window in tokens, at least 2.
    pub window: usize,
}

/// What happened to one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// The layer.
    pub site: Site,
    /// Bits per code.
    pub bits: u8,
    /// Bits per weight, with scales and zero points.
    pub bits_per_weight: f64,
    /// Squared error of the weight, relative to its square.
    pub weight_error: f64,
    /// Squared error of the output on the calibration text, relative to the output's square; absent without text.
    pub output_error: Option<f64>,
    /// The damping GPTQ needed; absent where it did not run.
    pub damp: Option<f64>,
    /// Whether GPTQ was asked for but no damping let it run, so that the codes are the nearest ones.
    #[serde(default)]
    pub fallback: bool,
}

/// A quantized model.
#[derive(Debug)]
pub struct QuantizedModel {
    /// The model with its weights replaced by what their codes stand for.
    pub decoder: Decoder,
    /// The codes.
    pub matrices: BTreeMap<Site, QuantizedMatrix>,
    /// What happened to each layer.
    pub reports: Vec<SiteReport>,
}

impl QuantConfig {
    /// The grid for `site`, or `None` if it stays as it is.
    pub fn grid_at(&self, site: Site) -> Option<Grid> {
        let settings = self.plan.as_ref().and_then(|p| p.get(site));
        let bits =
            settings.and_then(|s| s.bits).map_or(self.grid.bits, |b| u8::try_from(b).unwrap_or(u8::MAX));
        let group = settings.and_then(|s| s.group).unwrap_or(self.grid.group);
        (bits < 16).then_some(Grid { bits, group, ..self.grid })
    }
}

/// Quantizes the linear layers inside the blocks of `decoder`, calibrated on the tokens `text` (unused by [`Method::Rtn`], where
/// it only serves the reports; may be empty there).
///
/// A layer whose Hessian cannot be factored is rounded to nearest, with an [`Event::Warn`] and a note in its report.
///
/// # Errors
/// Settings, grids and token ids out of range (every problem is listed before anything is computed), no full window of text for GPTQ,
/// weights or activations that are not finite, and cancellation.
pub fn quantize(
    mut decoder: Decoder,
    text: &[u32],
    config: &QuantConfig,
    progress: &dyn Progress,
) -> Result<QuantizedModel, QuantError> {
    check(&decoder, text, config)?;
    let device = decoder.device();
    let mut streams: Vec<Tensor<3>> = text
        .chunks_exact(config.window)
        .map(|ids| decoder.embed(token_tensor(&[ids], &device), &mut Run::default()))
        .collect();
    let layers = decoder.config().layers;
    let (mut matrices, mut reports) = (BTreeMap::new(), Vec::new());
    let mut task = Task::begin(progress, "quantize", Some(layers as u64), "layers");
    for layer in 0..layers {
        let here = decoder.sites().block_linears().filter(|s| s.layer == Some(layer));
        for sites in stages(&here.filter(|s| config.grid_at(s).is_some()), config.true_sequential) {
            let moments = SecondMoments::new(&sites);
            let bricks: [&dyn Brick; 1] = [&moments];
            for x in &streams {
                decoder.block(layer, x.clone(), &mut Run::new(&bricks));
            }
            let seen = !streams.is_empty();
            let inputs = if seen { Input::of(&sites, &moments, config.method)? } else { BTreeMap::new() };
            let work: Vec<(Work, Option<&Input>)> = sites
                .iter()
                .map(|site| Ok((Work::read(&decoder, site)?, inputs.get(&input_site(site)))))
                .collect::<Result<_, QuantError>>()?;
            for (Work { site, .. }, input) in &work {
                if let Some(failure) = input.and_then(|i| i.failure.as_ref()) {
                    progress.on(Event::Warn(&format!("{site} is rounded to nearest: {failure}")));
                }
            }
            let done: Vec<_> = work
                .par_iter()
                .map(|(w, input)| {
                    let grid = config.grid_at(w.site).expect("sites without a grid were left out");
                    w.quantize(grid, *input)
                })
                .collect::<Result<_, _>>()?;
            for (matrix, report) in done {
                let shape = [matrix.d_out, matrix.d_in];
                let weight = Tensor::from_data(TensorData::new(matrix.dequantize(), shape), &device);
                decoder = decoder.with_weight(report.site, weight);
                matrices.insert(report.site, matrix);
                reports.push(report);
            }
        }
        for x in &mut streams {
            *x = decoder.block(layer, x.clone(), &mut Run::default());
        }
        task.advance(1, "")?;
    }
    Ok(QuantizedModel { decoder, matrices, reports })
}

/// Everything that can be known to fail before the first layer.
fn check(decoder: &Decoder, text: &[u32], config: &QuantConfig) -> Result<(), QuantError> {
    let mut problems = Vec::new();
    if config.window < 2 {
        problems.push(format!("window is {}; it is at least 2", config.window));
    }
    if let Method::Gptq(settings) = config.method {
        problems.extend(settings.problem());
    }
    let mut wrong: BTreeMap<u8, Vec<Site>> = BTreeMap::new();
    for site in decoder.sites().block_linears().iter() {
        if let Some(grid) = config.grid_at(site).filter(|g| !(2..=8).contains(&g.bits)) {
            wrong.entry(grid.bits).or_default().push(site);
        }
    }
    for (bits, sites) in wrong {
        let more = if sites.len() > 1 { format!(" and {} more", sites.len() - 1) } else { String::new() };
        problems
            .push(format!("{bits} bits at {}{more}; a grid has 2 to 8, 16 or more mean untouched", sites[0]));
    }
    let vocab = decoder.config().vocab;
    if let Some((position, id)) = text.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        problems.push(format!("token {id} at position {position} lies outside the vocabulary of {vocab}"));
    }
    if !problems.is_empty() {
        return Err(QuantError::Invalid { problems });
    }
    if text.len() < config.window && matches!(config.method, Method::Gptq(_)) {
        return Err(QuantError::NoCalibration { tokens: text.len(), window: config.window });
    }
    Ok(())
}

/// The linear layers of a block, in the groups that are calibrated together: with `true_sequential` those that read the same input.
fn stages(sites: &SiteSet, true_sequential: bool) -> Vec<SiteSet> {
    if !true_sequential {
        return vec![sites.clone()];
    }
    let inputs: SiteSet = sites.iter().map(input_site).collect();
    inputs.iter().map(|input| sites.filter(|s| input_site(s) == input)).collect()
}

/// What goes into some layers.
pub(crate) struct Input {
    hessian: Matrix,
    /// The factored Hessian, for GPTQ.
    pub(crate) factor: Option<Factor>,
    /// Why there is none, if there should be.
    failure: Option<String>,
}

impl Input {
    /// The inputs of `sites` by [`input_site`], each read and factored once, however many layers share it.
    pub(crate) fn of(
        sites: &SiteSet,
        moments: &SecondMoments,
        method: Method,
    ) -> Result<BTreeMap<Site, Self>, QuantError> {
        let inputs: SiteSet = sites.iter().map(input_site).collect();
        let hessians: Vec<(Site, Matrix)> =
            inputs.iter().map(|site| Ok((site, moments.matrix(site)?))).collect::<Result<_, QuantError>>()?;
        let factored = hessians.into_par_iter().map(|(site, h)| Ok((site, Input::new(site, h, method)?)));
        factored.collect()
    }

    /// Squared error of the output, summed over the calibration text, if `d: [d_out, d_in]` is the error of a weight.
    pub(crate) fn energy(&self, d: Vec<f64>) -> Result<f64, LinalgError> {
        let n = self.hessian.rows();
        let d = Matrix::new(d.len() / n, n, d)?;
        Ok(output_energies(&d, &self.hessian)?.iter().sum())
    }

    fn new(site: Site, hessian: Matrix, method: Method) -> Result<Self, QuantError> {
        let (factor, failure) = match method {
            Method::Rtn => (None, None),
            Method::Gptq(settings) => match Factor::new(&hessian, settings) {
                Ok(factor) => (Some(factor), None),
                Err(e @ QuantError::NotDefinite(_)) => (None, Some(e.to_string())),
                Err(e) => return Err(QuantError::Site { site, what: e.to_string() }),
            },
        };
        Ok(Input { hessian, factor, failure })
    }
}

/// A layer's weight `[d_out, d_in]`, on the host.
struct Work {
    site: Site,
    d_in: usize,
    weight: Vec<f32>,
}

impl Work {
    fn read(decoder: &Decoder, site: Site) -> Result<Self, QuantError> {
        let (weight, [_, d_in]) = weight_on_host(decoder, site)?;
        Ok(Work { site, d_in, weight })
    }

    fn quantize(
        &self,
        grid: Grid,
        input: Option<&Input>,
    ) -> Result<(QuantizedMatrix, SiteReport), QuantError> {
        let at = |what: String| QuantError::Site { site: self.site, what };
        let (matrix, damp) = match input.and_then(|i| i.factor.as_ref()) {
            Some(factor) => factor.quantize(&self.weight, grid).map(|(matrix, r)| (matrix, Some(r.damp))),
            None => rtn(&self.weight, self.d_in, grid).map(|matrix| (matrix, None)),
        }
        .map_err(|e| at(e.to_string()))?;
        let difference = matrix.difference(&self.weight);
        let original: Vec<f64> = self.weight.iter().map(|v| f64::from(*v)).collect();
        let square = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>();
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let weight_error = ratio(square(&difference), square(&original));
        let relative = |i: &Input| Ok(ratio(i.energy(difference)?, i.energy(original)?));
        let output_error = input.map(relative).transpose().map_err(|e: LinalgError| at(e.to_string()))?;
        let report = SiteReport {
            site: self.site,
            bits: grid.bits,
            bits_per_weight: matrix.bits_per_weight(),
            weight_error,
            output_error,
            damp,
            fallback: input.is_some_and(|i| i.failure.is_some()),
        };
        Ok((matrix, report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::{Part, Seed};
    use firebrick_tensor::grid::GridKind;

    #[test]
    fn stages_share_inputs_and_keep_the_order_of_the_block() {
        use Part::*;
        let parts = [AttnQ, AttnK, AttnV, AttnO, MlpGate, MlpUp, MlpDown];
        let sites: SiteSet = parts.into_iter().map(|p| Site::layer(2, p)).collect();
        let found = |sites: &SiteSet, sequential| -> Vec<Vec<Part>> {
            stages(sites, sequential).iter().map(|s| s.iter().map(|s| s.part).collect()).collect()
        };
        assert_eq!(found(&sites, false), [parts.to_vec()]);
        let apart = [vec![AttnQ, AttnK, AttnV], vec![AttnO], vec![MlpGate, MlpUp], vec![MlpDown]];
        assert_eq!(found(&sites, true), apart);
        // Whatever is left untouched.
        assert_eq!(found(&sites.filter(|s| s.part == AttnV), true), [[AttnV]]);
    }

    #[test]
    fn a_hessian_that_cannot_be_factored_falls_back_to_rounding() {
        let (site, n) = (Site::layer(0, Part::AttnQ), 8);
        let work = Work { site, d_in: n, weight: Seed(1).normal("weight", 4 * n, 1.0) };
        let grid = Grid { bits: 3, group: 4, kind: GridKind::SymHalf, clip: false };
        let method = Method::Gptq(GptqConfig::default());
        let of = |off: f64| {
            let h = Matrix::from_fn(n, n, |a, b| if a == b { 1.0 } else { off });
            work.quantize(grid, Some(&Input::new(site, h, method).unwrap())).unwrap()
        };
        let nearest = rtn(&work.weight, n, grid).unwrap();
        let (matrix, report) = of(3.0);
        assert_eq!((matrix, report.damp, report.fallback), (nearest.clone(), None, true));
        let (matrix, report) = of(0.9);
        assert!(report.damp == Some(0.01) && !report.fallback, "control: {report:?}");
        assert_ne!(matrix, nearest, "control: GPTQ chooses otherwise");
        let broken = Matrix::from_fn(n, n, |_, _| f64::NAN);
        assert!(Input::new(site, broken, method).is_err(), "activations that are not finite are an error");
    }
}
