//! Scaled dot-product attention with grouped queries, causal and sliding-window masks, rows of several documents and
//! soft-capped scores.
//!
//! Nothing but `q`, `k` and `v` is kept for the backward pass: it computes the probabilities again (Dao et al. 2022,
//! arXiv:2205.14135). Grouped queries: Ainslie et al. 2023, arXiv:2305.13245; windows: Beltagy et al. 2020,
//! arXiv:2004.05150; soft caps: Gemma 2, arXiv:2408.00118.

use std::sync::Arc;

use burn::backend::backend_extension;
use burn::tensor::Tensor;
use burn_autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn_backend::{Backend, Shape, TensorData, TensorMetadata, get_device_settings, tensor::FloatTensor};
#[cfg(feature = "cubecl-backend")]
use burn_cubecl::CubeBackend;
use burn_flex::{Flex, FlexTensor};

use super::{attention_cpu, cpu};

/// Settings of [`attention`].
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionOptions {
    /// Factor on `q k^T`, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// A query sees no key at a later position.
    pub causal: bool,
    /// A query at position `p` sees keys at distance below `window` only (sliding-window attention); on both sides unless causal.
    pub window: Option<usize>,
    /// Scores become `softcap * tanh(score / softcap)` before the mask (Gemma 2).
    pub softcap: Option<f64>,
}

/// `softmax(mask(softcap(scale q k^T))) v`; query `i` sits at absolute position `s - t + i`, key `j` at `j`.
///
/// Consecutive query heads share a key head (grouped queries); keys and values are never copied for it.
///
/// - q: `[batch, heads, t, head_dim]`
/// - k: `[batch, kv_heads, s, head_dim]`, `s >= t`, `kv_heads` divides `heads`
/// - v: `[batch, kv_heads, s, value_dim]`
/// - result: `[batch, heads, t, value_dim]`
///
/// # Panics
/// If a shape disagrees, the window is 0 or the soft cap is not positive.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions) -> Tensor<4> {
    dispatch(q, k, v, options, None)
}

/// Where the documents of rows that hold several begin.
///
/// Put into a run, it makes a decoder treat each document as if it had a row of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    batch: usize,
    /// For each token of each row, the position in its row at which its document begins.
    starts: Arc<[u32]>,
}

impl Segments {
    /// `starts` are those of `batch` rows, one after the other: for each token, the position in its row at which its
    /// document begins.
    ///
    /// # Panics
    /// If the rows differ in length, or a token has its document begin after itself, or inside another one.
    pub fn new(batch: usize, starts: Vec<u32>) -> Self {
        assert!(
            batch > 0 && starts.len().is_multiple_of(batch),
            "segments: {} starts in {batch} rows",
            starts.len()
        );
        let tokens = starts.len() / batch;
        for row in starts.chunks(tokens.max(1)) {
            let fits = |(i, &s): (usize, &u32)| s as usize == i || i > 0 && s == row[i - 1];
            assert!(row.iter().enumerate().all(fits), "segments: a document begins in no token of its own");
        }
        Segments { batch, starts: starts.into() }
    }

    /// Rows and tokens in each.
    pub fn dims(&self) -> [usize; 2] {
        [self.batch, self.starts.len() / self.batch]
    }

    /// For each token of row after row, its position in its document.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        let tokens = self.dims()[1];
        self.starts.iter().enumerate().map(move |(i, &start)| i % tokens - start as usize)
    }

    /// The starts of one row.
    pub(super) fn row(&self, row: usize) -> &[u32] {
        let tokens = self.dims()[1];
        &self.starts[row * tokens..][..tokens]
    }
}

/// [`attention`] where a query also sees no key of an earlier document of its row; causal, as many queries as keys.
///
/// # Panics
/// As [`attention`]; also if it is not causal, or `segments` has other rows or tokens than `q` or `k`.
pub fn segmented_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    segments: Segments,
    options: AttentionOptions,
) -> Tensor<4> {
    let ([batch, _, t, _], [_, _, s, _]) = (q.dims(), k.dims());
    assert_eq!([segments.dims(), segments.dims()], [[batch, t], [batch, s]], "attention: shape of segments");
    assert!(options.causal, "attention: segments without causality");
    dispatch(q, k, v, options, Some(segments))
}

