//! Files read whole, within limits.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Most bytes of a file of settings (a configuration, a plan, a recipe): 16 MiB.
pub const MAX_SETTINGS: u64 = 16 << 20;

/// Reads a file of at most `limit` bytes, and only a regular one: a pipe can block and a device never end.
///
/// # Errors
/// When the file can't be read, is another kind of file, or is longer.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    // Files can grow, and some (in /proc) say that they are empty.
    File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let size = metadata.len().max(bytes.len() as u64);
        return Err(Error::new(ErrorKind::FileTooLarge, format!("{size} bytes, {limit} are allowed")));
    }
    Ok(bytes)
}

/// As [`read_file`], for UTF-8 text.
///
/// # Errors
/// As [`read_file`], and with the place of the first byte that is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(read_file(path, limit)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::new(ErrorKind::InvalidData, format!("not UTF-8 text at byte {at}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_size_allowed_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "abc\u{e9}").unwrap();
        assert_eq!(read_file(&path, 5).unwrap(), "abc\u{e9}".as_bytes());
        assert_eq!(read_text(&path, 5).unwrap(), "abc\u{e9}");
        assert_eq!(read_file(&path, 4).unwrap_err().to_string(), "5 bytes, 4 are allowed");
        assert_eq!(read_file(dir.path(), 9).unwrap_err().kind(), ErrorKind::IsADirectory);
        assert_eq!(read_file(&dir.path().join("b"), 9).unwrap_err().kind(), ErrorKind::NotFound);
        std::fs::write(&path, b"ab\xff").unwrap();
        assert_eq!(read_text(&path, 9).unwrap_err().to_string(), "not UTF-8 text at byte 2");
        #[cfg(unix)]
        assert_eq!(read_file(Path::new("/dev/zero"), 9).unwrap_err().to_string(), "not a regular file");
    }
}
