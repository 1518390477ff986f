//! CPU kernel of [`attention`](super::attention): blocks of queries of one head, each with its scores in cache.
//!
//! A block computes scores only for the keys its mask lets through, so causal attention costs half and a window
//! costs its width; memory is one block of scores for each thread.

use std::cell::RefCell;

use burn_backend::Shape;
use burn_flex::FlexTensor;
use faer::MatRef;
use pulp::{Arch, Simd, WithSimd};

use super::awake::{self, Start};
use super::cpu::{self, Heads};
use super::gemm_f32::{gemm, gemm_rows};
use super::{AttentionOptions, Segments};

/// Scores in a block, at most (for as long as that leaves 16 queries).
const BLOCK_SCORES: usize = 1 << 17;

thread_local! {
    /// The scores of a block.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Queries in a block, from the shape alone.
fn block_queries(keys: usize) -> usize {
    (BLOCK_SCORES / keys.max(1)).clamp(16, 128)
}

pub(super) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> FlexTensor {
    let (q, k, v) = (Heads::readable(q), Heads::readable(k), Heads::readable(v));
    let problem = Problem { q: Heads::new(&q), k: Heads::new(&k), v: Heads::new(&v), options, segments };
    let [batch, heads, t, _] = problem.q.dims;
    let value_dim = problem.v.dims[3];
    let rows = block_queries(problem.k.dims[2]);
    let firsts = || (0..t).step_by(rows);
    let tasks = (0..batch * heads).flat_map(|head| firsts().map(move |first| (head, first)));
    let len = batch * heads * t * value_dim;
    let mut out = Vec::with_capacity(len);
    let start = Start(out.as_mut_ptr());
    awake::each(tasks.collect(), |&mut (head, first)| {
        let block = problem.block(head, first, rows.min(t - first));
        SCORES.with_borrow_mut(|scores| {
            block.probabilities(scores, None);
            let at = start.at(problem.query_row(head, first) * value_dim);
            // SAFETY: there is room for each query of each head, which are this task's own.
            unsafe { gemm_rows(at, heads * value_dim, block.scores(scores), block.v) };
        });
    });
    // SAFETY: the tasks are all of it, and the products have written them.
    unsafe { out.set_len(len) };
    by_token(out, [batch, t, heads, value_dim])
}

/// What lies token by token, as a projection wants it, with heads before tokens.
fn by_token(data: Vec<f32>, shape: [usize; 4]) -> FlexTensor {
    cpu::by_token(cpu::tensor(data, Shape::new(shape)))
}

pub(super) fn backward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    grad: FlexTensor,
    options: &AttentionOptions,
    segments: Option<&Segments>,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (q, k, v, grad) = (Heads::readable(q), Heads::readable(k), Heads::readable(v), Heads::readable(grad));
    let problem = Problem { q: Heads::new(&q), k: Heads::new(&k), v: Heads::new(&v), options, segments };
    let grad = Heads::new(&grad);
    let [batch, heads, t, head_dim] = problem.q.dims;
    let [_, kv_heads, s, value_dim] = problem.v.dims;
    let rows = block_queries(s);
    let len = |tokens: usize, width: usize| batch * heads * tokens * width;
    // One gradient for each query head; those of a group are added up at the end, in order.
    let [mut dq, mut dk, mut dv] =
        [len(t, head_dim), len(s, head_dim), len(s, value_dim)].map(Vec::<f32>::with_capacity);
    let start = Start(dq.as_mut_ptr());
    let dks = dk.spare_capacity_mut()[..len(s, head_dim)].chunks_mut(s * head_dim);
    let dvs = dv.spare_capacity_mut()[..len(s, value_dim)].chunks_mut(s * value_dim);
    awake::each(dks.zip(dvs).enumerate().collect(), |(head, (dk, dv))| {
        let (dk, dv) = (cpu::zeroed(dk), cpu::zeroed(dv));
        let mut scratch = Scratch::default();
        for first in (0..t).step_by(rows) {
            let block = problem.block(*head, first, rows.min(t - first));
            let grad = grad.tokens(*head / heads, *head % heads, first, first + block.rows);
            let slopes = block.backward(&mut scratch, grad, dk, dv);
            let at = start.at(problem.query_row(*head, first) * head_dim);
            // SAFETY: there is room for each query of each head, which are this task's own.
            unsafe { gemm_rows(at, heads * head_dim, slopes, block.k) };
        }
    });
    // SAFETY: the tasks are all of it, and have written it.
    unsafe {
        dq.set_len(len(t, head_dim));
        dk.set_len(len(s, head_dim));
        dv.set_len(len(s, value_dim));
    }
    let shape = [batch, s, heads, kv_heads];
    (
        by_token(dq, [batch, t, heads, head_dim]),
        sum_groups(&dk, shape, head_dim),
        sum_groups(&dv, shape, value_dim),
    )
}

