//! Importance matrices: the mean square of every input of every linear layer, as llama.cpp's `imatrix` measures them.
//!
//! Both of its file formats are read: GGUF, with tensors `NAME.in_sum2` and `NAME.counts` for the weight `NAME`, and the older
//! `.dat`. GGUF is written.

use crate::block::DType;
use crate::checkpoint::gguf::{Array, Gguf, Metadata, Strings};
use crate::checkpoint::{Checkpoint, CheckpointError, Format, TensorSpec, Value, write_gguf};
use firebrick_core::read_file;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// Longest name in an old file; ggml's end at 63 bytes.
const MAX_NAME: usize = 1024;
/// Longest old file: 256 million inputs, more than any model has.
const MAX_DAT: u64 = 1 << 30;

/// Squared inputs of the linear layers of a model, over a calibration text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImportanceMatrix {
    /// By name of the weight in GGUF: `blk.0.attn_q.weight`.
    pub entries: BTreeMap<String, Importance>,
    /// What was measured on.
    pub datasets: Vec<String>,
    /// Pieces of text that were measured.
    pub chunks: u32,
    /// Tokens in each piece; 0 if unknown.
    pub chunk_size: u32,
}

/// Squared inputs of one weight, or of the weights of all experts of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    /// Sum of squares: `[counts.len(), d_in]`.
    pub sums: Vec<f32>,
    /// Tokens behind the sums, one number per expert; a single one where there are no experts.
    pub counts: Vec<f32>,
}

impl Importance {
    /// Inputs of the layer.
    pub fn d_in(&self) -> usize {
        self.sums.len() / self.counts.len().max(1)
    }

    /// Mean squares of the inputs of matrix `expert`: `[d_in]`, all 1 where no token came; `None` if there is no such matrix.
    pub fn means(&self, expert: usize) -> Option<Vec<f32>> {
        let (d_in, count) = (self.d_in(), *self.counts.get(expert)?);
        let sums = &self.sums[expert * d_in..(expert + 1) * d_in];
        Some(sums.iter().map(|s| if count > 0.0 { s / count } else { 1.0 }).collect())
    }

    fn problems(&self, name: &str) -> Vec<String> {
        let mut problems = Vec::new();
        if self.counts.is_empty()
            || self.sums.is_empty()
            || !self.sums.len().is_multiple_of(self.counts.len())
        {
            let (sums, counts) = (self.sums.len(), self.counts.len());
            problems.push(format!("`{name}`: {sums} sums for {counts} counts"));
        }
        for (what, values) in [("sum", &self.sums), ("count", &self.counts)] {
            if let Some(i) = values.iter().position(|v| !v.is_finite() || *v < 0.0) {
                problems.push(format!("`{name}`: {what} {i} is {}", values[i]));
            }
        }
        problems
    }
}

