//! What merges of specialists of the embedded model and of SmolLM2 in five domains are worth. `docs/methods.md` has the figures; the
//! tables also go to `quality-MODEL.json` in cargo's folder for temporary files of tests.
//!
//! `FIREBRICK_PART=adapters/2` measures one kind of specialists at one seed alone, into a file of its own;
//! `FIREBRICK_PART=fine-tunes/0/few-examples` one stage of it.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::path::Path;

use burn::module::Module;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed, Silent};
use firebrick_merge::learned::{
    AdaMergingConfig, AtlasConfig, Composed, ConcreteConfig, Granularity, InnerStep, TaskVector, adamerging,
    atlas, concrete_merging, elect,
};
use firebrick_merge::logits_fusion::{FusionWeight, LogitsFusionConfig, fuse_logits};
use firebrick_merge::task_vectors::{TaskVector as Weights, emr};
use firebrick_merge::twin::{Twin, TwinRouter, mean_hidden};
use firebrick_models::{Decoder, Model, token_tensor};
use firebrick_train::{Draw, Mixture, Rows, Stage, TextData, TrainConfig, domains, fit};
use rayon::prelude::*;

use crate::specialists::{WINDOW, adapted, fine_tuned, settings, text};

/// Rows of a forward pass that is measured.
const ROWS: usize = 12;
/// Examples of a new domain.
const SHOTS: usize = 16;
const DOMAINS: usize = 5;
const SEEDS: u64 = 3;

/// How much is trained and measured.
struct Effort {
    /// Windows of a domain that are measured on, and as many others that scales are chosen and coefficients are fitted on.
    windows: usize,
    /// Steps of training a specialist, eight windows each.
    steps: usize,
    /// Learning rates of fine-tunes and of adapters.
    rates: [f64; 2],
    /// Steps of fitting coefficients.
    fits: usize,
    /// Seeds for which what takes long is measured too, by fine-tunes.
    whole: u64,
}

/// Every `step`-th of `windows`, from the `first` on.
fn every(windows: &[&[u32]], first: usize, step: usize) -> TextData {
    let own: Vec<&[u32]> = windows.iter().copied().skip(first).step_by(step).collect();
    TextData::new(own.concat(), 0)
}

struct Texts {
    train: Vec<TextData>,
    /// Held out of training. Its labels serve the scale of task arithmetic and of TIES, and what is said to have labels.
    choose: Vec<TextData>,
    /// Held out of everything.
    test: Vec<TextData>,
}

impl Texts {
    fn new(model: &Model, windows: usize) -> Texts {
        let halves = |held_out: TextData| {
            let pairs = held_out.spread(WINDOW, 2 * windows);
            [0, 1].map(|half| every(&pairs, half, 2))
        };
        let parts = domains().iter().map(|d| halves(text(model, d, true)));
        let (choose, test) = parts.map(|[choose, test]| (choose, test)).unzip();
        Texts { train: domains().iter().map(|d| text(model, d, false)).collect(), choose, test }
    }

    /// Windows of all domains in equal parts, none of them trained on.
    fn unseen(&self) -> Mixture<'_> {
        let names: Vec<String> = domains().iter().map(|d| d.name.into()).collect();
        let rows = self.choose.iter().map(|t| Rows::windows(t, WINDOW).unwrap());
        let draws = names.iter().map(|n| Draw { weight: Some(1.0), ..Draw::all(n.clone()) });
        let stage = Stage { length: None, temperature: 1.0, draws: draws.collect() };
        Mixture::new(names.iter().cloned().zip(rows).collect(), vec![stage]).unwrap()
    }
}

