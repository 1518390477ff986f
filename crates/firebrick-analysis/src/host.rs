//! Weights on the host, and what an error in one does to the layer's output.

use burn::tensor::Tensor;
use firebrick_core::Site;
use firebrick_models::Decoder;
use firebrick_tensor::linalg::{LinalgError, Matrix};

use crate::AnalysisError;

/// Columns of a panel of a symmetric matrix.
const PANEL: usize = 256;

/// The weight of the linear layer `site`, row-major, and its shape `[d_out, d_in]`.
///
/// # Errors
/// [`AnalysisError::Site`] if there is none, or it cannot be read.
pub fn weight_on_host(decoder: &Decoder, site: Site) -> Result<(Vec<f32>, [usize; 2]), AnalysisError> {
    let fail = |what: String| AnalysisError::Site { site, what };
    let weight = decoder.weight(site).ok_or_else(|| fail("the model has no weight here".into()))?;
    let shape = weight.dims();
    let data = weight.without_autodiff().into_data();
    Ok((data.try_into_vec_as::<f32>().map_err(|e| fail(e.to_string()))?, shape))
}

/// The diagonal of `D H D^T` for `d: [d_out, d_in]` and `h: [d_in, d_in]`: with `H = E[x x^T]`, the mean square of each output of `D x`.
///
/// # Errors
/// If the widths differ.
pub fn output_energies(d: &Matrix, h: &Matrix) -> Result<Vec<f64>, LinalgError> {
    let dh = d.matmul(h)?;
    Ok((0..d.rows()).map(|o| dot(dh.row(o), d.row(o)).max(0.0)).collect())
}

/// [`output_energies`] in f32 on the device: `d: [d_out, d_in]`, `h: [d_in, d_in]` symmetric, `[d_out]`.
///
/// Only products below the diagonal panels are computed, the others are their mirror image.
pub(crate) fn output_energies_on_device(d: &Tensor<2>, h: &Tensor<2>) -> Tensor<1> {
    let [d_out, d_in] = d.dims();
    let panel = |start: usize| {
        let width = PANEL.min(d_in - start);
        let here = d.clone().narrow(1, start, width);
        let columns = h.clone().narrow(1, start, width);
        let own = here.clone().matmul(columns.clone().narrow(0, start, width));
        let below = d_in - start - width;
        let product = match below {
            0 => own,
            _ => {
                let rest = d.clone().narrow(1, start + width, below);
                own + rest.matmul(columns.narrow(0, start + width, below)) * 2.0
            }
        };
        (product * here).sum_dim(1)
    };
    let sum = (0..d_in).step_by(PANEL).map(panel).reduce(|a, b| a + b);
    sum.map_or_else(|| Tensor::zeros([d_out], &d.device()), |s| s.reshape([d_out])).clamp_min(0.0)
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::Seed;

    #[test]
    fn energies_on_the_device_are_those_in_f64() {
        for (d_out, d_in) in [(5, 7), (40, PANEL), (30, 2 * PANEL + 9)] {
            let x = Matrix::random_normal(d_in + 20, d_in, Seed(1), "x");
            // Inputs of very unequal size, as in real models.
            let x = Matrix::from_fn(x.rows(), d_in, |i, j| x[(i, j)] * 100.0 / (1.0 + j as f64));
            let h = x.transpose().matmul(&x).unwrap();
            let d = Matrix::random_normal(d_out, d_in, Seed(1), "d");
            let on_device = |m: &Matrix| {
                Tensor::<2>::from_data(TensorData::new(m.to_f32(), [m.rows(), m.cols()]), &Device::flex())
            };
            let found = output_energies_on_device(&on_device(&d), &on_device(&h));
            let found = found.into_data().try_into_vec_as::<f32>().unwrap();
            for (a, b) in found.iter().zip(output_energies(&d, &h).unwrap()) {
                assert!((f64::from(*a) / b - 1.0).abs() < 1e-4, "{d_out} {d_in}: {a} {b}");
            }
        }
    }
}
