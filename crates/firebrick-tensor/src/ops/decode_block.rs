//! One block of a decoder for one new token, on the CPU in one call: what a token costs beside reading weights is mostly calls of ops.
//!
//! Products use the kernels of [`linear`](super::linear()) and [`packed_matmul`](super::packed_matmul), all that read the same input in
//! one parallel region. Attention goes over parts of the past, whose softmaxes are put together (Dao et al. 2023, Flash-Decoding).

use std::sync::Arc;
use std::{fmt, ptr};

use burn::module::Module;
use burn::tensor::Tensor;
use burn_backend::{Shape, TensorMetadata};
use burn_flex::{Flex, FlexTensor};
use half::{f16, slice::HalfFloatSliceExt};
use pulp::{Arch, Simd, WithSimd};

use super::packed::{Rows, Scales, Weight};
use super::packed_dots::{self, Level};
use super::{
    AttentionOptions, KvCache, PackedInputs, PackedMatrix, awake, cpu, linear, rms_norm, rope, swiglu,
};

/// A packed matrix that stands in for the weight of a linear layer, and how it takes its inputs.
#[derive(Module, Debug)]
pub struct PackedWeight {
    /// The matrix.
    pub matrix: PackedMatrix,
    /// How inputs of its products are taken.
    #[module(skip)]
    pub inputs: PackedInputs,
}

impl PackedWeight {
    /// The matrix as [`decode_block`] reads it; `None` where it has no kernel.
    pub fn for_block(&self) -> Option<BlockPacked> {
        let layout = self.matrix.layout();
        let float = |x: &Tensor<3>| x.clone().try_into_primitive::<Flex>().ok();
        let words = self.matrix.words.clone().try_into_primitive::<Flex>().ok()?;
        let (scale, zero) = (float(&self.matrix.scale)?, float(&self.matrix.zero)?);
        let fits = Weight::has_kernel(&words, &scale, &zero)
            && (self.inputs == PackedInputs::Exact || packed_dots::applies(layout));
        if !fits {
            return None;
        }
        let tensors = Arc::new([words, scale, zero].map(cpu::contiguous));
        let [words, scale, zero] = tensors.as_ref();
        let Weight { words, scale, zero, .. } = Weight::new(words, scale, zero, layout);
        // SAFETY: memory of tensors that the result holds, and that nobody writes while it is shared.
        let weight = unsafe {
            let scale = match scale {
                Scales::F32(scale) => Scales::F32(&*ptr::from_ref(scale)),
                Scales::F16(scale) => Scales::F16(&*ptr::from_ref(scale)),
            };
            Weight { words: &*ptr::from_ref(words), scale, zero: &*ptr::from_ref(zero), layout }
        };
        Some(BlockPacked { weight, inputs: self.inputs, _tensors: tensors })
    }
}

/// A [`PackedWeight`] on the CPU, its memory at hand: to find it takes about as long as a small product, as what says where it is has left
/// the caches since the token before.
#[derive(Clone)]
pub struct BlockPacked {
    /// Of the tensors; given out for no longer than they live.
    weight: Weight<'static>,
    inputs: PackedInputs,
    _tensors: Arc<[FlexTensor; 3]>,
}

impl fmt::Debug for BlockPacked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPacked").field("layout", &self.weight.layout).finish_non_exhaustive()
    }
}

/// The weight of a linear layer.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // seven live for the time of a call
pub enum BlockMatrix<'a> {
    /// `[d_in, d_out]`, f32 or stored in bf16.
    Dense(Tensor<2>),
    /// Low-bit codes.
    Packed(&'a BlockPacked),
}

/// A linear layer of a block.
#[derive(Debug, Clone)]
pub struct BlockLinear<'a> {
    /// The weight.
    pub weight: BlockMatrix<'a>,
    /// `[d_out]`.
    pub bias: Option<Tensor<1>>,
}

