//! Clipping of gradients by their global norm.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};

use crate::params::{flat, squares};

/// The Euclidean norm `[1]` of all gradients of `module` taken as one vector, on the device; `None` if there are none.
///
/// All gradients must be on one device.
pub(crate) fn global_norm<M: Module>(module: &M, gradients: &GradientsParams) -> Option<Tensor<1>> {
    struct Squares<'a>(&'a GradientsParams, Option<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.0.get::<D>(param.id) else { return };
            let squares = squares(&flat(gradient).cast(DType::F32));
            self.1 = Some(match self.1.take() {
                Some(sum) => sum + squares,
                None => squares,
            });
        }
    }
    let mut squares = Squares(gradients, None);
    module.visit(&mut squares);
    squares.1.map(Tensor::sqrt)
}

/// Scales all gradients of `module` by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does, and
/// returns them with their norm `[1]` before; nothing is read back from the device.
pub fn clip_global_norm<M: Module>(
    module: &M,
    gradients: GradientsParams,
    max_norm: f64,
) -> (GradientsParams, Option<Tensor<1>>) {
    struct Scale {
        from: GradientsParams,
        to: GradientsParams,
        factor: Tensor<1>,
    }
    impl ModuleVisitor for Scale {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.from.remove::<D>(param.id) else { return };
            let factor: Tensor<D> = self.factor.clone().cast(gradient.dtype()).reshape([1; D]);
            self.to.register(param.id, gradient * factor);
        }
    }
    let Some(norm) = global_norm(module, &gradients) else { return (gradients, None) };
    let factor = norm.clone().add_scalar(1e-6).recip().mul_scalar(max_norm).clamp_max(1.0);
    let mut scale = Scale { from: gradients, to: GradientsParams::new(), factor };
    module.visit(&mut scale);
    (scale.to, Some(norm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    type Three = (Param<Tensor<2>>, Param<Tensor<1>>, Param<Tensor<3>>);

    fn numbers(value: &serde_json::Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    }

    fn module(values: &[Vec<f64>]) -> Three {
        let flat = |i: usize| {
            let list: Vec<f32> = values[i].iter().map(|&v| v as f32).collect();
            Tensor::<1>::from_data(TensorData::new(list, [values[i].len()]), &Device::flex())
        };
        let a = Param::from_tensor(flat(0).reshape([3, 4]));
        (a, Param::from_tensor(flat(1)), Param::from_tensor(flat(2).reshape([2, 3, 2])))
    }

    fn gradients(module: &Three) -> GradientsParams {
        let mut gradients = GradientsParams::new();
        gradients.register(module.0.id, module.0.val());
        gradients.register(module.1.id, module.1.val());
        gradients.register(module.2.id, module.2.val());
        gradients
    }

    fn clipped(module: &Three, max_norm: f64) -> (Vec<Vec<f64>>, f64) {
        let (g, norm) = clip_global_norm(module, gradients(module), max_norm);
        let list = |data: TensorData| data.iter::<f64>().collect();
        let after = vec![
            list(g.get::<2>(module.0.id).unwrap().into_data()),
            list(g.get::<1>(module.1.id).unwrap().into_data()),
            list(g.get::<3>(module.2.id).unwrap().into_data()),
        ];
        (after, norm.unwrap().into_scalar::<f32>() as f64)
    }

    /// The reference, in `f64`.
    fn reference(values: &[Vec<f64>], max_norm: f64) -> (Vec<Vec<f64>>, f64) {
        let norm = values.iter().flatten().map(|v| v * v).sum::<f64>().sqrt();
        let factor = (max_norm / (norm + 1e-6)).min(1.0);
        (values.iter().map(|t| t.iter().map(|v| v * factor).collect()).collect(), norm)
    }

    fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
        a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn clipping_equals_pytorch_and_the_reference_and_is_not_per_tensor() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/adamw.json")).unwrap();
        for case in golden["clip"].as_array().unwrap() {
            let lists = |key: &str| case[key].as_array().unwrap().iter().map(numbers).collect::<Vec<_>>();
            let (before, want) = (lists("before"), lists("after"));
            let max_norm = case["max_norm"].as_f64().unwrap();
            let (got, norm) = clipped(&module(&before), max_norm);
            let scale = want.iter().flatten().fold(0.0, |m: f64, v| m.max(v.abs()));
            assert!(distance(&got, &want) < 1e-6 * scale);
            let (exact, exact_norm) = reference(&before, max_norm);
            assert!(distance(&got, &exact) < 1e-6 * scale);
            assert!((norm - exact_norm).abs() < 1e-6 * exact_norm);
            assert!((norm - case["norm"].as_f64().unwrap()).abs() < 1e-6 * exact_norm);
            if norm > max_norm {
                let alone = before.iter().map(|t| reference(std::slice::from_ref(t), max_norm).0.remove(0));
                assert!(distance(&got, &alone.collect::<Vec<_>>()) > 1e-2, "each tensor alone differs");
            } else {
                assert_eq!(clipped(&module(&before), 1e9).0, got, "short gradients are left alone");
            }
        }
    }

    #[test]
    fn no_gradient_has_no_norm() {
        let module = module(&[vec![0.0; 12], vec![0.0; 5], vec![0.0; 12]]);
        assert!(clip_global_norm(&module, GradientsParams::new(), 1.0).1.is_none());
        let (after, norm) = clipped(&module, 1.0);
        assert_eq!((after.concat(), norm), (vec![0.0; 29], 0.0));
    }
}