/// Mean nats of the next token, and mean entropy of its prediction, by `logits: [rows, window, vocab]` of `tokens: [rows, window]`.
fn measured(text: &TextData, logits: &dyn Fn(Tensor<2, Int>) -> Tensor<3>) -> [f64; 2] {
    let windows: Vec<&[u32]> = text.windows(WINDOW).collect();
    let mut sums = [0.0; 2];
    for rows in windows.chunks(ROWS) {
        let ids = token_tensor(rows, &Device::flex());
        let logp = log_softmax(logits(ids.clone()).narrow(1, 0, WINDOW - 1), 2);
        let next = ids.narrow(1, 1, WINDOW - 1).unsqueeze_dim(2);
        let nats = logp.clone().gather(2, next).mean().neg();
        let entropy = (logp.clone().exp() * logp).sum_dim(2).mean().neg();
        let found = [nats, entropy].map(|t| f64::from(t.into_scalar::<f32>()) * rows.len() as f64);
        sums = [sums[0] + found[0], sums[1] + found[1]];
    }
    sums.map(|s| s / windows.len() as f64)
}

fn plain(decoder: &Decoder) -> impl Fn(Tensor<2, Int>) -> Tensor<3> + '_ {
    |ids| decoder.forward(ids, &mut Run::default())
}

/// What one method came to at one seed.
#[derive(serde::Serialize)]
struct Row {
    seed: u64,
    experts: &'static str,
    method: String,
    /// By domain, on what is measured on.
    nats: Vec<f64>,
    entropy: Vec<f64>,
    /// Share of the gap between base and specialist that is closed, mean over the domains.
    closed: f64,
    /// The share of the sum of the gaps.
    pooled: f64,
}

/// Specialists of one kind and seed, and what is to be closed by domain.
struct Family<'a> {
    texts: &'a Texts,
    effort: &'a Effort,
    base: &'a Decoder,
    kind: &'static str,
    seed: u64,
    experts: Vec<Decoder>,
    /// Nats of the base, and of each specialist in its own domain.
    ends: Vec<(f64, f64)>,
}

impl<'a> Family<'a> {
    fn new(texts: &'a Texts, effort: &'a Effort, base: &'a Decoder, kind: &'static str, seed: u64) -> Self {
        let (steps, [all, adapter]) = (effort.steps, effort.rates);
        let train = |text: &TextData| match kind {
            "fine-tunes" => fine_tuned(base, text, &settings(steps, 8, all, seed)),
            _ => adapted(base, text, &settings(steps, 8, adapter, seed)),
        };
        let experts: Vec<Decoder> = texts.train.iter().map(train).collect();
        let nats = |d: &Decoder, t: &TextData| measured(t, &plain(d))[0];
        let ends = texts.test.iter().zip(&experts).map(|(t, own)| (nats(base, t), nats(own, t))).collect();
        Family { texts, effort, base, kind, seed, experts, ends }
    }

    /// A row of what `logits` of each domain (by its place) come to.
    fn row(&self, method: &str, logits: &dyn Fn(usize, Tensor<2, Int>) -> Tensor<3>) -> Row {
        let each = |k: usize| measured(&self.texts.test[k], &|ids| logits(k, ids));
        let (nats, entropy): (Vec<f64>, Vec<f64>) =
            (0..DOMAINS).map(each).map(|[nats, entropy]| (nats, entropy)).unzip();
        let gains = || nats.iter().zip(&self.ends).map(|(n, (base, own))| (base - n, base - own));
        let closed = gains().map(|(gain, gap)| gain / gap).sum::<f64>() / DOMAINS as f64;
        let pooled = gains().map(|g| g.0).sum::<f64>() / gains().map(|g| g.1).sum::<f64>();
        let says = format!("seed {}, {}, {method}", self.seed, self.kind);
        eprintln!("{says}: {closed:.3} (pooled {pooled:.3}), nats {nats:.3?}, entropy {entropy:.3?}");
        Row { seed: self.seed, experts: self.kind, method: method.into(), nats, entropy, closed, pooled }
    }

    fn one(&self, method: &str, decoder: &Decoder) -> Row {
        self.row(method, &|_, ids| plain(decoder)(ids))
    }

    fn each(&self, method: &str, decoders: &[Decoder]) -> Row {
        self.row(method, &|k, ids| plain(&decoders[k])(ids))
    }

    fn vectors(&self) -> Vec<TaskVector> {
        let sites = self.base.sites().all();
        self.experts.iter().map(|e| TaskVector::between(self.base, e, &sites).unwrap()).collect()
    }

