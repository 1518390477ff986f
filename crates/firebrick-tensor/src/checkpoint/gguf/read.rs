//! The GGUF reader. Every count is checked against the bytes that are left before anything is allocated.

use super::value::{ARRAY_TYPE, min_size};
use super::*;
use crate::block::DType;
use crate::checkpoint::TensorInfo;
use std::collections::HashSet;
use std::path::Path;

// ggml's names of types that can't be read, so that the error says what the file needs.
const OTHER_TYPES: [(u32, &str); 14] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

/// Reads the header of the mapped file `bytes`.
pub(in crate::checkpoint) fn read(path: &Path, bytes: &[u8]) -> Result<(Gguf, Vec<TensorInfo>)> {
    let mut reader = Reader { path, bytes, at: 0 };
    if reader.take(4)? != MAGIC {
        return Err(reader.error(0, "a GGUF file starts with `GGUF`"));
    }
    let version = reader.u32()?;
    if version.swap_bytes() == VERSION {
        return Err(reader.error(4, "big-endian GGUF files are not supported"));
    }
    if version != 2 && version != VERSION {
        return Err(reader.error(4, format!("GGUF version {version} (2 and 3 are supported)")));
    }
    let (tensors_at, tensor_count) = (reader.at, reader.u64()?);
    let (keys_at, key_count) = (reader.at, reader.u64()?);
    // A name, the number of dims, the type and the offset; a key, the type and one byte.
    let tensor_count = reader.count(tensors_at, tensor_count, 8 + 4 + 4 + 8, "tensors")?;
    let key_count = reader.count(keys_at, key_count, 8 + 4 + 1, "metadata keys")?;

    let mut metadata = Metadata::new();
    let mut alignment_at = reader.at;
    for _ in 0..key_count {
        let start = reader.at;
        let key = reader.string(MAX_KEY)?.to_owned();
        let type_id = reader.u32()?;
        if key == ALIGNMENT_KEY {
            alignment_at = reader.at;
        }
        let value = reader.value(type_id)?;
        if metadata.contains_key(&key) {
            return Err(reader.error(start, format!("metadata key `{key}` appears twice")));
        }
        metadata.insert(key, value);
    }
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => checked_alignment(value).ok_or_else(|| {
            let found = value.summary();
            let what = format!("{ALIGNMENT_KEY} is {found}, expected a power of two up to {MAX_ALIGNMENT}");
            reader.error(alignment_at, what)
        })?,
    };

    let mut tensors = Vec::new();
    let mut problems = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..tensor_count {
        let start = reader.at;
        let name = reader.string(MAX_KEY)?.to_owned();
        if !seen.insert(name.clone()) {
            return Err(reader.error(start, format!("tensor `{name}` appears twice")));
        }
        let (dims_at, dims) = (reader.at, reader.u32()?);
        if dims as usize > MAX_DIMS {
            return Err(
                reader.error(dims_at, format!("tensor `{name}` has {dims} dims (at most {MAX_DIMS})"))
            );
        }
        let mut shape = (0..dims).map(|_| reader.size()).collect::<Result<Vec<usize>>>()?;
        shape.reverse();
        let (id, offset) = (reader.u32()?, reader.u64()?);
        match placed(id, &shape, offset, alignment) {
            Ok((dtype, len)) => tensors.push(TensorInfo { name, dtype, shape, file: 0, offset, len }),
            Err(what) => problems.push(format!("tensor `{name}` (byte {start}): {what}")),
        }
    }

    let data = (reader.at as u64).next_multiple_of(alignment);
    let size = bytes.len() as u64;
    for tensor in &mut tensors {
        let end = tensor.offset.checked_add(tensor.len as u64).and_then(|end| end.checked_add(data));
        if end.is_none_or(|end| end > size) {
            let TensorInfo { name, offset, len, .. } = &*tensor;
            problems
                .push(format!("tensor `{name}`: {len} bytes at {data} + {offset} in a file of {size} bytes"));
        }
        tensor.offset = tensor.offset.saturating_add(data);
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| t.len > 0).collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[1].offset - pair[0].offset < pair[0].len as u64 {
            problems.push(format!("tensors `{}` and `{}` overlap", pair[0].name, pair[1].name));
        }
    }
    if !problems.is_empty() {
        return Err(CheckpointError::Problems { path: path.to_owned(), problems });
    }
    Ok((Gguf { path: path.to_owned(), version, alignment, metadata }, tensors))
}

