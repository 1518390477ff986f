//! The folder beside the target where parts are collected, and the journal of those that are finished.
//!
//! `.NAME.partial/journal.jsonl` holds one line with the key of the run (a hash of everything that decides its bytes) and
//! one line for each finished part with the hash of its bytes. `.NAME.partial/out/` holds the files at their full size.
//! A line is written after its bytes; the hash is checked before a part is kept.

use super::plan::Part;
use super::positioned::{read_at, write_at};
use super::target::{OutputFile, Target};
use super::{StreamError, provenance};
use firebrick_core::sync_folder;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

const JOURNAL: &str = "journal.jsonl";
const JOURNAL_VERSION: u32 = 3;
// Far above one line per part of the largest model.
const MAX_JOURNAL: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Header {
    firebrick_journal: u32,
    key: String,
}

/// Tells contents of parts apart. Nobody is kept from making equal ones: a cryptographic hash takes a tenth of a linear merge.
pub(super) type Hasher = twox_hash::XxHash3_128;

/// What [`Claim`] has of a hash.
pub(super) fn hex(hasher: &Hasher) -> String {
    format!("{:032x}", hasher.finish_128())
}

/// A finished part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claim {
    name: String,
    file: usize,
    offset: u64,
    bytes: u64,
    /// Hash of its own bytes.
    pub(super) output: String,
}

impl Claim {
    pub(super) fn new(name: &str, part: &Part, output: String) -> Self {
        let Part { file, offset, bytes, .. } = *part;
        Claim { name: name.to_owned(), file, offset, bytes, output }
    }
}

/// Finished parts by file, offset and size.
type Claims = HashMap<(usize, u64, u64), Claim>;

/// The staging folder of one run, locked against others.
pub(super) struct Staging {
    folder: PathBuf,
    journal: File,
    pub(super) files: Vec<(PathBuf, File)>,
    claims: Claims,
    finished: AtomicUsize,
}

impl Staging {
    /// Opens what an interrupted run with the same `key` left, or starts over.
    pub(super) fn open(
        target: &Target,
        files: &[OutputFile],
        key: &str,
        resume: bool,
    ) -> Result<Self, StreamError> {
        let folder = target.staging();
        let out = folder.join("out");
        std::fs::create_dir_all(&out).map_err(StreamError::io(&out))?;
        let path = folder.join(JOURNAL);
        let mut journal = lock(&folder)?;
        if resume
            && let Some(claims) = read_journal(&mut journal, key).map_err(StreamError::io(&path))?
            && let Some(files) = reopen(&out, files)
        {
            let finished = AtomicUsize::new(claims.len());
            return Ok(Staging { folder, journal, files, claims, finished });
        }
        // Emptied before anything else changes: no line may speak of files that are about to go.
        journal.set_len(0).and_then(|()| journal.rewind()).map_err(StreamError::io(&path))?;
        std::fs::remove_dir_all(&out).map_err(StreamError::io(&out))?;
        let files = match create(&out, files) {
            Ok(files) => files,
            Err(error) => {
                // Nothing to go on from: the disk is full, or has a limit on the size of files.
                let _ = remove(&folder, journal);
                return Err(error);
            }
        };
        let header = Header { firebrick_journal: JOURNAL_VERSION, key: key.to_owned() };
        let staging =
            Staging { folder, journal, files, claims: HashMap::new(), finished: AtomicUsize::new(0) };
        match staging.append(&header) {
            Ok(()) => Ok(staging),
            Err(error) => {
                staging.discard();
                Err(error)
            }
        }
    }

    /// What the journal says of this part.
    pub(super) fn claim(&self, part: &Part) -> Option<&Claim> {
        self.claims.get(&(part.file, part.offset, part.bytes))
    }

    /// Hash of the bytes that are in the place of this part.
    pub(super) fn hash(&self, part: &Part) -> Result<String, StreamError> {
        let (path, file) = &self.files[part.file];
        let mut buffer = vec![0; super::job::BUFFER.min(part.bytes as usize)];
        let mut hasher = Hasher::new();
        let mut done = 0;
        while done < part.bytes {
            let n = buffer.len().min((part.bytes - done) as usize);
            read_at(file, part.offset + done, &mut buffer[..n]).map_err(StreamError::io(path))?;
            hasher.write(&buffer[..n]);
            done += n as u64;
        }
        Ok(hex(&hasher))
    }

