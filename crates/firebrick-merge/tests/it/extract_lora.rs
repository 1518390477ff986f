//! Adapters of the difference of two models, back and forth.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::tensor::Device;
use firebrick_core::{Event, LayerPlan, Progress, Seed, Silent, Site};
use firebrick_merge::extract_lora::{ExtractLora, Extracted, ExtractedSite, Extraction};
use firebrick_merge::{Merge, MergeConfig, MergeError};
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{Biases, Decoder, DecoderConfig, Export, ExportType, ModelFiles};
use firebrick_peft::hf;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use firebrick_tensor::linalg::{Matrix, svd};
use firebrick_tensor::stream::Executor;
use serde_json::Value;

const VOCAB: usize = 264;

/// A folder with a random model.
fn model(folder: &Path, config: DecoderConfig, seed: u64) -> PathBuf {
    let tokenizer = train_bpe(["the quick brown fox and the lazy dog, the other fox"], VOCAB).unwrap();
    let decoder = Decoder::random(config, Seed(seed), &Device::flex()).unwrap();
    let export = Export::decoder("tiny", &decoder, &tokenizer, ExportType::F32);
    export.write(folder, &Executor::default()).unwrap();
    folder.to_owned()
}

fn config(tied_head: bool) -> DecoderConfig {
    DecoderConfig { tied_head, ..DecoderConfig::tiny(VOCAB) }
}

/// Copies the folder `base` to `out`, with `change` added to its tensors.
fn tune(base: &Path, out: &Path, change: impl Fn(&str, &[usize]) -> Option<Vec<f64>>) -> PathBuf {
    std::fs::create_dir_all(out).unwrap();
    for entry in std::fs::read_dir(base).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), out.join(entry.file_name())).unwrap();
    }
    let before = Checkpoint::open(base).unwrap();
    let tensors = before.tensors().iter().map(|info| {
        let mut values = before.read_f32(&info.name).unwrap();
        if let Some(delta) = change(&info.name, &info.shape) {
            values.iter_mut().zip(delta).for_each(|(v, d)| *v = (f64::from(*v) + d) as f32);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (TensorSpec::new(info.name.clone(), DType::F32, info.shape.clone()), bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    write_safetensors(out.join("model.safetensors"), &Metadata::default(), &tensors).unwrap();
    out.to_owned()
}

fn noise(name: &str, shape: &[usize], seed: u64) -> Vec<f64> {
    Seed(seed).derive(name).normal_f64("delta", shape.iter().product(), 0.05).collect()
}

/// A matrix of this rank, each of its singular values near 1.
fn planted(name: &str, shape: &[usize], rank: usize, seed: u64) -> Vec<f64> {
    let seed = Seed(seed).derive(name);
    let a = Matrix::random_normal(shape[0], rank, seed, "left");
    let b = Matrix::random_normal(rank, shape[1], seed, "right");
    let size = (shape[0] * shape[1]) as f64;
    a.matmul(&b).unwrap().data().iter().map(|v| v / size.sqrt()).collect()
}

fn open(folder: &Path) -> ModelFiles {
    ModelFiles::open(folder).unwrap()
}

fn tensors(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let read = |name: &String| (name.clone(), checkpoint.read_f32(name).unwrap());
    checkpoint.tensors().iter().map(|t| read(&t.name)).collect()
}

/// `B A` of each site with factors, by tensor.
fn products_of(found: &Extraction<'_>) -> BTreeMap<String, Vec<f64>> {
    let tensor = |site: Site| found.report.sites.iter().find(|s| s.site == site).unwrap().tensor.clone();
    let of = |f: &hf::SiteFactors| {
        assert_eq!(f.settings.scale(), 1.0, "{}", f.site);
        let rank = f.settings.rank;
        let a = Matrix::from_f32(rank, f.a.len() / rank, &f.a).unwrap();
        let b = Matrix::from_f32(f.b.len() / rank, rank, &f.b).unwrap();
        (tensor(f.site), b.matmul(&a).unwrap().data().to_vec())
    };
    found.factors.iter().map(of).collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let apart: f64 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
    (apart / b.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

fn delta(base: &Path, tuned: &Path, name: &str) -> Vec<f64> {
    let [a, b] = [base, tuned].map(|f| Checkpoint::open(f).unwrap().read_f32(name).unwrap());
    b.iter().zip(&a).map(|(b, a)| f64::from(*b) - f64::from(*a)).collect()
}

fn site<'r>(found: &'r Extraction<'_>, name: &str) -> &'r ExtractedSite {
    let site: Site = name.parse().unwrap();
    found.report.sites.iter().find(|s| s.site == site).unwrap()
}

fn adapter_config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(hf::CONFIG_FILE)).unwrap()).unwrap()
}

/// `base` with the adapter merged by a passthrough merge.
fn merged(base: &Path, adapter: &Path, out: &Path) -> Result<BTreeMap<String, Vec<f32>>, MergeError> {
    let text =
        format!("merge_method: passthrough\nmodels: [{{model: {}+{}}}]\n", base.display(), adapter.display());
    let merge = Merge::new(MergeConfig::parse(&text).unwrap(), text, Path::new("merge.yml"))?;
    Executor::default().run(&merge, &merge.target(out)?)?;
    Ok(tensors(out))
}

fn all(rank: usize) -> ExtractLora {
    ExtractLora { rank, ..ExtractLora::default() }
}

#[test]
fn full_rank_returns_the_delta() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        let at = |name: &str| dir.path().join(format!("{name}{seed}"));
        let base = model(&at("base"), config(false), seed);
        let tuned = tune(&base, &at("tuned"), |name, shape| Some(noise(name, shape, seed)));
        let (before, after) = (open(&base), open(&tuned));
        for distribute in [true, false] {
            let full = ExtractLora { distribute, embedding: true, ..all(usize::MAX) };
            let found = full.extract(&before, &after, &Silent).unwrap();
            let products = products_of(&found);
            assert_eq!(products.len(), 2 * 7 + 2, "the layers', the embedding and the head");
            for (name, product) in &products {
                let apart = distance(product, &delta(&base, &tuned, name));
                assert!(apart < 1e-5, "{name}: {apart}");
            }
            assert!((found.report.kept - 1.0).abs() < 1e-12);
        }
        let low = ExtractLora { embedding: true, ..all(1) }.extract(&before, &after, &Silent).unwrap();
        for (name, product) in &products_of(&low) {
            let apart = distance(product, &delta(&base, &tuned, name));
            assert!(apart > 0.5, "control: rank 1 is not the delta: {name}, {apart}");
            let kept = low.report.sites.iter().find(|s| s.tensor == *name).unwrap().kept;
            assert!((1.0 - kept - apart * apart).abs() < 1e-6, "{name}: {kept}, {apart}");
        }
    }
}

