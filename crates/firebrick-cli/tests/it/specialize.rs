//! A small specialization: every output is there, the same seed gives the same bytes, and a killed run resumes to them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use firebrick_core::Seed;

use crate::{files, json, run, text};

const SMALL: &[&str] =
    &["specialize", "--steps", "4", "--window", "32", "--batch", "2", "--eval-tokens", "256", "--rank", "4"];

/// What appears in the output in the course of a run: records of stages, and a log inside the training of an adapter.
const TRAINING: &str = ".stages/adapter-b/log.jsonl";
const POINTS: &[&str] = &[
    ".stages/run.json",
    ".stages/profile.json",
    ".stages/adapter-a.json",
    TRAINING,
    ".stages/adapter-b.json",
    ".stages/merge.json",
    ".stages/route.json",
    ".stages/quantize-planned.json",
    ".stages/quantize-uniform.json",
    ".stages/distill.json",
    ".stages/evaluate-base.json",
    ".stages/evaluate-student.json",
];

/// Runs the binary until `path` is there, and kills it.
fn kill_at(dir: &Path, arguments: &[&str], path: &Path) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_firebrick"))
        .args(arguments)
        .args(["--resume", "--device", "flex"])
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ended = None;
    while !path.exists() && ended.is_none() {
        std::thread::sleep(Duration::from_millis(1));
        ended = child.try_wait().unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(path.exists(), "{} never appeared ({ended:?})", path.display());
}

#[test]
fn repeats_and_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (name, word) in [("a.txt", "apple"), ("b.txt", "bridge")] {
        text(dir.path(), name, word, 16);
    }
    let data = ["--data", "a=a.txt", "b=b.txt"];
    let arguments = |out: &'static str| [SMALL, &data, &["--out", out]].concat();
    let summary = json(dir.path(), &arguments("one"));
    let names: Vec<&str> =
        summary["variants"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["base", "adapter a", "adapter b", "routed adapters", "merged", "quantized (GGUF)", "student"]
    );
    for plan in summary["bit_plans"].as_array().unwrap() {
        assert!(
            plan["mean_bits"].as_f64().unwrap() <= 3.0 && plan["file_bytes"].as_u64().unwrap() > 0,
            "{plan}"
        );
    }
    let one = files(&dir.path().join("one"));
    for name in [
        "adapters/a/adapter_model.safetensors",
        "adapters/a/log.jsonl",
        "adapters/b/adapter_config.json",
        "merged/model.safetensors",
        "student/config.json",
        "model.gguf",
        "report.html",
        "report.json",
        "summary.json",
        "bits.toml",
        "ranks.toml",
    ] {
        assert!(one.contains_key(name), "{name} in {:?}", one.keys());
    }
    assert!(!one.keys().any(|k| k.starts_with(".stages")), "work in progress is gone");

    // Killed inside a training, at three other points, and right after the end, it ends with the same bytes.
    let mut drawn: Vec<&str> = POINTS.iter().copied().filter(|p| *p != TRAINING).collect();
    drawn.sort_by_key(|point| Seed(29).derive(point).0);
    drawn.truncate(3);
    let two = dir.path().join("two");
    for point in POINTS.iter().filter(|p| **p == TRAINING || drawn.contains(p)) {
        kill_at(dir.path(), &arguments("two"), &two.join(point));
        assert!(!two.join("summary.json").exists(), "control: {point} came before the end");
    }
    kill_at(dir.path(), &arguments("two"), &two.join("summary.json"));
    let resumed = json(dir.path(), &[&arguments("two")[..], &["--resume"]].concat());
    assert_eq!(resumed["variants"], summary["variants"]);
    let same = || {
        let two = files(&two);
        assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
        for (name, bytes) in &one {
            assert!(bytes == &two[name], "{name} differs after a resumption");
        }
    };
    same();
    // Complete by now: says what it found, and leaves everything as it is.
    assert_eq!(json(dir.path(), &[&arguments("two")[..], &["--resume"]].concat()), resumed);
    same();
    let refused = |extra: &[&str]| {
        let output = run(dir.path(), &[&arguments("two")[..], &["--device", "flex"], extra].concat());
        assert_eq!(output.status.code(), Some(2), "{extra:?}: {}", String::from_utf8_lossy(&output.stderr));
        same();
    };
    refused(&[]);
    refused(&["--resume", "--seed", "7"]);
    let other = json(dir.path(), &[&arguments("three")[..], &["--seed", "7"]].concat());
    assert_ne!(other["variants"], summary["variants"], "control: another seed, other numbers");
}

#[test]
fn goes_on_with_the_same_weights_only() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "a.txt", "apple", 16);
    json(dir.path(), &["convert", "embedded", "m"]);
    let arguments = [SMALL, &["--data", "a=a.txt", "--out", "out", "--model", "m"]].concat();
    let stages = dir.path().join("out/.stages");
    kill_at(dir.path(), &arguments, &stages.join("run.json"));
    // One bit of one weight.
    let weights = dir.path().join("m/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let output = run(dir.path(), &[&arguments[..], &["--resume", "--device", "flex"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("another model"), "{stderr}");
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    // Control: with the old weight it does go on.
    kill_at(dir.path(), &arguments, &stages.join("profile.json"));
}
