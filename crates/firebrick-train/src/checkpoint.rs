//! Checkpoints of a training run: a folder that appears whole, replaces the one before, and resumes bit for bit.
//!
//! `checkpoint-<step>/` holds `model.safetensors` (trainable parameters by path), `optimizer.safetensors` (moments under
//! `<path>.exp_avg` and `<path>.exp_avg_sq`, PyTorch's names) and `state.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use firebrick_core::{read_file, write_atomic};
use firebrick_tensor::block;
use firebrick_tensor::checkpoint::{AtomicFile, Checkpoint, Layout, TensorSpec, TensorWriter};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::optimizer::{AdamW, Moments};
use crate::params::{map_trainable, trainable};

const PREFIX: &str = "checkpoint-";
const PARTIAL: &str = ".partial";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// Most bytes of it, which holds the loss of every step.
const MAX_STATE: u64 = 1 << 30;

/// Everything a run is made of besides tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    /// Steps done.
    pub step: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// The settings, to refuse a run with others.
    pub config: serde_json::Value,
    /// Digest of the training text.
    pub data: String,
    /// What the caller says it trains over.
    #[serde(default)]
    pub identity: Option<String>,
    /// How many gradients each parameter has seen.
    pub updates: BTreeMap<String, u64>,
    /// The loss of every step.
    pub losses: Vec<f64>,
}

/// The checkpoint of the highest step in the folder `out`, if there is one.
pub(crate) fn latest(out: &Path) -> Result<Option<(PathBuf, State)>, TrainError> {
    let newest = folders(out)?.into_iter().filter(|f| !f.partial).max_by_key(|f| f.step);
    let Some(Folder { path: folder, .. }) = newest else { return Ok(None) };
    let path = folder.join(STATE);
    let text = read_file(&path, MAX_STATE).map_err(|e| TrainError::io(&path, e))?;
    let state = serde_json::from_slice(&text)
        .map_err(|e| TrainError::Resume { path: folder.clone(), problems: vec![format!("{STATE}: {e}")] })?;
    Ok(Some((folder, state)))
}

/// A checkpoint in an output folder, or what is left of one.
struct Folder {
    step: usize,
    partial: bool,
    path: PathBuf,
}

/// The checkpoints in `out`; none if there is no such folder.
fn folders(out: &Path) -> Result<Vec<Folder>, TrainError> {
    let entries = match fs::read_dir(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| TrainError::io(out, e))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| TrainError::io(out, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let partial = rest.ends_with(PARTIAL);
        if let Ok(step) = rest.trim_end_matches(PARTIAL).parse() {
            found.push(Folder { step, partial, path });
        }
    }
    Ok(found)
}

/// Writes a checkpoint into `out`, then removes the ones before it.
pub(crate) fn save<M: Module>(
    out: &Path,
    module: &M,
    optimizer: &AdamW,
    state: &State,
) -> Result<(), TrainError> {
    let folder = out.join(format!("{PREFIX}{:08}", state.step));
    let partial = out.join(format!("{PREFIX}{:08}{PARTIAL}", state.step));
    let remove = |path: &Path| match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(path, e)),
        _ => Ok(()),
    };
    remove(&partial)?;
    fs::create_dir_all(&partial).map_err(|e| TrainError::io(&partial, e))?;

    let parameters = trainable(module);
    write_tensors(
        &partial.join(MODEL),
        parameters.into_iter().map(|p| (p.path, p.dims, p.values)).collect(),
    )?;
    let moments = optimizer.moments.iter().flat_map(|(path, m)| {
        let flat = |name: &str, t: &Tensor<1>| (format!("{path}.{name}"), t.dims().to_vec(), t.clone());
        [flat("exp_avg", &m.first), flat("exp_avg_sq", &m.second)]
    });
    write_tensors(&partial.join(OPTIMIZER), moments.collect())?;
    let text = serde_json::to_vec(state).expect("numbers and strings are JSON");
    write_file(&partial.join(STATE), &text)?;

    fs::rename(&partial, &folder).map_err(|e| TrainError::io(&folder, e))?;
    // The rename must reach the disk before the folders it replaces go; where folders can't be synced nothing helps.
    if let Ok(handle) = fs::File::open(out) {
        let _ = handle.sync_all();
    }
    for old in folders(out)? {
        if old.partial || old.step != state.step {
            remove(&old.path)?;
        }
    }
    Ok(())
}

