use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{Precision, lora_linear};

use super::support::{Case, devices_and, flat, host, normal, of_products};

const SCALE: f64 = 0.75;

/// Rows `[_, d_in]` times a matrix whose element of an input and an output is `at` their numbers.
fn product(x: &[f64], d_in: usize, d_out: usize, at: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let row = |x: &[f64], j: usize| x.iter().enumerate().map(|(i, x)| x * at(i, j)).sum();
    x.chunks(d_in).flat_map(|x| (0..d_out).map(|j| row(x, j)).collect::<Vec<f64>>()).collect()
}

/// The weight `[d_in, d_out]`, or `[d_out, d_in]` where it lies transposed, with `scale a b` added to it.
fn reference(t: &[Vec<f64>], [d_in, d_out, rank]: [usize; 3], transposed: bool, scale: f64) -> Vec<f64> {
    let at = |i: usize, j: usize| t[1][if transposed { j * d_in + i } else { i * d_out + j }];
    let update =
        |i: usize, j: usize| (0..rank).map(|r| t[2][i * rank + r] * t[3][r * d_out + j]).sum::<f64>();
    product(&t[0], d_in, d_out, |i, j| at(i, j) + scale * update(i, j))
}

fn weight(values: Tensor<1>, d_in: usize, d_out: usize, transposed: bool) -> Tensor<2> {
    if transposed { values.reshape([d_out, d_in]).transpose() } else { values.reshape([d_in, d_out]) }
}

#[test]
fn agrees_with_a_weight_that_has_the_update_on_ragged_shapes() {
    let shapes = [(1, 7, 5, 2), (8, 1, 1, 1), (9, 33, 17, 3), (67, 31, 131, 8), (8, 16, 70, 19)];
    for (rows, d_in, d_out, rank) in shapes {
        for transposed in [false, true] {
            let dims = [d_in, d_out, rank];
            let case = Case {
                name: format!("lora_linear [{rows}, {d_in}] {dims:?}, transposed: {transposed}"),
                inputs: vec![
                    normal("x", rows * d_in),
                    normal("weight", d_in * d_out),
                    normal("a", d_in * rank),
                    normal("b", rank * d_out),
                ],
                op: &|t| {
                    let [x, w, a, b] = t.try_into().expect("four inputs");
                    let (a, b) = (a.reshape([d_in, rank]), b.reshape([rank, d_out]));
                    let w = weight(w, d_in, d_out, transposed);
                    let y = lora_linear(x.reshape([rows, 1, d_in]), w, a, b, SCALE, Precision::F32);
                    assert_eq!(y.dims(), [rows, 1, d_out]);
                    y.reshape([rows * d_out])
                },
                reference: &|t| reference(t, dims, transposed, SCALE),
            };
            for device in devices_and(rows == 9) {
                case.check(&device, of_products(&device, 3e-6), (rows < 60).then_some(1e-6));
                case.refutes(&device, &|t| reference(t, dims, transposed, 0.0));
            }
        }
    }
}

/// Gradients of `x`, `weight`, `a` and `b` where they are asked for.
fn gradients(asked: [bool; 4], precision: Precision) -> [Option<Vec<f64>>; 4] {
    let (rows, d_in, d_out, rank) = (131, 96, 130, 8);
    let leaf = |i: usize, name: &str, n: usize| {
        let leaf = flat(&normal(name, n), &Device::flex().autodiff(), DType::F32);
        if asked[i] { leaf.require_grad() } else { leaf }
    };
    let leaves = [
        leaf(0, "x", rows * d_in),
        leaf(1, "weight", d_in * d_out),
        leaf(2, "a", d_in * rank),
        leaf(3, "b", rank * d_out),
    ];
    let [x, w, a, b] = leaves.clone();
    let (a, b) = (a.reshape([d_in, rank]), b.reshape([rank, d_out]));
    let y = lora_linear(x.reshape([rows, d_in]), weight(w, d_in, d_out, true), a, b, SCALE, precision);
    let of_result = flat(&normal("of_result", rows * d_out), &Device::flex().autodiff(), DType::F32);
    let grads = (y.reshape([rows * d_out]) * of_result).sum().backward();
    leaves.map(|leaf| leaf.grad(&grads).map(host))
}

#[test]
fn gradients_are_the_same_whatever_else_is_frozen() {
    for precision in [Precision::F32, Precision::Bf16] {
        let all = gradients([true; 4], precision);
        let asked =
            |i: usize| [[true, false, true, true], [false, false, true, true], [false, true, false, true]][i];
        for asked in (0..3).map(asked) {
            let some = gradients(asked, precision);
            for (i, (some, all)) in some.into_iter().zip(&all).enumerate() {
                assert_eq!(
                    some,
                    asked[i].then(|| all.clone().expect("asked for")),
                    "operand {i} of {asked:?}"
                );
            }
        }
    }
}