/// `[batch, heads, tokens, width]` with the heads of each group added up.
fn sum_groups(x: &[f32], [batch, tokens, heads, kv_heads]: [usize; 4], width: usize) -> FlexTensor {
    let (row, group) = (kv_heads * width, heads / kv_heads);
    let block = cpu::block_rows(row);
    let sums = cpu::fresh(batch * tokens * row, block * row, |i, out| {
        for (at, out) in out.chunks_exact_mut(width).enumerate() {
            let (token, kv_head) = (i * block + at / kv_heads, at % kv_heads);
            let first = token / tokens * heads + kv_head * group;
            for head in first..first + group {
                let part = &x[(head * tokens + token % tokens) * width..][..width];
                for (sum, &part) in out.iter_mut().zip(part) {
                    *sum += part;
                }
            }
        }
    });
    by_token(sums, [batch, tokens, kv_heads, width])
}

#[derive(Clone, Copy)]
struct Problem<'a> {
    q: Heads<'a>,
    k: Heads<'a>,
    v: Heads<'a>,
    options: &'a AttentionOptions,
    segments: Option<&'a Segments>,
}

impl<'a> Problem<'a> {
    /// Which row a query has where heads lie token by token; `head` is numbered through the batch.
    fn query_row(&self, head: usize, query: usize) -> usize {
        let [_, heads, t, _] = self.q.dims;
        (head / heads * t + query) * heads + head % heads
    }

    /// Queries `first..first + rows` of a head (numbered through the batch) and the keys any of them sees.
    fn block(&self, head: usize, first: usize, rows: usize) -> Block<'a> {
        let [_, heads, t, _] = self.q.dims;
        let [_, kv_heads, s, _] = self.k.dims;
        let (batch, head) = (head / heads, head % heads);
        let kv_head = head / (heads / kv_heads);
        let position = s - t + first;
        let last = position + rows - 1;
        let reach = self.options.window.unwrap_or(s).min(s);
        let starts = self.segments.map_or(&[][..], |segments| &segments.row(batch)[first..first + rows]);
        let begin = starts.first().map_or(0, |&start| start as usize);
        let from = (position + 1).saturating_sub(reach).max(begin);
        let to = if self.options.causal { last + 1 } else { (last + reach).min(s) };
        Block {
            q: self.q.tokens(batch, head, first, first + rows),
            k: self.k.tokens(batch, kv_head, from, to),
            v: self.v.tokens(batch, kv_head, from, to),
            rows,
            position,
            from,
            to,
            starts,
            options: self.options,
        }
    }
}

/// Some queries of one head with the keys and values they see.
struct Block<'a> {
    q: MatRef<'a, f32>,
    k: MatRef<'a, f32>,
    v: MatRef<'a, f32>,
    rows: usize,
    /// Absolute position of the first query.
    position: usize,
    /// Keys `from..to`.
    from: usize,
    to: usize,
    /// The first key of each query's document; empty where a row is one document.
    starts: &'a [u32],
    options: &'a AttentionOptions,
}

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    capped: Vec<f32>,
    slopes: Vec<f32>,
}

