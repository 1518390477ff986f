//! Weights of merges that are searched, from a configuration to the file that is written.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use firebrick_core::{Run, Seed, Silent};
use firebrick_merge::learned::{Granularity, Method, SearchConfig};
use firebrick_merge::{Merge, MergeError, SearchText, SearchTexts, TextNats, WeightReport};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType, Model};
use firebrick_peft::{LoraConfig, fit_lora, hf};
use firebrick_tensor::stream::Executor;
use firebrick_train::{TextData, TrainConfig, fit};

const WINDOW: usize = 24;
const BATCH: usize = 16;

/// A tiny base that speaks of both subjects a little, a full fine-tune on the first and an adapter on the second.
pub struct Suite {
    folder: tempfile::TempDir,
    pub tokenizer: Tokenizer,
}

fn sentences(words: [&str; 4], count: usize) -> String {
    let one = |i: usize| {
        let word = |k: usize| words[(i * 7 + k * k + i / 4) % 4];
        format!("The {} follows the {} and the {}.\n", word(0), word(1), word(2))
    };
    (0..count).map(one).collect()
}

impl Suite {
    pub fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let texts = [
            sentences(["lamp", "river", "stone", "falcon"], 300),
            sentences(["proof", "sum", "root", "prime"], 300),
        ];
        let tokenizer = train_bpe(texts.iter().map(String::as_str), 300).unwrap();
        let config = DecoderConfig { layers: 4, ..DecoderConfig::tiny(tokenizer.vocab_size()) };
        let device = Device::flex();
        let base = Decoder::random(config, Seed(seed), &device).unwrap();
        let data: Vec<TextData> =
            texts.iter().map(|text| TextData::from_text(text, &tokenizer).unwrap()).collect();
        let settings = |steps, learning_rate| TrainConfig {
            steps,
            batch: 4,
            window: WINDOW,
            learning_rate,
            seed,
            ..TrainConfig::default()
        };
        let full = |decoder: Decoder, text: &TextData, steps| {
            let loss = &mut |decoder: &Decoder, tokens, _| decoder.nll(tokens, &mut Run::default()).mean();
            let decoder = decoder.train().trainable();
            fit(decoder, &settings(steps, 1e-2), text, loss, &Silent, false).unwrap().0.valid()
        };
        let both =
            TextData::from_text(&(texts[0][..2000].to_owned() + &texts[1][..2000]), &tokenizer).unwrap();
        let base = full(base, &both, 40);
        let first = full(base.clone(), &data[0], 30);
        let bank = LoraConfig { rank: 4, ..LoraConfig::default() }
            .init(base.sites(), &base.sites().block_linears(), Seed(seed), &device.clone().autodiff())
            .unwrap();
        let second =
            fit_lora(&base, &[], bank, &settings(40, 1e-2), &data[1], &Silent, false).unwrap().0.valid();
        let suite = Suite { folder, tokenizer };
        for (name, decoder) in [("base", &base), ("first", &first)] {
            Export::decoder(name, decoder, &suite.tokenizer, ExportType::F32)
                .write(&suite.path(name), &Executor::default())
                .unwrap();
        }
        hf::save(&second, base.sites(), "base", &suite.path("second")).unwrap();
        for (name, text) in ["first.txt", "second.txt"].iter().zip(&texts) {
            std::fs::write(suite.path(name), text).unwrap();
        }
        suite
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A configuration with every `@name` made a path.
    pub fn open(&self, yaml: &str) -> Merge {
        let file = self.path("merge.yml");
        std::fs::write(&file, yaml.replace('@', &format!("{}/", self.folder.path().display()))).unwrap();
        Merge::open(&file).unwrap()
    }

    fn texts(&self) -> (Vec<SearchText>, Vec<SearchText>) {
        let read = |name| SearchText::read_in_two(&self.path(name), &self.tokenizer, WINDOW, 12).unwrap();
        ["first.txt", "second.txt"].map(read).into_iter().unzip()
    }

    fn search(
        &self,
        merge: &Merge,
        config: &SearchConfig,
        resume: bool,
    ) -> Result<(Merge, WeightReport), MergeError> {
        let (search, held_out) = self.texts();
        let texts = SearchTexts { search: &search, held_out: &held_out, batch: BATCH };
        merge.search_weights(texts, config, &Device::flex(), &Silent, resume)
    }

    /// The bytes of the tensors that a merge writes.
    pub fn write(&self, merge: &Merge, out: &str) -> Vec<u8> {
        let executor = Executor { overwrite: true, ..Executor::default() };
        executor.run(merge, &merge.target(&self.path(out)).unwrap()).unwrap();
        std::fs::read(self.path(out).join("model.safetensors")).unwrap()
    }
}

