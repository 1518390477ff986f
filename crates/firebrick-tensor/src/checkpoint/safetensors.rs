//! The safetensors format: a JSON header, then the bytes of every tensor without gaps.
//!
//! Format: <https://github.com/huggingface/safetensors#format>.

use super::TensorInfo;
use super::error::{CheckpointError, Result};
use super::layout::{self, Layout, TensorSpec, write_whole};
use crate::block::DType;
use indexmap::IndexMap;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// The `__metadata__` of a safetensors file, in file order.
pub type Metadata = IndexMap<String, String>;

const METADATA_KEY: &str = "__metadata__";
// The cap of the reference implementation.
const MAX_HEADER: usize = 100_000_000;

struct Header {
    metadata: Metadata,
    tensors: Vec<(String, Entry)>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

// By hand, because a map type would silently keep the last of two tensors with one name.
impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map from tensor names to their type, shape and offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header { metadata: Metadata::new(), tensors: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("`{key}` appears twice")));
                    }
                    if key == METADATA_KEY {
                        header.metadata = map.next_value::<Option<Metadata>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads the header of the mapped file `bytes` into metadata and tensors ordered by offset.
pub(super) fn read(path: &Path, bytes: &[u8], file: usize) -> Result<(Metadata, Vec<TensorInfo>)> {
    let malformed = |offset, what: String| CheckpointError::malformed(path, offset, what);
    let Some((size, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(malformed(0, format!("{} bytes are too few for safetensors or GGUF", bytes.len())));
    };
    let size = u64::from_le_bytes(*size);
    if size > MAX_HEADER as u64 {
        return Err(malformed(
            0,
            format!("a safetensors header of {size} bytes (at most {MAX_HEADER} are allowed)"),
        ));
    }
    let size = size as usize;
    let Some((header, data)) = rest.split_at_checked(size) else {
        return Err(malformed(
            0,
            format!("a safetensors header of {size} bytes in a file of {} bytes", bytes.len()),
        ));
    };
    if header.first() != Some(&b'{') {
        return Err(malformed(8, "a safetensors header starts with `{`".to_owned()));
    }
    let Header { metadata, mut tensors } = serde_json::from_slice(header).map_err(|e| {
        malformed(8 + if e.line() == 1 { e.column() } else { 0 }, format!("safetensors header: {e}"))
    })?;

    tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut problems = Vec::new();
    let mut infos = Vec::with_capacity(tensors.len());
    let mut at = 0;
    for (name, Entry { dtype, shape, data_offsets: (start, end) }) in tensors {
        let mut problem = |what: String| problems.push(format!("tensor `{name}`: {what}"));
        if start != at {
            let what = if start < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
            problem(format!("starts at byte {start} of the data, which {what} (due at {at})"));
        }
        if end < start || end > data.len() {
            problem(format!("bytes {start}..{end} of {} bytes of data", data.len()));
        }
        at = end.max(at);
        let Some(dtype) = DType::from_safetensors_name(&dtype) else {
            problem(format!("type `{dtype}` is not supported"));
            continue;
        };
        let len = end.saturating_sub(start);
        if dtype.bytes_for_shape(&shape) != Some(len) {
            problem(format!("shape {shape:?} of {dtype} does not take {len} bytes"));
        }
        let offset = (8 + size).saturating_add(start) as u64;
        infos.push(TensorInfo { name, dtype, shape, file, offset, len });
    }
    if at < data.len() {
        problems.push(format!("{} bytes after the last tensor", data.len() - at));
    }
    if problems.is_empty() {
        Ok((metadata, infos))
    } else {
        Err(CheckpointError::Problems { path: path.to_owned(), problems })
    }
}

pub(super) fn layout(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Layout> {
    let sizes = layout::sizes(tensors, |t| match t.dtype.safetensors_name() {
        _ if t.name == METADATA_KEY => Some(format!("`{METADATA_KEY}` can't name a tensor")),
        None => Some(format!("tensor `{}`: safetensors has no type {}", t.name, t.dtype)),
        Some(_) => None,
    })?;
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.block_bytes()));

    let mut entries = serde_json::Map::new();
    let mut with_format = metadata.clone();
    if !with_format.contains_key("format") {
        with_format.shift_insert(0, "format".to_owned(), "pt".to_owned());
    }
    entries.insert(METADATA_KEY.to_owned(), json(&with_format));
    let mut infos = Vec::with_capacity(tensors.len());
    let mut at = 0;
    for &i in &order {
        let TensorSpec { name, dtype, shape } = tensors[i].clone();
        let end = at + sizes[i];
        let entry = Entry {
            dtype: dtype.safetensors_name().unwrap_or_default().to_owned(),
            shape: shape.clone(),
            data_offsets: (at, end),
        };
        entries.insert(name.clone(), json(&entry));
        infos.push(TensorInfo { name, dtype, shape, file: 0, offset: at as u64, len: sizes[i] });
        at = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string();
    let padding = text.len().next_multiple_of(8) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    if text.len() > MAX_HEADER {
        let problems = vec![format!("a header of {} bytes (at most {MAX_HEADER} are allowed)", text.len())];
        return Err(CheckpointError::Layout { problems });
    }
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    let data = header.len() as u64;
    infos.iter_mut().for_each(|t| t.offset += data);
    Ok(Layout { header, tensors: infos, len: data + at as u64 })
}

fn json(value: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(value).expect("strings and numbers are JSON")
}

/// Writes a whole safetensors file at once, atomically; for files larger than memory use a
/// [`TensorWriter`](super::TensorWriter).
///
/// # Errors
/// As [`Layout::safetensors`] and [`TensorWriter::write`](super::TensorWriter::write), and when the file can't be written.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    metadata: &Metadata,
    tensors: &[(TensorSpec, impl AsRef<[u8]>)],
) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let layout = Layout::safetensors(metadata, &specs)?;
    write_whole(path.as_ref(), layout, tensors)
}
