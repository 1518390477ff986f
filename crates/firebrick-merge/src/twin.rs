//! Twin-Merging (arXiv 2406.15479): what experts share is merged into one model, what each has to itself is kept in few directions
//! and put back input by input.
//!
//! The exclusive parts run as a brick, `y = W x + sum of g_t U_t (V_t x)`, so that each row of a batch has gates of its own and no
//! weight is rebuilt.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::{leaky_relu, log_softmax, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Base, Brick, Part, Run, Seed, Site, SiteSet};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_moe::AdapterGates;
use firebrick_tensor::linalg::Matrix;
use firebrick_tensor::ops::rms_norm;
use firebrick_train::AdamW;

use crate::task_vectors::{LowRank, TaskVector, TaskVectorError, check_same};

/// A merged model, and what each expert has beside it.
#[derive(Clone, Debug)]
pub struct Twin {
    /// Weights of the merged model.
    pub shared: TaskVector,
    /// `expert - shared` of each expert, compressed; biases and norms whole.
    pub exclusive: Vec<LowRank>,
}

impl Twin {
    /// Splits `experts` (their weights) around `shared`, any merge of them (the paper: the base plus 0.3 times the sum of their task
    /// vectors). Of each difference at a matrix the `rank(site, matrix)` largest singular triplets are kept.
    ///
    /// # Errors
    /// Models that differ in sites or shapes, weights that are not finite.
    pub fn new(
        shared: TaskVector,
        experts: &[TaskVector],
        rank: impl Fn(Site, &Matrix) -> usize + Sync,
    ) -> Result<Twin, TaskVectorError> {
        let all: Vec<&TaskVector> = [&shared].into_iter().chain(experts).collect();
        check_same(&all)?;
        let exclusive = experts.iter().map(|e| TaskVector::between(&shared, e)?.low_rank(&rank));
        Ok(Twin { exclusive: exclusive.collect::<Result<_, _>>()?, shared })
    }

    /// The weights for one weighing of the experts, rebuilt: what [`TwinBank`] computes without them.
    ///
    /// # Errors
    /// Another number of weights than of experts.
    pub fn merged(&self, weights: &[f64]) -> Result<TaskVector, TaskVectorError> {
        if weights.len() != self.exclusive.len() {
            let problems = vec![format!("{} weights for {} experts", weights.len(), self.exclusive.len())];
            return Err(TaskVectorError::Mismatch { problems });
        }
        let mut merged = self.shared.clone();
        for (exclusive, weight) in self.exclusive.iter().zip(weights) {
            merged = merged.plus(&exclusive.rebuild(), *weight)?;
        }
        Ok(merged)
    }

    /// Numbers held: all of the shared model, and `r (d_out + d_in)` a matrix of each expert.
    pub fn numbers(&self) -> usize {
        let shared: usize = self.shared.sites.values().map(|m| m.data().len()).sum();
        shared + self.exclusive.iter().map(LowRank::numbers).sum::<usize>()
    }

    /// The exclusive parts as a brick over a decoder of `config` with the shared weights, on `device`.
    pub fn bank(&self, config: &DecoderConfig, device: &Device) -> TwinBank {
        let mut bank = TwinBank::empty(config);
        let Some(first) = self.exclusive.first() else { return bank };
        for site in first.matrices.keys() {
            let factors: Vec<_> = self.exclusive.iter().map(|e| &e.matrices[site]).collect();
            let ranks: Vec<usize> = factors.iter().map(|s| s.sigma.len()).collect();
            // Which expert and which of its directions each direction is.
            let directions: Vec<(usize, usize)> =
                ranks.iter().enumerate().flat_map(|(t, r)| (0..*r).map(move |k| (t, k))).collect();
            let total = directions.len();
            if total == 0 {
                continue;
            }
            let (rows, cols) = (factors[0].u.rows(), factors[0].vt.cols());
            let owner = Matrix::from_fn(ranks.len(), total, |t, j| f64::from(u8::from(directions[j].0 == t)));
            let left = Matrix::from_fn(total, rows, |j, o| {
                let (t, k) = directions[j];
                factors[t].u[(o, k)] * factors[t].sigma[k]
            });
            let right =
                Matrix::from_fn(total, cols, |j, i| factors[directions[j].0].vt[(directions[j].1, i)]);
            let of = |m: &Matrix| tensor(m, device);
            let part = |down: Matrix, up: Matrix| Factors { down: of(&down), up: of(&up), owner: of(&owner) };
            if site.part == Part::Embed {
                // Tokens pick rows; a head that is the embedding goes the other way.
                if config.tied_head {
                    let head = part(right.transpose(), left.clone());
                    bank.matrices.insert(Site::global(Part::Head), head);
                }
                bank.matrices.insert(*site, part(left.transpose(), right));
            } else {
                bank.matrices.insert(*site, part(right.transpose(), left));
            }
        }
        for (site, vector) in &first.vectors {
            let rows = Matrix::from_fn(self.exclusive.len(), vector.cols(), |t, i| {
                self.exclusive[t].vectors[site][(0, i)]
            });
            bank.vectors.insert(*site, tensor(&rows, device));
        }
        bank.sites = bank.matrices.keys().chain(bank.vectors.keys()).copied().collect();
        bank
    }
}

