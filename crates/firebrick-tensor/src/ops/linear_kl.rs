//! Divergence between the distributions of two linear heads that never holds the logits of all rows.

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, TensorMetadata, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};
use pulp::{Arch, Simd, WithSimd};

use super::cpu;
use super::cross_entropy::{column, flat, log_sum_exp, log_sum_exp_of};
use super::linear_cross_entropy::{chunks, head_backward, rows};
use super::matmul::{MatmulOps, Precision};

/// Direction of a Kullback-Leibler divergence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Divergence {
    /// `KL(teacher || student)`: the student covers the teacher's mass.
    ForwardKl,
    /// `KL(student || teacher)`: the student seeks the teacher's modes.
    ReverseKl,
}

/// Divergence of each row between `softmax(teacher teacher_weight / T)` and `softmax(student student_weight / T)`, in
/// nats, without the factor `T^2` (Hinton et al. 2015, arXiv:1503.02531, multiply by it).
///
/// About 32 million logits of each head exist at a time. Gradients reach the student's side only, and its weight only
/// if that is tracked.
///
/// - student: `[n, d_s]`, student_weight: `[d_s, vocab]`
/// - teacher: `[n, d_t]`, teacher_weight: `[d_t, vocab]`
/// - result: `[n]`
///
/// # Panics
/// If a shape disagrees or the temperature is not positive.
pub fn linear_kl(
    student: Tensor<2>,
    student_weight: Tensor<2>,
    teacher: Tensor<2>,
    teacher_weight: Tensor<2>,
    temperature: f64,
    divergence: Divergence,
) -> Tensor<1> {
    assert_eq!(
        student.dims()[1],
        student_weight.dims()[0],
        "linear_kl: columns of student against its weight"
    );
    assert_eq!(
        teacher.dims()[1],
        teacher_weight.dims()[0],
        "linear_kl: columns of teacher against its weight"
    );
    assert_eq!(student.dims()[0], teacher.dims()[0], "linear_kl: rows of student against teacher");
    assert_eq!(student_weight.dims()[1], teacher_weight.dims()[1], "linear_kl: vocabularies");
    assert!(temperature > 0.0, "linear_kl: temperature {temperature}");
    let student = student.into_dispatch();
    Tensor::from_dispatch(<burn::backend::Dispatch as LinearKlOps>::linear_kl(
        student,
        student_weight.into_dispatch(),
        teacher.into_dispatch(),
        teacher_weight.into_dispatch(),
        temperature,
        divergence,
    ))
}

/// [`linear_kl`] of logits that are there already, `[n, vocab]` each; without gradients.
///
/// # Panics
/// If the shapes differ or the temperature is not positive.
pub fn kl(student: Tensor<2>, teacher: Tensor<2>, temperature: f64, divergence: Divergence) -> Tensor<1> {
    assert_eq!(student.dims(), teacher.dims(), "kl: logits of student against teacher");
    assert!(temperature > 0.0, "kl: temperature {temperature}");
    let (student, teacher) = (student.into_dispatch(), teacher.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as LinearKlOps>::kl(
        student,
        teacher,
        temperature,
        divergence,
    ))
}

/// Divergence of linear heads on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait LinearKlOps: Backend + MatmulOps {
    /// Divergence of each row `[n]` from logits `[n, vocab]`.
    // As one op, not op by op: burn-cubecl-fusion 0.22.1 fuses long rows into wrong sums.
    #[fusion(dtype = student, shape = Shape::new([student[0]]))]
    fn kl(
        student: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        temperature: f64,
        divergence: Divergence,
    ) -> FloatTensor<Self> {
        composed::<Self>(student, teacher, temperature, divergence)
    }

    /// Gradient for the student's logits from the gradient of the divergence.
    #[fusion(dtype = student, shape = student)]
    fn kl_backward(
        student: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        temperature: f64,
        divergence: Divergence,
    ) -> FloatTensor<Self> {
        composed_backward::<Self>(student, teacher, grad, temperature, divergence)
    }

    /// Divergence of each row from hidden states and heads, see [`linear_kl`].
    #[fusion(default)]
    fn linear_kl(
        student: FloatTensor<Self>,
        student_weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        teacher_weight: FloatTensor<Self>,
        temperature: f64,
        divergence: Divergence,
    ) -> FloatTensor<Self> {
        forward::<Self>(&TwoHeads {
            student,
            student_weight,
            teacher,
            teacher_weight,
            temperature,
            divergence,
        })
    }
}