#[test]
fn planted_ranks_are_found_and_patterns_say_them() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..3 {
        let at = |name: &str| dir.path().join(format!("{name}{seed}"));
        let base = model(&at("base"), config(false), seed);
        let ranks = [("layers.0.self_attn.q_proj", 3), ("layers.1.mlp.down_proj", 5), ("lm_head", 2)];
        let rank = |name: &str| ranks.iter().find(|(part, _)| name.contains(part)).map(|(_, rank)| *rank);
        let tuned = tune(&base, &at("tuned"), |name, shape| Some(planted(name, shape, rank(name)?, seed)));
        let (before, after) = (open(&base), open(&tuned));
        // What is stored in f32 is a delta of full rank, but for the threshold.
        let found = ExtractLora { epsilon: 1e-4, ..all(8) }.extract(&before, &after, &Silent).unwrap();
        let what = |name| site(&found, name).what;
        assert_eq!(what("layers.0.attn.q"), Extracted::Rank(3));
        assert_eq!(what("layers.1.mlp.down"), Extracted::Rank(5));
        assert_eq!(what("head"), Extracted::Rank(2));
        assert_eq!(what("layers.1.attn.q"), Extracted::Equal);
        assert_eq!(found.factors.len(), 3);
        assert!(found.report.kept > 1.0 - 1e-9);
        let noisy = all(8).extract(&before, &after, &Silent).unwrap();
        assert_eq!(site(&noisy, "layers.0.attn.q").what, Extracted::Rank(8), "control: rounding has a rank");
        let few = all(2).extract(&before, &after, &Silent).unwrap();
        assert!(site(&few, "layers.1.mlp.down").kept < 0.9, "control: fewer do not do");

        let out = at("adapter");
        found.save(&before, "tiny", &out).unwrap();
        let config = adapter_config(&out);
        assert_eq!((&config["r"], &config["lora_alpha"]), (&5.into(), &5.into()));
        for pattern in ["rank_pattern", "alpha_pattern"] {
            let expected = serde_json::json!({"model.layers.0.self_attn.q_proj": 3, "lm_head": 2});
            assert_eq!(config[pattern], expected);
        }
        let (factors, _) = hf::read(&out, before.sites()).unwrap();
        let mut expected = found.factors.clone();
        expected.sort_by_key(|f| f.site);
        assert!(factors == expected, "as written");
    }
}

