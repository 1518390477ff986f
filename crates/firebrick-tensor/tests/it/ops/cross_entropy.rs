use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_tensor::ops::{Precision, cross_entropy, linear_cross_entropy};

use super::support::{Case, below, devices, devices_and, error, flat, host, is_flex, normal, of_products};

fn targets(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&v| v as i32).collect();
    Tensor::from_data(TensorData::new(values.clone(), [values.len()]), device)
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
    max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

fn reference(logits: &[f64], targets: &[usize]) -> Vec<f64> {
    let vocab = logits.len() / targets.len();
    logits.chunks(vocab).zip(targets).map(|(row, &t)| log_sum_exp(row) - row[t]).collect()
}

fn product(x: &[f64], w: &[f64], d: usize) -> Vec<f64> {
    let vocab = w.len() / d;
    let mut out = vec![0.0; x.len() / d * vocab];
    for (row, x) in out.chunks_mut(vocab).zip(x.chunks(d)) {
        for (x, w) in x.iter().zip(w.chunks(vocab)) {
            for (y, w) in row.iter_mut().zip(w) {
                *y += x * w;
            }
        }
    }
    out
}

#[test]
fn cross_entropy_agrees_with_the_reference() {
    for (n, vocab) in [(1, 1), (1, 2), (3, 7), (5, 33), (40, 1001)] {
        let chosen = below("targets", n, vocab);
        let logits = normal("logits", n * vocab).into_iter().map(|x| x * 3.0).collect();
        let case = Case {
            name: format!("cross_entropy [{n}, {vocab}]"),
            inputs: vec![logits],
            op: &|t| {
                let [logits] = t.try_into().expect("one input");
                let targets = targets(&chosen, &logits.device());
                cross_entropy(logits.reshape([n, vocab]), targets)
            },
            reference: &|t| reference(&t[0], &chosen),
        };
        // burn-cubecl-fusion 0.22.1 panics when it reduces a single element.
        for device in devices_and(n == 3 || n == 40) {
            case.check(&device, 3e-6, Some(1e-9));
            if vocab > 1 {
                let other: Vec<usize> = chosen.iter().map(|&t| (t + 1) % vocab).collect();
                case.refutes(&device, &|t| reference(&t[0], &other));
            }
        }
    }
}

#[test]
fn large_logits_do_not_overflow() {
    for device in devices() {
        let logits = flat(&[1000.0, 0.0, -1000.0, 3e4, 3e4, 0.0], &device, DType::F32).reshape([2, 3]);
        let got = host(cross_entropy(logits, targets(&[1, 0], &device)));
        assert!(error(&got, &[1000.0, 2f64.ln()]) < 1e-6, "{got:?} on {device:?}");
    }
}

#[test]
fn linear_cross_entropy_agrees_with_the_reference() {
    for (n, d, vocab) in [(1, 1, 2), (5, 7, 11), (33, 16, 129)] {
        let chosen = below("targets", n, vocab);
        let case = Case {
            name: format!("linear_cross_entropy [{n}, {d}, {vocab}]"),
            inputs: vec![normal("hidden", n * d), normal("weight", d * vocab)],
            op: &|t| {
                let [hidden, weight] = t.try_into().expect("two inputs");
                let targets = targets(&chosen, &hidden.device());
                linear_cross_entropy(
                    hidden.reshape([n, d]),
                    weight.reshape([d, vocab]),
                    targets,
                    Precision::F32,
                )
            },
            reference: &|t| reference(&product(&t[0], &t[1], d), &chosen),
        };
        for device in devices_and(n == 33) {
            case.check(&device, of_products(&device, 5e-6), Some(1e-9));
            let other: Vec<usize> = chosen.iter().map(|&t| (t + 1) % vocab).collect();
            case.refutes(&device, &|t| reference(&product(&t[0], &t[1], d), &other));
        }
    }
}