    /// `composed` at one scale for all.
    fn scaled(&self, composed: &Composed, scale: f64) -> Decoder {
        let c = composed.coefficients(Granularity::Task, scale, 1, Seed(0));
        composed.merge(&c).unwrap()
    }

    /// The scale of the lowest nats in what is to choose by.
    fn chosen(&self, composed: &Composed, scales: &[f64]) -> f64 {
        let nats = |scale: f64| {
            let merged = self.scaled(composed, scale);
            self.texts.choose.iter().map(|t| measured(t, &plain(&merged))[0]).sum::<f64>()
        };
        let found = scales.iter().map(|s| (nats(*s), *s));
        found.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are scales").1
    }

    /// Few steps of fitting coefficients; with the learning rate the paper's product of the two.
    fn short(&self, train: TrainConfig, learning_rate: f64) -> TrainConfig {
        let (steps, batch, seed) = (self.effort.fits, 2 * DOMAINS, self.seed);
        TrainConfig { steps, batch, window: WINDOW, learning_rate, seed, ..train }
    }

    /// AdaMerging on what is not measured on.
    fn sure(&self, composed: &Composed, granularity: Granularity) -> Decoder {
        let default = AdaMergingConfig::default();
        let train = self.short(default.train.clone(), 1.0 / self.effort.fits as f64);
        let config = AdaMergingConfig { granularity, train, ..default };
        let unseen = self.texts.unseen();
        let (c, _) = adamerging(composed, &config, &unseen, &Silent, false).unwrap();
        composed.merge(&c).unwrap()
    }
}

/// The sum of TIES over elected entries, divided by how many vectors are in it.
fn ties(vectors: Vec<TaskVector>) -> TaskVector {
    let elected = elect(vectors.into_iter().map(|v| v.trimmed(0.2).unwrap()).collect());
    let mean = |site| {
        let sum = |of: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            elected.iter().map(|v| of(v.deltas[site].clone())).reduce(|a, b| a + b).expect("some vectors")
        };
        sum(&|d| d) / sum(&|d| d.not_equal_elem(0.0).float()).clamp_min(1.0)
    };
    TaskVector { deltas: elected[0].deltas.keys().map(|site| (*site, mean(site))).collect() }
}

/// Merges into one model.
fn merges(family: &Family<'_>) -> Vec<Row> {
    let composed = Composed::new(family.base, family.vectors()).unwrap();
    let average = 1.0 / DOMAINS as f64;
    let scale = family.chosen(&composed, &[average, 0.3, 0.4, 0.6, 0.8]);
    vec![
        family.one("average", &family.scaled(&composed, average)),
        family.one("task arithmetic, 0.3", &family.scaled(&composed, 0.3)),
        family.one("task arithmetic, scale chosen", &family.scaled(&composed, scale)),
        family.one("AdaMerging, task-wise", &family.sure(&composed, Granularity::Task)),
        family.one("AdaMerging, layer-wise", &family.sure(&composed, Granularity::Tensor)),
    ]
}

/// The dearer merges into one model.
fn dearer(family: &Family<'_>) -> Vec<Row> {
    let composed = Composed::new(family.base, family.vectors()).unwrap();
    let unseen = family.texts.unseen();
    let mut rows = Vec::new();
    let elected = Composed::new(family.base, vec![ties(family.vectors())]).unwrap();
    let scale = family.chosen(&elected, &[0.5, 1.0, 2.0]);
    rows.push(family.one("TIES, scale chosen", &family.scaled(&elected, scale)));
    let default = AtlasConfig::default();
    let train = family.short(default.train.clone(), default.train.learning_rate);
    let (told, _) = atlas(&composed, &AtlasConfig { train, ..default }, &unseen, &Silent, false).unwrap();
    rows.push(family.one("layer-wise, by labels (aTLAS)", &composed.merge(&told).unwrap()));
    let masked = |inner| {
        let default = ConcreteConfig::default();
        let train = family.short(default.train.clone(), 2.0 / family.effort.fits as f64);
        let config = ConcreteConfig { inner, train, ..default };
        let (mask, _) = concrete_merging(&composed, &config, &unseen, &Silent, false).unwrap();
        composed.masked(&mask.sample(Seed(family.seed)))
    };
    rows.push(family.one("Concrete task arithmetic, 0.3", &family.scaled(&masked(None), 0.3)));
    let inner = InnerStep { granularity: Granularity::Tensor, learning_rate: 0.1, rows: 1 };
    let surer = family.sure(&masked(Some(inner)), Granularity::Tensor);
    rows.push(family.one("Concrete AdaMerging, layer-wise", &surer));
    rows
}

