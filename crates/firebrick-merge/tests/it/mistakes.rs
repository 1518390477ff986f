//! Configurations with mistakes: one message that lists all of them with line and column, and nothing written.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use firebrick_merge::{MergeError, Stages};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use serde_json::{Value, json};

use crate::inputs;
use crate::merges::model;

const MISTAKES: &str = include_str!("mistakes.txt");

/// A configuration, and the beginnings of all lines of its message in their order.
type Case = (String, Vec<&'static str>);

fn cases() -> Vec<Case> {
    let text = MISTAKES.lines().filter(|line| !line.starts_with("# "));
    let mut cases: Vec<Case> = Vec::new();
    for line in text {
        if line == "===" {
            cases.push(Case::default());
            continue;
        }
        let case = cases.last_mut().expect("a case begins with ===");
        match line.strip_prefix("--> ") {
            Some(expected) => case.1.push(expected),
            None => case.0 += &format!("{line}\n"),
        }
    }
    cases
}

fn copy(from: &Path, to: &Path, files: &[&str]) {
    std::fs::create_dir_all(to).unwrap();
    for file in files {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

/// Tensors in a folder of their own.
fn save(folder: &Path, file: &str, tensors: &[(TensorSpec, Vec<u8>)]) {
    std::fs::create_dir_all(folder).unwrap();
    write_safetensors(folder.join(file), &Metadata::default(), tensors).unwrap();
}

fn f32s(name: &str, shape: &[usize]) -> (TensorSpec, Vec<u8>) {
    (TensorSpec::new(name, DType::F32, shape), vec![0; 4 * shape.iter().product::<usize>()])
}

/// Models of a few tensors without anything beside them, whole ones in `g`, and what is none.
fn models(root: &Path) {
    let names = |layers: usize| -> Vec<String> {
        let mut names = vec!["model.embed_tokens.weight".to_owned()];
        names.extend((0..layers).map(|i| format!("model.layers.{i}.mlp.weight")));
        names.push("model.norm.weight".to_owned());
        names
    };
    for (name, layers, rows) in
        [("a", 2, 3), ("b", 2, 3), ("deep", 3, 3), ("wide", 2, 4), ("lacks", 1, 3), ("badconfig", 2, 3)]
    {
        let names = names(layers);
        let shape = |n: &str| if n.contains("embed") { vec![rows, 2] } else { vec![2] };
        let shapes: Vec<Vec<usize>> = names.iter().map(|n| shape(n)).collect();
        let tensors: Vec<_> =
            names.iter().zip(&shapes).map(|(n, s)| (n.as_str(), s.as_slice(), 1.0)).collect();
        model(root, name, &tensors);
    }
    model(root, "flat", &[("x", &[2], 1.0), ("y", &[2], 1.0)]);
    model(root, "bare", &[]);
    for (name, last) in [("ints", 1i64), ("ints_too", 2)] {
        let ids = [0, last].iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = (TensorSpec::new("model.position_ids", DType::I64, [2]), ids);
        save(&root.join(name), "model.safetensors", &[f32s("model.layers.0.w", &[2]), ids]);
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config/models");
    let [tensors, config, tokenizer] = ["model.safetensors", "config.json", "tokenizer.json"];
    for name in ["a", "b", "tied", "wide"] {
        copy(&golden.join(name), &root.join("g").join(name), &[tensors, config, tokenizer]);
    }
    copy(&golden.join("odd"), &root.join("g/odd"), &[tensors, config]);
    // Twice as wide, of another family, without a tokenizer, with a damaged one.
    let a = golden.join("a");
    let twice = |n: &usize| if *n == 13 { 13 } else { 2 * n };
    let checkpoint = Checkpoint::open(&a).unwrap();
    let wider =
        checkpoint.tensors().iter().map(|t| f32s(&t.name, &t.shape.iter().map(twice).collect::<Vec<_>>()));
    save(&root.join("fat"), tensors, &wider.collect::<Vec<_>>());
    copy(&a, &root.join("fat"), &[tokenizer]);
    let mut wider: Value = serde_json::from_slice(&std::fs::read(a.join(config)).unwrap()).unwrap();
    for (key, value) in [("hidden_size", 8), ("intermediate_size", 12), ("head_dim", 4)] {
        wider[key] = value.into();
    }
    std::fs::write(root.join("fat").join(config), wider.to_string()).unwrap();
    let foreign = [f32s("transformer.wte.weight", &[13, 4]), f32s("transformer.h.0.w", &[4])];
    save(&root.join("foreign"), tensors, &foreign);
    copy(&a, &root.join("foreign"), &[tokenizer]);
    copy(&a, &root.join("mute"), &[tensors, config]);
    copy(&a, &root.join("garbled"), &[tensors, config]);
    std::fs::write(root.join("garbled").join(tokenizer), "{").unwrap();
    // Adapters.
    inputs::adapter(&root.join("lora"), 0.0);
    let embed = "base_model.model.model.embed_tokens.lora_embedding_";
    let factors = [f32s(&format!("{embed}A"), &[2, 13]), f32s(&format!("{embed}B"), &[4, 2])];
    save(&root.join("embed"), "adapter_model.safetensors", &factors);
    let settings = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens"]});
    std::fs::write(root.join("embed/adapter_config.json"), settings.to_string()).unwrap();
    // No models.
    std::fs::write(root.join("badconfig").join(config), "[").unwrap();
    std::fs::write(root.join("damaged.safetensors"), b"not a checkpoint").unwrap();
    std::fs::write(root.join("fake.gguf"), b"GGUF and nothing else").unwrap();
    std::fs::write(root.join("note.txt"), b"a note").unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    std::fs::create_dir(root.join("shards")).unwrap();
    let index = json!({"weight_map": {"w": "model-00001-of-00001.safetensors"}});
    std::fs::write(root.join("shards/model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Opens a file as `firebrick merge` does.
fn open(path: &Path) -> Result<(), MergeError> {
    let stages = Stages::open(path)?;
    if stages.configs().len() > 1 {
        stages.check_models(path)?;
    }
    stages.merge(0, path, Path::new("nowhere")).map(drop)
}

#[test]
fn every_mistake_is_listed_with_its_place() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    models(root);
    let before = files(root);
    let at = format!("{}/", root.display());
    let path = tempfile::NamedTempFile::new().unwrap();
    let cases = cases();
    let distinct: HashSet<&String> = cases.iter().map(|(text, _)| text).collect();
    assert!(distinct.len() >= 100 && distinct.len() == cases.len(), "{} of {}", distinct.len(), cases.len());
    let mut wrong = Vec::new();
    for (text, expected) in &cases {
        std::fs::write(path.path(), text.replace('@', &at)).unwrap();
        let problems = match std::panic::catch_unwind(|| open(path.path())) {
            Ok(Err(MergeError::Config { problems, .. } | MergeError::Mismatch { problems, .. })) => problems,
            Ok(Err(other)) => vec![format!("another error: {other}")],
            Ok(Ok(())) => vec!["it is accepted".to_owned()],
            Err(_) => vec!["it panics".to_owned()],
        };
        let problems: Vec<String> = problems.iter().map(|p| placed(text, &at, p)).collect();
        let alike =
            problems.len() == expected.len() && problems.iter().zip(expected).all(|(p, e)| p.starts_with(e));
        if !alike {
            let lines = |of: &[&str]| of.iter().map(|line| format!("--> {line}\n")).collect::<String>();
            let found: Vec<&str> = problems.iter().map(String::as_str).collect();
            wrong.push(format!("===\n{text}{}instead of\n{}", lines(&found), lines(expected)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(files(root), before, "nothing is written");
}

/// A problem with the folder as `@`, also in the count of columns.
fn placed(text: &str, at: &str, problem: &str) -> String {
    let found = problem.strip_prefix("line ").and_then(|p| p.split_once(", column "));
    let Some((line, (column, rest))) = found.and_then(|(l, p)| Some((l, p.split_once(':')?))) else {
        return problem.replace(at, "@");
    };
    let (line, column): (usize, usize) = (line.parse().unwrap(), column.parse().unwrap());
    let written = text.lines().nth(line - 1).unwrap_or_default();
    let mut left = column - 1;
    let mut before = 0;
    for c in written.chars() {
        if left == 0 {
            break;
        }
        left = left.saturating_sub(if c == '@' { at.len() } else { 1 });
        before += 1;
    }
    format!("line {line}, column {}:{}", before + left + 1, rest.replace(at, "@"))
}

/// Every file and folder.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}
