//! What the workers do next: parts in order, as far as the memory budget allows, and files that are done with.

use super::StreamError;
use super::plan::{Part, Prepared};
use super::positioned::read_at;
use super::provenance::FileRecord;
use super::staging::Staging;
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Memory of a worker that hashes a file.
pub(super) const HASH_BUFFER: usize = 64 << 10;
/// Mapped bytes hashed before their pages are let go.
const RELEASE: usize = 8 << 20;

/// A file to be hashed, and to reach the disk if it is part of the output.
pub(super) struct FileTask {
    pub(super) name: String,
    place: Place,
    /// Bytes that will be hashed.
    pub(super) hashed_bytes: u64,
}

#[derive(Clone, Copy)]
enum Place {
    Output(usize),
    /// Position of the source, and of the file in it.
    Source(usize, usize),
}

/// All files that are read or written; each is hashed when the last part that touches it is finished, while its pages
/// are likely still in memory.
pub(super) struct FileTasks {
    /// The output's files first.
    pub(super) list: Vec<FileTask>,
    /// By output tensor: the files that computing it touches.
    touched: Vec<Vec<usize>>,
    /// By source: its files, and the task that hashes each.
    sources: Vec<Vec<(FileRecord, Option<usize>)>>,
    sha256: bool,
}

impl FileTasks {
    pub(super) fn new(prepared: &Prepared<'_>, sha256: bool) -> Self {
        let mut list: Vec<FileTask> = Vec::new();
        for (i, file) in prepared.files.iter().enumerate() {
            let hashed_bytes = if sha256 { file.layout.file_len() } else { 0 };
            list.push(FileTask { name: file.name.clone(), place: Place::Output(i), hashed_bytes });
        }
        // Two sources may be the same files.
        let mut by_path: HashMap<&Path, usize> = HashMap::new();
        let mut sources = Vec::new();
        for (i, source) in prepared.sources.iter().enumerate() {
            let mut records = Vec::new();
            for (j, path) in source.checkpoint.files().iter().enumerate() {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let bytes = source.checkpoint.file_bytes(j).len() as u64;
                let task = sha256.then(|| {
                    *by_path.entry(path).or_insert_with(|| {
                        let (name, place) = (name.clone(), Place::Source(i, j));
                        list.push(FileTask { name, place, hashed_bytes: bytes });
                        list.len() - 1
                    })
                });
                records.push((FileRecord { name, bytes, sha256: None }, task));
            }
            sources.push(records);
        }
        let mut touched: Vec<Vec<usize>> = prepared
            .inputs
            .iter()
            .map(|inputs| inputs.iter().filter_map(|i| sources[i.source][i.info.file].1).collect())
            .collect();
        for part in &prepared.parts {
            touched[part.output].push(part.file);
        }
        for files in &mut touched {
            files.sort_unstable();
            files.dedup();
        }
        FileTasks { list, touched, sources, sha256 }
    }

    pub(super) fn hashed_bytes(&self) -> u64 {
        self.list.iter().map(|task| task.hashed_bytes).sum()
    }

    /// Hashes file `i`; a file of the output is also made to reach the disk.
    pub(super) fn run(
        &self,
        i: usize,
        prepared: &Prepared<'_>,
        staging: &Staging,
    ) -> Result<Option<String>, StreamError> {
        match self.list[i].place {
            Place::Output(i) => {
                let (path, file) = &staging.files[i];
                let len = prepared.files[i].layout.file_len();
                if !self.sha256 {
                    return file.sync_all().map(|()| None).map_err(StreamError::io(path));
                }
                // Waiting for the disk takes no processor.
                std::thread::scope(|scope| {
                    let synced = scope.spawn(|| file.sync_all());
                    let hash = sha256(path, file, len);
                    let synced = synced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    synced.map_err(StreamError::io(path))?;
                    hash.map(Some)
                })
            }
            Place::Source(i, j) => {
                let checkpoint = prepared.sources[i].checkpoint;
                let bytes = checkpoint.file_bytes(j);
                let mut hasher = Sha256::new();
                for start in (0..bytes.len()).step_by(RELEASE) {
                    let range = start..bytes.len().min(start + RELEASE);
                    hasher.update(&bytes[range.clone()]);
                    checkpoint.release(j, range);
                }
                Ok(Some(format!("{:x}", hasher.finalize())))
            }
        }
    }