/// Puts the tensors of the checkpoint at `folder` into `module` and `optimizer`; every difference is listed.
pub(crate) fn load<M: Module>(
    folder: &Path,
    state: &State,
    module: M,
    optimizer: &mut AdamW,
) -> Result<M, TrainError> {
    let (model, moments) = (Checkpoint::open(folder.join(MODEL))?, Checkpoint::open(folder.join(OPTIMIZER))?);
    let mut problems = Vec::new();
    let parameters = trainable(&module);
    let mut values = BTreeMap::new();
    for p in &parameters {
        let device = p.values.device();
        let (elements, dtype) = (p.values.dims()[0], p.values.dtype());
        match model.get(&p.path) {
            None => problems.push(format!("parameter `{}` is not in the checkpoint", p.path)),
            Some(info) if info.shape != p.dims || Some(info.dtype) != stored(dtype) => {
                problems.push(format!(
                    "parameter `{}` is {:?} {dtype:?} here, {:?} {} in the checkpoint",
                    p.path, p.dims, info.shape, info.dtype
                ))
            }
            Some(_) => {
                values.insert(p.path.clone(), read(&model, &p.path, dtype, &device)?);
            }
        }
        let Some(&updates) = state.updates.get(&p.path) else { continue };
        let mut moment = |name: &str| {
            let name = format!("{}.{name}", p.path);
            let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            match moments.get(&name) {
                Some(info) if info.shape == [elements] && Some(info.dtype) == stored(wide) => {
                    read(&moments, &name, wide, &device).map(Some)
                }
                _ => {
                    problems.push(format!("moment `{name}` is missing or has another shape"));
                    Ok(None)
                }
            }
        };
        if let (Some(first), Some(second)) = (moment("exp_avg")?, moment("exp_avg_sq")?) {
            optimizer.moments.insert(p.path.clone(), Moments { updates, first, second });
        }
    }
    let known = |name: &str| parameters.iter().any(|p| p.path == name);
    for info in model.tensors().iter().filter(|t| !known(&t.name)) {
        problems.push(format!("parameter `{}` of the checkpoint is not trainable here", info.name));
    }
    if !problems.is_empty() {
        return Err(TrainError::Resume { path: folder.to_path_buf(), problems });
    }
    Ok(map_trainable(module, &mut |path, old| values.remove(path).unwrap_or(old)))
}

/// Writes flat `tensors` (name, extents, values) in the order the format asks for, one in memory at a time.
fn write_tensors(path: &Path, tensors: Vec<(String, Vec<usize>, Tensor<1>)>) -> Result<(), TrainError> {
    let mut specs = Vec::new();
    for (name, dims, values) in &tensors {
        let dtype = stored(values.dtype()).ok_or_else(|| TrainError::Config {
            problems: vec![format!("parameter `{name}` of type {:?} cannot be saved", values.dtype())],
        })?;
        specs.push(TensorSpec::new(name.clone(), dtype, dims.clone()));
    }
    let values: BTreeMap<&str, &Tensor<1>> = tensors.iter().map(|(n, _, v)| (n.as_str(), v)).collect();
    let layout = Layout::safetensors(&Default::default(), &specs)?;
    let order: Vec<String> = layout.tensors().iter().map(|t| t.name.clone()).collect();
    let io = |e| TrainError::io(path, e);
    let mut writer = TensorWriter::new(AtomicFile::create(path).map_err(io)?, layout)?;
    for name in order {
        let data =
            values[name.as_str()].clone().try_into_data().map_err(|e| TrainError::Device(e.to_string()))?;
        writer.write(&name, data.as_bytes())?;
    }
    writer.finish()?.commit().map_err(io)
}