/// The weights of a block, in the order in which they are used.
#[derive(Debug, Clone)]
pub struct BlockWeights<'a> {
    /// `[d_model]`.
    pub attn_norm: Tensor<1>,
    /// To `heads * head_dim`.
    pub q: BlockLinear<'a>,
    /// To `kv_heads * head_dim`.
    pub k: BlockLinear<'a>,
    /// To `kv_heads * head_dim`.
    pub v: BlockLinear<'a>,
    /// Of each query head, `[head_dim]`.
    pub q_norm: Option<Tensor<1>>,
    /// Of each key head, `[head_dim]`.
    pub k_norm: Option<Tensor<1>>,
    /// Back to `d_model`.
    pub o: BlockLinear<'a>,
    /// Of what attention adds, `[d_model]`.
    pub attn_post_norm: Option<Tensor<1>>,
    /// `[d_model]`.
    pub mlp_norm: Tensor<1>,
    /// To the inner width.
    pub gate: BlockLinear<'a>,
    /// To the inner width.
    pub up: BlockLinear<'a>,
    /// Back to `d_model`.
    pub down: BlockLinear<'a>,
    /// Of what the feed-forward network adds, `[d_model]`.
    pub mlp_post_norm: Option<Tensor<1>>,
}

/// What the gate of a feed-forward network passes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `x sigmoid(x)`.
    Silu,
    /// The Gaussian error linear unit, its approximation by a hyperbolic tangent.
    GeluTanh,
}

/// Settings of [`decode_block`].
#[derive(Debug, Clone, PartialEq)]
pub struct BlockOptions {
    /// Added to the mean square in each norm.
    pub norm_eps: f64,
    /// Norms multiply by their weight plus one (Gemma).
    pub norm_plus_one: bool,
    /// Values of a head.
    pub head_dim: usize,
    /// Scale, window and soft cap of the scores. A new token has no later ones: causal or not is the same.
    pub attention: AttentionOptions,
    /// Of the feed-forward network.
    pub gate: Gate,
}

/// The residual stream behind a block for one new token, whose key and value go to the end of `layer` of the cache; `None`, and
/// nothing changed, where there is no kernel: on other devices than the CPU, where gradients are recorded, other types than f32 (and bf16 of weights), an
/// empty or full layer of the cache, or one of several sequences.
///
/// - x: `[1, 1, d_model]`
/// - cos, sin: of the new token, `[1, head_dim / 2]`
/// - result: `[1, 1, d_model]`
///
/// # Panics
/// If a shape disagrees.
pub fn decode_block(
    x: &Tensor<3>,
    weights: &BlockWeights<'_>,
    cache: &mut KvCache,
    layer: usize,
    [cos, sin]: [&Tensor<2>; 2],
    options: &BlockOptions,
) -> Option<Tensor<3>> {
    let d_model = x.dims()[2];
    assert_eq!(x.dims(), [1, 1, d_model], "decode_block: shape of x");
    let block = Block::new(weights, options)?;
    let (x, cos, sin) = (flex(x)?, flex(cos)?, flex(sin)?);
    let [x, cos, sin] = [&x, &cos, &sin].map(|t| t.storage::<f32>());
    let y = cache.on_cpu(layer, |past| block.run(x, past, [cos, sin]))?;
    Some(Tensor::from_primitive::<Flex>(cpu::tensor(y, Shape::new([1, 1, d_model]))))
}

/// The values of `x`, if they are f32 on the CPU and no gradients are recorded.
fn flex<const D: usize>(x: &Tensor<D>) -> Option<FlexTensor> {
    let x = x.clone().try_into_primitive::<Flex>().ok()?;
    cpu::all_f32(&[&x]).then(|| cpu::contiguous(x))
}

/// What a layer of the cache holds: keys and values `[kv_heads, capacity, head_dim]`, the first `len` of each head filled.
pub(super) struct Past<'a> {
    pub keys: Stored<'a>,
    pub values: Stored<'a>,
    pub kv_heads: usize,
    pub len: usize,
}

/// Values of a cache.
pub(super) enum Stored<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
}

