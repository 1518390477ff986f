//! Runs a plan: workers under a memory budget, one thread that keeps the journal, and the files put in place.

use super::job::{Input, Job, Sink};
use super::plan::{Part, Prepared, prepare};
use super::provenance::{self, FileRecord};
use super::queue::{FileTasks, Queue, Work};
use super::staging::{self, Claim, Staging};
use super::target::Target;
use super::{OutputSpec, StreamError, StreamPlan, Transform};
use crate::block;
use firebrick_core::{Event, Progress, Silent, Task};
use serde::Serialize;
use std::num::NonZero;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc;

/// Runs transformations.
#[derive(Clone, Copy)]
pub struct Executor<'a> {
    /// Most bytes that all workers together may allocate; `None` for no cap. Mapped files do not count: the system
    /// drops their pages when memory is short. The pages of a part are let go when it is finished, so there are at most
    /// 4 Mi elements of each input per thread.
    pub max_memory: Option<u64>,
    /// Worker threads; one per processor if `None`. The output does not depend on it.
    pub threads: Option<usize>,
    /// Bytes of tensors after which a folder gets another shard.
    pub shard_bytes: u64,
    /// Goes on where an interrupted run of the same transformation stopped; else it starts over.
    pub resume: bool,
    /// Replaces an output that exists.
    pub overwrite: bool,
    /// Records the SHA-256 of every source and output file, which costs about as much as reading them once more.
    pub sha256: bool,
    /// Hears of every part, and may end the run between two.
    pub progress: &'a dyn Progress,
}

impl Default for Executor<'_> {
    /// No cap, all processors, shards of 5 GB, resuming, not overwriting, with SHA-256, silent.
    fn default() -> Self {
        Executor {
            max_memory: None,
            threads: None,
            shard_bytes: 5_000_000_000,
            resume: true,
            overwrite: false,
            sha256: true,
            progress: &Silent,
        }
    }
}

/// What a run did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StreamReport {
    /// Where the output is.
    pub path: PathBuf,
    /// The files written, provenance left out.
    pub files: Vec<FileRecord>,
    /// Tensors in the output.
    pub tensors: usize,
    /// Parts computed.
    pub computed_parts: usize,
    /// Parts kept from an interrupted run.
    pub resumed_parts: usize,
    /// Bytes of tensors that were read.
    pub read_bytes: u64,
    /// Bytes of all files that hold tensors.
    pub written_bytes: u64,
    /// The most memory that was in use by the workers at one time, as planned for each part.
    pub peak_memory_bytes: u64,
}