fn dispatch(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: AttentionOptions,
    segments: Option<Segments>,
) -> Tensor<4> {
    let [batch, heads, t, head_dim] = q.dims();
    let [_, kv_heads, s, value_dim] = v.dims();
    assert_eq!(k.dims(), [batch, kv_heads, s, head_dim], "attention: shape of k");
    assert_eq!(v.dims(), [batch, kv_heads, s, value_dim], "attention: shape of v");
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "attention: {heads} heads on {kv_heads} key heads"
    );
    assert!(s >= t, "attention: {t} queries on {s} keys");
    assert!(options.window != Some(0), "attention: window of 0 hides every key");
    assert!(options.softcap.is_none_or(|cap| cap > 0.0), "attention: soft cap {:?}", options.softcap);
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(<burn::backend::Dispatch as AttentionOps>::grouped_attention(
        q, k, v, options, segments,
    ))
}

/// Attention on a backend's own tensors.
#[backend_extension(Flex, Cube: cfg(feature = "cubecl-backend"), Autodiff, Fusion: cfg(feature = "cubecl-backend"))]
pub trait AttentionOps: Backend {
    /// Forward pass, see [`attention`] and [`segmented_attention`].
    #[fusion(default)]
    fn grouped_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
        segments: Option<Segments>,
    ) -> FloatTensor<Self> {
        composed::<Self>(q, k, v, &options, segments.as_ref())
    }

    /// Gradients for `q`, `k` and `v` from the gradient of the result.
    #[fusion(default)]
    fn grouped_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        options: AttentionOptions,
        segments: Option<Segments>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(q, k, v, grad, &options, segments.as_ref())
    }
}

/// `[batch, heads, t, d]` as `[batch, kv_heads, heads / kv_heads * t, d]`: one matrix for each key head.
fn grouped<B: Backend>(x: FloatTensor<B>, kv_heads: usize) -> FloatTensor<B> {
    let shape = x.shape();
    B::float_reshape(x, Shape::new([shape[0], kv_heads, shape[1] / kv_heads * shape[2], shape[3]]))
}

/// Capped scores and probabilities, both `[batch, kv_heads, group * t, s]`; `t` is the number of queries.
fn probabilities<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    t: usize,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let scores = B::float_matmul(q, B::float_swap_dims(k, 2, 3));
    let scores = B::float_mul_scalar(scores, options.scale.into());
    let capped = match options.softcap {
        Some(cap) => B::float_mul_scalar(B::float_tanh(B::float_div_scalar(scores, cap.into())), cap.into()),
        None => scores,
    };
    let shape = capped.shape();
    let masked = match mask::<B>(&capped, t, options, segments) {
        Some(bias) => {
            let (rows, s) = (shape[1] * shape[2], shape[3]);
            let by_query = B::float_reshape(capped.clone(), Shape::new([shape[0], rows / t, t, s]));
            B::float_reshape(B::float_add(by_query, bias), shape)
        }
        None => capped.clone(),
    };
    (capped, B::softmax(masked, 3))
}

