//! Routing over adapters: which of several frozen adapters each token should use.
//!
//! The router looks at the embedded tokens only and never ahead: the features of a token are the normalized mean of the
//! embeddings up to and including it, so that gates are causal and the same with and without a key-value cache.

use burn::module::{Module, Param};
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Base, Brick, Part, Run, Seed, Site, SiteSet};
use firebrick_tensor::ops::rms_norm;

use crate::AdapterGates;

/// A linear router over adapters at the `embed` site; leaves [`AdapterGates`] in the run.
#[derive(Module, Debug)]
pub struct AdapterRouter {
    /// `[d_model, adapters]`.
    weight: Param<Tensor<2>>,
    /// `[adapters]`.
    bias: Param<Tensor<1>>,
    #[module(skip)]
    sites: SiteSet,
    top_k: Option<usize>,
}

/// Sum of the embeddings seen so far `[batch, 1, d_model]`, and how many they are.
#[derive(Debug, Default)]
struct Prefix {
    sum: Option<Tensor<3>>,
    tokens: usize,
}

impl AdapterRouter {
    /// A router over `adapters` adapters that at first weighs all alike. With `top_k`, the best `top_k` gates of each token are
    /// kept and renormalized.
    pub fn new(d_model: usize, adapters: usize, top_k: Option<usize>, seed: Seed, device: &Device) -> Self {
        let weight = seed.normal("adapter_router.init", d_model * adapters, 1e-3);
        AdapterRouter {
            weight: Param::from_data(TensorData::new(weight, [d_model, adapters]), device),
            bias: Param::from_tensor(Tensor::zeros([adapters], device)),
            sites: [Site::global(Part::Embed)].into_iter().collect(),
            top_k,
        }
    }

    /// Number of adapters routed over.
    pub fn adapters(&self) -> usize {
        self.bias.lazy_shape()[0]
    }

    /// Weight `[d_model, adapters]` and bias `[adapters]`.
    pub fn parameters(&self) -> (Tensor<2>, Tensor<1>) {
        (self.weight.val(), self.bias.val())
    }

    /// Scores `[batch, tokens, adapters]` of embedded tokens `[batch, tokens, d_model]` from the start of a text.
    pub fn logits(&self, embedded: Tensor<3>) -> Tensor<3> {
        self.scores(embedded, &mut Prefix::default())
    }

    /// Mean cross-entropy `[1]` of routing every token of text `i` of the batch to adapter `labels[i]`.
    pub fn loss(&self, embedded: Tensor<3>, labels: &[usize]) -> Tensor<1> {
        let [batch, tokens, _] = embedded.dims();
        let device = embedded.device();
        let labels: Vec<i32> = labels.iter().map(|l| *l as i32).collect();
        let labels = Tensor::<3, Int>::from_data(TensorData::new(labels, [batch, 1, 1]), &device);
        let log_p = log_softmax(self.logits(embedded), 2);
        log_p.gather(2, labels.expand([batch, tokens, 1])).mean().neg()
    }

    fn scores(&self, embedded: Tensor<3>, prefix: &mut Prefix) -> Tensor<3> {
        let [batch, tokens, d] = embedded.dims();
        let mut sums = embedded.clone().cumsum(1);
        if let Some(earlier) = prefix.sum.take() {
            sums = sums + earlier;
        }
        let counts: Vec<f32> = (1..=tokens).map(|i| 1.0 / (prefix.tokens + i) as f32).collect();
        let counts = Tensor::<3>::from_data(TensorData::new(counts, [1, tokens, 1]), &embedded.device());
        prefix.sum = Some(sums.clone().narrow(1, tokens - 1, 1));
        prefix.tokens += tokens;
        let features = rms_norm(sums * counts, Tensor::ones([d], &embedded.device()), 1e-12);
        let scores = features.reshape([batch * tokens, d]).matmul(self.weight.val());
        let scores = scores + self.bias.val().unsqueeze_dim(0);
        let adapters = scores.dims()[1];
        scores.reshape([batch, tokens, adapters])
    }
}

impl Brick for AdapterRouter {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, _site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let embedded = base(x, run);
        let scores = self.scores(embedded.clone(), run.state::<Prefix>());
        let mut gates = softmax(scores, 2);
        if let Some(k) = self.top_k.filter(|k| *k < self.adapters()) {
            let threshold = gates.clone().topk(k, 2).narrow(2, k - 1, 1);
            let kept = gates.clone().greater_equal(threshold).float() * gates;
            let total = kept.clone().sum_dim(2);
            gates = kept / total;
        }
        run.insert(AdapterGates::new(gates));
        embedded
    }
}
