//! What `train` takes besides one plain text.

use std::path::Path;

use serde_json::Value;

use crate::{json, run};

const WORDS: [&str; 6] = ["lamp", "river", "stone", "falcon", "garden", "winter"];

/// Questions with answers, one a line, as chats or as prompts with completions.
fn answers(dir: &Path, name: &str, chat: bool, lines: usize) {
    let line = |i: usize| {
        let (a, b) = (WORDS[i % 6], WORDS[(i / 6 + i) % 6]);
        let (question, answer) = (format!("What follows the {a}?"), format!("The {b} follows the {a}."));
        match chat {
            true => serde_json::json!({"messages": [
                {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            ]}),
            false => serde_json::json!({"prompt": question, "completion": format!(" {answer}")}),
        }
    };
    let text: String = (0..lines).map(|i| format!("{}\n", line(i))).collect();
    std::fs::write(dir.join(name), text).unwrap();
}

fn train(dir: &Path, out: &str, extra: &[&str]) -> Value {
    let base =
        ["train", "--model", "embedded", "--steps", "4", "--batch", "2", "--window", "64", "--rank", "2"];
    json(dir, &[&base[..], &["--learning-rate", "0.005", "--out", out], extra].concat())
}

fn adapter(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name).join("adapter_model.safetensors")).unwrap()
}

#[test]
fn chats_and_completions_train_together_until_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    answers(dir.path(), "chat.jsonl", true, 60);
    answers(dir.path(), "plain.jsonl", false, 60);
    answers(dir.path(), "held.jsonl", true, 12);
    let common = ["--data", "chat.jsonl", "plain.jsonl", "--eval-data", "held.jsonl", "--eval-every", "1"];
    let dry = train(dir.path(), "a", &[&common[..], &["--dry-run"]].concat());
    assert_eq!(dry["packed"], true);
    let rows = dry["rows"].as_u64().unwrap();
    assert!(rows > 20 && rows < 120, "several documents a row: {rows}");

    let trained = train(dir.path(), "a", &[&common[..], &["--temperature", "2"]].concat());
    let held: Vec<f64> =
        trained["held_out"].as_array().unwrap().iter().map(|h| h["loss"].as_f64().unwrap()).collect();
    assert_eq!(held.len(), 4);
    assert!(held[3] < held[0] - 0.1, "{held:?}");
    // Far too fast: the loss on held-out text rises, and the run ends.
    let wild = ["--learning-rate", "3", "--patience", "1", "--steps", "9"];
    let base = ["train", "--model", "embedded", "--batch", "2", "--window", "64", "--out", "wild"];
    let wild = json(dir.path(), &[&base[..], &common[..], &wild[..]].concat());
    assert!(wild["steps"].as_u64().unwrap() < 9, "{wild}");
    assert_eq!(wild["best_step"].as_u64().unwrap() + 1, wild["steps"].as_u64().unwrap());

    let stages = r#"[{"length": 1, "draws": [{"source": "plain"}]}, {"length": 3, "draws": [{"source": "chat", "share": 0.5}]}]"#;
    std::fs::write(dir.path().join("stages.json"), stages).unwrap();
    let files = ["--data", "chat.jsonl", "plain.jsonl", "--stages", "stages.json"];
    train(dir.path(), "staged", &files);
    assert_ne!(adapter(dir.path(), "staged"), adapter(dir.path(), "a"));
    std::fs::write(dir.path().join("stages.json"), stages.replace("plain", "code")).unwrap();
    let output = run(dir.path(), &[&["train", "--model", "embedded", "--out", "x"], &files[..]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("there is no source `code`") && stderr.contains("stages.json"), "{stderr}");
}

#[test]
fn every_bad_line_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let lines =
        "{\"text\": \"fine\"}\n{\"txt\": 1}\n{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n";
    std::fs::write(dir.path().join("bad.jsonl"), lines).unwrap();
    let output = run(dir.path(), &["train", "--model", "embedded", "--data", "bad.jsonl", "--out", "x"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("bad.jsonl:2: no `text`") && stderr.contains("bad.jsonl:3: no turn"), "{stderr}");
    assert!(!dir.path().join("x").exists());
}

