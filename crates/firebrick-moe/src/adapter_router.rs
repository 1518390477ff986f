//! Routing over adapters: which of several frozen adapters each token should use.
//!
//! The router looks at the embedded tokens only and never ahead: the features of a token are the normalized mean of the
//! embeddings up to and including it, so that gates are causal and the same with and without a key-value cache.

use std::path::Path;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{
    Base, Brick, MAX_SETTINGS, Part, Progress, Run, Seed, Site, SiteSet, Task, read_text, write_atomic,
};
use firebrick_models::Decoder;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use firebrick_tensor::ops::{Segments, rms_norm};
use firebrick_train::{AdamW, Batches, TextData, TrainError, token_tensor};
use serde::{Deserialize, Serialize};

use crate::router::top_k;
use crate::{AdapterGates, MoeError};

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

/// What stands in `router.json`.
#[derive(Serialize, Deserialize)]
struct RouterFile {
    adapters: Vec<String>,
    #[serde(default)]
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
    /// kept and renormalized; of equal ones the first.
    ///
    /// # Panics
    /// If `top_k` is 0.
    pub fn new(d_model: usize, adapters: usize, top_k: Option<usize>, seed: Seed, device: &Device) -> Self {
        assert_ne!(top_k, Some(0), "a token needs an adapter");
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

    /// Width of the embeddings that are routed by.
    pub fn width(&self) -> usize {
        self.weight.lazy_shape()[0]
    }

    /// Weight `[d_model, adapters]` and bias `[adapters]`.
    pub fn parameters(&self) -> (Tensor<2>, Tensor<1>) {
        (self.weight.val(), self.bias.val())
    }

    /// Scores `[batch, tokens, adapters]` of embedded tokens `[batch, tokens, d_model]` from the start of a text.
    pub fn logits(&self, embedded: Tensor<3>) -> Tensor<3> {
        self.scores(embedded, None, &mut Prefix::default())
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

    /// `positions` are those of the tokens in their documents, where rows hold several.
    fn scores(&self, embedded: Tensor<3>, positions: Option<Vec<usize>>, prefix: &mut Prefix) -> Tensor<3> {
        let [batch, tokens, d] = embedded.dims();
        let device = embedded.device();
        let mut sums = embedded.clone().cumsum(1);
        let (counts, rows): (Vec<f32>, usize) = match positions {
            Some(positions) => {
                // Less what was summed up before the document.
                let starts: Vec<i32> = positions.iter().enumerate().map(|(i, p)| (i - p) as i32).collect();
                let starts = Tensor::<1, Int>::from_data(TensorData::new(starts, [batch * tokens]), &device);
                let before = (sums.clone() - embedded).reshape([batch * tokens, d]).select(0, starts);
                sums = sums - before.reshape([batch, tokens, d]);
                (positions.iter().map(|p| 1.0 / (p + 1) as f32).collect(), batch)
            }
            None => {
                if let Some(earlier) = prefix.sum.take() {
                    sums = sums + earlier;
                }
                prefix.sum = Some(sums.clone().narrow(1, tokens - 1, 1));
                let counts = (1..=tokens).map(|i| 1.0 / (prefix.tokens + i) as f32).collect();
                prefix.tokens += tokens;
                (counts, 1)
            }
        };
        let counts = Tensor::<3>::from_data(TensorData::new(counts, [rows, tokens, 1]), &device);
        let features = rms_norm(sums * counts, Tensor::ones([d], &device), 1e-12);
        let scores = features.reshape([batch * tokens, d]).matmul(self.weight.val());
        let scores = scores + self.bias.val().unsqueeze_dim(0);
        let adapters = scores.dims()[1];
        scores.reshape([batch, tokens, adapters])
    }
}

impl AdapterRouter {
    /// Writes `router.safetensors` (`weight: [d_model, adapters]`, `bias: [adapters]`) and `router.json` with the adapters' names.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path, adapters: &[String]) -> Result<(), MoeError> {
        let io = |source| MoeError::Io { path: dir.into(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        let bytes = |values: Vec<f32>| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let (weight, bias) = (self.weight.val().without_autodiff(), self.bias.val().without_autodiff());
        let specs = [
            TensorSpec::new("weight", DType::F32, weight.dims()),
            TensorSpec::new("bias", DType::F32, bias.dims()),
        ];
        let values = [weight.into_data(), bias.into_data()];
        let tensors: Vec<_> =
            specs.into_iter().zip(values.map(|v| bytes(v.iter::<f32>().collect()))).collect();
        write_safetensors(dir.join("router.safetensors"), &Metadata::default(), &tensors)?;
        let settings = RouterFile { adapters: adapters.to_vec(), top_k: self.top_k };
        let text = serde_json::to_string_pretty(&settings).expect("names and a number") + "\n";
        write_atomic(&dir.join("router.json"), text.as_bytes()).map_err(io)
    }

    /// Reads what [`AdapterRouter::save`] wrote: the router, and the names of its adapters in the order of their slots.
    ///
    /// # Errors
    /// If a file is missing, damaged or of the wrong shape, or there are not as many names as adapters.
    pub fn load(dir: &Path, device: &Device) -> Result<(Self, Vec<String>), MoeError> {
        let path = dir.join("router.json");
        let text =
            read_text(&path, MAX_SETTINGS).map_err(|source| MoeError::Io { path: path.clone(), source })?;
        let settings: RouterFile =
            serde_json::from_str(&text).map_err(|e| MoeError::Io { path: path.clone(), source: e.into() })?;
        let checkpoint = Checkpoint::open(dir.join("router.safetensors"))?;
        let (weight, bias) = (checkpoint.tensor("weight")?, checkpoint.tensor("bias")?);
        let (&[d_model, adapters], &[biases]) = (&weight.shape[..], &bias.shape[..]) else {
            return Err(MoeError::Shapes {
                problems: vec![format!("{}: not a router", checkpoint.path().display())],
            });
        };
        if adapters != biases || adapters == 0 {
            let what = format!("{}: {adapters} weights for {biases} biases", checkpoint.path().display());
            return Err(MoeError::Shapes { problems: vec![what] });
        }
        if settings.adapters.len() != adapters {
            let what =
                format!("{}: {} names for {adapters} adapters", path.display(), settings.adapters.len());
            return Err(MoeError::Shapes { problems: vec![what] });
        }
        let top_k = settings.top_k.filter(|k| *k > 0);
        let mut router = AdapterRouter::new(d_model, adapters, top_k, Seed(0), device);
        let weight = TensorData::new(checkpoint.read_f32("weight")?, [d_model, adapters]);
        let bias = TensorData::new(checkpoint.read_f32("bias")?, [adapters]);
        router.weight = Param::from_data(weight, device);
        router.bias = Param::from_data(bias, device);
        Ok((router, settings.adapters))
    }
}

impl Brick for AdapterRouter {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, _site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let embedded = base(x, run);
        let positions = run.get::<Segments>().map(|segments| segments.positions().collect());
        let scores = self.scores(embedded.clone(), positions, run.state::<Prefix>());
        let mut gates = softmax(scores.clone(), 2);
        if let Some(k) = self.top_k.filter(|k| *k < self.adapters()) {
            let [batch, tokens, adapters] = gates.dims();
            let best = top_k(scores.reshape([batch * tokens, adapters]), k);
            let numbers = Tensor::<1, Int>::arange(0..adapters as i64, &best.device());
            let numbers = numbers.reshape([1, 1, adapters]).expand([batch * tokens, k, adapters]);
            let picked = best.unsqueeze_dim::<3>(2).expand([batch * tokens, k, adapters]).equal(numbers);
            let kept = picked.float().sum_dim(1).reshape([batch, tokens, adapters]) * gates;
            let total = kept.clone().sum_dim(2);
            gates = kept / total;
        }
        run.insert(AdapterGates::new(gates));
        embedded
    }
}

/// Windows of each held-out text on which [`fit_adapter_router`] measures the trained router, at most.
const HELD: usize = 16;

/// Trains `router` to tell the texts of `data` (one per adapter, in order) from one another by the embedded tokens of
/// the frozen `decoder`. Returns it with its held-out accuracy: of at most 16 windows, spread evenly, of each text of `held` (one per
/// adapter, too) the fraction of tokens whose best adapter is that of their text, averaged over the texts.
///
/// Batches of `batch` windows of `window` tokens take the texts in turn, so that all count alike whatever their
/// lengths. The optimizer is AdamW without weight decay at a learning rate that falls linearly to 0 (a constant one leaves the gates
/// noisy). `router` must be on a device that records gradients.
///
/// # Errors
/// Settings that cannot work (every problem is listed), a text of `data` shorter than a window, a router without gradients, a
/// loss that is not finite, cancellation.
pub fn fit_adapter_router(
    decoder: &Decoder,
    router: AdapterRouter,
    data: &[TextData],
    held: &[TextData],
    steps: usize,
    batch: usize,
    window: usize,
    learning_rate: f64,
    seed: Seed,
    progress: &dyn Progress,
) -> Result<(AdapterRouter, f64), TrainError> {
    let ([width, adapters], d) = (router.weight.lazy_shape().dims(), decoder.config().d_model);
    let mut problems = Vec::new();
    let mut check = |ok: bool, what: String| {
        if !ok {
            problems.push(what);
        }
    };
    check(data.len() == adapters, format!("{} texts for {adapters} adapters", data.len()));
    check(held.len() == adapters, format!("{} held-out texts for {adapters} adapters", held.len()));
    check(held.iter().all(|t| !t.ids.is_empty()), "a held-out text is empty".into());
    check(width == d, format!("a router of width {width} for a decoder of width {d}"));
    check(batch > 0, "`batch` is 0".into());
    check(window > 0, "`window` is 0".into());
    let fine = learning_rate.is_finite() && learning_rate >= 0.0;
    check(fine, format!("`learning_rate` is {learning_rate}"));
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    let sampler = |(i, text)| Batches::new(text, window, 1, seed.derive(&format!("adapter_router/{i}")));
    let mut samplers = data.iter().enumerate().map(sampler).collect::<Result<Vec<_>, _>>()?;
    let inner = router.weight.val().device().inner();
    let embed = |windows: &[&[u32]]| {
        let tokens = token_tensor(windows, &decoder.device());
        decoder.embed(tokens, &mut Run::default()).without_autodiff().to_device(&inner)
    };
    let mut embedded = |step: usize| {
        let (windows, labels): (Vec<&[u32]>, Vec<usize>) = (step * batch..(step + 1) * batch)
            .map(|draw| (samplers[draw % adapters].batch(draw / adapters)[0], draw % adapters))
            .unzip();
        (embed(&windows), labels)
    };
    let mut trained = router.clone();
    let mut optimizer = AdamW::default();
    optimizer.weight_decay = 0.0;
    let mut task = Task::begin(progress, "route", Some(steps as u64), "steps");
    for step in 0..steps {
        let (x, labels) = embedded(step);
        let loss = trained.loss(x, &labels);
        if !loss.is_tracked() {
            return Err(TrainError::NothingToTrain);
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &trained);
        let value = loss.without_autodiff().into_scalar::<f32>() as f64;
        if !value.is_finite() {
            return Err(TrainError::NotFinite { step: step + 1, what: "loss", value });
        }
        let left = 1.0 - step as f64 / steps as f64;
        trained = optimizer.step(learning_rate * left, trained, gradients);
        task.advance(1, &format!("loss {value:.4}"))?;
    }
    let fixed = trained.clone().valid();
    let right = |(label, text): (usize, &TextData)| {
        let windows = text.spread(window, HELD);
        let best = fixed.logits(embed(&windows)).argmax(2).into_data();
        let right = best.iter::<i64>().filter(|adapter| *adapter as usize == label).count();
        right as f64 / best.num_elements() as f64
    };
    let accuracy = held.iter().enumerate().map(right).sum::<f64>() / adapters as f64;
    Ok((trained, accuracy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_of_a_row_are_scored_as_if_alone() {
        let device = Device::flex();
        let mut router = AdapterRouter::new(8, 3, None, Seed(1), &device);
        let values = |name: &str, n: usize| Seed(2).normal(name, n, 1.0);
        router.weight = Param::from_data(TensorData::new(values("weight", 24), [8, 3]), &device);
        let x = Tensor::<3>::from_data(TensorData::new(values("x", 2 * 7 * 8), [2, 7, 8]), &device);
        // Two documents in the first row, three in the second.
        let segments = Segments::new(2, vec![0, 0, 0, 3, 3, 3, 3, 0, 1, 1, 1, 1, 1, 6]);
        let positions: Vec<usize> = segments.positions().collect();
        let packed = router.scores(x.clone(), Some(positions), &mut Prefix::default());
        let far = |a: Tensor<3>, b: Tensor<3>| (a - b).abs().max().into_scalar::<f32>();
        for (row, from, to) in [(0, 0, 3), (0, 3, 7), (1, 0, 1), (1, 1, 6), (1, 6, 7)] {
            let of = |x: Tensor<3>| x.narrow(0, row, 1).narrow(1, from, to - from);
            let alone = router.logits(of(x.clone()));
            assert!(far(of(packed.clone()), alone.clone()) < 1e-5, "row {row}, tokens {from} to {to}");
            if from > 0 {
                assert!(
                    far(of(router.logits(x.clone())), alone) > 1e-2,
                    "control: one text is something else"
                );
            }
        }
    }
}
