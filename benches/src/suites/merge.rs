//! Merging three bf16 checkpoints of SmolLM2's size into one, and copying one as the bar; megabytes of the output per second.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::Device;
use firebrick_core::Seed;
use firebrick_merge::Merge;
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType, ModelFiles};
use firebrick_tensor::block::{DType, encode};
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, write_safetensors};
use firebrick_tensor::stream::Executor;

use crate::{Bench, Bound, Case};

const MODELS: [(&str, f64); 3] = [("a", 0.5), ("b", 0.3), ("c", 0.2)];
const METHODS: [&str; 7] =
    ["linear", "task_arithmetic", "slerp", "ties", "dare_ties", "della", "breadcrumbs"];

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let folder = bench.cache.join("merge");
    make(&folder, bench.note)?;
    let file = folder.join("base/model.safetensors");
    let bytes = fs::metadata(&file).with_context(|| file.display().to_string())?.len();
    for (name, sync) in [("copy", false), ("copy, synced", true)] {
        let to = folder.join("copy.safetensors");
        bench.measure(&case(name, bytes, 2), || Ok(None), &mut || bench.timed(|| copy(&file, &to, sync)))?;
        fs::remove_file(&to)?;
    }
    METHODS.iter().try_for_each(|method| {
        let files = 1 + models(method).len() + usize::from(*method != "linear");
        merge(bench, &folder, method, &case(method, bytes, files))
    })
}

/// The models that `method` merges, beside the base.
fn models(method: &str) -> &'static [(&'static str, f64)] {
    if method == "slerp" { &MODELS[..1] } else { &MODELS }
}

/// `files` is how many files of `bytes` are read and written.
fn case(name: &str, bytes: u64, files: usize) -> Case {
    Case {
        suite: "merge",
        name: name.into(),
        dtype: "bf16",
        unit: "MB/s",
        amount: bytes as f64 / 1e6,
        bound: Bound::Copy(bytes as f64 * files as f64),
    }
}