/// `[1 or batch, 1, t, s]`: 0 where a query sees a key, minus infinity elsewhere; none if every query sees every key.
fn mask<B: Backend>(
    scores: &FloatTensor<B>,
    t: usize,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> Option<FloatTensor<B>> {
    let (device, dtype, s) = (scores.device(), scores.dtype(), scores.shape()[3]);
    let hides =
        (options.causal && t > 1) || options.window.is_some_and(|window| window < s) || segments.is_some();
    if !hides {
        return None;
    }
    let values =
        |data: Vec<f32>, shape: [usize; 3]| B::float_from_data(TensorData::new(data, shape), &device);
    let positions = |from: usize, shape| values((from..s).map(|p| p as f32).collect(), shape);
    let age = B::float_sub(positions(s - t, [1, t, 1]), positions(0, [1, 1, s]));
    let bool_dtype = get_device_settings::<B>(&device).bool_dtype;
    let batch = segments.map_or(1, |segments| segments.batch);
    let mut bias = B::float_zeros(Shape::new([1, t, s]), &device, dtype.into());
    if options.causal {
        let future = B::float_lower_elem(age.clone(), 0.0.into(), bool_dtype);
        bias = B::float_mask_fill(bias, future, f64::NEG_INFINITY.into());
    }
    if let Some(window) = options.window {
        let far = B::float_greater_equal_elem(B::float_abs(age), (window as f64).into(), bool_dtype);
        bias = B::float_mask_fill(bias, far, f64::NEG_INFINITY.into());
    }
    if let Some(segments) = segments {
        let starts = segments.starts.iter().map(|&start| start as f32).collect();
        let since = B::float_sub(positions(0, [1, 1, s]), values(starts, [batch, t, 1]));
        let other = B::float_lower_elem(since, 0.0.into(), bool_dtype);
        bias = B::float_expand(bias, Shape::new([batch, t, s]));
        bias = B::float_mask_fill(bias, other, f64::NEG_INFINITY.into());
    }
    Some(B::float_reshape(bias, Shape::new([batch, 1, t, s])))
}

fn composed<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> FloatTensor<B> {
    let (shape, kv_heads, value_dim) = (q.shape(), v.shape()[1], v.shape()[3]);
    let (_, p) = probabilities::<B>(grouped::<B>(q, kv_heads), k, shape[2], options, segments);
    B::float_reshape(B::float_matmul(p, v), Shape::new([shape[0], shape[1], shape[2], value_dim]))
}

fn composed_backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    grad: FloatTensor<B>,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (shape, kv_heads) = (q.shape(), k.shape()[1]);
    let (q, grad) = (grouped::<B>(q, kv_heads), grouped::<B>(grad, kv_heads));
    let (capped, p) = probabilities::<B>(q.clone(), k.clone(), shape[2], options, segments);
    let dv = B::float_matmul(B::float_swap_dims(p.clone(), 2, 3), grad.clone());
    let dp = B::float_matmul(grad, B::float_swap_dims(v, 2, 3));
    let mean = B::float_sum_dim(B::float_mul(p.clone(), dp.clone()), 3);
    let mut ds = B::float_mul(p, B::float_sub(dp, mean));
    if let Some(cap) = options.softcap {
        let tanh = B::float_div_scalar(capped, cap.into());
        let slope = B::float_add_scalar(B::float_neg(B::float_mul(tanh.clone(), tanh)), 1.0.into());
        ds = B::float_mul(ds, slope);
    }
    let ds = B::float_mul_scalar(ds, options.scale.into());
    let dk = B::float_matmul(B::float_swap_dims(ds.clone(), 2, 3), q);
    (B::float_reshape(B::float_matmul(ds, k), shape), dk, dv)
}

#[cfg(feature = "cubecl-backend")]
impl AttentionOps for CubeBackend {}

fn empty(q: &FlexTensor, v: &FlexTensor) -> bool {
    q.shape().num_elements() * v.shape().num_elements() == 0
}

impl AttentionOps for Flex {
    fn grouped_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        options: AttentionOptions,
        segments: Option<Segments>,
    ) -> FlexTensor {
        if !cpu::all_f32(&[&q, &k, &v]) || empty(&q, &v) {
            return composed::<Self>(q, k, v, &options, segments.as_ref());
        }
        attention_cpu::forward(q, k, v, &options, segments.as_ref())
    }

    fn grouped_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        grad: FlexTensor,
        options: AttentionOptions,
        segments: Option<Segments>,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if !cpu::all_f32(&[&q, &k, &v, &grad]) || empty(&q, &v) {
            return composed_backward::<Self>(q, k, v, grad, &options, segments.as_ref());
        }
        attention_cpu::backward(q, k, v, grad, &options, segments.as_ref())
    }
}

impl<B: Backend + AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn grouped_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
        segments: Option<Segments>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Attention;

        impl<B: Backend + AttentionOps> Backward<B, 3> for Attention {
            type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, AttentionOptions, Option<Segments>);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (q, k, v, options, segments) = ops.state;
                let (dq, dk, dv) = B::grouped_attention_backward(q, k, v, grad, options, segments);
                for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv]) {
                    if let Some(parent) = parent {
                        grads.register::<B>(parent.id, grad);
                    }
                }
            }
        }

        let (q, q_node) = q.into_parts();
        let (k, k_node) = k.into_parts();
        let (v, v_node) = v.into_parts();
        match Attention.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (o, s) = (options.clone(), segments.clone());
                let y = B::grouped_attention(q.clone(), k.clone(), v.clone(), o, s);
                prep.finish((q, k, v, options, segments), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::grouped_attention(q, k, v, options, segments)),
        }
    }
}
