//! What a model argument may be, and how the verbs open it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::Device;
use clap::ValueEnum;
use firebrick_core::{Brick, LayerPlan, ResolvedPlan, Site, folder, write_atomic};
use firebrick_models::hub::HubModel;
use firebrick_models::tokenizer::Tokenizer;
use firebrick_models::{EncodedWeight, EncoderFiles, Export, Model, ModelError, ModelFiles};
use firebrick_moe::AdapterRouter;
use firebrick_peft::LoraBank;
use firebrick_peft::hf;
use firebrick_quant::{PackedLinear, QuantizedMatrix};
use firebrick_tensor::ops::{PackedInputs, Precision};
use firebrick_tensor::stream::{Executor, StreamError, StreamPlan, StreamReport};
use firebrick_train::TextData;
use serde_json::json;

use crate::args::{Global, Usage};
use crate::ui::Terminal;

/// Names that `cargo xtask model` fetches, and the file each one is; none for a folder.
const FETCHED: &[(&str, &str)] = &[("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("minilm", "")];

/// Opens `embedded`, a folder, a GGUF file, or a name fetched with `cargo xtask model`.
pub fn open(model: &str) -> Result<ModelFiles> {
    open_with(model, ModelFiles::open)
}

/// Opens a model like [`open`], whatever is wrong with its tensors.
pub fn open_unchecked(model: &str) -> Result<ModelFiles> {
    open_with(model, ModelFiles::open_unchecked)
}

fn open_with(model: &str, open: fn(&Path) -> Result<ModelFiles, ModelError>) -> Result<ModelFiles> {
    if model == "embedded" {
        return ModelFiles::embedded().context("the embedded model");
    }
    let path = locate(model)?;
    let mut files = open(&path)?;
    if path != Path::new(model) {
        files.name = model.to_string();
    }
    Ok(files)
}

/// Opens an encoder: a folder, or a name fetched with `cargo xtask model`.
pub fn open_encoder(model: &str) -> Result<EncoderFiles> {
    let path = locate(model)?;
    let mut files = EncoderFiles::open(&path)?;
    if path != Path::new(model) {
        files.name = model.to_string();
    }
    Ok(files)
}

/// Whether this names an encoder rather than a decoder.
pub fn is_encoder(model: &str) -> bool {
    locate(model).is_ok_and(|path| EncoderFiles::is_encoder(&path))
}

/// The path itself, or where a name fetched with `cargo xtask model` lies.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    if let Some((name, file)) = FETCHED.iter().find(|(name, _)| *name == model) {
        let starts = [std::env::current_dir(), std::env::current_exe()];
        let fetched = Path::new("target/models").join(name).join(file);
        return upward(starts.iter().flatten(), &fetched).ok_or_else(|| {
            Usage(format!("`{name}` is not here; fetch it with `cargo xtask model {name}`")).into()
        });
    }
    if let Ok(model) = model.parse::<HubModel>() {
        let cache = hub_cache()?;
        let cached = model.cached(&cache);
        let what =
            format!("no such file or folder, and not in the Hugging Face Hub's cache {}", cache.display());
        return cached
            .ok_or_else(|| Usage(format!("{model}: {what}; `firebrick fetch {model}` fetches it")).into());
    }
    let known: Vec<&str> = FETCHED.iter().map(|(name, _)| *name).collect();
    Err(Usage(format!(
        "{model}: no such file or folder; give a Hugging Face folder, a .gguf file, `embedded`, org/name of the Hugging Face Hub or one of {}",
        known.join(", ")
    ))
    .into())
}

/// Where models of the Hugging Face Hub lie on this machine: `HF_HUB_CACHE`, `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
#[allow(
    clippy::disallowed_methods,
    reason = "where the cache is comes from the environment, for every client"
)]
pub fn hub_cache() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || set("HF_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")));
    let cache = set("HF_HUB_CACHE").or_else(|| Some(home()?.join("hub")));
    cache.ok_or_else(|| Usage("no home folder for the Hugging Face Hub's cache: set HF_HOME".into()).into())
}

/// The first `relative` that exists in one of `starts` or in a folder above.
fn upward<'a>(starts: impl Iterator<Item = &'a PathBuf>, relative: &Path) -> Option<PathBuf> {
    starts.flat_map(|start| start.ancestors()).map(|folder| folder.join(relative)).find(|path| path.exists())
}

/// The device of the command line.
pub fn device(global: &Global) -> Result<Device> {
    Ok(global.device.open()?)
}

