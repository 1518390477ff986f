//! Task vectors, the difference of a model from its base: thinned out, weighed, summed where they agree in sign or everywhere, scaled and
//! added to the base. One routine for task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099), model breadcrumbs
//! (2312.06795) and DELLA (2406.11617).

use pulp::{Arch, Simd, WithSimd};

use super::rounding::Rounding;
use super::sparsify::{BLOCK, Sparse, Sparsifier, sparsify};
use super::{Kernel, MergeMethod, TensorMerge};

/// How a method thins out, and whether signs are voted on.
fn kind(method: MergeMethod) -> (Sparsifier, bool) {
    match method {
        MergeMethod::Ties => (Sparsifier::Magnitude, true),
        MergeMethod::DareTies => (Sparsifier::Random, true),
        MergeMethod::DareLinear => (Sparsifier::Random, false),
        MergeMethod::Breadcrumbs => (Sparsifier::Outliers, false),
        MergeMethod::BreadcrumbsTies => (Sparsifier::Outliers, true),
        MergeMethod::Della => (Sparsifier::Magprune, true),
        MergeMethod::DellaLinear => (Sparsifier::Magprune, false),
        _ => (Sparsifier::None, false),
    }
}

/// Signs are voted on by weighed task vectors: a negative weight turns a vote.
pub(super) fn task_vectors(tensor: &TensorMerge<'_>, method: MergeMethod) -> Result<Kernel, String> {
    let (how, vote) = kind(method);
    let (base, of, round) = (tensor.base()?, tensor.others(), tensor.rounding());
    let (normalize, lambda) = (tensor.global.normalize, tensor.global.lambda as f32);
    let sparse =
        sparsify(tensor, how, tensor.global.rescale).map_err(|e| format!("{}: {e}", method.name()))?;
    let weights: Vec<f32> = tensor.weights(&of).into_iter().map(|w| round.scalar(w)).collect();
    let total: f32 = weights.iter().sum();
    // Weights that cancel do not divide.
    let divisor = if total.abs() < 1e-8 { 1.0 } else { round.round(total) };
    let sum = WeighedSum { base, of, sparse, weights, divisor, vote, normalize, lambda, round };
    Ok(Box::new(move |start, inputs, out| Arch::new().dispatch(Piece { sum: &sum, start, inputs, out })))
}

/// A range of the output.
struct Piece<'a> {
    sum: &'a WeighedSum,
    start: usize,
    inputs: &'a [&'a [f32]],
    out: &'a mut [f32],
}

impl WithSimd for Piece<'_> {
    type Output = ();

    // The loops over elements are compiled without rounding and with it: a choice inside them costs more than they do.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Piece { sum, start, inputs, out } = self;
        match sum.round {
            Rounding::Exact => sum.run(start, inputs, out, |v| v),
            round => sum.run(start, inputs, out, |v| round.round(v)),
        }
    }
}

/// What the loops over elements need.
struct WeighedSum {
    base: usize,
    of: Vec<usize>,
    sparse: Vec<Sparse>,
    weights: Vec<f32>,
    divisor: f32,
    vote: bool,
    normalize: bool,
    lambda: f32,
    round: Rounding,
}

impl WeighedSum {
    #[inline(always)]
    fn run(&self, start: usize, inputs: &[&[f32]], out: &mut [f32], r: impl Fn(f32) -> f32 + Copy) {
        let mut terms = vec![0.0; self.of.len() * BLOCK];
        for (block, y) in out.chunks_mut(BLOCK).enumerate() {
            let (at, len) = (block * BLOCK, y.len());
            let b = &inputs[self.base][at..][..len];
            // The weighed task vectors, and their sum.
            y.fill(0.0);
            for ((m, sparse), (w, d)) in
                self.of.iter().zip(&self.sparse).zip(self.weights.iter().zip(terms.chunks_mut(BLOCK)))
            {
                let (d, x) = (&mut d[..len], &inputs[*m][at..][..len]);
                for ((d, x), b) in d.iter_mut().zip(x).zip(b) {
                    *d = r(x - b);
                }
                sparse.apply(start + at, d, r);
                for (y, d) in y.iter_mut().zip(d) {
                    *d = r(w * *d);
                    *y += *d;
                }
            }
            if self.vote {
                elect(y, &terms, &self.weights, self.normalize, r);
            } else {
                for y in y.iter_mut() {
                    *y = r(*y);
                }
                if self.normalize {
                    for y in y.iter_mut() {
                        *y = r(*y / self.divisor);
                    }
                }
            }
            if self.lambda == 1.0 {
                for (y, b) in y.iter_mut().zip(b) {
                    *y = r(b + *y);
                }
            } else {
                for (y, b) in y.iter_mut().zip(b) {
                    *y = r(b + r(*y * self.lambda));
                }
            }
        }
    }
}

/// Sums the terms whose sign is that of the sum `y` of all (0 counts as positive), divided by the sum of their weights if `normalize`.
#[inline(always)]
fn elect(y: &mut [f32], terms: &[f32], weights: &[f32], normalize: bool, r: impl Fn(f32) -> f32) {
    let (mut mix, mut by) = ([0.0; BLOCK], [0.0; BLOCK]);
    for y in y.iter_mut() {
        *y = r(*y);
    }
    for (terms, w) in terms.chunks(BLOCK).zip(weights) {
        for (((y, d), mix), by) in y.iter().zip(terms).zip(&mut mix).zip(&mut by) {
            // What is 0 has no sign to agree in.
            let agrees = if *y >= 0.0 { *d > 0.0 } else { *d < 0.0 };
            *mix += if agrees { *d } else { 0.0 };
            *by += if agrees { *w } else { 0.0 };
        }
    }
    for ((y, mix), by) in y.iter_mut().zip(&mix).zip(&by) {
        let (mix, by) = (r(*mix), r(*by));
        *y = if normalize && by != 0.0 { r(mix / by) } else { mix };
    }
}
