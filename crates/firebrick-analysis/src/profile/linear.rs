//! The numbers of one linear layer from its weight and the second moments of its input.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Site, SiteSet};
use firebrick_models::Decoder;
use firebrick_tensor::grid::Grid;
use firebrick_tensor::linalg::{
    LinalgError, Matrix, effective_rank, participation_ratio, qr, stable_rank, symmetric_eigenvalues,
};
use rayon::prelude::*;

use super::{BitLoss, LinearProfile, ProfileOptions, RankLoss};
use crate::host::{dot, output_energies_on_device, weight_on_host};
use crate::sample::read;
use crate::{AnalysisError, SecondMoments, input_site};

/// Measures the linear layers `sites` of one block; `moments` summed over `tokens` tokens, `curvature` is `E[g_o^2]`.
pub(super) fn measure(
    decoder: &Decoder,
    sites: &SiteSet,
    moments: &SecondMoments,
    curvature: &BTreeMap<Site, Vec<f64>>,
    tokens: usize,
    options: &ProfileOptions,
) -> Result<Vec<LinearProfile>, AnalysisError> {
    let inputs: SiteSet = sites.iter().map(input_site).collect();
    let mut means: BTreeMap<Site, Input> = BTreeMap::new();
    for site in inputs.iter() {
        let mut h = moments.matrix(site)?;
        h.data_mut().iter_mut().for_each(|v| *v /= tokens as f64);
        let fail = || AnalysisError::Site { site, what: "nothing passed this site".into() };
        let on_device = moments.sum(site).ok_or_else(fail)? / tokens as f64;
        means.insert(site, Input { h, on_device });
    }
    let weights: Vec<Weight> = sites.iter().map(|site| weight(decoder, site)).collect::<Result<_, _>>()?;
    let (spectra, outputs) = rayon::join(
        || -> Result<BTreeMap<Site, Vec<f64>>, AnalysisError> {
            means.par_iter().map(|(site, x)| Ok((*site, spectrum(&x.h).map_err(at(*site))?))).collect()
        },
        || -> Result<Vec<LinearProfile>, AnalysisError> {
            let one = |w: &Weight| w.measure(&means[&input_site(w.site)], &curvature[&w.site], options);
            weights.par_iter().map(one).collect()
        },
    );
    let (spectra, mut profiles) = (spectra?, outputs?);
    for p in &mut profiles {
        let spectrum = &spectra[&input_site(p.site)];
        p.input_energy = spectrum.iter().sum();
        p.activation_rank = effective_rank(spectrum);
        p.participation_ratio = participation_ratio(spectrum);
    }
    Ok(profiles)
}

fn at(site: Site) -> impl Fn(LinalgError) -> AnalysisError {
    move |error| AnalysisError::Linalg { site, error }
}

fn weight(decoder: &Decoder, site: Site) -> Result<Weight, AnalysisError> {
    let (values, [d_out, d_in]) = weight_on_host(decoder, site)?;
    Ok(Weight { site, d_out, d_in, values })
}

/// `E[x x^T]` of an input, in f64 here and in f32 on the device.
struct Input {
    h: Matrix,
    on_device: Tensor<2>,
}

/// A weight `[d_out, d_in]` on the host.
struct Weight {
    site: Site,
    d_out: usize,
    d_in: usize,
    values: Vec<f32>,
}

impl Weight {
    /// Everything but the numbers of the input alone.
    fn measure(
        &self,
        input: &Input,
        curvature: &[f64],
        options: &ProfileOptions,
    ) -> Result<LinearProfile, AnalysisError> {
        let found = self.spectra(&input.h, curvature, options).map_err(at(self.site))?;
        let mut bits = Vec::with_capacity(options.bits.len());
        for &b in &options.bits {
            let grid = options.grid(b);
            let difference = self.rounding_difference(grid, &input.on_device.device());
            let errors = read(self.site, output_energies_on_device(&difference, &input.on_device))?;
            let errors: Vec<f64> = errors.into_iter().map(f64::from).collect();
            let (error, rise): (f64, f64) = (errors.iter().sum(), 0.5 * dot(curvature, &errors));
            let size = (grid.bits_per_weight(self.d_in) * (self.d_in * self.d_out) as f64).round() as u64;
            let relative = if found.output_energy > 0.0 { error / found.output_energy } else { 0.0 };
            bits.push(BitLoss { bits: b, size, error, relative, rise });
        }
        Ok(LinearProfile { bits, ..found })
    }

