//! The linear router: softmax over all experts, the best few are kept (Switch, arXiv 2101.03961; Mixtral, arXiv 2401.04088).

use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_core::{Mode, Run, Seed, Site};
use serde::{Deserialize, Serialize};

use crate::MoeError;

/// How a [`TopKRouter`] chooses and weighs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// Number of experts.
    pub experts: usize,
    /// How many experts a token uses.
    pub top_k: usize,
    /// Whether the weights of a token's experts are scaled to sum to 1 (Mixtral, Qwen3) or left as the probabilities they are
    /// (Switch, OLMoE).
    pub renormalise: bool,
    /// In training the router's input is multiplied by draws from `1 - jitter..1 + jitter`.
    #[serde(default)]
    pub jitter: f64,
    /// Standard deviation of the initial weights.
    #[serde(default = "small")]
    pub init_std: f64,
}

fn small() -> f64 {
    0.02
}

impl RouterConfig {
    /// No jitter, initial weights of standard deviation 0.02.
    pub fn new(experts: usize, top_k: usize, renormalise: bool) -> Self {
        RouterConfig { experts, top_k, renormalise, jitter: 0.0, init_std: small() }
    }

    /// Whether a router can be made of this.
    ///
    /// # Errors
    /// [`MoeError::NoRouterGradient`] for one renormalized expert per token, else [`MoeError::Settings`].
    pub fn check(&self) -> Result<(), MoeError> {
        let mut problems = Vec::new();
        if self.top_k == 0 || self.top_k > self.experts {
            problems.push(format!("`top_k` is {}, which is not in 1..={} experts", self.top_k, self.experts));
        }
        if !(0.0..1.0).contains(&self.jitter) {
            problems.push(format!("`jitter` is {}, which is not in 0..1", self.jitter));
        }
        if !(self.init_std.is_finite() && self.init_std >= 0.0) {
            problems.push(format!("`init_std` is {}", self.init_std));
        }
        match (problems.is_empty(), self.top_k == 1 && self.renormalise) {
            (false, _) => Err(MoeError::Settings { problems }),
            (true, true) => Err(MoeError::NoRouterGradient),
            (true, false) => Ok(()),
        }
    }
}

/// Scores of experts before the softmax, `[tokens, experts]` in `f32`.
#[derive(Clone, Debug)]
pub struct Logits(Tensor<2>);

impl Logits {
    /// Scores `[tokens, experts]`.
    pub fn new(scores: Tensor<2>) -> Self {
        Logits(scores)
    }

    /// The scores `[tokens, experts]`.
    pub fn tensor(&self) -> Tensor<2> {
        self.0.clone()
    }

    /// Their softmax over the experts.
    pub fn probs(&self) -> Probs {
        Probs(softmax(self.0.clone(), 1))
    }
}

/// Probabilities of experts, `[tokens, experts]` in `f32`; rows sum to 1. Only [`Logits::probs`] makes them.
#[derive(Clone, Debug)]
pub struct Probs(Tensor<2>);

impl Probs {
    /// The probabilities `[tokens, experts]`.
    pub fn tensor(&self) -> Tensor<2> {
        self.0.clone()
    }
}

/// Which experts each token uses, and how much.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The experts of each token, the best first, `[tokens, k]`.
    pub indices: Tensor<2, Int>,
    /// Their weights `[tokens, k]`, in `f32`.
    pub weights: Tensor<2>,
    /// Probabilities of all experts.
    pub probs: Probs,
    /// Scores of all experts.
    pub logits: Logits,
}

/// A linear router without bias that keeps the `top_k` most probable experts of each token.
#[derive(Module, Debug)]
pub struct TopKRouter {
    /// `[d_model, experts]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    config: RouterConfig,
}

