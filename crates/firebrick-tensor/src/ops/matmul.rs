//! Products of two matrices, in f32 or in bf16 with f32 sums, the compute mode of mixed-precision training.
//!
//! In bf16, weights, activations and gradients stay f32; the operands of a product are rounded to bf16 as they are packed for it. It
//! pays where the processor multiplies bf16 faster than f32 (AMX, AMD's AVX512-BF16), and is done there alone: elsewhere products are f32.
//!
//! Weights may be stored in bf16, which halves what a product reads: they are exact in both, and products of a few rows are f32.
//!
//! Products in f32 are those of burn on the CPU, the library `gemm`, without what burn does beside them: it fills results with zeros first
//! and copies them once, on one thread.

use std::mem::MaybeUninit;

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
use faer::MatRef;
use half::bf16;

use super::cpu;
use super::gemm_bf16::{Level, Numbers, Operand, gemm_bf16};
use super::gemm_f32::{gemm_f32, gemm_widened};
use super::linear::{FEW_ROWS, dots_of_rows, is_by_output};

/// How the large products of a model are computed. Activations and gradients are f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In f32.
    #[default]
    F32,
    /// Of operands rounded to bf16, with f32 sums, backwards too, where [`Precision::available`]; otherwise as `F32`.
    Bf16,
}

impl Precision {
    /// Whether this processor multiplies bf16 numbers, and faster than f32 ones: with AMX, or with AVX512-BF16 if it is one of AMD's.
    /// Products on GPUs are those of f32.
    pub fn available(self) -> bool {
        self == Precision::F32 || Level::best().pays()
    }

    /// Whether a product of so many rows is to be computed in bf16: with a few of them, reading the weights is all the work.
    pub(super) fn is_bf16(self, rows: usize) -> bool {
        self == Precision::Bf16 && rows >= FEW_ROWS && self.available()
    }
}

/// Products on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait MatmulOps: Backend {
    /// `lhs rhs` of two matrices.
    #[fusion(default)]
    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, _precision: Precision) -> FloatTensor<Self> {
        Self::float_matmul(lhs, rhs)
    }

    /// `sum + lhs rhs`; in place where `sum` is held once.
    #[fusion(default)]
    fn matmul_add(
        sum: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        _precision: Precision,
    ) -> FloatTensor<Self> {
        Self::float_add(sum, Self::float_matmul(lhs, rhs))
    }

    /// `x weight + narrow wide`, the last product in f32: the result of a layer with an update of low rank.
    #[fusion(default)]
    fn matmul_low_rank(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        narrow: FloatTensor<Self>,
        wide: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        Self::matmul_add(Self::matmul(x, weight, precision), narrow, wide, Precision::F32)
    }

    /// Gradient of `weight`, by which `x` was multiplied, from that of the product. It lies as the weight does, so that what goes through
    /// both, or through several of them, reads all in one order.
    #[fusion(default)]
    fn weight_gradient(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        Self::matmul(Self::float_swap_dims(x, 0, 1), grad, precision)
    }
}

#[cfg(feature = "cubecl-backend")]
impl MatmulOps for CubeBackend {}

impl MatmulOps for Flex {
    fn matmul(lhs: FlexTensor, rhs: FlexTensor, precision: Precision) -> FlexTensor {
        let (rows, depth, columns) = (lhs.shape()[0], lhs.shape()[1], rhs.shape()[1]);
        if rows * depth * columns == 0 || !has_kernel(&lhs, &rhs) {
            return <Self as FloatTensorOps<Self>>::float_matmul(lhs, cpu::widened(rhs));
        }
        assert_eq!(depth, rhs.shape()[0], "matmul: columns of lhs against rows of rhs");
        if columns < NARROW && rows >= FEW_ROWS && cpu::unbroken(&lhs, 1) && !precision.is_bf16(rows) {
            let rhs = cpu::contiguous(transposed(cpu::widened(rhs)));
            let lhs = &lhs.storage::<f32>()[lhs.layout().start_offset()..][..rows * depth];
            let mut out = vec![0.0; rows * columns];
            dots_of_rows(lhs, rhs.storage(), &mut out, columns);
            return cpu::tensor(out, Shape::new([rows, columns]));
        }
        filled([rows, columns], |out| product(out, false, lhs, rhs, precision))
    }