    /// Everything but the numbers of the input alone and the losses of rounding.
    fn spectra(
        &self,
        h: &Matrix,
        curvature: &[f64],
        options: &ProfileOptions,
    ) -> Result<LinearProfile, LinalgError> {
        let (d_in, d_out) = (self.d_in, self.d_out);
        let w = Matrix::from_f32(d_out, d_in, &self.values)?;
        let wh = w.matmul(h)?;
        let by_output: Vec<f64> = (0..d_out).map(|o| dot(wh.row(o), w.row(o)).max(0.0)).collect();
        let total: f64 = by_output.iter().sum();
        let mean_curvature = if total > 0.0 { dot(curvature, &by_output) / total } else { 0.0 };
        // W = Q R turns W H W^T into R H R^T without its zero eigenvalues.
        let (small, small_h) = match d_out > d_in {
            true => {
                let r = qr(&w)?.r;
                let rh = r.matmul(h)?;
                (r, rh)
            }
            false => (w, wh),
        };
        let transposed = small.transpose();
        let energies = spectrum(&small_h.matmul(&transposed)?)?;
        let sigma: Vec<f64> = spectrum(&small.matmul(&transposed)?)?.iter().map(|v| v.sqrt()).collect();
        // Summed from the smallest up: the tail of a large sum would lose its digits.
        let tail = |rank: usize| energies[rank..].iter().rev().sum::<f64>();
        let output_energy = tail(0);
        let relative = |error: f64| if output_energy > 0.0 { error / output_energy } else { 0.0 };
        let rank_loss = |rank: usize| {
            let error = tail(rank);
            let size = (rank * (d_in + d_out)) as u64;
            RankLoss { rank, size, error, relative: relative(error), rise: 0.5 * mean_curvature * error }
        };
        let ranks = options.ranks.iter().filter(|r| **r <= energies.len()).map(|r| rank_loss(*r)).collect();
        Ok(LinearProfile {
            site: self.site,
            d_in,
            d_out,
            input_energy: 0.0,
            activation_rank: 0.0,
            participation_ratio: 0.0,
            weight_norm: sigma.iter().map(|s| s * s).sum::<f64>().sqrt(),
            weight_rank: effective_rank(&sigma),
            stable_rank: stable_rank(&sigma),
            output_energy,
            gradient_energy: curvature.iter().sum(),
            bits: Vec::new(),
            ranks,
        })
    }

    /// `D = W - Q(W)`, the error of rounding to the nearest codes.
    fn rounding_difference(&self, grid: Grid, device: &Device) -> Tensor<2> {
        let mut difference = self.values.clone();
        grid.round(&mut difference, self.d_in);
        difference.iter_mut().zip(&self.values).for_each(|(r, w)| *r = w - *r);
        Tensor::from_data(TensorData::new(difference, [self.d_out, self.d_in]), device)
    }
}

