//! LARS: momentum whose step on every parameter is in proportion to the parameter's length, for large batches.

use burn::module::{Module, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::optimizer::{self, Group, Memory, Moments, Rates, Rule, trust_ratio};
use crate::params::squares;

/// Which of the two published formulas of LARS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LarsForm {
    /// `local = trust |w| / (|g| + weight_decay |w| + eps)`, `v = momentum v + learning_rate local (g + weight_decay w)`,
    /// `w - v` (You et al. 2017, arXiv 1708.03888).
    #[default]
    Original,
    /// `m = momentum m + (1 - momentum)(g + weight_decay w)`, `w - learning_rate phi(|w|) / |m| m` (You et al. 2020,
    /// arXiv 1904.00962, algorithm 1).
    Paper,
}

/// Layer-wise adaptive rate scaling, each parameter tensor for itself.
///
/// Where a tensor or its gradient is all 0 the step is not scaled (`local` and the ratio are 1). Momentum and norms are
/// `f32` (`f64` for `f64`).
#[derive(Clone, Debug)]
pub struct Lars {
    /// Which formula.
    pub form: LarsForm,
    /// Decay of the momentum, in `0..1`.
    pub momentum: f64,
    /// Times the parameter, added to its gradient.
    pub weight_decay: f64,
    /// `trust` of the original form.
    pub trust: f64,
    /// `eps` of the original form.
    pub eps: f64,
    /// Ends of `phi` of the paper's form, which is the identity without them.
    pub clamp: Option<[f64; 2]>,
    /// Parameters that are neither scaled nor decayed, as norms and biases commonly are.
    pub exclude: Vec<ParamGroup>,
    /// Parameters with settings of their own.
    pub groups: Vec<Group>,
    pub(crate) moments: Memory,
}

impl Default for Lars {
    /// The original form with momentum 0.9, trust 0.001, eps 1e-8, no weight decay, no clamp, nothing excluded.
    fn default() -> Self {
        Lars {
            form: LarsForm::Original,
            momentum: 0.9,
            weight_decay: 0.0,
            trust: 1e-3,
            eps: 1e-8,
            clamp: None,
            exclude: Vec::new(),
            groups: Vec::new(),
            moments: Memory::new(),
        }
    }
}

impl Lars {
    /// Steps every parameter of `module` that has a gradient; those without keep value and state.
    pub fn step<M: Module>(&mut self, learning_rate: f64, module: M, gradients: GradientsParams) -> M {
        let mut moments = std::mem::take(&mut self.moments);
        let module = optimizer::step(self, &mut moments, learning_rate, module, gradients);
        self.moments = moments;
        module
    }

    /// `trust |w| / (|g| + weight_decay |w| + eps)` as `[1]`; 1 where either norm is 0.
    fn local(&self, w: &Tensor<1>, g: Tensor<1>, weight_decay: f64) -> Tensor<1> {
        let (w, g) = (squares(w).sqrt(), squares(&g).sqrt());
        let idle = w.clone().equal_elem(0.0).bool_or(g.clone().equal_elem(0.0));
        let below = g + w.clone().mul_scalar(weight_decay).add_scalar(self.eps);
        (w.mul_scalar(self.trust) / below).mask_fill(idle, 1.0)
    }
}

impl Rule for Lars {
    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn groups(&self) -> &[Group] {
        &self.groups
    }

    fn excluded(&self) -> &[ParamGroup] {
        &self.exclude
    }

    fn has_second(&self) -> bool {
        false
    }