/// Log-probabilities at a temperature.
fn log_probabilities<B: Backend>(logits: FloatTensor<B>, temperature: f64) -> FloatTensor<B> {
    let x = B::float_div_scalar(logits, temperature.into());
    let log_sum = log_sum_exp::<B>(x.clone());
    B::float_sub(x, log_sum)
}

fn composed<B: Backend>(
    student: FloatTensor<B>,
    teacher: FloatTensor<B>,
    temperature: f64,
    divergence: Divergence,
) -> FloatTensor<B> {
    let s = log_probabilities::<B>(student, temperature);
    let t = log_probabilities::<B>(teacher, temperature);
    let (p, q) = match divergence {
        Divergence::ForwardKl => (t, s),
        Divergence::ReverseKl => (s, t),
    };
    flat::<B>(B::float_sum_dim(B::float_mul(B::float_exp(p.clone()), B::float_sub(p, q)), 1))
}

fn composed_backward<B: Backend>(
    student: FloatTensor<B>,
    teacher: FloatTensor<B>,
    grad: FloatTensor<B>,
    temperature: f64,
    divergence: Divergence,
) -> FloatTensor<B> {
    let s = log_probabilities::<B>(student, temperature);
    let t = log_probabilities::<B>(teacher, temperature);
    let p = B::float_exp(s.clone());
    let slope = match divergence {
        Divergence::ForwardKl => B::float_sub(p, B::float_exp(t)),
        Divergence::ReverseKl => {
            let difference = B::float_sub(s, t);
            let kl = B::float_sum_dim(B::float_mul(p.clone(), difference.clone()), 1);
            B::float_mul(p, B::float_sub(difference, kl))
        }
    };
    B::float_mul(slope, column::<B>(B::float_div_scalar(grad, temperature.into())))
}

/// Both heads with their inputs.
#[derive(Debug, Clone)]
struct TwoHeads<B: Backend> {
    student: FloatTensor<B>,
    student_weight: FloatTensor<B>,
    teacher: FloatTensor<B>,
    teacher_weight: FloatTensor<B>,
    temperature: f64,
    divergence: Divergence,
}

fn forward<B: LinearKlOps>(heads: &TwoHeads<B>) -> FloatTensor<B> {
    let parts = chunks(heads.student.shape()[0], heads.student_weight.shape()[1]).into_iter().map(|chunk| {
        let s = B::float_matmul(rows::<B>(&heads.student, &chunk), heads.student_weight.clone());
        let t = B::float_matmul(rows::<B>(&heads.teacher, &chunk), heads.teacher_weight.clone());
        B::kl(s, t, heads.temperature, heads.divergence)
    });
    B::float_cat(parts.collect(), 0)
}

/// Gradients for the student's hidden states and weight, each only if asked for.
fn backward<B: LinearKlOps>(
    heads: &TwoHeads<B>,
    grad: &FloatTensor<B>,
    wants: [bool; 2],
) -> [Option<FloatTensor<B>>; 2] {
    head_backward::<B>(&heads.student, &heads.student_weight, wants, Precision::F32, None, |chunk, s| {
        let t = B::float_matmul(rows::<B>(&heads.teacher, chunk), heads.teacher_weight.clone());
        B::kl_backward(s, t, rows::<B>(grad, chunk), heads.temperature, heads.divergence)
    })
}

#[cfg(feature = "cubecl-backend")]
impl LinearKlOps for CubeBackend {}

impl LinearKlOps for Flex {
    fn kl(student: FlexTensor, teacher: FlexTensor, temperature: f64, divergence: Divergence) -> FlexTensor {
        let (n, vocab) = (student.shape()[0], student.shape()[1]);
        if !cpu::all_f32(&[&student, &teacher]) || vocab == 0 {
            return composed::<Self>(student, teacher, temperature, divergence);
        }
        let (student, teacher) = (cpu::contiguous(student), cpu::contiguous(teacher));
        let (s, t) = (student.storage::<f32>(), teacher.storage::<f32>());
        let mut out = vec![0.0; n];
        cpu::blocks(&mut out, 1, cpu::block_rows(vocab), |first, out| {
            let range = first * vocab..(first + out.len()) * vocab;
            let (student, teacher) = (&s[range.clone()], &t[range]);
            let inverse = 1.0 / temperature as f32;
            Arch::new().dispatch(Forward { student, teacher, out, inverse, divergence });
        });
        cpu::tensor(out, Shape::new([n]))
    }

