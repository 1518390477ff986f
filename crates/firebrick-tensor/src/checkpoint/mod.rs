//! Checkpoints: named tensors on disk, memory-mapped and lazily read.
//!
//! [`Checkpoint::open`] reads a `.safetensors` file, a folder of shards with their index, a `.gguf` file, or a `.bin` file of PyTorch's as
//! one list of named tensors. [`TensorWriter`] writes both formats as a stream: the header first, then the bytes of each
//! tensor in order. [`AtomicFile`] makes what is written appear whole or not at all.
//!
//! ```
//! use firebrick_tensor::block::DType;
//! use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_safetensors};
//! # let folder = tempfile::tempdir()?;
//! let path = folder.path().join("model.safetensors");
//! let spec = TensorSpec::new("norm.weight", DType::BF16, [2]);
//! write_safetensors(&path, &Default::default(), &[(spec, [0x80u8, 0x3f, 0x00, 0x40])])?;
//! let checkpoint = Checkpoint::open(&path)?;
//! assert_eq!(checkpoint.read_f32("norm.weight")?, [1.0, 2.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod compare;
mod error;
pub mod gguf;
mod layout;
mod pytorch;
mod safetensors;
mod sharded;

pub use compare::Distance;
pub use error::{CheckpointError, Result};
pub use firebrick_core::AtomicFile;
pub use gguf::{Gguf, Value, write_gguf};
pub use layout::{Layout, TensorSpec, TensorWriter};
pub use safetensors::{Metadata, write_safetensors};
pub(crate) use sharded::is_plain_file_name;

use crate::block::{self, DType};
use memmap2::Mmap;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Extents, outermost first as PyTorch prints them (GGUF's order reversed); empty for a scalar.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// Where its bytes start, from the start of that file.
    pub offset: u64,
    /// Size in bytes.
    pub len: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        // Readers refuse shapes whose product overflows.
        self.shape.iter().product()
    }

    /// Name, type and shape, to write a tensor like this one.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }
}

/// The file format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// One `.safetensors` file, or shards with an index; or PyTorch's `.bin` files, which hold tensors of the same names.
    Safetensors,
    /// One `.gguf` file.
    Gguf,
}

/// The bytes of one file.
#[derive(Debug)]
enum Contents {
    Mapped {
        map: Mmap,
        /// See [`Checkpoint::file_identity`].
        identity: String,
    },
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Contents::Mapped { map, .. } => map,
            Contents::Static(bytes) => bytes,
            Contents::Owned(bytes) => bytes,
        }
    }
}

/// Named tensors on disk, memory-mapped; only the headers are read on opening.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    files: Vec<PathBuf>,
    maps: Vec<Contents>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    metadata: Metadata,
    gguf: Option<Gguf>,
}

/// Whether a file of this name holds, or is to hold, GGUF.
pub fn is_gguf_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

