//! Gated linear unit with SiLU (Shazeer 2020, arXiv:2002.05202).

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, TensorMetadata, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;

/// `silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
///
/// - gate, up: any shape, the same for both
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shape of gate against up");
    let (gate, up) = (gate.into_dispatch(), up.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as SwigluOps>::swiglu(gate, up))
}

/// SwiGLU on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait SwigluOps: Backend {
    /// Forward pass, see [`swiglu`].
    #[fusion(default)]
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::<Self>(gate, up)
    }

    /// Gradients for `gate` and `up` from the gradient of the result.
    #[fusion(default)]
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(gate, up, grad)
    }
}

fn composed<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let silu = B::float_mul(gate.clone(), B::sigmoid(gate));
    B::float_mul(silu, up)
}

fn composed_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let sigmoid = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate, sigmoid.clone());
    // silu' = sigmoid + silu (1 - sigmoid)
    let slope =
        B::float_add(sigmoid.clone(), B::float_sub(silu.clone(), B::float_mul(silu.clone(), sigmoid)));
    let dgate = B::float_mul(B::float_mul(grad.clone(), up), slope);
    (dgate, B::float_mul(grad, silu))
}

#[cfg(feature = "cubecl-backend")]
impl SwigluOps for CubeBackend {}

impl SwigluOps for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        if !cpu::all_f32(&[&gate, &up]) {
            return composed::<Self>(gate, up);
        }
        let gate = cpu::contiguous(gate);
        let gate = gate.storage::<f32>();
        cpu::map_rows(up, 1, |first, inner| gated(&gate[first..][..inner.len()], inner))
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> (FlexTensor, FlexTensor) {
        if !cpu::all_f32(&[&gate, &up, &grad]) {
            return composed_backward::<Self>(gate, up, grad);
        }
        let (gate, up, grad) = (cpu::contiguous(gate), cpu::contiguous(up), cpu::contiguous(grad));
        let shape = gate.shape();
        let (gate, up) = (gate.storage::<f32>(), up.storage::<f32>());
        let mut dgate = Vec::with_capacity(gate.len());
        let room = &mut dgate.spare_capacity_mut()[..gate.len()];
        let dup = cpu::map(grad, |dup| {
            assert_eq!(dup.len(), room.len(), "swiglu: shape of the gradient");
            cpu::blocks2((dup, 1), (room, 1), cpu::block_rows(1), |first, dup, dgate| {
                let (gate, up) = (&gate[first..][..dup.len()], &up[first..][..dup.len()]);
                Arch::new().dispatch(Reverse::<false> {
                    gate,
                    up,
                    dup,
                    dgate: cpu::zeroed(dgate),
                    inner: &mut [],
                });
            });
        });
        // SAFETY: the blocks are all of it.
        unsafe { dgate.set_len(gate.len()) };
        (cpu::tensor(dgate, shape), dup)
    }
}

/// `silu(gate) * inner` in place, on the calling thread.
pub(super) fn gated(gate: &[f32], inner: &mut [f32]) {
    Arch::new().dispatch(Forward { gate, inner });
}

/// Gradients of [`gated`] and what it gives once more, on the calling thread: `dup` holds the gradient of the result at first.
pub(super) fn gated_backward(
    gate: &[f32],
    up: &[f32],
    dup: &mut [f32],
    dgate: &mut [f32],
    inner: &mut [f32],
) {
    Arch::new().dispatch(Reverse::<true> { gate, up, dup, dgate, inner });
}

/// A run of elements.
struct Forward<'a> {
    gate: &'a [f32],
    inner: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (y, &g) in self.inner.iter_mut().zip(self.gate) {
            *y *= g / (1.0 + cpu::exp(-g));
        }
    }
}

/// A run of elements; `dup` holds the gradient of the result.
struct Reverse<'a, const INNER: bool> {
    gate: &'a [f32],
    up: &'a [f32],
    dup: &'a mut [f32],
    dgate: &'a mut [f32],
    /// Gets `silu(gate) * up` if `INNER`.
    inner: &'a mut [f32],
}

impl<const INNER: bool> WithSimd for Reverse<'_, INNER> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let len = self.gate.len();
        let (up, dup, dgate) = (&self.up[..len], &mut self.dup[..len], &mut self.dgate[..len]);
        let inner = if INNER { &mut self.inner[..len] } else { self.inner };
        for i in 0..len {
            let (g, grad) = (self.gate[i], dup[i]);
            let sigmoid = 1.0 / (1.0 + cpu::exp(-g));
            let silu = g * sigmoid;
            dgate[i] = grad * up[i] * (sigmoid + silu * (1.0 - sigmoid));
            dup[i] = grad * silu;
            if INNER {
                inner[i] = silu * up[i];
            }
        }
    }
}

impl<B: Backend + SwigluOps, C: CheckpointStrategy> SwigluOps for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Swiglu;

        impl<B: Backend + SwigluOps> Backward<B, 2> for Swiglu {
            type State = (FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (dgate, dup) = B::swiglu_backward(ops.state.0, ops.state.1, grad);
                for (parent, grad) in ops.parents.into_iter().zip([dgate, dup]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (gate, gate_node) = gate.into_parts();
        let (up, up_node) = up.into_parts();
        match Swiglu.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::swiglu(gate.clone(), up.clone());
                prep.finish((gate, up), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate, up)),
        }
    }
}
