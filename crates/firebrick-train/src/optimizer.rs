//! AdamW as PyTorch computes it, with a state that is saved under parameter paths.
//!
//! burn has an AdamW of the same formula. Its state is keyed by parameter ids, which are random, so that files differ from
//! run to run, and it is read back onto the process-wide default device, which may not be there.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::params::{Path, flat, map_values};

/// Parameters with settings of their own; where several groups match, the last one counts.
///
/// ```
/// use burn::module::ParamGroup;
/// use firebrick_train::Group;
/// // No weight decay on norms, and a 16 times larger step on the `b` of LoRA (LoRA+, arXiv 2402.12354).
/// let norms = Group { params: ParamGroup::from_predicate("norm"), learning_rate: 1.0, weight_decay: Some(0.0) };
/// let b = Group { params: ParamGroup::from_regex(r"\.b$").unwrap(), learning_rate: 16.0, weight_decay: None };
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Which parameters, best by path: ids change from process to process.
    pub params: ParamGroup,
    /// Factor on the learning rate; 0 leaves them as they are.
    #[serde(default = "one")]
    pub learning_rate: f64,
    /// Weight decay in place of the optimizer's.
    #[serde(default)]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// Adam with decoupled weight decay (arXiv 1711.05101), equal to `torch.optim.AdamW`.
///
/// Moments are kept and updates computed in `f32` whatever the parameter's type (`f64` for `f64`); there are no
/// master weights, so parameters of 16 bits lose updates below their precision.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Decay of the first and of the second moment, each in `0..1`.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Fraction of a parameter taken off per step, times the learning rate.
    pub weight_decay: f64,
    /// Parameters with settings of their own.
    pub groups: Vec<Group>,
    pub(crate) moments: BTreeMap<String, Moments>,
}

/// The state of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    /// How many gradients it has seen.
    pub updates: u64,
    pub first: Tensor<1>,
    pub second: Tensor<1>,
}

impl Default for AdamW {
    /// PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    fn default() -> Self {
        AdamW {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            groups: Vec::new(),
            moments: BTreeMap::new(),
        }
    }
}

impl AdamW {
    /// Steps every parameter of `module` that has a gradient; those without keep value and state.
    pub fn step<M: Module>(&mut self, learning_rate: f64, module: M, gradients: GradientsParams) -> M {
        module.map(&mut Step { path: Path::default(), optimizer: self, learning_rate, gradients })
    }

    /// The new values of a parameter. All arguments are flat.
    fn update(
        &self,
        learning_rate: f64,
        weight_decay: f64,
        values: Tensor<1>,
        gradient: Tensor<1>,
        moments: Option<Moments>,
    ) -> (Tensor<1>, Moments) {
        let stored = values.dtype();
        let dtype = if stored == DType::F64 { DType::F64 } else { DType::F32 };
        let gradient = gradient.cast(dtype);
        let [beta1, beta2] = self.betas;
        let squared = gradient.clone().square().mul_scalar(1.0 - beta2);
        let scaled = gradient.mul_scalar(1.0 - beta1);
        let moments = match moments {
            None => Moments { updates: 1, first: scaled, second: squared },
            Some(m) => Moments {
                updates: m.updates + 1,
                first: m.first.mul_scalar(beta1) + scaled,
                second: m.second.mul_scalar(beta2) + squared,
            },
        };
        if learning_rate == 0.0 {
            return (values, moments);
        }
        let t = moments.updates.min(i32::MAX as u64) as i32;
        let (correction1, correction2) = (1.0 - beta1.powi(t), 1.0 - beta2.powi(t));
        let root = moments.second.clone().sqrt().mul_scalar(1.0 / correction2.sqrt()).add_scalar(self.eps);
        let update = (moments.first.clone() / root).mul_scalar(learning_rate / correction1);
        let mut values = values.cast(dtype);
        if weight_decay != 0.0 {
            values = values.mul_scalar(1.0 - learning_rate * weight_decay);
        }
        ((values - update).cast(stored), moments)
    }
}

struct Step<'a> {
    path: Path,
    optimizer: &'a mut AdamW,
    learning_rate: f64,
    gradients: GradientsParams,
}