/// The type that the products of linear layers and of the head take, and that weights are stored in which do not train; all else is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As they are.
    F32,
    /// Rounded to bf16.
    Bf16,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        }
    }

    /// The precision to compute in on `device`; says so where that is f32 all the same.
    pub fn precision(self, device: &Device, terminal: &Terminal) -> Precision {
        if self == Dtype::F32 {
            return Precision::F32;
        }
        if *device != Device::flex() || !Precision::Bf16.available() {
            terminal.say("no bf16 products here (they need a CPU with AMX, or AMD's with AVX512-BF16): computing in f32");
            return Precision::F32;
        }
        Precision::Bf16
    }
}

/// Loads a model that is not trained, to compute in `precision`.
pub fn load_in(files: ModelFiles, precision: Precision, device: &Device) -> Result<Model> {
    Ok(match precision {
        Precision::F32 => files.load(device)?,
        Precision::Bf16 => files.load_in_bf16(device)?,
    })
}

/// What becomes of weights that a file has in bf16, or in GGUF blocks of `Q4_0`, `Q4_1` or `Q8_0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Packed {
    /// They are decoded to f32 when the model is loaded.
    Off,
    /// They stay as they are, and products are those of f32 up to rounding.
    Exact,
    /// As exact, but inputs of blocks are rounded to 8 bits in blocks of 32, as in llama.cpp.
    #[value(name = "8bit")]
    EightBits,
}

impl Packed {
    /// The same numbers in less memory, where there is a kernel for it.
    pub fn default_for(device: &Device) -> Packed {
        if *device == Device::flex() { Packed::Exact } else { Packed::Off }
    }
}

/// Loads a model to compute in `precision`, and the brick that computes with its packed weights if any are left packed.
pub fn load_packed(
    files: ModelFiles,
    packed: Packed,
    precision: Precision,
    device: &Device,
) -> Result<(Model, Option<PackedLinear>)> {
    let inputs = match packed {
        Packed::Off => return Ok((load_in(files, precision, device)?, None)),
        Packed::Exact => PackedInputs::Exact,
        Packed::EightBits => PackedInputs::EightBits,
    };
    let (model, weights) = files.load_packed(precision, device)?;
    let brick = (!weights.is_empty()).then(|| PackedLinear::from_packed(weights).with_inputs(inputs));
    Ok((model, brick))
}

/// The bricks in force, adapters above packed weights.
pub fn bricks<'a>(packed: &'a Option<PackedLinear>, banks: &'a [LoraBank]) -> Vec<&'a dyn Brick> {
    let packed = packed.iter().map(|b| b as &dyn Brick);
    packed.chain(banks.iter().map(|b| b as &dyn Brick)).collect()
}

/// Opens and loads a model.
pub fn load(model: &str, device: &Device) -> Result<Model> {
    Ok(open(model)?.load(device)?)
}

/// Loads PEFT folders as banks over `model`.
pub fn adapters(dirs: &[PathBuf], model: &Model, device: &Device) -> Result<Vec<LoraBank>> {
    dirs.iter().map(|dir| Ok(hf::load(dir, model.decoder.sites(), device)?.0)).collect()
}

/// A router over adapters, and what it routes over.
pub struct Routed {
    pub router: AdapterRouter,
    /// By slot.
    pub names: Vec<String>,
    pub banks: Vec<LoraBank>,
}

/// Loads a router as `specialize` writes it, and its adapters: those of `dirs` whose folders have their names.
pub fn routed(router: &Path, dirs: &[PathBuf], model: &Model, device: &Device) -> Result<Routed> {
    let (loaded, names) = AdapterRouter::load(router, device)?;
    let (width, d_model) = (loaded.width(), model.decoder.config().d_model);
    if width != d_model {
        bail!("{}: a router of width {width} for a model of width {d_model}", router.display());
    }
    let called = |name: &String| dirs.iter().find(|dir| dir.file_name().is_some_and(|f| f == name.as_str()));
    let of = |(slot, name): (usize, &String)| {
        let Some(dir) = called(name) else {
            let what = format!("--router {}: no --adapter folder is called `{name}`", router.display());
            return Err(Usage(what).into());
        };
        Ok(hf::load(dir, model.decoder.sites(), device)?.0.with_slot(slot))
    };
    let banks = names.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
    if dirs.len() != names.len() {
        let what = format!("--router {} routes over {}", router.display(), names.join(", "));
        return Err(Usage(format!("{what}; there are {} of --adapter", dirs.len())).into());
    }
    Ok(Routed { router: loaded, names, banks })
}

