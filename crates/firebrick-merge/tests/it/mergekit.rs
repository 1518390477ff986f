//! Configurations that mergekit 0.1.5 has run on the checkpoints in `tests/golden/config`, tensor by tensor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use firebrick_merge::{Merge, MergeConfig};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::Checkpoint;
use firebrick_tensor::stream::Executor;
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config")
}

/// The configurations by name, without their names.
fn cases() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(golden().join("cases.yml")).unwrap();
    let models = format!("{}/", golden().join("models").display());
    let one = |case: &str| {
        let (name, rest) = case.trim_start_matches("name: ").split_once('\n').unwrap();
        (name.to_owned(), rest.replace('@', &models))
    };
    text.split("\n---\n").map(one).collect()
}

/// Runs a configuration and gives its folder.
fn run(text: &str, out: &Path) -> PathBuf {
    let config = MergeConfig::parse(text).unwrap_or_else(|e| panic!("{}\n{text}", e.join("\n")));
    let merge = Merge::new(config, text.to_owned(), Path::new("merge.yml")).unwrap();
    let executor = Executor { sha256: false, ..Executor::default() };
    executor.run(&merge, &merge.target(out).unwrap()).unwrap();
    out.to_owned()
}

/// The distance between two values, as a share of 1 or of the larger one; half of the last place of bf16 counts as 0 there.
fn distance(ours: f32, theirs: f32) -> f64 {
    f64::from((ours - theirs).abs()) / f64::from(theirs.abs()).max(1.0)
}

#[test]
fn every_tensor_is_mergekits() {
    let expected = Checkpoint::open(golden().join("expected.safetensors")).unwrap();
    let said: Value =
        serde_json::from_slice(&std::fs::read(golden().join("expected.json")).unwrap()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let cases = cases();
    assert!(cases.len() >= 30);
    let mut tensors = 0;
    for (name, text) in cases {
        let compat = if name == "paired_sources" { "compat: true\n" } else { "" };
        let out =
            run(&format!("{}\nnumerics: mergekit\n{compat}", text.trim_end()), &root.path().join(&name));
        let ours = Checkpoint::open(&out).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let said = &said[&name];
        // mergekit leaves the flag of the first model, with which transformers would not read the head that it wrote.
        let untied = |key: &str| name == "tied_and_not" && key == "tie_word_embeddings";
        assert!(!untied("tie_word_embeddings") || config["tie_word_embeddings"] == false);
        for (key, value) in
            said.as_object().unwrap().iter().filter(|(key, _)| *key != "tokens" && !untied(key))
        {
            assert_eq!(config.get(key), Some(value), "{name}: {key}");
        }
        // Row of a token in both; the order of tokens that a union adds is ours.
        let rows: Option<BTreeMap<usize, usize>> = said.get("tokens").map(|tokens| {
            let tokenizer = Tokenizer::from_folder(&out).unwrap();
            let tokens = tokens.as_object().unwrap();
            assert_eq!(tokenizer.vocab_size(), tokens.len(), "{name}: tokens");
            let ids: std::collections::BTreeSet<u32> =
                tokens.keys().filter_map(|t| tokenizer.id(t)).collect();
            assert_eq!(ids.len(), tokens.len(), "{name}: no two tokens have one id");
            let row = |(token, id): (&String, &Value)| {
                let ours = tokenizer.id(token).unwrap_or_else(|| panic!("{name}: no token {token}"));
                (id.as_u64().unwrap() as usize, ours as usize)
            };
            tokens.iter().map(row).collect()
        });
        let prefix = format!("{name}/");
        let theirs: Vec<_> = expected.tensors().iter().filter(|t| t.name.starts_with(&prefix)).collect();
        let names =
            |list: Vec<&str>| list.into_iter().map(String::from).collect::<std::collections::BTreeSet<_>>();
        let wanted = theirs.iter().map(|t| t.name.trim_start_matches(&prefix)).collect();
        assert_eq!(names(ours.tensors().iter().map(|t| &*t.name).collect()), names(wanted), "{name}");
        for info in theirs {
            let tensor = info.name.trim_start_matches(&prefix);
            let mine = ours.tensor(tensor).unwrap();
            assert_eq!((&mine.shape, mine.dtype), (&info.shape, info.dtype), "{name}: {tensor}");
            let (a, b) = (ours.read_f32(tensor).unwrap(), expected.read_f32(&info.name).unwrap());
            // One unit in the last place of bf16, or what f32 sums in another order differ by.
            let limit = if info.dtype == DType::BF16 { 1.0 / 128.0 } else { 1e-6 };
            let limit = if name.starts_with("stack") || name == "head_donor" { 0.0 } else { limit };
            let columns = info.shape.last().copied().unwrap();
            let by_token =
                rows.as_ref().filter(|_| tensor.contains("embed_tokens") || tensor.contains("lm_head"));
            for (i, theirs) in b.iter().enumerate() {
                let row = by_token.and_then(|rows| rows.get(&(i / columns)).copied()).unwrap_or(i / columns);
                let ours = a[row * columns + i % columns];
                assert!(
                    distance(ours, *theirs) <= limit,
                    "{name}: {tensor}[{i}] is {ours}, mergekit has {theirs}"
                );
            }
            tensors += 1;
        }
    }
    assert_eq!(tensors, expected.tensors().len(), "every result is compared");
}
