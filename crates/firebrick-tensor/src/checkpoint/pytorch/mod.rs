//! PyTorch checkpoints as `torch.save` writes them since version 1.6: a ZIP archive of the tensors' bytes, uncompressed, and a pickle
//! that says which tensor lies where.
//!
//! Own code rather than the `pytorch-reader` crate that burn uses: that unpacks tensors into memory, where these stay mapped as they are
//! in every other format, and its archive reader changes the features of crates under burn. A pickle is a program; of its instructions
//! only those run that build plain data, and of the classes it names only tensors and their storages mean anything.

mod archive;
mod pickle;

use super::TensorInfo;
use super::error::{CheckpointError, Result};
use crate::block::{self, DType};
use archive::Archive;
use pickle::{Object, Pickle};
use std::collections::HashSet;
use std::path::Path;

/// The start of a ZIP archive.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// Whether a file of this name is one of PyTorch's.
pub(super) fn is_pytorch_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["bin", "pt", "pth"].iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// Reads where the tensors of the mapped file `bytes` lie.
pub(super) fn read(path: &Path, bytes: &[u8], file: usize) -> Result<Vec<TensorInfo>> {
    if !bytes.starts_with(MAGIC) {
        let what = "not an archive of torch 1.6 or later; load it in Python and save it again";
        return Err(CheckpointError::malformed(path, 0, what));
    }
    let archive = Archive::read(path, bytes)?;
    // The folder in the archive is named after the file that was first written.
    let Some((root, program)) =
        archive.entries.iter().find_map(|(n, e)| Some((n.strip_suffix("data.pkl")?, e)))
    else {
        return Err(CheckpointError::malformed(path, 0, "the archive holds no data.pkl"));
    };
    if archive.entries.get(&format!("{root}byteorder")).is_some_and(|e| &bytes[e.clone()] == b"big") {
        return Err(CheckpointError::malformed(path, 0, "big-endian tensors are not supported"));
    }
    let pickle = Pickle::run(path, bytes, program.clone())?;
    let Object::Dict(entries) = pickle.root() else {
        let what = "the pickle is not a dictionary of tensors; save `model.state_dict()`";
        return Err(CheckpointError::malformed(path, program.start, what));
    };
    let (mut tensors, mut problems, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    for (key, value) in entries {
        // What is no tensor (a version, a step number) is not part of the model.
        let (Object::Text(name), Object::Tensor(tensor)) = (pickle.get(*key), pickle.get(*value)) else {
            continue;
        };
        let name = current_name(name);
        if !seen.insert(name.clone()) {
            // At once: entries can share one long name, and a list of them would multiply the file's length.
            problems.push(format!("tensor `{name}` appears twice"));
            break;
        }
        let key = pickle.key(tensor.storage);
        let storage = archive.entries.get(&format!("{root}data/{key}"));
        let storage = storage.ok_or_else(|| format!("its storage `{key}` is missing"));
        match storage.and_then(|s| place(tensor, s)) {
            Ok((offset, len)) => {
                let (dtype, shape) = (tensor.storage.dtype, tensor.shape.clone());
                tensors.push(TensorInfo {
                    name: name.clone(),
                    dtype,
                    shape,
                    file,
                    offset: offset as u64,
                    len,
                });
            }
            Err(what) => problems.push(format!("tensor `{name}`: {what}")),
        }
    }
    if tensors.is_empty() && problems.is_empty() {
        problems.push("it holds no tensors at its top level".to_owned());
    }
    match problems.is_empty() {
        true => Ok(tensors),
        false => Err(CheckpointError::Problems { path: path.to_owned(), problems }),
    }
}

/// Where a tensor lies in the file, given where its storage does.
fn place(
    tensor: &pickle::Tensor,
    storage: &std::ops::Range<usize>,
) -> std::result::Result<(usize, usize), String> {
    let pickle::Tensor { storage: stored, offset, shape, strides } = tensor;
    let dtype = stored.dtype;
    let len = block::elements(shape).and_then(|n| dtype.bytes_for(n));
    let Some(len) = len else { return Err(format!("shape {shape:?} has no size in {dtype}")) };
    // A stride where there is one step at most says nothing.
    let mut expected = 1usize;
    for (extent, stride) in shape.iter().zip(strides).rev() {
        if *extent > 1 && *stride != expected && len > 0 {
            return Err("a view that is not contiguous; save `tensor.contiguous()`".to_owned());
        }
        expected = expected.saturating_mul((*extent).max(1));
    }
    let start = dtype.bytes_for(*offset).and_then(|bytes| storage.start.checked_add(bytes));
    match start.filter(|start| start.checked_add(len).is_some_and(|end| end <= storage.end)) {
        Some(start) => Ok((start, len)),
        None => {
            let room = storage.len();
            Err(format!("{len} bytes from element {offset} of {dtype} in a storage of {room} bytes"))
        }
    }
}

/// What transformers calls a tensor now: norms had other names once, and old checkpoints still do.
pub(super) fn current_name(name: &str) -> String {
    let renamed = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")];
    let new = renamed.iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
    new.unwrap_or_else(|| name.to_owned())
}

/// The type of a storage class of torch.
fn storage_dtype(class: &str) -> Option<DType> {
    Some(match class {
        "DoubleStorage" => DType::F64,
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "CharStorage" => DType::I8,
        "ByteStorage" => DType::U8,
        "BoolStorage" => DType::Bool,
        _ => return None,
    })
}
