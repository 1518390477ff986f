//! What the optimizers share: groups of parameters, and a state that is saved under parameter paths.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::params::{Path, flat, map_values, squares};

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

/// The state of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    /// How many gradients it has seen.
    pub updates: u64,
    pub first: Tensor<1>,
    /// None where the optimizer keeps one moment only.
    pub second: Option<Tensor<1>>,
}

/// The state of an optimizer, by the path of the parameter.
pub(crate) type Memory = BTreeMap<String, Moments>;

/// What holds for one parameter in one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Whether the step is scaled by a trust ratio, where the optimizer has one.
    pub adapt: bool,
}

/// The formula of an optimizer.
pub(crate) trait Rule {
    /// Weight decay of parameters in no group that sets one.
    fn weight_decay(&self) -> f64;

    /// Parameters with settings of their own.
    fn groups(&self) -> &[Group];

    /// Parameters without trust ratio and weight decay.
    fn excluded(&self) -> &[ParamGroup] {
        &[]
    }

    /// Whether there are two moments.
    fn has_second(&self) -> bool {
        true
    }

    /// The new values of a parameter and its new state; all tensors are flat and `f32` or `f64`.
    fn update(
        &self,
        rates: Rates,
        values: Tensor<1>,
        gradient: Tensor<1>,
        moments: Option<Moments>,
    ) -> (Tensor<1>, Moments);
}

/// Steps every parameter of `module` that has a gradient; those without keep value and state.
pub(crate) fn step<M: Module>(
    rule: &dyn Rule,
    memory: &mut Memory,
    learning_rate: f64,
    module: M,
    gradients: GradientsParams,
) -> M {
    module.map(&mut Step { path: Path::default(), rule, memory, learning_rate, gradients })
}

/// `phi(|w|) / |u|` as `[1]`, on the device: the trust ratio of LAMB and LARS; 1 where either norm is 0. `clamp` are the
/// ends of `phi`, which is the identity without them.
pub(crate) fn trust_ratio(w: Tensor<1>, u: Tensor<1>, clamp: Option<[f64; 2]>) -> Tensor<1> {
    let norm = |x: Tensor<1>| squares(&x).sqrt();
    let (w, u) = (norm(w), norm(u));
    let idle = w.clone().equal_elem(0.0).bool_or(u.clone().equal_elem(0.0));
    let phi = match clamp {
        Some([low, high]) => w.clamp(low, high),
        None => w,
    };
    (phi / u).mask_fill(idle, 1.0)
}

struct Step<'a> {
    path: Path,
    rule: &'a dyn Rule,
    memory: &'a mut Memory,
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
        let matches = |group: &ParamGroup| group.matches(&param.id, Some(&path));
        let group = self.rule.groups().iter().rev().find(|g| matches(&g.params));
        let excluded = self.rule.excluded().iter().any(matches);
        let decay = group.and_then(|g| g.weight_decay).unwrap_or(self.rule.weight_decay());
        let rates = Rates {
            learning_rate: self.learning_rate * group.map_or(1.0, |g| g.learning_rate),
            weight_decay: if excluded { 0.0 } else { decay },
            adapt: !excluded,
        };
        map_values(param, |_, values| {
            let stored = values.dtype();
            let wide = if stored == DType::F64 { DType::F64 } else { DType::F32 };
            let before = self.memory.remove(&path);
            let gradient = flat(gradient).cast(wide);
            // A second handle only where it is needed: it would keep the step from working in place.
            let unmoved = (rates.learning_rate == 0.0).then(|| values.clone());
            let (stepped, after) = self.rule.update(rates, values.cast(wide), gradient, before);
            self.memory.insert(path, after);
            unmoved.unwrap_or_else(|| stepped.cast(stored))
        })
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use burn::tensor::{Device, TensorData};

    /// Three parameters of golden runs.
    #[derive(Module, Debug)]
    pub struct Three {
        pub a: Param<Tensor<2>>,
        pub norm: Param<Tensor<1>>,
        pub c: Param<Tensor<3>>,
    }

    pub fn numbers(value: &serde_json::Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    impl Three {
        pub fn new(values: &serde_json::Value, device: &Device) -> Self {
            let data = |i: usize| TensorData::new(numbers(&values[i]), [numbers(&values[i]).len()]);
            let flat = |i| Tensor::<1>::from_data(data(i), device);
            Three {
                a: Param::from_tensor(flat(0).reshape([3, 4])),
                norm: Param::from_tensor(flat(1)),
                c: Param::from_tensor(flat(2).reshape([2, 3, 2])),
            }
        }

        pub fn gradients(&self, values: &serde_json::Value) -> GradientsParams {
            let plain = Three::new(values, &Device::flex());
            let mut gradients = GradientsParams::new();
            gradients.register(self.a.id, plain.a.val());
            gradients.register(self.norm.id, plain.norm.val());
            gradients.register(self.c.id, plain.c.val());
            gradients
        }

        pub fn values(&self) -> [Vec<f32>; 3] {
            let list = |t: Tensor<1>| t.into_data().try_to_vec::<f32>().unwrap();
            [flat(self.a.val().inner()), flat(self.norm.val().inner()), flat(self.c.val().inner())].map(list)
        }
    }

    /// Runs of LAMB and LARS.
    pub fn golden() -> serde_json::Value {
        serde_json::from_str(include_str!("../tests/golden/layerwise.json")).unwrap()
    }

    /// The parameters a run excludes, which it numbers.
    pub fn excluded(run: &serde_json::Value) -> Vec<ParamGroup> {
        let name = |i: &serde_json::Value| ["a", "norm", "c"][i.as_u64().unwrap() as usize];
        run["exclude"].as_array().unwrap().iter().map(|i| ParamGroup::from_path(name(i))).collect()
    }

    /// The same run with larger gradients.
    pub fn scaled(run: &serde_json::Value, by: f64) -> serde_json::Value {
        let mut run = run.clone();
        for gradient in
            run["gradients"].as_array_mut().unwrap().iter_mut().flat_map(|s| s.as_array_mut().unwrap())
        {
            let scaled: Vec<f64> = numbers(gradient).iter().map(|g| by * f64::from(*g)).collect();
            *gradient = scaled.into();
        }
        run
    }

    /// The values after every step of a run.
    pub fn walk(run: &serde_json::Value, rule: &dyn Rule) -> Vec<[Vec<f32>; 3]> {
        let mut model = Three::new(&run["start"], &Device::flex().autodiff());
        let mut memory = Memory::new();
        let learning_rate = run["learning_rate"].as_f64().unwrap();
        let gradients = run["gradients"].as_array().unwrap().iter();
        let steps = gradients.map(|gradients| {
            let gradients = model.gradients(gradients);
            model = step(rule, &mut memory, learning_rate, model.clone(), gradients);
            model.values()
        });
        steps.collect()
    }

    /// The largest difference from the recorded steps of one golden run.
    pub fn after(golden: &serde_json::Value, run: &serde_json::Value, rule: &dyn Rule) -> f32 {
        let steps = walk(run, rule);
        let recorded = golden["after_steps"].as_array().unwrap().iter();
        let got = recorded.map(|s| steps[s.as_u64().unwrap() as usize - 1].concat());
        let want = run["after"].as_array().unwrap().iter();
        got.zip(want)
            .map(|(got, want)| {
                far(&got, &want.as_array().unwrap().iter().flat_map(numbers).collect::<Vec<_>>())
            })
            .fold(0.0, f32::max)
    }

    /// The largest difference.
    pub fn far(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }
}