/// Reads a plan and what it means for the model.
pub fn plan(path: &Path, files: &ModelFiles) -> Result<ResolvedPlan> {
    LayerPlan::load(path)?.resolve(files.sites()).with_context(|| path.display().to_string())
}

/// The streaming executor as the command line asks for it.
pub fn executor<'a>(global: &Global, terminal: &'a Terminal) -> Executor<'a> {
    let default = Executor::default();
    Executor {
        max_memory: global.max_memory.map(|s| s.0),
        threads: global.threads,
        shard_bytes: global.shard_size.map_or(default.shard_bytes, |s| s.0),
        resume: global.resume,
        overwrite: global.overwrite,
        progress: terminal,
        ..default
    }
}

/// Prints what the executor would do; what stands against it is an error.
pub fn planned(plan: &StreamPlan, terminal: &Terminal) -> Result<()> {
    terminal.result(plan, || plan.to_string())?;
    match &plan.problems[..] {
        [] => Ok(()),
        problems => bail!("{} can't run: {}", plan.transform, problems.join("; ")),
    }
}

/// For --dry-run: prints what a verb would read, write and need; `facts` is what more there is to say.
pub fn preview(
    files: &ModelFiles,
    texts: &[&Path],
    writes: &[&Path],
    facts: serde_json::Value,
    terminal: &Terminal,
) -> Result<()> {
    let weights = 4 * parameters(files);
    let mut output = json!({"reads": texts, "model": files.name, "writes": writes, "weights_bytes": weights});
    if let (Some(output), serde_json::Value::Object(facts)) = (output.as_object_mut(), facts) {
        output.extend(facts);
    }
    told(&output, terminal)
}

/// Values of all tensors of a model.
pub fn parameters(files: &ModelFiles) -> usize {
    files.checkpoint.tensors().iter().map(|t| t.elements()).sum()
}

/// Prints an object, a line for each of its entries.
pub fn told(output: &serde_json::Value, terminal: &Terminal) -> Result<()> {
    terminal.result(output, || {
        let line = |(key, value): (&String, &serde_json::Value)| format!("{key:20} {value}\n");
        output.as_object().map(|o| o.iter().map(line).collect()).unwrap_or_default()
    })
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

/// Bytes of quantized weights in a GGUF file, where those without a block type are f16.
pub fn stored_bytes(
    matrices: &BTreeMap<Site, QuantizedMatrix>,
    encoded: &BTreeMap<Site, EncodedWeight>,
) -> u64 {
    let of =
        |(site, m): (&Site, &QuantizedMatrix)| encoded.get(site).map_or(2 * m.codes.len(), |e| e.bytes.len());
    matrices.iter().map(of).sum::<usize>() as u64
}

/// Refuses an output that exists, unless it is an empty folder or to be replaced; `unfinished` is where an interrupted run
/// leaves its work, and allows to go on.
pub fn check_output(path: &Path, unfinished: Option<&Path>, global: &Global) -> Result<()> {
    // Hours of work must not end at a path that was wrong from the start.
    if let Some(above) = path.ancestors().skip(1).find(|above| above.exists())
        && !above.is_dir()
    {
        bail!("{}: {} is not a folder", path.display(), above.display());
    }
    if let Some(unfinished) = unfinished
        && global.resume
        && !global.dry_run
    {
        remove(&aside(unfinished))?; // A kill came while it was discarded.
    }
    let begun = unfinished.is_some_and(Path::exists);
    if !path.exists() || is_empty(path) || global.overwrite || (begun && global.resume) {
        return Ok(());
    }
    let how = match (begun, global.resume) {
        (true, _) => "holds an interrupted run; say --resume to go on or --overwrite to start anew",
        (_, true) => "holds no interrupted run; say --overwrite to replace it",
        _ => "exists; say --overwrite to replace it",
    };
    Err(Usage(format!("{} {how}", path.display())).into())
}

/// Refuses a target that an export to it would refuse, before the work that leads there.
pub fn check_export(export: Export<'_>, out: &Path, global: &Global, terminal: &Terminal) -> Result<()> {
    Ok(export.check(out, &executor(global, terminal))?)
}

/// [`check_output`] of a single file; makes its folder.
pub fn check_file(path: &Path, global: &Global) -> Result<()> {
    if path.is_dir() {
        return Err(Usage(format!("{} is a folder; name a file", path.display())).into());
    }
    check_output(path, None, global)?;
    if global.dry_run {
        return Ok(());
    }
    std::fs::create_dir_all(folder(path)).with_context(|| folder(path).display().to_string())
}

/// [`check_output`] of a folder.
pub fn check_folder(path: &Path, global: &Global) -> Result<()> {
    if path.exists() && !path.is_dir() {
        return Err(Usage(format!("{} is a file; name a folder", path.display())).into());
    }
    check_output(path, None, global)
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Why the executor left an output alone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Occupied {
    /// It may be replaced.
    Ours,
    /// It holds files of others.
    Foreign,
}

/// Whether this error says that the output is there already.
pub fn is_occupied(error: &anyhow::Error) -> Option<Occupied> {
    let found = error.downcast_ref::<StreamError>().or(match error.downcast_ref::<ModelError>() {
        Some(ModelError::Stream(inner)) => Some(inner),
        _ => None,
    });
    match found? {
        StreamError::Exists { .. } => Some(Occupied::Ours),
        StreamError::WouldDelete { .. } => Some(Occupied::Foreign),
        _ => None,
    }
}

/// Removes a folder if it is there. Renamed first, so that a kill leaves nothing half removed under its name.
pub fn discard(folder: &Path) -> Result<()> {
    let aside = aside(folder);
    remove(&aside)?;
    match std::fs::rename(folder, &aside) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        renamed => {
            renamed.with_context(|| folder.display().to_string())?;
            remove(&aside)
        }
    }
}

/// Where a folder goes while it is removed.
fn aside(folder: &Path) -> PathBuf {
    folder.with_extension("old")
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| folder.display().to_string()),
        _ => Ok(()),
    }
}