    fn matmul_add(sum: FlexTensor, lhs: FlexTensor, rhs: FlexTensor, precision: Precision) -> FlexTensor {
        let [rows, columns] = [lhs.shape()[0], rhs.shape()[1]];
        if rows * lhs.shape()[1] * columns == 0 || !cpu::all_f32(&[&sum]) || !has_kernel(&lhs, &rhs) {
            let product = <Self as FloatTensorOps<Self>>::float_matmul(lhs, cpu::widened(rhs));
            return <Self as FloatTensorOps<Self>>::float_add(sum, product);
        }
        assert_eq!(sum.shape(), Shape::new([rows, columns]), "matmul_add: shape of the sum");
        assert_eq!(lhs.shape()[1], rhs.shape()[0], "matmul_add: columns of lhs against rows of rhs");
        if is_by_output(&sum) && !sum.is_contiguous() && cpu::all_f32(&[&rhs]) {
            let [sum, lhs, rhs] = [sum, lhs, rhs].map(transposed);
            return transposed(<Self as MatmulOps>::matmul_add(sum, rhs, lhs, precision));
        }
        cpu::map(sum, |out| product(cpu::room(out), true, lhs, rhs, precision))
    }

    fn matmul_low_rank(
        x: FlexTensor,
        weight: FlexTensor,
        narrow: FlexTensor,
        wide: FlexTensor,
        precision: Precision,
    ) -> FlexTensor {
        let (rows, empty) = (x.shape()[0], x.shape().num_elements() * weight.shape().num_elements() == 0);
        if empty || precision.is_bf16(rows) || !cpu::all_f32(&[&x, &weight, &narrow, &wide]) {
            let y = <Self as MatmulOps>::matmul(x, weight, precision);
            return <Self as MatmulOps>::matmul_add(y, narrow, wide, Precision::F32);
        }
        let products = [[view(&x), view(&weight)], [view(&narrow), view(&wide)]];
        filled([rows, wide.shape()[1]], |out| gemm_f32(out, false, &products, rayon::current_num_threads()))
    }

    fn weight_gradient(
        x: FlexTensor,
        grad: FlexTensor,
        weight: FlexTensor,
        precision: Precision,
    ) -> FlexTensor {
        let narrow = grad.shape()[1] < NARROW;
        if narrow || is_by_output(&weight) && !weight.is_contiguous() {
            return transposed(<Self as MatmulOps>::matmul(transposed(grad), x, precision));
        }
        <Self as MatmulOps>::matmul(transposed(x), grad, precision)
    }
}

/// Columns below which vectors of a product lie along the sums: across, they would be half empty.
const NARROW: usize = 16;

/// Whether [`product`] takes these types.
fn has_kernel(lhs: &FlexTensor, rhs: &FlexTensor) -> bool {
    cpu::all_f32(&[lhs]) && (cpu::all_f32(&[rhs]) || cpu::is_bf16(rhs))
}

/// Writes the product to `out`, or adds it.
fn product(out: &mut [MaybeUninit<f32>], add: bool, lhs: FlexTensor, rhs: FlexTensor, precision: Precision) {
    let threads = rayon::current_num_threads();
    if precision.is_bf16(lhs.shape()[0]) {
        let (lhs, rhs) = (cpu::without_gaps(lhs), cpu::without_gaps(rhs));
        gemm_bf16(out, add, lines(&lhs, 0), lines(&rhs, 1), Level::best(), threads);
    } else if cpu::is_bf16(&rhs) && cpu::unbroken(&rhs, 0) {
        let halves = &rhs.storage::<bf16>()[rhs.layout().start_offset()..];
        let [depth, columns] = [rhs.shape()[0], rhs.shape()[1]];
        let rhs = MatRef::from_column_major_slice(&halves[..depth * columns], depth, columns);
        gemm_widened(out, add, view(&lhs), rhs, threads);
    } else {
        gemm_f32(out, add, &[[view(&lhs), view(&cpu::widened(rhs))]], threads);
    }
}

/// A matrix that `product` writes all of.
pub(super) fn filled(
    [rows, columns]: [usize; 2],
    product: impl FnOnce(&mut [MaybeUninit<f32>]),
) -> FlexTensor {
    let mut out = Vec::with_capacity(rows * columns);
    product(&mut out.spare_capacity_mut()[..rows * columns]);
    // SAFETY: a product that reads nothing of its result has written all of it.
    unsafe { out.set_len(rows * columns) };
    cpu::tensor(out, Shape::new([rows, columns]))
}

