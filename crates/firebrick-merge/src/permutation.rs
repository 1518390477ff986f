//! Alignment of two models by permuting hidden units and attention heads, without data (weight matching, Ainsworth et al. 2022,
//! arXiv 2209.04836).
//!
//! Models of one residual stream (of a common ancestor, say) are aligned layer by layer, each by one exact assignment: nothing
//! that a layer permutes inside is seen outside of it.

use firebrick_core::{Part, Site};
use firebrick_tensor::linalg::Matrix;

use crate::task_vectors::{TaskVector, TaskVectorError, check_same};
use crate::transport::assignment;

/// How heads lie in the rows of the attention projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, each shared by `heads / kv_heads` consecutive query heads.
    pub kv_heads: usize,
    /// Rows of a head.
    pub head_dim: usize,
}

/// Which units of the other model stand where those of the reference do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alignment {
    shape: HeadShape,
    /// One entry a layer.
    pub layers: Vec<LayerAlignment>,
}

/// The alignment of one layer; entry `i` is the other model's unit for unit `i` of the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerAlignment {
    /// Hidden units of the feed-forward network, `[d_ff]`.
    pub mlp: Vec<usize>,
    /// Key and value heads, `[kv_heads]`.
    pub kv_heads: Vec<usize>,
    /// Query heads, `[heads]`; those of a key head stay together.
    pub heads: Vec<usize>,
}

/// Aligns `other` with `reference`: the permutations of hidden units, of groups of heads and of heads in a group that bring the
/// inner product of the two models' weights to its maximum, layer by layer. `d_ff^3` steps a layer at most.
///
/// # Errors
/// Models that differ in sites or shapes; projections that are missing or not of the shape that `shape` says; weights that
/// are not finite.
pub fn match_weights(
    reference: &TaskVector,
    other: &TaskVector,
    shape: HeadShape,
) -> Result<Alignment, TaskVectorError> {
    check_same(&[reference, other])?;
    let mut problems = Vec::new();
    if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) || shape.head_dim == 0 {
        problems.push(format!("{} query heads can't share {} key heads", shape.heads, shape.kv_heads));
    }
    let layers = reference.sites.keys().filter_map(|s| s.layer).max().map_or(0, |l| l + 1);
    for layer in 0..layers {
        let rows = |part| reference.sites.get(&Site::layer(layer, part)).map(Matrix::rows);
        let cols = |part| reference.sites.get(&Site::layer(layer, part)).map(Matrix::cols);
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let hidden = rows(Part::MlpGate);
        for (part, found, expected) in [
            (Part::MlpGate, hidden, hidden),
            (Part::MlpUp, rows(Part::MlpUp), hidden),
            (Part::MlpDown, cols(Part::MlpDown), hidden),
            (Part::AttnQ, rows(Part::AttnQ), Some(queries)),
            (Part::AttnK, rows(Part::AttnK), Some(keys)),
            (Part::AttnV, rows(Part::AttnV), Some(keys)),
            (Part::AttnO, cols(Part::AttnO), Some(queries)),
        ] {
            if found.is_none() || found != expected {
                let site = Site::layer(layer, part);
                problems.push(format!("`{site}`: {found:?} units, {expected:?} expected"));
            }
        }
    }
    if !problems.is_empty() {
        return Err(TaskVectorError::Mismatch { problems });
    }
    let layers = (0..layers).map(|layer| align_layer(reference, other, layer, shape));
    Ok(Alignment { shape, layers: layers.collect::<Result<_, _>>()? })
}

fn align_layer(
    a: &TaskVector,
    b: &TaskVector,
    layer: usize,
    shape: HeadShape,
) -> Result<LayerAlignment, TaskVectorError> {
    let at = |model: &TaskVector, part| -> Matrix { model.sites[&Site::layer(layer, part)].clone() };
    // Inner products of the rows of the one with the rows of the other.
    let rows = |part| at(a, part).matmul(&at(b, part).transpose());
    let cols = |part| at(a, part).transpose().matmul(&at(b, part));
    let best =
        |alike: &Matrix| assignment(&Matrix::from_fn(alike.rows(), alike.cols(), |i, j| -alike[(i, j)]));

    let (gate, up, down) = (rows(Part::MlpGate)?, rows(Part::MlpUp)?, cols(Part::MlpDown)?);
    let alike = Matrix::from_fn(gate.rows(), gate.cols(), |i, j| gate[(i, j)] + up[(i, j)] + down[(i, j)]);
    let mlp = best(&alike)?;

    let HeadShape { heads, kv_heads, head_dim } = shape;
    // Heads are alike as far as their rows are, each with its own counterpart: rotary positions allow no other order.
    let of_heads = |units: &Matrix, n: usize| {
        Matrix::from_fn(n, n, |i, j| (0..head_dim).map(|d| units[(i * head_dim + d, j * head_dim + d)]).sum())
    };
    let (q, o) = (of_heads(&rows(Part::AttnQ)?, heads), of_heads(&cols(Part::AttnO)?, heads));
    let (k, v) = (of_heads(&rows(Part::AttnK)?, kv_heads), of_heads(&rows(Part::AttnV)?, kv_heads));
    let each = heads / kv_heads;
    let mut inside = Vec::with_capacity(kv_heads * kv_heads);
    let mut groups = Matrix::zeros(kv_heads, kv_heads);
    for i in 0..kv_heads {
        for j in 0..kv_heads {
            let alike = Matrix::from_fn(each, each, |x, y| {
                let (x, y) = (i * each + x, j * each + y);
                q[(x, y)] + o[(x, y)]
            });
            let order = best(&alike)?;
            let together: f64 = order.iter().enumerate().map(|(x, y)| alike[(x, *y)]).sum();
            groups[(i, j)] = together + k[(i, j)] + v[(i, j)];
            inside.push(order);
        }
    }
    let kv = best(&groups)?;
    let heads = kv
        .iter()
        .enumerate()
        .flat_map(|(i, j)| inside[i * kv_heads + j].iter().map(move |y| j * each + y))
        .collect();
    Ok(LayerAlignment { mlp, kv_heads: kv, heads })
}

