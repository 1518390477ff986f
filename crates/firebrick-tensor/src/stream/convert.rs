//! Copies a checkpoint: a selection of its tensors, renamed, in other types or another file format.

use super::{Job, OutputSpec, Source, StreamError, Transform};
use crate::checkpoint::{Checkpoint, TensorSpec};

/// Copies tensors of a checkpoint, bit for bit where the type stays the same.
///
/// Conversion goes through f32 and rounds to nearest even; integers only stay as they are.
#[derive(Clone, Debug)]
pub struct Convert<'a> {
    /// Name of the source in the model card.
    pub name: String,
    /// The checkpoint to read.
    pub checkpoint: &'a Checkpoint,
    /// What to write, and the tensor to read for it. Shapes may differ as long as the elements agree.
    pub outputs: Vec<(TensorSpec, String)>,
}

impl<'a> Convert<'a> {
    /// Copies every tensor as it is; change [`outputs`](Convert::outputs) to rename, drop or convert.
    pub fn copy(name: impl Into<String>, checkpoint: &'a Checkpoint) -> Self {
        let outputs = checkpoint.tensors().iter().map(|t| (t.spec(), t.name.clone())).collect();
        Convert { name: name.into(), checkpoint, outputs }
    }
}

impl Transform for Convert<'_> {
    fn name(&self) -> &str {
        "convert"
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { name: self.name.clone(), checkpoint: self.checkpoint }]
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let spec =
            |(to, from): &(TensorSpec, String)| OutputSpec::elementwise(to.clone(), vec![(0, from.clone())]);
        Ok(self.outputs.iter().map(spec).collect())
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        job.copy()
    }
}