/// One model and what each specialist has beside it.
fn beside(family: &Family<'_>) -> Vec<Row> {
    let device = Device::flex();
    let config = family.base.config();
    // As few at a time as can be: those of SmolLM2 are 1.1 GB each.
    let weights = |decoder: &Decoder| Weights::of(decoder).unwrap();
    let base = weights(family.base);
    let tasks: Vec<Weights> =
        family.experts.iter().map(|e| Weights::between(&base, &weights(e)).unwrap()).collect();

    let unified = emr(&tasks).unwrap();
    let of = |k| base.plus(&unified.task(k).unwrap(), 1.0).unwrap().decoder(config.clone(), &device).unwrap();
    let told = RefCell::new((0, of(0)));
    let mut rows = vec![family.row("EMR-Merging, told the domain", &|k, ids| {
        if told.borrow().0 != k {
            told.replace((k, of(k)));
        }
        plain(&told.borrow().1)(ids)
    })];
    drop((told, unified));

    let shared = tasks.iter().fold(base.clone(), |sum, t| sum.plus(t, 0.3).unwrap());
    drop((base, tasks));
    let experts: Vec<Weights> = family.experts.iter().map(weights).collect();
    let twin = Twin::new(shared, &experts, |_, m| m.rows().min(m.cols()) / 10).unwrap();
    drop(experts);
    let decoder = twin.shared.decoder(config.clone(), &device).unwrap();
    let bank = twin.bank(config, &device);
    let bricks: [&dyn Brick; 1] = [&bank];
    let windows: Vec<&[u32]> = family.texts.train.iter().flat_map(|t| t.spread(WINDOW, 32)).collect();
    let labels: Vec<usize> = (0..windows.len()).map(|i| i / 32).collect();
    let mut reads = vec![("Twin-Merging", WINDOW)];
    if family.effort.whole == SEEDS {
        reads.push(("Twin-Merging, routed by 16 tokens", 16));
    }
    for (method, read) in reads {
        // What the router reads of a window.
        let seen = |ids: Tensor<2, Int>| mean_hidden(&decoder, ids.narrow(1, 0, read));
        let features = seen(token_tensor(&windows, &device));
        let router = TwinRouter::fit(features, &labels, DOMAINS, 60, 5e-4, Seed(family.seed)).unwrap();
        rows.push(family.row(method, &|_, ids| {
            let mut run = Run::new(&bricks);
            run.insert(router.gates(seen(ids.clone())));
            decoder.forward(ids, &mut run)
        }));
    }
    rows
}

