//! Learned and searched merges of specialists of the embedded model: measurements, of which `docs/methods.md` has the figures.

use burn::module::Module;
use burn::tensor::Device;
use firebrick_core::{Seed, Silent};
use firebrick_merge::learned::{
    AdaMergingConfig, AtlasConfig, Coefficients, Composed, ConcreteConfig, Granularity, InnerStep,
    SearchConfig, TaskVector, adamerging, atlas, concrete_merging, elect, search,
};
use firebrick_models::{Decoder, Model};
use firebrick_peft::{LoraBank, LoraConfig, fit_lora};
use firebrick_train::{Domain, Draw, Mixture, Rows, Stage, TextData, TrainConfig, domains, held_out_loss};

const WINDOW: usize = 64;

/// The embedded model, specialists of it, and their texts.
struct Suite {
    base: Decoder,
    experts: Vec<Decoder>,
    train: Vec<TextData>,
    held_out: Vec<TextData>,
    /// Nats of the base, and of each specialist on its own text.
    ends: Vec<(f64, f64)>,
    seed: u64,
}

fn lora(base: &Decoder, text: &TextData, config: &TrainConfig) -> Decoder {
    let device = base.device().autodiff();
    let bank: LoraBank = LoraConfig::default()
        .init(base.sites(), &base.sites().block_linears(), Seed(config.seed), &device)
        .unwrap();
    let (bank, _) = fit_lora(base, &[], bank, config, text, &Silent, false).unwrap();
    bank.valid().merge(base.clone(), 1.0).unwrap()
}

fn settings(steps: usize, batch: usize, learning_rate: f64, seed: u64) -> TrainConfig {
    TrainConfig { steps, batch, window: WINDOW, learning_rate, seed, ..TrainConfig::default() }
}