impl TopKRouter {
    /// A router with normal initial weights from the stream `moe.router/{site}`.
    ///
    /// # Errors
    /// See [`RouterConfig::check`].
    pub fn new(
        d_model: usize,
        config: RouterConfig,
        site: Site,
        seed: Seed,
        device: &Device,
    ) -> Result<Self, MoeError> {
        config.check()?;
        let weight = seed.normal(&format!("moe.router/{site}"), d_model * config.experts, config.init_std);
        let weight = Param::from_data(TensorData::new(weight, [d_model, config.experts]), device);
        Ok(TopKRouter { weight, config })
    }

    /// A router with these weights, `[d_model, experts]`.
    ///
    /// # Errors
    /// See [`RouterConfig::check`]; or the weights are for another number of experts.
    pub fn from_weight(weight: Tensor<2>, config: RouterConfig) -> Result<Self, MoeError> {
        config.check()?;
        let [_, experts] = weight.dims();
        if experts != config.experts {
            let problem = format!("router weights for {experts} of {} experts", config.experts);
            return Err(MoeError::Shapes { problems: vec![problem] });
        }
        Ok(TopKRouter { weight: Param::from_tensor(weight), config })
    }

    /// How the router chooses and weighs.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// Routes tokens `x: [tokens, d_model]` of the layer at `site`; the arithmetic is `f32` whatever the type of `x`.
    ///
    /// Jitter is drawn in [`Mode::Train`] only, from the run's stream `moe.jitter/{site}`. The task's gradient reaches the router
    /// through the weights; the choice itself has none.
    pub fn route(&self, x: Tensor<2>, site: Site, run: &Run<'_>) -> Routing {
        let mut x = x.cast(DType::F32);
        if self.config.jitter > 0.0 && run.mode == Mode::Train {
            let [tokens, d] = x.dims();
            let draws = run.seed.uniform(&format!("moe.jitter/{site}"), tokens * d, self.config.jitter);
            let factors: Vec<f32> = draws.into_iter().map(|draw| 1.0 + draw).collect();
            let device = x.device();
            x = x * Tensor::from_data(TensorData::new(factors, [tokens, d]), &device);
        }
        let logits = Logits::new(x.matmul(self.weight.val().cast(DType::F32)));
        let probs = logits.probs();
        let indices = top_k(logits.tensor(), self.config.top_k);
        let mut weights = probs.tensor().gather(1, indices.clone());
        if self.config.renormalise {
            weights = weights.clone() / weights.sum_dim(1);
        }
        Routing { indices, weights, probs, logits }
    }
}