fn tensor(m: &Matrix, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(m.to_f32(), [m.rows(), m.cols()]), device)
}

/// The exclusive parts of all experts at a matrix.
#[derive(Clone, Debug)]
struct Factors {
    /// `[d_in, directions]`.
    down: Tensor<2>,
    /// `[directions, d_out]`.
    up: Tensor<2>,
    /// `[experts, directions]`, 1 where a direction is an expert's.
    owner: Tensor<2>,
}

/// The exclusive parts of [`Twin`]'s experts, weighed by the [`AdapterGates`] in the run: `[batch, 1, experts]` for gates by input,
/// `[batch, tokens, experts]` by token. Without gates it is the shared model.
#[derive(Clone, Debug)]
pub struct TwinBank {
    matrices: BTreeMap<Site, Factors>,
    /// `[experts, d]`, added to a bias or to what a norm multiplies by.
    vectors: BTreeMap<Site, Tensor<2>>,
    sites: SiteSet,
    norm_eps: f64,
    head_dim: usize,
    embedding_scale: f64,
}

impl TwinBank {
    fn empty(config: &DecoderConfig) -> TwinBank {
        TwinBank {
            matrices: BTreeMap::new(),
            vectors: BTreeMap::new(),
            sites: SiteSet::default(),
            norm_eps: config.norm_eps,
            head_dim: config.head_dim,
            embedding_scale: if config.scaled_embedding { (config.d_model as f64).sqrt() } else { 1.0 },
        }
    }

    /// What a norm adds: the normed input times the experts' part of its weight, `gain: [batch, tokens, d]`.
    fn norm(&self, site: Site, x: Tensor<3>, gain: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, width] = x.dims();
        let ones = |d| Tensor::ones([d], &x.device());
        if !matches!(site.part, Part::AttnQNorm | Part::AttnKNorm) {
            return rms_norm(x.clone(), ones(width), self.norm_eps) * gain;
        }
        let heads = x.clone().reshape([batch, tokens, width / self.head_dim, self.head_dim]);
        let normed = rms_norm(heads, ones(self.head_dim), self.norm_eps);
        (normed * gain.unsqueeze_dim(2)).reshape([batch, tokens, width])
    }
}

impl Brick for TwinBank {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    /// # Panics
    /// If the gates are of another number of experts.
    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let y = base(x.clone(), run);
        // A router at the embedding, below this brick, has left them by now.
        let Some(gates) = run.get::<AdapterGates>().map(AdapterGates::weights) else { return y };
        let spread = |rows: &Tensor<2>| {
            let [batch, tokens, experts] = gates.dims();
            let flat = gates.clone().reshape([batch * tokens, experts]).matmul(rows.clone());
            let width = flat.dims()[1];
            flat.reshape([batch, tokens, width])
        };
        if let Some(rows) = self.vectors.get(&site) {
            return y + if is_norm(site.part) { self.norm(site, x, spread(rows)) } else { spread(rows) };
        }
        let Factors { down, up, owner } = &self.matrices[&site];
        let [batch, tokens, width] = x.dims();
        let inner = match (site.part, &run.tokens) {
            (Part::Embed, Some(ids)) => {
                down.clone().select(0, ids.clone().reshape([batch * tokens])) * self.embedding_scale
            }
            _ => x.reshape([batch * tokens, width]).matmul(down.clone()),
        };
        let directions = inner.dims()[1];
        let weighed = inner.reshape([batch, tokens, directions]) * spread(owner);
        let update = weighed.reshape([batch * tokens, directions]).matmul(up.clone());
        let d_out = update.dims()[1];
        y + update.reshape([batch, tokens, d_out])
    }
}

fn is_norm(part: Part) -> bool {
    use Part::*;
    matches!(part, AttnNorm | AttnQNorm | AttnKNorm | AttnPostNorm | MlpNorm | MlpPostNorm | Norm)
}