/// Removes the files that a kill in the middle of a [`write_atomic`] left in a folder of ours or below.
pub fn sweep(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let (path, name) = entry.map(|e| (e.path(), e.file_name()))?;
        let name = name.to_string_lossy();
        if path.is_dir() {
            sweep(&path)?;
        } else if name.starts_with(".firebrick-") && name.ends_with(".part") {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Lets `write` fill a folder beside `out`, and puts what it wrote in place: the folder itself, or file by file where `out`
/// holds something already.
pub fn write_folder(out: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let staging = folder(out).join(format!(".{name}.partial"));
    let place = || -> std::io::Result<()> {
        if !out.exists() || is_empty(out) {
            std::fs::remove_dir(out)
                .or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
            return std::fs::rename(&staging, out);
        }
        for entry in std::fs::read_dir(&staging)? {
            let entry = entry?;
            std::fs::rename(entry.path(), out.join(entry.file_name()))?;
        }
        std::fs::remove_dir(&staging)
    };
    discard(&staging)?;
    std::fs::create_dir_all(&staging).with_context(|| staging.display().to_string())?;
    let written = write(&staging).and_then(|()| place().with_context(|| out.display().to_string()));
    if written.is_err() {
        // The error is what counts; what stays is discarded by the next run.
        let _ = std::fs::remove_dir_all(&staging);
    }
    written
}

/// Copies a log that may be needed again where it lies.
pub fn copy_log(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).with_context(|| from.display().to_string())?;
    write_atomic(to, &bytes).with_context(|| to.display().to_string())
}

/// Refuses windows that hold nothing to predict, and none at all.
pub fn check_windows(window: usize, windows: usize) -> Result<()> {
    if window < 2 || windows == 0 {
        return Err(Usage("--window must be at least 2 and --windows at least 1".into()).into());
    }
    Ok(())
}

/// Reads a text that has to fill a window.
pub fn text(path: &Path, tokenizer: &Tokenizer, window: usize) -> Result<TextData> {
    let data = TextData::from_file(path, tokenizer)?;
    fills(data.ids.len(), window, path)?;
    Ok(data)
}

/// An error unless `tokens` of a text fill one window.
pub fn fills(tokens: usize, window: usize, path: &Path) -> Result<()> {
    if tokens < window {
        let name = path.display();
        bail!(
            "{name}: {tokens} tokens do not fill one window of {window}; give more text or a smaller --window"
        );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_from_below() {
        let root = tempfile::tempdir().unwrap();
        let (deep, file) = (root.path().join("a/b/c"), root.path().join("a/models/x"));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let found = || upward([&root.path().join("nowhere"), &deep].into_iter(), Path::new("models/x"));
        assert_eq!(found(), None);
        std::fs::write(&file, "").unwrap();
        assert_eq!(found(), Some(file));
    }

    #[test]
    fn a_folder_is_discarded_with_what_an_interrupted_removal_left() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(".train");
        for _ in 0..2 {
            std::fs::create_dir_all(folder.join("in")).unwrap();
            std::fs::create_dir_all(root.path().join(".train.old/in")).unwrap();
            discard(&folder).unwrap();
            assert!(is_empty(root.path()));
        }
        discard(&folder).unwrap();
    }
}
