//! `--max-memory`: what a merge really takes, as the kernel counts it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use firebrick_core::Seed;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Layout, TensorSpec, TensorWriter};

/// Threads and models of the merge.
const THREADS: u64 = 2;
const MODELS: [&str; 3] = ["a", "b", "c"];

/// What a run takes beside the cap and the program, in MiB: the mapped pages of the parts in work, 4 Mi elements of bf16 for each
/// thread and model (see [`firebrick_tensor::stream::Executor::max_memory`]), and what the allocator keeps: 7 to 13 measured.
const BESIDE: u64 = THREADS * MODELS.len() as u64 * 8 + 24;

/// A folder with `model.safetensors` of `tensors` matrices of `rows` times 8 KiB in bf16.
fn checkpoint(dir: &Path, name: &str, tensors: usize, rows: usize) {
    let specs: Vec<TensorSpec> = (0..tensors)
        .map(|i| TensorSpec::new(format!("model.layers.{i}.mlp.up_proj.weight"), DType::BF16, [rows, 4096]))
        .collect();
    std::fs::create_dir_all(dir.join(name)).unwrap();
    let file =
        std::io::BufWriter::new(std::fs::File::create(dir.join(name).join("model.safetensors")).unwrap());
    let mut writer =
        TensorWriter::new(file, Layout::safetensors(&Default::default(), &specs).unwrap()).unwrap();
    for spec in &specs {
        // Numbers near 1: the upper byte is 0x3f, the lower one random.
        let low = Seed(3).derive(&format!("{name}/{}", spec.name)).0;
        let bytes: Vec<u8> =
            (0..rows as u64 * 4096).flat_map(|i| [(low.wrapping_mul(i | 1) >> 32) as u8, 0x3f]).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// Runs the binary and gives the most memory it had, in MiB (VmHWM).
fn peak(dir: &Path, arguments: &[&str]) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_firebrick"))
        .args(arguments)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    let ended = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        most = most.max(kilobytes.unwrap_or(0));
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(ended.success(), "{arguments:?}");
    most >> 10
}

/// With `numerics: mergekit` methods that know angles hold whole vectors: of 4 MiB here, up to 13 for a tensor.
#[test]
fn rounded_merges_keep_to_their_cap() {
    if !cfg!(target_os = "linux") {
        println!("skipped: memory is read from /proc");
        return;
    }
    const WORKERS: u64 = 6;
    const CAP: u64 = 96;
    let dir = tempfile::tempdir().unwrap();
    for name in MODELS {
        checkpoint(dir.path(), name, WORKERS as usize, 256);
        checkpoint(&dir.path().join("small"), name, WORKERS as usize, 1);
    }
    let threads = WORKERS.to_string();
    for (method, more) in [
        ("karcher", "models: [{model: a}, {model: b}, {model: c}]\nparameters: {max_iter: 1}\n"),
        ("nuslerp", "base_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {weight: 0.5}\n"),
        ("multislerp", "models: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: 0.5}\n"),
        ("model_stock", "base_model: a\nmodels: [{model: b}, {model: c}]\n"),
    ] {
        let yaml = format!("merge_method: {method}\nnumerics: mergekit\ndtype: bfloat16\n{more}");
        for folder in [dir.path(), &dir.path().join("small")] {
            std::fs::write(folder.join("m.yml"), &yaml).unwrap();
        }
        let cap = format!("{CAP}MiB");
        let line = ["merge", "m.yml", method, "--threads", &threads, "--max-memory", &cap];
        let floor = peak(&dir.path().join("small"), &line);
        let found = peak(dir.path(), &line);
        println!("{method}: cap {CAP} MiB, {found} MiB at most, {floor} MiB where next to nothing is merged");
        // Mapped pages: 2 MiB of each model for each thread.
        let beside = WORKERS * MODELS.len() as u64 * 2 + 24;
        assert!(found <= floor + CAP + beside, "{method}: {found} MiB with a cap of {CAP} MiB");
        assert!(found > floor, "control: the peak was seen");
    }
}

#[test]
fn a_merge_keeps_to_its_cap() {
    if !cfg!(target_os = "linux") {
        println!("skipped: memory is read from /proc");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in MODELS {
        checkpoint(dir.path(), name, 6, 2048);
        checkpoint(&dir.path().join("small"), name, 6, 1);
    }
    let model = |name: &str| format!("  - model: {name}\n    parameters: {{weight: 0.5}}\n");
    let yaml = format!("merge_method: linear\nmodels:\n{}dtype: bfloat16\n", MODELS.map(model).concat());
    for folder in [dir.path(), &dir.path().join("small")] {
        std::fs::write(folder.join("m.yml"), &yaml).unwrap();
    }
    // The program itself: how large it is depends on what it is built for.
    let floor =
        peak(&dir.path().join("small"), &["merge", "m.yml", "out", "--threads", &THREADS.to_string()]);
    for (cap, out) in [(2u64, "tight"), (64, "wide")] {
        let (cap_text, threads) = (format!("{cap}MiB"), THREADS.to_string());
        let arguments = ["merge", "m.yml", out, "--threads", &threads, "--max-memory", &cap_text];
        let found = peak(dir.path(), &arguments);
        println!(
            "cap {cap} MiB: {found} MiB at most, {floor} MiB where next to nothing is merged, 384 MiB of files"
        );
        assert!(found <= floor + cap + BESIDE, "{found} MiB with a cap of {cap} MiB");
        assert!(found > floor, "control: the peak was seen");
    }
    let bytes = |out: &str| std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap();
    assert!(bytes("tight") == bytes("wide"), "the cap changes nothing but memory");
    // Control: a cap that nothing fits into is refused.
    let line = ["merge", "m.yml", "none", "--max-memory", "1kB"];
    crate::outputs::exits(dir.path(), &line, 1, "memory");
}