    /// Notes a part whose bytes are in place.
    pub(super) fn finish(&self, claim: &Claim) -> Result<(), StreamError> {
        self.finished.fetch_add(1, Ordering::Relaxed);
        self.append(claim)
    }

    fn append(&self, line: &impl Serialize) -> Result<(), StreamError> {
        let mut text = serde_json::to_vec(line).expect("plain data is JSON");
        text.push(b'\n');
        (&self.journal).write_all(&text).map_err(StreamError::io(&self.folder.join(JOURNAL)))
    }

    /// Writes the small files beside the tensors, in place of those that an interrupted run left.
    pub(super) fn add_files(&self, beside: &[(String, Vec<u8>)]) -> Result<(), StreamError> {
        let out = self.folder.join("out");
        let clear = || {
            for entry in std::fs::read_dir(&out)? {
                let path = entry?.path();
                if self.files.iter().all(|(tensors, _)| *tensors != path) {
                    std::fs::remove_file(&path)?;
                }
            }
            Ok(())
        };
        clear().map_err(StreamError::io(&out))?;
        for (name, bytes) in beside {
            let path = out.join(name);
            let write = || {
                let mut file = File::create(&path)?;
                file.write_all(bytes)?;
                file.sync_all()
            };
            write().map_err(StreamError::io(&path))?;
        }
        Ok(())
    }

    /// How many parts the journal holds.
    pub(super) fn parts(&self) -> usize {
        self.finished.load(Ordering::Relaxed)
    }

    /// Removes the folder.
    pub(super) fn discard(self) {
        let Staging { folder, journal, files, .. } = self;
        drop(files);
        // An error is on its way to the caller already, and a folder that stays is resumed or replaced later.
        let _ = remove(&folder, journal);
    }