    /// The files of each source with the hashes found, by file task.
    pub(super) fn source_records(&self, hashes: &[Option<String>]) -> Vec<Vec<FileRecord>> {
        let record = |(record, task): &(FileRecord, Option<usize>)| FileRecord {
            sha256: task.and_then(|task| hashes[task].clone()),
            ..record.clone()
        };
        self.sources.iter().map(|files| files.iter().map(record).collect()).collect()
    }
}

fn sha256(path: &Path, file: &File, len: u64) -> Result<String, StreamError> {
    let mut buffer = vec![0; HASH_BUFFER];
    let mut hasher = Sha256::new();
    let mut done = 0;
    while done < len {
        let n = (HASH_BUFFER as u64).min(len - done) as usize;
        read_at(file, done, &mut buffer[..n]).map_err(StreamError::io(path))?;
        hasher.update(&buffer[..n]);
        done += n as u64;
    }
    Ok(format!("{:x}", hasher.finalize()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Part(usize),
    File(usize),
}

/// Hands out work while the memory of all work in flight stays within the cap.
pub(super) struct Queue<'a> {
    parts: &'a [Part],
    tasks: &'a FileTasks,
    cap: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    next: usize,
    busy: usize,
    in_flight: u64,
    peak: u64,
    /// By file task: parts that still touch it.
    pending: Vec<usize>,
    ready: BTreeSet<usize>,
    stopped: bool,
}

impl<'a> Queue<'a> {
    pub(super) fn new(parts: &'a [Part], tasks: &'a FileTasks, cap: u64) -> Self {
        let mut pending = vec![0; tasks.list.len()];
        for part in parts {
            tasks.touched[part.output].iter().for_each(|&task| pending[task] += 1);
        }
        let ready = (0..pending.len()).filter(|&task| pending[task] == 0).collect();
        let state = State { next: 0, busy: 0, in_flight: 0, peak: 0, pending, ready, stopped: false };
        Queue { parts, tasks, cap, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece of work, as soon as its memory is free; `None` when there is none left or the run was stopped.
    pub(super) fn take(&self) -> Option<Taken<'_, 'a>> {
        let mut state = self.lock();
        loop {
            // The output's files first: the disk then works while sources are hashed.
            let next = match state.ready.first() {
                _ if state.stopped => return None,
                Some(&task) => Some((Work::File(task), HASH_BUFFER as u64)),
                None => self.parts.get(state.next).map(|part| (Work::Part(state.next), part.cost)),
            };
            match next {
                None if state.busy == 0 => return None,
                // One alone may always run: the plan has made sure that each part fits.
                Some((work, cost)) if state.busy == 0 || state.in_flight.saturating_add(cost) <= self.cap => {
                    match work {
                        Work::Part(_) => state.next += 1,
                        Work::File(_) => _ = state.ready.pop_first(),
                    }
                    state.busy += 1;
                    state.in_flight = state.in_flight.saturating_add(cost);
                    state.peak = state.peak.max(state.in_flight);
                    return Some(Taken { queue: self, work, cost });
                }
                // Work that ends frees memory, and may be the last on a file.
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Hands out nothing more.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// The most memory that was in flight.
    pub(super) fn peak(&self) -> u64 {
        self.lock().peak
    }
}

/// A piece of work in flight; gives its memory back when dropped.
pub(super) struct Taken<'q, 'a> {
    queue: &'q Queue<'a>,
    pub(super) work: Work,
    cost: u64,
}

impl Drop for Taken<'_, '_> {
    fn drop(&mut self) {
        let mut guard = self.queue.lock();
        let state = &mut *guard;
        state.busy -= 1;
        state.in_flight -= self.cost;
        // A worker that panics must not leave the others waiting for work that never comes.
        state.stopped |= std::thread::panicking();
        if let Work::Part(i) = self.work {
            for &task in &self.queue.tasks.touched[self.queue.parts[i].output] {
                state.pending[task] -= 1;
                if state.pending[task] == 0 {
                    state.ready.insert(task);
                }
            }
        }
        drop(guard);
        self.queue.changed.notify_all();
    }
}
