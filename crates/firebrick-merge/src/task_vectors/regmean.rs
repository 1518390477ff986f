//! RegMean (arXiv 2212.09849): the linear layer that answers each model's inputs most like that model.

use std::collections::BTreeMap;

use firebrick_core::Site;
use firebrick_tensor::linalg::{Matrix, solve_spd};

use super::{TaskVector, TaskVectorError, add, check_same, mean};

/// `X^T X / rows` of the inputs of each linear layer, `[d_in, d_in]`.
pub type InputGram = BTreeMap<Site, Matrix>;

/// Merges `models`, of which model `m` has the Gram matrices `grams[m]`; sites without one are averaged. Entries off
/// the diagonal are multiplied by `alpha` (0.9 is usual; 1 is least squares exactly). RegMean++ calls this layer by layer, with
/// Gram matrices taken from the model merged so far.
///
/// # Errors
/// Models or Gram matrices that do not fit together, `alpha` outside `0..=1`, a sum of Gram matrices that is singular.
pub fn regmean(
    models: &[TaskVector],
    grams: &[InputGram],
    alpha: f64,
) -> Result<TaskVector, TaskVectorError> {
    check_same(&models.iter().collect::<Vec<_>>())?;
    let mut problems = Vec::new();
    if grams.len() != models.len() {
        problems.push(format!("{} models, Gram matrices of {}", models.len(), grams.len()));
    }
    if !(0.0..=1.0).contains(&alpha) {
        problems.push(format!("alpha {alpha} should lie in 0..=1"));
    }
    for (i, gram) in grams.iter().enumerate() {
        for (site, g) in gram {
            match models[0].sites.get(site) {
                None => problems.push(format!("model {i}: a Gram matrix of `{site}`, which has no weight")),
                Some(w) if (g.rows(), g.cols()) != (w.cols(), w.cols()) => problems.push(format!(
                    "model {i}, `{site}`: a Gram matrix of {} x {} for {} inputs",
                    g.rows(),
                    g.cols(),
                    w.cols()
                )),
                Some(_) if grams.iter().any(|g| !g.contains_key(site)) => {
                    problems.push(format!("`{site}`: not every model has a Gram matrix"));
                }
                Some(_) => {}
            }
        }
    }
    if !problems.is_empty() {
        return Err(TaskVectorError::Mismatch { problems });
    }
    let mut merged = TaskVector::default();
    for (site, w) in &models[0].sites {
        let here: Vec<&Matrix> = models.iter().map(|m| &m.sites[site]).collect();
        let one = if grams[0].contains_key(site) {
            let (mut left, mut right) =
                (Matrix::zeros(w.cols(), w.cols()), Matrix::zeros(w.cols(), w.rows()));
            for (w, gram) in here.iter().zip(grams) {
                let g = &gram[site];
                let g =
                    Matrix::from_fn(g.rows(), g.cols(), |i, j| g[(i, j)] * if i == j { 1.0 } else { alpha });
                add(&mut right, &g.matmul(&w.transpose())?, 1.0);
                add(&mut left, &g, 1.0);
            }
            solve_spd(&left, &right)?.transpose()
        } else {
            mean(&here)
        };
        merged.sites.insert(*site, one);
    }
    Ok(merged)
}
