//! The plan of a run: what is read, computed and written, and whether it fits.

use super::job::{BUFFER, CHUNK, Input};
use super::queue::HASH_BUFFER;
use super::target::{OutputFile, Target, places};
use super::{OutputSpec, Source, StreamError, Transform};
use crate::block::{self, DType};
use crate::checkpoint::TensorSpec;
use serde::Serialize;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// Elements of the parts that a large output is cut into.
const PART: usize = 4 << 20;

/// One output in a [`StreamPlan`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlannedOutput {
    /// Name of the tensor.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Size in bytes.
    pub bytes: u64,
    /// Name of the file that will hold it.
    pub file: String,
    /// Memory that computing one part of it takes, in bytes.
    pub memory_bytes: u64,
}

/// What a run will do; [`Display`](fmt::Display) is the summary for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamPlan {
    /// [`Transform::name`].
    pub transform: String,
    /// Every tensor, in the order of the output.
    pub outputs: Vec<PlannedOutput>,
    /// Files that hold tensors.
    pub files: Vec<String>,
    /// Independent pieces of work.
    pub parts: usize,
    /// Worker threads.
    pub threads: usize,
    /// Bytes of all tensors that are read, counted once for every output that reads them.
    pub read_bytes: u64,
    /// Bytes of all files that hold tensors.
    pub written_bytes: u64,
    /// Predicted peak of the memory allocated by the workers; mapped files, which the system can drop, not counted.
    pub peak_memory_bytes: u64,
    /// The cap on it.
    pub max_memory_bytes: Option<u64>,
    /// Free disk space needed: the new files lie beside the old ones until they are complete.
    pub disk_bytes: u64,
    /// Tensors of the sources that no output reads: name of the source, name of the tensor.
    pub unread: Vec<(String, String)>,
    /// Why the run can't be done; empty if it can.
    pub problems: Vec<String>,
}

impl fmt::Display for StreamPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StreamPlan { transform, outputs, files, parts, threads, .. } = self;
        let s = |n: usize| if n == 1 { "" } else { "s" };
        let (tensors, count) = (outputs.len(), files.len());
        writeln!(
            f,
            "{transform}: {tensors} tensor{} in {count} file{}, {parts} part{} on {threads} thread{}",
            s(tensors),
            s(count),
            s(*parts),
            s(*threads)
        )?;
        writeln!(f, "  read    {}", bytes(self.read_bytes))?;
        writeln!(f, "  write   {}", bytes(self.written_bytes))?;
        write!(f, "  memory  {} at most", bytes(self.peak_memory_bytes))?;
        match self.max_memory_bytes {
            Some(cap) => writeln!(f, " (cap {})", bytes(cap))?,
            None => writeln!(f)?,
        }
        write!(f, "  disk    {} free space needed", bytes(self.disk_bytes))?;
        if !self.unread.is_empty() {
            let shown: Vec<&str> = self.unread.iter().take(8).map(|(_, name)| name.as_str()).collect();
            let more = if self.unread.len() > shown.len() { ", ..." } else { "" };
            write!(
                f,
                "\n  unread  {} tensors of the sources: {}{more}",
                self.unread.len(),
                shown.join(", ")
            )?;
        }
        self.problems.iter().try_for_each(|problem| write!(f, "\n  problem {problem}"))
    }
}

/// A size in decimal units, as disks and file managers count.
fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A part of an output: the unit that is computed, journaled and resumed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) output: usize,
    pub(super) range: Range<usize>,
    pub(super) file: usize,
    /// Where its bytes go in that file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Elements per chunk.
    pub(super) chunk: usize,
    /// Memory it takes.
    pub(super) cost: u64,
}

/// Everything that is known before the first tensor is computed.
pub(super) struct Prepared<'a> {
    pub(super) sources: Vec<Source<'a>>,
    pub(super) outputs: Vec<OutputSpec>,
    /// By output.
    pub(super) inputs: Vec<Vec<Input<'a>>>,
    pub(super) files: Vec<OutputFile>,
    pub(super) parts: Vec<Part>,
    pub(super) plan: StreamPlan,
}

