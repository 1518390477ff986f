//! Matrix product added to a matrix that is already there: weight gradients gathered chunk by chunk.

use burn::backend::backend_extension;
use burn_backend::{Backend, TensorMetadata, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use faer::MatRef;

use super::cpu;

/// Rows of the result that one task computes.
const ROWS: usize = 64;

/// Accumulating matrix product on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait MatmulAddOps: Backend {
    /// `sum + lhs^T rhs` for `sum` `[d, m]`, `lhs` `[n, d]` and `rhs` `[n, m]`; in place where `sum` is held once.
    #[fusion(default)]
    fn transposed_matmul_add(
        sum: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::<Self>(sum, lhs, rhs)
    }
}

fn composed<B: Backend>(sum: FloatTensor<B>, lhs: FloatTensor<B>, rhs: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(sum, B::float_matmul(B::float_swap_dims(lhs, 0, 1), rhs))
}

#[cfg(feature = "cubecl-backend")]
impl MatmulAddOps for CubeBackend {}

impl<B: Backend + MatmulAddOps, C: burn_autodiff::checkpoint::strategy::CheckpointStrategy> MatmulAddOps
    for burn_autodiff::Autodiff<B, C>
{
}

impl MatmulAddOps for Flex {
    fn transposed_matmul_add(sum: FlexTensor, lhs: FlexTensor, rhs: FlexTensor) -> FlexTensor {
        let (n, d, m) = (lhs.shape()[0], lhs.shape()[1], rhs.shape()[1]);
        if !cpu::all_f32(&[&sum, &lhs, &rhs]) || n * d * m == 0 {
            return composed::<Self>(sum, lhs, rhs);
        }
        let (lhs, rhs) = (cpu::contiguous(lhs), cpu::contiguous(rhs));
        let lhs = MatRef::from_row_major_slice(lhs.storage::<f32>(), n, d).transpose();
        let rhs = MatRef::from_row_major_slice(rhs.storage::<f32>(), n, m);
        cpu::reuse(cpu::contiguous(sum), |source, out| {
            if let Some(source) = source {
                out.copy_from_slice(source);
            }
            cpu::gemm_blocks(out, true, lhs, rhs, ROWS);
        })
    }
}