#[test]
fn a_random_projection_is_close_to_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let wide = DecoderConfig { d_model: 128, head_dim: 32, d_ff: 160, layers: 1, ..config(false) };
    let base = model(&dir.path().join("base"), wide, 0);
    // A spectrum that falls off slowly, as those of fine-tunes do.
    let falling = |name: &str, shape: &[usize]| {
        let mut s = svd(&Matrix::new(shape[0], shape[1], noise(name, shape, 1)).unwrap()).unwrap();
        (0..s.sigma.len()).for_each(|k| s.sigma[k] = 1.0 / (1.0 + k as f64));
        s.reconstruct().data().to_vec()
    };
    let tuned = tune(&base, &dir.path().join("tuned"), |name, shape| {
        (name.contains("mlp") && name.contains("proj")).then(|| falling(name, shape))
    });
    let (before, after) = (open(&base), open(&tuned));
    let found = all(16).extract(&before, &after, &Silent).unwrap();
    let square = |k: usize| 1.0 / (1.0 + k as f64).powi(2);
    let best = (0..16).map(square).sum::<f64>() / (0..128).map(square).sum::<f64>();
    for (name, product) in &products_of(&found) {
        let apart = distance(product, &delta(&base, &tuned, name));
        let kept = found.report.sites.iter().find(|s| s.tensor == *name).unwrap().kept;
        println!("{name}: {kept} of at most {best}");
        assert!((1.0 - kept - apart * apart).abs() < 1e-6, "{name}: the share is that of the factors");
        assert!(kept > best - 1e-4 && kept < best + 1e-6, "{name}: {kept}, {best}");
    }
    assert_eq!(found.factors.len(), 3);
    // The same, bit for bit, on any number of threads.
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| all(16).extract(&before, &after, &Silent).unwrap().factors)
    };
    assert_eq!(on(1), on(3));
    let other = ExtractLora { seed: Seed(1), ..all(16) }.extract(&before, &after, &Silent).unwrap();
    assert_ne!(other.factors, found.factors, "control: another projection");
}

#[test]
fn merged_back_it_is_the_fine_tune() {
    let dir = tempfile::tempdir().unwrap();
    let qwen = DecoderConfig {
        model_type: "qwen2".into(),
        biases: Biases { qkv: true, ..Biases::default() },
        ..config(true)
    };
    for (name, config) in [("untied", config(false)), ("tied", config(true)), ("qwen", qwen)] {
        let at = |part: &str| dir.path().join(format!("{name}-{part}"));
        let base = model(&at("base"), config, 0);
        let tuned = tune(&base, &at("tuned"), |name, shape| Some(noise(name, shape, 0)));
        let (before, after) = (open(&base), open(&tuned));
        let mut settings = all(usize::MAX);
        if name == "qwen" {
            let error = settings.extract(&before, &after, &Silent).unwrap_err().to_string();
            assert!(
                error.contains("layers.0.self_attn.q_proj.bias") && error.contains("layers.1.attn.v_bias"),
                "{error}"
            );
            settings.save_whole = Some("attn.{q,k,v}".parse().unwrap());
        }
        settings.embedding = name == "untied";
        let found = settings.extract(&before, &after, &Silent).unwrap();
        let adapter = at("adapter");
        found.save(&before, "tiny", &adapter).unwrap();
        let back = merged(&base, &adapter, &at("merged")).unwrap();
        let (start, end) = (tensors(&base), tensors(&tuned));
        assert_eq!(back.len(), end.len());
        for (tensor, expected) in &end {
            let wide = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let apart = distance(&wide(&back[tensor]), &wide(expected));
            assert!(apart < 1e-6, "{name} {tensor}: {apart}");
            assert!(distance(&wide(&start[tensor]), &wide(expected)) > 1e-3, "control: {tensor} changed");
        }
        // A tied head is there for peft, under both names, and is one weight here.
        let files = hf::read_all(&adapter, before.sites()).unwrap();
        let saved: Vec<&str> = files.whole.iter().map(|w| w.tensor.as_str()).collect();
        assert_eq!(saved.contains(&hf::TIED_HEAD), name != "untied", "{saved:?}");
        assert_eq!(saved.contains(&"model.embed_tokens.weight"), name != "untied", "{saved:?}");
        // Beside the weights, a brick has no place for them.
        let refused = hf::read(&adapter, before.sites()).unwrap_err().to_string();
        assert!(refused.contains("modules_to_save"), "{refused}");
        assert_eq!(refused.contains("`embed`"), name == "untied", "{refused}");
    }
}

