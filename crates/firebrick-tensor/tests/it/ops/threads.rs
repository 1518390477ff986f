//! The same bytes on one, two and three threads.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_tensor::ops::{
    AttentionOptions, Divergence, PackedInputs, PackedMatrix, Precision, attention, awake, cross_entropy,
    grouped_matmul, grouped_swiglu, linear, linear_add, linear_cross_entropy, linear_kl, lora_linear,
    packed_matmul, permute, rms_norm, rope, swiglu, unpermute,
};

use super::support::{below, flat, normal};

fn leaf<const D: usize>(name: &str, shape: [usize; D]) -> (Tensor<1>, Tensor<D>) {
    let n = shape.iter().product();
    let leaf = flat(&normal(name, n), &Device::flex().autodiff(), DType::F32).require_grad();
    (leaf.clone(), leaf.reshape(shape))
}

/// Bits of the result and of every gradient.
fn bits<const D: usize>(y: Tensor<D>, leaves: &[Tensor<1>]) -> Vec<u32> {
    let n = y.shape().num_elements();
    let y = y.reshape([n]);
    let weights = flat(&normal("weights", n), &Device::flex().autodiff(), DType::F32);
    let grads = (y.clone() * weights).sum().backward();
    let mut all = vec![y.inner()];
    all.extend(leaves.iter().map(|leaf| leaf.grad(&grads).expect("a gradient")));
    all.into_iter().flat_map(|t| t.into_data().try_to_vec::<f32>().expect("f32")).map(f32::to_bits).collect()
}

fn everything() -> Vec<(&'static str, Vec<u32>)> {
    let device = Device::flex().autodiff();
    let mut out = Vec::new();
    let ((x, a), (g, gamma)) = (leaf("x", [2111, 33]), leaf("gamma", [33]));
    out.push(("rms_norm", bits(rms_norm(a, gamma, 1e-5), &[x, g])));
    let ((x, a), (u, up)) = (leaf("x", [2111, 33]), leaf("up", [2111, 33]));
    out.push(("swiglu", bits(swiglu(a, up), &[x, u])));
    let (q, a) = leaf("q", [2, 6, 140, 16]);
    let angles = || flat(&normal("angles", 140 * 8), &device, DType::F32).reshape([140, 8]);
    out.push(("rope", bits(rope(a, angles(), angles()), &[q])));
    let (q, a) = leaf("q", [2, 6, 140, 16]);
    let ((k, b), (v, c)) = (leaf("k", [2, 2, 150, 16]), leaf("v", [2, 2, 150, 16]));
    let options = AttentionOptions { scale: 0.25, causal: true, window: None, softcap: None };
    out.push(("attention", bits(attention(a, b, c, options), &[q, k, v])));
    let targets: Vec<i32> = below("targets", 131, 1009).into_iter().map(|t| t as i32).collect();
    let targets = || Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [131]), &device);
    let (l, logits) = leaf("logits", [131, 1009]);
    out.push(("cross_entropy", bits(cross_entropy(logits, targets()), &[l])));
    // Products large enough for several threads.
    for (rows, transposed) in [(1, true), (1, false), (7, true), (7, false), (140, true)] {
        let (x, a) = leaf("x", [rows, 101]);
        let (w, weight) = if transposed {
            let (w, weight) = leaf("weight", [3001, 101]);
            (w, weight.transpose())
        } else {
            leaf("weight", [101, 3001])
        };
        out.push(("linear", bits(linear(a, weight, Precision::F32), &[x, w])));
    }
    let ((x, a), (w, weight)) = (leaf("x", [331, 101]), leaf("weight", [101, 301]));
    let (y, sum) = leaf("y", [331, 301]);
    out.push(("linear_add", bits(linear_add(sum, a, weight, Precision::F32), &[y, x, w])));
    let ((x, a), (w, weight)) = (leaf("x", [331, 101]), leaf("weight", [301, 101]));
    let ((d, down), (u, up)) = (leaf("down", [101, 8]), leaf("up", [8, 301]));
    let y = lora_linear(a, weight.transpose(), down, up, 0.5, Precision::F32);
    out.push(("lora_linear", bits(y, &[x, w, d, u])));
    let ((x, a), (w, weight)) = (leaf("x", [331, 101]), leaf("weight", [101, 301]));
    out.push(("linear in bf16", bits(linear(a, weight, Precision::Bf16), &[x, w])));
    for precision in [Precision::F32, Precision::Bf16] {
        let ((h, hidden), (w, weight)) = (leaf("hidden", [131, 65]), leaf("weight", [65, 1009]));
        let loss = linear_cross_entropy(hidden, weight, targets(), precision);
        out.push(("linear_cross_entropy", bits(loss, &[h, w])));
    }
    let ((h, hidden), (w, weight)) = (leaf("hidden", [131, 65]), leaf("weight", [65, 1009]));
    let (teacher, head) = (leaf("teacher", [131, 63]).1.detach(), leaf("head", [63, 1009]).1.detach());
    let kl = linear_kl(hidden, weight, teacher, head, 2.0, Divergence::ReverseKl);
    out.push(("linear_kl", bits(kl, &[h, w])));
    let ((x, a), (e, experts)) = (leaf("x", [333, 40]), leaf("experts", [3, 40, 50]));
    out.push(("grouped_matmul", bits(grouped_matmul(a, experts, &[0, 100, 100, 333]), &[x, e])));
    let ((x, a), (g, gate)) = (leaf("x", [333, 40]), leaf("gate", [3, 40, 50]));
    let ((u, up), (d, down)) = (leaf("up", [3, 40, 50]), leaf("down", [3, 50, 40]));
    let y = grouped_swiglu(a, gate, up, down, &[0, 100, 100, 333]);
    out.push(("grouped_swiglu", bits(y, &[x, g, u, d])));
    let order: Vec<usize> = (0..333).map(|i| i * 100 % 333).collect();
    let ((x, a), (r, rows)) = (leaf("x", [111, 301]), leaf("rows", [333, 301]));
    let (w, weights) = leaf("weights", [111, 3]);
    out.push(("permute", bits(permute(a, &order), &[x])));
    out.push(("unpermute", bits(unpermute(rows, weights, &order), &[r, w])));
    let codes: Vec<u8> = below("codes", 640 * 700, 16).into_iter().map(|c| c as u8).collect();
    let ones = || Tensor::<2>::ones([10, 700], &Device::flex());
    let packed = PackedMatrix::pack(&codes, 640, 700, 4, 64, ones(), ones() * 8);
    for inputs in [PackedInputs::Exact, PackedInputs::EightBits] {
        for rows in [1, 3, 64] {
            let x = flat(&normal("x", rows * 640), &Device::flex(), DType::F32).reshape([rows, 640]);
            let y = packed_matmul(x, &packed, inputs).into_data().try_to_vec::<f32>().expect("f32");
            out.push(("packed_matmul", y.into_iter().map(f32::to_bits).collect()));
        }
    }
    out
}

#[test]
fn the_thread_count_does_not_show() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let one = pool(1).install(everything);
    for threads in [2, 3] {
        let awake = || awake(&Device::flex(), everything);
        for results in [pool(threads).install(everything), pool(threads).install(awake)] {
            for ((name, got), (_, want)) in results.into_iter().zip(&one) {
                assert!(got == *want, "{name} depends on the thread count ({threads} threads)");
            }
        }
    }
}
