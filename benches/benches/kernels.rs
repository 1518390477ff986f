//! Single kernels on the CPU under criterion: `cargo bench -p firebrick-benches --features criterion`. Whole steps are in
//! `cargo xtask bench`.

use std::hint::black_box;

use burn::tensor::{Device, Int, Tensor, TensorData};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use firebrick_core::{Seed, Selector};
use firebrick_models::ModelFiles;
use firebrick_tensor::block::{DType, decode, encode};
use firebrick_tensor::ops::{self, PackedInputs, PackedMatrix};

const TOKENS: usize = 256;
const D_MODEL: usize = 576;
const D_FF: usize = 1536;
const INPUTS: [PackedInputs; 2] = [PackedInputs::Exact, PackedInputs::EightBits];

fn random<const D: usize>(name: &str, shape: [usize; D]) -> Tensor<D> {
    let values = Seed(0).normal(name, shape.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("ops");
    let (x, gamma) = (random("x", [TOKENS, D_MODEL]), random("gamma", [D_MODEL]));
    group.bench_function("rms_norm", |b| b.iter(|| ops::rms_norm(x.clone(), gamma.clone(), 1e-5)));
    let (gate, up) = (random("gate", [TOKENS, D_FF]), random("up", [TOKENS, D_FF]));
    group.bench_function("swiglu", |b| b.iter(|| ops::swiglu(gate.clone(), up.clone())));
    let q = random("q", [1, 9, TOKENS, 64]);
    let (cos, sin) = (random("cos", [TOKENS, 32]), random("sin", [TOKENS, 32]));
    group.bench_function("rope", |b| b.iter(|| ops::rope(q.clone(), cos.clone(), sin.clone())));
    let head = random("head", [D_MODEL, 8192]);
    let targets: Vec<i32> = (0..TOKENS).map(|i| (i * 7919 % 8192) as i32).collect();
    let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [TOKENS]), &Device::flex());
    group.bench_function("linear_cross_entropy", |b| {
        b.iter(|| ops::linear_cross_entropy(x.clone(), head.clone(), targets.clone(), ops::Precision::F32));
    });
    let experts = random("experts", [8, D_MODEL, 384]);
    let offsets: Vec<usize> = (0..=8).map(|e| e * TOKENS / 8).collect();
    group.bench_function("grouped_matmul", |b| {
        b.iter(|| ops::grouped_matmul(x.clone(), experts.clone(), &offsets));
    });
    for bits in [2, 4, 8] {
        let codes: Vec<u8> = (0..D_MODEL * D_FF).map(|i| (i * 7919 % (1 << bits)) as u8).collect();
        let parameters = |name| random(name, [D_MODEL / 64, D_FF]);
        let weight =
            PackedMatrix::pack(&codes, D_MODEL, D_FF, bits, 64, parameters("scale"), parameters("zero"));
        for (rows, inputs) in [1, TOKENS].into_iter().flat_map(|rows| INPUTS.map(|inputs| (rows, inputs))) {
            let x = x.clone().narrow(0, 0, rows);
            let name = format!("packed_matmul/{bits} bits/{inputs:?}");
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| ops::packed_matmul(x.clone(), &weight, inputs));
            });
        }
    }
    group.finish();
}

fn codecs(c: &mut Criterion) {
    let mut group = c.benchmark_group("codecs");
    let values = Seed(0).normal("values", 1 << 16, 1.0);
    group.throughput(Throughput::Elements(values.len() as u64));
    for dtype in DType::all().filter(|d| d.is_real()) {
        let mut bytes = vec![0; dtype.bytes_for(values.len()).expect("whole blocks")];
        group.bench_function(BenchmarkId::new("encode", dtype), |b| {
            b.iter(|| encode(dtype, black_box(&values), &mut bytes));
        });
        let mut back = vec![0.0; values.len()];
        group.bench_function(BenchmarkId::new("decode", dtype), |b| {
            b.iter(|| decode(dtype, black_box(&bytes), &mut back));
        });
    }
    group.finish();
}

fn selectors(c: &mut Criterion) {
    let files = ModelFiles::embedded().expect("the model in the crate");
    let mut group = c.benchmark_group("selectors");
    for text in ["layers.*.attn.*", "layers.-1.mlp.{up,down}", "re:.*_proj\\.weight$"] {
        group.bench_function(BenchmarkId::new("parse", text), |b| {
            b.iter(|| black_box(text).parse::<Selector>());
        });
        let selector: Selector = text.parse().expect("a selector");
        group.bench_function(BenchmarkId::new("resolve", text), |b| {
            b.iter(|| selector.resolve(files.sites()));
        });
    }
    group.finish();
}

criterion_group!(kernels, operations, codecs, selectors);
criterion_main!(kernels);
