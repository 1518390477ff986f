//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file written beside its target and renamed over it on [`commit`](AtomicFile::commit).
///
/// Dropped without a commit it leaves nothing behind, and the old file, if any, stays as it was. Readers that
/// have the old file mapped keep reading the old bytes.
#[derive(Debug)]
pub struct AtomicFile {
    out: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl AtomicFile {
    /// Opens a temporary file in the folder of `path`, which must exist.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let mut builder = tempfile::Builder::new();
        builder.prefix(".firebrick-").suffix(".part");
        // Temporary files are private by default; an output gets what the umask says.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder(&path))?;
        Ok(AtomicFile { out: BufWriter::with_capacity(1 << 20, file), path })
    }

    /// Flushes to disk and puts the file in place, over an older one.
    ///
    /// # Errors
    /// When writing or renaming fails; the old file is then untouched.
    pub fn commit(self) -> Result<()> {
        let AtomicFile { out, path } = self;
        let temporary = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        temporary.as_file().sync_all()?;
        temporary.persist(&path).map_err(|e| e.error)?;
        // The rename itself must reach the disk too.
        sync_folder(folder(&path));
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.out.write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }
}

/// Writes a whole file: readers see the old one or the new one, also after a crash.
///
/// # Errors
/// When writing or renaming fails; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// Makes the renames in a folder reach the disk; where folders can't be synced there is nothing to do.
pub fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// The folder that holds `path`; `.` for a bare name.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn nothing_is_left_without_a_commit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!(names(folder.path()), ["a"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_commit_replaces_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for bytes in [&b"longer"[..], b"two"] {
            write_atomic(&path, bytes).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_umask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (plain, atomic) = (folder.path().join("plain"), folder.path().join("atomic"));
        std::fs::write(&plain, b"").unwrap();
        AtomicFile::create(&atomic).unwrap().commit().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&plain), mode(&atomic));
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write_atomic(&folder.path().join("none/a"), b"").is_err());
        assert!(names(folder.path()).is_empty());
    }
}
