//! Merges of weights in memory, by site: closed-form, data-driven and spectral methods over task vectors.
//!
//! A weight is a [`Matrix`] in Hugging Face's layout, `[d_out, d_in]`; biases and norms are `[1, d]` and are averaged where a
//! method speaks of matrices only. All arithmetic is f64 on the host.

mod emr;
mod fisher;
mod iso;
mod lines;
mod regmean;
mod tsv;
mod wudi;

use std::collections::BTreeMap;

use burn::tensor::Device;
use firebrick_core::{Seed, Site};
use firebrick_models::{Decoder, DecoderConfig, ModelError, TensorSource};
use firebrick_tensor::linalg::{LinalgError, Matrix, Svd, leading_svd, svd};
use rayon::prelude::*;

pub use emr::{Emr, EmrTask, emr};
pub use fisher::{FisherNorm, fisher};
pub use iso::{iso_c, iso_cts};
pub use lines::lines;
pub use regmean::{InputGram, regmean};
pub use tsv::tsv;
pub use wudi::wudi;

/// What can go wrong in a merge in memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskVectorError {
    /// The inputs do not fit together; every problem is listed.
    #[error("the inputs do not fit together: {}", problems.join("; "))]
    Mismatch {
        /// One line per problem.
        problems: Vec<String>,
    },
    /// A decomposition failed.
    #[error(transparent)]
    Linalg(#[from] LinalgError),
    /// Units could not be assigned to each other.
    #[error(transparent)]
    Transport(#[from] crate::transport::TransportError),
    /// A decoder could not be read or made.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Fine-tuned minus base, or any other weights, by site (arXiv 2212.04089).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskVector {
    /// The weight at each site, `[d_out, d_in]` or `[1, d]`.
    pub sites: BTreeMap<Site, Matrix>,
}

impl TaskVector {
    /// The weights of a decoder: embedding, norms and biases too; no head where it is the embedding.
    ///
    /// # Errors
    /// If the weights can't be read from their device.
    pub fn of(decoder: &Decoder) -> Result<TaskVector, TaskVectorError> {
        let mut weights = TaskVector::default();
        for site in decoder.sites().entries().iter().map(|e| e.site) {
            let Some([rows, cols]) = decoder.weight(site).map(|w| w.dims()) else { continue };
            let values = decoder.read_site(site, &[rows, cols])?;
            weights.sites.insert(site, Matrix::from_f32(rows, cols, &values)?);
        }
        Ok(weights)
    }

    /// A decoder with these weights, rounded to f32, as constants.
    ///
    /// # Errors
    /// If `config` is impossible; every weight that is missing or of another shape.
    pub fn decoder(&self, config: DecoderConfig, device: &Device) -> Result<Decoder, TaskVectorError> {
        Ok(Decoder::load(config, self, device)?)
    }

    /// `tuned - base`.
    ///
    /// # Errors
    /// Every site that one of them lacks or that differs in shape.
    pub fn between(base: &TaskVector, tuned: &TaskVector) -> Result<TaskVector, TaskVectorError> {
        tuned.plus(base, -1.0)
    }

    /// `self + scale * other`.
    ///
    /// # Errors
    /// As [`TaskVector::between`].
    pub fn plus(&self, other: &TaskVector, scale: f64) -> Result<TaskVector, TaskVectorError> {
        check_same(&[self, other])?;
        let mut sum = self.clone();
        for (matrix, other) in sum.sites.values_mut().zip(other.sites.values()) {
            add(matrix, other, scale);
        }
        Ok(sum)
    }

    /// All weights times `factor`.
    pub fn times(mut self, factor: f64) -> TaskVector {
        self.sites.values_mut().for_each(|m| scale(m, factor));
        self
    }

    /// The `rank` largest singular triplets at each matrix ([`leading_svd`]); vectors stay as they are, in [`LowRank::vectors`].
    ///
    /// # Errors
    /// If a weight is not finite or a decomposition does not converge.
    pub fn low_rank(&self, rank: impl Fn(Site, &Matrix) -> usize + Sync) -> Result<LowRank, TaskVectorError> {
        let (matrices, vectors): (Vec<_>, Vec<_>) = self.sites.iter().partition(|(_, m)| is_matrix(m));
        let cut = |(site, matrix): (&Site, &Matrix)| {
            let most = matrix.rows().min(matrix.cols());
            let seed = Seed(0).derive(&site.to_string());
            Ok((*site, leading_svd(matrix, rank(*site, matrix).min(most), seed)?))
        };
        let cut: Vec<Result<_, TaskVectorError>> = matrices.into_par_iter().map(cut).collect();
        Ok(LowRank {
            matrices: cut.into_iter().collect::<Result<_, _>>()?,
            vectors: vectors.into_iter().map(|(site, vector)| (*site, vector.clone())).collect(),
        })
    }
}

impl TensorSource for TaskVector {
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.check_site(site, shape)?;
        Ok(self.sites[&site].to_f32())
    }

    fn check_site(&self, site: Site, shape: &[usize]) -> Result<(), ModelError> {
        let weight = self.sites.get(&site).ok_or(ModelError::NoWeight { site })?;
        let found = [weight.rows(), weight.cols()];
        if found == shape || (found[0] == 1 && found[1..] == *shape) {
            return Ok(());
        }
        let name = site.to_string();
        Err(ModelError::Shape { name, expected: shape.to_vec(), found: found.to_vec() })
    }
}