/// Sixteen windows of a domain: coefficients of the other domains' vectors at the paper's learning rate, and adapters at the better of
/// two, by the nats in what is to choose by.
fn few_examples(family: &Family<'_>) -> Vec<Row> {
    let all = family.vectors();
    let shots = |k: usize| {
        let windows = family.texts.train[k].spread(WINDOW, SHOTS * SEEDS as usize);
        every(&windows, family.seed as usize, SEEDS as usize)
    };
    let config = |rate| settings(24, 4, rate, family.seed);
    let composing = |k: usize, rate: f64| {
        let others = (0..DOMAINS).filter(|i| *i != k).map(|i| all[i].clone()).collect();
        let composed = Composed::new(family.base, others).unwrap();
        let train = TrainConfig { warmup: 0, weight_decay: 0.1, ..config(rate) };
        let (config, shots) = (AtlasConfig { train, ..AtlasConfig::default() }, shots(k));
        let data = Mixture::text(&shots, WINDOW).unwrap();
        let (c, _) = atlas(&composed, &config, &data, &Silent, false).unwrap();
        composed.merge(&c).unwrap()
    };
    let adapting = |k: usize, rate: f64| adapted(family.base, &shots(k), &config(rate));
    let better = |learn: &dyn Fn(usize, f64) -> Decoder, rates: &[f64], k: usize| {
        let found = rates.iter().map(|rate| {
            let decoder = learn(k, *rate);
            let [nats, _] = measured(&family.texts.choose[k], &plain(&decoder));
            (nats, decoder)
        });
        found.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are rates").1
    };
    let each = |learn: &dyn Fn(usize, f64) -> Decoder, rates: &[f64]| -> Vec<Decoder> {
        (0..DOMAINS).map(|k| better(learn, rates, k)).collect()
    };
    vec![
        family.each("aTLAS, 16 examples", &each(&composing, &[AtlasConfig::default().train.learning_rate])),
        family.each("LoRA, 16 examples", &each(&adapting, &[1.0, 0.2].map(|r| r * family.effort.rates[1]))),
    ]
}

/// Three eighths of the layers of `base`, taught its predictions on windows of all domains, which are not its labels.
fn smaller(base: &Decoder, texts: &Texts, learning_rate: f64, seed: u64) -> Decoder {
    let teacher = base.clone().train().no_grad();
    let layers = base.config().layers;
    let fewer = 3 * layers / 8;
    let kept: Vec<usize> = (0..fewer).map(|i| i * (layers - 1) / (fewer - 1)).collect();
    let student = base.clone().with_layers(&kept).train().trainable();
    let loss = &mut |d: &Decoder, ids: Tensor<2, Int>, _| {
        let wanted = softmax(teacher.forward(ids.clone(), &mut Run::default()), 2);
        let found = log_softmax(d.forward(ids, &mut Run::default()), 2);
        (wanted * found).sum_dim(2).mean().neg()
    };
    let data = TextData::interleave(&texts.train, WINDOW);
    fit(student, &settings(80, 8, learning_rate, seed), &data, loss, &Silent, false).unwrap().0.valid()
}

/// `large` shifted by what tuning did to `small`.
fn fused(
    large: &Decoder,
    small: [&Decoder; 2],
    config: &LogitsFusionConfig,
    ids: Tensor<2, Int>,
) -> Tensor<3> {
    let vocab = large.config().vocab;
    let read = |d: &Decoder| plain(d)(ids.clone()).into_data().try_into_vec_as::<f32>().unwrap();
    let (mut logits, [base, expert]) = (read(large), small.map(read));
    let steps = logits.par_chunks_mut(vocab).zip(base.par_chunks(vocab)).zip(expert.par_chunks(vocab));
    steps.for_each(|((large, base), expert)| {
        fuse_logits(large, base, &[expert], config).unwrap();
    });
    let [rows, window] = ids.dims();
    Tensor::from_data(TensorData::new(logits, [rows, window, vocab]), &ids.device())
}

/// Small experts in place of the fine-tunes of the base.
fn weak_to_strong(family: &Family<'_>) -> Vec<Row> {
    let learning_rate = 2.0 * family.effort.rates[0];
    let small = smaller(family.base, family.texts, learning_rate, family.seed);
    let tune = |text: &TextData| fine_tuned(&small, text, &settings(24, 8, learning_rate, family.seed));
    let experts: Vec<Decoder> = family.texts.train.iter().map(tune).collect();
    let by = |method: &str, weight: FusionWeight| {
        let config = LogitsFusionConfig { weight, ..LogitsFusionConfig::default() };
        family.row(method, &|k, ids| fused(family.base, [&small, &experts[k]], &config, ids))
    };
    vec![
        family.one("small base", &small),
        family.each("small experts", &experts),
        by("Dynamic Logits Fusion", LogitsFusionConfig::default().weight),
        by("proxy tuning", FusionWeight::Fixed(vec![1.0])),
    ]
}