    fn update(
        &self,
        rates: Rates,
        values: Tensor<1>,
        gradient: Tensor<1>,
        moments: Option<Moments>,
    ) -> (Tensor<1>, Moments) {
        let decayed = match rates.weight_decay {
            0.0 => gradient.clone(),
            decay => gradient.clone() + values.clone().mul_scalar(decay),
        };
        let added = match (self.form, rates.adapt) {
            (LarsForm::Paper, _) => decayed.mul_scalar(1.0 - self.momentum),
            (LarsForm::Original, false) => decayed.mul_scalar(rates.learning_rate),
            (LarsForm::Original, true) => {
                decayed.mul_scalar(rates.learning_rate) * self.local(&values, gradient, rates.weight_decay)
            }
        };
        let (updates, first) = match moments {
            None => (1, added),
            Some(m) => (m.updates + 1, m.first.mul_scalar(self.momentum) + added),
        };
        let step = match (self.form, rates.adapt) {
            (LarsForm::Original, _) => first.clone(),
            (LarsForm::Paper, false) => first.clone().mul_scalar(rates.learning_rate),
            (LarsForm::Paper, true) => {
                let ratio = trust_ratio(values.clone(), first.clone(), self.clamp);
                first.clone().mul_scalar(rates.learning_rate) * ratio
            }
        };
        (values - step, Moments { updates, first, second: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::testing::{after, excluded, far, golden, scaled, walk};
    use burn::module::Param;
    use burn::tensor::Device;

    fn of(form: LarsForm, run: &serde_json::Value) -> Lars {
        let number = |name: &str| run[name].as_f64();
        let plain = Lars::default();
        Lars {
            form,
            momentum: number("momentum").unwrap(),
            weight_decay: number("weight_decay").unwrap(),
            trust: number("trust").unwrap_or(plain.trust),
            eps: number("eps").unwrap_or(plain.eps),
            clamp: serde_json::from_value(run["clamp"].clone()).unwrap(),
            exclude: excluded(run),
            ..plain
        }
    }

    #[test]
    fn steps_equal_the_formulas_and_other_settings_do_not() {
        let golden = golden();
        for (form, name, other) in [
            (LarsForm::Paper, "lars_paper", LarsForm::Original),
            (LarsForm::Original, "lars_original", LarsForm::Paper),
        ] {
            for run in golden[name].as_array().unwrap() {
                let difference = after(&golden, run, &of(form, run));
                assert!(difference < 1e-5, "{name}: {difference}");
            }
            let run = &golden[name][1];
            let wrong = [
                Lars { form: other, ..of(form, run) },
                Lars { momentum: 0.5, ..of(form, run) },
                Lars { exclude: vec![ParamGroup::all()], ..of(form, run) },
            ];
            for optimizer in wrong {
                assert!(after(&golden, run, &optimizer) > 1e-4, "{name} {optimizer:?}");
            }
        }
        let run = &golden["lars_paper"][1];
        assert!(after(&golden, run, &Lars { clamp: None, ..of(LarsForm::Paper, run) }) > 1e-4, "phi counts");
    }

    #[test]
    fn the_first_step_by_hand() {
        let p: Param<Tensor<1>> =
            Param::from_tensor(Tensor::from_floats([3.0, 4.0], &Device::flex().autodiff()));
        let mut gradients = GradientsParams::new();
        gradients.register(p.id, Tensor::<1>::from_floats([0.6, 0.8], &Device::flex()));
        let mut lars = Lars { weight_decay: 0.1, ..Lars::default() };
        let after: Vec<f64> = lars.step(0.1, p, gradients).val().inner().into_data().iter::<f64>().collect();
        // local = 0.001 * 5 / (1 + 0.5), v = 0.1 local ([0.6, 0.8] + 0.1 [3, 4])
        assert!((after[0] - 2.9997).abs() < 1e-6 && (after[1] - 3.9996).abs() < 1e-6, "{after:?}");
    }

    #[test]
    fn the_size_of_the_loss_does_not_matter_to_the_papers_form() {
        let golden = golden();
        let run = &golden["lars_paper"][0];
        let louder = scaled(run, 100.0);
        let change = |o: &Lars| far(&walk(run, o)[19].concat(), &walk(&louder, o)[19].concat());
        let free = Lars { weight_decay: 0.0, ..of(LarsForm::Paper, run) };
        assert!(change(&free) < 1e-4, "{}", change(&free));
        let plain = Lars { exclude: vec![ParamGroup::all()], ..free };
        assert!(change(&plain) > 1e-2, "control: without the ratio it does");
    }
}
