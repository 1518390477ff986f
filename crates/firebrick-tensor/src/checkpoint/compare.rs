//! How far the values of two tensors lie apart, and which values are none, piece by piece in bounded memory.

use super::error::{CheckpointError, Result};
use super::{Checkpoint, TensorInfo};
use crate::block;
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are decoded at once; whole blocks of every type.
const PIECE: usize = 1 << 16;

/// Sums over pairs of values, in f64; those of tensors add up to those of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// Pairs of values.
    pub elements: usize,
    /// Pairs of which one is not finite; left out of everything below.
    pub not_finite: usize,
    /// Largest `|a - b|`.
    pub max_abs: f64,
    /// `sum (a - b)^2`.
    pub difference: f64,
    /// `sum a^2`.
    pub a: f64,
    /// `sum b^2`.
    pub b: f64,
    /// `sum a b`.
    pub dot: f64,
}

impl Distance {
    /// `|a - b| / |a|` in the Frobenius norm; 0 where both are 0, `None` where only `a` is or no pair is finite.
    pub fn relative(&self) -> Option<f64> {
        match (self.difference, self.a) {
            _ if self.elements > 0 && self.not_finite == self.elements => None,
            (0.0, _) => Some(0.0),
            (_, 0.0) => None,
            (difference, a) => Some((difference / a).sqrt()),
        }
    }

    /// Cosine of the angle between `a` and `b`; `None` where one is 0.
    pub fn cosine(&self) -> Option<f64> {
        let norms = (self.a * self.b).sqrt();
        (norms > 0.0).then(|| (self.dot / norms).clamp(-1.0, 1.0))
    }

    /// Adds what `other` summed up.
    pub fn add(&mut self, other: &Distance) {
        self.elements += other.elements;
        self.not_finite += other.not_finite;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.difference += other.difference;
        self.a += other.a;
        self.b += other.b;
        self.dot += other.dot;
    }

    /// Between two slices of one length.
    pub fn of(a: &[f32], b: &[f32]) -> Self {
        let mut sum = Distance { elements: a.len(), ..Distance::default() };
        for (x, y) in a.iter().zip(b) {
            if !(x.is_finite() && y.is_finite()) {
                sum.not_finite += 1;
                continue;
            }
            let (x, y) = (f64::from(*x), f64::from(*y));
            let d = x - y;
            sum.max_abs = sum.max_abs.max(d.abs());
            sum.difference += d * d;
            sum.a += x * x;
            sum.b += y * y;
            sum.dot += x * y;
        }
        sum
    }
}

impl Checkpoint {
    /// Compares the tensor `name` with `other_name` of `other`. Their elements are paired in order; with `row_of` row `r` of
    /// the one is paired with row `row_of(r)` of the other.
    ///
    /// The sums do not depend on the number of threads.
    ///
    /// # Errors
    /// When one does not exist or holds integers, their shapes differ, or `row_of` leads outside.
    pub fn distance(
        &self,
        name: &str,
        other: &Checkpoint,
        other_name: &str,
        row_of: Option<&(dyn Fn(usize) -> usize + Sync)>,
    ) -> Result<Distance> {
        let (a, b) = (self.real(name)?, other.real(other_name)?);
        if a.shape != b.shape {
            let problems = vec![format!("`{name}` has shape {:?}, `{other_name}` {:?}", a.shape, b.shape)];
            return Err(CheckpointError::Problems { path: other.path().to_owned(), problems });
        }
        let row = a.shape.last().copied().unwrap_or(1);
        let whole_rows = if row_of.is_some() { row } else { 1 };
        let compared = pieces(a.elements(), whole_rows).into_par_iter().map(|range| {
            let (mut x, mut y) = (vec![0.0; range.len()], vec![0.0; range.len()]);
            self.read_f32_into(name, range.clone(), &mut x)?;
            match row_of {
                None => other.read_f32_into(other_name, range, &mut y)?,
                Some(row_of) => {
                    for (i, out) in y.chunks_exact_mut(row).enumerate() {
                        let start = row_of(range.start / row + i) * row;
                        other.read_f32_into(other_name, start..start + row, out)?;
                    }
                }
            }
            Ok(Distance::of(&x, &y))
        });
        let mut total = Distance::default();
        compared.collect::<Result<Vec<_>>>()?.iter().for_each(|d| total.add(d));
        Ok(total)
    }

    /// How many values of the tensor `name` are infinite or not numbers.
    ///
    /// # Errors
    /// When there is no such tensor, or it holds integers.
    pub fn count_not_finite(&self, name: &str) -> Result<usize> {
        let elements = self.real(name)?.elements();
        let counted = pieces(elements, 1).into_par_iter().map(|range| {
            let mut x = vec![0.0; range.len()];
            self.read_f32_into(name, range, &mut x)?;
            Ok(x.iter().filter(|v| !v.is_finite()).count())
        });
        counted.sum()
    }

    fn real(&self, name: &str) -> Result<&TensorInfo> {
        let tensor = self.tensor(name)?;
        match tensor.dtype.is_real() {
            true => Ok(tensor),
            false => Err(self.block_error(name, block::BlockError::NotReal(tensor.dtype))),
        }
    }
}

/// Ranges of whole blocks, and of whole runs of `unit` elements.
fn pieces(elements: usize, unit: usize) -> Vec<Range<usize>> {
    let piece = if unit > 1 { PIECE.div_ceil(unit) * unit } else { PIECE };
    (0..elements).step_by(piece).map(|start| start..elements.min(start + piece)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_number_is_not_equal() {
        let nan = [f32::NAN; 3];
        assert_eq!(Distance::of(&[1.0, 2.0, 3.0], &nan).relative(), None);
        assert_eq!(Distance::of(&[1.0, 2.0, f32::NAN], &[1.0, 2.0, 3.0]).relative(), Some(0.0));
        assert_eq!(Distance::of(&[0.0; 3], &[1.0; 3]).relative(), None);
        assert_eq!(Distance::of(&[], &[]).relative(), Some(0.0));
    }
}
