//! Runs killed at any moment: what they leave is the old output, nothing, or something to go on from to the same bytes.
//!
//! `specialize` is killed at chosen points in `specialize.rs`, and here in the long test only: one run takes many seconds.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use firebrick_core::Seed;

use crate::outputs::prepare;
use crate::{files, json, text};

/// Moments at which each verb is killed, in the tests that always run and in the long one.
const MOMENTS: (u64, u64) = (4, 50);

fn start(dir: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_firebrick"))
        .args(arguments)
        .args(["--device", "flex"])
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for at most `limit`, then kills. Exit code and message, or none if it was killed.
fn end(mut child: Child, limit: Duration) -> Option<(Option<i32>, String)> {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() >= limit {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let output = child.wait_with_output().unwrap();
    Some((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// The files of an output; of a GGUF file, of it and its provenance.
fn output(dir: &Path, out: &str) -> BTreeMap<String, Vec<u8>> {
    files(dir)
        .into_iter()
        .filter(|(name, _)| name.starts_with(out))
        .map(|(name, bytes)| (name[out.len()..].to_string(), bytes))
        .collect()
}

fn remove(dir: &Path, out: &str) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(out) {
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
        }
    }
}

/// Kills `arguments`, which write `out`, at so many random moments of their run, going on each time with `again`; once
/// it is through, it begins anew. Whenever it is through, the output is the one of a run that was left alone.
fn killed(dir: &Path, arguments: &[&str], again: &[&str], out: &str, moments: u64) {
    let begun = Instant::now();
    let (code, stderr) = end(start(dir, arguments), Duration::from_secs(300)).expect("it ends");
    assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
    let whole = output(dir, out);
    let length = begun.elapsed();
    assert!(!whole.is_empty());
    remove(dir, out);

    let resume = [arguments, again].concat();
    let (mut kills, mut ends) = (0, 0);
    let mut draw = 0u64;
    while kills < moments || ends == 0 {
        draw += 1;
        // Past the last moment nothing is killed any more.
        let share = Seed(17).derive(&format!("{}/{draw}", arguments[0])).0 as f64 / u64::MAX as f64;
        let limit = if kills < moments { length.mul_f64(1.1 * share) } else { Duration::from_secs(300) };
        let Some((code, stderr)) = end(start(dir, &resume), limit) else {
            kills += 1;
            continue;
        };
        // An output that is there already was complete when the kill came.
        let there = code == Some(2) && stderr.contains("--overwrite");
        assert!(code == Some(0) || there, "{resume:?} after {kills} kills: {code:?}: {stderr}");
        let found = output(dir, out);
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            whole.keys().collect::<Vec<_>>(),
            "{resume:?} after {kills} kills"
        );
        for (name, bytes) in &found {
            assert!(*bytes == whole[name], "{resume:?}: {out}{name} is another after {kills} kills");
        }
        let strays: Vec<String> = files(dir)
            .into_keys()
            .filter(|name| name.contains(".partial") || name.contains(".part"))
            .collect();
        assert!(there || strays.is_empty(), "{resume:?}: {strays:?}");
        remove(dir, &format!(".{out}"));
        remove(dir, out);
        ends += 1;
    }
    println!(
        "{}: {kills} kills over {:.2} s each, {ends} complete outputs",
        arguments[0],
        length.as_secs_f64()
    );
}

fn train(moments: u64) {
    let dir = prepare();
    let line = "train --model a --data t.txt --window 32 --batch 1 --steps 12 --checkpoint-every 2 --out out";
    killed(dir.path(), &line.split(' ').collect::<Vec<_>>(), &["--resume"], "out", moments);
}

fn merge(moments: u64) {
    let dir = prepare();
    killed(dir.path(), &["merge", "m.yml", "out"], &["--resume"], "out", moments);
}

fn search(moments: u64) {
    let dir = prepare();
    json(dir.path(), &["convert", "a", "packed.gguf", "--type", "q4_0"]);
    let yaml = "merge_method: linear\nmodels: [{model: a}, {model: packed.gguf}]\nparameters: {weight: 0.5}\ndtype: float32\n";
    std::fs::write(dir.path().join("m.yml"), yaml).unwrap();
    let line =
        "merge m.yml --out out --search --search-data t.txt --window 32 --windows 2 --groups 2 --budget 20";
    killed(dir.path(), &line.split(' ').collect::<Vec<_>>(), &["--resume"], "out", moments);
}

fn quantize(moments: u64) {
    let dir = prepare();
    let line = "quantize --model a --data t.txt --window 32 --windows 2 --method rtn --out out.gguf";
    killed(dir.path(), &line.split(' ').collect::<Vec<_>>(), &[], "out.gguf", moments);
}

fn specialize(moments: u64) {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "apple", 8);
    let line =
        "specialize --steps 2 --window 32 --batch 1 --eval-tokens 64 --rank 2 --data a=t.txt --out out";
    killed(dir.path(), &line.split(' ').collect::<Vec<_>>(), &["--resume"], "out", moments);
}

#[test]
fn a_killed_training_goes_on() {
    train(MOMENTS.0);
}

#[test]
fn a_killed_merge_goes_on() {
    merge(MOMENTS.0);
}

#[test]
fn a_killed_search_goes_on() {
    search(MOMENTS.0);
}

#[test]
fn a_killed_quantization_is_done_again() {
    quantize(MOMENTS.0);
}

/// The old model is there until the new one is: either can be loaded after any kill and one more run.
#[test]
fn a_killed_overwriting_leaves_the_old_or_the_new() {
    let dir = prepare();
    let path = |name: &str| dir.path().join(name).join("model.safetensors");
    let convert = |dtype: &'static str| ["convert", "a", "out", "--type", dtype, "--overwrite"];
    let run = |dtype| end(start(dir.path(), &convert(dtype)), Duration::from_secs(60)).unwrap();
    assert_eq!(run("f16").0, Some(0));
    let old = std::fs::read(path("out")).unwrap();
    let begun = Instant::now();
    assert_eq!(run("bf16").0, Some(0));
    let (new, length) = (std::fs::read(path("out")).unwrap(), begun.elapsed());
    assert!(old != new, "control");
    for moment in 0..12u32 {
        assert_eq!(run("f16").0, Some(0), "{moment}");
        // Towards the end, where one takes the place of the other.
        let share = 0.7 + 0.4 * Seed(5).derive(&moment.to_string()).0 as f64 / u64::MAX as f64;
        end(start(dir.path(), &convert("bf16")), length.mul_f64(share));
        let aside = dir.path().join(".out.partial/old/model.safetensors");
        let found = std::fs::read(path("out")).or_else(|_| std::fs::read(aside)).unwrap();
        assert!(found == old || found == new, "{moment}");
    }
}

#[test]
#[ignore = "minutes: 50 moments"]
fn a_training_killed_at_many_moments() {
    train(MOMENTS.1);
}

#[test]
#[ignore = "minutes: 50 moments"]
fn a_merge_killed_at_many_moments() {
    merge(MOMENTS.1);
}

#[test]
#[ignore = "minutes: 50 moments"]
fn a_search_killed_at_many_moments() {
    search(MOMENTS.1);
}

#[test]
#[ignore = "minutes: 50 moments"]
fn a_quantization_killed_at_many_moments() {
    quantize(MOMENTS.1);
}

#[test]
#[ignore = "minutes: 50 moments"]
fn a_specialization_killed_at_many_moments() {
    specialize(MOMENTS.1);
}
