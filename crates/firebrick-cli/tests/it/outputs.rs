//! What a run leaves alone: outputs that exist, work of other runs, and with --dry-run everything.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::{files, json, run, text};

/// Runs the binary; its exit code must be `code`, and stderr say `part`.
pub fn exits(dir: &Path, arguments: &[&str], code: i32, part: &str) {
    let output = run(dir, &[arguments, &["--device", "flex"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(stderr.contains(part), "{arguments:?} should say `{part}`: {stderr}");
}

const MERGE: &str =
    "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1.0}\ndtype: float32\n";
const MODEL: [&str; 6] = ["--model", "embedded", "--data", "t.txt", "--window", "32"];

/// Every verb that writes, with its output at `out`.
pub fn writers(out: &str) -> Vec<Vec<&str>> {
    let of = |head: &[&'static str], tail: &[&'static str]| {
        let mut all: Vec<&str> = [head, &MODEL, tail].concat();
        all.extend(["--out", out]);
        all
    };
    vec![
        vec!["convert", "embedded", out],
        vec!["merge", "m.yml", out],
        of(&["train"], &["--steps", "2", "--batch", "1"]),
        of(&["profile"], &["--windows", "2"]),
        of(&["quantize"], &["--windows", "2", "--method", "rtn"]),
        of(&["prune"], &["--windows", "2", "--drop", "mlp", "--count", "1"]),
        vec!["specialize", "--data", "a=t.txt", "--window", "32", "--steps", "1", "--out", out],
        vec!["extract-lora", "embedded", "b.gguf", "--rank", "2", "--out", out],
        vec!["transplant", "embedded", "a", "--out", out],
    ]
}

/// A folder with a text, a model and a merge of it.
pub fn prepare() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 4);
    json(dir.path(), &["convert", "embedded", "a"]);
    json(dir.path(), &["convert", "embedded", "b.gguf", "--type", "q4_0"]);
    std::fs::write(dir.path().join("m.yml"), MERGE).unwrap();
    dir
}

#[test]
fn wrong_targets_and_settings_are_found_before_the_work() {
    let dir = prepare();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let before = files(dir.path());
    let of = |verb: &'static str, more: &[&'static str]| [&[verb], &MODEL[..], more].concat();
    let prune = ["--windows", "2", "--drop", "mlp", "--count", "1", "--out"];
    for (line, says) in [
        (of("imatrix", &["--out", "folder"]), "folder is a folder; name a file"),
        (of("profile", &["--out", "b.gguf", "--overwrite"]), "b.gguf is a file; name a folder"),
        (of("profile", &["--mean-bits", "1.5", "--out", "p"]), "--mean-bits 1.5: at least 2"),
        (of("profile", &["--mean-rank=-1", "--out", "p"]), "--mean-rank -1"),
        (of("profile", &["--against", "nowhere", "--out", "p"]), "nowhere"),
        (of("prune", &[&prune[..], &["p", "--type", "q4_0"]].concat()), ".gguf"),
        (vec!["specialize", "--rank", "1", "--out", "p"], "--rank 1 is not between 2 and 32"),
        (vec!["specialize", "--drop-blocks", "18446744073709551615", "--out", "p"], "--drop-blocks"),
    ] {
        let output = run(dir.path(), &line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(says), "{line:?} should say `{says}`: {stderr}");
        assert!(!stderr.contains("profile") || line[0] == "profile", "{line:?} was begun: {stderr}");
    }
    assert!(files(dir.path()) == before);
    json(dir.path(), &of("imatrix", &["--windows", "2", "--out", "new/i.gguf"]));
    assert!(dir.path().join("new/i.gguf").exists());
}

