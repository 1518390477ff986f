//! The block of one new token beside the same in f64, value by value.

use burn::tensor::{DType, Device};
use firebrick_tensor::ops::{
    AttentionOptions, BlockLinear, BlockMatrix, BlockOptions, BlockPacked, BlockWeights, Gate, KvCache,
    PackedInputs, PackedMatrix, PackedWeight, decode_block,
};

use super::support::{error, flat, host, normal, wide};

#[derive(Clone, Copy)]
struct Shape {
    d: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    inner: usize,
    /// Tokens in the cache.
    past: usize,
    /// Biases, norms of heads and behind branches, a window, a soft cap, GELU.
    extras: bool,
    packed: Option<PackedInputs>,
    /// Dense weights are stored in bf16.
    half: bool,
}

const LLAMA: Shape = Shape {
    d: 36,
    heads: 6,
    kv_heads: 2,
    head_dim: 10,
    inner: 67,
    past: 1,
    extras: false,
    packed: None,
    half: false,
};

/// Everything that a block is made of, on the host.
struct Model {
    shape: Shape,
    vectors: Vec<(&'static str, Vec<f32>)>,
    /// Inputs, outputs and values `[d_out, d_in]`.
    dense: Vec<(&'static str, usize, usize, Vec<f32>)>,
    packed: Vec<(&'static str, PackedWeight)>,
    x: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    angles: Vec<f32>,
    options: BlockOptions,
}

impl Model {
    fn new(shape: Shape) -> Self {
        let Shape { d, heads, kv_heads, head_dim, inner, past, extras, packed, half } = shape;
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let linears = [
            ("q", d, width),
            ("k", d, kv_width),
            ("v", d, kv_width),
            ("o", width, d),
            ("gate", d, inner),
            ("up", d, inner),
            ("down", inner, d),
        ];
        let mut model = Model {
            shape,
            vectors: Vec::new(),
            dense: Vec::new(),
            packed: Vec::new(),
            x: normal("x", d),
            keys: normal("keys", kv_width * past),
            values: normal("values", kv_width * past),
            angles: normal("angles", head_dim / 2),
            options: BlockOptions {
                norm_eps: 1e-3,
                norm_plus_one: extras,
                head_dim,
                attention: AttentionOptions {
                    scale: 0.3,
                    causal: true,
                    window: extras.then_some(140),
                    softcap: extras.then_some(1.5),
                },
                gate: if extras { Gate::GeluTanh } else { Gate::Silu },
            },
        };
        for (name, n) in [("attn_norm", d), ("mlp_norm", d)] {
            model.vectors.push((name, normal(name, n)));
        }
        if extras {
            for (name, n) in
                [("q_norm", head_dim), ("k_norm", head_dim), ("attn_post_norm", d), ("mlp_post_norm", d)]
            {
                model.vectors.push((name, normal(name, n)));
            }
            model
                .vectors
                .extend(linears.map(|(name, _, d_out)| (name, normal(&format!("{name} bias"), d_out))));
        }
        for (i, (name, d_in, d_out)) in linears.into_iter().enumerate() {
            let stored = |w: f32| if half { half::bf16::from_f32(w).to_f32() } else { w };
            let values: Vec<f32> =
                normal(name, d_in * d_out).iter().map(|w| stored(w / (d_in as f32).sqrt())).collect();
            // Some packed, some not.
            let Some(inputs) = packed.filter(|_| i % 3 != 1) else {
                model.dense.push((name, d_in, d_out, values));
                continue;
            };
            let bits = if i % 2 == 0 { 4 } else { 8 };
            let code = |v: &f32| ((v * 1e5).abs() as usize % (1 << bits)) as u8;
            let codes: Vec<u8> = values.iter().map(code).collect();
            let groups = d_in.div_ceil(32);
            let device = Device::flex();
            let table = |name: &str, factor: f32, more: f32| {
                let values: Vec<f32> =
                    normal(name, groups * d_out).iter().map(|v| v * factor + more).collect();
                flat(&values, &device, DType::F32).reshape([groups, d_out])
            };
            let unit = 0.3 / (1 << bits) as f32;
            let (scale, zero) = (table("scale", unit, 0.0), table("zero", 1.0, (1 << (bits - 1)) as f32));
            let matrix = PackedMatrix::pack(&codes, d_in, d_out, bits, 32, scale, zero);
            model.packed.push((name, PackedWeight { matrix, inputs }));
        }
        model
    }

    fn vector(&self, name: &str) -> Option<&Vec<f32>> {
        self.vectors.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// The matrix `[d_out, d_in]` in f64.
    fn matrix(&self, name: &str) -> (usize, Vec<f64>) {
        if let Some((_, d_in, _, values)) = self.dense.iter().find(|(n, ..)| *n == name) {
            return (*d_in, wide(values));
        }
        let (_, weight) = self.packed.iter().find(|(n, _)| *n == name).expect("dense or packed");
        let PackedMatrix { d_in, d_out, .. } = weight.matrix;
        (d_in, host(weight.matrix.unpack().transpose().reshape([d_in * d_out])))
    }

    /// A cache with the past, with room for `more` tokens.
    fn cache(&self, more: usize, batch: usize, dtype: DType, device: &Device) -> KvCache {
        let Shape { kv_heads, head_dim, past, .. } = self.shape;
        let cache = KvCache::new(2, batch, kv_heads, past + more, head_dim, device);
        let mut cache = if dtype == DType::F16 { cache.in_f16() } else { cache };
        let of = |x: &[f32]| {
            let one = flat(x, device, dtype).reshape([1, kv_heads, past, head_dim]);
            one.repeat_dim(0, batch)
        };
        if past > 0 {
            cache.append(1, of(&self.keys), of(&self.values));
        }
        cache
    }

    fn run(&self, cache: &mut KvCache, dtype: DType, device: &Device) -> Option<Vec<f64>> {
        let vector = |name: &str| self.vector(name).map(|v| flat(v, device, dtype));
        let stored = if self.shape.half { DType::BF16 } else { dtype };
        let packed: Vec<(&str, Option<BlockPacked>)> =
            self.packed.iter().map(|(name, weight)| (*name, weight.for_block())).collect();
        let linear = |name: &str| {
            let dense = self.dense.iter().find(|(n, ..)| *n == name);
            let weight = match dense {
                Some((_, d_in, d_out, values)) => {
                    BlockMatrix::Dense(flat(values, device, stored).reshape([*d_out, *d_in]).transpose())
                }
                None => BlockMatrix::Packed(packed.iter().find(|(n, _)| *n == name)?.1.as_ref()?),
            };
            Some(BlockLinear { weight, bias: vector(name) })
        };
        let weights = BlockWeights {
            attn_norm: vector("attn_norm")?,
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            q_norm: vector("q_norm"),
            k_norm: vector("k_norm"),
            o: linear("o")?,
            attn_post_norm: vector("attn_post_norm"),
            mlp_norm: vector("mlp_norm")?,
            gate: linear("gate")?,
            up: linear("up")?,
            down: linear("down")?,
            mlp_post_norm: vector("mlp_post_norm"),
        };
        let (d, half) = (self.shape.d, self.shape.head_dim / 2);
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = self.angles.iter().map(|a| f(*a)).collect();
            flat(&values, device, dtype).reshape([1, half])
        };
        let x = flat(&self.x, device, dtype).reshape([1, 1, d]);
        let y = decode_block(&x, &weights, cache, 1, [&table(f32::cos), &table(f32::sin)], &self.options)?;
        Some(host(y.reshape([d])))
    }

    /// The result by the definitions.
    fn reference(&self) -> Vec<f64> {
        let Shape { heads, kv_heads, head_dim, past, .. } = self.shape;
        let options = &self.options;
        let norm = |rows: &mut [f64], name: &str| {
            let Some(gain) = self.vector(name) else { return };
            for row in rows.chunks_mut(gain.len()) {
                let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
                for (v, g) in row.iter_mut().zip(gain) {
                    let g = f64::from(*g) + f64::from(u8::from(options.norm_plus_one));
                    *v *= g / (mean + options.norm_eps).sqrt();
                }
            }
        };
        let linear = |x: &[f64], name: &str| -> Vec<f64> {
            let (d_in, matrix) = self.matrix(name);
            let rows = matrix.chunks(d_in).enumerate();
            rows.map(|(o, row)| {
                let bias = self.vector(name).map_or(0.0, |bias| f64::from(bias[o]));
                row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias
            })
            .collect()
        };
        let turn = |heads: &mut [f64]| {
            for head in heads.chunks_mut(head_dim) {
                for (j, angle) in self.angles.iter().enumerate() {
                    let (c, s) = (f64::from(angle.cos()), f64::from(angle.sin()));
                    let (a, b) = (head[j], head[j + head_dim / 2]);
                    (head[j], head[j + head_dim / 2]) = (a * c - b * s, b * c + a * s);
                }
            }
        };
        let x = wide(&self.x);
        let mut normed = x.clone();
        norm(&mut normed, "attn_norm");
        let (mut q, mut k, v) = (linear(&normed, "q"), linear(&normed, "k"), linear(&normed, "v"));
        norm(&mut q, "q_norm");
        norm(&mut k, "k_norm");
        turn(&mut q);
        turn(&mut k);
        let mut mixed = Vec::new();
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let row = |of: &[f32], new: &[f64], token: usize| match token == past {
                true => new[kv * head_dim..][..head_dim].to_vec(),
                false => wide(&of[(kv * past + token) * head_dim..][..head_dim]),
            };
            let from = (past + 1).saturating_sub(options.attention.window.unwrap_or(past + 1));
            let scores: Vec<f64> = (from..=past)
                .map(|t| {
                    let key = row(&self.keys, &k, t);
                    let score: f64 = q[head * head_dim..].iter().zip(&key).map(|(q, k)| q * k).sum();
                    let score = score * options.attention.scale;
                    options.attention.softcap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            let mut sum = vec![0.0; head_dim];
            for (t, score) in (from..=past).zip(&scores) {
                let value = row(&self.values, &v, t);
                sum.iter_mut().zip(value).for_each(|(s, v)| *s += score / total * v);
            }
            mixed.extend(sum);
        }
        let add = |x: Vec<f64>, mut branch: Vec<f64>, name: &str| -> Vec<f64> {
            norm(&mut branch, name);
            x.iter().zip(branch).map(|(x, y)| x + y).collect()
        };
        let x = add(x, linear(&mixed, "o"), "attn_post_norm");
        let mut normed = x.clone();
        norm(&mut normed, "mlp_norm");
        let passed = |g: f64| match options.gate {
            Gate::Silu => g / (1.0 + (-g).exp()),
            Gate::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                0.5 * g * (1.0 + inner.tanh())
            }
        };
        let (gate, up) = (linear(&normed, "gate"), linear(&normed, "up"));
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| passed(*g) * u).collect();
        add(x, linear(&inner, "down"), "mlp_post_norm")
    }
}

#[test]
fn agrees_with_the_definitions_in_f64() {
    let device = Device::flex();
    let odd = Shape { d: 97, heads: 3, kv_heads: 3, head_dim: 34, inner: 131, ..LLAMA };
    for (name, shape) in [("llama", LLAMA), ("odd sizes", odd)] {
        for (past, extras) in [(1, false), (127, false), (128, true), (139, true), (140, true), (300, true)] {
            for packed in [None, Some(PackedInputs::Exact), Some(PackedInputs::EightBits)] {
                let model = Model::new(Shape { past, extras, packed, ..shape });
                let mut cache = model.cache(2, 1, DType::F32, &device);
                let got = model.run(&mut cache, DType::F32, &device).expect("a kernel");
                let e = error(&got, &model.reference());
                let bound = if packed == Some(PackedInputs::EightBits) { 0.05 } else { 5e-6 };
                assert!(e < bound, "{name}, {past} tokens, {extras}, {packed:?}: off by {e:e}");
                assert_eq!((cache.len(0), cache.len(1)), (0, past + 1));
                if packed == Some(PackedInputs::EightBits) {
                    assert!(e > 1e-5, "control: inputs were rounded");
                }
                // The token before is part of the past now.
                let again = model.run(&mut cache, DType::F32, &device).expect("a kernel");
                assert!(error(&again, &got) > 1e-4, "control: a longer past is another one");
                assert_eq!(model.run(&mut cache, DType::F32, &device), None, "the cache is full");
                assert_eq!(cache.len(1), past + 2);
            }
        }
    }
}

#[test]
fn weights_in_bf16_are_the_same_numbers() {
    let device = Device::flex();
    for (past, extras, inner) in [(1, false, 70), (140, true, 256)] {
        for packed in [None, Some(PackedInputs::Exact)] {
            let run = |half| {
                let model = Model::new(Shape { past, extras, packed, inner, half, ..LLAMA });
                let mut cache = model.cache(1, 1, DType::F32, &device);
                (model.run(&mut cache, DType::F32, &device).expect("a kernel"), model.reference())
            };
            let (got, want) = run(true);
            let e = error(&got, &want);
            assert!(e < 5e-6, "{past} tokens, {packed:?}: off by {e:e}");
            assert!(error(&run(false).0, &want) > 1e-4, "control: rounded weights are others");
        }
    }
    let odd = Model::new(Shape { half: true, inner: 67, ..LLAMA });
    let mut cache = odd.cache(1, 1, DType::F32, &device);
    assert_eq!(odd.run(&mut cache, DType::F32, &device), None, "no words of two");
}

#[test]
fn a_past_in_halves_costs_what_halves_cost() {
    let device = Device::flex();
    for (past, head_dim) in [(1, 10), (131, 34), (300, 64)] {
        let model = Model::new(Shape { past, head_dim, extras: true, ..LLAMA });
        let mut cache = model.cache(2, 1, DType::F32, &device);
        let whole = model.run(&mut cache, DType::F32, &device).expect("a kernel");
        let mut halves = model.cache(2, 1, DType::F16, &device);
        let got = model.run(&mut halves, DType::F32, &device).expect("a kernel");
        let e = error(&got, &whole);
        assert!((1e-7..1e-3).contains(&e), "{past} tokens: off by {e:e}");
        assert_eq!(halves.len(1), past + 1);
        assert!(
            error(&model.run(&mut halves, DType::F32, &device).expect("a kernel"), &got) > 1e-4,
            "control"
        );
    }
}

#[test]
fn says_where_it_has_no_kernel() {
    let device = Device::flex();
    let model = Model::new(Shape { past: 3, ..LLAMA });
    let of = |model: &Model, batch, dtype, device: &Device| {
        let mut cache = model.cache(4, batch, dtype, device);
        let before = cache.len(1);
        let some = model.run(&mut cache, dtype, device).is_some();
        assert_eq!(cache.len(1), before + usize::from(some));
        some
    };
    assert!(of(&model, 1, DType::F32, &device), "control");
    assert!(!of(&model, 2, DType::F32, &device), "two sequences");
    assert!(!of(&model, 1, DType::F64, &device), "f64");
    assert!(!of(&model, 1, DType::F32, &device.clone().autodiff()), "gradients");
    assert!(!of(&Model::new(Shape { past: 0, ..LLAMA }), 1, DType::F32, &device), "an empty layer");
}

#[test]
fn threads_do_not_show() {
    let of = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| {
            let device = Device::flex();
            let packed = Some(PackedInputs::EightBits);
            let model = Model::new(Shape { past: 300, extras: true, packed, d: 320, inner: 640, ..LLAMA });
            let mut cache = model.cache(2, 1, DType::F32, &device);
            let run = || model.run(&mut cache, DType::F32, &device);
            firebrick_tensor::ops::awake(&Device::flex(), run).expect("a kernel")
        })
    };
    let one = of(1);
    for threads in [2, 3] {
        assert!(of(threads) == one, "{threads} threads");
    }
}
