//! Quantizing a whole model, block after block: each block is calibrated on what the quantized blocks before it produce.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor, TensorData};
use firebrick_analysis::SecondMoments;
use firebrick_core::{Brick, Part, Progress, ResolvedPlan, Run, Site, SiteSet, Task};
use firebrick_models::Decoder;
use firebrick_tensor::grid::Grid;
use firebrick_tensor::linalg::Matrix;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::gptq::{GptqConfig, gptq};
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
    /// Length of a calibration window in tokens.
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
    /// The damping GPTQ needed.
    pub damp: Option<f64>,
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
        let bits = settings.and_then(|s| s.bits).map_or(self.grid.bits, |b| b as u8);
        let group = settings.and_then(|s| s.group).unwrap_or(self.grid.group);
        (bits < 16).then_some(Grid { bits, group, ..self.grid })
    }
}

/// Quantizes the linear layers inside the blocks of `decoder`, calibrated on the tokens `text` (unused by [`Method::Rtn`], where
/// it only serves the reports; may be empty there).
///
/// # Errors
/// If GPTQ has no full window of text, a grid is out of range, or the work was stopped.
pub fn quantize(
    mut decoder: Decoder,
    text: &[u32],
    config: &QuantConfig,
    progress: &dyn Progress,
) -> Result<QuantizedModel, QuantError> {
    let windows: Vec<&[u32]> = text.chunks_exact(config.window.max(2)).collect();
    if windows.is_empty() && matches!(config.method, Method::Gptq(_)) {
        return Err(QuantError::NoCalibration { tokens: text.len(), window: config.window });
    }
    let device = decoder.device();
    let mut streams: Vec<Tensor<3>> = windows
        .iter()
        .map(|ids| {
            let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
            let n = ids.len();
            let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, n]), &device);
            decoder.embed(tokens, &mut Run::default())
        })
        .collect();
    let layers = decoder.config().layers;
    let (mut matrices, mut reports) = (BTreeMap::new(), Vec::new());
    let mut task = Task::begin(progress, "quantize", Some(layers as u64), "layers");
    for layer in 0..layers {
        for stage in stages(layer, config.true_sequential) {
            let sites: SiteSet = stage.into_iter().filter(|s| config.grid_at(*s).is_some()).collect();
            let moments = SecondMoments::new(&sites);
            let bricks: [&dyn Brick; 1] = [&moments];
            for x in &streams {
                decoder.block(layer, x.clone(), &mut Run::new(&bricks));
            }
            let work: Vec<Work> =
                sites.iter().map(|site| Work::read(&decoder, site, &moments)).collect::<Result<_, _>>()?;
            let done: Vec<_> = work.par_iter().map(|w| w.quantize(config)).collect::<Result<_, _>>()?;
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

/// The linear layers of a block, in the groups that are calibrated together.
fn stages(layer: usize, true_sequential: bool) -> Vec<Vec<Site>> {
    use Part::*;
    let groups: [&[Part]; 4] = [&[AttnQ, AttnK, AttnV], &[AttnO], &[MlpGate, MlpUp], &[MlpDown]];
    let sites = groups.map(|g| g.iter().map(|p| Site::layer(layer, *p)).collect::<Vec<_>>());
    if true_sequential { sites.into() } else { vec![sites.concat()] }
}

/// A layer with what it is quantized by, on the host.
struct Work {
    site: Site,
    d_in: usize,
    weight: Vec<f32>,
    hessian: Option<Matrix>,
}

impl Work {
    fn read(decoder: &Decoder, site: Site, moments: &SecondMoments) -> Result<Self, QuantError> {
        let at = |what: String| QuantError::Site { site, what };
        let (d_in, _) = decoder.sites().linear(site).ok_or_else(|| at("is not a linear layer".into()))?;
        let weight = decoder.weight(site).ok_or_else(|| at("has no weight".into()))?;
        let weight = weight.into_data().try_into_vec_as::<f32>().map_err(|e| at(format!("{e:?}")))?;
        Ok(Work { site, d_in, weight, hessian: moments.matrix(site) })
    }

    fn quantize(&self, config: &QuantConfig) -> Result<(QuantizedMatrix, SiteReport), QuantError> {
        let grid = config.grid_at(self.site).expect("sites without a grid were left out");
        let (matrix, damp) = match (config.method, &self.hessian) {
            (Method::Gptq(settings), Some(hessian)) => {
                let found = gptq(&self.weight, hessian, grid, settings);
                let (matrix, report) =
                    found.map_err(|e| QuantError::Site { site: self.site, what: e.to_string() })?;
                (matrix, Some(report.damp))
            }
            _ => (rtn(&self.weight, self.d_in, grid)?, None),
        };
        let rounded = matrix.dequantize();
        let difference: Vec<f64> =
            self.weight.iter().zip(rounded).map(|(a, b)| f64::from(*a) - f64::from(b)).collect();
        let original: Vec<f64> = self.weight.iter().map(|v| f64::from(*v)).collect();
        let square = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>();
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let of_output = |h| ratio(weighted(&difference, h), weighted(&original, h));
        let report = SiteReport {
            site: self.site,
            bits: grid.bits,
            bits_per_weight: matrix.bits_per_weight(),
            weight_error: ratio(square(&difference), square(&original)),
            output_error: self.hessian.as_ref().map(of_output),
            damp,
        };
        Ok((matrix, report))
    }
}

/// `tr(D H D^T)` of `d: [rows, n]`.
fn weighted(d: &[f64], h: &Matrix) -> f64 {
    let n = h.rows();
    let product = Matrix::new(d.len() / n, n, d.to_vec()).and_then(|m| m.matmul(h));
    product.map_or(f64::NAN, |p| p.data().iter().zip(d).map(|(a, b)| a * b).sum())
}
