use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::grouped_matmul;

use super::support::{Case, devices, error, flat, host, normal, of_products};

fn reference(x: &[f64], w: &[f64], d_in: usize, d_out: usize, offsets: &[usize]) -> Vec<f64> {
    let rows = x.len() / d_in;
    let mut out = vec![0.0; rows * d_out];
    for (i, row) in out.chunks_mut(d_out).enumerate() {
        let expert = (1..offsets.len()).find(|&e| i < offsets[e]).expect("an expert") - 1;
        for (j, y) in row.iter_mut().enumerate() {
            *y = (0..d_in).map(|k| x[i * d_in + k] * w[(expert * d_in + k) * d_out + j]).sum();
        }
    }
    out
}

#[test]
fn agrees_with_the_reference() {
    let cases: [(&[usize], usize, usize); 5] = [
        (&[0, 1], 1, 1),
        (&[0, 5], 7, 3),
        (&[0, 0, 3, 3, 8, 8], 5, 9),
        (&[0, 2, 3, 10], 16, 33),
        (&[0, 67, 67, 150, 151], 24, 17),
    ];
    for (offsets, d_in, d_out) in cases {
        let (experts, rows) = (offsets.len() - 1, offsets[offsets.len() - 1]);
        let case = Case {
            name: format!("grouped_matmul {offsets:?} {d_in} -> {d_out}"),
            inputs: vec![normal("x", rows * d_in), normal("w", experts * d_in * d_out)],
            op: &|t| {
                let [x, w] = t.try_into().expect("two inputs");
                let y = grouped_matmul(x.reshape([rows, d_in]), w.reshape([experts, d_in, d_out]), offsets);
                y.reshape([rows * d_out])
            },
            reference: &|t| reference(&t[0], &t[1], d_in, d_out, offsets),
        };
        for device in devices() {
            case.check(&device, of_products(&device, 2e-6), Some(1e-9));
            if experts > 1 {
                let mut shifted = offsets.to_vec();
                let inner = (1..experts).find(|&e| offsets[e] > 0 && offsets[e] < rows).expect("a border");
                shifted[inner] -= 1;
                shifted[..inner].iter_mut().for_each(|o| *o = (*o).min(offsets[inner] - 1));
                case.refutes(&device, &|t| reference(&t[0], &t[1], d_in, d_out, &shifted));
            }
        }
    }
}

#[test]
fn an_expert_without_rows_gets_a_zero_gradient() {
    for device in devices().iter().map(|device| device.clone().autodiff()) {
        let x: Tensor<2> = flat(&normal("x", 12), &device, DType::F32).reshape([3, 4]);
        let w = flat(&normal("w", 3 * 4 * 2), &device, DType::F32).require_grad();
        let y = grouped_matmul(x, w.clone().reshape([3, 4, 2]), &[0, 2, 2, 3]);
        let grad = host(w.grad(&y.sum().backward()).expect("a gradient"));
        assert!(grad[8..16].iter().all(|&g| g == 0.0));
        assert!(grad[..8].iter().chain(&grad[16..]).all(|&g| g != 0.0));
    }
}

#[test]
fn identical_experts_equal_the_dense_product() {
    for device in devices() {
        let x: Tensor<2> = flat(&normal("x", 9 * 8), &device, DType::F32).reshape([9, 8]);
        let w: Tensor<2> = flat(&normal("w", 8 * 5), &device, DType::F32).reshape([8, 5]);
        let expert = w.clone().reshape([1, 8, 5]);
        let product = |experts| host(grouped_matmul(x.clone(), experts, &[0, 4, 4, 9]).reshape([45]));
        let same = product(expert.clone().repeat_dim(0, 3));
        let dense = host(x.clone().matmul(w).reshape([45]));
        let e = error(&same, &dense);
        assert!(e < 1e-6, "off by {e:e} on {device:?}");
        // Control: another last expert shows in its rows and nowhere else.
        let other = product(Tensor::cat(vec![expert.clone(), expert.clone(), expert * 1.5], 0));
        for row in 0..9 {
            let e = error(&other[row * 5..][..5], &dense[row * 5..][..5]);
            assert_eq!(e > 1e-3, row >= 4, "row {row}: off by {e:e} on {device:?}");
        }
    }
}

#[test]
fn no_rows_at_all() {
    let device = Device::flex();
    let y = grouped_matmul(Tensor::zeros([0, 4], &device), Tensor::zeros([2, 4, 3], &device), &[0, 0, 0]);
    assert_eq!(y.dims(), [0, 3]);
}

#[test]
#[should_panic(expected = "do not ascend")]
fn offsets_that_do_not_cover_the_rows_are_refused() {
    let device = Device::flex();
    grouped_matmul(Tensor::zeros([4, 4], &device), Tensor::zeros([2, 4, 3], &device), &[0, 2, 3]);
}
