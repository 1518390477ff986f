//! Fisher-weighted averaging (arXiv 2111.09832): each parameter weighted by how sure its model is of it.

use super::{TaskVector, TaskVectorError, check_same, norm};

/// Added to each Fisher entry, so that parameters that nothing depends on are averaged.
const FLOOR: f64 = 1e-6;

/// Whether Fisher diagonals are brought to one scale first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FisherNorm {
    /// As they are: the closed form for Gaussian posteriors.
    Off,
    /// Weighted by the inverse of their norm, so that a model with large gradients does not win everywhere.
    Unit,
}

/// The mean of `models` weighted by their diagonals `fishers` (one each, of the models' shapes).
///
/// # Errors
/// Models or diagonals that differ in number, sites or shapes; an entry of a diagonal that is negative or not finite.
pub fn fisher(
    models: &[TaskVector],
    fishers: &[TaskVector],
    normalize: FisherNorm,
) -> Result<TaskVector, TaskVectorError> {
    check_same(&models.iter().chain(fishers).collect::<Vec<_>>())?;
    let mut problems = Vec::new();
    if models.len() != fishers.len() {
        problems.push(format!("{} models, {} Fisher diagonals", models.len(), fishers.len()));
    }
    for (i, f) in fishers.iter().enumerate() {
        let bad = f.sites.iter().filter(|(_, m)| m.data().iter().any(|x| !x.is_finite() || *x < 0.0));
        problems.extend(bad.map(|(s, _)| format!("diagonal {i}, `{s}`: an entry is negative or not finite")));
    }
    if !problems.is_empty() {
        return Err(TaskVectorError::Mismatch { problems });
    }
    let length = |f: &TaskVector| f.sites.values().map(|m| norm(m).powi(2)).sum::<f64>().sqrt();
    let weights: Vec<f64> = match normalize {
        FisherNorm::Off => vec![1.0; models.len()],
        FisherNorm::Unit => {
            let lengths: Vec<f64> = fishers.iter().map(length).collect();
            // One that knows nothing has no say, unless none knows anything.
            let known = lengths.iter().any(|l| *l > 0.0);
            lengths.iter().map(|l| if *l > 0.0 { 1.0 / l } else { f64::from(u8::from(!known)) }).collect()
        }
    };
    let total: f64 = weights.iter().sum();
    let mut merged = models[0].clone();
    for (site, m) in &mut merged.sites {
        for (i, x) in m.data_mut().iter_mut().enumerate() {
            let (mut above, mut below) = (0.0, 0.0);
            for ((model, f), w) in models.iter().zip(fishers).zip(&weights) {
                let w = w / total * (f.sites[site].data()[i] + FLOOR);
                above += w * model.sites[site].data()[i];
                below += w;
            }
            *x = above / below;
        }
    }
    Ok(merged)
}
