use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_tensor::ops::{Precision, linear_cross_entropy, linear_sparse_kl, sparse_kl};

use super::support::{Case, below, devices, devices_and, error, flat, host, normal, of_products};

/// Targets of `n` rows with `k` distinct ids each, of which every third row leaves the last unused.
fn targets(n: usize, k: usize, vocab: usize) -> (Vec<i32>, Vec<f32>) {
    let starts = below("starts", n, vocab);
    let ids = (0..n * k).map(|i| ((starts[i / k] + 5 * (i % k)) % vocab) as i32).collect();
    let mut probabilities: Vec<f32> = normal("targets", n * k).iter().map(|x| x.exp()).collect();
    for (i, row) in probabilities.chunks_mut(k).enumerate() {
        if i % 3 == 2 {
            row[k - 1] = 0.0;
        }
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|p| *p /= sum);
    }
    (ids, probabilities)
}

fn ids(values: &[i32], n: usize, device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [n, values.len() / n]), device)
}

/// Dense targets, dense logits, the definition.
fn reference(logits: &[f64], vocab: usize, ids: &[i32], probabilities: &[f64]) -> Vec<f64> {
    let k = ids.len() * vocab / logits.len();
    let row = |(i, z): (usize, &[f64])| {
        let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        let mut dense = vec![0.0; vocab];
        (0..k).for_each(|j| dense[ids[i * k + j] as usize] += probabilities[i * k + j]);
        let term = |(q, z): (&f64, &f64)| if *q > 0.0 { q * (q.ln() - (z - lse)) } else { 0.0 };
        dense.iter().zip(z).map(term).sum()
    };
    logits.chunks(vocab).enumerate().map(row).collect()
}

#[test]
fn agrees_with_the_reference() {
    for (n, d, vocab, k) in [(1, 1, 2, 1), (6, 5, 31, 4), (17, 8, 101, 10)] {
        let (named, probabilities) = targets(n, k, vocab);
        let wide: Vec<f64> = probabilities.iter().map(|&p| f64::from(p)).collect();
        let logits = |x: &[Vec<f64>]| -> Vec<f64> {
            let at = |i: usize| (0..d).map(|j| x[0][i / vocab * d + j] * x[1][j * vocab + i % vocab]).sum();
            (0..n * vocab).map(at).collect()
        };
        let plain = |x: &[Vec<f64>], q: &[f64]| reference(&logits(x), vocab, &named, q);
        let constants = |device: &Device, dtype| {
            (ids(&named, n, device), flat(&probabilities, device, dtype).reshape([n, k]))
        };
        for fused in [true, false] {
            let case = Case {
                name: format!("linear_sparse_kl [{n}, {d}, {vocab}] of {k}, fused: {fused}"),
                inputs: vec![normal("hidden", n * d), normal("weight", d * vocab)],
                op: &|x| {
                    let [hidden, weight] = x.try_into().expect("two inputs");
                    let (named, q) = constants(&hidden.device(), hidden.dtype());
                    let (hidden, weight) = (hidden.reshape([n, d]), weight.reshape([d, vocab]));
                    match fused {
                        true => linear_sparse_kl(hidden, weight, named, q),
                        false => sparse_kl(hidden.matmul(weight), named, q),
                    }
                },
                reference: &|x| plain(x, &wide),
            };
            let turned: Vec<f64> =
                wide.chunks(k).flat_map(|row| row.iter().rev().copied().collect::<Vec<_>>()).collect();
            for device in devices_and(n == 17) {
                case.check(&device, of_products(&device, 5e-6), Some(1e-8));
                if k > 1 {
                    case.refutes(&device, &|x| plain(x, &turned));
                }
            }
        }
    }
}

#[test]
fn one_token_is_cross_entropy_and_none_is_nothing() {
    let (n, d, vocab) = (5, 4, 13);
    for device in devices() {
        let hidden = flat(&normal("hidden", n * d), &device, DType::F32).reshape([n, d]);
        let weight = flat(&normal("weight", d * vocab), &device, DType::F32).reshape([d, vocab]);
        let label = [3, 0, 12, 5, 5];
        let kl = |q: Tensor<2>| linear_sparse_kl(hidden.clone(), weight.clone(), ids(&label, n, &device), q);
        let one = host(kl(Tensor::ones([n, 1], &device)));
        let label = ids(&label, n, &device).reshape([n]);
        let known = host(linear_cross_entropy(hidden.clone(), weight.clone(), label, Precision::F32));
        assert!(error(&one, &known) < 1e-6, "{one:?} against {known:?}");
        assert!(host(kl(Tensor::zeros([n, 1], &device))).iter().all(|x| *x == 0.0));
    }
}
