//! The streaming executor: runs a [`Transform`] over checkpoints, tensor by tensor, in bounded memory.
//!
//! A transformation declares its [outputs](OutputSpec) and computes one [`Job`] at a time; the [`Executor`] plans the
//! run, cuts large outputs into parts, computes them on several threads under a memory cap, writes each part straight
//! to its place in the output, and can go on where an interrupted run stopped. The bytes of the output do not depend
//! on the number of threads, the cap, or interruptions.
//!
//! Parts are written to `.NAME.partial` beside the output with a journal of content hashes, and the whole is renamed
//! into place at the end. Beside the tensors it leaves `firebrick.json`, which says what the output was made from.
//!
//! ```
//! use firebrick_tensor::block::DType;
//! use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_safetensors};
//! use firebrick_tensor::stream::{Convert, Executor, Target};
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.safetensors");
//! # let spec = TensorSpec::new("norm.weight", DType::BF16, [2]);
//! # write_safetensors(&path, &Default::default(), &[(spec, [0x80, 0x3f, 0x00, 0x40])])?;
//! let source = Checkpoint::open(&path)?;
//! let mut convert = Convert::copy("small model", &source);
//! convert.outputs.iter_mut().for_each(|(spec, _)| spec.dtype = DType::F32);
//! let target = Target::folder(folder.path().join("wide"));
//! let executor = Executor { max_memory: Some(64 << 20), ..Executor::default() };
//! println!("{}", executor.plan(&convert, &target)?);
//! executor.run(&convert, &target)?;
//! assert_eq!(Checkpoint::open(folder.path().join("wide"))?.read_f32("norm.weight")?, [1.0, 2.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod convert;
mod error;
mod job;
mod plan;
mod positioned;
mod provenance;
mod queue;
mod run;
mod staging;
mod target;

pub use convert::Convert;
pub use error::StreamError;
pub use job::{Input, Job};
pub use plan::{PlannedOutput, StreamPlan};
pub use provenance::{FileRecord, PROVENANCE_FILE};
pub use run::{Executor, StreamReport};
pub use target::Target;

use crate::checkpoint::{Checkpoint, TensorSpec};

/// A checkpoint that a transformation reads.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// What the model card calls it: a repository or a folder name. Of an absolute path only the last part is kept.
    pub name: String,
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
}

/// One tensor that a transformation writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputSpec {
    /// Name, type and shape.
    pub tensor: TensorSpec,
    /// What it is computed from: position in [`Transform::sources`], and tensor name. Nothing else may be read.
    pub reads: Vec<(usize, String)>,
    /// `Some(n)` when any range of a multiple of `n` elements can be computed alone, from all of the inputs with
    /// another number of elements and from the same range of those with as many: 1 for element-wise work, the row
    /// length for row-wise work. Such an output is cut into parts for several threads. `None` computes it whole.
    pub split: Option<usize>,
    /// Bytes that computing it allocates at most, beside the buffers of [`Job`].
    pub scratch_bytes: u64,
}

impl OutputSpec {
    /// Element-wise work without memory of its own.
    pub fn elementwise(tensor: TensorSpec, reads: Vec<(usize, String)>) -> Self {
        OutputSpec { tensor, reads, split: Some(1), scratch_bytes: 0 }
    }

    /// A tensor computed in one piece that allocates `scratch_bytes` at most.
    pub fn whole(tensor: TensorSpec, reads: Vec<(usize, String)>, scratch_bytes: u64) -> Self {
        OutputSpec { tensor, reads, split: None, scratch_bytes }
    }
}

/// What a transformation adds to the model card of its output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Card {
    /// Tags of the front matter.
    pub tags: Vec<String>,
    /// Further lines of the front matter (YAML).
    pub front_matter: Vec<String>,
    /// Markdown behind the sources, in place of the settings; empty for the settings.
    pub text: String,
}

/// A transformation of checkpoints: merge, quantize, convert, rotate, drop, ...
pub trait Transform: Sync {
    /// What is done, in a word or two: `merge ties`, `quantize gptq`.
    fn name(&self) -> &str;

    /// The checkpoints that are read.
    fn sources(&self) -> Vec<Source<'_>>;

    /// Every tensor to write, in the order of the output.
    ///
    /// # Errors
    /// When the sources do not fit the settings; should list every problem.
    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError>;

    /// Everything beside the sources that changes the bytes, seeds included: a run that was interrupted goes on only
    /// under equal settings. Written to the output, so without paths or secrets.
    fn settings(&self) -> serde_json::Value;

    /// What the model card says beside the sources.
    fn card(&self) -> Card {
        Card::default()
    }

    /// Computes the elements [`Job::range`] of one output and writes them in order, a function of nothing but the
    /// settings and the declared inputs. Called from several threads, in any order.
    ///
    /// # Errors
    /// When the output can't be computed; the run ends with the name of the output.
    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError>;
}