/// The mean over tokens of the last hidden state, `[batch, d_model]`, of `tokens: [batch, tokens]`: what [`TwinRouter`] sees.
pub fn mean_hidden(shared: &Decoder, tokens: Tensor<2, Int>) -> Tensor<2> {
    shared.hidden(tokens, &mut Run::default()).mean_dim(1).squeeze_dim(1)
}

/// The paper's router: a perceptron from the shared model's mean hidden state to the experts, one hidden layer twice as wide.
///
/// Features are standardized once, over the training set, instead of by batch norm; there is no dropout.
#[derive(Module, Debug)]
pub struct TwinRouter {
    /// `[d_model, 2 d_model]` and `[1, 2 d_model]`.
    inner: Param<Tensor<2>>,
    inner_bias: Param<Tensor<2>>,
    /// `[2 d_model, experts]` and `[1, experts]`.
    out: Param<Tensor<2>>,
    out_bias: Param<Tensor<2>>,
}

impl TwinRouter {
    /// Trains a router to name the expert `labels[i]` of row `i` of `features: [inputs, d_model]` ([`mean_hidden`]): `steps` steps of
    /// AdamW over all rows, the learning rate falling linearly from `learning_rate` to 0.
    ///
    /// # Errors
    /// No inputs, another number of labels, or a label that is no expert (every problem is listed).
    pub fn fit(
        features: Tensor<2>,
        labels: &[usize],
        experts: usize,
        steps: usize,
        learning_rate: f64,
        seed: Seed,
    ) -> Result<TwinRouter, TaskVectorError> {
        let [rows, d] = features.dims();
        let mut problems = Vec::new();
        if rows == 0 || rows != labels.len() {
            problems.push(format!("{} labels for {rows} inputs", labels.len()));
        }
        if let Some(label) = labels.iter().find(|l| **l >= experts) {
            problems.push(format!("label {label}, and {experts} experts"));
        }
        if !problems.is_empty() {
            return Err(TaskVectorError::Mismatch { problems });
        }
        let plain = features.device();
        let device = plain.clone().autodiff();
        let draw = |name: &str, rows: usize, cols: usize| {
            let values = seed.normal(name, rows * cols, (1.0 / rows as f64).sqrt());
            Param::from_data(TensorData::new(values, [rows, cols]), &device)
        };
        let zeros = |cols| Param::from_data(TensorData::zeros::<f32, _>([1, cols]), &device);
        let mut router = TwinRouter {
            inner: draw("twin_router.inner", d, 2 * d),
            inner_bias: zeros(2 * d),
            out: draw("twin_router.out", 2 * d, experts),
            out_bias: zeros(experts),
        };
        let mean = features.clone().mean_dim(0);
        let centered = features - mean.clone();
        let scale = (centered.clone().square().mean_dim(0) + 1e-12).sqrt();
        let x = (centered / scale.clone()).to_device(&device);
        let targets: Vec<i32> = labels.iter().map(|l| *l as i32).collect();
        let targets = Tensor::<2, Int>::from_data(TensorData::new(targets, [rows, 1]), &device);
        let mut optimizer = AdamW::default();
        for step in 0..steps {
            let loss = log_softmax(router.scores(x.clone()), 1).gather(1, targets.clone()).mean().neg();
            let gradients = GradientsParams::from_grads(loss.backward(), &router);
            let left = 1.0 - step as f64 / steps as f64;
            router = optimizer.step(learning_rate * left, router, gradients);
        }
        // The standardization goes into the first layer.
        let router = router.valid();
        let inner = router.inner.val() / scale.transpose();
        let shift = router.inner_bias.val() - mean.matmul(inner.clone());
        Ok(TwinRouter {
            inner: Param::from_tensor(inner).set_require_grad(false),
            inner_bias: Param::from_tensor(shift).set_require_grad(false),
            ..router
        })
    }

    /// Scores `[inputs, experts]` of `features: [inputs, d_model]`.
    pub fn scores(&self, features: Tensor<2>) -> Tensor<2> {
        let inner = leaky_relu(features.matmul(self.inner.val()) + self.inner_bias.val(), 0.01);
        inner.matmul(self.out.val()) + self.out_bias.val()
    }

    /// Gates `[inputs, 1, experts]` of `features: [inputs, d_model]`, a softmax over all experts, to be put into the run of these inputs.
    pub fn gates(&self, features: Tensor<2>) -> AdapterGates {
        AdapterGates::new(softmax(self.scores(features), 1).unsqueeze_dim(1))
    }
}
