use burn::tensor::{DType, Tensor};
use firebrick_tensor::ops::rms_norm;

use super::support::{Case, devices, flat, host, normal};

fn reference(x: &[f64], gamma: &[f64], eps: f64) -> Vec<f64> {
    let d = gamma.len();
    let row = |row: &[f64]| {
        let rms = (row.iter().map(|v| v * v).sum::<f64>() / d as f64 + eps).sqrt();
        row.iter().zip(gamma).map(|(v, g)| v / rms * g).collect::<Vec<_>>()
    };
    x.chunks(d).flat_map(row).collect()
}

#[test]
fn agrees_with_the_reference() {
    for (rows, d, eps) in
        [(1, 1, 0.1), (3, 7, 1e-5), (10, 33, 0.1), (5, 576, 1e-6), (67, 130, 1e-5), (700, 64, 1e-5)]
    {
        let case = Case {
            name: format!("rms_norm [{rows}, {d}]"),
            inputs: vec![normal("x", rows * d), normal("gamma", d)],
            op: &|t| {
                let [x, gamma] = t.try_into().expect("two inputs");
                rms_norm(x.reshape([rows, 1, d]), gamma, eps).reshape([rows * d])
            },
            reference: &|t| reference(&t[0], &t[1], eps),
        };
        for device in devices() {
            // The composed body computes in f32 whatever the dtype.
            case.check(&device, 2e-6, Some(2e-6));
            if eps == 0.1 {
                case.refutes(&device, &|t| reference(&t[0], &t[1], 0.0));
            }
            if d > 1 {
                case.refutes(&device, &|t| reference(&t[0], &vec![1.0; d], eps));
            }
        }
    }
}

#[test]
fn keeps_the_dtype_and_reads_views() {
    for device in devices() {
        let x = flat(&normal("x", 6 * 20), &device, DType::F32).reshape([6, 20]);
        let gamma = flat(&normal("gamma", 6), &device, DType::F32);
        let view = rms_norm(x.clone().transpose(), gamma.clone(), 1e-5);
        let copy = x.transpose().reshape([120]).reshape([20, 6]);
        assert_eq!(host(view.reshape([120])), host(rms_norm(copy, gamma, 1e-5).reshape([120])));
    }
    let device = burn::tensor::Device::flex();
    let x: Tensor<2> = flat(&normal("x", 64), &device, DType::BF16).reshape([2, 32]);
    let gamma = flat(&normal("gamma", 32), &device, DType::BF16);
    let y = rms_norm(x.clone(), gamma.clone(), 1e-5);
    assert_eq!(y.dtype(), DType::BF16);
    let want = reference(&host(x.reshape([64])), &host(gamma), 1e-5);
    let e = super::support::error(&host(y.reshape([64])), &want);
    assert!(e < 8e-3, "bf16 is off by {e:e}");
}

#[test]
#[should_panic(expected = "against gamma")]
fn rejects_a_gamma_of_another_length() {
    let device = burn::tensor::Device::flex();
    rms_norm(Tensor::<2>::zeros([2, 4], &device), Tensor::zeros([3], &device), 1e-5);
}