impl Stored<'_> {
    fn len(&self) -> usize {
        match self {
            Stored::F32(x) => x.len(),
            Stored::F16(x) => x.len(),
        }
    }

    fn write(&mut self, at: usize, values: &[f32]) {
        match self {
            Stored::F32(x) => x[at..][..values.len()].copy_from_slice(values),
            Stored::F16(x) => x[at..][..values.len()].convert_from_f32_slice(values),
        }
    }

    /// Asks for `len` values from `at` on, as far as there are some.
    #[inline(always)]
    fn ask(&self, at: usize, len: usize) {
        let within = at.min(self.len())..(at + len).min(self.len());
        let bytes: &[u8] = match self {
            Stored::F32(x) => bytemuck::cast_slice(&x[within]),
            Stored::F16(x) => bytemuck::cast_slice(&x[within]),
        };
        for line in bytes.iter().step_by(cpu::LINE) {
            cpu::prefetch(line);
        }
    }

    /// `len` values from `at` on, brought to f32 in `room` if they are not.
    fn read<'x>(&'x self, at: usize, len: usize, room: &'x mut [f32]) -> &'x [f32] {
        match self {
            Stored::F32(x) => &x[at..][..len],
            Stored::F16(x) => {
                cpu::widen(&x[at..][..len], &mut room[..len]);
                &room[..len]
            }
        }
    }
}

/// [`BlockWeights`] as kernels read them.
struct Block<'a> {
    attn_norm: Gain,
    qkv: [Linear<'a>; 3],
    q_norm: Option<Gain>,
    k_norm: Option<Gain>,
    o: [Linear<'a>; 1],
    attn_post_norm: Option<Gain>,
    mlp_norm: Gain,
    gate_up: [Linear<'a>; 2],
    down: [Linear<'a>; 1],
    mlp_post_norm: Option<Gain>,
    options: &'a BlockOptions,
    level: Level,
}

struct Linear<'a> {
    matrix: Matrix<'a>,
    bias: Option<FlexTensor>,
}

enum Matrix<'a> {
    /// `[d_in, d_out]`, the weights of an output together.
    Dense(FlexTensor),
    Packed(&'a BlockPacked),
}

impl<'w> Matrix<'w> {
    fn new(matrix: &BlockMatrix<'w>) -> Option<Self> {
        match matrix {
            BlockMatrix::Dense(weight) => {
                let weight = weight.clone().try_into_primitive::<Flex>().ok()?;
                let f32 = linear::is_by_output(&weight) && cpu::all_f32(&[&weight]);
                (f32 || linear::words(&weight).is_some()).then_some(Matrix::Dense(weight))
            }
            BlockMatrix::Packed(packed) => Some(Matrix::Packed(packed)),
        }
    }

    /// Its product with `x`, to be computed part by part; takes `x` from one of the `others` if it reads the same.
    fn product<'a>(&'a self, x: &'a [f32], others: &[Product<'a>]) -> Product<'a> {
        let (d_in, product) = match self {
            Matrix::Dense(weight) => {
                let [d_in, d_out] = [weight.shape()[0], weight.shape()[1]];
                let product = match linear::words(weight) {
                    Some(words) => Product::Halves { x: linear::by_half(x, x.len()), words },
                    None => {
                        let first = weight.layout().start_offset();
                        Product::Dense { x, weights: &weight.storage::<f32>()[first..][..d_in * d_out] }
                    }
                };
                (d_in, product)
            }
            Matrix::Packed(BlockPacked { weight, inputs, .. }) => {
                let alike = others.iter().find_map(|other| match other {
                    Product::Packed { rows, .. } if rows.fit(weight.layout, *inputs) => Some(rows.clone()),
                    _ => None,
                });
                let rows = alike.unwrap_or_else(|| Arc::new(Rows::new(x, weight.layout, *inputs)));
                (weight.layout.d_in, Product::Packed { rows, weight: *weight })
            }
        };
        assert_eq!(x.len(), d_in, "decode_block: input of a linear layer");
        product
    }
}

/// A product of one row.
enum Product<'a> {
    Dense {
        x: &'a [f32],
        weights: &'a [f32],
    },
    /// Of weights in bf16, with the inputs in the order of [`linear::by_half`].
    Halves {
        x: Vec<f32>,
        words: &'a [u32],
    },
    Packed {
        rows: Arc<Rows<'a>>,
        weight: Weight<'a>,
    },
}

