//! Weights on the host, and what an error in one does to the layer's output.

use firebrick_core::Site;
use firebrick_models::Decoder;
use firebrick_tensor::linalg::{LinalgError, Matrix};

use crate::AnalysisError;

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

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