impl Alignment {
    /// `other` with its units in the reference's order: the same function, up to rounding.
    ///
    /// # Panics
    /// If `other` has other shapes than the model that was aligned.
    pub fn apply(&self, other: &TaskVector) -> TaskVector {
        let mut moved = other.clone();
        for (site, matrix) in &mut moved.sites {
            let Some(layer) = site.layer.and_then(|l| self.layers.get(l)) else { continue };
            let rows_of = |heads: &[usize]| -> Vec<usize> {
                heads
                    .iter()
                    .flat_map(|h| (0..self.shape.head_dim).map(move |d| h * self.shape.head_dim + d))
                    .collect()
            };
            let old = matrix.clone();
            let rows = |order: &[usize]| Matrix::from_fn(old.rows(), old.cols(), |i, j| old[(order[i], j)]);
            let cols = |order: &[usize]| Matrix::from_fn(old.rows(), old.cols(), |i, j| old[(i, order[j])]);
            *matrix = match site.part {
                Part::MlpGate | Part::MlpUp => rows(&layer.mlp),
                // Biases are rows of one.
                Part::MlpDown | Part::MlpGateBias | Part::MlpUpBias => cols(&layer.mlp),
                Part::AttnQ => rows(&rows_of(&layer.heads)),
                Part::AttnO | Part::AttnQBias => cols(&rows_of(&layer.heads)),
                Part::AttnK | Part::AttnV => rows(&rows_of(&layer.kv_heads)),
                Part::AttnKBias | Part::AttnVBias => cols(&rows_of(&layer.kv_heads)),
                _ => old,
            };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    const SHAPE: HeadShape = HeadShape { heads: 6, kv_heads: 3, head_dim: 4 };
    const D: usize = 20;
    const HIDDEN: usize = 31;

    fn model(seed: u64) -> TaskVector {
        let mut model = TaskVector::default();
        let (q, k) = (SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim);
        for layer in 0..2 {
            for (part, rows, cols) in [
                (Part::AttnQ, q, D),
                (Part::AttnK, k, D),
                (Part::AttnV, k, D),
                (Part::AttnO, D, q),
                (Part::AttnQBias, 1, q),
                (Part::AttnKBias, 1, k),
                (Part::MlpGate, HIDDEN, D),
                (Part::MlpUp, HIDDEN, D),
                (Part::MlpDown, D, HIDDEN),
                (Part::MlpNorm, 1, D),
            ] {
                let site = Site::layer(layer, part);
                model.sites.insert(site, Matrix::random_normal(rows, cols, Seed(seed), &site.to_string()));
            }
        }
        model
    }

    /// A random order of `n`.
    fn shuffled(n: usize, seed: u64, name: &str) -> Vec<usize> {
        let keys: Vec<f64> = Seed(seed).normal_f64(name, n, 1.0).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
        order
    }

    fn inverse(order: &[usize]) -> Vec<usize> {
        let mut inverse = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, j)| inverse[*j] = i);
        inverse
    }

    #[test]
    fn every_permutation_of_units_and_heads_is_found() {
        for seed in 0..3 {
            let reference = model(seed);
            let each = SHAPE.heads / SHAPE.kv_heads;
            let planted = Alignment {
                shape: SHAPE,
                layers: (0..2)
                    .map(|l| {
                        let kv_heads = shuffled(SHAPE.kv_heads, seed, &format!("groups{l}"));
                        let inside = |g: usize| shuffled(each, seed, &format!("heads{l}/{g}"));
                        let heads =
                            kv_heads.iter().flat_map(|g| inside(*g).into_iter().map(move |h| g * each + h));
                        let heads = heads.collect();
                        LayerAlignment { mlp: shuffled(HIDDEN, seed, &format!("mlp{l}")), heads, kv_heads }
                    })
                    .collect(),
            };
            let other = planted.apply(&reference);
            let noisy = other.plus(&model(seed + 100).times(0.05), 1.0).unwrap();
            for found in [other.clone(), noisy.clone()] {
                let found = match_weights(&reference, &found, SHAPE).unwrap();
                for (found, planted) in found.layers.iter().zip(&planted.layers) {
                    assert_eq!(found.mlp, inverse(&planted.mlp));
                    assert_eq!(found.kv_heads, inverse(&planted.kv_heads));
                    assert_eq!(found.heads, inverse(&planted.heads));
                }
            }
            let alignment = match_weights(&reference, &other, SHAPE).unwrap();
            assert_eq!(alignment.apply(&other), reference, "back to the bit");
            assert_ne!(other, reference, "control: something was permuted");
        }
    }

    #[test]
    fn what_does_not_fit_is_listed() {
        let a = model(0);
        let mut b = a.clone();
        b.sites.remove(&Site::layer(1, Part::MlpUp));
        assert!(match_weights(&a, &b, SHAPE).is_err());
        let wrong = HeadShape { kv_heads: 4, ..SHAPE };
        let error = match_weights(&a, &a, wrong).unwrap_err().to_string();
        assert!(error.contains("share 4 key heads") && error.contains("layers.1.attn.k"), "{error}");
        assert!(match_weights(&b, &b, SHAPE).unwrap_err().to_string().contains("layers.1.mlp.up"));
    }
}