fn merge(bench: &Bench<'_>, folder: &Path, method: &str, case: &Case) -> Result<()> {
    if !bench.asks_for(case) {
        return Ok(());
    }
    let config = folder.join(format!("{method}.yml"));
    fs::write(&config, yaml(folder, method))?;
    let (ours, theirs) = (folder.join("merged"), folder.join("merged-by-peer"));
    let executor = Executor { overwrite: true, sha256: false, ..Executor::default() };
    let peer = || bench.peer("merge.py", &[&config, &theirs]);
    bench.measure(case, peer, &mut || {
        bench.timed(|| {
            let merge = Merge::open(&config)?;
            executor.run(&merge, &merge.target(&ours)?)?;
            Ok(())
        })
    })?;
    fs::remove_dir_all(&ours)?;
    match fs::remove_dir_all(&theirs) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// The configuration that both read.
fn yaml(folder: &Path, method: &str) -> String {
    // A JSON string is a YAML string, whatever the path has in it.
    let path = |name: &str| serde_json::Value::from(folder.join(name).to_string_lossy()).to_string();
    let mut text = format!("merge_method: {method}\n");
    if method != "linear" {
        text += &format!("base_model: {}\n", path("base"));
    }
    if method == "slerp" {
        text += "parameters: {t: 0.3}\n";
    }
    text += "dtype: bfloat16\nmodels:\n";
    for (name, weight) in models(method) {
        text += &format!("  - model: {}\n", path(name));
        match method {
            "slerp" => {}
            "linear" | "task_arithmetic" => text += &format!("    parameters: {{weight: {weight}}}\n"),
            _ => text += &format!("    parameters: {{weight: {weight}, density: 0.5}}\n"),
        }
    }
    text
}

/// Reads and writes every byte: what the system offers for copying may share blocks instead.
fn copy(from: &Path, to: &Path, sync: bool) -> Result<()> {
    let (mut from, mut to) = (File::open(from)?, File::create(to)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        to.write_all(&buffer[..n])?;
    }
    if sync {
        to.sync_all()?;
    }
    Ok(())
}

/// The base and three copies with 30 % of their weights moved a little, unless they are there from an earlier run.
fn make(folder: &Path, note: &dyn Fn(&str)) -> Result<()> {
    let base = folder.join("base");
    if !base.join("model.safetensors").exists() {
        note("making four checkpoints of 270 MB, once");
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let decoder = Decoder::random(smollm2(), Seed(0), &Device::flex())?;
        let tokenizer = ModelFiles::embedded()?.tokenizer;
        let executor = Executor { overwrite: true, sha256: false, ..Executor::default() };
        Export::decoder("base", &decoder, &tokenizer, ExportType::BF16).write(&base, &executor)?;
    }
    let checkpoint = Checkpoint::open(&base)?;
    for (i, (name, _)) in MODELS.iter().enumerate() {
        let moved = folder.join(name);
        if !moved.join("model.safetensors").exists() {
            perturb(&checkpoint, &moved, Seed(1 + i as u64))?;
        }
    }
    Ok(())
}

/// The shape of SmolLM2-135M.
fn smollm2() -> DecoderConfig {
    DecoderConfig {
        d_model: 576,
        d_ff: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        max_tokens: 8192,
        rope_theta: 1e5,
        norm_eps: 1e-5,
        tied_head: true,
        ..DecoderConfig::tiny(49152)
    }
}

fn perturb(base: &Checkpoint, to: &Path, seed: Seed) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in fs::read_dir(base.path())? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().contains("safetensors") {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    let mut tensors = Vec::new();
    for info in base.tensors() {
        let mut values = base.read_f32(&info.name)?;
        let noise = seed.uniform(&info.name, values.len(), 1.0);
        for (value, u) in values.iter_mut().zip(noise) {
            if u > 0.4 {
                *value += (u - 0.7) * 1e-3;
            }
        }
        let mut bytes = vec![0; 2 * values.len()];
        encode(DType::BF16, &values, &mut bytes)?;
        tensors.push((info.spec(), bytes));
    }
    // The tensors come last: a folder without them is not whole.
    let metadata = Metadata::from_iter([("format".to_string(), "pt".to_string())]);
    Ok(write_safetensors(to.join("model.safetensors"), &metadata, &tensors)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_merge::MergeConfig;

    #[test]
    fn both_methods_are_configured_with_any_path() {
        let folder = Path::new("a \"quoted\" folder: #1");
        for method in METHODS {
            let config = MergeConfig::parse(&yaml(folder, method)).unwrap();
            assert_eq!(
                config.modules[0].slices[0].sources.len(),
                models(method).len() + usize::from(config.base_model.is_some())
            );
            assert_eq!(config.models()[0].path, folder.join("a").to_string_lossy());
            assert_eq!(config.base_model.is_some(), method != "linear");
        }
    }

    #[test]
    fn a_copy_has_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let bytes: Vec<u8> = (0..(1 << 20) + 17).map(|i| (i % 251) as u8).collect();
        fs::write(&from, &bytes).unwrap();
        for sync in [false, true] {
            copy(&from, &to, sync).unwrap();
            assert_eq!(fs::read(&to).unwrap(), bytes);
        }
    }

    #[test]
    fn a_perturbed_copy_has_other_weights_and_the_same_files() {
        let folder = tempfile::tempdir().unwrap();
        let (base, moved) = (folder.path().join("base"), folder.path().join("moved"));
        let files = ModelFiles::embedded().unwrap();
        let executor = Executor::default();
        Export::files(&files, ExportType::BF16).write(&base, &executor).unwrap();
        let base = Checkpoint::open(&base).unwrap();
        perturb(&base, &moved, Seed(1)).unwrap();
        assert!(ModelFiles::open(&moved).is_ok());
        let moved = Checkpoint::open(&moved).unwrap();
        let name = &base.tensors()[0].name;
        let (a, b) = (base.read_f32(name).unwrap(), moved.read_f32(name).unwrap());
        let changed = a.iter().zip(&b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64;
        assert!((0.1..0.35).contains(&changed), "{changed}");
    }
}
