//! The binary, run as a user runs it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod contract;
mod embed;
mod evaluate;
mod experts;
#[cfg(unix)]
mod faults;
mod fuzzing;
mod guide;
#[cfg(unix)]
mod hostile;
#[cfg(unix)]
mod interrupts;
mod kills;
mod memory;
mod merge_search;
mod methods;
mod outputs;
mod profiles;
mod python;
mod specialize;
mod train;
#[cfg(unix)]
mod tutorial;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use firebrick_models::tokenizer::train_bpe;
use serde_json::Value;

/// The binary, to be run in `dir`.
fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_firebrick"));
    command.args(arguments).current_dir(dir);
    command
}

/// Runs the binary in `dir`.
fn run(dir: &Path, arguments: &[&str]) -> Output {
    command(dir, arguments).output().unwrap()
}

/// Runs the binary with `--json` and gives what it printed.
fn json(dir: &Path, arguments: &[&str]) -> Value {
    let output = run(dir, &[arguments, &["--json", "--device", "flex"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{arguments:?}: stdout is not JSON ({e}): {}", String::from_utf8_lossy(&output.stdout))
    })
}

/// Every file in `dir` and below, by its path from there.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(dir: &Path, root: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                out.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(dir, dir, &mut out);
    out
}

/// A text of `kilobytes` that a small model can learn something from.
fn text(dir: &Path, name: &str, word: &str, kilobytes: usize) -> PathBuf {
    let mut text = String::new();
    let mut i = 0;
    while text.len() < kilobytes * 1024 {
        text += &format!("The {word} number {} follows the {word} number {}.\n", i + 1, i);
        i += 1;
        if i % 20 == 0 {
            text += "\n";
        }
    }
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Copies a tiny model of `firebrick-models` to `dir`, with a tokenizer, its configuration changed.
fn family(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../firebrick-models/tests/golden/families").join(name);
    let folder = dir.join(name);
    train_bpe(["the quick brown fox and the lazy dog, the other fox and the other dog"], 264)
        .unwrap()
        .save(&folder)
        .unwrap();
    std::fs::copy(golden.join("model.safetensors"), folder.join("model.safetensors")).unwrap();
    let mut config = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}
