//! A small specialization: every output is there, the same seed gives the same bytes, and a killed run resumes to them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{json, text};

const SMALL: &[&str] =
    &["specialize", "--steps", "4", "--window", "32", "--batch", "2", "--eval-tokens", "256", "--rank", "4"];

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
    let one = files(&dir.path().join("one"));
    for name in [
        "adapters/a/adapter_model.safetensors",
        "adapters/b/adapter_config.json",
        "merged/model.safetensors",
        "student/config.json",
        "model.gguf",
        "report.html",
        "report.json",
        "bits.toml",
        "ranks.toml",
    ] {
        assert!(one.contains_key(name), "{name} in {:?}", one.keys());
    }
    assert!(!one.keys().any(|k| k.starts_with(".stages")), "work in progress is gone");

    // Killed a few times on the way, it ends with the same bytes.
    let mut left_something = false;
    for milliseconds in [700, 1500, 3000] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_firebrick"))
            .args(arguments("two"))
            .args(["--resume", "--device", "flex"])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        left_something |= dir.path().join("two/.stages").exists();
    }
    assert!(left_something, "control: the kills came before the end");
    if dir.path().join("two/.stages").exists() {
        json(dir.path(), &[&arguments("two")[..], &["--resume"]].concat());
    }
    let two = files(&dir.path().join("two"));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    for (name, bytes) in &one {
        assert!(bytes == &two[name], "{name} differs after a resumption");
    }
    let other = json(dir.path(), &[&arguments("three")[..], &["--seed", "7"]].concat());
    assert_ne!(other["variants"], summary["variants"], "control: another seed, other numbers");
}
