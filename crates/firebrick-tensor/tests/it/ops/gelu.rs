use burn::tensor::{DType, Device, Tensor, activation, module::layer_norm};
use firebrick_tensor::ops::gelu;

use super::support::{Case, devices, flat, host, normal};

/// The error function by its Taylor series, or by the continued fraction of its complement.
fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / n as f64;
            sum += term / (2 * n + 1) as f64;
            if term.abs() < 1e-17 {
                break;
            }
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..=80).rev().fold(z, |f, n| z + 0.5 * n as f64 / f);
        1.0 - (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

fn reference(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x * 0.5 * (1.0 + erf(x * 0.5f64.sqrt()))).collect()
}

/// The approximation by tanh, which is another function.
fn approximation(x: &[f64]) -> Vec<f64> {
    let inner = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    x.iter().map(|x| 0.5 * x * (1.0 + inner(*x).tanh())).collect()
}

#[test]
fn the_reference_is_the_error_function() {
    // Abramowitz and Stegun, table 7.1, and on both sides of the change of method.
    for (x, want) in
        [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (-1.0, -0.842_700_792_9)]
    {
        assert!((erf(x) - want).abs() < 1e-10, "{x}");
    }
    assert!((erf(3.0 - 1e-9) - erf(3.0 + 1e-9)).abs() < 1e-11);
}

#[test]
fn agrees_with_the_reference() {
    for n in [1, 7, 33, 40_001] {
        let case = Case {
            name: format!("gelu [{n}]"),
            inputs: vec![normal("x", n).into_iter().map(|x| x * 3.0 + 0.5).collect()],
            op: &|t| gelu(t[0].clone().reshape([1, n])).reshape([n]),
            reference: &|t| reference(&t[0]),
        };
        for device in devices() {
            case.check(&device, 1e-6, Some(1e-6));
            case.refutes(&device, &|t| reference(&t[0].iter().map(|x| -x).collect::<Vec<_>>()));
        }
    }
}

#[test]
fn is_not_the_approximation_by_tanh() {
    let x: Vec<f32> = (-400..=400).map(|i| i as f32 / 100.0).collect();
    let exact: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    let largest =
        |got: &[f64], want: &[f64]| got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
    for device in devices() {
        let got = host(gelu(flat(&x, &device, DType::F32)));
        let (off, from_tanh) = (largest(&got, &reference(&exact)), largest(&got, &approximation(&exact)));
        assert!(off < 1e-6, "off by {off:e} on {device:?}");
        assert!(from_tanh > 1e-4, "control: {from_tanh:e} on {device:?}");
    }
}

#[test]
fn saturates_without_nan() {
    for device in devices() {
        let x = flat(&[-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30], &device.clone().autodiff(), DType::F32);
        let x = x.require_grad();
        let y = gelu(x.clone());
        let want = [0.0, 0.0, 0.0, 0.0, 20.0, 200.0, 1e30];
        for (y, want) in host(y.clone().inner()).iter().zip(want) {
            assert!((y - want).abs() <= 1e-6 * want.abs(), "{y} instead of {want}");
        }
        let grads = y.sum().backward();
        for (slope, want) in host(x.grad(&grads).unwrap()).iter().zip([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]) {
            assert!((slope - want).abs() < 1e-6, "slope {slope} instead of {want}");
        }
    }
    let y = gelu(Tensor::<1>::from_floats([f32::NAN, f32::INFINITY], &Device::flex()));
    let y = host(y);
    assert!(y[0].is_nan() && y[1] == f64::INFINITY);
}

/// burn's own functions that wirings use beside ours mean what they are taken for.
#[test]
fn burns_functions_are_the_exact_ones() {
    let x: Vec<f32> = (-300..=300).map(|i| i as f32 / 50.0).collect();
    let exact: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    for device in devices() {
        let got = host(activation::gelu(flat(&x, &device, DType::F32)));
        for (got, want) in got.iter().zip(reference(&exact)) {
            assert!((got - want).abs() < 2e-6, "burn's gelu is {got} instead of {want}");
        }
        let rows: Tensor<2> = flat(&[1.0, 2.0, 6.0, -1.0, -1.0, 2.0], &device, DType::F32).reshape([2, 3]);
        let weight = flat(&[1.0, 2.0, 3.0], &device, DType::F32);
        let bias = flat(&[0.5, 0.0, -0.5], &device, DType::F32);
        let got = host(layer_norm(rows, weight, Some(bias), 0.25).reshape([6]));
        // Means 3 and 0; variances (over n) 14/3 and 2.
        let (a, b) = ((14.0f64 / 3.0 + 0.25).sqrt(), 2.25f64.sqrt());
        let want = [-2.0 / a + 0.5, -2.0 / a, 9.0 / a - 0.5, -1.0 / b + 0.5, -2.0 / b, 6.0 / b - 0.5];
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "burn's layer_norm is {got} instead of {want}");
        }
    }
}
