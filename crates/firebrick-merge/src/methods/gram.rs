//! Inner products of the models, and merges that are linear combinations of them.
//!
//! Norms, angles and means on a sphere depend on the models by their inner products only. So one pass over the inputs suffices, whatever
//! the method iterates afterwards.

use super::values::{Values, dot, map, pieces, with_piece};
use super::{Kernel, TensorMerge};

/// Which elements form one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grouping {
    /// All of the tensor.
    Whole,
    /// Runs of so many elements along the last axis.
    Rows(usize),
    /// Every so manieth element, along the first axis.
    Columns(usize),
}

/// Inner products of vectors, symmetric.
#[derive(Clone, Debug)]
pub(super) struct Gram {
    size: usize,
    products: Vec<f64>,
}

impl Gram {
    fn new(size: usize) -> Self {
        Gram { size, products: vec![0.0; size * size] }
    }

    pub(super) fn get(&self, a: usize, b: usize) -> f64 {
        self.products[a * self.size + b]
    }

    pub(super) fn norm(&self, a: usize) -> f64 {
        self.get(a, a).max(0.0).sqrt()
    }

    fn add(&mut self, a: usize, b: usize, product: f64) {
        self.products[a * self.size + b] += product;
        if a != b {
            self.products[b * self.size + a] += product;
        }
    }

    fn add_all(&mut self, vectors: &[&[f32]]) {
        for a in 0..self.size {
            for b in a..self.size {
                self.add(a, b, dot(vectors[a], vectors[b]));
            }
        }
    }

    /// The inner products of the vectors times `factors`.
    pub(super) fn scaled(&self, factors: &[f64]) -> Gram {
        let mut scaled = self.clone();
        for (i, p) in scaled.products.iter_mut().enumerate() {
            *p *= factors[i / self.size] * factors[i % self.size];
        }
        scaled
    }

    /// The inner products of each vector with the combination of these coefficients.
    pub(super) fn times(&self, coefficients: &[f64]) -> Vec<f64> {
        let row = |a: usize| coefficients.iter().enumerate().map(|(b, c)| c * self.get(a, b)).sum();
        (0..self.size).map(row).collect()
    }

    /// The norm of the combination of these coefficients.
    pub(super) fn norm_of(&self, coefficients: &[f64]) -> f64 {
        let square: f64 = coefficients.iter().zip(self.times(coefficients)).map(|(c, p)| c * p).sum();
        square.max(0.0).sqrt()
    }
}

/// Differences from `base`, or the models themselves where there is none.
fn vectors<'v>(
    of: &[usize],
    base: Option<usize>,
    views: &[&'v [f32]],
    differences: &'v mut Vec<Vec<f32>>,
) -> Vec<&'v [f32]> {
    let Some(base) = base else { return of.iter().map(|m| views[*m]).collect() };
    *differences =
        of.iter().map(|m| views[*m].iter().zip(views[base]).map(|(x, b)| x - b).collect()).collect();
    differences.iter().map(|d| &d[..]).collect()
}