/// Plans a run; problems are listed in the plan.
pub(super) fn prepare<'a>(
    transform: &'a dyn Transform,
    target: &Target,
    max_memory: Option<u64>,
    threads: usize,
    shard_bytes: u64,
) -> Result<Prepared<'a>, StreamError> {
    let sources = transform.sources();
    let outputs = transform.outputs()?;
    let mut problems = Vec::new();
    let mut read = HashSet::new();
    let mut inputs = Vec::with_capacity(outputs.len());
    for output in &outputs {
        let mut declared = Vec::with_capacity(output.reads.len());
        for (source, name) in &output.reads {
            match sources.get(*source).map(|s| (s, s.checkpoint.get(name))) {
                Some((Source { checkpoint, .. }, Some(info))) => {
                    read.insert((*source, name.as_str()));
                    let bytes = checkpoint.bytes(name)?;
                    declared.push(Input { source: *source, info, bytes, checkpoint });
                }
                Some((source, None)) => problems
                    .push(format!("`{}` reads `{name}`, which {} lacks", output.tensor.name, source.name)),
                None => problems.push(format!(
                    "`{}` reads from source {source}, there are {}",
                    output.tensor.name,
                    sources.len()
                )),
            }
        }
        if output.split == Some(0) {
            problems.push(format!("`{}` can't be split into parts of 0 elements", output.tensor.name));
        }
        inputs.push(declared);
    }
    let mut seen = HashSet::new();
    problems.extend(
        outputs
            .iter()
            .filter(|o| !seen.insert(&o.tensor.name))
            .map(|o| format!("two tensors are named `{}`", o.tensor.name)),
    );
    if outputs.is_empty() {
        problems.push("there is nothing to write".into());
    }

    let specs: Vec<TensorSpec> = outputs.iter().map(|o| o.tensor.clone()).collect();
    let files = target.files(&specs, shard_bytes, &mut problems);
    problems.sort_unstable();
    problems.dedup();
    let mut parts = Vec::new();
    let mut planned = Vec::new();
    // Without a layout of every tensor there are no places, and the problems say why.
    if problems.is_empty() {
        let places = places(&files);
        for (i, output) in outputs.iter().enumerate() {
            let (file, info) = places[output.tensor.name.as_str()];
            let TensorSpec { name, dtype, shape } = output.tensor.clone();
            let cut = cut(i, output, &inputs[i], file, info.offset);
            let memory_bytes = cut.iter().map(|p| p.cost).max().unwrap_or(0);
            if max_memory.is_some_and(|cap| memory_bytes > cap) {
                problems.push(format!("`{name}` needs {} of memory, more than the cap", bytes(memory_bytes)));
            }
            let file = files[file].name.clone();
            planned.push(PlannedOutput { name, dtype, shape, bytes: info.len as u64, file, memory_bytes });
            parts.extend(cut);
        }
    }
    // Files are hashed beside the last parts.
    let hashed = files.len() + sources.iter().map(|s| s.checkpoint.files().len()).sum::<usize>();
    let mut costs: Vec<u64> = parts.iter().map(|p| p.cost).collect();
    costs.extend(std::iter::repeat_n(HASH_BUFFER as u64, hashed));
    costs.sort_unstable_by_key(|&cost| std::cmp::Reverse(cost));
    let together = costs.iter().take(threads).fold(0u64, |sum, cost| sum.saturating_add(*cost));
    let written_bytes = files.iter().map(|f| f.layout.file_len()).sum();
    let plan = StreamPlan {
        transform: transform.name().to_owned(),
        outputs: planned,
        files: files.iter().map(|f| f.name.clone()).collect(),
        parts: parts.len(),
        threads,
        read_bytes: inputs.iter().flatten().map(|input| input.bytes.len() as u64).sum(),
        written_bytes,
        peak_memory_bytes: together.min(max_memory.unwrap_or(u64::MAX)),
        max_memory_bytes: max_memory,
        disk_bytes: written_bytes,
        unread: sources
            .iter()
            .enumerate()
            .flat_map(|(i, s)| s.checkpoint.tensors().iter().map(move |t| (i, s, t)))
            .filter(|(i, _, t)| !read.contains(&(*i, t.name.as_str())))
            .map(|(_, s, t)| (s.name.clone(), t.name.clone()))
            .collect(),
        problems,
    };
    Ok(Prepared { sources, outputs, inputs, files, parts, plan })
}

