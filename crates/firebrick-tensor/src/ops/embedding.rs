//! Rows of an embedding, with a gradient that is made in one pass: of a matrix of the vocabulary's size each pass counts.

use burn::backend::backend_extension;
use burn::tensor::{Int, Tensor};
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn_backend::{
    Backend, Shape, TensorMetadata,
    ops::FloatTensorOps,
    tensor::{FloatTensor, IndexingUpdateOp, IntTensor},
};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};

use super::cpu;
use super::cross_entropy::indices;

/// The rows of `weight` that `ids` name.
///
/// - weight: `[vocab, d]`; on the CPU it may be stored in bf16
/// - ids: `[n]`, each in `0..vocab`
/// - result: `[n, d]`, f32
pub fn embedding(weight: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    let (weight, ids) = (weight.into_dispatch(), ids.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as EmbeddingOps>::embedding_rows(weight, ids))
}

/// Embeddings on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait EmbeddingOps: Backend {
    /// See [`embedding`].
    #[fusion(default)]
    fn embedding_rows(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        Self::float_select(weight, 0, ids)
    }

    /// Gradient of the weight `[vocab, d]` by that of the rows, `[n, d]`.
    #[fusion(default)]
    fn embedding_rows_backward(
        grad: FloatTensor<Self>,
        ids: IntTensor<Self>,
        vocab: usize,
    ) -> FloatTensor<Self> {
        composed_backward::<Self>(grad, ids, vocab)
    }
}

fn composed_backward<B: Backend>(grad: FloatTensor<B>, ids: IntTensor<B>, vocab: usize) -> FloatTensor<B> {
    let zeros = B::float_zeros(Shape::new([vocab, grad.shape()[1]]), &grad.device(), grad.dtype().into());
    B::float_select_assign(zeros, 0, ids, grad, IndexingUpdateOp::Add)
}

#[cfg(feature = "cubecl-backend")]
impl EmbeddingOps for CubeBackend {}

impl EmbeddingOps for Flex {
    fn embedding_rows(weight: FlexTensor, ids: FlexTensor) -> FlexTensor {
        cpu::widened(<Self as FloatTensorOps<Self>>::float_select(weight, 0, ids))
    }

    fn embedding_rows_backward(grad: FlexTensor, ids: FlexTensor, vocab: usize) -> FlexTensor {
        /// Values that a task makes zero.
        const TASK: usize = 1 << 20;
        let d = grad.shape()[1];
        let (true, Some(rows)) = (cpu::all_f32(&[&grad]) && vocab * d > 0, indices(&ids, vocab)) else {
            return composed_backward::<Self>(grad, ids, vocab);
        };
        let grad = cpu::contiguous(grad);
        let mut out = cpu::fresh(vocab * d, TASK, |_, _| {});
        for (grad, row) in grad.storage::<f32>().chunks_exact(d).zip(rows) {
            for (sum, slope) in out[row * d..][..d].iter_mut().zip(grad) {
                *sum += slope;
            }
        }
        cpu::tensor(out, Shape::new([vocab, d]))
    }
}

impl<B: Backend + EmbeddingOps, C: CheckpointStrategy> EmbeddingOps for Autodiff<B, C> {
    fn embedding_rows(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Embedding;

        impl<B: Backend + EmbeddingOps> Backward<B, 1> for Embedding {
            type State = (IntTensor<B>, usize);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let (ids, vocab) = ops.state;
                unary::<B, _>(ops.parents, ops.node, grads, |grad| {
                    B::embedding_rows_backward(grad, ids, vocab)
                });
            }
        }

        let (weight, node) = weight.into_parts();
        let vocab = weight.shape()[0];
        let rows = B::embedding_rows(weight, ids.clone());
        match Embedding.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((ids, vocab), rows),
            OpsKind::UnTracked(prep) => prep.finish(rows),
        }
    }
}
