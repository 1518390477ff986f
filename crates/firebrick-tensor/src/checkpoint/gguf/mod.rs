//! The GGUF format: typed metadata, a table of tensors, then their bytes, aligned.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Versions 2 and 3 are read (they differ only in
//! that version 3 may be big-endian, which is refused), version 3 is written.

mod read;
mod value;
mod write;

pub use value::{Array, Strings, Value};
pub use write::write_gguf;

pub(super) use read::read;
pub(super) use write::layout;

use super::error::{CheckpointError, Result};
use indexmap::IndexMap;
use std::path::PathBuf;

/// Metadata of a GGUF file, in file order.
pub type Metadata = IndexMap<String, Value>;

pub(super) const MAGIC: &[u8] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
// Far above any real file; keeps a hostile file from making its copy all padding.
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_KEY: usize = 65535;
const MAX_STRING: usize = 1 << 30;
const MAX_COUNT: usize = 1 << 30;
const MAX_DIMS: usize = 4;
const MAX_NESTING: usize = 64;

/// What a GGUF file says beside its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// The file, for error messages; empty when the metadata come from none.
    pub path: PathBuf,
    /// Format version, 2 or 3.
    pub version: u32,
    /// Alignment of the tensors in bytes.
    pub alignment: u64,
    /// Keys and values in file order, known and unknown.
    pub metadata: Metadata,
}

impl Gguf {
    /// The value of `key`, if there is one.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// `Some(read(key))` when the key is there: `gguf.optional("llama.rope.freq_base", Gguf::f32)?.unwrap_or(1e4)`.
    ///
    /// # Errors
    /// When the key is there and holds something else.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Gguf, &str) -> Result<T>,
    ) -> Result<Option<T>> {
        if self.metadata.contains_key(key) { read(self, key).map(Some) } else { Ok(None) }
    }

    /// The integer of `key`, stored as any integer type that fits.
    ///
    /// # Errors
    /// When the key is missing or does not hold such an integer.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.read(key, "an integer that fits u32", |v| v.integer()?.try_into().ok())
    }

    /// The real number of `key`, stored as f32 or f64.
    ///
    /// # Errors
    /// When the key is missing or does not hold a real number.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.read(key, "a float", |v| match v {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        })
    }

    /// The truth value of `key`.
    ///
    /// # Errors
    /// When the key is missing or does not hold a bool.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.read(key, "a bool", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// The text of `key`.
    ///
    /// # Errors
    /// When the key is missing or does not hold a string.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.read(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// The list of texts of `key`.
    ///
    /// # Errors
    /// When the key is missing or does not hold an array of strings.
    pub fn strings(&self, key: &str) -> Result<&Strings> {
        self.read(key, "an array of strings", |v| match v {
            Value::Array(Array::String(s)) => Some(s),
            _ => None,
        })
    }

    /// The list of numbers of `key`, stored as f32.
    ///
    /// # Errors
    /// When the key is missing or does not hold an array of f32.
    pub fn f32s(&self, key: &str) -> Result<&[f32]> {
        self.read(key, "an array of f32", |v| match v {
            Value::Array(Array::F32(values)) => Some(&values[..]),
            _ => None,
        })
    }

    /// The list of integers of `key`, stored as any integer type that fits.
    ///
    /// # Errors
    /// When the key is missing or does not hold an array of such integers.
    pub fn i32s(&self, key: &str) -> Result<Vec<i32>> {
        self.read(key, "an array of integers that fit i32", |v| match v {
            Value::Array(array) => array.integers()?.into_iter().map(|i| i.try_into().ok()).collect(),
            _ => None,
        })
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        let path = || self.path.clone();
        let Some(value) = self.metadata.get(key) else {
            return Err(CheckpointError::NoKey { path: path(), key: key.to_owned(), expected });
        };
        convert(value).ok_or_else(|| {
            let found = value.summary();
            CheckpointError::KeyType { path: path(), key: key.to_owned(), expected, found }
        })
    }
}

fn checked_alignment(value: &Value) -> Option<u64> {
    let alignment: u64 = value.integer()?.try_into().ok()?;
    (alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT).then_some(alignment)
}