fn read(checkpoint: &Checkpoint, name: &str, dtype: DType, device: &Device) -> Result<Tensor<1>, TrainError> {
    if dtype == DType::F64 {
        let bytes = checkpoint.bytes(name)?.chunks_exact(8);
        let values: Vec<f64> =
            bytes.map(|b| f64::from_le_bytes(b.try_into().expect("chunks of 8"))).collect();
        let n = values.len();
        return Ok(Tensor::from_data(TensorData::new(values, [n]), (device, dtype)));
    }
    // Exact for 16-bit types too: each of their values is an `f32`.
    let values = checkpoint.read_f32(name)?;
    let n = values.len();
    let tensor: Tensor<1> = Tensor::from_data(TensorData::new(values, [n]), (device, DType::F32));
    Ok(tensor.cast(dtype))
}

fn stored(dtype: DType) -> Option<block::DType> {
    match dtype {
        DType::F32 => Some(block::DType::F32),
        DType::F16 => Some(block::DType::F16),
        DType::BF16 => Some(block::DType::BF16),
        DType::F64 => Some(block::DType::F64),
        _ => None,
    }
}

/// Writes a small file atomically.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    write_atomic(path, bytes).map_err(|e| TrainError::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Param;
    use burn::optim::GradientsParams;

    type Pair = (Param<Tensor<2>>, Param<Tensor<1>>);

    fn pair(fill: f64) -> Pair {
        let device = Device::flex().autodiff();
        let a = Tensor::<2>::full([3, 2], fill, &device).cast(DType::BF16);
        let b = Tensor::<1>::from_data(TensorData::new(vec![fill; 4], [4]), (&device, DType::F64));
        (Param::from_tensor(a), Param::from_tensor(b))
    }

    fn stepped(optimizer: &mut AdamW) -> Pair {
        let pair = pair(0.7);
        let mut gradients = GradientsParams::new();
        gradients.register(pair.0.id, pair.0.val().inner());
        gradients.register(pair.1.id, pair.1.val().inner());
        optimizer.step(0.1, pair, gradients)
    }

    fn bytes(module: &Pair, optimizer: &AdamW) -> Vec<Vec<u8>> {
        let values = trainable(module).into_iter().map(|p| p.values);
        let moments = optimizer.moments.values().flat_map(|m| [m.first.clone(), m.second.clone()]);
        values.chain(moments).map(|t| t.into_data().as_bytes().to_vec()).collect()
    }

    #[test]
    fn every_float_type_comes_back_bit_for_bit_and_older_checkpoints_go() {
        let out = tempfile::tempdir().unwrap();
        let mut optimizer = AdamW::default();
        let module = stepped(&mut optimizer);
        let mut state = State {
            step: 1,
            tokens: 0,
            config: serde_json::json!({}),
            data: String::new(),
            identity: None,
            updates: optimizer.moments.iter().map(|(p, m)| (p.clone(), m.updates)).collect(),
            losses: vec![0.1],
        };
        save(out.path(), &module, &optimizer, &state).unwrap();
        fs::create_dir(out.path().join("checkpoint-best")).unwrap();
        state.step = 2;
        save(out.path(), &module, &optimizer, &state).unwrap();
        let names = |out: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(out.path()), ["checkpoint-00000002", "checkpoint-best"], "only our own folders go");

        let (folder, read) = latest(out.path()).unwrap().unwrap();
        let mut fresh = AdamW::default();
        let loaded = load(&folder, &read, pair(0.0), &mut fresh).unwrap();
        assert_eq!(bytes(&loaded, &fresh), bytes(&module, &optimizer));
        assert_ne!(bytes(&pair(0.7), &AdamW::default())[0], bytes(&module, &optimizer)[0]);
        assert!(loaded.0.val().is_require_grad() && loaded.1.val().is_require_grad());
    }

    #[test]
    fn nothing_saved_is_nothing_to_resume() {
        let out = tempfile::tempdir().unwrap();
        assert!(latest(out.path()).unwrap().is_none());
        assert!(latest(&out.path().join("none")).unwrap().is_none());
    }
}
