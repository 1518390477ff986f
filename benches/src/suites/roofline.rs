//! What the device reaches at a large matrix product, and at reading and copying memory.

use std::hint::black_box;

use anyhow::Result;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::Seed;
use firebrick_tensor::ops::{self, Precision};
use rayon::prelude::*;

use super::dtype;
use crate::{Bench, Bound, Case, Measured, Roofline};

/// Rows and columns of the matrices.
const SIZE: usize = 2048;
/// Bytes of a buffer: more than the caches of the machines this is for.
const BYTES: usize = 256 << 20;
/// Elements one thread takes at a time.
const CHUNK: usize = 1 << 17;
/// Calls in one turn on a GPU, where one is too short for the clock.
const CALLS: usize = 32;

/// Measures the limits of the device of `bench`, as cases of a suite `roofline`.
///
/// # Errors
/// If the device fails.
pub fn measure(bench: &Bench<'_>) -> Result<Roofline> {
    let products: Vec<f64> = bench
        .precisions()
        .into_iter()
        .map(|precision| Ok(product(bench, precision)?.median))
        .collect::<Result<_>>()?;
    let (first, last) = (products[0], products[products.len() - 1]);
    Ok(Roofline { gflops: first, gflops_bf16: last, read: read(bench)?.median, copy: copy(bench)?.median })
}

fn case(name: &str, dtype: &'static str, unit: &'static str, amount: f64) -> Case {
    Case { suite: "roofline", name: name.into(), dtype, unit, amount: amount / 1e9, bound: Bound::Unknown }
}

fn calls(bench: &Bench<'_>) -> usize {
    if bench.device == Device::flex() { 1 } else { CALLS }
}

/// Whatever cases are asked for.
fn limit(bench: &Bench<'_>, case: &Case, turn: &mut dyn FnMut() -> Result<f64>) -> Result<Measured> {
    let measured = bench.take(case, None, turn)?;
    bench.add(measured.clone());
    Ok(measured)
}

fn product(bench: &Bench<'_>, precision: Precision) -> Result<Measured> {
    let product = Product::new(bench, precision);
    let case = case(&format!("matmul {SIZE}"), dtype(precision), "GFLOP/s", product.flop());
    limit(bench, &case, &mut || product.turn(bench))
}

/// The matrix product that is the limit of what computes.
pub struct Product {
    a: Tensor<2>,
    b: Tensor<2>,
    calls: usize,
    precision: Precision,
}

impl Product {
    /// One on the device of `bench`.
    pub fn new(bench: &Bench<'_>, precision: Precision) -> Self {
        let matrix = |name: &str| {
            let values = Seed(0).normal(name, SIZE * SIZE, 1.0);
            Tensor::<2>::from_data(TensorData::new(values, [SIZE, SIZE]), &bench.device)
        };
        Product { a: matrix("a"), b: matrix("b"), calls: calls(bench), precision }
    }

    /// Floating-point operations of a turn.
    pub fn flop(&self) -> f64 {
        2.0 * (SIZE * SIZE * SIZE * self.calls) as f64
    }

    /// Seconds of a turn.
    ///
    /// # Errors
    /// If the device fails.
    pub fn turn(&self, bench: &Bench<'_>) -> Result<f64> {
        bench.timed(|| {
            let product = || ops::linear(self.a.clone(), self.b.clone(), self.precision);
            (0..self.calls).for_each(|_| drop(black_box(product())));
            Ok(())
        })
    }
}

fn read(bench: &Bench<'_>) -> Result<Measured> {
    if bench.device == Device::flex() {
        let buffer = vec![1u64; BYTES / 8];
        let case = case("read", "u64", "GB/s", BYTES as f64);
        return limit(bench, &case, &mut || {
            bench.timed(|| {
                let sum = |part: &[u64]| part.iter().fold(0u64, |a, b| a.wrapping_add(*b));
                let total: u64 = black_box(&buffer).par_chunks(CHUNK).map(sum).sum();
                anyhow::ensure!(total == (BYTES / 8) as u64, "the sum of a buffer is wrong");
                Ok(())
            })
        });
    }
    let x = Tensor::<1>::ones([BYTES / 4], &bench.device);
    let case = case("read", "f32", "GB/s", (BYTES * CALLS) as f64);
    limit(bench, &case, &mut || {
        bench.timed(|| {
            (0..CALLS).for_each(|_| drop(black_box(x.clone().sum())));
            Ok(())
        })
    })
}

fn copy(bench: &Bench<'_>) -> Result<Measured> {
    if bench.device == Device::flex() {
        let (from, mut to) = (vec![1u64; BYTES / 8], vec![2u64; BYTES / 8]);
        let case = case("copy", "u64", "GB/s", 2.0 * BYTES as f64);
        return limit(bench, &case, &mut || {
            bench.timed(|| {
                let parts = to.par_chunks_mut(CHUNK).zip(black_box(&from).par_chunks(CHUNK));
                parts.for_each(|(to, from)| to.copy_from_slice(from));
                black_box(&mut to);
                Ok(())
            })
        });
    }
    let x = Tensor::<1>::ones([BYTES / 4], &bench.device);
    let case = case("copy", "f32", "GB/s", 2.0 * (BYTES * CALLS) as f64);
    limit(bench, &case, &mut || {
        bench.timed(|| {
            (0..CALLS).for_each(|_| drop(black_box(x.clone() * 2.0)));
            Ok(())
        })
    })
}
