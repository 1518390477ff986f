//! Divergence from targets that name a few tokens of the vocabulary.

use burn::tensor::{Int, Tensor};

use super::cross_entropy::cross_entropy;
use super::linear_cross_entropy::linear_cross_entropy;
use super::matmul::Precision;

/// `KL(target || softmax(hidden weight))` of each row, in nats, where a target puts `probabilities` on `ids` and nothing on all
/// other tokens; neither the targets nor the logits of all rows are ever held as `[n, vocab]`.
///
/// Ids should not repeat within a row unless all but one have probability 0: so shorter rows are filled up. Probabilities
/// that do not sum to one are taken as they are; a row of zeros has divergence 0 and no gradient. Gradients reach `hidden`,
/// and the weight if that is tracked.
///
/// - hidden: `[n, d]`, weight: `[d, vocab]`
/// - ids: `[n, k]`, each in `0..vocab`; probabilities: `[n, k]`, constants
/// - result: `[n]`
///
/// # Panics
/// If a shape disagrees or `k` is 0; on the CPU also if an id is out of range.
pub fn linear_sparse_kl(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    ids: Tensor<2, Int>,
    probabilities: Tensor<2>,
) -> Tensor<1> {
    let [n, k] = ids.dims();
    let [rows, d] = hidden.dims();
    assert_eq!(rows, n, "linear_sparse_kl: rows of hidden against ids");
    // Checks the other shapes, and that the first ids are in range.
    let first = first(&ids, &probabilities);
    let nll = linear_cross_entropy(hidden.clone(), weight.clone(), first, Precision::F32);
    let columns = weight.transpose().select(0, ids.reshape([n * k])).reshape([n, k, d]);
    let named: Tensor<2> = (columns * hidden.unsqueeze_dim(1)).sum_dim(2).squeeze_dim(2);
    divergence(nll, named, probabilities)
}

/// `KL(target || softmax(logits))` of each row, in nats: [`linear_sparse_kl`] for logits `[n, vocab]` that are there already.
///
/// # Panics
/// As [`linear_sparse_kl`].
pub fn sparse_kl(logits: Tensor<2>, ids: Tensor<2, Int>, probabilities: Tensor<2>) -> Tensor<1> {
    assert_eq!(logits.dims()[0], ids.dims()[0], "sparse_kl: rows of logits against ids");
    let nll = cross_entropy(logits.clone(), first(&ids, &probabilities));
    divergence(nll, logits.gather(1, ids), probabilities)
}

/// The first id of each row.
fn first(ids: &Tensor<2, Int>, probabilities: &Tensor<2>) -> Tensor<1, Int> {
    let [n, k] = ids.dims();
    assert!(k > 0, "sparse targets name at least one token");
    assert_eq!(probabilities.dims(), [n, k], "sparse targets: probabilities against ids");
    ids.clone().narrow(1, 0, 1).reshape([n])
}

/// From the negative log-likelihood `[n]` of the first named token, which stands for the log-sum-exp over the vocabulary, and
/// the logits `[n, k]` of those that are named.
fn divergence(nll: Tensor<1>, named: Tensor<2>, q: Tensor<2>) -> Tensor<1> {
    let first = named.clone().narrow(1, 0, 1);
    // 0 ln 0 is 0.
    let entropy = q.clone() * q.clone().clamp_min(f64::from(f32::MIN_POSITIVE)).log();
    let rest = (entropy + q.clone() * (first - named)).sum_dim(1);
    nll * q.sum_dim(1).squeeze_dim::<1>(1) + rest.squeeze_dim::<1>(1)
}
