//! Models on disk: writing them as a bf16 folder and as Q8_0 GGUF, and opening and reading a bf16 folder.

use std::path::Path;

use anyhow::{Context, Result};
use firebrick_models::{Export, ExportType, ModelFiles};
use firebrick_tensor::checkpoint::Checkpoint;
use firebrick_tensor::stream::Executor;

use crate::{Bench, Bound, Case};

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let folder = bench.cache.join("checkpoint");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for (name, files) in bench.models {
        let bf16 = folder.join(format!("{name}-bf16"));
        write(bench, name, files, ExportType::BF16, &bf16)?;
        write(bench, name, files, ExportType::Q8_0, &folder.join("model.gguf"))?;
        if !bf16.exists() {
            Export::files(files, ExportType::BF16).write(&bf16, &executor())?;
        }
        read(bench, name, &bf16)?;
    }
    std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())
}

fn executor() -> Executor<'static> {
    Executor { overwrite: true, sha256: false, ..Executor::default() }
}

fn case(name: String, dtype: &'static str, bytes: u64, moved: f64) -> Case {
    let (unit, bound) = ("MB/s", Bound::Copy(moved));
    Case { suite: "checkpoint", name, dtype, unit, amount: bytes as f64 / 1e6, bound }
}

/// Megabytes of the output per second.
fn write(bench: &Bench<'_>, name: &str, files: &ModelFiles, dtype: ExportType, to: &Path) -> Result<()> {
    let executor = executor();
    let plan = Export::files(files, dtype).plan(to, &executor)?;
    let moved = (plan.read_bytes + plan.written_bytes) as f64;
    let stored = dtype.dtype().name();
    let case = case(format!("{name} to {stored}"), stored, plan.written_bytes, moved);
    bench.measure(&case, || Ok(None), &mut || {
        bench.timed(|| {
            Export::files(files, dtype).write(to, &executor)?;
            Ok(())
        })
    })
}

/// Megabytes of the file per second; every tensor becomes f32.
fn read(bench: &Bench<'_>, name: &str, folder: &Path) -> Result<()> {
    let elements: usize = Checkpoint::open(folder)?.tensors().iter().map(|t| t.elements()).sum();
    let case = case(format!("{name} read"), "bf16", 2 * elements as u64, 6.0 * elements as f64);
    bench.measure(&case, || Ok(None), &mut || {
        bench.timed(|| {
            let checkpoint = Checkpoint::open(folder)?;
            for tensor in checkpoint.tensors() {
                std::hint::black_box(checkpoint.read_f32(&tensor.name)?);
            }
            Ok(())
        })
    })
}