impl Suite {
    fn new(seed: u64) -> Self {
        let Model { decoder: base, tokenizer, .. } = Model::embedded(&Device::flex()).unwrap();
        let cut = |documents: Vec<&'static str>, tokens: usize| {
            let text = TextData::from_documents(documents, &tokenizer).unwrap();
            TextData::new(text.ids[..tokens.min(text.ids.len())].to_vec(), 0)
        };
        let train: Vec<TextData> =
            domains().iter().map(|d: &Domain| cut(d.train_documents(), 40_000)).collect();
        let held_out: Vec<TextData> = domains().iter().map(|d| cut(d.held_out_documents(), 2048)).collect();
        let experts: Vec<Decoder> =
            train.iter().map(|t| lora(&base, t, &settings(40, 8, 1e-2, seed))).collect();
        let mut suite = Suite { base, experts, train, held_out, ends: Vec::new(), seed };
        let base = suite.nats(&suite.base);
        let own = (0..suite.experts.len()).map(|k| suite.nats_of(&suite.experts[k], k));
        suite.ends = base.into_iter().zip(own).collect();
        suite
    }

    fn nats_of(&self, decoder: &Decoder, k: usize) -> f64 {
        held_out_loss(decoder, &[], &Rows::windows(&self.held_out[k], WINDOW).unwrap(), 16, &Silent).unwrap()
    }

    fn nats(&self, decoder: &Decoder) -> Vec<f64> {
        (0..self.held_out.len()).map(|k| self.nats_of(decoder, k)).collect()
    }

    /// The share of the gap between base and specialists that is closed, summed over the domains: the mean of the shares would be
    /// led by domains whose gap is next to nothing.
    fn closed(&self, decoder: &Decoder) -> f64 {
        let gained: f64 = self.nats(decoder).iter().zip(&self.ends).map(|(n, (base, _))| base - n).sum();
        gained / self.ends.iter().map(|(base, own)| base - own).sum::<f64>()
    }

    fn vectors(&self) -> Vec<TaskVector> {
        let sites = self.base.sites().block_linears();
        self.experts.iter().map(|e| TaskVector::between(&self.base, e, &sites).unwrap()).collect()
    }

    fn mixture(&self) -> Mixture<'_> {
        let names: Vec<String> = (0..self.train.len()).map(|k| k.to_string()).collect();
        let sources = names.iter().cloned().zip(self.train.iter().map(|t| Rows::windows(t, WINDOW).unwrap()));
        let draws = names.iter().map(|n| Draw { weight: Some(1.0), ..Draw::all(n.clone()) });
        let stage = Stage { length: None, temperature: 1.0, draws: draws.collect() };
        Mixture::new(sources.collect(), vec![stage]).unwrap()
    }

    fn isotropic(&self, composed: &Composed, scale: f64) -> f64 {
        let c = composed.coefficients(Granularity::Task, scale, 1, Seed(0));
        self.merged(composed, &c)
    }

    fn merged(&self, composed: &Composed, c: &Coefficients) -> f64 {
        self.closed(&composed.merge(c).unwrap())
    }

    fn ada(&self, granularity: Granularity) -> AdaMergingConfig {
        let default = AdaMergingConfig::default();
        // Steps times rate as in the paper.
        let train = TrainConfig {
            schedule: default.train.schedule,
            warmup: 0,
            weight_decay: 0.0,
            clip: None,
            ..settings(50, 10, 2e-2, self.seed)
        };
        AdaMergingConfig { granularity, train, ..default }
    }

    fn adapted(&self, composed: &Composed, granularity: Granularity) -> f64 {
        let (c, report) =
            adamerging(composed, &self.ada(granularity), &self.mixture(), &Silent, false).unwrap();
        eprintln!("entropy {:.3?} to {:.3?}", report.first_loss(), report.final_loss());
        self.merged(composed, &c)
    }

    fn masked(&self, composed: &Composed, inner: Option<InnerStep>) -> Composed {
        let train = self.ada(Granularity::Tensor).train;
        let config = ConcreteConfig {
            inner,
            train: TrainConfig { learning_rate: 4e-2, ..train },
            ..ConcreteConfig::default()
        };
        let (mask, _) = concrete_merging(composed, &config, &self.mixture(), &Silent, false).unwrap();
        composed.masked(&mask.sample(Seed(self.seed)))
    }
}