fn transposed(x: FlexTensor) -> FlexTensor {
    <Flex as FloatTensorOps<Flex>>::float_swap_dims(x, 0, 1)
}

fn view(x: &FlexTensor) -> MatRef<'_, f32> {
    let (shape, strides) = (x.shape(), x.layout().strides());
    let first = x.storage::<f32>()[x.layout().start_offset()..].as_ptr();
    // SAFETY: a layout leads to elements of its storage alone.
    unsafe { MatRef::from_raw_parts(first, shape[0], shape[1], strides[0], strides[1]) }
}

/// The matrix as lines along dimension `1 - across`.
fn lines(x: &FlexTensor, across: usize) -> Operand<'_> {
    let (lines, depth) = (x.shape()[across], x.shape()[1 - across]);
    let at = x.layout().start_offset();
    let data = match cpu::is_bf16(x) {
        true => Numbers::Bf16(&x.storage()[at..][..lines * depth]),
        false => Numbers::F32(&x.storage()[at..][..lines * depth]),
    };
    Operand { data, lines, depth, by_line: cpu::unbroken(x, 1 - across) }
}

impl<B: Backend + MatmulOps, C: CheckpointStrategy> MatmulOps for Autodiff<B, C> {
    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Matmul;

        impl<B: Backend + MatmulOps> Backward<B, 2> for Matmul {
            type State = Operands<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                for (parent, grad) in ops.parents.into_iter().zip(ops.state.gradients(grad)) {
                    if let (Some(parent), Some(grad)) = (parent, grad) {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let tracked = [lhs.is_tracked(), rhs.is_tracked()];
        let (lhs, lhs_node) = lhs.into_parts();
        let (rhs, rhs_node) = rhs.into_parts();
        match Matmul.prepare::<C>([lhs_node, rhs_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let operands = Operands::new(tracked, &lhs, &rhs, precision);
                prep.finish(operands, B::matmul(lhs, rhs, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::matmul(lhs, rhs, precision)),
        }
    }

    fn matmul_add(
        sum: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct MatmulAdd;

        impl<B: Backend + MatmulOps> Backward<B, 3> for MatmulAdd {
            type State = Operands<B>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let [d_lhs, d_rhs] = ops.state.gradients(grad.clone());
                for (parent, grad) in ops.parents.into_iter().zip([Some(grad), d_lhs, d_rhs]) {
                    if let (Some(parent), Some(grad)) = (parent, grad) {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let tracked = [lhs.is_tracked(), rhs.is_tracked()];
        let (sum, sum_node) = sum.into_parts();
        let (lhs, lhs_node) = lhs.into_parts();
        let (rhs, rhs_node) = rhs.into_parts();
        match MatmulAdd.prepare::<C>([sum_node, lhs_node, rhs_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let operands = Operands::new(tracked, &lhs, &rhs, precision);
                prep.finish(operands, B::matmul_add(sum, lhs, rhs, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::matmul_add(sum, lhs, rhs, precision)),
        }
    }
}

/// What the gradients of a product need: each operand where the other one's gradient is asked for.
#[derive(Clone, Debug)]
struct Operands<B: Backend> {
    lhs: Option<FloatTensor<B>>,
    rhs: Option<FloatTensor<B>>,
    precision: Precision,
}

impl<B: Backend + MatmulOps> Operands<B> {
    fn new(
        [lhs_tracked, rhs_tracked]: [bool; 2],
        lhs: &FloatTensor<B>,
        rhs: &FloatTensor<B>,
        precision: Precision,
    ) -> Self {
        let (lhs, rhs) = (rhs_tracked.then(|| lhs.clone()), lhs_tracked.then(|| rhs.clone()));
        Operands { lhs, rhs, precision }
    }

    /// Gradients of both operands, each if it is asked for.
    fn gradients(self, grad: FloatTensor<B>) -> [Option<FloatTensor<B>>; 2] {
        let Operands { lhs, rhs, precision } = self;
        let d_lhs = rhs.map(|rhs| B::matmul(grad.clone(), B::float_swap_dims(rhs, 0, 1), precision));
        [d_lhs, lhs.map(|lhs| B::matmul(B::float_swap_dims(lhs, 0, 1), grad, precision))]
    }
}