/// A task vector in factors.
#[derive(Clone, Debug, Default)]
pub struct LowRank {
    /// The factors at each matrix.
    pub matrices: BTreeMap<Site, Svd>,
    /// Biases and norms, whole.
    pub vectors: BTreeMap<Site, Matrix>,
}

impl LowRank {
    /// The weights that the factors stand for.
    pub fn rebuild(&self) -> TaskVector {
        let matrices = self.matrices.iter().map(|(site, svd)| (*site, svd.reconstruct()));
        TaskVector { sites: matrices.chain(self.vectors.iter().map(|(s, v)| (*s, v.clone()))).collect() }
    }

    /// Numbers held: `r (d_out + d_in)` a matrix (the singular values go into a factor), `d` a vector.
    pub fn numbers(&self) -> usize {
        let factors = self.matrices.values().map(|s| s.sigma.len() * (s.u.rows() + s.vt.cols()));
        factors.chain(self.vectors.values().map(|v| v.data().len())).sum()
    }
}

/// Whether singular vectors mean anything here.
fn is_matrix(m: &Matrix) -> bool {
    m.rows() > 1 && m.cols() > 1
}

fn add(to: &mut Matrix, other: &Matrix, scale: f64) {
    to.data_mut().iter_mut().zip(other.data()).for_each(|(a, b)| *a += scale * b);
}

fn scale(m: &mut Matrix, factor: f64) {
    m.data_mut().iter_mut().for_each(|x| *x *= factor);
}

fn sum(of: &[&Matrix]) -> Matrix {
    let mut total = Matrix::zeros(of[0].rows(), of[0].cols());
    of.iter().for_each(|m| add(&mut total, m, 1.0));
    total
}

fn mean(of: &[&Matrix]) -> Matrix {
    let mut total = sum(of);
    scale(&mut total, 1.0 / of.len() as f64);
    total
}

fn norm(m: &Matrix) -> f64 {
    m.data().iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// The orthonormal matrix nearest to `a`.
fn polar(a: &Matrix) -> Result<Matrix, LinalgError> {
    let mut s = svd(a)?;
    s.sigma.fill(1.0);
    Ok(s.reconstruct())
}

/// Matrices side by side.
pub(crate) fn beside(parts: &[Matrix]) -> Matrix {
    let starts: Vec<(usize, usize)> =
        parts.iter().enumerate().flat_map(|(p, m)| (0..m.cols()).map(move |c| (p, c))).collect();
    Matrix::from_fn(parts[0].rows(), starts.len(), |i, j| parts[starts[j].0][(i, starts[j].1)])
}

/// One or more with the same sites and shapes.
pub(crate) fn check_same(all: &[&TaskVector]) -> Result<(), TaskVectorError> {
    let mut problems = Vec::new();
    let Some((first, rest)) = all.split_first() else {
        return Err(TaskVectorError::Mismatch { problems: vec!["no model".into()] });
    };
    for (i, other) in rest.iter().enumerate() {
        for (site, m) in &first.sites {
            match other.sites.get(site) {
                None => problems.push(format!("model {} lacks `{site}`", i + 1)),
                Some(o) if (o.rows(), o.cols()) != (m.rows(), m.cols()) => problems.push(format!(
                    "`{site}`: {} x {} in model 0, {} x {} in model {}",
                    m.rows(),
                    m.cols(),
                    o.rows(),
                    o.cols(),
                    i + 1
                )),
                Some(_) => {}
            }
        }
        let more = other.sites.keys().filter(|s| !first.sites.contains_key(s));
        problems.extend(more.map(|s| format!("model 0 lacks `{s}`")));
    }
    if problems.is_empty() { Ok(()) } else { Err(TaskVectorError::Mismatch { problems }) }
}

/// `merge` of each matrix, the mean of each vector.
fn each_matrix(
    tasks: &[TaskVector],
    merge: impl Fn(&[&Matrix]) -> Result<Matrix, TaskVectorError> + Sync,
) -> Result<TaskVector, TaskVectorError> {
    check_same(&tasks.iter().collect::<Vec<_>>())?;
    let one = |(site, first): (&Site, &Matrix)| {
        let here: Vec<&Matrix> = tasks.iter().map(|t| &t.sites[site]).collect();
        Ok((*site, if is_matrix(first) { merge(&here)? } else { mean(&here) }))
    };
    // Decompositions are sequential: sites are worked on side by side. Of several errors the first in order counts.
    let sites: Vec<(&Site, &Matrix)> = tasks[0].sites.iter().collect();
    let merged: Vec<Result<_, TaskVectorError>> = sites.into_par_iter().map(one).collect();
    Ok(TaskVector { sites: merged.into_iter().collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests;
