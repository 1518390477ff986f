//! Where each tensor of a file goes, and the stream that writes it there.

use super::error::{CheckpointError, Result};
use super::{AtomicFile, TensorInfo, gguf, safetensors};
use crate::block::DType;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::path::Path;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor `name` of `dtype` and `shape`, outermost extent first.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }
}

/// A file planned in full before its first byte is written: the header, and the place of each tensor.
///
/// Everything between and after the tensors is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) len: u64,
}

impl Layout {
    /// A safetensors file with `metadata` as its `__metadata__`; `format: pt`, which Hugging Face's loaders ask for, is
    /// added unless `metadata` has a `format`.
    ///
    /// The format has no padding, and Python's reader needs every tensor aligned to its element size, so tensors are
    /// placed by element size, largest first, and otherwise as given: write them in the order of
    /// [`tensors`](Layout::tensors).
    ///
    /// # Errors
    /// Lists every duplicate or empty name, shape without a size and type that safetensors lacks.
    pub fn safetensors(metadata: &safetensors::Metadata, tensors: &[TensorSpec]) -> Result<Self> {
        safetensors::layout(metadata, tensors)
    }

    /// A GGUF version 3 file with `metadata` in the given order and aligned to its `general.alignment`, or to 32.
    /// Tensors are placed in the given order.
    ///
    /// # Errors
    /// Lists every duplicate, empty or overlong name, shape without a size or with over 4 extents, type that ggml lacks
    /// and bad alignment.
    pub fn gguf(metadata: &gguf::Metadata, tensors: &[TensorSpec]) -> Result<Self> {
        gguf::layout(metadata, tensors)
    }

    /// The first bytes of the file, up to the first tensor.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The tensors in the order in which they are written, with their offsets in the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Size of the whole file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }
}

// Sizes in bytes of all tensors, or every reason why there are none.
pub(super) fn sizes(
    tensors: &[TensorSpec],
    mut check: impl FnMut(&TensorSpec) -> Option<String>,
) -> Result<Vec<usize>> {
    let mut problems = Vec::new();
    let mut seen = HashSet::new();
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut total = 0u64;
    for tensor in tensors {
        let TensorSpec { name, dtype, shape } = tensor;
        if name.is_empty() {
            problems.push("a tensor has an empty name".to_owned());
        } else if !seen.insert(name.as_str()) {
            problems.push(format!("two tensors are named `{name}`"));
        }
        problems.extend(check(tensor));
        match dtype
            .bytes_for_shape(shape)
            .filter(|&bytes| total.checked_add(bytes as u64).is_some_and(|t| t < 1 << 62))
        {
            Some(bytes) => {
                total += bytes as u64;
                sizes.push(bytes);
            }
            None => problems.push(format!(
                "tensor `{name}`: shape {shape:?} has no size in {dtype} (blocks of {} along the last axis)",
                dtype.block_len()
            )),
        }
    }
    if problems.is_empty() { Ok(sizes) } else { Err(CheckpointError::Layout { problems }) }
}

/// Writes a planned file front to back: the header at once, then the bytes of each tensor.
#[derive(Debug)]
pub struct TensorWriter<W: Write> {
    out: W,
    layout: Layout,
    // The tensor being written, and how many of its bytes are.
    current: usize,
    done: usize,
    position: u64,
}

impl<W: Write> TensorWriter<W> {
    /// Writes the header of `layout`. Many small writes follow: `out` should be buffered, as [`AtomicFile`] is.
    ///
    /// # Errors
    /// When `out` fails.
    pub fn new(mut out: W, layout: Layout) -> Result<Self> {
        out.write_all(&layout.header)?;
        let position = layout.header.len() as u64;
        let mut writer = TensorWriter { out, layout, current: 0, done: 0, position };
        writer.settle()?;
        Ok(writer)
    }

    /// The plan being written.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The tensor whose bytes come next, and how many of them are written.
    pub fn due(&self) -> Option<(&TensorInfo, usize)> {
        self.layout.tensors.get(self.current).map(|t| (t, self.done))
    }

    /// Writes the next bytes of the tensor `name`: all of it, or a part, in which case the rest must follow before
    /// another tensor. Empty tensors may be left out.
    ///
    /// # Errors
    /// When another tensor is due, the bytes are more than it has left, or `out` fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let fail = |what: String| Err(CheckpointError::Write { tensor: name.to_owned(), what });
        let due = self.layout.tensors.get(self.current);
        let Some(tensor) = due.filter(|t| t.name == name) else {
            if bytes.is_empty() && self.layout.tensors.iter().any(|t| t.name == name && t.len == 0) {
                return Ok(());
            }
            return fail(match due {
                Some(tensor) => {
                    format!("`{}` is due, {} of {} bytes written", tensor.name, self.done, tensor.len)
                }
                None => "every tensor is written".to_owned(),
            });
        };
        if bytes.len() > tensor.len - self.done {
            return fail(format!("{} bytes after {} of {}", bytes.len(), self.done, tensor.len));
        }
        self.out.write_all(bytes)?;
        self.done += bytes.len();
        self.position += bytes.len() as u64;
        self.settle()
    }

    // Moves past complete tensors and pads up to the next one, or to the end of the file.
    fn settle(&mut self) -> Result<()> {
        let tensors = &self.layout.tensors;
        while tensors.get(self.current).is_some_and(|t| t.len == self.done) {
            self.current += 1;
            self.done = 0;
        }
        if self.done == 0 {
            let until = tensors.get(self.current).map_or(self.layout.len, |t| t.offset);
            let mut padding = std::io::repeat(0).take(until - self.position);
            std::io::copy(&mut padding, &mut self.out)?;
            self.position = until;
        }
        Ok(())
    }

    /// Flushes and gives back the output.
    ///
    /// # Errors
    /// When a tensor is incomplete, or `out` fails.
    pub fn finish(mut self) -> Result<W> {
        if let Some(tensor) = self.layout.tensors.get(self.current) {
            let (tensor, what) =
                (tensor.name.clone(), format!("{} of {} bytes written", self.done, tensor.len));
            return Err(CheckpointError::Write { tensor, what });
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Writes the tensors of `layout` to `path`, atomically; `tensors` may be in another order.
pub(super) fn write_whole(
    path: &Path,
    layout: Layout,
    tensors: &[(TensorSpec, impl AsRef<[u8]>)],
) -> Result<()> {
    let data: HashMap<&str, &[u8]> = tensors.iter().map(|(s, b)| (s.name.as_str(), b.as_ref())).collect();
    let order: Vec<String> = layout.tensors().iter().map(|t| t.name.clone()).collect();
    let io = |e| CheckpointError::io(path, e);
    let mut writer = TensorWriter::new(AtomicFile::create(path).map_err(io)?, layout)?;
    for name in order {
        writer.write(&name, data[name.as_str()])?;
    }
    writer.finish()?.commit().map_err(io)
}
