use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{grouped_matmul, grouped_swiglu, swiglu};

use super::support::{Case, devices_and, error, flat, host, normal, of_products};

/// A row of `x` times the matrix `expert` of `w`, `[experts, d_in, d_out]`.
fn product(x: &[f64], w: &[f64], expert: usize, d_out: usize) -> Vec<f64> {
    let at = |i: usize, j: usize| w[(expert * x.len() + i) * d_out + j];
    (0..d_out).map(|j| x.iter().enumerate().map(|(i, x)| x * at(i, j)).sum()).collect()
}

/// `t` is x, gate, up, down.
fn reference(t: &[Vec<f64>], d_model: usize, d_ff: usize, offsets: &[usize]) -> Vec<f64> {
    let row = |(i, x): (usize, &[f64])| {
        let expert = (1..offsets.len()).find(|&e| i < offsets[e]).expect("an expert") - 1;
        let (gate, up) = (product(x, &t[1], expert, d_ff), product(x, &t[2], expert, d_ff));
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        product(&inner, &t[3], expert, d_model)
    };
    t[0].chunks(d_model).enumerate().flat_map(row).collect()
}

#[test]
fn agrees_with_the_reference() {
    let cases: [(&[usize], usize, usize); 5] = [
        (&[0, 1], 1, 1),
        (&[0, 0, 3, 3, 8, 8], 5, 9),
        (&[0, 2, 3, 10], 16, 33),
        (&[0, 67, 67, 150, 151], 24, 80),
        // More rows than one task takes.
        (&[0, 3, 270], 6, 5),
    ];
    for (offsets, d_model, d_ff) in cases {
        let (experts, rows) = (offsets.len() - 1, offsets[offsets.len() - 1]);
        let size = experts * d_model * d_ff;
        let case = Case {
            name: format!("grouped_swiglu {offsets:?} {d_model}, {d_ff}"),
            inputs: vec![
                normal("x", rows * d_model),
                normal("gate", size),
                normal("up", size),
                normal("down", size),
            ],
            op: &|t| {
                let [x, gate, up, down] = t.try_into().expect("four inputs");
                let [gate, up] = [gate, up].map(|t| t.reshape([experts, d_model, d_ff]));
                let down = down.reshape([experts, d_ff, d_model]);
                let y = grouped_swiglu(x.reshape([rows, d_model]), gate, up, down, offsets);
                y.reshape([rows * d_model])
            },
            reference: &|t| reference(t, d_model, d_ff, offsets),
        };
        for device in devices_and(experts == 3) {
            case.check(&device, of_products(&device, 1e-5), Some(1e-6));
            let swapped = |t: &[Vec<f64>]| [t[0].clone(), t[2].clone(), t[1].clone(), t[3].clone()];
            if size > 1 {
                case.refutes(&device, &|t| reference(&swapped(t), d_model, d_ff, offsets));
            }
        }
    }
}

/// The result, and the gradients of what is trained, of experts whose weights lie as they are named or each the other way.
fn computed(fused: bool, trained: bool, turned: bool) -> Vec<Vec<f64>> {
    let (rows, experts, d_model, d_ff) = (150, 4, 40, 70);
    let offsets = [0, 67, 67, 149, 150];
    let device = Device::flex().autodiff();
    let leaf = |name: &str, n: usize| flat(&normal(name, n), &device, DType::F32);
    let x = leaf("x", rows * d_model).require_grad();
    let weights = ["gate", "up", "down"].map(|name| leaf(name, experts * d_model * d_ff));
    let weights = if trained { weights.map(Tensor::require_grad) } else { weights };
    let shaped = |t: &Tensor<1>, d_in: usize, d_out: usize| {
        let t = t.clone();
        if turned {
            t.reshape([experts, d_out, d_in]).swap_dims(1, 2)
        } else {
            t.reshape([experts, d_in, d_out])
        }
    };
    let [gate, up, down] = &weights;
    let (gate, up) = (shaped(gate, d_model, d_ff), shaped(up, d_model, d_ff));
    let down = shaped(down, d_ff, d_model);
    let rows_of_x = x.clone().reshape([rows, d_model]);
    let y = if fused {
        grouped_swiglu(rows_of_x, gate, up, down, &offsets)
    } else {
        let inner = swiglu(
            grouped_matmul(rows_of_x.clone(), gate, &offsets),
            grouped_matmul(rows_of_x, up, &offsets),
        );
        grouped_matmul(inner, down, &offsets)
    };
    let y = y.reshape([rows * d_model]);
    let of_result = leaf("of_result", rows * d_model);
    let grads = (y.clone() * of_result).sum().backward();
    let leaves = [x].into_iter().chain(weights);
    [y.inner()].into_iter().chain(leaves.filter_map(|leaf| leaf.grad(&grads))).map(host).collect()
}

#[test]
fn it_is_the_three_products_whatever_is_frozen_and_however_weights_lie() {
    for turned in [false, true] {
        for trained in [false, true] {
            let (one, three) = (computed(true, trained, turned), computed(false, trained, turned));
            assert_eq!((one.len(), three.len()), if trained { (5, 5) } else { (2, 2) });
            for (i, (one, three)) in one.iter().zip(&three).enumerate() {
                let e = error(one, three);
                assert!(e < 1e-5, "result {i}, trained: {trained}, turned: {turned}: off by {e:e}");
            }
            assert!(error(&one[0], &computed(true, trained, !turned)[0]) > 0.1, "control");
        }
    }
}

#[test]
fn no_rows_at_all_and_experts_without_rows() {
    let device = Device::flex();
    let weights = |d_in, d_out| Tensor::<3>::zeros([2, d_in, d_out], &device);
    let y = grouped_swiglu(
        Tensor::zeros([0, 4], &device),
        weights(4, 3),
        weights(4, 3),
        weights(3, 4),
        &[0, 0, 0],
    );
    assert_eq!(y.dims(), [0, 4]);
    let gradients = computed(true, true, false);
    for gradient in &gradients[2..] {
        let size = gradient.len() / 4;
        let zero = |expert: usize| gradient[expert * size..][..size].iter().all(|&g| g == 0.0);
        assert_eq!([0, 1, 2, 3].map(zero), [false, true, false, false]);
    }
}

#[test]
#[should_panic(expected = "do not ascend")]
fn offsets_that_do_not_cover_the_rows_are_refused() {
    let device = Device::flex();
    let weights = |d_in, d_out| Tensor::<3>::zeros([2, d_in, d_out], &device);
    grouped_swiglu(Tensor::zeros([4, 4], &device), weights(4, 3), weights(4, 3), weights(3, 4), &[0, 2, 3]);
}