#[test]
#[ignore = "minutes on two cores: a measurement"]
fn specialists_of_the_embedded_model_are_merged() {
    let mut rows: Vec<(String, Vec<f64>)> = Vec::new();
    let mut add = |name: &str, value: f64| {
        eprintln!("{name}: {value:.3}");
        match rows.iter_mut().find(|(n, _)| n == name) {
            Some((_, values)) => values.push(value),
            None => rows.push((name.into(), vec![value])),
        }
    };
    for seed in 0..3 {
        let suite = Suite::new(seed);
        eprintln!("seed {seed}: base and own nats {:.3?}", suite.ends);
        let composed = Composed::new(&suite.base, suite.vectors()).unwrap();
        add("average", suite.isotropic(&composed, 0.2));
        add("task arithmetic 0.3", suite.isotropic(&composed, 0.3));
        let grid = [0.1, 0.2, 0.3, 0.4, 0.6].map(|s| suite.isotropic(&composed, s));
        eprintln!("grid {grid:.3?}");
        add("task arithmetic, best of 5 scales", grid.into_iter().fold(f64::MIN, f64::max));
        add("AdaMerging task-wise", suite.adapted(&composed, Granularity::Task));
        add("AdaMerging layer-wise", suite.adapted(&composed, Granularity::Tensor));
        let trimmed = suite.vectors().into_iter().map(|v| v.trimmed(0.2).unwrap()).collect();
        let plus = Composed::new(&suite.base, elect(trimmed)).unwrap();
        add("AdaMerging++ layer-wise", suite.adapted(&plus, Granularity::Tensor));
        add("Concrete task arithmetic", suite.isotropic(&suite.masked(&composed, None), 0.3));
        let inner = InnerStep { granularity: Granularity::Tensor, learning_rate: 0.1, rows: 2 };
        add("Concrete AdaMerging", suite.adapted(&suite.masked(&composed, Some(inner)), Granularity::Tensor));
        for parts in [1, 8] {
            let train = TrainConfig { warmup: 0, weight_decay: 0.1, ..settings(50, 10, 0.05, suite.seed) };
            let config = AtlasConfig { parts, train, ..AtlasConfig::default() };
            let (c, _) = atlas(&composed, &config, &suite.mixture(), &Silent, false).unwrap();
            add(&format!("aTLAS x {parts}, with labels"), suite.merged(&composed, &c));
        }
        let dev: Vec<TextData> =
            suite.train.iter().map(|t| TextData::new(t.ids[..512].to_vec(), 0)).collect();
        let config = SearchConfig { evaluations: 60, seed: Seed(seed), ..SearchConfig::default() };
        let fitness = &mut |d: &Decoder| {
            let nats = |t: &TextData| held_out_loss(d, &[], &Rows::windows(t, WINDOW).unwrap(), 16, &Silent);
            dev.iter().map(nats).sum::<Result<f64, _>>().map(|s| s / 5.0).map_err(Into::into)
        };
        let held_out = &mut |d: &Decoder| Ok(suite.closed(d));
        let (_, report) = search(&composed, &config, fitness, Some(held_out), &Silent, false).unwrap();
        for c in &report.comparisons {
            add(&format!("search, 4 layer groups: {}", c.name), c.held_out.unwrap());
        }
    }
    for (name, values) in &rows {
        eprintln!("{name}: mean {:.3} of {values:.3?}", values.iter().sum::<f64>() / values.len() as f64);
    }
}

#[test]
#[ignore = "minutes on two cores: a measurement"]
fn few_examples_of_a_new_domain() {
    let mut means: Vec<(String, Vec<f64>)> = Vec::new();
    for seed in 0..3 {
        let suite = Suite::new(seed);
        let all = suite.vectors();
        for k in 0..all.len() {
            let others: Vec<TaskVector> =
                (0..all.len()).filter(|i| *i != k).map(|i| all[i].clone()).collect();
            let composed = Composed::new(&suite.base, others).unwrap();
            let from = 16 * WINDOW * (seed as usize + 1);
            let shots = TextData::new(suite.train[k].ids[from..from + 16 * WINDOW].to_vec(), 0);
            let (base, _) = suite.ends[k];
            let gap: f64 = suite.ends.iter().map(|(base, own)| base - own).sum();
            let mut add = |name: String, decoder: &Decoder| {
                // Shares of the whole gap, which add up over the domains.
                let share = (base - suite.nats_of(decoder, k)) / gap;
                match means.iter_mut().find(|(n, _)| *n == name) {
                    Some((_, values)) => values.push(share),
                    None => means.push((name, vec![share])),
                }
            };
            for (parts, rate) in [(1, 0.1), (1, 0.02), (8, 0.02)] {
                let train = TrainConfig { warmup: 0, weight_decay: 0.1, ..settings(40, 4, rate, seed) };
                let config = AtlasConfig { parts, train, ..AtlasConfig::default() };
                let data = Mixture::text(&shots, WINDOW).unwrap();
                let (c, _) = atlas(&composed, &config, &data, &Silent, false).unwrap();
                add(format!("aTLAS x {parts}, rate {rate}"), &composed.merge(&c).unwrap());
            }
            for rate in [1e-2, 2e-3] {
                add(format!("LoRA, rate {rate}"), &lora(&suite.base, &shots, &settings(40, 4, rate, seed)));
            }
        }
        eprintln!("seed {seed}: {means:.3?}");
    }
    for (name, values) in &means {
        eprintln!("{name}: {:.3} of the gap", values.iter().sum::<f64>() / 3.0);
    }
}
