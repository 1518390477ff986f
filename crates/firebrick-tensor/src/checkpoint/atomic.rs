//! Files that appear whole or not at all.

use super::error::{CheckpointError, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
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
        let file = builder.tempfile_in(folder(&path)).map_err(|e| CheckpointError::io(&path, e))?;
        Ok(AtomicFile { out: BufWriter::with_capacity(1 << 20, file), path })
    }

    /// The path the file will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes to disk and puts the file in place, over an older one.
    ///
    /// # Errors
    /// When writing or renaming fails; the old file is then untouched.
    pub fn commit(self) -> Result<()> {
        self.finish(|temporary, path| temporary.persist(path))
    }

    /// Like [`commit`](AtomicFile::commit), but refuses to replace a file that exists.
    ///
    /// # Errors
    /// Also when `path` exists.
    pub fn commit_new(self) -> Result<()> {
        self.finish(|temporary, path| temporary.persist_noclobber(path))
    }

    fn finish(
        self,
        persist: impl FnOnce(NamedTempFile, &Path) -> std::result::Result<File, tempfile::PersistError>,
    ) -> Result<()> {
        let AtomicFile { out, path } = self;
        let fail = |e| CheckpointError::io(&path, e);
        let temporary = out.into_inner().map_err(|e| fail(e.into_error()))?;
        temporary.as_file().sync_all().map_err(fail)?;
        persist(temporary, &path).map_err(|e| fail(e.error))?;
        // The rename itself must reach the disk too; where folders can't be synced there is nothing to do.
        if let Ok(folder) = File::open(folder(&path)) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.out.write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.out.write_all(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

fn folder(path: &Path) -> &Path {
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
    fn commit_replaces_and_commit_new_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for bytes in [b"one", b"two"] {
            let mut file = AtomicFile::create(&path).unwrap();
            file.write_all(bytes).unwrap();
            file.commit().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        let file = AtomicFile::create(&path).unwrap();
        let error = file.commit_new().unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
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
    fn a_missing_folder_is_an_error_that_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let error = AtomicFile::create(folder.path().join("none/a")).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
