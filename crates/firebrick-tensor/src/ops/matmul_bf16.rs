//! Matrix products in bf16 with f32 sums, between f32 tensors: the compute mode of mixed-precision training.
//!
//! Weights, activations and gradients stay f32; the operands of a product are rounded to bf16 as they are packed for it. It pays
//! where the processor multiplies bf16 faster than f32 (AMX, AVX512-BF16), and is done there alone: elsewhere products are f32.

use burn::backend::backend_extension;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};

use super::cpu;
use super::gemm_bf16::{Level, Operand, gemm_bf16};
use super::linear::FEW_ROWS;

/// How the large products of a model are computed. What is stored is f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In f32.
    #[default]
    F32,
    /// Of operands rounded to bf16, with f32 sums, backwards too, where [`Precision::available`]; otherwise as `F32`.
    Bf16,
}

impl Precision {
    /// Whether this processor multiplies bf16 numbers (AMX, AVX512-BF16). Products on GPUs are those of f32.
    pub fn available(self) -> bool {
        self == Precision::F32 || Level::best() != Level::Portable
    }

    /// Whether a product of so many rows is to be computed in bf16: with a few of them, reading the weights is all the work.
    pub(super) fn is_bf16(self, rows: usize) -> bool {
        self == Precision::Bf16 && rows >= FEW_ROWS && self.available()
    }

    /// `lhs rhs` of two matrices.
    pub(super) fn matmul<B: MatmulBf16Ops>(self, lhs: FloatTensor<B>, rhs: FloatTensor<B>) -> FloatTensor<B> {
        if self.is_bf16(lhs.shape()[0]) { B::matmul_bf16(lhs, rhs) } else { B::float_matmul(lhs, rhs) }
    }
}

/// bf16 products on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait MatmulBf16Ops: Backend {
    /// `lhs rhs` of two matrices, with sums in f32.
    #[fusion(default)]
    fn matmul_bf16(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(lhs, rhs)
    }

    /// `sum + lhs rhs`; in place where `sum` is held once.
    #[fusion(default)]
    fn matmul_bf16_add(
        sum: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::float_add(sum, Self::matmul_bf16(lhs, rhs))
    }
}

#[cfg(feature = "cubecl-backend")]
impl MatmulBf16Ops for CubeBackend {}

impl MatmulBf16Ops for Flex {
    fn matmul_bf16(lhs: FlexTensor, rhs: FlexTensor) -> FlexTensor {
        if Level::best() == Level::Portable || !cpu::all_f32(&[&lhs, &rhs]) {
            return <Self as FloatTensorOps<Self>>::float_matmul(lhs, rhs);
        }
        let (rows, columns) = (lhs.shape()[0], rhs.shape()[1]);
        let (lhs, rhs) = (readable(lhs), readable(rhs));
        let mut out = vec![0.0; rows * columns];
        gemm_bf16(&mut out, false, lines(&lhs, 0), lines(&rhs, 1), Level::best());
        cpu::tensor(out, Shape::new([rows, columns]))
    }

    fn matmul_bf16_add(sum: FlexTensor, lhs: FlexTensor, rhs: FlexTensor) -> FlexTensor {
        if Level::best() == Level::Portable || !cpu::all_f32(&[&sum, &lhs, &rhs]) {
            return Self::float_add(sum, <Self as FloatTensorOps<Self>>::float_matmul(lhs, rhs));
        }
        let (lhs, rhs) = (readable(lhs), readable(rhs));
        cpu::reuse(cpu::contiguous(sum), |source, out| {
            if let Some(source) = source {
                out.copy_from_slice(source);
            }
            gemm_bf16(out, true, lines(&lhs, 0), lines(&rhs, 1), Level::best());
        })
    }
}

/// Whether the numbers along dimension 1, or those along dimension 0, lie together without gaps between the lines.
fn unbroken(x: &FlexTensor, along: usize) -> bool {
    let (strides, shape) = (x.layout().strides(), x.shape());
    strides[along] == 1 && strides[1 - along] == shape[along] as isize
}

fn readable(x: FlexTensor) -> FlexTensor {
    if unbroken(&x, 0) || unbroken(&x, 1) { x } else { x.to_contiguous() }
}

/// The matrix as lines along dimension `1 - across`.
fn lines(x: &FlexTensor, across: usize) -> Operand<'_> {
    let (lines, depth) = (x.shape()[across], x.shape()[1 - across]);
    let data = &x.storage::<f32>()[x.layout().start_offset()..][..lines * depth];
    Operand { data, lines, depth, by_line: unbroken(x, 1 - across) }
}

impl<B: Backend + MatmulBf16Ops, C: CheckpointStrategy> MatmulBf16Ops for Autodiff<B, C> {
    fn matmul_bf16(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct MatmulBf16;

        impl<B: Backend + MatmulBf16Ops> Backward<B, 2> for MatmulBf16 {
            /// Each operand where the other one's gradient is asked for.
            type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (lhs, rhs) = ops.state;
                let [lhs_node, rhs_node] = ops.parents;
                if let (Some(node), Some(rhs)) = (lhs_node, rhs) {
                    let d_lhs = B::matmul_bf16(grad.clone(), B::float_swap_dims(rhs, 0, 1));
                    grads.register::<B>(node.id, d_lhs);
                }
                if let (Some(node), Some(lhs)) = (rhs_node, lhs) {
                    grads.register::<B>(node.id, B::matmul_bf16(B::float_swap_dims(lhs, 0, 1), grad));
                }
            }
        }

        let tracked = [lhs.is_tracked(), rhs.is_tracked()];
        let (lhs, lhs_node) = lhs.into_parts();
        let (rhs, rhs_node) = rhs.into_parts();
        match MatmulBf16.prepare::<C>([lhs_node, rhs_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = (tracked[1].then(|| lhs.clone()), tracked[0].then(|| rhs.clone()));
                prep.finish(state, B::matmul_bf16(lhs, rhs))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::matmul_bf16(lhs, rhs)),
        }
    }
}
