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
        cpu::map_rows(up, 1, |first, source, out| {
            let gate = &gate[first..][..out.len()];
            Arch::new().dispatch(Forward { gate, source, out });
        })
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> (FlexTensor, FlexTensor) {
        if !cpu::all_f32(&[&gate, &up, &grad]) {
            return composed_backward::<Self>(gate, up, grad);
        }
        let (gate, up, grad) = (cpu::contiguous(gate), cpu::contiguous(up), cpu::contiguous(grad));
        let shape = gate.shape();
        let (gate, up) = (gate.storage::<f32>(), up.storage::<f32>());
        let mut dgate = vec![0.0; gate.len()];
        let dup = cpu::reuse(grad, |source, dup| {
            cpu::blocks2((dup, 1), (&mut dgate, 1), cpu::block_rows(1), |first, dup, dgate| {
                let (gate, up) = (&gate[first..][..dup.len()], &up[first..][..dup.len()]);
                let source = source.map(|g| &g[first..][..dup.len()]);
                Arch::new().dispatch(Reverse { gate, up, source, dup, dgate });
            });
        });
        (cpu::tensor(dgate, shape), dup)
    }
}

/// `silu(gate) * inner` in place, on the calling thread.
pub(super) fn gated(gate: &[f32], inner: &mut [f32]) {
    Arch::new().dispatch(Forward { gate, source: None, out: inner });
}

/// A run of elements; without a source `out` holds `up`.
struct Forward<'a> {
    gate: &'a [f32],
    source: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.source {
            Some(up) => {
                for ((y, &u), &g) in self.out.iter_mut().zip(up).zip(self.gate) {
                    *y = g / (1.0 + cpu::exp(-g)) * u;
                }
            }
            None => {
                for (y, &g) in self.out.iter_mut().zip(self.gate) {
                    *y *= g / (1.0 + cpu::exp(-g));
                }
            }
        }
    }
}

/// A run of elements; without a source `dup` holds the gradient of the result.
struct Reverse<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    source: Option<&'a [f32]>,
    dup: &'a mut [f32],
    dgate: &'a mut [f32],
}

impl WithSimd for Reverse<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        if let Some(source) = self.source {
            self.dup.copy_from_slice(source);
        }
        let len = self.gate.len();
        let (up, dup, dgate) = (&self.up[..len], &mut self.dup[..len], &mut self.dgate[..len]);
        for i in 0..len {
            let (g, grad) = (self.gate[i], dup[i]);
            let sigmoid = 1.0 / (1.0 + cpu::exp(-g));
            let silu = g * sigmoid;
            dgate[i] = grad * up[i] * (sigmoid + silu * (1.0 - sigmoid));
            dup[i] = grad * silu;
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
