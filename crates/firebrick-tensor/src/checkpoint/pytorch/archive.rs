//! The ZIP archive around a PyTorch checkpoint: which bytes of the file belong to which entry.

use super::super::error::{CheckpointError, Result};
use indexmap::IndexMap;
use std::ops::Range;
use std::path::Path;

const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// Longest end of an archive: its fields and a comment.
const END_MOST: usize = 22 + 65535;
/// An extra field with 64-bit sizes and offsets.
const EXTRA_64: u64 = 1;

/// The uncompressed entries of an archive.
pub(super) struct Archive {
    /// Name, and bytes in the file.
    pub(super) entries: IndexMap<String, Range<usize>>,
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn error(&self, at: usize, what: impl Into<String>) -> CheckpointError {
        CheckpointError::malformed(self.path, at, what)
    }

    fn slice(&self, at: usize, len: usize) -> Result<&'a [u8]> {
        let end = at.checked_add(len).filter(|end| *end <= self.bytes.len());
        end.map(|end| &self.bytes[at..end]).ok_or_else(|| {
            self.error(at, format!("{len} bytes of the archive's directory lie behind the end"))
        })
    }

    /// A little-endian number of `len` bytes.
    fn number(&self, at: usize, len: usize) -> Result<u64> {
        Ok(self.slice(at, len)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn size(&self, at: usize, len: usize) -> Result<usize> {
        let size = self.number(at, len)?;
        size.try_into().map_err(|_| self.error(at, format!("{size} does not fit this machine")))
    }

    fn signed(&self, at: usize, signature: [u8; 4], what: &str) -> Result<()> {
        match self.slice(at, 4)? == signature {
            true => Ok(()),
            false => Err(self.error(at, format!("no {what} of a ZIP archive here"))),
        }
    }
}

impl Archive {
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let r = Reader { path, bytes };
        let first = bytes.len().saturating_sub(END_MOST);
        let end = bytes[first..].windows(4).rposition(|w| w == END);
        let end = first + end.ok_or_else(|| r.error(bytes.len(), "the end of the archive is missing"))?;
        r.slice(end + 22, r.size(end + 20, 2)?)?;
        let (mut count, mut at) = (r.size(end + 10, 2)?, r.size(end + 16, 4)?);
        // Archives of over 4 GB have a second end, with a locator before this one.
        if end >= 20 && r.slice(end - 20, 4)? == LOCATOR_64 {
            let end = r.size(end - 12, 8)?;
            r.signed(end, END_64, "64-bit end")?;
            (count, at) = (r.size(end + 32, 8)?, r.size(end + 48, 8)?);
        }
        let mut entries = IndexMap::new();
        for _ in 0..count {
            r.signed(at, ENTRY, "directory entry")?;
            let method = r.number(at + 10, 2)?;
            let (mut packed, mut size) = (r.number(at + 20, 4)?, r.number(at + 24, 4)?);
            let [name_len, extra_len, comment_len] =
                [r.size(at + 28, 2)?, r.size(at + 30, 2)?, r.size(at + 32, 2)?];
            let mut local = r.number(at + 42, 4)?;
            let name = std::str::from_utf8(r.slice(at + 46, name_len)?)
                .map_err(|_| r.error(at + 46, "the name of an entry is not UTF-8"))?;
            let extra = at + 46 + name_len;
            let mut wide = wide_numbers(&r, extra, extra_len)?.into_iter();
            // Fields that do not fit 32 bits are all ones here, and follow in this order in the extra field.
            for value in [&mut size, &mut packed, &mut local] {
                if *value == u64::from(u32::MAX) {
                    *value = wide.next().unwrap_or(*value);
                }
            }
            if method != 0 || packed != size {
                return Err(
                    r.error(at, format!("entry `{name}` is compressed, which torch.save does not do"))
                );
            }
            let range = local_range(&r, local, size, name)?;
            if entries.insert(name.to_owned(), range).is_some() {
                return Err(r.error(at, format!("entry `{name}` appears twice")));
            }
            at = extra + extra_len + comment_len;
        }
        Ok(Archive { entries })
    }
}

/// The 64-bit numbers among the extra fields of an entry.
fn wide_numbers(r: &Reader<'_>, extra: usize, extra_len: usize) -> Result<Vec<u64>> {
    let mut field = extra;
    while field + 4 <= extra + extra_len {
        let (id, len) = (r.number(field, 2)?, r.size(field + 2, 2)?);
        if id == EXTRA_64 {
            return (0..len / 8).map(|i| r.number(field + 4 + 8 * i, 8)).collect();
        }
        field += 4 + len;
    }
    Ok(Vec::new())
}

/// The bytes of an entry, behind its own header.
fn local_range(r: &Reader<'_>, local: u64, size: u64, name: &str) -> Result<Range<usize>> {
    let outside = || {
        r.error(0, format!("entry `{name}`: {size} bytes at {local} in a file of {} bytes", r.bytes.len()))
    };
    let local = usize::try_from(local).map_err(|_| outside())?;
    let size = usize::try_from(size).map_err(|_| outside())?;
    if local >= r.bytes.len() {
        return Err(outside());
    }
    r.signed(local, LOCAL, "entry")?;
    let start = local + 30 + r.size(local + 26, 2)? + r.size(local + 28, 2)?;
    match start.checked_add(size).filter(|end| *end <= r.bytes.len()) {
        Some(end) => Ok(start..end),
        None => Err(outside()),
    }
}