/// A line for each method: the mean share by seed, the pooled share by seed, and the mean entropy.
fn table(rows: &[Row]) -> String {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let mut table = String::new();
    let mut seen = Vec::new();
    for Row { experts, method, .. } in rows {
        if seen.contains(&(experts, method)) {
            continue;
        }
        seen.push((experts, method));
        let of = |f: &dyn Fn(&Row) -> f64| -> Vec<f64> {
            rows.iter().filter(|r| (&r.experts, &r.method) == (experts, method)).map(f).collect()
        };
        let (closed, pooled, entropy) = (of(&|r| r.closed), of(&|r| r.pooled), of(&|r| mean(&r.entropy)));
        let shares = [closed, pooled].map(|s| format!("{:.3} of {s:.3?}", mean(&s)));
        let [closed, pooled] = shares;
        let entropy = mean(&entropy);
        writeln!(table, "{experts:10} {method:34} {closed}, pooled {pooled}, entropy {entropy:.3}").unwrap();
    }
    table
}

type Measure = fn(&Family<'_>) -> Vec<Row>;

/// What is measured in one go. Of families that are not whole, the first two.
const STAGES: [(&str, Measure); 5] = [
    ("beside", beside),
    ("merges", merges),
    ("dearer", dearer),
    ("few-examples", few_examples),
    ("weak-to-strong", weak_to_strong),
];

#[expect(clippy::disallowed_methods, reason = "a test takes no arguments")]
fn measure(name: &str, model: &Model, effort: &Effort) {
    let texts = Texts::new(model, effort.windows);
    let base = &model.decoder;
    let part = std::env::var("FIREBRICK_PART").ok();
    let suffix = part.iter().map(|p| format!("-{}", p.replace('/', "-"))).collect::<String>();
    let json = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("quality-{name}{suffix}.json"));
    let mut rows = Vec::new();
    for (seed, kind) in (0..SEEDS).flat_map(|seed| ["fine-tunes", "adapters"].map(|kind| (seed, kind))) {
        let family = format!("{kind}/{seed}");
        let whole = seed < effort.whole && kind == "fine-tunes";
        let mut stages = STAGES[..if whole { STAGES.len() } else { 2 }].to_vec();
        if let Some(asked) = part.as_ref().filter(|p| **p != family) {
            stages = STAGES.to_vec();
            stages.retain(|(stage, _)| *asked == format!("{family}/{stage}"));
        }
        if stages.is_empty() {
            continue;
        }
        let family = Family::new(&texts, effort, base, kind, seed);
        let ends = [family.one("base", base), family.each("specialists", &family.experts)];
        for (row, share) in ends.iter().zip([0.0, 1.0]) {
            let off = [row.closed, row.pooled].map(|s| (s - share).abs());
            assert!(off.iter().all(|o| *o < 1e-9), "{}", row.method);
        }
        rows.extend(ends);
        for (_, stage) in stages {
            rows.extend(stage(&family));
            std::fs::write(&json, serde_json::to_string_pretty(&rows).unwrap()).unwrap();
        }
    }
    assert!(!rows.is_empty(), "FIREBRICK_PART is a kind and a seed, and may name a stage: adapters/2/beside");
    println!("{}", table(&rows));
}

#[test]
#[ignore = "a quarter of an hour on two cores: a measurement"]
fn what_merges_of_five_specialists_are_worth() {
    let model = Model::embedded(&Device::flex()).unwrap();
    let effort = Effort { windows: 24, steps: 24, rates: [1e-3, 1e-2], fits: 30, whole: SEEDS };
    measure("embedded", &model, &effort);
}

#[test]
#[ignore = "an hour and a half on two cores: a measurement"]
fn what_merges_of_five_specialists_of_smollm2_are_worth() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../../target/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = Model::open(&path, &Device::flex()).expect("`cargo xtask model smollm2` fetches it");
    let effort = Effort { windows: 8, steps: 12, rates: [1e-4, 2e-3], fits: 10, whole: 1 };
    measure("smollm2", &model, &effort);
}