/// The eigenvalues of a positive semidefinite matrix, descending; those within its rounding error are 0.
fn spectrum(h: &Matrix) -> Result<Vec<f64>, LinalgError> {
    let mut values = symmetric_eigenvalues(h)?;
    let floor = values.first().copied().unwrap_or(0.0) * h.rows() as f64 * f64::EPSILON;
    values.iter_mut().filter(|v| **v <= floor).for_each(|v| *v = 0.0);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::{Part, Seed};
    use firebrick_tensor::grid::GridKind;
    use firebrick_tensor::linalg::{svd, symmetric_eigen};

    fn input(h: Matrix) -> Input {
        let data = TensorData::new(h.to_f32(), [h.rows(), h.cols()]);
        Input { h, on_device: Tensor::from_data(data, &Device::flex()) }
    }

    fn moments(n: usize) -> Matrix {
        let x = Matrix::random_normal(3 * n, n, Seed(1), "x");
        // Inputs of very unequal size, as in real models.
        let x = Matrix::from_fn(3 * n, n, |i, j| x[(i, j)] / (1.0 + j as f64));
        let mut h = x.transpose().matmul(&x).unwrap();
        h.data_mut().iter_mut().for_each(|v| *v /= (3 * n) as f64);
        h
    }

    fn of(d_out: usize, d_in: usize, values: Vec<f32>) -> Weight {
        Weight { site: Site::layer(0, Part::AttnQ), d_out, d_in, values }
    }

    fn options() -> ProfileOptions {
        ProfileOptions {
            group: 8,
            kind: GridKind::SymHalf,
            clip: false,
            ranks: vec![0, 1, 2, 3, 5, 16, 99],
            ..ProfileOptions::default()
        }
    }

    #[test]
    fn tail_energies_are_those_of_the_svd() {
        for (d_out, d_in) in [(20, 16), (16, 16), (9, 16)] {
            let w = of(d_out, d_in, Seed(2).normal("w", d_out * d_in, 0.3));
            let h = moments(d_in);
            let found = w.measure(&input(h.clone()), &vec![1.0; d_out], &options()).unwrap();
            // The definition: H^(1/2) by eigenvectors, the singular values of W H^(1/2) by SVD.
            let e = symmetric_eigen(&h).unwrap();
            let root = Matrix::from_fn(d_in, d_in, |i, j| e.vectors[(i, j)] * e.values[j].sqrt());
            let matrix = Matrix::from_f32(d_out, d_in, &w.values).unwrap();
            let sigma = svd(&matrix.matmul(&root).unwrap()).unwrap().sigma;
            assert!(found.ranks.len() >= 5 && found.ranks.iter().all(|r| r.rank <= d_out.min(d_in)));
            for r in &found.ranks {
                let tail: f64 = sigma[r.rank..].iter().map(|s| s * s).sum();
                assert!((r.error - tail).abs() < 1e-10 * found.output_energy, "{r:?} {tail}");
            }
            let plain = svd(&matrix).unwrap().sigma;
            assert!((found.weight_rank - effective_rank(&plain)).abs() < 1e-6);
            assert!((found.stable_rank - stable_rank(&plain)).abs() < 1e-9);
            let frobenius: f64 = w.values.iter().map(|v| f64::from(*v).powi(2)).sum();
            assert!((found.weight_norm - frobenius.sqrt()).abs() < 1e-9);
            // Negative control: the tail of W alone, which ignores the inputs, is another number.
            let blind: f64 = plain[3..].iter().map(|s| s * s).sum::<f64>() / frobenius;
            assert!((blind - found.ranks[3].relative).abs() > 0.02);
        }
    }

    #[test]
    fn a_matrix_of_rank_r_has_no_tail_after_r() {
        let (d_out, d_in) = (12, 16);
        let a = Matrix::random_normal(d_out, 2, Seed(3), "a");
        let b = Matrix::random_normal(2, d_in, Seed(3), "b");
        let w = of(d_out, d_in, a.matmul(&b).unwrap().to_f32());
        let found = w.measure(&input(moments(d_in)), &vec![1.0; d_out], &options()).unwrap();
        let relative = |rank: usize| found.ranks.iter().find(|r| r.rank == rank).unwrap().relative;
        assert!(relative(2) < 1e-10 && relative(1) > 1e-3);
        assert!((relative(0) - 1.0).abs() < 1e-12);
        assert!(found.weight_rank < 2.01 && found.weight_rank > 1.0);
        let full = of(d_out, d_in, Seed(2).normal("w", d_out * d_in, 0.3));
        assert!(
            full.measure(&input(moments(d_in)), &vec![1.0; d_out], &options()).unwrap().weight_rank > 6.0
        );
    }

    #[test]
    fn rounding_error_is_the_mean_squared_output_error() {
        let (d_out, d_in, n) = (6, 16, 40);
        let w = of(d_out, d_in, Seed(4).normal("w", d_out * d_in, 0.1));
        let x = Matrix::random_normal(n, d_in, Seed(4), "x");
        let mut h = x.transpose().matmul(&x).unwrap();
        h.data_mut().iter_mut().for_each(|v| *v /= n as f64);
        let curvature = [0.5, 0.0, 2.0, 1.0, 0.0, 3.0];
        let found = w.measure(&input(h), &curvature, &options()).unwrap();
        let mut last = f64::INFINITY;
        for loss in &found.bits {
            let grid = Grid { bits: loss.bits, group: 8, kind: GridKind::SymHalf, clip: false };
            let mut rounded = w.values.clone();
            grid.round(&mut rounded, d_in);
            let output = |o: usize, row: &[f64]| -> f64 {
                let k = |j: usize| f64::from(w.values[o * d_in + j] - rounded[o * d_in + j]);
                (0..d_in).map(|j| k(j) * row[j]).sum()
            };
            let squares = |o: usize| (0..n).map(|i| output(o, x.row(i)).powi(2)).sum::<f64>() / n as f64;
            let direct: f64 = (0..d_out).map(squares).sum();
            let rise: f64 = (0..d_out).map(|o| 0.5 * curvature[o] * squares(o)).sum();
            assert!((loss.error / direct - 1.0).abs() < 1e-4, "{loss:?} {direct}");
            assert!((loss.rise / rise - 1.0).abs() < 1e-4, "{loss:?} {rise}");
            assert!(loss.error < last, "more bits, less error");
            last = loss.error;
            assert_eq!(loss.size, u64::from(loss.bits) * 96 + 16 * 12);
        }
    }

    #[test]
    fn zeros_and_infinities() {
        let zero = of(4, 4, vec![0.0; 16]).measure(&input(moments(4)), &[1.0; 4], &options()).unwrap();
        assert_eq!((zero.output_energy, zero.weight_rank, zero.bits[0].relative), (0.0, 0.0, 0.0));
        let mut values = vec![1.0; 16];
        values[5] = f32::NAN;
        assert!(of(4, 4, values).measure(&input(moments(4)), &[1.0; 4], &options()).is_err());
    }
}
