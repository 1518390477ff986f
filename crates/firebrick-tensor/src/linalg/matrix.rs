//! The dense matrix, its products and Gram matrices.

use super::LinalgError;
use faer::linalg::matmul;
use faer::{Accum, Mat, MatRef, Par};
use firebrick_core::Seed;
use rayon::prelude::*;

/// Rows and columns of one tile of a product; fixed, so that the order of the sums never depends on the threads.
const TILE: usize = 256;

/// A dense row-major f64 matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f64>,
}

impl Matrix {
    /// A matrix of `rows * cols` row-major entries.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the lengths do not agree.
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Result<Matrix, LinalgError> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(length_error("matrix", rows, cols, data.len()));
        }
        Ok(Matrix { rows, cols, data })
    }

    /// A matrix from row-major f32 entries.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the lengths do not agree.
    pub fn from_f32(rows: usize, cols: usize, data: &[f32]) -> Result<Matrix, LinalgError> {
        Matrix::new(rows, cols, data.iter().map(|&x| f64::from(x)).collect())
    }

    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Matrix {
        Matrix { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Ones on the diagonal.
    pub fn identity(size: usize) -> Matrix {
        Matrix::from_fn(size, size, |i, j| f64::from(u8::from(i == j)))
    }

    /// The matrix with entry `f(row, col)`.
    pub fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Matrix {
        Matrix { rows, cols, data: (0..rows * cols).map(|k| f(k / cols, k % cols)).collect() }
    }

    /// Independent standard normal entries drawn from the stream `name` of `seed`.
    pub fn random_normal(rows: usize, cols: usize, seed: Seed, name: &str) -> Matrix {
        Matrix { rows, cols, data: seed.normal_f64(name, rows * cols, 1.0).collect() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The entries, row by row.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The entries, row by row.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// The entries rounded to f32, row by row.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }

    /// The transpose.
    pub fn transpose(&self) -> Matrix {
        from_faer(self.view().transpose())
    }

    /// The first `cols` columns.
    pub fn first_cols(&self, cols: usize) -> Matrix {
        from_faer(self.view().subcols(0, cols.min(self.cols)))
    }

    /// The product `self * other`, on all threads of the current rayon pool; `2 m n k` operations.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if `other` does not have as many rows as this has columns.
    pub fn matmul(&self, other: &Matrix) -> Result<Matrix, LinalgError> {
        if self.cols != other.rows {
            let expected = format!("{} rows on the right", self.cols);
            return Err(LinalgError::Shape { what: "matmul", expected, got: other.rows.to_string() });
        }
        Ok(product(self.view(), other.view()))
    }

    /// The largest absolute difference to `other`; infinite if the shapes differ.
    pub fn max_abs_diff(&self, other: &Matrix) -> f64 {
        if (self.rows, self.cols) != (other.rows, other.cols) {
            return f64::INFINITY;
        }
        self.data.iter().zip(&other.data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    pub(super) fn view(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    pub(super) fn check_finite(&self) -> Result<(), LinalgError> {
        match self.data.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(k) => Err(LinalgError::NotFinite {
                row: k / self.cols,
                col: k % self.cols,
                rows: self.rows,
                cols: self.cols,
                value: self.data[k],
            }),
        }
    }

    pub(super) fn check_square(&self, what: &'static str) -> Result<usize, LinalgError> {
        if self.rows != self.cols {
            let got = format!("{} x {}", self.rows, self.cols);
            return Err(LinalgError::Shape { what, expected: "a square matrix".into(), got });
        }
        self.check_finite()?;
        Ok(self.rows)
    }
}

impl std::ops::Index<(usize, usize)> for Matrix {
    type Output = f64;

    fn index(&self, (row, col): (usize, usize)) -> &f64 {
        &self.data[row * self.cols..(row + 1) * self.cols][col]
    }
}

impl std::ops::IndexMut<(usize, usize)> for Matrix {
    fn index_mut(&mut self, (row, col): (usize, usize)) -> &mut f64 {
        &mut self.data[row * self.cols..(row + 1) * self.cols][col]
    }
}

fn length_error(what: &'static str, rows: usize, cols: usize, len: usize) -> LinalgError {
    LinalgError::Shape { what, expected: format!("{rows} x {cols} entries"), got: format!("{len} entries") }
}

pub(super) fn from_faer(m: MatRef<'_, f64>) -> Matrix {
    let (rows, cols) = (m.nrows(), m.ncols());
    let mut data = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        data.extend((0..cols).map(|j| m[(i, j)]));
    }
    Matrix { rows, cols, data }
}

/// `lhs * rhs` in panels of [`TILE`] rows (of columns when the product is wider than tall).
pub(super) fn product(lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>) -> Matrix {
    let (rows, cols) = (lhs.nrows(), rhs.ncols());
    if rows < cols && cols > TILE {
        return product(rhs.transpose(), lhs.transpose()).transpose();
    }
    let mut out = Matrix::zeros(rows, cols);
    if out.data.is_empty() {
        return out;
    }
    out.data.par_chunks_mut(TILE * cols).enumerate().for_each(|(panel, chunk)| {
        let n = chunk.len() / cols;
        let mut tile = Mat::zeros(n, cols);
        matmul::matmul(&mut tile, Accum::Replace, lhs.subrows(panel * TILE, n), rhs, 1.0, Par::Seq);
        for (k, value) in chunk.iter_mut().enumerate() {
            *value = tile[(k / cols, k % cols)];
        }
    });
    out
}

/// Accumulates a Gram matrix `H = sum of X^T X` over blocks of f32 rows, in f64.
///
/// `rows * n^2` operations a block, in tiles over all threads. How the rows are cut into blocks changes the result
/// only by f64 rounding.
#[derive(Clone, Debug)]
pub struct Gram {
    n: usize,
    rows: u64,
    lower: Vec<f64>,
}

impl Gram {
    /// The sum over no rows of width `n`.
    pub fn new(n: usize) -> Gram {
        Gram { n, rows: 0, lower: vec![0.0; n * n] }
    }

    /// Adds the rows of `x`, row-major `[rows, n]`.
    ///
    /// # Errors
    /// A length that is no multiple of `n`.
    pub fn add(&mut self, x: &[f32]) -> Result<(), LinalgError> {
        let n = self.n;
        if n == 0 || !x.len().is_multiple_of(n) {
            return Err(length_error("gram block", x.len() / n.max(1), n, x.len()));
        }
        self.rows += (x.len() / n) as u64;
        for block in x.chunks(2 * TILE * n) {
            // Column r is row r of the block: a contiguous copy.
            let xt = Mat::from_fn(n, block.len() / n, |i, r| f64::from(block[r * n + i]));
            self.lower.par_chunks_mut(TILE * n).enumerate().for_each(|(panel, out)| {
                let height = out.len() / n;
                for col in (0..=panel * TILE).step_by(TILE) {
                    let width = TILE.min(n - col);
                    let mut tile = Mat::zeros(height, width);
                    let (left, right) =
                        (xt.subrows(panel * TILE, height), xt.subrows(col, width).transpose());
                    matmul::matmul(&mut tile, Accum::Replace, left, right, 1.0, Par::Seq);
                    for (i, row) in out.chunks_mut(n).enumerate() {
                        row[col..col + width].iter_mut().enumerate().for_each(|(j, h)| *h += tile[(i, j)]);
                    }
                }
            });
        }
        Ok(())
    }

    /// How many rows were added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The sum, `[n, n]`, exactly symmetric.
    pub fn finish(self) -> Matrix {
        let Gram { n, lower: mut data, .. } = self;
        for i in 0..n {
            for j in i + 1..n {
                data[i * n + j] = data[j * n + i];
            }
        }
        Matrix { rows: n, cols: n, data }
    }
}
