use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_tensor::ops::{Precision, embedding, linear, linear_add, linear_cross_entropy, lora_linear};

use super::support::{Case, devices_and, error, flat, host, normal, of_products};

/// `x: [rows, d_in]` times `weight: [d_in, d_out]`, or `[d_out, d_in]` where it lies transposed.
fn reference(x: &[f64], weight: &[f64], d_in: usize, d_out: usize, transposed: bool) -> Vec<f64> {
    let at = |i: usize, j: usize| if transposed { weight[j * d_in + i] } else { weight[i * d_out + j] };
    let row = |x: &[f64], j: usize| x.iter().enumerate().map(|(i, x)| x * at(i, j)).sum();
    x.chunks(d_in).flat_map(|x| (0..d_out).map(move |j| row(x, j))).collect()
}

/// The weight as `[d_in, d_out]`, in row-major order or as a transposed view.
fn weight(values: Tensor<1>, d_in: usize, d_out: usize, transposed: bool) -> Tensor<2> {
    if transposed { values.reshape([d_out, d_in]).transpose() } else { values.reshape([d_in, d_out]) }
}

#[test]
fn agrees_with_the_reference_on_ragged_shapes() {
    let shapes = [(1, 1, 1), (1, 7, 5), (1, 33, 3), (1, 64, 300), (2, 101, 1031), (7, 19, 13), (8, 16, 16)];
    for (rows, d_in, d_out) in shapes {
        for transposed in [false, true] {
            let case = Case {
                name: format!("linear [{rows}, {d_in}] [{d_in}, {d_out}], transposed: {transposed}"),
                inputs: vec![normal("x", rows * d_in), normal("weight", d_in * d_out)],
                op: &|t| {
                    let [x, w] = t.try_into().expect("two inputs");
                    let y = linear(
                        x.reshape([rows, 1, d_in]),
                        weight(w, d_in, d_out, transposed),
                        Precision::F32,
                    );
                    assert_eq!(y.dims(), [rows, 1, d_out]);
                    y.reshape([rows * d_out])
                },
                reference: &|t| reference(&t[0], &t[1], d_in, d_out, transposed),
            };
            // One shape of each path, of few rows and of many.
            for device in devices_and(rows == 2 || rows == 8) {
                case.check(&device, of_products(&device, 3e-6), Some(1e-7));
                if d_in > 1 && d_out > 1 {
                    case.refutes(&device, &|t| reference(&t[0], &t[1], d_in, d_out, !transposed));
                }
            }
        }
    }
}

#[test]
fn products_are_added_to_what_is_there() {
    for (rows, d_in, d_out) in [(1, 7, 5), (9, 33, 17), (150, 300, 70)] {
        for transposed in [false, true] {
            let sum = |t: &[Vec<f64>], sign: f64| {
                let product = reference(&t[1], &t[2], d_in, d_out, transposed);
                t[0].iter().zip(product).map(|(y, p)| sign * y + p).collect::<Vec<f64>>()
            };
            let case = Case {
                name: format!("linear_add [{rows}, {d_in}] [{d_in}, {d_out}], transposed: {transposed}"),
                inputs: vec![
                    normal("y", rows * d_out),
                    normal("x", rows * d_in),
                    normal("weight", d_in * d_out),
                ],
                op: &|t| {
                    let [y, x, w] = t.try_into().expect("three inputs");
                    let (y, x) = (y.reshape([rows, d_out]), x.reshape([rows, d_in]));
                    let weight = weight(w, d_in, d_out, transposed);
                    linear_add(y, x, weight, Precision::F32).reshape([rows * d_out])
                },
                reference: &|t| sum(t, 1.0),
            };
            for device in devices_and(rows == 9) {
                case.check(&device, of_products(&device, 3e-6), (rows < 100).then_some(1e-7));
                case.refutes(&device, &|t| sum(t, -1.0));
            }
        }
    }
}

#[test]
fn few_rows_of_any_layout_are_what_many_rows_say() {
    let device = Device::flex();
    let (d_in, d_out) = (67, 259);
    let all = flat(&normal("weight", d_in * d_out * 2), &device, DType::F32);
    // A part of a larger matrix: unaligned where its columns are cut, and no layout that the kernel reads.
    let cut = all.clone().reshape([d_in, 2 * d_out]).narrow(1, 3, d_out);
    let offset = all.clone().reshape([2 * d_in, d_out]).narrow(0, 5, d_in);
    let turned = all.reshape([2 * d_out, d_in]).narrow(0, 7, d_out).transpose();
    for (name, weight) in [("cut", cut), ("offset", offset), ("turned", turned)] {
        let x = flat(&normal("x", 16 * d_in), &device, DType::F32).reshape([16, d_in]);
        let many =
            host(linear(x.clone(), weight.clone(), Precision::F32).narrow(0, 9, 3).reshape([3 * d_out]));
        let few =
            host(linear(x.clone().narrow(0, 9, 3), weight.clone(), Precision::F32).reshape([3 * d_out]));
        let other = host(linear(x.narrow(0, 8, 3), weight, Precision::F32).reshape([3 * d_out]));
        let worst = |a: &[f64]| a.iter().zip(&many).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
        assert!(worst(&few) < 1e-4, "{name}: off by {:e}", worst(&few));
        assert!(worst(&other) > 1.0, "{name}: control");
    }
}

/// What rounding both operands of a sum of products to bf16 may cost, relative to the largest result.
const BF16: f64 = 8e-3;

