//! Small models and texts of several kinds, for tests.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Run, Seed, Silent};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_train::{Draw, Mixture, Rows, Stage, TextData, TrainConfig, fit, held_out_loss};

use super::{Composed, TaskVector};

/// Symbols of one kind of text.
pub const SYMBOLS: usize = 8;
pub const KINDS: usize = 3;
pub const WINDOW: usize = 16;

/// A model with every sort of weight: biases, norms on heads or not, and a head of its own or the embedding.
pub fn config(tied: bool, d_model: usize) -> DecoderConfig {
    DecoderConfig::from_hf(&serde_json::json!({
        "model_type": "qwen2", "vocab_size": SYMBOLS * KINDS, "hidden_size": d_model,
        "intermediate_size": 2 * d_model, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
    }))
    .unwrap()
}

/// A model of that configuration whose weights are large enough for losses to depend on them, and whose biases are not 0.
pub fn decoder(tied: bool, seed: u64) -> Decoder {
    let device = Device::flex();
    let mut decoder = Decoder::random(config(tied, 8), Seed(seed), &device).unwrap();
    let sites = decoder.sites().all();
    for site in sites.iter().filter(|s| s.layer.is_some()) {
        let Some(weight) = decoder.weight(site) else { continue };
        let [rows, cols] = weight.dims();
        let noise = Seed(seed).normal(&format!("testing/{site}"), rows * cols, 0.2);
        let noise = Tensor::<1>::from_floats(noise.as_slice(), &device).reshape([rows, cols]);
        decoder = decoder.with_weight(site, weight + noise);
    }
    decoder
}

/// A text in which each of the symbols of its kind is followed by one other, as often as `order` says, and else by any.
pub fn text(kind: usize, tokens: usize, order: f32, seed: u64) -> TextData {
    let places = Seed(11).uniform(&format!("order/{kind}"), SYMBOLS, 0.5);
    let mut next: Vec<usize> = (0..SYMBOLS).collect();
    next.sort_by(|a, b| places[*a].total_cmp(&places[*b]));
    let draws = Seed(seed).uniform(&format!("text/{kind}"), 2 * tokens, 0.5);
    let mut at = 0;
    let symbols = draws.chunks(2).map(|u| {
        at = if u[0] + 0.5 < order { next[at] } else { ((u[1] + 0.5) * SYMBOLS as f32) as usize % SYMBOLS };
        (kind * SYMBOLS + at) as u32
    });
    TextData::new(symbols.collect(), 0)
}

fn train(decoder: Decoder, text: &TextData, steps: usize, learning_rate: f64, seed: u64) -> Decoder {
    let settings = TrainConfig {
        steps,
        batch: 16,
        window: WINDOW,
        learning_rate,
        seed,
        log_every: 0,
        ..TrainConfig::default()
    };
    let loss = &mut |d: &Decoder, tokens: Tensor<2, Int>, _| d.nll(tokens, &mut Run::default()).mean();
    let decoder = decoder.train().trainable();
    fit(decoder, &settings, text, loss, &Silent, false).unwrap().0.valid()
}

/// A base and a specialist for each kind.
pub struct Family {
    pub base: Decoder,
    pub experts: Vec<Decoder>,
    pub texts: Vec<TextData>,
    pub held_out: Vec<TextData>,
    /// A short one of all kinds, to lead a search.
    pub dev: TextData,
    /// Nats held out of the base, and of each specialist on its own kind.
    ends: Vec<(f64, f64)>,
}

impl Family {
    pub fn new(seed: u64) -> Self {
        let random = Decoder::random(config(true, 24), Seed(seed), &Device::flex()).unwrap();
        let weak: Vec<TextData> = (0..KINDS).map(|k| text(k, 6_000, 0.5, seed + 2000)).collect();
        let base = train(random, &TextData::interleave(&weak, WINDOW), 100, 1e-2, seed);
        let texts: Vec<TextData> = (0..KINDS).map(|k| text(k, 6_000, 0.9, seed)).collect();
        let held_out: Vec<TextData> = (0..KINDS).map(|k| text(k, 2_000, 0.9, seed + 1000)).collect();
        let dev: Vec<TextData> = (0..KINDS).map(|k| text(k, 640, 0.9, seed + 3000)).collect();
        let dev = TextData::interleave(&dev, WINDOW);
        let experts: Vec<Decoder> = texts.iter().map(|t| train(base.clone(), t, 60, 3e-3, seed)).collect();
        let ends = held_out.iter().zip(&experts).map(|(t, own)| (nats(&base, t), nats(own, t))).collect();
        Family { base, experts, texts, held_out, dev, ends }
    }

    pub fn composed(&self) -> Composed {
        Composed::new(&self.base, self.vectors()).unwrap()
    }

    pub fn vectors(&self) -> Vec<TaskVector> {
        let sites = self.base.sites().all();
        self.experts.iter().map(|e| TaskVector::between(&self.base, e, &sites).unwrap()).collect()
    }

    /// Windows of every kind in equal parts.
    pub fn mixture(&self) -> Mixture<'_> {
        let sources: Vec<(String, Rows<'_>)> = self
            .texts
            .iter()
            .enumerate()
            .map(|(k, t)| (k.to_string(), Rows::windows(t, WINDOW).unwrap()))
            .collect();
        let draws = (0..self.texts.len()).map(|k| Draw { weight: Some(1.0), ..Draw::all(k.to_string()) });
        let stage = Stage { length: None, temperature: 1.0, draws: draws.collect() };
        Mixture::new(sources, vec![stage]).unwrap()
    }