/// Cuts one output into parts.
fn cut(output: usize, spec: &OutputSpec, inputs: &[Input<'_>], file: usize, offset: u64) -> Vec<Part> {
    let dtype = spec.tensor.dtype;
    let elements = block::elements(&spec.tensor.shape).unwrap_or(0);
    let blocks = inputs.iter().fold(dtype.block_len(), |n, input| lcm(n, input.info.dtype.block_len()));
    let unit = lcm(blocks, spec.split.unwrap_or(1)).min(elements.max(1));
    let rounded = |n: usize| n.max(unit) / unit * unit;
    let (chunk, step) = (rounded(CHUNK), if spec.split.is_some() { rounded(PART) } else { elements.max(1) });
    (0..elements)
        .step_by(step)
        .map(|start| {
            let range = start..elements.min(start.saturating_add(step));
            let byte = |element| dtype.bytes_for(element).unwrap_or(0) as u64;
            let bytes = byte(range.end) - byte(start);
            let buffers = (chunk.min(range.len()) * (inputs.len() + 1) * size_of::<f32>()) as u64;
            let cost = (bytes.min(BUFFER as u64) + buffers).saturating_add(spec.scratch_bytes);
            Part { output, range, file, offset: offset + byte(start), bytes, chunk, cost }
        })
        .collect()
}

/// Least common multiple; saturates, which means one part.
fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x.max(1)).saturating_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_tile_the_tensor_in_whole_blocks_and_rows() {
        for (dtype, shape, split) in [
            (DType::F32, vec![3 * PART + 17], Some(1)),
            (DType::Q8_0, vec![2, 3 * (PART / 32) * 32], Some(1)),
            (DType::BF16, vec![999, 10_007], Some(10_007)),
            (DType::Q4_0, vec![300, 96 * 400], Some(96 * 400)),
            (DType::F16, vec![5, 7], None),
            (DType::BF16, vec![2 * PART], None),
            (DType::F32, vec![0, 4], Some(1)),
        ] {
            let elements: usize = shape.iter().product();
            let tensor = TensorSpec::new("t", dtype, shape);
            let spec = OutputSpec { tensor, reads: Vec::new(), split, scratch_bytes: 0 };
            let parts = cut(0, &spec, &[], 0, 100);
            let (mut element, mut offset) = (0, 100);
            for part in &parts {
                assert_eq!((part.range.start, part.offset), (element, offset));
                assert_eq!(part.bytes, dtype.bytes_for(part.range.len()).unwrap() as u64);
                (element, offset) = (part.range.end, offset + part.bytes);
                let unit = split.unwrap_or(1);
                assert!(
                    part.range.start.is_multiple_of(unit) && part.chunk.is_multiple_of(dtype.block_len())
                );
                assert!(split.is_none() || part.range.len() <= PART.max(unit));
            }
            assert_eq!(element, elements);
            assert!(split.is_some() || parts.len() == 1);
        }
    }

    #[test]
    fn least_common_multiples() {
        assert_eq!((lcm(4, 6), lcm(1, 256), lcm(32, 256), lcm(576, 32)), (12, 256, 256, 576));
        assert_eq!(lcm(usize::MAX, usize::MAX - 1), usize::MAX);
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!([bytes(999), bytes(1000), bytes(269_060_552)], ["999 B", "1.0 kB", "269.1 MB"]);
        assert_eq!((bytes(999_960), bytes(u64::MAX)), ("1.0 MB".into(), "18446744.1 TB".into()));
    }
}