pub const TASKS: &str = "merge_method: task_arithmetic\nbase_model: '@base'\nmodels:\n- model: '@first'\n  parameters: {weight: 0.6}\n- model: '@base+@second'\n  parameters: {weight: 0.4}\n";
const LINEAR: &str = "merge_method: linear\nmodels:\n- model: '@base'\n  parameters: {weight: 2}\n- model: '@first'\n  parameters: {weight: 1}\n- model: '@base+@second'\n  parameters: {weight: 1}\n";

fn config(method: Method, evaluations: usize, seed: u64) -> SearchConfig {
    SearchConfig {
        granularity: Granularity::LayerGroups(2),
        method,
        evaluations,
        seed: Seed(seed),
        ..SearchConfig::default()
    }
}

#[test]
fn found_weights_are_written_and_so_is_a_configuration_that_gives_the_same_bytes() {
    for seed in 0..3 {
        let suite = Suite::new(seed);
        for (yaml, method, evaluations) in
            [(TASKS, Method::CmaEs, 89), (TASKS, Method::Coordinate, 60), (LINEAR, Method::CmaEs, 89)]
        {
            let merge = suite.open(yaml);
            let (found, report) = suite.search(&merge, &config(method, evaluations, seed), false).unwrap();
            let costs: Vec<(&str, f64)> =
                report.search.comparisons.iter().map(|c| (c.name.as_str(), c.cost)).collect();
            println!("seed {seed}, {}, {method:?}: {costs:.4?}", report.method);
            let best = costs[0].1;
            assert!(costs[1..].iter().all(|(_, cost)| best <= *cost), "{costs:?}");
            assert!(best < costs[1].1 - 1e-3, "better than the configuration: {costs:?}");
            let unseen: Vec<f64> = report.search.comparisons.iter().map(|c| c.held_out.unwrap()).collect();
            println!("  held out {unseen:.4?}");
            assert!(unseen[0] < unseen[1], "held out too");

            // What was measured is what is written.
            let bytes = suite.write(&found, "found");
            let written = Model::open(&suite.path("found"), &Device::flex()).unwrap().decoder;
            for (text, told) in suite.texts().0.iter().zip(&report.texts) {
                let nats = text.nats(&written, BATCH).unwrap();
                assert!((nats - told.found).abs() < 1e-5, "{nats} {told:?}");
            }
            let sum = |of: fn(&TextNats) -> f64| report.texts[..2].iter().map(of).sum::<f64>();
            assert!(sum(|t| t.found) < sum(|t| t.start) && sum(|t| t.start) < sum(|t| t.base));
            let file = suite.path("again.yaml");
            std::fs::write(&file, found.text()).unwrap();
            assert!(suite.write(&Merge::open(&file).unwrap(), "again") == bytes, "{}", found.text());
            assert!(suite.write(&merge, "start") != bytes, "control");
        }
    }
}

#[test]
fn the_search_begins_at_the_weights_of_the_configuration() {
    let suite = Suite::new(0);
    let start = |yaml: &str| {
        let (_, report) = suite.search(&suite.open(yaml), &config(Method::Coordinate, 1, 0), false).unwrap();
        let start = &report.search.comparisons[1];
        assert_eq!(start.name, "start");
        (start.coefficients.clone(), report)
    };
    assert_eq!(start(TASKS).0, [[0.6, 0.6], [0.4, 0.4]]);
    // Two of four layers, and the embedding with the first ones.
    let gradient = TASKS.replace("{weight: 0.6}", "{weight: [0, 0.3, 0.6, 0.9]}");
    let found = start(&gradient).0;
    assert!(found[0][0] < 0.2 && found[0][1] > 0.6 && found[1] == [0.4, 0.4], "{found:?}");
    let scaled = TASKS.to_owned() + "parameters: {normalize: true, lambda: 0.5}\n";
    assert_eq!(start(&scaled).0, [[0.3, 0.3], [0.2, 0.2]]);
    let (linear, report) = start(LINEAR);
    assert_eq!(linear, [[0.25, 0.25], [0.25, 0.25]]);
    // The model of these weights is the one that the configuration writes.
    for (yaml, report) in [(LINEAR, report), (&scaled, start(&scaled).1)] {
        suite.write(&suite.open(yaml), "start");
        let written = Model::open(&suite.path("start"), &Device::flex()).unwrap().decoder;
        for (text, told) in suite.texts().0.iter().zip(&report.texts) {
            assert!((text.nats(&written, BATCH).unwrap() - told.start).abs() < 1e-5, "{told:?}");
        }
    }
}