#[test]
fn bf16_products_are_those_of_rounded_numbers_backwards_too() {
    for (rows, d_in, d_out) in [(8, 16, 16), (9, 101, 33), (70, 31, 131)] {
        for transposed in [false, true] {
            let case = Case {
                name: format!("linear in bf16 [{rows}, {d_in}] [{d_in}, {d_out}], transposed: {transposed}"),
                inputs: vec![normal("x", rows * d_in), normal("weight", d_in * d_out)],
                op: &|t| {
                    let [x, w] = t.try_into().expect("two inputs");
                    let weight = weight(w, d_in, d_out, transposed);
                    linear(x.reshape([rows, 1, d_in]), weight, Precision::Bf16).reshape([rows * d_out])
                },
                reference: &|t| reference(&t[0], &t[1], d_in, d_out, transposed),
            };
            let device = Device::flex(); // GPUs compute in f32.
            case.check(&device, BF16, None);
            case.refutes(&device, &|t| reference(&t[0], &t[1], d_in, d_out, !transposed));
            // Numbers that bf16 holds lose nothing but the order of sums.
            let (x, w) = (held("x", rows * d_in), held("weight", d_in * d_out));
            let product = |precision| {
                let weight = weight(flat(&w, &device, DType::F32), d_in, d_out, transposed);
                let x = flat(&x, &device, DType::F32).reshape([rows, d_in]);
                host(linear(x, weight, precision).reshape([rows * d_out]))
            };
            let e = error(&product(Precision::Bf16), &product(Precision::F32));
            assert!(e < 1e-6, "[{rows}, {d_in}, {d_out}]: off by {e:e}");
        }
    }
}

/// Values that bf16 holds.
fn held(name: &str, n: usize) -> Vec<f32> {
    normal(name, n).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect()
}

#[test]
fn weights_stored_in_bf16_are_the_same_numbers() {
    let device = Device::flex().autodiff();
    for (d_in, d_out) in [(1, 1), (16, 16), (33, 17), (64, 300), (131, 64), (576, 129)] {
        for rows in [1, 3, 7, 8, 70, 150] {
            for transposed in [false, true] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let name = format!("[{rows}, {d_in}] [{d_in}, {d_out}], {transposed}, {precision:?}");
                    let x = flat(&normal("x", rows * d_in), &device, DType::F32);
                    let y = flat(&normal("y", rows * d_out), &device, DType::F32).reshape([rows, d_out]);
                    // The product, the sum, and the gradient of the input.
                    let of = |values: &[f32], dtype| {
                        let weight = weight(flat(values, &device, dtype), d_in, d_out, transposed);
                        let x = x.clone().require_grad();
                        let rows_of_x = x.clone().reshape([rows, d_in]);
                        let product = linear(rows_of_x.clone(), weight.clone(), precision);
                        let sum = linear_add(y.clone(), rows_of_x, weight, precision);
                        let slopes = (product.clone() * y.clone() + sum.clone()).sum().backward();
                        let inner = |t: Tensor<2>| host(t.reshape([rows * d_out]).inner());
                        [inner(product), inner(sum), host(x.grad(&slopes).expect("a gradient"))]
                    };
                    let values = held("weight", d_in * d_out);
                    let (whole, half) = (of(&values, DType::F32), of(&values, DType::BF16));
                    for (whole, half) in whole.iter().zip(&half) {
                        let e = error(half, whole);
                        assert!(e < 2e-6, "{name}: off by {e:e}");
                    }
                    if precision == Precision::F32 && d_in * d_out > 1 {
                        let values = normal("weight", d_in * d_out);
                        let e = error(&of(&values, DType::BF16)[0], &of(&values, DType::F32)[0]);
                        assert!(e > 1e-5, "control: {name}: {e:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn heads_embeddings_and_updates_take_weights_in_bf16() {
    let device = Device::flex();
    let (rows, d, vocab, rank) = (33, 48, 257, 4);
    let tensor = |name: &str, shape: [usize; 2]| {
        flat(&normal(name, shape[0] * shape[1]), &device, DType::F32).reshape(shape)
    };
    let (x, a, b) = (tensor("x", [rows, d]), tensor("a", [d, rank]), tensor("b", [rank, vocab]));
    let ids: Vec<i64> = (0..rows as i64).map(|i| i * 97 % vocab as i64).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [rows]), &device);
    for precision in [Precision::F32, Precision::Bf16] {
        let of = |dtype| {
            let embed = flat(&held("weight", vocab * d), &device, dtype).reshape([vocab, d]);
            let head = embed.clone().transpose();
            let updated = lora_linear(x.clone(), head.clone(), a.clone(), b.clone(), 0.5, precision);
            [
                host(embedding(embed, ids.clone()).reshape([rows * d])),
                host(linear_cross_entropy(x.clone(), head, ids.clone(), precision)),
                host(updated.reshape([rows * vocab])),
            ]
        };
        for (i, (half, whole)) in of(DType::BF16).iter().zip(of(DType::F32)).enumerate() {
            let e = error(half, &whole);
            assert!(e < 2e-6, "{i}, {precision:?}: off by {e:e}");
        }
    }
}

#[test]
fn f32_is_not_rounded() {
    let device = Device::flex();
    let x = flat(&[1.0 + 1.0 / 4096.0; 8], &device, DType::F32).reshape([8, 1]);
    let one = flat(&[1.0], &device, DType::F32).reshape([1, 1]);
    let y = |precision| host(linear(x.clone(), one.clone(), precision).reshape([8]))[0];
    assert_eq!(y(Precision::F32), 1.0 + 1.0 / 4096.0);
    assert_eq!(y(Precision::Bf16) == 1.0, Precision::Bf16.available(), "rounded where the processor can");
}
