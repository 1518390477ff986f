//! Checkpoints of a training run: a folder that appears whole, replaces the one before, and resumes bit for bit.
//!
//! `checkpoint-<step>/` holds `model.safetensors` (trainable parameters by path), `optimizer.safetensors` (moments under
//! `<path>.exp_avg` and `<path>.exp_avg_sq`, PyTorch's names) and `state.json`. Beside it, `best.safetensors` has the
//! trainable parameters whose held-out loss was lowest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use firebrick_core::{read_file, sync_folder, write_atomic};
use firebrick_tensor::block;
use firebrick_tensor::checkpoint::{AtomicFile, Checkpoint, Layout, TensorSpec, TensorWriter};
use serde::{Deserialize, Serialize};

use crate::optimizer::{Memory, Moments};
use crate::params::{map_trainable, trainable};
use crate::{HeldOut, TrainError};

const PREFIX: &str = "checkpoint-";
const PARTIAL: &str = ".partial";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// Most bytes of it, which holds the loss of every step.
const MAX_STATE: u64 = 1 << 30;
const BEST: &str = "best.safetensors";

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
    /// The losses on held-out data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<HeldOut>,
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
    memory: &Memory,
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

    write_parameters(&partial.join(MODEL), module)?;
    let moments = memory.iter().flat_map(|(path, m)| {
        let flat = |name: &str, t: &Tensor<1>| (format!("{path}.{name}"), t.dims().to_vec(), t.clone());
        let second = m.second.as_ref().map(|second| flat("exp_avg_sq", second));
        std::iter::once(flat("exp_avg", &m.first)).chain(second)
    });
    write_tensors(&partial.join(OPTIMIZER), moments.collect())?;
    let text = serde_json::to_vec(state).expect("numbers and strings are JSON");
    write_file(&partial.join(STATE), &text)?;

    fs::rename(&partial, &folder).map_err(|e| TrainError::io(&folder, e))?;
    // The rename must reach the disk before the folders it replaces go.
    sync_folder(out);
    for old in folders(out)? {
        if old.partial || old.step != state.step {
            remove(&old.path)?;
        }
    }
    Ok(())
}

/// Puts the tensors of the checkpoint at `folder` into `module`, and returns it with the state of the optimizer, which has
/// one moment or two; every difference is listed.
pub(crate) fn load<M: Module>(
    folder: &Path,
    state: &State,
    module: M,
    has_second: bool,
) -> Result<(M, Memory), TrainError> {
    let moments = Checkpoint::open(folder.join(OPTIMIZER))?;
    let mut problems = Vec::new();
    let parameters = trainable(&module);
    let module = read_parameters(&folder.join(MODEL), module, &mut problems)?;
    let mut memory = Memory::new();
    for p in &parameters {
        let device = p.values.device();
        let (elements, dtype) = (p.values.dims()[0], p.values.dtype());
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
        let first = moment("exp_avg")?;
        let second = if has_second { moment("exp_avg_sq")? } else { None };
        if let Some(first) = first {
            memory.insert(p.path.clone(), Moments { updates, first, second });
        }
    }
    if !problems.is_empty() {
        return Err(TrainError::Resume { path: folder.to_path_buf(), problems });
    }
    Ok((module, memory))
}

/// Writes the trainable parameters of `module` as the best so far.
pub(crate) fn save_best<M: Module>(out: &Path, module: &M) -> Result<(), TrainError> {
    write_parameters(&out.join(BEST), module)
}

/// Puts the best parameters so far into `module`.
pub(crate) fn load_best<M: Module>(out: &Path, module: M) -> Result<M, TrainError> {
    let path = out.join(BEST);
    let mut problems = Vec::new();
    let module = read_parameters(&path, module, &mut problems)?;
    match problems.is_empty() {
        true => Ok(module),
        false => Err(TrainError::Resume { path, problems }),
    }
}

fn write_parameters<M: Module>(path: &Path, module: &M) -> Result<(), TrainError> {
    let parameters = trainable(module).into_iter().map(|p| (p.path, p.dims, p.values));
    write_tensors(path, parameters.collect())
}

/// Puts the tensors of the file at `path` into `module`; whatever differs is added to `problems`.
fn read_parameters<M: Module>(path: &Path, module: M, problems: &mut Vec<String>) -> Result<M, TrainError> {
    let file = Checkpoint::open(path)?;
    let parameters = trainable(&module);
    let mut values = BTreeMap::new();
    for p in &parameters {
        let dtype = p.values.dtype();
        match file.get(&p.path) {
            None => problems.push(format!("parameter `{}` is not in the checkpoint", p.path)),
            Some(info) if info.shape != p.dims || Some(info.dtype) != stored(dtype) => {
                problems.push(format!(
                    "parameter `{}` is {:?} {dtype:?} here, {:?} {} in the checkpoint",
                    p.path, p.dims, info.shape, info.dtype
                ))
            }
            Some(_) => {
                values.insert(p.path.clone(), read(&file, &p.path, dtype, &p.values.device())?);
            }
        }
    }
    let known = |name: &str| parameters.iter().any(|p| p.path == name);
    for info in file.tensors().iter().filter(|t| !known(&t.name)) {
        problems.push(format!("parameter `{}` of the checkpoint is not trainable here", info.name));
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

    use crate::AdamW;

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

    fn bytes(module: &Pair, memory: &Memory) -> Vec<Vec<u8>> {
        let values = trainable(module).into_iter().map(|p| p.values);
        let moments = memory.values().flat_map(|m| [m.first.clone(), m.second.clone().unwrap()]);
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
            held_out: Vec::new(),
        };
        save(out.path(), &module, &optimizer.moments, &state).unwrap();
        fs::create_dir(out.path().join("checkpoint-best")).unwrap();
        state.step = 2;
        save(out.path(), &module, &optimizer.moments, &state).unwrap();
        let names = |out: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(out.path()), ["checkpoint-00000002", "checkpoint-best"], "only our own folders go");

        let (folder, read) = latest(out.path()).unwrap().unwrap();
        let (loaded, memory) = load(&folder, &read, pair(0.0), true).unwrap();
        assert_eq!(bytes(&loaded, &memory), bytes(&module, &optimizer.moments));
        assert_ne!(bytes(&pair(0.7), &Memory::new())[0], bytes(&module, &optimizer.moments)[0]);
        let (_, one) = load(&folder, &read, pair(0.0), false).unwrap();
        assert!(one.len() == 2 && one.values().all(|m| m.second.is_none()));
        assert!(loaded.0.val().is_require_grad() && loaded.1.val().is_require_grad());
    }

    #[test]
    fn nothing_saved_is_nothing_to_resume() {
        let out = tempfile::tempdir().unwrap();
        assert!(latest(out.path()).unwrap().is_none());
        assert!(latest(&out.path().join("none")).unwrap().is_none());
    }
}