impl Checkpoint {
    /// Opens a `.safetensors` or `.gguf` file, one that `torch.save` wrote, or a folder that holds `model.safetensors`,
    /// `model.safetensors.index.json` with its shards, `pytorch_model.bin`, or `pytorch_model.bin.index.json` with its shards; the first
    /// of these that is there.
    ///
    /// A file is taken for GGUF or for PyTorch's by its first four bytes, whatever it is called.
    ///
    /// # Errors
    /// When the files can't be read, or anything in their headers does not hold: every offset, size, type and name is
    /// checked here, so that reading tensors later can't fail on the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?;
        if metadata.is_dir() {
            return sharded::open(path);
        }
        Self::read(path, map(path)?)
    }

    /// Reads a `.safetensors` or `.gguf` file that is part of the program; `path` only names it in errors and reports.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_static(bytes: &'static [u8], path: impl AsRef<Path>) -> Result<Self> {
        Self::read(path.as_ref(), Contents::Static(bytes))
    }

    /// Reads a `.safetensors` or `.gguf` file that is in memory; `path` only names it in errors and reports.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(bytes: Vec<u8>, path: impl AsRef<Path>) -> Result<Self> {
        Self::read(path.as_ref(), Contents::Owned(bytes))
    }

    fn read(path: &Path, map: Contents) -> Result<Self> {
        let mut checkpoint = Checkpoint {
            path: path.to_owned(),
            format: Format::Safetensors,
            files: vec![path.to_owned()],
            maps: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            metadata: Metadata::new(),
            gguf: None,
        };
        if map.starts_with(gguf::MAGIC) || is_gguf_name(path) {
            let (gguf, tensors) = gguf::read(path, &map)?;
            checkpoint.format = Format::Gguf;
            checkpoint.gguf = Some(gguf);
            checkpoint.tensors = tensors;
        } else {
            (checkpoint.metadata, checkpoint.tensors) = read_file(path, &map, 0)?;
        }
        checkpoint.maps.push(map);
        Ok(checkpoint.indexed())
    }

    fn indexed(mut self) -> Self {
        self.by_name = self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        self
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The files that hold tensors: one, or the shards in the order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Every tensor in file order: safetensors by offset, GGUF as its header lists them.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name)
            .ok_or_else(|| CheckpointError::NoTensor { path: self.path.clone(), tensor: name.to_owned() })
    }

    /// `__metadata__` of a safetensors checkpoint (of the first shard that has one); empty for GGUF.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Metadata of a GGUF checkpoint.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// The stored bytes of the tensor `name`, with no copy and no particular alignment.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(self.bytes_of(self.tensor(name)?))
    }

    fn bytes_of(&self, tensor: &TensorInfo) -> &[u8] {
        &self.maps[tensor.file][tensor.offset as usize..][..tensor.len]
    }

    /// The tensor `name` decoded to `f32`, row-major.
    ///
    /// # Errors
    /// When there is no such tensor, or it holds integers.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        // Asked before allocating: every type takes more than an eighth of a byte per element on disk.
        if !tensor.dtype.is_real() {
            return Err(self.block_error(name, block::BlockError::NotReal(tensor.dtype)));
        }
        let mut out = vec![0.0; tensor.elements()];
        self.read_f32_into(name, 0..out.len(), &mut out)?;
        Ok(out)
    }

    /// Decodes the elements `range` of the tensor `name`, counted row-major, into `out`.
    ///
    /// # Errors
    /// When there is no such tensor, it holds integers, the range is not inside it or does not start and end on a
    /// block, or `out` has another length.
    pub fn read_f32_into(&self, name: &str, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let elements = tensor.elements();
        if range.start > range.end || range.end > elements || range.len() != out.len() {
            let Range { start, end } = range;
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(CheckpointError::Range { path, tensor, start, end, elements });
        }
        let dtype = tensor.dtype;
        let byte = |element: usize| {
            let partial =
                || self.block_error(name, block::BlockError::PartialBlock { dtype, elements: element });
            dtype.bytes_for(element).ok_or_else(partial)
        };
        let bytes = &self.bytes_of(tensor)[byte(range.start)?..byte(range.end)?];
        block::decode(dtype, bytes, out).map_err(|e| self.block_error(name, e))
    }

    /// All bytes of [`files`](Checkpoint::files)`[file]`, as they were when it was opened.
    ///
    /// # Panics
    /// When there is no such file.
    pub(crate) fn file_bytes(&self, file: usize) -> &[u8] {
        &self.maps[file]
    }

    /// What changes when [`files`](Checkpoint::files)`[file]` changes: size, times and number of the file as it was opened; of what lies in
    /// memory a hash.
    ///
    /// # Panics
    /// When there is no such file.
    pub(crate) fn file_identity(&self, file: usize) -> String {
        match &self.maps[file] {
            Contents::Mapped { identity, .. } => identity.clone(),
            bytes => blake3::hash(bytes).to_hex().to_string(),
        }
    }

    /// Tells the system that the bytes `range` of [`files`](Checkpoint::files)`[file]` are not needed for now, so that
    /// they stop counting as memory of this process. Reading them again maps them again. Does nothing where there is
    /// no such call or no such range.
    pub(crate) fn release(&self, file: usize, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(Contents::Mapped { map, .. }) = self.maps.get(file)
            && range.start < range.end
            && range.end <= map.len()
        {
            let dont_need = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and backed by a file, so a dropped page is read from the file again, with
            // the same bytes; the range lies within the map. A failure costs memory only.
            let _ = unsafe { map.unchecked_advise_range(dont_need, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = (file, range);
    }

    fn block_error(&self, tensor: &str, source: block::BlockError) -> CheckpointError {
        CheckpointError::Block { path: self.path.clone(), tensor: tensor.to_owned(), source }
    }
}

// A file of Hugging Face's: metadata and tensors.
fn read_file(path: &Path, bytes: &[u8], file: usize) -> Result<(Metadata, Vec<TensorInfo>)> {
    if bytes.starts_with(pytorch::MAGIC) || pytorch::is_pytorch_name(path) {
        return Ok((Metadata::new(), pytorch::read(path, bytes, file)?));
    }
    safetensors::read(path, bytes, file)
}

// Maps a regular file; anything else (a pipe, a device) could block or change under the map.
fn map(path: &Path) -> Result<Contents> {
    let fail = |e| CheckpointError::io(path, e);
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        let what = "neither a file nor a folder".to_owned();
        return Err(CheckpointError::NotACheckpoint { path: path.to_owned(), what });
    }
    let file = File::open(path).map_err(fail)?;
    // SAFETY: the map is read-only, handed out only as bytes, and every bit pattern is a valid byte. Another process
    // that truncates the file in place can still end this one with SIGBUS, as for every mapped file; our own writers
    // replace files by renaming and leave mapped ones alone.
    let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
    Ok(Contents::Mapped { map, identity: identity(&file.metadata().map_err(fail)?) })
}

fn identity(file: &std::fs::Metadata) -> String {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // The time of the last change of the inode can't be set, so that a file in its place is told apart whatever its own time says.
        let times = [(file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec())];
        format!("{} {} {times:?}", file.len(), file.ino())
    }
    #[cfg(not(unix))]
    {
        format!("{} {:?} {:?}", file.len(), file.created().ok(), file.modified().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_bytes_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let data: Vec<u8> = (0..40_000).map(|i| (i % 251) as u8).collect();
        write_safetensors(&path, &Default::default(), &[(TensorSpec::new("w", DType::U8, [40_000]), data)])
            .unwrap();
        let expected = std::fs::read(&path).unwrap();
        let len = expected.len();
        let built_in = Checkpoint::from_static(expected.clone().leak(), "embedded").unwrap();
        let read = Checkpoint::from_bytes(expected.clone(), "read").unwrap();
        for checkpoint in [Checkpoint::open(&path).unwrap(), built_in, read] {
            for range in [0..len, 1..4097, 5000..5001, 8191..len, len..len, len - 1..len + 1, 0..usize::MAX] {
                assert_eq!(checkpoint.file_bytes(0), expected);
                checkpoint.release(0, range.clone());
                assert_eq!(checkpoint.file_bytes(0), expected, "{range:?}");
            }
            checkpoint.release(7, 0..1);
        }
    }
}
