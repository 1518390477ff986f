use firebrick_tensor::ops::swiglu;

use super::support::{Case, devices, normal};

fn reference(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

#[test]
fn agrees_with_the_reference() {
    for n in [1, 7, 33, 40_001] {
        let gate = normal("gate", n).into_iter().map(|g| g * 4.0).collect();
        let case = Case {
            name: format!("swiglu [{n}]"),
            inputs: vec![gate, normal("up", n)],
            op: &|t| {
                let [gate, up] = t.try_into().expect("two inputs");
                swiglu(gate.reshape([1, n]), up.reshape([1, n])).reshape([n])
            },
            reference: &|t| reference(&t[0], &t[1]),
        };
        for device in devices() {
            case.check(&device, 2e-6, Some(2e-6));
            case.refutes(&device, &|t| reference(&t[1], &t[0]));
        }
    }
}

#[test]
fn saturates_without_nan() {
    use super::support::{flat, host};
    use burn::tensor::DType;
    for device in devices() {
        let gate = flat(&[-200.0, -90.0, 0.0, 90.0, 200.0], &device, DType::F32);
        let up = flat(&[1.0; 5], &device, DType::F32);
        let y = host(swiglu(gate, up));
        for (y, want) in y.iter().zip([0.0, 0.0, 0.0, 90.0, 200.0]) {
            assert!((y - want).abs() < 1e-3, "{y} instead of {want} on {device:?}");
        }
    }
}