/// The columns of the `k` largest entries of each row of `scores: [rows, columns]`, the largest first, `[rows, k]`; of
/// equal entries the one in the lower column comes first, on every device.
pub(crate) fn top_k(scores: Tensor<2>, k: usize) -> Tensor<2, Int> {
    let mut left = scores.without_autodiff();
    let [rows, columns] = left.dims();
    let numbers = Tensor::<1, Int>::arange(0..columns as i64, &left.device());
    let numbers = numbers.reshape([1, columns]).expand([rows, columns]);
    let mut picks = Vec::with_capacity(k);
    for _ in 0..k {
        let best = left.clone().max_dim(1).expand([rows, columns]);
        let not_best = left.clone().not_equal(best);
        // A row without a largest entry (NaN) picks the last column: the loss is NaN then, and says so.
        let pick = numbers.clone().mask_fill(not_best, columns as i64 - 1).min_dim(1);
        left = left.mask_fill(numbers.clone().equal(pick.clone().expand([rows, columns])), f32::NEG_INFINITY);
        picks.push(pick);
    }
    Tensor::cat(picks, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Part;

    fn site() -> Site {
        Site::layer(0, Part::Mlp)
    }

    fn tensor(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    fn numbers(t: Tensor<2>) -> Vec<f32> {
        t.into_data().iter::<f32>().collect()
    }

    fn chosen(t: Tensor<2, Int>) -> Vec<i64> {
        t.into_data().iter::<i64>().collect()
    }

    fn router(config: RouterConfig) -> TopKRouter {
        TopKRouter::new(6, config, site(), Seed(3), &Device::flex()).unwrap()
    }

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_expert() {
        let scores = tensor(vec![0., 3., 3., 1., /**/ 2., 2., 2., 2., /**/ -9., -8., -7., -6.], [3, 4]);
        assert_eq!(chosen(top_k(scores.clone(), 3)), [1, 2, 3, 0, 1, 2, 3, 2, 1]);
        assert_eq!(chosen(top_k(scores, 4))[4..8], [0, 1, 2, 3]);
    }

    #[test]
    fn top_k_equals_a_stable_sort() {
        // Plus 0, for total_cmp tells -0 from 0.
        let values: Vec<f32> = Seed(1).normal("x", 40 * 9, 2.0).iter().map(|v| v.round() + 0.0).collect();
        let want: Vec<i64> = values
            .chunks(9)
            .flat_map(|row| {
                let mut order: Vec<i64> = (0..9).collect();
                order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
                order.truncate(4);
                order
            })
            .collect();
        assert_eq!(chosen(top_k(tensor(values, [40, 9]), 4)), want);
    }

    #[test]
    fn renormalised_weights_are_the_softmax_over_the_kept_logits() {
        let x = tensor(Seed(2).normal("x", 50 * 6, 3.0), [50, 6]);
        let config = RouterConfig { init_std: 1.0, ..RouterConfig::new(5, 2, true) };
        let run = Run::default();
        let routing = router(config.clone()).route(x.clone(), site(), &run);
        let kept = routing.logits.tensor().gather(1, routing.indices.clone());
        let gap = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert!(gap(routing.weights.clone(), softmax(kept, 1)) < 1e-6);
        let plain = router(RouterConfig { renormalise: false, ..config }).route(x, site(), &run);
        assert_eq!(chosen(plain.indices), chosen(routing.indices));
        assert!(gap(plain.weights, routing.weights) > 1e-2, "left as they are the weights are others");
    }

    #[test]
    fn jitter_is_drawn_in_training_only_and_from_the_run() {
        let x = tensor(Seed(2).normal("x", 4 * 6, 1.0), [4, 6]);
        let config = RouterConfig { init_std: 1.0, ..RouterConfig::new(3, 1, false) };
        let noisy = RouterConfig { jitter: 0.5, ..config.clone() };
        let logits = |config: &RouterConfig, mode: Mode, seed: u64| {
            let mut run = Run::default();
            (run.mode, run.seed) = (mode, Seed(seed));
            numbers(router(config.clone()).route(x.clone(), site(), &run).logits.tensor())
        };
        let quiet = logits(&config, Mode::Train, 1);
        assert_eq!(logits(&noisy, Mode::Infer, 1), quiet);
        assert_ne!(logits(&noisy, Mode::Train, 1), quiet);
        assert_eq!(logits(&noisy, Mode::Train, 1), logits(&noisy, Mode::Train, 1));
        assert_ne!(logits(&noisy, Mode::Train, 1), logits(&noisy, Mode::Train, 2));
    }

    #[test]
    fn settings_without_sense_are_refused() {
        let fail =
            |config: RouterConfig| TopKRouter::new(4, config, site(), Seed(0), &Device::flex()).unwrap_err();
        assert!(matches!(fail(RouterConfig::new(4, 1, true)), MoeError::NoRouterGradient));
        assert!(RouterConfig::new(1, 1, false).check().is_ok());
        let bad = fail(RouterConfig { jitter: 1.0, ..RouterConfig::new(2, 3, false) }).to_string();
        assert!(bad.contains("`top_k` is 3") && bad.contains("`jitter` is 1"), "{bad}");
        let error = TopKRouter::from_weight(tensor(vec![0.0; 12], [4, 3]), RouterConfig::new(4, 2, true));
        assert!(error.unwrap_err().to_string().contains("for 3 of 4 experts"));
    }
}