/// 680 rows of 50021 logits are two chunks.
#[test]
fn chunks_of_rows_join() {
    long_rows(&Device::flex(), 680, Precision::F32, 1e-5);
    long_rows(&Device::flex(), 680, Precision::Bf16, 1e-2);
}

#[test]
fn long_rows_agree_with_the_reference() {
    for device in devices() {
        // A GPU adds up each row of 50021 terms in plain f32.
        long_rows(&device, 4, Precision::F32, if is_flex(&device) { 1e-5 } else { 1e-4 });
    }
}

/// Values and gradients of `n` rows of 50021 logits, of weights that lie input by input or output by output.
fn long_rows(device: &Device, n: usize, precision: Precision, tolerance: f64) {
    let tolerance = of_products(device, tolerance);
    let (d, vocab) = (3, 50_021);
    let chosen = below("targets", n, vocab);
    let (hidden, weight) = (normal("hidden", n * d), normal("weight", d * vocab));
    let weights = normal("weights", n);
    let (h, w) = (super::support::wide(&hidden), super::support::wide(&weight));
    let mut logits = product(&h, &w, d);
    let want = reference(&logits, &chosen);
    // Gradient of the logits, then of both factors.
    for ((row, &target), &weight) in logits.chunks_mut(vocab).zip(&chosen).zip(&weights) {
        let sum = log_sum_exp(row);
        for x in row.iter_mut() {
            *x = (*x - sum).exp() * f64::from(weight);
        }
        row[target] -= f64::from(weight);
    }
    let mut dh = vec![0.0; n * d];
    let mut dw = vec![0.0; d * vocab];
    for (i, row) in logits.chunks(vocab).enumerate() {
        for j in 0..d {
            let (w, dw) = (&w[j * vocab..][..vocab], &mut dw[j * vocab..][..vocab]);
            dh[i * d + j] = row.iter().zip(w).map(|(g, w)| g * w).sum();
            for (dw, g) in dw.iter_mut().zip(row) {
                *dw += h[i * d + j] * g;
            }
        }
    }
    let device = device.clone().autodiff();
    let by_output = |x: &[f64]| -> Vec<f64> { (0..d * vocab).map(|i| x[i % d * vocab + i / d]).collect() };
    let weight_by_output: Vec<f32> = by_output(&w).into_iter().map(|x| x as f32).collect();
    let dw_by_output = by_output(&dw);
    for (tracked, transposed) in [(true, false), (true, true), (false, false), (false, true)] {
        let leaf = flat(&hidden, &device, DType::F32).require_grad();
        let (weight, dw) = if transposed { (&weight_by_output, &dw_by_output) } else { (&weight, &dw) };
        let head = flat(weight, &device, DType::F32).set_require_grad(tracked);
        let matrix = match transposed {
            true => head.clone().reshape([vocab, d]).swap_dims(0, 1),
            false => head.clone().reshape([d, vocab]),
        };
        let targets = targets(&chosen, &device);
        let loss = linear_cross_entropy(leaf.clone().reshape([n, d]), matrix, targets, precision);
        let e = error(&host(loss.clone().inner()), &want);
        assert!(e < 5e-6_f64.max(tolerance / 2.0), "values are off by {e:e} on {device:?}");
        let grads = (loss * flat(&weights, &device, DType::F32)).sum().backward();
        let e = error(&host(leaf.grad(&grads).expect("gradient of the hidden states")), &dh);
        assert!(e < tolerance, "gradient of the hidden states is off by {e:e} on {device:?}");
        let dweight = head.grad(&grads);
        assert_eq!(dweight.is_some(), tracked, "the weight has a gradient only if it is tracked");
        if let Some(dweight) = dweight {
            let e = error(&host(dweight), dw);
            assert!(e < tolerance, "gradient of the weight is off by {e:e} on {device:?}");
        }
    }
}

#[test]
#[should_panic(expected = "outside of a vocabulary")]
fn a_target_out_of_range_is_refused_on_the_cpu() {
    let device = Device::flex();
    cross_entropy(Tensor::zeros([1, 4], &device), targets(&[4], &device));
}
