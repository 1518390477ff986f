//! What a model argument may be, and how the verbs open it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use firebrick_models::{Model, ModelFiles};
use firebrick_peft::LoraBank;
use firebrick_peft::hf;
use firebrick_tensor::stream::{Executor, StreamReport};

use crate::args::{Global, Usage};
use crate::ui::Terminal;

/// Names that `cargo xtask model` fetches, and the file each one is.
const FETCHED: &[(&str, &str)] = &[("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")];

/// Opens `embedded`, a folder, a GGUF file, or a name fetched with `cargo xtask model`.
pub fn open(model: &str) -> Result<ModelFiles> {
    if model == "embedded" {
        return ModelFiles::embedded().context("the embedded model");
    }
    let mut path = PathBuf::from(model);
    if let Some((name, file)) = FETCHED.iter().find(|(name, _)| *name == model)
        && !path.exists()
    {
        path = Path::new("target/models").join(name).join(file);
        if !path.exists() {
            let hint = format!("`{name}` is not here; fetch it with `cargo xtask model {name}`");
            return Err(Usage(hint).into());
        }
        let mut files = ModelFiles::open(&path)?;
        files.name = name.to_string();
        return Ok(files);
    }
    if !path.exists() {
        let known: Vec<&str> = FETCHED.iter().map(|(name, _)| *name).collect();
        return Err(Usage(format!(
            "{model}: no such file or folder; give a Hugging Face folder, a .gguf file, `embedded` or one of {}",
            known.join(", ")
        ))
        .into());
    }
    Ok(ModelFiles::open(&path)?)
}

/// The device of the command line.
pub fn device(global: &Global) -> Result<Device> {
    Ok(global.device.open()?)
}

/// Opens and loads a model.
pub fn load(model: &str, device: &Device) -> Result<Model> {
    Ok(open(model)?.load(device)?)
}

/// Loads PEFT folders as banks over `model`.
pub fn adapters(dirs: &[PathBuf], model: &Model, device: &Device) -> Result<Vec<LoraBank>> {
    dirs.iter().map(|dir| Ok(hf::load(dir, model.decoder.sites(), device)?.0)).collect()
}

/// The streaming executor as the command line asks for it.
pub fn executor<'a>(global: &Global, terminal: &'a Terminal) -> Executor<'a> {
    Executor {
        max_memory: global.max_memory.map(|s| s.0),
        threads: global.threads,
        resume: global.resume,
        overwrite: global.overwrite,
        progress: terminal,
        ..Executor::default()
    }
}

/// Prints what the executor wrote.
pub fn written(report: &StreamReport, terminal: &Terminal) -> Result<()> {
    terminal.result(report, || {
        format!(
            "wrote {} ({} tensors, {} bytes)",
            report.path.display(),
            report.tensors,
            report.written_bytes
        )
    })
}

/// Refuses an output that exists unless told to go on or to replace it.
pub fn check_output(path: &Path, global: &Global) -> Result<()> {
    if path.exists() && !global.overwrite && !global.resume {
        return Err(Usage(format!("{} exists; say --overwrite to replace it", path.display())).into());
    }
    Ok(())
}

/// Reads a text file; says where it stops being UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: not UTF-8 text at byte {at}", path.display())
    })
}