#[test]
fn a_plan_that_cannot_work_is_a_failure_in_every_verb_that_exports() {
    let dir = prepare();
    let before = files(dir.path());
    let exports = |verb: &Vec<&str>| ["convert", "quantize", "prune"].contains(&verb[0]);
    for verb in writers("out").iter().filter(|verb| exports(verb)) {
        exits(dir.path(), &[&verb[..], &["--max-memory", "1"]].concat(), 1, "memory");
    }
    assert!(files(dir.path()) == before);
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = prepare();
    let before = files(dir.path());
    let eval = ["eval", "--model", "embedded", "--data", "t.txt", "--window", "32", "--logits", "out"];
    for verb in writers("out").into_iter().chain([eval.to_vec()]) {
        let plan = json(dir.path(), &[&verb[..], &["--dry-run"]].concat());
        assert!(plan.as_object().is_some_and(|p| p.len() > 2), "{verb:?}: {plan}");
        assert!(files(dir.path()) == before, "{verb:?} --dry-run wrote something");
    }
    let nothing = "--dry-run";
    exits(dir.path(), &["inspect", "embedded", "--dry-run"], 2, nothing);
    exits(dir.path(), &["devices", "--dry-run"], 2, nothing);
    exits(dir.path(), &["generate", "--model", "embedded", "--prompt", "x", "--dry-run"], 2, nothing);
    exits(dir.path(), &["merge", "m.yml", "out", "--analyze", "--dry-run"], 2, nothing);
    exits(
        dir.path(),
        &["convert", "a", "out", "--type", "f16", "--dry-run", "--max-memory", "1"],
        1,
        "memory",
    );
    assert!(files(dir.path()) == before);

    // A plan for a run that was interrupted leaves what that run left.
    let work = dir.path().join("out/.train");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("log.jsonl"), "").unwrap();
    let train = writers("out").swap_remove(2);
    json(dir.path(), &[&train[..], &["--overwrite", "--dry-run"]].concat());
    assert!(work.join("log.jsonl").exists());
    json(dir.path(), &[&train[..], &["--overwrite"]].concat());
    assert!(!work.exists(), "control: without --dry-run it is done away with");
}

#[test]
fn what_exists_is_kept_unless_it_is_to_be_replaced() {
    let dir = prepare();
    for verb in writers("foreign") {
        std::fs::create_dir_all(dir.path().join("foreign")).unwrap();
        let readme = dir.path().join("foreign/README.md");
        std::fs::write(&readme, "mine").unwrap();
        exits(dir.path(), &verb, 2, "--overwrite");
        exits(dir.path(), &[&verb[..], &["--resume"]].concat(), 2, "--overwrite");
        assert_eq!(files(&dir.path().join("foreign")).len(), 1, "{verb:?}");
        assert_eq!(std::fs::read_to_string(&readme).unwrap(), "mine", "{verb:?}");
    }
    // Where the whole folder would be replaced, files of others stop it even then.
    for (i, verb) in writers("foreign").into_iter().enumerate().filter(|(i, _)| ![2, 3, 7].contains(i)) {
        exits(dir.path(), &[&verb[..], &["--overwrite"]].concat(), 2, "README.md");
        assert!(dir.path().join("foreign/README.md").exists(), "{i}");
    }
    // An empty folder is as good as none, and what we wrote may be replaced.
    for verb in writers("empty").into_iter().filter(|verb| verb[0] != "specialize") {
        let out = dir.path().join("empty");
        std::fs::create_dir_all(&out).unwrap();
        json(dir.path(), &verb);
        let first = files(&out);
        assert!(!first.is_empty(), "{verb:?}");
        exits(dir.path(), &[&verb[..], &["--resume"]].concat(), 2, "--overwrite");
        json(dir.path(), &[&verb[..], &["--overwrite"]].concat());
        assert!(files(&out) == first, "{verb:?}: the same again");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_closed_stdout_is_not_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["inspect", "embedded", "--json"][..],
        &["generate", "--model", "embedded", "--prompt", "x", "--max-tokens", "4"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_firebrick"))
            .args(arguments)
            .current_dir(dir.path())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]), "{arguments:?}");
    }
}