#[test]
fn a_search_goes_on_to_the_same_weights_and_knows_its_models_and_texts() {
    let suite = Suite::new(1);
    let merge = suite.open(TASKS);
    let whole = suite.search(&merge, &config(Method::CmaEs, 41, 3), false).unwrap();
    let state = suite.path("state.json");
    let kept = |evaluations, seed| SearchConfig {
        state: Some(state.clone()),
        ..config(Method::CmaEs, evaluations, seed)
    };
    suite.search(&merge, &kept(17, 3), false).unwrap();
    let resumed = suite.search(&merge, &kept(41, 3), true).unwrap();
    assert_eq!((resumed.0.text(), &resumed.1.search), (whole.0.text(), &whole.1.search));
    let other = suite.search(&merge, &config(Method::CmaEs, 41, 4), false).unwrap();
    assert_ne!(other.0.text(), whole.0.text(), "control: another seed");
    let refused = |merge: &Merge| suite.search(merge, &kept(41, 3), true).unwrap_err().to_string();
    assert!(refused(&suite.open(LINEAR)).contains("another search"));
    assert!(refused(&suite.open(&TASKS.replace("0.6", "0.5"))).contains("another search"), "another start");
    std::fs::write(suite.path("first.txt"), sentences(["lamp", "river", "stone", "garden"], 300)).unwrap();
    assert!(refused(&merge).contains("another search"), "another text");
}

#[test]
fn what_cannot_be_searched_is_refused_with_every_reason() {
    let suite = Suite::new(0);
    let problems = |yaml: &str, config: &SearchConfig| suite.open(yaml).search_problems(config);
    let fine = config(Method::CmaEs, 20, 0);
    assert!(problems(TASKS, &fine).is_empty());
    let ties = TASKS.replace("task_arithmetic", "ties");
    let found = problems(&ties, &fine);
    assert!(found.len() == 1 && found[0].contains("task_arithmetic and linear"), "{found:?}");
    // Two models and two runs of layers: 4 weights, 8 points a generation.
    assert!(problems(TASKS, &config(Method::CmaEs, 9, 0)).is_empty());
    let few = problems(TASKS, &config(Method::CmaEs, 8, 0));
    assert!(few.len() == 1 && few[0].contains("one generation of 8 for 4 weights"), "{few:?}");
    assert!(problems(TASKS, &config(Method::Coordinate, 1, 0)).is_empty());
    let tensors = SearchConfig { granularity: Granularity::Tensor, ..fine.clone() };
    assert_eq!(problems(TASKS, &tensors).len(), 1);
    let slices = "merge_method: passthrough\nslices:\n- sources: [{model: '@base', layer_range: [0, 2]}]\n";
    let found = problems(slices, &fine);
    assert_eq!(found.len(), 3, "{found:?}");
    for part in ["`merge_method: passthrough`", "slices", "no model beside"] {
        assert!(found.iter().any(|p| p.contains(part)), "{part}: {found:?}");
    }
    let error = suite.search(&suite.open(slices), &fine, false).unwrap_err();
    assert!(matches!(&error, MergeError::Settings { problems } if problems.len() == 3), "{error}");
}

#[test]
fn texts_are_cut_in_parts_that_share_nothing() {
    let suite = Suite::new(0);
    let path = suite.path("first.txt");
    let all = SearchText::read(&path, &suite.tokenizer, WINDOW, 10_000).unwrap();
    let (search, held_out) = SearchText::read_in_two(&path, &suite.tokenizer, WINDOW, 10_000).unwrap();
    assert_eq!(search.tokens() + held_out.tokens(), all.tokens());
    assert_eq!(held_out.tokens() / WINDOW, all.tokens() / WINDOW / 5);
    let (some, other) = SearchText::read_in_two(&path, &suite.tokenizer, WINDOW, 3).unwrap();
    assert_eq!((some.tokens(), other.tokens()), (3 * WINDOW, 3 * WINDOW));
    let base = Model::open(&suite.path("base"), &Device::flex()).unwrap().decoder;
    let nats = |text: &SearchText| text.nats(&base, BATCH).unwrap() * text.tokens() as f64;
    assert!((nats(&search) + nats(&held_out) - nats(&all)).abs() < 1e-5 * nats(&all));

    let line =
        |i: usize| format!("{{\"prompt\": \"The lamp {i}\", \"completion\": \" follows the river {i}.\"}}\n");
    let path = suite.path("lines.jsonl");
    std::fs::write(&path, (0..40).map(line).collect::<String>()).unwrap();
    let (search, held_out) = SearchText::read_in_two(&path, &suite.tokenizer, WINDOW, 100).unwrap();
    assert!(search.tokens() > held_out.tokens() && nats(&search) > 0.0 && nats(&held_out) > 0.0);
    std::fs::write(suite.path("short.txt"), "The lamp.").unwrap();
    let short = |cut: bool| match cut {
        true => SearchText::read_in_two(&suite.path("short.txt"), &suite.tokenizer, WINDOW, 3).map(|_| ()),
        false => SearchText::read(&suite.path("short.txt"), &suite.tokenizer, WINDOW, 3).map(|_| ()),
    };
    assert!(short(false).unwrap_err().to_string().contains("one window"));
    assert!(short(true).unwrap_err().to_string().contains("two windows"));
    assert!(SearchText::read(Path::new("nowhere.txt"), &suite.tokenizer, WINDOW, 3).is_err());
}