    /// Nats on what is held out, by kind.
    pub fn nats(&self, decoder: &Decoder) -> Vec<f64> {
        self.held_out.iter().map(|t| nats(decoder, t)).collect()
    }

    /// Mean nats on the short text.
    pub fn dev_nats(&self, decoder: &Decoder) -> f64 {
        nats(decoder, &self.dev)
    }

    /// The mean share of the gap between base and specialist that `decoder` closes.
    pub fn gap_closed(&self, decoder: &Decoder) -> f64 {
        let each = self.nats(decoder).into_iter().zip(&self.ends);
        each.map(|(merged, (base, own))| (base - merged) / (base - own)).sum::<f64>() / KINDS as f64
    }
}

fn nats(decoder: &Decoder, text: &TextData) -> f64 {
    held_out_loss(decoder, &[], &Rows::windows(text, WINDOW).unwrap(), 128, &Silent).unwrap()
}

/// The largest difference, relative to the largest value.
pub fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().chain(b).fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs())) / largest
}

/// The figures of `docs/methods.md` on these models: the mean share of the gap closed over three seeds.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::print_stderr, reason = "tests say what they measured")]
fn figures() {
    use super::*;
    let mut rows: Vec<(String, Vec<f64>)> = Vec::new();
    for seed in 0..3 {
        let family = Family::new(seed);
        let (composed, data) = (family.composed(), family.mixture());
        let isotropic = |composed: &Composed, scale: f64| {
            let c = composed.coefficients(Granularity::Task, scale, 1, Seed(0));
            family.gap_closed(&composed.merge(&c).unwrap())
        };
        let mut add = |name: String, value: f64| match rows.iter_mut().find(|(n, _)| *n == name) {
            Some((_, values)) => values.push(value),
            None => rows.push((name, vec![value])),
        };
        add("average".into(), isotropic(&composed, 1.0 / KINDS as f64));
        add("task arithmetic, 0.3".into(), isotropic(&composed, 0.3));
        let best = (0..=20).map(|i| isotropic(&composed, 0.05 * f64::from(i))).fold(f64::MIN, f64::max);
        add("task arithmetic, best of 21 scales".into(), best);
        let (ada, concrete, few) =
            (AdaMergingConfig::default(), ConcreteConfig::default(), AtlasConfig::default());
        let of = |train: &TrainConfig, steps, learning_rate| TrainConfig {
            steps,
            batch: 12,
            window: WINDOW,
            learning_rate,
            ..train.clone()
        };
        let adapted = |composed: &Composed, granularity, learning_rate| {
            let config =
                AdaMergingConfig { granularity, train: of(&ada.train, 60, learning_rate), ..ada.clone() };
            let (c, report) = adamerging(composed, &config, &data, &Silent, false).unwrap();
            (family.gap_closed(&composed.merge(&c).unwrap()), report.final_loss().unwrap())
        };
        let inner = InnerStep { granularity: Granularity::Tensor, learning_rate: 0.1, rows: 4 };
        let masked = |inner| {
            let config = ConcreteConfig { inner, train: of(&concrete.train, 100, 2e-2), ..concrete.clone() };
            let (mask, _) = concrete_merging(&composed, &config, &data, &Silent, false).unwrap();
            composed.masked(&mask.sample(Seed(77)))
        };
        add("Concrete task arithmetic".into(), isotropic(&masked(None), 0.3));
        let meta = masked(Some(inner));
        for rate in [1e-2, 5e-3] {
            add(format!("AdaMerging task-wise, {rate}"), adapted(&composed, Granularity::Task, rate).0);
            for (name, composed) in [("AdaMerging layer-wise", &composed), ("Concrete AdaMerging", &meta)] {
                let (closed, entropy) = adapted(composed, Granularity::Tensor, rate);
                add(format!("{name}, {rate}"), closed);
                add(format!("{name}, {rate}: entropy"), entropy);
            }
        }
        for parts in [1, 8] {
            let config = AtlasConfig { parts, train: of(&few.train, 100, 0.1), ..few.clone() };
            let (c, report) = atlas(&composed, &config, &data, &Silent, false).unwrap();
            add(format!("aTLAS x {parts}"), family.gap_closed(&composed.merge(&c).unwrap()));
            add(format!("aTLAS x {parts}: training loss"), report.final_loss().unwrap());
        }
        for (method, evaluations) in [(Method::CmaEs, 300), (Method::Coordinate, 100)] {
            let granularity = Granularity::Layer;
            let config = SearchConfig {
                granularity,
                method,
                evaluations,
                seed: Seed(seed),
                ..SearchConfig::default()
            };
            let fitness = &mut |d: &Decoder| Ok(family.dev_nats(d));
            let (c, _) = search(&composed, &config, fitness, None, &Silent, false).unwrap();
            add(format!("search, {method:?}"), family.gap_closed(&composed.merge(&c).unwrap()));
        }
    }
    for (name, values) in &rows {
        eprintln!("{name}: {:.3} of {values:.3?}", values.iter().sum::<f64>() / values.len() as f64);
    }
}