impl ImportanceMatrix {
    /// Reads a file of either format; GGUF is known by its first four bytes.
    ///
    /// # Errors
    /// If the file can't be read, is neither, or holds sums without counts, of another type, or that are not numbers from 0 up.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let mut start = [0; 4];
        let mut file = std::fs::File::open(path).map_err(io)?;
        let gguf = std::io::Read::read_exact(&mut file, &mut start).is_ok() && start == *b"GGUF";
        let (found, mut problems) = if gguf {
            Self::from_gguf(&Checkpoint::open(path)?)?
        } else {
            (Self::from_dat(path, &read_file(path, MAX_DAT).map_err(io)?)?, Vec::new())
        };
        problems.extend(found.entries.iter().flat_map(|(name, entry)| entry.problems(name)));
        if problems.is_empty() {
            Ok(found)
        } else {
            Err(CheckpointError::Problems { path: path.to_owned(), problems })
        }
    }

    fn from_gguf(checkpoint: &Checkpoint) -> Result<(Self, Vec<String>), CheckpointError> {
        debug_assert_eq!(checkpoint.format(), Format::Gguf);
        let mut found = ImportanceMatrix::default();
        let mut problems = Vec::new();
        if let Some(gguf) = checkpoint.gguf() {
            if gguf.optional("general.type", Gguf::str)?.is_some_and(|kind| kind != "imatrix") {
                problems.push("general.type is not `imatrix`".to_owned());
            }
            let datasets = gguf.optional("imatrix.datasets", Gguf::strings)?;
            found.datasets = datasets.map(|d| d.iter().map(str::to_owned).collect()).unwrap_or_default();
            found.chunks = gguf.optional("imatrix.chunk_count", Gguf::u32)?.unwrap_or(0);
            found.chunk_size = gguf.optional("imatrix.chunk_size", Gguf::u32)?.unwrap_or(0);
        }
        let mut names = BTreeSet::new();
        for tensor in checkpoint.tensors() {
            let name = [SUMS, COUNTS].iter().find_map(|end| tensor.name.strip_suffix(end));
            match name {
                _ if tensor.dtype != DType::F32 => {
                    problems.push(format!("`{}` is {}, f32 expected", tensor.name, tensor.dtype));
                }
                Some(name) => {
                    names.insert(name);
                }
                None => problems.push(format!("`{}` ends in neither {SUMS} nor {COUNTS}", tensor.name)),
            }
        }
        for name in names {
            let of = |end: &str| checkpoint.get(&format!("{name}{end}")).filter(|t| t.dtype == DType::F32);
            match (of(SUMS), of(COUNTS)) {
                (Some(sums), Some(counts)) => {
                    let (sums, counts) =
                        (checkpoint.read_f32(&sums.name)?, checkpoint.read_f32(&counts.name)?);
                    found.entries.insert(name.to_owned(), Importance { sums, counts });
                }
                (None, _) => problems.push(format!("`{name}` has no {SUMS}")),
                (_, None) => problems.push(format!("`{name}` has no {COUNTS}")),
            }
        }
        if found.entries.is_empty() && problems.is_empty() {
            problems.push("it holds no importances".to_owned());
        }
        Ok((found, problems))
    }

    /// The old format: a number of entries; of each the length of the name and the name, the number of calls, and the number of
    /// values and the values, which are mean squares times calls; then the number of the last piece and the name of the text.
    fn from_dat(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let mut reader = Reader { path, bytes, at: 0 };
        let entries = reader.size("entries", 12)?;
        let mut found = ImportanceMatrix::default();
        for _ in 0..entries {
            let start = reader.at;
            let length = reader.size("bytes of a name", 1)?;
            if length == 0 || length > MAX_NAME {
                return Err(
                    reader.error(start, format!("a name of {length} bytes (1 to {MAX_NAME} are allowed)"))
                );
            }
            let at = reader.at;
            let name = std::str::from_utf8(reader.take(length)?).map_err(|e| e.valid_up_to());
            let name = name.map_err(|n| reader.error(at + n, "a name is not UTF-8"))?.to_owned();
            let calls = reader.i32()?;
            let count = reader.size("values", 4)?;
            let sums = reader.take(4 * count)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            // What was never called counts alike everywhere, whatever its sums say.
            let entry = Importance { sums, counts: vec![calls.max(0) as f32] };
            if found.entries.insert(name.clone(), entry).is_some() {
                return Err(reader.error(start, format!("`{name}` appears twice")));
            }
        }
        if entries == 0 {
            return Err(reader.error(0, "it holds no importances"));
        }
        if reader.at < bytes.len() {
            found.chunks = reader.size("pieces of text", 0)? as u32;
            let length = reader.size("bytes of a name", 1)?;
            let at = reader.at;
            let name = std::str::from_utf8(reader.take(length)?).map_err(|e| e.valid_up_to());
            found.datasets.push(name.map_err(|n| reader.error(at + n, "a name is not UTF-8"))?.to_owned());
        }
        if reader.at < bytes.len() {
            let more = bytes.len() - reader.at;
            return Err(reader.error(reader.at, format!("{more} bytes after the end")));
        }
        Ok(found)
    }

    /// Writes GGUF as llama.cpp's `imatrix` does, atomically.
    ///
    /// # Errors
    /// If sums and counts do not fit each other or are not numbers from 0 up, a name is too long for GGUF, or the file can't be
    /// written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let problems: Vec<String> =
            self.entries.iter().flat_map(|(name, entry)| entry.problems(name)).collect();
        if !problems.is_empty() {
            return Err(CheckpointError::Layout { problems });
        }
        let metadata = Metadata::from([
            ("general.type".to_owned(), "imatrix".into()),
            ("imatrix.datasets".to_owned(), Array::String(Strings::from_iter(&self.datasets)).into()),
            ("imatrix.chunk_count".to_owned(), Value::U32(self.chunks)),
            ("imatrix.chunk_size".to_owned(), Value::U32(self.chunk_size)),
        ]);
        let tensor = |name: String, rows: usize, values: &[f32]| {
            let shape = match rows {
                1 => vec![values.len()],
                _ => vec![rows, values.len() / rows],
            };
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (TensorSpec::new(name, DType::F32, shape), bytes)
        };
        let pair = |(name, entry): (&String, &Importance)| {
            let rows = entry.counts.len();
            [
                tensor(format!("{name}{SUMS}"), rows, &entry.sums),
                tensor(format!("{name}{COUNTS}"), rows, &entry.counts),
            ]
        };
        let tensors: Vec<_> = self.entries.iter().flat_map(pair).collect();
        write_gguf(path, &metadata, &tensors)
    }
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, offset: usize, what: impl Into<String>) -> CheckpointError {
        CheckpointError::malformed(self.path, offset, what)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], CheckpointError> {
        let left = self.bytes.len() - self.at;
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end =
            end.ok_or_else(|| self.error(self.at, format!("{len} bytes expected, {left} left in the file")))?;
        Ok(&self.bytes[std::mem::replace(&mut self.at, end)..end])
    }

    fn i32(&mut self) -> Result<i32, CheckpointError> {
        let bytes = self.take(4)?;
        Ok(i32::from_le_bytes(*bytes.first_chunk().expect("4 bytes were taken")))
    }

    /// A number of things of at least `min` bytes each that the file still has room for.
    fn size(&mut self, what: &str, min: usize) -> Result<usize, CheckpointError> {
        let (at, size) = (self.at, self.i32()?);
        let left = self.bytes.len() - self.at;
        let room = left.checked_div(min).unwrap_or(usize::MAX);
        usize::try_from(size)
            .ok()
            .filter(|n| *n <= room)
            .ok_or_else(|| self.error(at, format!("{size} {what} with {left} bytes left in the file")))
    }
}