impl Block<'_> {
    fn keys(&self) -> usize {
        self.to - self.from
    }

    fn scores<'b>(&self, scores: &'b [f32]) -> MatRef<'b, f32> {
        MatRef::from_row_major_slice(&scores[..self.rows * self.keys()], self.rows, self.keys())
    }

    /// Fills `scores` with probabilities, and `capped` with the scores before the softmax if asked to.
    fn probabilities(&self, scores: &mut Vec<f32>, capped: Option<&mut Vec<f32>>) {
        scores.resize(self.rows * self.keys(), 0.0);
        gemm(scores, false, self.q, self.k.transpose(), self.options.scale as f32);
        if let Some(cap) = self.options.softcap {
            Arch::new().dispatch(Cap { scores, cap: cap as f32 });
            if let Some(capped) = capped {
                capped.clear();
                capped.extend_from_slice(scores);
            }
        }
        Arch::new().dispatch(MaskedSoftmax { scores, block: self });
    }

    /// Keys that query `row` sees, counted from `from`.
    #[inline(always)]
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let position = self.position + row;
        let reach = self.options.window.unwrap_or(usize::MAX);
        let begin = self.starts.get(row).map_or(self.from, |&start| start as usize);
        let from = (position + 1).saturating_sub(reach).max(begin);
        let to = if self.options.causal { position + 1 } else { position.saturating_add(reach).min(self.to) };
        from - self.from..to - self.from
    }

    /// The gradient of `q k^T`; those of keys and values are added to.
    fn backward<'b>(
        &self,
        scratch: &'b mut Scratch,
        grad: MatRef<'_, f32>,
        dk: &mut [f32],
        dv: &mut [f32],
    ) -> MatRef<'b, f32> {
        let Scratch { scores, capped, slopes } = scratch;
        self.probabilities(scores, Some(&mut *capped));
        let (head_dim, value_dim) = (self.q.ncols(), self.v.ncols());
        let dv = &mut dv[self.from * value_dim..self.to * value_dim];
        gemm(dv, true, self.scores(scores).transpose(), grad, 1.0);
        slopes.resize(self.rows * self.keys(), 0.0);
        gemm(slopes, false, grad, self.v.transpose(), 1.0);
        let (cap, scale) = (self.options.softcap.map(|cap| cap as f32), self.options.scale as f32);
        let keys = self.keys();
        Arch::new().dispatch(ScoreGradient { probabilities: scores, slopes, capped, cap, scale, keys });
        let slopes = self.scores(slopes);
        gemm(&mut dk[self.from * head_dim..self.to * head_dim], true, slopes.transpose(), self.q, 1.0);
        slopes
    }
}

struct Cap<'a> {
    scores: &'a mut [f32],
    cap: f32,
}

impl WithSimd for Cap<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for score in self.scores {
            *score = self.cap * cpu::tanh(*score / self.cap);
        }
    }
}

struct MaskedSoftmax<'a> {
    scores: &'a mut [f32],
    block: &'a Block<'a>,
}

impl WithSimd for MaskedSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (i, row) in self.scores.chunks_exact_mut(self.block.keys()).enumerate() {
            let visible = self.block.visible(i);
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            let row = &mut row[visible];
            let max = cpu::max(row);
            for score in row.iter_mut() {
                *score = cpu::exp(*score - max);
            }
            let norm = 1.0 / cpu::sum([row], |[p]| p);
            for score in row.iter_mut() {
                *score *= norm;
            }
        }
    }
}

/// Turns `slopes` from the gradient of the probabilities into the gradient of `q k^T`.
struct ScoreGradient<'a> {
    probabilities: &'a [f32],
    slopes: &'a mut [f32],
    capped: &'a [f32],
    cap: Option<f32>,
    scale: f32,
    keys: usize,
}

impl WithSimd for ScoreGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.slopes.chunks_exact_mut(self.keys).zip(self.probabilities.chunks_exact(self.keys));
        for (i, (slopes, p)) in rows.enumerate() {
            let mean = cpu::sum([p, slopes], |[p, slope]| p * slope);
            for (slope, &p) in slopes.iter_mut().zip(p) {
                *slope = p * (*slope - mean) * self.scale;
            }
            if let Some(cap) = self.cap {
                for (slope, &score) in slopes.iter_mut().zip(&self.capped[i * self.keys..]) {
                    let tanh = score / cap;
                    *slope *= 1.0 - tanh * tanh;
                }
            }
        }
    }
}