    fn kl_backward(
        student: FlexTensor,
        teacher: FlexTensor,
        grad: FlexTensor,
        temperature: f64,
        divergence: Divergence,
    ) -> FlexTensor {
        let vocab = student.shape()[1];
        if !cpu::all_f32(&[&student, &teacher, &grad]) || vocab == 0 {
            return composed_backward::<Self>(student, teacher, grad, temperature, divergence);
        }
        let (teacher, grad) = (cpu::contiguous(teacher), cpu::contiguous(grad));
        let (t, grad) = (teacher.storage::<f32>(), grad.storage::<f32>());
        cpu::map_rows(student, vocab, |first, out| {
            let teacher = &t[first * vocab..][..out.len()];
            let grad = &grad[first..][..out.len() / vocab];
            let inverse = 1.0 / temperature as f32;
            Arch::new().dispatch(Reverse { out, teacher, grad, inverse, divergence });
        })
    }
}

struct Forward<'a> {
    student: &'a [f32],
    teacher: &'a [f32],
    out: &'a mut [f32],
    inverse: f32,
    divergence: Divergence,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let vocab = self.student.len() / self.out.len();
        let rows = self.student.chunks_exact(vocab).zip(self.teacher.chunks_exact(vocab));
        for (out, (s, t)) in self.out.iter_mut().zip(rows) {
            *out = match self.divergence {
                Divergence::ForwardKl => kl_of(t, s, self.inverse),
                Divergence::ReverseKl => kl_of(s, t, self.inverse),
            };
        }
    }
}

/// `KL(p || q)` of two rows of logits at temperature `1 / inverse`.
#[inline(always)]
fn kl_of(p: &[f32], q: &[f32], inverse: f32) -> f32 {
    let (sum_p, sum_q) = (log_sum_exp_of(p, inverse), log_sum_exp_of(q, inverse));
    cpu::sum([p, q], |[p, q]| {
        let (p, q) = (p * inverse - sum_p, q * inverse - sum_q);
        cpu::exp(p) * (p - q)
    })
}

/// Rows of the backward pass; `out` holds the student's logits.
struct Reverse<'a> {
    out: &'a mut [f32],
    teacher: &'a [f32],
    grad: &'a [f32],
    inverse: f32,
    divergence: Divergence,
}

impl WithSimd for Reverse<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let vocab = self.out.len() / self.grad.len();
        let inverse = self.inverse;
        let rows = self.out.chunks_exact_mut(vocab).zip(self.teacher.chunks_exact(vocab));
        for (i, (row, teacher)) in rows.enumerate() {
            let (sum_s, sum_t) = (log_sum_exp_of(row, inverse), log_sum_exp_of(teacher, inverse));
            let grad = self.grad[i] * inverse;
            match self.divergence {
                Divergence::ForwardKl => {
                    for (x, &t) in row.iter_mut().zip(teacher) {
                        *x = (cpu::exp(*x * inverse - sum_s) - cpu::exp(t * inverse - sum_t)) * grad;
                    }
                }
                Divergence::ReverseKl => {
                    let kl = kl_of(row, teacher, inverse);
                    for (x, &t) in row.iter_mut().zip(teacher) {
                        let (s, t) = (*x * inverse - sum_s, t * inverse - sum_t);
                        *x = cpu::exp(s) * (s - t - kl) * grad;
                    }
                }
            }
        }
    }
}

impl<B: Backend + LinearKlOps, C: CheckpointStrategy> LinearKlOps for Autodiff<B, C> {
    fn linear_kl(
        student: FloatTensor<Self>,
        student_weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        teacher_weight: FloatTensor<Self>,
        temperature: f64,
        divergence: Divergence,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LinearKl;

        impl<B: Backend + LinearKlOps> Backward<B, 2> for LinearKl {
            type State = TwoHeads<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let wants = ops.parents.each_ref().map(Option::is_some);
                let computed = backward::<B>(&ops.state, &grad, wants);
                for (parent, grad) in ops.parents.into_iter().zip(computed) {
                    if let (Some(parent), Some(grad)) = (parent, grad) {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (student, student_node) = student.into_parts();
        let (student_weight, weight_node) = student_weight.into_parts();
        let (teacher, teacher_weight) = (teacher.into_primitive(), teacher_weight.into_primitive());
        let heads = TwoHeads { student, student_weight, teacher, teacher_weight, temperature, divergence };
        let kl = forward::<B>(&heads);
        match LinearKl.prepare::<C>([student_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(heads, kl),
            OpsKind::UnTracked(prep) => prep.finish(kl),
        }
    }
}