    /// Puts the output in place of the target, if that may be replaced still, and removes the staging folder; on an
    /// error it stays.
    pub(super) fn commit(self, target: &Target, overwrite: bool) -> Result<(), StreamError> {
        let Staging { folder, journal, files, .. } = self;
        drop(files);
        let (out, path) = (folder.join("out"), target.path());
        // Computing took its time: somebody may have put something there meanwhile.
        target.check(overwrite)?;
        match target {
            Target::Gguf { .. } => {
                rename(&out.join(target.file_name()), path)?;
                rename(&out.join(provenance::file_name(target)), &target.provenance())?;
            }
            Target::Folder { .. } => {
                sync_folder(&out);
                let old = folder.join("old");
                if path.exists() {
                    if overwrite {
                        rename(path, &old)?;
                    } else {
                        // Fails unless it is empty, whatever was put there since the check.
                        std::fs::remove_dir(path).map_err(StreamError::io(path))?;
                    }
                }
                if let Err(error) = rename(&out, path) {
                    if old.exists() {
                        rename(&old, path)?;
                    }
                    return Err(error);
                }
            }
        }
        sync_folder(target.parent());
        remove(&folder, journal)
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), StreamError> {
    std::fs::rename(from, to).map_err(StreamError::io(to))
}

/// Removes a staging folder whose journal is locked.
fn remove(folder: &Path, journal: File) -> Result<(), StreamError> {
    // Locked until it is gone, or another run could begin in it; elsewhere an open file can't be removed.
    #[cfg(not(unix))]
    drop(journal);
    let removed = std::fs::remove_dir_all(folder).map_err(StreamError::io(folder));
    #[cfg(unix)]
    drop(journal);
    removed
}

/// Cleans up after a run that died while it put its output in place: what is missing of the output follows if the
/// tensors are there, else an old folder is put back.
///
/// # Errors
/// Also when both the old folder and something else in its place exist: one of them is for the user to remove.
pub(super) fn recover(target: &Target) -> Result<(), StreamError> {
    let folder = target.staging();
    if !folder.exists() {
        return Ok(());
    }
    let journal = lock(&folder)?;
    let (out, old, path) = (folder.join("out"), folder.join("old"), target.path());
    match target {
        Target::Gguf { .. } => {
            // Starting over empties the journal before files go: with lines in it, a missing file was moved.
            let began = journal.metadata().is_ok_and(|m| m.len() > 0) && out.exists();
            if !began || out.join(target.file_name()).exists() || !path.exists() {
                return Ok(());
            }
            let provenance = out.join(provenance::file_name(target));
            if provenance.exists() {
                rename(&provenance, &target.provenance())?;
            }
        }
        Target::Folder { .. } => {
            if out.exists() || !path.exists() {
                return match (old.exists(), path.exists()) {
                    (true, true) => Err(StreamError::Exists { path: old }),
                    (true, false) => rename(&old, path),
                    (false, _) => Ok(()),
                };
            }
        }
    }
    remove(&folder, journal)
}

/// Opens the journal, locked against other runs.
fn lock(folder: &Path) -> Result<File, StreamError> {
    let path = folder.join(JOURNAL);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let journal = options.open(&path).map_err(StreamError::io(&path))?;
    match journal.try_lock() {
        Ok(()) if still_at(&journal, &path) => Ok(journal),
        // The other run has just finished and removed it.
        Ok(()) | Err(TryLockError::WouldBlock) => Err(StreamError::Busy { path: folder.to_owned() }),
        Err(TryLockError::Error(source)) => Err(StreamError::Io { path, source }),
    }
}

/// Whether `path` leads to `file` still.
fn still_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |m: &std::fs::Metadata| (m.dev(), m.ino());
        matches!((file.metadata(), std::fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
    }
    #[cfg(not(unix))]
    {
        file.metadata().is_ok() && path.exists()
    }
}

/// The finished parts of the run `key`, and the journal cut behind the last whole line; `None` for another run.
fn read_journal(journal: &mut File, key: &str) -> std::io::Result<Option<Claims>> {
    if journal.metadata()?.len() > MAX_JOURNAL {
        return Ok(None);
    }
    let mut text = Vec::new();
    journal.read_to_end(&mut text)?;
    let mut lines = text.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
    let header = lines.next();
    let same = header
        .and_then(|line| serde_json::from_slice::<Header>(line).ok())
        .is_some_and(|header| header.firebrick_journal == JOURNAL_VERSION && header.key == key);
    if !same {
        return Ok(None);
    }
    let mut claims = Claims::new();
    let mut good = header.map_or(0, <[u8]>::len) as u64;
    for line in lines {
        // Behind the first broken line nothing is trusted.
        let Ok(claim) = serde_json::from_slice::<Claim>(line) else { break };
        good += line.len() as u64;
        claims.insert((claim.file, claim.offset, claim.bytes), claim);
    }
    journal.set_len(good)?;
    journal.seek(SeekFrom::Start(good))?;
    Ok(Some(claims))
}

/// The files of the interrupted run, if all of them are as they were created.
fn reopen(out: &Path, files: &[OutputFile]) -> Option<Vec<(PathBuf, File)>> {
    files
        .iter()
        .map(|OutputFile { name, layout }| {
            let path = out.join(name);
            let file = OpenOptions::new().read(true).write(true).open(&path).ok()?;
            let mut header = vec![0; layout.header().len()];
            let whole = file.metadata().ok()?.len() == layout.file_len();
            (whole && read_at(&file, 0, &mut header).is_ok() && header == layout.header())
                .then_some((path, file))
        })
        .collect()
}

fn create(out: &Path, files: &[OutputFile]) -> Result<Vec<(PathBuf, File)>, StreamError> {
    std::fs::create_dir_all(out).map_err(StreamError::io(out))?;
    files
        .iter()
        .map(|OutputFile { name, layout }| {
            let path = out.join(name);
            let write = || {
                let file =
                    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
                file.set_len(layout.file_len())?;
                write_at(&file, 0, layout.header())?;
                Ok(file)
            };
            let file = write().map_err(StreamError::io(&path))?;
            Ok((path, file))
        })
        .collect()
}