impl Executor<'_> {
    fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, NonZero::get);
        self.threads.unwrap_or_else(all).max(1)
    }

    fn prepare<'t>(
        &self,
        transform: &'t dyn Transform,
        target: &Target,
    ) -> Result<Prepared<'t>, StreamError> {
        prepare(transform, target, self.max_memory, self.threads(), self.shard_bytes)
    }

    /// What [`run`](Executor::run) would do: reads no tensors and writes nothing.
    ///
    /// # Errors
    /// When the transformation does not fit its sources. What else stands against the run is listed in the plan.
    pub fn plan(&self, transform: &dyn Transform, target: &Target) -> Result<StreamPlan, StreamError> {
        let mut plan = self.prepare(transform, target)?.plan;
        if let Err(error) = target.check(self.overwrite) {
            plan.problems.push(error.to_string());
        }
        Ok(plan)
    }

    /// Fails where [`run`](Executor::run) would fail before it computes anything; reads no tensors and writes nothing.
    ///
    /// # Errors
    /// A plan with problems, or an output that exists.
    pub fn check(&self, transform: &dyn Transform, target: &Target) -> Result<(), StreamError> {
        self.possible(transform, target)?;
        target.check(self.overwrite)
    }

    /// What is prepared, unless its plan has problems.
    fn possible<'t>(
        &self,
        transform: &'t dyn Transform,
        target: &Target,
    ) -> Result<Prepared<'t>, StreamError> {
        let prepared = self.prepare(transform, target)?;
        if prepared.plan.problems.is_empty() {
            return Ok(prepared);
        }
        let StreamPlan { transform, problems, .. } = prepared.plan;
        Err(StreamError::Plan { transform, problems })
    }

    /// Names what a run would write: the same for the same settings and layout while the files of the sources are unchanged.
    ///
    /// # Errors
    /// As [`Executor::plan`], and when the plan has problems.
    pub fn key(&self, transform: &dyn Transform, target: &Target) -> Result<String, StreamError> {
        Ok(key(transform, &self.possible(transform, target)?))
    }

    /// Runs `transform` and puts the output in place.
    ///
    /// # Errors
    /// Before anything is computed: a plan with problems, an output that exists, another run on the same output. Later:
    /// the first failure in the order of the output, a cancellation, or an output that came to exist meanwhile. The old
    /// output, if any, is then untouched, and finished parts stay in `.NAME.partial` for the next run.
    pub fn run(&self, transform: &dyn Transform, target: &Target) -> Result<StreamReport, StreamError> {
        let prepared = self.possible(transform, target)?;
        self.progress.check()?;
        staging::recover(target)?;
        target.check(self.overwrite)?;
        let staging = Staging::open(target, &prepared.files, &key(transform, &prepared), self.resume)?;
        let parts = prepared.parts.len();
        match staging.parts() {
            0 => {}
            found => {
                self.progress.on(Event::Note(&format!("going on from {found} of {parts} finished parts")))
            }
        }
        let report = match self.write(transform, target, &prepared, &staging) {
            Ok(report) => report,
            Err(error) => {
                if staging.parts() == 0 {
                    staging.discard();
                }
                return Err(error);
            }
        };
        staging.commit(target, self.overwrite)?;
        Ok(report)
    }

    /// Fills the staging folder.
    fn write(
        &self,
        transform: &dyn Transform,
        target: &Target,
        prepared: &Prepared<'_>,
        staging: &Staging,
    ) -> Result<StreamReport, StreamError> {
        let tasks = FileTasks::new(prepared, self.sha256);
        let outcome = self.work(transform, prepared, staging, &tasks)?;
        let mut files: Vec<FileRecord> = prepared
            .files
            .iter()
            .zip(&outcome.hashes)
            .map(|(f, sha256)| FileRecord {
                name: f.name.clone(),
                bytes: f.layout.file_len(),
                sha256: sha256.clone(),
            })
            .collect();
        let sources = tasks.source_records(&outcome.hashes);
        let beside = provenance::files(transform, target, prepared, sources, &mut files, self.sha256);
        staging.add_files(&beside)?;
        let &StreamPlan { read_bytes, written_bytes, .. } = &prepared.plan;
        Ok(StreamReport {
            path: target.path().to_owned(),
            files,
            tensors: prepared.outputs.len(),
            computed_parts: prepared.parts.len() - outcome.resumed,
            resumed_parts: outcome.resumed,
            read_bytes,
            written_bytes,
            peak_memory_bytes: outcome.peak,
        })
    }

    /// Computes all parts, and finishes each file as soon as nothing more is read from or written to it.
    fn work(
        &self,
        transform: &dyn Transform,
        prepared: &Prepared<'_>,
        staging: &Staging,
        tasks: &FileTasks,
    ) -> Result<Outcome, StreamError> {
        let total = prepared.parts.iter().map(|p| p.bytes).sum::<u64>() + tasks.hashed_bytes();
        let mut bar = Task::begin(self.progress, transform.name(), Some(total), "bytes");
        let queue = Queue::new(&prepared.parts, tasks, self.max_memory.unwrap_or(u64::MAX));
        let mut outcome = Outcome { hashes: vec![None; tasks.list.len()], resumed: 0, peak: 0 };
        let mut failure: Option<(usize, StreamError)> = None;
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..self.threads().min(prepared.parts.len() + tasks.list.len()) {
                let (sender, queue) = (sender.clone(), &queue);
                scope.spawn(move || {
                    while let Some(taken) = queue.take() {
                        let done = match taken.work {
                            Work::Part(i) => Done::Part(i, run_part(transform, prepared, staging, i)),
                            Work::File(i) => Done::File(i, tasks.run(i, prepared, staging)),
                        };
                        if matches!(&done, Done::Part(_, Err(_)) | Done::File(_, Err(_))) {
                            queue.stop();
                        }
                        drop(taken);
                        if sender.send(done).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for done in receiver {
                let (order, name, bytes, result) = match done {
                    Done::Part(i, result) => {
                        let part = &prepared.parts[i];
                        let name = prepared.outputs[part.output].tensor.name.as_str();
                        let result =
                            result.map_err(|error| error.of(name)).and_then(|finished| match finished {
                                Finished::Kept => {
                                    outcome.resumed += 1;
                                    Ok(())
                                }
                                Finished::Computed(claim) => staging.finish(&claim),
                            });
                        (i, name, part.bytes, result)
                    }
                    Done::File(i, result) => {
                        let task = &tasks.list[i];
                        let result = result.map(|hash| outcome.hashes[i] = hash);
                        (prepared.parts.len() + i, task.name.as_str(), task.hashed_bytes, result)
                    }
                };
                let result = match result {
                    Ok(()) => bar.advance(bytes, name).map_err(|cancelled| (usize::MAX, cancelled.into())),
                    Err(error) => Err((order, error)),
                };
                if let Err((order, error)) = result {
                    queue.stop();
                    // Of several failures the first in the order of the output is told, whichever came first.
                    if failure.as_ref().is_none_or(|(first, _)| order < *first) {
                        failure = Some((order, error));
                    }
                }
            }
        });
        outcome.peak = queue.peak();
        failure.map_or(Ok(outcome), |(_, error)| Err(error))
    }
}

struct Outcome {
    /// SHA-256 by file task: the output's files first.
    hashes: Vec<Option<String>>,
    resumed: usize,
    peak: u64,
}

enum Done {
    Part(usize, Result<Finished, StreamError>),
    File(usize, Result<Option<String>, StreamError>),
}

enum Finished {
    Kept,
    Computed(Claim),
}

/// Everything that decides the bytes. Files stand for their contents as long as they are unchanged: to read them all once more takes a
/// tenth of a merge.
fn key(transform: &dyn Transform, prepared: &Prepared<'_>) -> String {
    let outputs: Vec<_> = prepared
        .outputs
        .iter()
        .zip(&prepared.inputs)
        .map(|(OutputSpec { tensor, split, .. }, inputs)| {
            let reads: Vec<_> =
                inputs.iter().map(|i| (i.source, &i.info.name, i.info.dtype, &i.info.shape)).collect();
            serde_json::json!([tensor.name, tensor.dtype, tensor.shape, split, reads])
        })
        .collect();
    let files: Vec<_> = prepared
        .files
        .iter()
        .map(|f| (&f.name, f.layout.file_len(), blake3::hash(f.layout.header()).to_hex().to_string()))
        .collect();
    let sources: Vec<Vec<String>> = prepared
        .sources
        .iter()
        .map(|s| (0..s.checkpoint.files().len()).map(|file| s.checkpoint.file_identity(file)).collect())
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    let all = serde_json::json!([version, transform.name(), transform.settings(), sources, outputs, files]);
    blake3::hash(all.to_string().as_bytes()).to_hex().to_string()
}

/// The bytes of an input that a part is computed from.
fn bytes_read(spec: &OutputSpec, part: &Part, input: &Input<'_>) -> Range<usize> {
    let dtype = input.info.dtype;
    let same = spec.split.is_some() && block::elements(&spec.tensor.shape) == Some(input.info.elements());
    match (dtype.bytes_for(part.range.start), dtype.bytes_for(part.range.end)) {
        (Some(start), Some(end)) if same => start..end,
        _ => 0..input.bytes.len(),
    }
}

/// Keeps part `i` if an interrupted run finished it, else computes it.
fn run_part(
    transform: &dyn Transform,
    prepared: &Prepared<'_>,
    staging: &Staging,
    i: usize,
) -> Result<Finished, StreamError> {
    let part = &prepared.parts[i];
    let (spec, inputs) = (&prepared.outputs[part.output], &prepared.inputs[part.output]);
    if let Some(claim) = staging.claim(part)
        && staging.hash(part)? == claim.output
    {
        return Ok(Finished::Kept);
    }
    let (path, file) = &staging.files[part.file];
    let mut job = Job {
        index: part.output,
        spec,
        range: part.range.clone(),
        inputs,
        chunk: part.chunk,
        sink: Sink::new(file, path, part.offset, part.bytes),
    };
    transform.compute(&mut job)?;
    for input in inputs {
        let (range, offset) = (bytes_read(spec, part, input), input.info.offset as usize);
        input.checkpoint.release(input.info.file, offset + range.start..offset + range.end);
    }
    let hash = job.sink.finish()?;
    Ok(Finished::Computed(Claim::new(&spec.tensor.name, part, hash)))
}