#[test]
fn a_head_that_the_model_ties_is_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), config(true), 0);
    // The fine-tune has a head of its own.
    let tuned = model(&dir.path().join("tuned"), config(false), 1);
    let (before, after) = (open(&base), open(&tuned));
    let found = all(4).extract(&before, &after, &Silent);
    let found = found.unwrap();
    assert_eq!(site(&found, "head").what, Extracted::Whole);
    let adapter = dir.path().join("adapter");
    found.save(&before, "tiny", &adapter).unwrap();
    let error = merged(&base, &adapter, &dir.path().join("merged")).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("ties"), "{error}");
    // The other way round there is a place for it.
    let back = all(usize::MAX).extract(&after, &before, &Silent).unwrap();
    assert!(matches!(site(&back, "head").what, Extracted::Rank(_)));
    let adapter = dir.path().join("back");
    back.save(&after, "tiny", &adapter).unwrap();
    let merged = merged(&tuned, &adapter, &dir.path().join("merged-back")).unwrap();
    let embedding = &tensors(&base)["model.embed_tokens.weight"];
    let apart =
        merged["lm_head.weight"].iter().zip(embedding).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-6, "{apart}");
}

#[test]
fn sites_are_chosen_and_ranked() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), config(true), 0);
    let tuned = tune(&base, &dir.path().join("tuned"), |name, shape| Some(noise(name, shape, 0)));
    let (before, after) = (open(&base), open(&tuned));
    let plan = LayerPlan::from_toml(
        "version = 1\n[[rules]]\nselect = \"layers.*.mlp\"\nrank = 3\n[[rules]]\nselect = \"layers.1.mlp.up\"\nrank = 6\n",
    );
    let settings = ExtractLora {
        plan: Some(plan.unwrap().resolve(before.sites()).unwrap()),
        leave_out: Some("embed, layers.*.attn_norm, layers.0.attn.k".parse().unwrap()),
        save_whole: Some("layers.1.attn.o".parse().unwrap()),
        ..all(5)
    };
    let found = settings.extract(&before, &after, &Silent).unwrap();
    let what = |name| site(&found, name).what;
    assert_eq!(what("layers.0.mlp.gate"), Extracted::Rank(3));
    assert_eq!(what("layers.1.mlp.up"), Extracted::Rank(6));
    assert_eq!(what("layers.0.attn.q"), Extracted::Rank(5));
    assert_eq!(what("layers.1.attn.o"), Extracted::Whole);
    assert_eq!(what("norm"), Extracted::Whole);
    for left in ["embed", "head", "layers.0.attn_norm", "layers.0.attn.k"] {
        assert_eq!((what(left), site(&found, left).kept), (Extracted::Nothing, 0.0), "{left}");
        assert!(site(&found, left).norm > 0.0);
    }
    let out = dir.path().join("adapter");
    found.save(&before, "tiny", &out).unwrap();
    let config = adapter_config(&out);
    assert_eq!(config["r"], 6);
    assert_eq!(config["rank_pattern"]["model.layers.0.mlp.gate_proj"], 3);
    let targets = config["target_modules"].as_array().unwrap();
    assert!(
        targets.contains(&"q_proj".into()) && targets.contains(&"model.layers.1.self_attn.k_proj".into())
    );
    let saved = config["modules_to_save"].as_array().unwrap();
    let expected = [
        "layers.0.post_attention_layernorm",
        "layers.1.post_attention_layernorm",
        "layers.1.self_attn.o_proj",
        "norm",
    ];
    assert_eq!(saved, &expected.map(|name| Value::from(format!("model.{name}"))));
    let text = found.report.to_string();
    assert!(text.contains("layers.1.mlp.up") && text.contains("whole"), "{text}");
}

#[test]
fn a_gguf_file_is_the_same_base() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), config(false), 0);
    let tuned = tune(&base, &dir.path().join("tuned"), |name, shape| Some(noise(name, shape, 0)));
    let gguf = dir.path().join("base.gguf");
    Export::files(&open(&base), ExportType::F32).write(&gguf, &Executor::default()).unwrap();
    let (folder, file, after) = (open(&base), open(&gguf), open(&tuned));
    let from_folder = all(4).extract(&folder, &after, &Silent).unwrap();
    assert_eq!(from_folder.factors, all(4).extract(&file, &after, &Silent).unwrap().factors);
    assert_eq!(from_folder.report.sites.len(), 2 * 9 + 3);
}

