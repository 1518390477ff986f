//! `embed`, and `inspect` on an encoder: the small BERT of firebrick-models' tests.

use std::path::Path;

use burn::tensor::Device;
use firebrick_core::{Brick, Seed};
use firebrick_models::{EncoderModel, ExportType};
use firebrick_peft::{LoraBank, LoraConfig, hf};
use serde_json::Value;

use crate::python::{python, script};
use crate::{json, run};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../firebrick-models/tests/golden/bert");

/// What `embed` prints, line by line.
fn lines(dir: &Path, arguments: &[&str]) -> Vec<String> {
    let model = if arguments.contains(&"--model") { vec![] } else { vec!["--model", MODEL] };
    let output = run(dir, &[&["embed", "--device", "flex"], &model[..], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect()
}

fn vectors(dir: &Path, arguments: &[&str]) -> Vec<(String, Vec<f64>)> {
    let parse = |line: &String| {
        let value: Value = serde_json::from_str(line).unwrap();
        let numbers = value["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
        (value["text"].as_str().unwrap().to_string(), numbers.collect())
    };
    lines(dir, &[arguments, &["--json"]].concat()).iter().map(parse).collect()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn one_line_in_one_vector_out() {
    let dir = tempfile::tempdir().unwrap();
    let texts = ["The old red brick house by the river.", "", "fire"];
    std::fs::write(dir.path().join("t.txt"), texts.join("\n") + "\n").unwrap();
    let found = vectors(dir.path(), &["--data", "t.txt"]);
    assert_eq!(found.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>(), texts);
    for (text, vector) in &found {
        assert_eq!(vector.len(), 16);
        let length: f64 = vector.iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-5, "the folder says that vectors are normalized");
        let alone = vectors(dir.path(), &["--text", text]);
        assert!(apart(vector, &alone[0].1) < 1e-6, "{text}");
    }
    assert!(apart(&found[0].1, &found[2].1) > 1e-2, "control: texts differ");
    let together = vectors(dir.path(), &[&["--batch", "1", "--text"], &texts[..]].concat());
    assert!(together.iter().zip(&found).all(|(a, b)| a.0 == b.0 && apart(&a.1, &b.1) < 1e-6));

    let plain = lines(dir.path(), &["--data", "t.txt"]);
    for (line, (_, vector)) in plain.iter().zip(&found) {
        let numbers: Vec<f64> = line.split(' ').map(|v| v.parse().unwrap()).collect();
        assert!(apart(&numbers, vector) < 1e-7);
    }
    for pooling in ["cls", "max"] {
        let other = vectors(dir.path(), &["--data", "t.txt", "--pooling", pooling]);
        assert!(apart(&other[0].1, &found[0].1) > 1e-2, "{pooling}");
    }
    assert_eq!(vectors(dir.path(), &["--data", "t.txt", "--pooling", "mean"]), found, "as the folder says");
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    let code =
        |arguments: &[&str]| run(dir.path(), &[&["embed", "--model"], arguments].concat()).status.code();
    assert_eq!(code(&[MODEL]), Some(2), "no texts");
    assert_eq!(code(&[MODEL, "--text", "a", "--data", "t.txt"]), Some(2), "two sources");
    assert_eq!(code(&[MODEL, "--text", "a", "--pooling", "last"]), Some(2));
    assert_eq!(code(&[MODEL, "--text", "a", "--batch", "0"]), Some(2));
    assert_eq!(code(&[MODEL, "--text", "a", "--dry-run"]), Some(2));
    assert_eq!(code(&["nowhere", "--text", "a"]), Some(2));
    assert_eq!(code(&[MODEL, "--data", "missing.txt"]), Some(1));
    assert_eq!(code(&[MODEL, "--text", "a"]), Some(0), "control");
    std::fs::write(dir.path().join("t.txt"), b"ok\n\xff\n").unwrap();
    let output = run(dir.path(), &["embed", "--model", MODEL, "--data", "t.txt"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("not UTF-8 text at byte 3"));
    assert!(output.stdout.is_empty());
}

#[test]
fn inspect_knows_encoders() {
    let dir = tempfile::tempdir().unwrap();
    let found = json(dir.path(), &["inspect", MODEL]);
    assert_eq!((&found["config"]["model_type"], &found["pooling"]), (&"bert".into(), &"mean".into()));
    let sites = found["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 1 + 3 * 8, "the embedding; six linear layers and two norms a block");
    let text = run(dir.path(), &["inspect", MODEL, "--tensors"]);
    let text = String::from_utf8(text.stdout).unwrap();
    for part in ["encoder", "attn.q", "mlp.down", "pooling mean, normalized", "pooler.dense.bias"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn transformers_and_peft_compute_the_same_vectors() {
    let Some(python) = python() else { return };
    let (dir, device) = (tempfile::tempdir().unwrap(), Device::flex());
    let model = EncoderModel::open(Path::new(MODEL), &device).unwrap();
    model.save(&dir.path().join("copy"), ExportType::F32).unwrap();
    let sites = model.encoder.sites();
    let fresh = LoraConfig::default().init(sites, &sites.block_linears(), Seed(1), &device).unwrap();
    let parts = fresh.sites().iter().map(|site| {
        let (settings, factors) = fresh.get(site).unwrap();
        (site, settings, factors.a.val(), factors.b.val() + 0.05)
    });
    let bank = LoraBank::from_parts(parts.collect(), 0.0).unwrap();
    hf::save(&bank, sites, "copy", &dir.path().join("adapter")).unwrap();

    let texts =
        ["The old red brick house by the river.", "", "fire", "walls burn, burning builders stand on"];
    let theirs = script(&python, dir.path(), "embed.py", &[&["copy", "adapter"], &texts[..]].concat());
    assert_eq!((&theirs["missing"], &theirs["unexpected"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    let rows = |key: &str| -> Vec<Vec<f64>> { serde_json::from_value(theirs[key].clone()).unwrap() };
    let ours =
        |extra: &[&str]| vectors(dir.path(), &[extra, &["--model", "copy", "--text"], &texts[..]].concat());
    let (plain, adapted) = (ours(&[]), ours(&["--adapter", "adapter"]));
    let worst = |ours: &[(String, Vec<f64>)], theirs: &[Vec<f64>]| {
        ours.iter().zip(theirs).map(|((_, a), b)| apart(a, b)).fold(0.0, f64::max)
    };
    let off = worst(&plain, &rows("plain")).max(worst(&adapted, &rows("adapted")));
    eprintln!("largest difference from transformers and peft {off:.1e}");
    assert!(off < 1e-4, "differs by {off}");
    assert!(worst(&plain, &rows("adapted")) > 1e-2, "control: the adapter matters");
}
