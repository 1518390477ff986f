//! AdamW as PyTorch computes it.
//!
//! burn has an AdamW of the same formula. Its state is keyed by parameter ids, which are random, so that files differ from
//! run to run, and it is read back onto the process-wide default device, which may not be there.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use firebrick_tensor::ops::{self, AdamWOptions};

use crate::optimizer::{self, Group, Memory, Moments, Rates, Rule};

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
    pub(crate) moments: Memory,
}

impl Default for AdamW {
    /// PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    fn default() -> Self {
        AdamW {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            groups: Vec::new(),
            moments: Memory::new(),
        }
    }
}

impl AdamW {
    /// Steps every parameter of `module` that has a gradient; those without keep value and state.
    pub fn step<M: Module>(&mut self, learning_rate: f64, module: M, gradients: GradientsParams) -> M {
        let mut moments = std::mem::take(&mut self.moments);
        let module = optimizer::step(self, &mut moments, learning_rate, module, gradients);
        self.moments = moments;
        module
    }
}

impl Rule for AdamW {
    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn groups(&self) -> &[Group] {
        &self.groups
    }

    fn update(
        &self,
        rates: Rates,
        values: Tensor<1>,
        gradient: Tensor<1>,
        moments: Option<Moments>,
    ) -> (Tensor<1>, Moments) {
        let Rates { learning_rate, weight_decay, .. } = rates;
        let zeros =
            || Moments { updates: 0, first: gradient.zeros_like(), second: Some(gradient.zeros_like()) };
        let Moments { updates, first, second } = moments.unwrap_or_else(zeros);
        let second = second.expect("Adam keeps two moments");
        let (betas, eps, step) = (self.betas, self.eps, updates + 1);
        let options = AdamWOptions { betas, eps, learning_rate, weight_decay, step };
        let (values, first, second) = ops::adamw(values, gradient, first, second, options);
        (values, Moments { updates: step, first, second: Some(second) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::testing::{Three, after};
    use burn::module::{Param, ParamGroup};
    use burn::tensor::{DType, Device};

    fn golden() -> serde_json::Value {
        serde_json::from_str(include_str!("../tests/golden/adamw.json")).unwrap()
    }

    /// The largest difference from PyTorch over the recorded steps of one golden run.
    fn difference(run: &serde_json::Value, optimizer: AdamW) -> f32 {
        after(&golden(), run, &optimizer)
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