impl ModuleMapper for Step<'_> {
    fn enter_module(&mut self, name: &str, _kind: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _kind: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return param };
        let path = self.path.to_string();
        let optimizer = &mut *self.optimizer;
        let group = optimizer.groups.iter().rev().find(|g| g.params.matches(&param.id, Some(&path)));
        let learning_rate = self.learning_rate * group.map_or(1.0, |g| g.learning_rate);
        let weight_decay = group.and_then(|g| g.weight_decay).unwrap_or(optimizer.weight_decay);
        map_values(param, |_, values| {
            let before = optimizer.moments.remove(&path);
            let (values, after) =
                optimizer.update(learning_rate, weight_decay, values, flat(gradient), before);
            optimizer.moments.insert(path, after);
            values
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[derive(Module, Debug)]
    struct Three {
        a: Param<Tensor<2>>,
        norm: Param<Tensor<1>>,
        c: Param<Tensor<3>>,
    }

    fn numbers(value: &serde_json::Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    impl Three {
        fn new(values: &serde_json::Value, device: &Device) -> Self {
            let data = |i: usize| TensorData::new(numbers(&values[i]), [numbers(&values[i]).len()]);
            let flat = |i| Tensor::<1>::from_data(data(i), device);
            Three {
                a: Param::from_tensor(flat(0).reshape([3, 4])),
                norm: Param::from_tensor(flat(1)),
                c: Param::from_tensor(flat(2).reshape([2, 3, 2])),
            }
        }

        fn gradients(&self, values: &serde_json::Value) -> GradientsParams {
            let plain = Three::new(values, &Device::flex());
            let mut gradients = GradientsParams::new();
            gradients.register(self.a.id, plain.a.val());
            gradients.register(self.norm.id, plain.norm.val());
            gradients.register(self.c.id, plain.c.val());
            gradients
        }

        fn values(&self) -> [Vec<f32>; 3] {
            let list = |t: Tensor<1>| t.into_data().try_to_vec::<f32>().unwrap();
            [flat(self.a.val().inner()), flat(self.norm.val().inner()), flat(self.c.val().inner())].map(list)
        }
    }

    fn golden() -> serde_json::Value {
        serde_json::from_str(include_str!("../tests/golden/adamw.json")).unwrap()
    }

    /// The largest difference from PyTorch over the recorded steps of one golden run.
    fn difference(run: &serde_json::Value, mut optimizer: AdamW) -> f32 {
        let mut model = Three::new(&run["start"], &Device::flex().autodiff());
        let recorded = golden()["after_steps"].clone();
        let mut largest = 0f32;
        for (step, gradients) in run["gradients"].as_array().unwrap().iter().enumerate() {
            let gradients = model.gradients(gradients);
            model = optimizer.step(run["learning_rate"].as_f64().unwrap(), model, gradients);
            let at = recorded.as_array().unwrap().iter().position(|s| s.as_u64() == Some(step as u64 + 1));
            if let Some(at) = at {
                for (i, got) in model.values().iter().enumerate() {
                    let want = numbers(&run["after"][at][i]);
                    largest = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(largest, f32::max);
                }
            }
        }
        largest
    }

    fn of(run: &serde_json::Value) -> AdamW {
        let betas = [run["betas"][0].as_f64().unwrap(), run["betas"][1].as_f64().unwrap()];
        let (eps, weight_decay) = (run["eps"].as_f64().unwrap(), run["weight_decay"].as_f64().unwrap());
        AdamW { betas, eps, weight_decay, ..AdamW::default() }
    }

    #[test]
    fn steps_equal_those_of_pytorch() {
        for run in golden()["adamw"].as_array().unwrap() {
            let difference = difference(run, of(run));
            assert!(difference < 1e-6, "{difference}");
        }
    }

    #[test]
    fn other_settings_do_not() {
        let golden = golden();
        let run = &golden["adamw"][1];
        let wrong = [
            AdamW { eps: 1e-4, ..of(run) },
            AdamW { weight_decay: 0.0, ..of(run) },
            AdamW { betas: [0.9, 0.95], ..of(run) },
        ];
        for optimizer in wrong {
            assert!(difference(run, optimizer) > 1e-4);
        }
    }

    #[test]
    fn the_last_group_that_matches_counts() {
        let golden = golden();
        let run = &golden["adamw"][1];
        let group = |params, learning_rate, weight_decay| Group { params, learning_rate, weight_decay };
        let groups = vec![
            group(ParamGroup::all(), 0.0, None),
            group(ParamGroup::from_path("norm"), 1.0, Some(0.0)),
            group(ParamGroup::from_path("a"), 1.0, None),
        ];
        let start = Three::new(&run["start"], &Device::flex().autodiff());
        let step = |mut optimizer: AdamW| {
            let gradients = start.gradients(&run["gradients"][0]);
            optimizer.step(0.5, start.clone(), gradients).values()
        };
        let grouped = step(AdamW { groups, ..of(run) });
        let (plain, undecayed) = (step(of(run)), step(AdamW { weight_decay: 0.0, ..of(run) }));
        assert_eq!(grouped[0], plain[0]);
        assert_eq!(grouped[1], undecayed[1]);
        assert_ne!(grouped[1], plain[1]);
        assert_eq!(grouped[2], start.values()[2], "a factor of 0 leaves the parameter as it is");
    }

    #[test]
    fn parameters_keep_identity_and_training_state() {
        let golden = golden();
        let run = &golden["adamw"][0];
        let start = Three::new(&run["start"], &Device::flex().autodiff());
        let mut gradients = start.gradients(&run["gradients"][0]);
        gradients.remove::<1>(start.norm.id);
        let mut optimizer = AdamW::default();
        let after = optimizer.step(0.1, start.clone(), gradients);
        assert_eq!((after.a.id, after.c.id), (start.a.id, start.c.id));
        assert!(after.a.val().is_require_grad() && after.norm.val().is_require_grad());
        assert_eq!(after.values()[1], start.values()[1], "no gradient, no step");
        assert_eq!(optimizer.moments.keys().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn parameters_of_16_bits_keep_their_type() {
        let device = Device::flex().autodiff();
        let p: Param<Tensor<1>> = Param::from_tensor(Tensor::<1>::ones([4], &device).cast(DType::BF16));
        let mut gradients = GradientsParams::new();
        gradients.register(p.id, Tensor::<1>::ones([4], &Device::flex()).cast(DType::BF16));
        let mut optimizer = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let p = optimizer.step(0.5, p, gradients);
        assert_eq!(p.val().dtype(), DType::BF16);
        assert_eq!(p.val().inner().into_data().iter::<f32>().collect::<Vec<_>>(), [0.5; 4]);
        assert_eq!(optimizer.moments[""].first.dtype(), DType::F32);
    }
}