/// The inner products of the models `of`, or of their differences from `base`; one matrix per group.
pub(super) fn gram(
    inputs: &[Values<'_>],
    n: usize,
    grouping: Grouping,
    of: &[usize],
    base: Option<usize>,
) -> Result<Vec<Gram>, String> {
    let size = of.len();
    match grouping {
        Grouping::Whole => {
            let parts = map(inputs, n, 1, |_, views| {
                let mut gram = Gram::new(size);
                gram.add_all(&vectors(of, base, views, &mut Vec::new()));
                gram
            })?;
            let mut total = Gram::new(size);
            for part in parts {
                total.products.iter_mut().zip(part.products).for_each(|(t, p)| *t += p);
            }
            Ok(vec![total])
        }
        Grouping::Rows(columns) => {
            let parts = map(inputs, n, columns, |_, views| {
                let mut differences = Vec::new();
                let vectors = vectors(of, base, views, &mut differences);
                let rows = views[0].len() / columns;
                let one = |row: usize| {
                    let mut gram = Gram::new(size);
                    gram.add_all(&vectors.iter().map(|v| &v[row * columns..][..columns]).collect::<Vec<_>>());
                    gram
                };
                (0..rows).map(one).collect::<Vec<_>>()
            })?;
            Ok(parts.into_iter().flatten().collect())
        }
        Grouping::Columns(columns) => {
            let mut grams = vec![Gram::new(size); columns];
            let mut buffers = Vec::new();
            for range in pieces(n, columns) {
                with_piece(inputs, &range, &mut buffers, |views| {
                    let mut differences = Vec::new();
                    let vectors = vectors(of, base, views, &mut differences);
                    for i in 0..range.len() {
                        for a in 0..size {
                            for b in a..size {
                                let product = f64::from(vectors[a][i]) * f64::from(vectors[b][i]);
                                grams[i % columns].add(a, b, product);
                            }
                        }
                    }
                })?;
            }
            Ok(grams)
        }
    }
}

/// `sum c_m x_m` of the models `of`, or `base + sum c_m (x_m - base)`; `coefficients[m][group]`.
pub(super) fn combination(
    grouping: Grouping,
    of: Vec<usize>,
    base: Option<usize>,
    coefficients: &[Vec<f64>],
) -> Kernel {
    // By group, those of one model after the other.
    let table: Vec<Vec<f32>> = coefficients.iter().map(|c| c.iter().map(|c| *c as f32).collect()).collect();
    Box::new(move |start, views, out| {
        out.fill(0.0);
        let row = match grouping {
            Grouping::Whole => out.len(),
            Grouping::Rows(columns) | Grouping::Columns(columns) => columns,
        };
        let mut at = 0;
        while at < out.len() {
            let column = if grouping == Grouping::Whole { 0 } else { (start + at) % row };
            let end = out.len().min(at + row - column);
            let mut first = true;
            for (m, table) in of.iter().zip(&table) {
                let (x, y) = (&views[*m][at..end], &mut out[at..end]);
                let fixed = match grouping {
                    Grouping::Whole => Some(table[0]),
                    Grouping::Rows(_) => Some(table[(start + at) / row]),
                    Grouping::Columns(_) => None,
                };
                // Models of coefficient 0 do not take part, and the first is no sum: 1 and 0 give the model bit for bit.
                match (fixed, base) {
                    (Some(0.0), _) => continue,
                    (Some(c), None) if first => y.iter_mut().zip(x).for_each(|(y, x)| *y = c * x),
                    (Some(c), None) => y.iter_mut().zip(x).for_each(|(y, x)| *y += c * x),
                    (Some(c), Some(base)) => {
                        let b = &views[base][at..end];
                        y.iter_mut().zip(x).zip(b).for_each(|((y, x), b)| *y += c * (x - b));
                    }
                    (None, base) => {
                        let b = base.map(|base| &views[base][at..end]);
                        for (j, (y, x)) in y.iter_mut().zip(x).enumerate() {
                            *y += table[column + j] * (x - b.map_or(0.0, |b| b[j]));
                        }
                    }
                }
                first = false;
            }
            if let Some(base) = base {
                out[at..end].iter_mut().zip(&views[base][at..end]).for_each(|(y, b)| *y += b);
            }
            at = end;
        }
    })
}

/// Results that were computed whole.
pub(super) fn whole(values: Vec<f32>) -> Kernel {
    Box::new(move |start, _, out| out.copy_from_slice(&values[start..start + out.len()]))
}

/// Vectors held whole, with every result rounded, as PyTorch computes with types of 16 bits: sums in f32, rounded at their end.
pub(super) struct Rounded {
    round: super::Rounding,
    /// The models, or their differences from the base.
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) base: Option<Vec<f32>>,
}

impl Rounded {
    /// `None` where nothing is rounded and the products suffice.
    pub(super) fn load(
        tensor: &TensorMerge<'_>,
        of: &[usize],
        base: Option<usize>,
    ) -> Result<Option<Self>, String> {
        let round = tensor.rounding();
        if round == super::Rounding::Exact {
            return Ok(None);
        }
        let base = base.map(|b| tensor.inputs[b].to_vec()).transpose()?;
        let mut vectors = of.iter().map(|m| tensor.inputs[*m].to_vec()).collect::<Result<Vec<_>, _>>()?;
        if let Some(base) = &base {
            for v in &mut vectors {
                v.iter_mut().zip(base).for_each(|(x, b)| *x = round.round(*x - b));
            }
        }
        Ok(Some(Rounded { round, vectors, base }))
    }

    pub(super) fn r(&self, v: f64) -> f64 {
        f64::from(self.round.scalar(v))
    }

    pub(super) fn norm(&self, v: &[f32]) -> f64 {
        self.r(dot(v, v).sqrt())
    }

    /// The sum of the rounded products.
    pub(super) fn dot(&self, a: &[f32], b: &[f32]) -> f64 {
        self.r(a.iter().zip(b).map(|(x, y)| f64::from(self.round.round(x * y))).sum())
    }

    /// The sum of the products, which are not rounded.
    pub(super) fn dot_once(&self, a: &[f32], b: &[f32]) -> f64 {
        self.r(dot(a, b))
    }

    pub(super) fn map(&self, v: &[f32], f: impl Fn(f64) -> f64) -> Vec<f32> {
        v.iter().map(|v| self.round.scalar(f(f64::from(*v)))).collect()
    }

    pub(super) fn zip(&self, a: &[f32], b: &[f32], f: impl Fn(f64, f64) -> f64) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| self.round.scalar(f(f64::from(*a), f64::from(*b)))).collect()
    }

    /// The kernel that gives `values`, on top of the base.
    pub(super) fn kernel(&self, values: Vec<f32>) -> Kernel {
        whole(match &self.base {
            Some(base) => self.zip(base, &values, |b, v| b + v),
            None => values,
        })
    }
}