#[test]
fn optimizers_and_rates_by_layer_are_heard() {
    let dir = tempfile::tempdir().unwrap();
    answers(dir.path(), "t.jsonl", false, 40);
    let mut seen: Vec<Vec<u8>> = Vec::new();
    let runs: [&[&str]; 7] = [
        &[],
        &["--optimizer", "lamb"],
        &["--optimizer", "lars", "--learning-rate", "1"],
        &["--optimizer", "lars-paper"],
        &["--layer-decay", "0.5"],
        &["--layer-lr", "layers.0=0.1"],
        &["--layer-lr", "layers.*=0"],
    ];
    for (i, extra) in runs.iter().enumerate() {
        let name = format!("run-{i}");
        let base = ["train", "--model", "embedded", "--data", "t.jsonl", "--steps", "2", "--batch", "1"];
        let more = ["--window", "32", "--rank", "2", "--out", &name];
        json(dir.path(), &[&base[..], &more[..], extra].concat());
        let bytes = adapter(dir.path(), &name);
        assert!(!seen.contains(&bytes), "{extra:?} changes something");
        seen.push(bytes);
    }
    let eval = |adapter: &[&str]| {
        let base = ["eval", "--model", "embedded", "--data", "t.jsonl", "--window", "32"];
        json(dir.path(), &[&base[..], adapter].concat())["mean_nll"].as_f64().unwrap()
    };
    let base = eval(&[]);
    assert_eq!(eval(&["--adapter", "run-6"]), base, "a factor of 0 trains nothing");
    assert_ne!(eval(&["--adapter", "run-5"]), base, "control");

    let fails = |extra: &[&str], code: i32, told: &str| {
        let base = ["train", "--model", "embedded", "--data", "t.jsonl", "--out", "x", "--window", "32"];
        let output = run(dir.path(), &[&base[..], extra].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{extra:?}: {stderr}");
        assert!(stderr.contains(told), "{extra:?}: {stderr}");
    };
    fails(&["--layer-lr", "head=2"], 1, "no adapter there");
    fails(&["--layer-lr", "layers.0"], 2, "SELECTOR=FACTOR");
    fails(&["--layer-lr", "layers.0=-1"], 2, "not a factor");
    fails(&["--layer-decay", "0"], 2, "--layer-decay");
    fails(&["--patience", "2"], 2, "--eval-data");
    fails(&["--optimizer", "sgd"], 2, "sgd");
}

#[test]
fn blocks_computed_again_give_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    answers(dir.path(), "t.jsonl", true, 40);
    let losses = |out: &str, extra: &[&str]| {
        train(dir.path(), out, &[&["--data", "t.jsonl"], extra].concat())["final_loss"].as_f64().unwrap()
    };
    let (whole, again) = (losses("whole", &[]), losses("again", &["--recompute"]));
    assert!((whole - again).abs() < 1e-5, "{whole} {again}");
}

#[test]
fn memory_is_what_was_predicted_and_less_where_blocks_are_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    answers(dir.path(), "t.jsonl", false, 400);
    let train = |out: &str, extra: &[&str]| {
        let base = ["train", "--model", "embedded", "--data", "t.jsonl", "--steps", "2", "--out", out];
        json(dir.path(), &[&base[..], &["--batch", "16", "--window", "256"], extra].concat())
    };
    let (whole, again) = (train("whole", &[]), train("again", &["--recompute"]));
    let planned = train("planned", &["--dry-run"])["step_memory_bytes"].as_f64().unwrap();
    let of = |report: &Value, name: &str| report[format!("memory_{name}_bytes")].as_f64();
    let Some(peak) = of(&whole, "peak") else { return };
    for (name, report) in [("whole", &whole), ("again", &again)] {
        let (peak, predicted) = (of(report, "peak").unwrap(), of(report, "predicted").unwrap());
        println!("{name}: {peak} of {predicted} predicted");
        assert!((0.8..1.4).contains(&(peak / predicted)), "{name}: {peak} of {predicted}");
    }
    assert!(of(&again, "peak").unwrap() < 0.65 * peak, "{again} {whole}");
    let predicted = of(&whole, "predicted").unwrap();
    assert!(planned < predicted && planned > 0.7 * predicted, "without what the program takes: {planned}");
}

#[test]
fn products_in_bf16_are_near_those_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    answers(dir.path(), "t.jsonl", false, 40);
    let mut found = Vec::new();
    for dtype in ["f32", "bf16"] {
        let base = ["train", "--model", "embedded", "--data", "t.jsonl", "--steps", "3", "--batch", "1"];
        json(dir.path(), &[&base[..], &["--window", "32", "--dtype", dtype, "--out", dtype]].concat());
        let base = ["eval", "--model", "embedded", "--data", "t.jsonl", "--window", "32"];
        let eval = json(dir.path(), &[&base[..], &["--adapter", "f32", "--dtype", dtype]].concat());
        assert_eq!(eval["dtype"], dtype);
        found.push((adapter(dir.path(), dtype), eval["mean_nll"].as_f64().unwrap()));
    }
    let apart = (found[0].1 - found[1].1).abs();
    assert!(apart < 0.02, "{apart} nats apart");
    // Without such products both are computed in f32.
    let rounds = firebrick_tensor::ops::Precision::Bf16.available();
    assert_eq!((found[0].0 != found[1].0, apart > 0.0), (rounds, rounds));
}