#[test]
fn everything_that_does_not_fit_is_listed_and_nothing_written() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), config(false), 0);
    let narrow = model(&dir.path().join("narrow"), DecoderConfig { d_ff: 16, ..config(false) }, 0);
    let deep = model(&dir.path().join("deep"), DecoderConfig { layers: 3, ..config(false) }, 0);
    let other =
        model(&dir.path().join("other"), DecoderConfig { model_type: "mistral".into(), ..config(false) }, 0);
    let error = |settings: &ExtractLora, tuned: &Path| {
        settings
            .extract(&open(&base), &ModelFiles::open_unchecked(tuned).unwrap(), &Silent)
            .unwrap_err()
            .to_string()
    };
    let all_wrong = ExtractLora { epsilon: f64::NAN, leave_out: Some("layers.9".parse().unwrap()), ..all(0) };
    let text = error(&all_wrong, &narrow);
    for part in [
        "rank 0",
        "epsilon",
        "layers.9",
        "layers.0.mlp.up_proj.weight",
        "layers.1.mlp.down_proj.weight",
        "[32, 16]",
    ] {
        assert!(text.contains(part), "`{part}` in {text}");
    }
    assert!(error(&all(4), &deep).contains("3"));
    assert!(error(&all(4), &other).contains("mistral"));
    assert!(error(&all(4), &base).contains("do not differ"));
    let tied = model(&dir.path().join("tied"), config(true), 0);
    let settings = ExtractLora { embedding: true, ..all(4) };
    let found = settings.extract(&open(&tied), &open(&tied), &Silent).unwrap_err().to_string();
    assert!(found.contains("tied"), "{found}");
    // Missing tensors, both of them.
    let checkpoint = Checkpoint::open(&base).unwrap();
    let left = checkpoint
        .tensors()
        .iter()
        .filter(|t| !t.name.contains("1.mlp.up") && !t.name.contains("0.mlp.gate"));
    let left: Vec<_> = left.map(|t| (t.spec(), checkpoint.bytes(&t.name).unwrap())).collect();
    let holes = tune(&base, &dir.path().join("holes"), |_, _| None);
    write_safetensors(holes.join("model.safetensors"), &Metadata::default(), &left).unwrap();
    let text = error(&all(4), &holes);
    assert!(
        text.contains("fine-tune:") && text.contains("1.mlp.up_proj") && text.contains("0.mlp.gate_proj"),
        "{text}"
    );
    let broken = tune(&base, &dir.path().join("broken"), |name, shape| {
        name.contains("0.mlp.up").then(|| vec![f64::NAN; shape.iter().product()])
    });
    assert!(error(&all(4), &broken).contains("0.mlp.up_proj"));

    // A folder that holds something is left alone.
    let tuned = tune(&base, &dir.path().join("tuned"), |name, shape| Some(noise(name, shape, 0)));
    let (before, after) = (open(&base), open(&tuned));
    let found = all(4).extract(&before, &after, &Silent).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine.txt"), "mine").unwrap();
    assert!(matches!(found.save(&before, "tiny", &out), Err(MergeError::Io { .. })));
    let names = |folder: &Path| {
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>()
    };
    assert_eq!(names(&out), ["mine.txt"]);
    assert!(!names(dir.path()).iter().any(|n| n.to_string_lossy().contains("extract-lora")));
    std::fs::remove_file(out.join("mine.txt")).unwrap();
    found.save(&before, "tiny", &out).unwrap();
    assert_eq!(names(&out).len(), 3, "control: an empty folder is filled");
}

/// Keeps warnings; stops after some weights.
struct Listener {
    warnings: Mutex<Vec<String>>,
    stop: bool,
}

impl Progress for Listener {
    fn on(&self, event: Event<'_>) {
        if let Event::Warn(text) = event {
            self.warnings.lock().unwrap().push(text.into());
        }
    }

    fn cancelled(&self) -> bool {
        self.stop
    }
}

#[test]
fn what_an_adapter_does_not_carry_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), config(false), 0);
    let longer = DecoderConfig { rope_theta: 500_000.0, ..config(false) };
    let tuned = model(&dir.path().join("tuned"), longer, 1);
    let listen = |stop| Listener { warnings: Mutex::default(), stop };
    let (listener, before, after) = (listen(false), open(&base), open(&tuned));
    all(4).extract(&before, &after, &listener).unwrap();
    let warnings = listener.warnings.lock().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("rope_theta") && warnings[0].contains("500000"), "{warnings:?}");
    let stopped = all(4).extract(&before, &after, &listen(true));
    assert!(matches!(stopped, Err(MergeError::Cancelled(_))), "{stopped:?}");
}