// Type and size in bytes of a tensor, or what is wrong with it.
fn placed(
    id: u32,
    shape: &[usize],
    offset: u64,
    alignment: u64,
) -> std::result::Result<(DType, usize), String> {
    let Some(dtype) = DType::from_ggml_id(id) else {
        let name = OTHER_TYPES.iter().find(|(other, _)| *other == id).map_or("unknown", |(_, name)| name);
        return Err(format!("ggml type {id} ({name}) is not supported"));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(format!("offset {offset} is not a multiple of the alignment {alignment}"));
    }
    let len = dtype.bytes_for_shape(shape).filter(|&len| len <= isize::MAX as usize);
    len.map(|len| (dtype, len)).ok_or_else(|| {
        format!(
            "shape {shape:?} has no size in {dtype} (blocks of {} along the last axis)",
            dtype.block_len()
        )
    })
}

impl<'a> Reader<'a> {
    fn error(&self, offset: usize, what: impl Into<String>) -> CheckpointError {
        CheckpointError::malformed(self.path, offset, what)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let Some(bytes) = self.bytes[self.at..].get(..len) else {
            return Err(
                self.error(self.at, format!("{len} bytes expected, {} left in the file", self.left()))
            );
        };
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(*self.take(N)?.first_chunk().expect("N bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn size(&mut self) -> Result<usize> {
        let (at, size) = (self.at, self.u64()?);
        size.try_into().map_err(|_| self.error(at, format!("{size} does not fit this machine")))
    }

    // A number of things of at least `min` bytes each that the file still has room for.
    fn count(&self, at: usize, count: u64, min: usize, what: &str) -> Result<usize> {
        let room = self.left() / min;
        match usize::try_from(count) {
            Ok(count) if count <= room && count <= MAX_COUNT => Ok(count),
            _ => Err(self
                .error(at, format!("{count} {what}, the file has room for at most {}", room.min(MAX_COUNT)))),
        }
    }

    fn string(&mut self, max: usize) -> Result<&'a str> {
        let (at, len) = (self.at, self.u64()?);
        if len > max as u64 {
            return Err(self.error(at, format!("a string of {len} bytes (at most {max})")));
        }
        let start = self.at;
        let bytes = self.take(len as usize)?;
        std::str::from_utf8(bytes).map_err(|e| self.error(start + e.valid_up_to(), "a string is not UTF-8"))
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.error(self.at - 1, format!("a bool of {other}"))),
        }
    }

    fn value(&mut self, type_id: u32) -> Result<Value> {
        Ok(match type_id {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string(MAX_STRING)?.to_owned()),
            ARRAY_TYPE => Value::Array(self.values(1)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(self.error(self.at - 4, format!("unknown metadata type {other}"))),
        })
    }

    fn values(&mut self, depth: usize) -> Result<Array> {
        let at = self.at;
        if depth > MAX_NESTING {
            return Err(self.error(at, format!("arrays nested over {MAX_NESTING} deep")));
        }
        let type_id = self.u32()?;
        let Some(min) = min_size(type_id) else {
            return Err(self.error(at, format!("unknown metadata type {type_id}")));
        };
        let (count_at, count) = (self.at, self.u64()?);
        let count = self.count(count_at, count, min, "array elements")?;
        Ok(match type_id {
            0 => Array::U8(self.take(count)?.to_vec()),
            1 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            7 => Array::Bool((0..count).map(|_| self.bool()).collect::<Result<_>>()?),
            8 => {
                let mut strings = Strings::default();
                for _ in 0..count {
                    strings.push(self.string(MAX_STRING)?);
                }
                Array::String(strings)
            }
            10 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
            _ => Array::Array((0..count).map(|_| self.values(depth + 1)).collect::<Result<_>>()?),
        })
    }

    fn numbers<T, const N: usize>(&mut self, count: usize, from: fn([u8; N]) -> T) -> Result<Vec<T>> {
        let bytes = self.take(count * N)?;
        Ok(bytes.as_chunks().0.iter().map(|b| from(*b)).collect())
    }
}