impl Product<'_> {
    /// Outputs, and how many of them are a task.
    fn outputs(&self) -> (usize, usize) {
        match self {
            Product::Dense { x, weights } => (weights.len() / x.len(), linear::task(x.len())),
            Product::Halves { x, words } => (2 * words.len() / x.len(), linear::task(x.len())),
            Product::Packed { weight, .. } => (weight.layout.d_out, weight.task()),
        }
    }

    /// Outputs from `first` on; `out` is zero at first.
    fn columns(&self, level: Level, first: usize, out: &mut [f32]) {
        match self {
            Product::Dense { x, weights } => linear::outputs_of_row(x, &weights[first * x.len()..], out),
            Product::Halves { x, words } => linear::outputs_of_row(x, &words[first * x.len() / 2..], out),
            Product::Packed { rows, weight } => rows.columns(weight, level, first, out),
        }
    }
}

/// What a norm multiplies by.
struct Gain(Vec<f32>);

impl Gain {
    fn new(weight: &Tensor<1>, options: &BlockOptions) -> Option<Self> {
        let one = if options.norm_plus_one { 1.0 } else { 0.0 };
        Some(Gain(flex(weight)?.storage::<f32>().iter().map(|w| w + one).collect()))
    }
}

impl<'a> Block<'a> {
    fn new(w: &BlockWeights<'a>, options: &'a BlockOptions) -> Option<Self> {
        let norm = |weight: &Tensor<1>| Gain::new(weight, options);
        let maybe = |weight: &Option<Tensor<1>>| match weight {
            Some(weight) => norm(weight).map(Some),
            None => Some(None),
        };
        let linear = |linear: &BlockLinear<'a>| {
            let bias = match &linear.bias {
                Some(bias) => Some(flex(bias)?),
                None => None,
            };
            Some(Linear { matrix: Matrix::new(&linear.weight)?, bias })
        };
        Some(Block {
            attn_norm: norm(&w.attn_norm)?,
            qkv: [linear(&w.q)?, linear(&w.k)?, linear(&w.v)?],
            q_norm: maybe(&w.q_norm)?,
            k_norm: maybe(&w.k_norm)?,
            o: [linear(&w.o)?],
            attn_post_norm: maybe(&w.attn_post_norm)?,
            mlp_norm: norm(&w.mlp_norm)?,
            gate_up: [linear(&w.gate)?, linear(&w.up)?],
            down: [linear(&w.down)?],
            mlp_post_norm: maybe(&w.mlp_post_norm)?,
            options,
            level: Level::best(),
        })
    }

    /// The residual stream behind the block.
    fn run(&self, x: &[f32], past: Past<'_>, [cos, sin]: [&[f32]; 2]) -> Vec<f32> {
        let mut stream = x.to_vec();
        let mut normed = x.to_vec();
        self.norm(&mut normed, &self.attn_norm);
        let [mut q, mut k, v] = self.products(&normed, &self.qkv);
        for (heads, norm) in [(&mut q, &self.q_norm), (&mut k, &self.k_norm)] {
            if let Some(norm) = norm {
                self.norm(heads, norm);
            }
            rope::turn_heads(heads, cos, sin);
        }
        let mixed = self.attention(&q, &k, &v, past);
        self.add(&mut stream, self.products(&mixed, &self.o), &self.attn_post_norm);

        normed.copy_from_slice(&stream);
        self.norm(&mut normed, &self.mlp_norm);
        let [gate, mut inner] = self.products(&normed, &self.gate_up);
        match self.options.gate {
            Gate::Silu => swiglu::gated(&gate, &mut inner),
            Gate::GeluTanh => Arch::new().dispatch(GeluGate { gate: &gate, inner: &mut inner }),
        }
        self.add(&mut stream, self.products(&inner, &self.down), &self.mlp_post_norm);
        stream
    }

    /// Norms rows as long as the gain, in place.
    fn norm(&self, rows: &mut [f32], gain: &Gain) {
        assert!(rows.len().is_multiple_of(gain.0.len()), "decode_block: {} values normed", rows.len());
        rms_norm::in_place(rows, &gain.0, self.options.norm_eps as f32);
    }

    /// Adds a branch, normed if it has a norm.
    fn add(&self, stream: &mut [f32], [mut branch]: [Vec<f32>; 1], norm: &Option<Gain>) {
        if let Some(norm) = norm {
            self.norm(&mut branch, norm);
        }
        assert_eq!(stream.len(), branch.len(), "decode_block: width of a branch");
        stream.iter_mut().zip(branch).for_each(|(x, y)| *x += y);
    }

    /// What linear layers make of the same input, all in one parallel region.
    fn products<const N: usize>(&self, x: &[f32], linears: &[Linear<'_>; N]) -> [Vec<f32>; N] {
        let mut products = Vec::with_capacity(N);
        for linear in linears {
            products.push(linear.matrix.product(x, &products));
        }
        let mut outs: [Vec<f32>; N] = std::array::from_fn(|i| vec![0.0; products[i].outputs().0]);
        let mut tasks = Vec::new();
        for (product, out) in products.iter().zip(&mut outs) {
            let (_, size) = product.outputs();
            tasks.extend(out.chunks_mut(size).enumerate().map(|(part, out)| (product, part * size, out)));
        }
        awake::parts(&mut tasks, 1, |_, task| {
            for (product, first, out) in task {
                product.columns(self.level, *first, out);
            }
        });
        for (out, linear) in outs.iter_mut().zip(linears) {
            if let Some(bias) = &linear.bias {
                out.iter_mut().zip(bias.storage::<f32>()).for_each(|(y, b)| *y += b);
            }
        }
        outs
    }

    /// Puts `k` and `v` behind the past and mixes what `q` sees of it, `[heads * head_dim]`.
    fn attention(&self, q: &[f32], k: &[f32], v: &[f32], past: Past<'_>) -> Vec<f32> {
        let (d, Past { mut keys, mut values, kv_heads, len }) = (self.options.head_dim, past);
        let capacity = keys.len() / (kv_heads * d);
        assert!(k.len() == kv_heads * d && v.len() == k.len(), "decode_block: new key and value");
        assert!(q.len().is_multiple_of(k.len()), "decode_block: queries for {kv_heads} key heads");
        for head in 0..kv_heads {
            keys.write((head * capacity + len) * d, &k[head * d..][..d]);
            values.write((head * capacity + len) * d, &v[head * d..][..d]);
        }
        let to = len + 1;
        let from = to.saturating_sub(self.options.attention.window.unwrap_or(to));
        let (first, group) = (from / KEYS, q.len() / k.len());
        let chunks = to.div_ceil(KEYS) - first;
        // Of each query: what it mixes, its largest score, and the sum of its weights.
        let width = d + 2;
        let mut parts = vec![0.0; kv_heads * chunks * group * width];
        awake::parts(&mut parts, group * width, |i, out| {
            let (head, chunk) = (i / chunks, first + i % chunks);
            let (from, to) = ((chunk * KEYS).max(from), ((chunk + 1) * KEYS).min(to));
            Arch::new().dispatch(Part {
                q: &q[head * group * d..][..group * d],
                keys: &keys,
                values: &values,
                first: head * capacity + from,
                count: to - from,
                options: &self.options.attention,
                d,
                out,
            });
        });
        let mut mixed = vec![0.0; q.len()];
        for (query, mixed) in mixed.chunks_exact_mut(d).enumerate() {
            let (head, member) = (query / group, query % group);
            let parts =
                || (0..chunks).map(|c| &parts[((head * chunks + c) * group + member) * width..][..width]);
            let largest = parts().map(|part| part[d]).fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for part in parts() {
                let factor = (part[d] - largest).exp();
                total += factor * part[d + 1];
                mixed.iter_mut().zip(part).for_each(|(y, x)| *y += factor * x);
            }
            mixed.iter_mut().for_each(|y| *y /= total);
        }
        mixed
    }
}

