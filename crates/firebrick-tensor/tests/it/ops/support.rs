//! Devices, random inputs and the comparison of an op with its reference.

use burn::tensor::{DType, Device, Tensor, TensorData};
use firebrick_core::{DeviceSpec, Seed};
use rand::Rng;

/// Every device this build and this machine have; with `FIREBRICK_REQUIRE_DEVICE=wgpu` that one alone, which must be there.
pub fn devices() -> Vec<Device> {
    let required = std::env::var("FIREBRICK_REQUIRE_DEVICE").unwrap_or_default();
    let mut devices = Vec::new();
    for (name, built, spec) in [
        ("flex", true, DeviceSpec::Flex),
        ("wgpu", cfg!(feature = "wgpu"), DeviceSpec::Wgpu(0)),
        ("cuda", cfg!(feature = "cuda"), DeviceSpec::Cuda(0)),
    ] {
        if !required.is_empty() && required != name {
            continue;
        }
        if !built {
            assert_ne!(required, name, "{name} is required, but this build does not have it");
            continue;
        }
        match spec.open() {
            Ok(device) => devices.push(device),
            Err(error) if required == name => panic!("{name} is required: {error}"),
            #[expect(clippy::print_stderr, reason = "a skipped device must not go unseen")]
            Err(error) => eprintln!("not tested on {name}: {error}"),
        }
    }
    devices
}

/// The CPU, and the other devices if `gpus`: their drivers compile kernels anew for every shape, which takes a software rasterizer
/// seconds, so that they take some shapes of a test and not all.
pub fn devices_and(gpus: bool) -> Vec<Device> {
    devices().into_iter().filter(|device| gpus || is_flex(device)).collect()
}

pub fn is_flex(device: &Device) -> bool {
    *device == Device::flex()
}

/// The tolerance of what products of matrices go into: CUDA reads f32 with 10 bits behind the first (TF32).
pub fn of_products(device: &Device, tolerance: f64) -> f64 {
    let cuda = cfg!(feature = "cuda") && format!("{device:?}").contains("Cuda");
    if cuda { tolerance.max(1e-3) } else { tolerance }
}

pub fn normal(name: &str, n: usize) -> Vec<f32> {
    Seed(1).normal(name, n, 1.0)
}

pub fn below(name: &str, n: usize, bound: usize) -> Vec<usize> {
    let mut rng = Seed(1).stream(name);
    (0..n).map(|_| rng.random_range(0..bound)).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v.into()).collect()
}

pub fn host(x: Tensor<1>) -> Vec<f64> {
    x.into_data_dtype(DType::F64).try_to_vec::<f64>().expect("values as f64")
}

pub fn flat(values: &[f32], device: &Device, dtype: DType) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, dtype))
}

/// Largest difference, relative to the largest value.
pub fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0, |m: f64, (g, w)| {
        let e = (g - w).abs() / largest;
        if e.is_nan() { f64::INFINITY } else { m.max(e) }
    })
}

/// An op on flat inputs with its reference.
pub struct Case<'a> {
    pub name: String,
    pub inputs: Vec<Vec<f32>>,
    /// Takes the inputs as flat tensors.
    pub op: &'a dyn Fn(Vec<Tensor<1>>) -> Tensor<1>,
    /// The same in f64.
    pub reference: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
}

impl Case<'_> {
    /// Checks the values with and without a tape, and the gradient of every input against central differences of the
    /// reference; in f32 everywhere and, where composed bodies run in it, in f64 (`composed` is then the tolerance).
    pub fn check(&self, device: &Device, tolerance: f64, composed: Option<f64>) {
        self.check_dtype(device, DType::F32, tolerance);
        if let (true, Some(tolerance)) = (is_flex(device), composed) {
            self.check_dtype(device, DType::F64, tolerance);
        }
    }

    fn check_dtype(&self, device: &Device, dtype: DType, tolerance: f64) {
        let what = format!("{} in {dtype:?} on {device:?}", self.name);
        let exact: Vec<_> = self.inputs.iter().map(|x| wide(x)).collect();
        let want = (self.reference)(&exact);
        let plain = (self.op)(self.inputs.iter().map(|x| flat(x, device, dtype)).collect());
        let e = error(&host(plain), &want);
        assert!(e < tolerance, "{what}: values are off by {e:e}");

        let leaves: Vec<_> =
            self.inputs.iter().map(|x| flat(x, &device.clone().autodiff(), dtype).require_grad()).collect();
        let y = (self.op)(leaves.clone());
        let e = error(&host(y.clone().inner()), &want);
        assert!(e < tolerance, "{what}: values on the tape are off by {e:e}");
        let weights = normal("weights", want.len());
        let grads = (y * flat(&weights, &device.clone().autodiff(), dtype)).sum().backward();
        let weights = wide(&weights);
        let loss = |inputs: &[Vec<f64>]| -> f64 {
            (self.reference)(inputs).iter().zip(&weights).map(|(y, w)| y * w).sum()
        };
        for (i, leaf) in leaves.iter().enumerate() {
            let grad = host(leaf.grad(&grads).unwrap_or_else(|| panic!("{what}: input {i} has no gradient")));
            assert_eq!(grad.len(), exact[i].len());
            let largest = grad.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
            for at in below("places", 24, grad.len()) {
                let shifted = |by: f64| {
                    let mut inputs = exact.clone();
                    inputs[i][at] += by;
                    loss(&inputs)
                };
                let step = 1e-4;
                let want = (shifted(step) - shifted(-step)) / (2.0 * step);
                let e = (grad[at] - want).abs() / largest;
                assert!(
                    e < 4.0 * tolerance + 1e-6,
                    "{what}: gradient of input {i} at {at} is {} instead of {want}, off by {e:e}",
                    grad[at]
                );
            }
        }
    }

    /// A wrong reference must be far from the op: else the check above proves nothing.
    pub fn refutes(&self, device: &Device, wrong: &dyn Fn(&[Vec<f64>]) -> Vec<f64>) {
        let exact: Vec<_> = self.inputs.iter().map(|x| wide(x)).collect();
        let got = host((self.op)(self.inputs.iter().map(|x| flat(x, device, DType::F32)).collect()));
        let e = error(&got, &wrong(&exact));
        assert!(e > 1e-3, "{} agrees with a wrong reference: {e:e}", self.name);
    }
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn a_wrong_gradient_is_caught() {
    let case = Case {
        name: "half a square".into(),
        inputs: vec![normal("x", 9)],
        op: &|t| t[0].clone() * t[0].clone().detach(),
        reference: &|t| t[0].iter().map(|x| x * x).collect(),
    };
    case.check(&Device::flex(), 1e-6, None);
}
