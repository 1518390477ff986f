//! LAMB: Adam whose step on every parameter is as long as the parameter itself, for large batches.

use burn::module::{Module, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use crate::optimizer::{self, Group, Memory, Moments, Rates, Rule, trust_ratio};

/// LAMB (arXiv 1904.00962, with the bias correction of its published code): `u = m / (sqrt(v) + eps) + weight_decay w`,
/// then `w - learning_rate phi(|w|) / |u| u`, each parameter tensor for itself.
///
/// A tensor that is all 0 (the `b` of LoRA at its start) has no length to compare with: its first step is not scaled, and so
/// as long as Adam's. Moments and norms are `f32` (`f64` for `f64`).
#[derive(Clone, Debug)]
pub struct Lamb {
    /// Decay of the first and of the second moment, each in `0..1`.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Times the parameter, part of the step before it is scaled.
    pub weight_decay: f64,
    /// Ends of `phi`, which is the identity without them.
    pub clamp: Option<[f64; 2]>,
    /// Parameters that are neither scaled nor decayed, as norms and biases commonly are.
    pub exclude: Vec<ParamGroup>,
    /// Parameters with settings of their own.
    pub groups: Vec<Group>,
    pub(crate) moments: Memory,
}

impl Default for Lamb {
    /// The paper's settings for BERT: betas 0.9 and 0.999, eps 1e-6, weight decay 0.01, no clamp, nothing excluded.
    fn default() -> Self {
        Lamb {
            betas: [0.9, 0.999],
            eps: 1e-6,
            weight_decay: 0.01,
            clamp: None,
            exclude: Vec::new(),
            groups: Vec::new(),
            moments: Memory::new(),
        }
    }
}

impl Lamb {
    /// Steps every parameter of `module` that has a gradient; those without keep value and state.
    pub fn step<M: Module>(&mut self, learning_rate: f64, module: M, gradients: GradientsParams) -> M {
        let mut moments = std::mem::take(&mut self.moments);
        let module = optimizer::step(self, &mut moments, learning_rate, module, gradients);
        self.moments = moments;
        module
    }
}

impl Rule for Lamb {
    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn groups(&self) -> &[Group] {
        &self.groups
    }

    fn excluded(&self) -> &[ParamGroup] {
        &self.exclude
    }

    fn update(
        &self,
        rates: Rates,
        values: Tensor<1>,
        gradient: Tensor<1>,
        moments: Option<Moments>,
    ) -> (Tensor<1>, Moments) {
        let moments = averages(self.betas, gradient, moments);
        let mut update = direction(self.betas, self.eps, &moments);
        if rates.weight_decay != 0.0 {
            update = update + values.clone().mul_scalar(rates.weight_decay);
        }
        if rates.adapt {
            update = update.clone() * trust_ratio(values.clone(), update, self.clamp);
        }
        (values - update.mul_scalar(rates.learning_rate), moments)
    }
}

/// Adam's moments after one more gradient.
fn averages(betas: [f64; 2], gradient: Tensor<1>, before: Option<Moments>) -> Moments {
    let [beta1, beta2] = betas;
    let squared = gradient.clone().square().mul_scalar(1.0 - beta2);
    let scaled = gradient.mul_scalar(1.0 - beta1);
    match before {
        None => Moments { updates: 1, first: scaled, second: Some(squared) },
        Some(m) => Moments {
            updates: m.updates + 1,
            first: m.first.mul_scalar(beta1) + scaled,
            second: m.second.map(|second| second.mul_scalar(beta2) + squared),
        },
    }
}

/// Adam's update.
fn direction(betas: [f64; 2], eps: f64, moments: &Moments) -> Tensor<1> {
    let t = moments.updates.min(i32::MAX as u64) as i32;
    let (correction1, correction2) = (1.0 - betas[0].powi(t), 1.0 - betas[1].powi(t));
    let second = moments.second.clone().expect("Adam keeps two moments");
    let root = second.sqrt().mul_scalar(1.0 / correction2.sqrt()).add_scalar(eps);
    (moments.first.clone() / root).div_scalar(correction1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdamW;
    use crate::optimizer::testing::{Three, after, excluded, far, golden, scaled, walk};
    use burn::optim::LambConfig;
    use burn::tensor::Device;

    fn of(run: &serde_json::Value) -> Lamb {
        let number = |name: &str| run[name].as_f64().unwrap();
        Lamb {
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            clamp: serde_json::from_value(run["clamp"].clone()).unwrap(),
            exclude: excluded(run),
            ..Lamb::default()
        }
    }

    #[test]
    fn steps_equal_the_formula_and_other_settings_do_not() {
        let golden = golden();
        for run in golden["lamb"].as_array().unwrap() {
            let difference = after(&golden, run, &of(run));
            assert!(difference < 1e-5, "{difference}");
        }
        let run = &golden["lamb"][1];
        let wrong = [
            Lamb { clamp: None, ..of(run) },
            Lamb { exclude: Vec::new(), ..of(run) },
            Lamb { weight_decay: 0.0, ..of(run) },
            Lamb { betas: [0.8, 0.999], ..of(run) },
        ];
        for optimizer in wrong {
            assert!(after(&golden, run, &optimizer) > 1e-3, "{optimizer:?}");
        }
    }

    #[test]
    fn the_size_of_the_loss_does_not_matter() {
        let golden = golden();
        let run = &golden["lamb"][0];
        let louder = scaled(run, 100.0);
        let change = |o: Lamb| far(&walk(run, &o)[19].concat(), &walk(&louder, &o)[19].concat());
        assert!(change(of(run)) < 1e-4, "{}", change(of(run)));
        assert!(change(Lamb { eps: 0.1, ..of(run) }) > 1e-3, "control: an eps of the gradients' size");
    }

    #[test]
    fn without_trust_ratio_and_decay_it_is_adam() {
        let golden = golden();
        let run = &golden["lamb"][0];
        let adam = AdamW { eps: 1e-6, weight_decay: 0.0, ..AdamW::default() };
        let adam = walk(run, &adam)[19].concat();
        let everything = vec![ParamGroup::all()];
        let lamb = walk(run, &Lamb { exclude: everything, ..of(run) })[19].concat();
        assert!(far(&lamb, &adam) < 1e-6, "{}", far(&lamb, &adam));
        assert!(far(&walk(run, &of(run))[19].concat(), &adam) > 1e-3, "control: with them it is not");
    }

    #[test]
    fn steps_equal_those_of_burn() {
        let golden = golden();
        let run = &golden["lamb"][0];
        let mut theirs = LambConfig::new().with_epsilon(1e-6).with_weight_decay(0.01).init();
        let mut model = Three::new(&run["start"], &Device::flex().autodiff());
        for gradients in run["gradients"].as_array().unwrap() {
            let gradients = model.gradients(gradients);
            model = theirs.step(0.01, model, gradients);
        }
        let (ours, theirs) = (walk(run, &of(run))[19].concat(), model.values().concat());
        assert!(far(&ours, &theirs) < 1e-5, "{}", far(&ours, &theirs));
    }
}