/// Keys of a task.
const KEYS: usize = 128;

/// Keys that are brought to f32 together, a multiple of four.
const TILE: usize = 16;

/// Keys or values from those that are read to those that are asked for.
const AHEAD: usize = 2 * TILE;

/// Queries of the heads that share a key head, against some of its keys.
struct Part<'a> {
    q: &'a [f32],
    keys: &'a Stored<'a>,
    values: &'a Stored<'a>,
    /// Number of the first key, and how many there are.
    first: usize,
    count: usize,
    options: &'a AttentionOptions,
    d: usize,
    /// For each query: `d` mixed values, the largest score, the sum of weights.
    out: &'a mut [f32],
}

impl WithSimd for Part<'_> {
    type Output = ();

    // Loops, as closures would be compiled without the instructions of `S`.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (d, count) = (self.d, self.count);
        let group = self.q.len() / d;
        let mut room = vec![0.0; TILE * d];
        let mut scores = vec![0.0; group * KEYS];
        // Each key is read once for all queries, and each value.
        for tile in (0..count).step_by(TILE) {
            let n = TILE.min(count - tile);
            match tile + n < count {
                true => self.keys.ask((self.first + tile + AHEAD) * d, TILE * d),
                false => self.values.ask(self.first * d, AHEAD * d),
            }
            let keys = self.keys.read((self.first + tile) * d, n * d, &mut room);
            for (q, scores) in self.q.chunks_exact(d).zip(scores.chunks_exact_mut(KEYS)) {
                let scores = &mut scores[tile..][..n];
                let (fours, rest) = scores.as_chunks_mut::<4>();
                for (keys, scores) in keys.chunks_exact(4 * d).zip(fours.iter_mut()) {
                    *scores = linear::dots(simd, q, fourths(keys, d));
                }
                for (key, score) in keys[fours.len() * 4 * d..].chunks_exact(d).zip(rest) {
                    [*score] = linear::dots(simd, q, [key]);
                }
            }
        }
        for (scores, out) in scores.chunks_exact_mut(KEYS).zip(self.out.chunks_exact_mut(d + 2)) {
            let scores = &mut scores[..count];
            let scale = self.options.scale as f32;
            for score in scores.iter_mut() {
                *score *= scale;
            }
            if let Some(cap) = self.options.softcap {
                let cap = cap as f32;
                for score in scores.iter_mut() {
                    *score = cap * cpu::tanh(*score / cap);
                }
            }
            let largest = cpu::max(scores);
            for score in scores.iter_mut() {
                *score = cpu::exp(*score - largest);
            }
            out[d..].copy_from_slice(&[largest, cpu::sum([scores], |[score]| score)]);
        }
        for tile in (0..count).step_by(TILE) {
            let n = TILE.min(count - tile);
            self.values.ask((self.first + tile + AHEAD) * d, TILE * d);
            let values = self.values.read((self.first + tile) * d, n * d, &mut room);
            for (scores, out) in scores.chunks_exact(KEYS).zip(self.out.chunks_exact_mut(d + 2)) {
                add_weighted(simd, &scores[tile..][..n], values, &mut out[..d]);
            }
        }
    }
}

