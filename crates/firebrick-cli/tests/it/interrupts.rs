//! Ctrl-C: exit code 130, and a training that goes on as if it had not stopped.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::outputs::exits;
use crate::{files, json, run, text};

fn start(dir: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_firebrick"))
        .args(arguments)
        .args(["--device", "flex"])
        .current_dir(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until `ready`, sends Ctrl-C, and gives exit code and stderr.
fn interrupt(mut child: Child, mut ready: impl FnMut(&mut Child) -> bool) -> (Option<i32>, String) {
    while !ready(&mut child) {
        assert!(child.try_wait().unwrap().is_none(), "ended before it could be interrupted");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn an_interrupted_training_goes_on_as_it_was_begun() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 4);
    json(dir.path(), &["convert", "embedded", "a"]);
    let common = ["train", "--data", "t.txt", "--window", "32", "--batch", "1", "--steps", "120"];
    let train = |model: &'static str, out: &'static str, extra: &[&'static str]| {
        [&common[..], &["--model", model, "--out", out], extra].concat()
    };
    json(dir.path(), &train("a", "whole", &[]));
    let log = dir.path().join("out/.train/log.jsonl");
    let begun = |_: &mut Child| std::fs::read(&log).is_ok_and(|log| !log.is_empty());
    let (code, stderr) = interrupt(start(dir.path(), &train("a", "out", &[])), begun);
    assert!(code == Some(130) && stderr.contains("--resume"), "{code:?}: {stderr}");
    assert!(!dir.path().join("out/adapter_model.safetensors").exists(), "control: it had not ended");

    exits(dir.path(), &train("a", "out", &[]), 2, "--resume");
    json(dir.path(), &["convert", "embedded", "b", "--type", "bf16"]);
    exits(dir.path(), &train("b", "out", &["--resume"]), 1, "model");
    exits(dir.path(), &train("a", "out", &["--resume", "--alpha", "3"]), 1, "alpha 3");
    exits(dir.path(), &train("a", "out", &["--resume", "--dropout", "0.5"]), 1, "dropout 0.5");
    exits(dir.path(), &train("a", "out", &["--resume", "--seed", "5"]), 1, "seed");
    json(dir.path(), &train("a", "out", &["--resume"]));
    assert!(files(&dir.path().join("out")) == files(&dir.path().join("whole")), "as if it had not stopped");
    exits(dir.path(), &train("a", "out", &["--resume"]), 2, "--overwrite");
    json(dir.path(), &train("a", "out", &["--overwrite", "--seed", "5"]));
    let adapter = |out: &str| std::fs::read(dir.path().join(out).join("adapter_model.safetensors")).unwrap();
    assert_ne!(adapter("out"), adapter("whole"), "control: another seed, another adapter");
}

#[test]
fn an_interrupted_generation_ends_with_130() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = [
        "generate",
        "--model",
        "embedded",
        "--prompt",
        "In the beginning",
        "--max-tokens",
        "400",
        "--no-cache",
    ];
    let first = |child: &mut Child| {
        let out = child.stdout.as_mut().unwrap();
        out.read_exact(&mut [0]).is_ok()
    };
    let (code, stderr) = interrupt(start(dir.path(), &arguments), first);
    assert_eq!(code, Some(130), "{stderr}");
    assert!(!stderr.contains("--resume"), "there is nothing to resume: {stderr}");
}

#[test]
fn a_merge_of_stages_goes_on_from_those_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "a"]);
    let stages = |weight: f64| {
        let stage = |name: &str, model: &str, weight: f64| {
            let head = format!("name: {name}\nmerge_method: linear\n");
            format!(
                "{head}models: [{{model: {model}}}]\nparameters: {{weight: {weight}, normalize: false}}\n"
            )
        };
        let all = [stage("first", "a", weight), stage("second", "first", 2.0), stage("last", "second", 2.0)];
        std::fs::write(dir.path().join("m.yml"), all.join("---\n")).unwrap();
    };
    // A file in the place of the second stage's folder of unfinished parts.
    let blocked = || {
        let (results, bar) = (dir.path().join(".out.stages"), ".second.partial");
        std::fs::create_dir_all(&results).unwrap();
        std::fs::write(results.join(bar), "").unwrap();
        exits(dir.path(), &["merge", "m.yml", "out", "--resume"], 1, bar);
        std::fs::remove_file(results.join(bar)).unwrap();
        results.join("first/model.safetensors")
    };
    let resumed = || {
        let output =
            run(dir.path(), &["merge", "m.yml", "out", "--resume", "--overwrite", "--device", "flex"]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        assert!(!dir.path().join(".out.stages").exists(), "nothing of the stages stays");
        (stderr, std::fs::read(dir.path().join("out/model.safetensors")).unwrap())
    };
    stages(0.5);
    let expected = resumed().1;
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    assert!(blocked().exists());
    let (stderr, bytes) = resumed();
    assert!(stderr.contains("`first` is there") && !stderr.contains("`second` is there"), "{stderr}");
    assert!(bytes == expected);

    // With other settings, or another input, it is done again.
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    assert!(blocked().exists());
    stages(0.25);
    let (stderr, bytes) = resumed();
    assert!(!stderr.contains("is there") && bytes != expected, "{stderr}");
    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    assert!(blocked().exists());
    json(dir.path(), &["convert", "embedded", "a", "--overwrite"]);
    assert!(!resumed().0.contains("is there"), "another file with the same bytes");
}
