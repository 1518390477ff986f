//! The GGUF header; the tensors after it go through [`TensorWriter`](crate::checkpoint::TensorWriter).

use super::*;
use crate::checkpoint::TensorInfo;
use crate::checkpoint::layout::{self, Layout, TensorSpec, write_whole};
use std::path::Path;

// ggml keeps names in 64 bytes with a final zero.
const MAX_NAME: usize = 63;

pub(in crate::checkpoint) fn layout(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Layout> {
    let mut problems = Vec::new();
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => checked_alignment(value).unwrap_or_else(|| {
            let found = value.summary();
            problems
                .push(format!("{ALIGNMENT_KEY} is {found}, expected a power of two up to {MAX_ALIGNMENT}"));
            DEFAULT_ALIGNMENT
        }),
    };
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_KEY {
            problems.push(format!("metadata key of {} bytes (1 to {MAX_KEY} are allowed)", key.len()));
        }
        if matches!(value, Value::Array(array) if nesting(array) > MAX_NESTING) {
            problems.push(format!("metadata key `{key}`: arrays nested over {MAX_NESTING} deep"));
        }
    }
    let sizes = layout::sizes(tensors, |TensorSpec { name, dtype, shape }| {
        if name.len() > MAX_NAME {
            Some(format!("tensor `{name}`: a name of {} bytes (at most {MAX_NAME})", name.len()))
        } else if shape.len() > MAX_DIMS {
            Some(format!("tensor `{name}`: {} dims (at most {MAX_DIMS})", shape.len()))
        } else if dtype.ggml_id().is_none() {
            Some(format!("tensor `{name}`: ggml has no type {dtype}"))
        } else {
            None
        }
    });
    let sizes = match sizes {
        Ok(sizes) if problems.is_empty() => sizes,
        Err(CheckpointError::Layout { problems: more }) => {
            problems.extend(more);
            return Err(CheckpointError::Layout { problems });
        }
        Err(other) => return Err(other),
        Ok(_) => return Err(CheckpointError::Layout { problems }),
    };

    let mut header = MAGIC.to_vec();
    put_u32(&mut header, VERSION);
    put_len(&mut header, tensors.len());
    put_len(&mut header, metadata.len());
    for (key, value) in metadata {
        put_string(&mut header, key);
        put_u32(&mut header, value.type_id());
        put_value(&mut header, value);
    }
    let mut infos = Vec::with_capacity(tensors.len());
    let mut offset = 0u64;
    for (spec, &len) in tensors.iter().zip(&sizes) {
        put_string(&mut header, &spec.name);
        put_u32(&mut header, spec.shape.len() as u32);
        spec.shape.iter().rev().for_each(|&extent| put_len(&mut header, extent));
        put_u32(&mut header, spec.dtype.ggml_id().unwrap_or_default());
        header.extend_from_slice(&offset.to_le_bytes());
        let TensorSpec { name, dtype, shape } = spec.clone();
        infos.push(TensorInfo { name, dtype, shape, file: 0, offset, len });
        offset = (offset + len as u64).next_multiple_of(alignment);
    }
    header.resize(header.len().next_multiple_of(alignment as usize), 0);
    let data = header.len() as u64;
    infos.iter_mut().for_each(|t| t.offset += data);
    Ok(Layout { header, tensors: infos, len: data + offset })
}

fn nesting(array: &Array) -> usize {
    match array {
        Array::Array(inner) => 1 + inner.iter().map(nesting).max().unwrap_or(0),
        _ => 1,
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&(len as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    put_len(out, string.len());
    out.extend_from_slice(string.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(x) => out.push(*x),
        Value::I8(x) => out.extend(x.to_le_bytes()),
        Value::U16(x) => out.extend(x.to_le_bytes()),
        Value::I16(x) => out.extend(x.to_le_bytes()),
        Value::U32(x) => put_u32(out, *x),
        Value::I32(x) => out.extend(x.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::String(x) => put_string(out, x),
        Value::Array(x) => put_array(out, x),
        Value::U64(x) => out.extend(x.to_le_bytes()),
        Value::I64(x) => out.extend(x.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    put_u32(out, array.type_id());
    put_len(out, array.len());
    match array {
        Array::U8(a) => out.extend_from_slice(a),
        Array::I8(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U16(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I16(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U32(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I32(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F32(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(a) => out.extend(a.iter().map(|&b| u8::from(b))),
        Array::String(a) => a.iter().for_each(|s| put_string(out, s)),
        Array::Array(a) => a.iter().for_each(|inner| put_array(out, inner)),
        Array::U64(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I64(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F64(a) => a.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}

/// Writes a whole GGUF file at once, atomically; for files larger than memory use a
/// [`TensorWriter`](crate::checkpoint::TensorWriter).
///
/// # Errors
/// As [`Layout::gguf`] and [`TensorWriter::write`](crate::checkpoint::TensorWriter::write), and when the file can't be written.
pub fn write_gguf(
    path: impl AsRef<Path>,
    metadata: &Metadata,
    tensors: &[(TensorSpec, impl AsRef<[u8]>)],
) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let layout = Layout::gguf(metadata, &specs)?;
    write_whole(path.as_ref(), layout, tensors)
}