/// Adds each row of `rows` times its weight to `out`; a vector of sums stays in its register through all rows.
#[inline(always)]
fn add_weighted<S: Simd>(simd: S, weights: &[f32], rows: &[f32], out: &mut [f32]) {
    let d = out.len();
    let (out, tail) = S::as_mut_simd_f32s(out);
    for (i, out) in out.iter_mut().enumerate() {
        let mut sum = *out;
        for (&p, row) in weights.iter().zip(rows.chunks_exact(d)) {
            sum = simd.mul_add_e_f32s(simd.splat_f32s(p), S::as_simd_f32s(row).0[i], sum);
        }
        *out = sum;
    }
    let whole = d - tail.len();
    for (&p, row) in weights.iter().zip(rows.chunks_exact(d)) {
        for (y, x) in tail.iter_mut().zip(&row[whole..]) {
            *y += p * x;
        }
    }
}

/// Four rows of `d` values.
#[inline(always)]
fn fourths(rows: &[f32], d: usize) -> [&[f32]; 4] {
    let (a, rest) = rows.split_at(d);
    let (b, rest) = rest.split_at(d);
    let (c, e) = rest.split_at(d);
    [&a[..d], &b[..d], &c[..d], &e[..d]]
}

/// `gelu(gate) * inner`, in place.
struct GeluGate<'a> {
    gate: &'a [f32],
    inner: &'a mut [f32],
}

impl WithSimd for GeluGate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const SLOPE: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
        for (y, &g) in self.inner.iter_mut().zip(self.gate) {
            *y *= 0.5 * g * (1.0 + cpu::tanh((g + 0.044_715 * g * g * g) * SLOPE));
        }
    }
}
