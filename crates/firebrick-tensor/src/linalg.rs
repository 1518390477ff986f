//! Dense host linear algebra in f64 on [faer]: SVD, QR, Cholesky, symmetric eigenvalues, Gram matrices and the
//! rank measures of a spectrum.
//!
//! Inputs and outputs are row-major. Results are the same for any number of threads: the decompositions run on one
//! thread each (callers run several layers side by side), products are cut into tiles of fixed size. They may
//! differ in the last bits between processors with different vector units.
//!
//! ```
//! use firebrick_tensor::linalg::{Matrix, svd};
//! let a = Matrix::from_f32(2, 2, &[3.0, 0.0, 0.0, -2.0])?;
//! let factors = svd(&a)?;
//! assert!((factors.sigma[0] - 3.0).abs() < 1e-12 && (factors.sigma[1] - 2.0).abs() < 1e-12);
//! # Ok::<(), firebrick_tensor::linalg::LinalgError>(())
//! ```

mod matrix;
mod spectrum;

pub use matrix::{Gram, Matrix};
pub use spectrum::{effective_rank, participation_ratio, stable_rank};

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::linalg::svd::{ComputeSvdVectors, svd as faer_svd, svd_scratch};
use faer::linalg::triangular_inverse;
use faer::{Conj, Mat, Par};
use firebrick_core::Seed;
use matrix::{from_faer, product};

/// What can go wrong in a decomposition.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LinalgError {
    /// Two shapes do not go together.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// The operation or argument.
        what: &'static str,
        /// The shape it needs.
        expected: String,
        /// The shape it was given.
        got: String,
    },
    /// An entry is infinite or not a number.
    #[error("entry [{row}, {col}] of a {rows} x {cols} matrix is {value}")]
    NotFinite {
        /// Row of the first such entry.
        row: usize,
        /// Its column.
        col: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// The entry.
        value: f64,
    },
    /// A Cholesky pivot is zero or negative: the matrix is singular or indefinite; add damping to its diagonal.
    #[error("not positive definite: pivot {pivot} of {size} is not positive")]
    NotPositiveDefinite {
        /// Index of the pivot, counted from 0 in the order of the rows.
        pivot: usize,
        /// Rows of the matrix.
        size: usize,
    },
    /// The iteration of an SVD or eigendecomposition did not converge.
    #[error("no convergence on a {rows} x {cols} matrix")]
    NoConvergence {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// A thin singular value decomposition `A = U diag(sigma) Vt` with `k = min(rows, cols)` or the rank asked for.
///
/// Signs are fixed: the entry of largest absolute value in each column of `U` is positive.
#[derive(Clone, Debug)]
pub struct Svd {
    /// Left singular vectors, `[rows, k]`, orthonormal columns.
    pub u: Matrix,
    /// Singular values, never negative, in descending order.
    pub sigma: Vec<f64>,
    /// Right singular vectors, `[k, cols]`, orthonormal rows.
    pub vt: Matrix,
}

impl Svd {
    /// Keeps the `rank` largest singular values: the best approximation of that rank (Eckart-Young).
    pub fn truncate(mut self, rank: usize) -> Svd {
        let rank = rank.min(self.sigma.len());
        self.u = self.u.first_cols(rank);
        self.sigma.truncate(rank);
        self.vt.data.truncate(rank * self.vt.cols);
        self.vt.rows = rank;
        self
    }

    /// `U diag(sigma) Vt`.
    pub fn reconstruct(&self) -> Matrix {
        let scaled = Matrix::from_fn(self.u.rows, self.u.cols, |i, j| self.u[(i, j)] * self.sigma[j]);
        product(scaled.view(), self.vt.view())
    }

    fn fix_signs(&mut self) {
        for j in 0..self.sigma.len() {
            let largest = (0..self.u.rows)
                .map(|i| self.u[(i, j)])
                .fold(0.0, |best: f64, x| if x.abs() > best.abs() { x } else { best });
            if largest < 0.0 {
                (0..self.u.rows).for_each(|i| self.u[(i, j)] *= -1.0);
                self.vt.data[j * self.vt.cols..(j + 1) * self.vt.cols].iter_mut().for_each(|x| *x = -*x);
            }
        }
    }
}

/// The thin singular value decomposition of `a`, by bidiagonalization and divide and conquer.
///
/// About `4 m n^2 + 9 n^3` operations for `m >= n`.
///
/// # Errors
/// Entries that are not finite; no convergence.
pub fn svd(a: &Matrix) -> Result<Svd, LinalgError> {
    a.check_finite()?;
    let (rows, cols) = (a.rows, a.cols);
    let k = rows.min(cols);
    let mut u = Mat::zeros(rows, k);
    let mut v = Mat::zeros(cols, k);
    let mut s = Diag::zeros(k);
    let thin = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd_scratch::<f64>(rows, cols, thin, thin, Par::Seq, Default::default()));
    // An owned copy is aligned: the result never depends on where the caller's entries lie.
    faer_svd(
        a.view().to_owned().as_ref(),
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| LinalgError::NoConvergence { rows, cols })?;
    let sigma = (0..k).map(|i| s.column_vector()[i]).collect();
    let mut out = Svd { u: from_faer(u.as_ref()), sigma, vt: from_faer(v.transpose()) };
    out.fix_signs();
    Ok(out)
}

/// The `rank` largest singular triplets by a random projection onto `rank + oversample` dimensions.
///
/// Range finder with `power_iterations` rounds of re-orthonormalised subspace iteration, then an exact SVD in the
/// subspace (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). The expected error in the spectral norm is
/// close to `sigma[rank]` once `oversample >= 5`; every power iteration sharpens a spectrum that decays slowly.
/// About `4 (power_iterations + 1) m n (rank + oversample)` operations. Draws from the stream `randomized_svd`.
///
/// # Errors
/// Entries that are not finite; no convergence.
pub fn randomized_svd(
    a: &Matrix,
    rank: usize,
    oversample: usize,
    power_iterations: usize,
    seed: Seed,
) -> Result<Svd, LinalgError> {
    a.check_finite()?;
    let width = rank.saturating_add(oversample).min(a.rows).min(a.cols);
    let sketch = Matrix::random_normal(a.cols, width, seed, "randomized_svd");
    let mut basis = qr(&product(a.view(), sketch.view()))?.q;
    for _ in 0..power_iterations {
        let back = qr(&product(a.view().transpose(), basis.view()))?.q;
        basis = qr(&product(a.view(), back.view()))?.q;
    }
    let mut small = svd(&product(basis.view().transpose(), a.view()))?;
    small.u = product(basis.view(), small.u.view());
    small.fix_signs();
    Ok(small.truncate(rank))
}

/// The `rank` largest singular triplets: of the whole decomposition, or from where that is cheaper (ranks below a quarter of the smaller
/// side, less 16) by [`randomized_svd`], sharpened three times.
///
/// # Errors
/// Entries that are not finite; no convergence.
pub fn leading_svd(a: &Matrix, rank: usize, seed: Seed) -> Result<Svd, LinalgError> {
    const OVERSAMPLE: usize = 16;
    if 4usize.saturating_mul(rank.saturating_add(OVERSAMPLE)) <= a.rows.min(a.cols) {
        return randomized_svd(a, rank, OVERSAMPLE, 3, seed);
    }
    Ok(svd(a)?.truncate(rank))
}

/// A thin QR decomposition `A = Q R` with `k = min(rows, cols)`.
#[derive(Clone, Debug)]
pub struct Qr {
    /// `[rows, k]`, orthonormal columns.
    pub q: Matrix,
    /// `[k, cols]`, upper triangular with a diagonal that is never negative.
    pub r: Matrix,
}

/// The thin QR decomposition of `a` by blocked Householder reflections.
///
/// The diagonal of `R` is made non-negative, so the factors of a matrix of full rank are unique and `Q` of a
/// Gaussian matrix is Haar distributed. About `4 m n^2` operations with `Q`.
///
/// # Errors
/// Entries that are not finite.
pub fn qr(a: &Matrix) -> Result<Qr, LinalgError> {
    a.check_finite()?;
    let (rows, cols) = (a.rows, a.cols);
    let k = rows.min(cols);
    if k == 0 {
        return Ok(Qr { q: Matrix::zeros(rows, 0), r: Matrix::zeros(0, cols) });
    }
    let block = recommended_block_size::<f64>(rows, cols);
    let mut factors = a.view().to_owned();
    let mut coefficients = Mat::zeros(block, k);
    let scratch = qr_in_place_scratch::<f64>(rows, cols, block, Par::Seq, Default::default());
    qr_in_place(
        factors.as_mut(),
        coefficients.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    let mut q = Mat::identity(rows, k);
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factors.as_ref().subcols(0, k),
        coefficients.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(apply_block_householder_sequence_on_the_left_in_place_scratch::<
            f64,
        >(rows, block, k))),
    );
    let sign = |i: usize| if factors[(i, i)] < 0.0 { -1.0 } else { 1.0 };
    Ok(Qr {
        q: Matrix::from_fn(rows, k, |i, j| q[(i, j)] * sign(j)),
        r: Matrix::from_fn(k, cols, |i, j| if j < i { 0.0 } else { factors[(i, j)] * sign(i) }),
    })
}

/// The lower triangular `L` with `H = L L^T` and a positive diagonal; reads the lower triangle of `h`.
///
/// `n^3 / 3` operations.
///
/// # Errors
/// A matrix that is not square, not finite or not positive definite.
pub fn cholesky(h: &Matrix) -> Result<Matrix, LinalgError> {
    let n = h.check_square("cholesky")?;
    let factor = cholesky_in_place(h.view().to_owned()).map_err(|pivot| not_positive(pivot, n))?;
    Ok(Matrix::from_fn(n, n, |i, j| if j > i { 0.0 } else { factor[(i, j)] }))
}

/// The upper triangular `U` with `U^T U = H^-1` and a positive diagonal: what GPTQ walks along.
///
/// `H` is factored from its last row upwards, `H = R R^T` with `R` upper triangular, then `U = R^-1`: two thirds of
/// `n^3` operations and no inverse of `H` that would square its condition (the way of Frantar et al. 2022,
/// arXiv:2210.17323, is three steps: Cholesky, inverse, Cholesky). Reads the upper triangle of `h`.
///
/// # Errors
/// A matrix that is not square, not finite or not positive definite.
pub fn cholesky_inverse_upper(h: &Matrix) -> Result<Matrix, LinalgError> {
    let n = h.check_square("cholesky_inverse_upper")?;
    let reversed = h.view().reverse_rows_and_cols().to_owned();
    let factor = cholesky_in_place(reversed).map_err(|pivot| not_positive(n - 1 - pivot, n))?;
    let mut inverse = Mat::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inverse.as_mut(), factor.as_ref(), Par::Seq);
    let flip = |i: usize| n - 1 - i;
    Ok(Matrix::from_fn(n, n, |i, j| if j < i { 0.0 } else { inverse[(flip(i), flip(j))] }))
}

/// The solution `X` of `H X = B` for a symmetric positive definite `H` (lower triangle read) and `B` of
/// `[n, columns]`; `n^3 / 3 + 2 n^2 columns` operations.
///
/// # Errors
/// A matrix that is not square, not finite or not positive definite; a right side of other height.
pub fn solve_spd(h: &Matrix, b: &Matrix) -> Result<Matrix, LinalgError> {
    let n = h.check_square("solve_spd")?;
    if b.rows != n {
        let expected = format!("{n} rows on the right");
        return Err(LinalgError::Shape { what: "solve_spd", expected, got: b.rows.to_string() });
    }
    b.check_finite()?;
    let factor = cholesky_in_place(h.view().to_owned()).map_err(|pivot| not_positive(pivot, n))?;
    let mut x = b.view().to_owned();
    let scratch = llt::solve::solve_in_place_scratch::<f64>(n, b.cols, Par::Seq);
    llt::solve::solve_in_place(
        factor.as_ref(),
        x.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    Ok(from_faer(x.as_ref()))
}

fn not_positive(pivot: usize, size: usize) -> LinalgError {
    LinalgError::NotPositiveDefinite { pivot, size }
}

/// Factors the lower triangle in place; `Err` names the pivot.
fn cholesky_in_place(mut a: Mat<f64>) -> Result<Mat<f64>, usize> {
    let n = a.nrows();
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    llt::factor::cholesky_in_place(
        a.as_mut(),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|llt::factor::LltError::NonPositivePivot { index }| index)?;
    Ok(a)
}

/// An eigendecomposition `H = V diag(values) V^T` of a symmetric matrix.
#[derive(Clone, Debug)]
pub struct Eigen {
    /// Eigenvalues in descending order.
    pub values: Vec<f64>,
    /// `[n, n]`; column `j` belongs to `values[j]`; orthonormal.
    pub vectors: Matrix,
}

/// The eigendecomposition of a symmetric `h`, of which the lower triangle is read; about `9 n^3` operations.
///
/// # Errors
/// A matrix that is not square or not finite; no convergence.
pub fn symmetric_eigen(h: &Matrix) -> Result<Eigen, LinalgError> {
    let n = h.check_square("symmetric_eigen")?;
    let mut vectors = Mat::zeros(n, n);
    let mut values = Diag::zeros(n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    self_adjoint_evd(
        h.view().to_owned().as_ref(),
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| LinalgError::NoConvergence { rows: n, cols: n })?;
    Ok(Eigen {
        values: (0..n).rev().map(|i| values.column_vector()[i]).collect(),
        vectors: Matrix::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)]),
    })
}

/// The eigenvalues of a symmetric `h` in descending order, without vectors; reads the lower triangle, about `4/3 n^3` operations.
///
/// # Errors
/// A matrix that is not square or not finite; no convergence.
pub fn symmetric_eigenvalues(h: &Matrix) -> Result<Vec<f64>, LinalgError> {
    let n = h.check_square("symmetric_eigenvalues")?;
    let mut values = Diag::zeros(n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::No, Par::Seq, Default::default());
    self_adjoint_evd(
        h.view().to_owned().as_ref(),
        values.as_mut(),
        None,
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| LinalgError::NoConvergence { rows: n, cols: n })?;
    Ok((0..n).rev().map(|i| values.column_vector()[i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, name: &str) -> Matrix {
        Matrix::random_normal(rows, cols, Seed(7), name)
    }

    fn spd(n: usize) -> Matrix {
        let x = random(2 * n, n, "spd");
        x.transpose().matmul(&x).unwrap()
    }

    /// The product as its definition says, in plain loops.
    fn naive(a: &Matrix, b: &Matrix) -> Matrix {
        Matrix::from_fn(a.rows, b.cols, |i, j| (0..a.cols).map(|k| a[(i, k)] * b[(k, j)]).sum())
    }

    fn orthonormality(q: &Matrix) -> f64 {
        naive(&q.transpose(), q).max_abs_diff(&Matrix::identity(q.cols))
    }

    #[test]
    fn matmul_is_its_definition() {
        for (m, k, n) in
            [(1, 1, 1), (3, 5, 2), (300, 7, 4), (4, 7, 300), (270, 33, 290), (0, 3, 2), (2, 0, 3)]
        {
            let (a, b) = (random(m, k, "a"), random(k, n, "b"));
            assert!(a.matmul(&b).unwrap().max_abs_diff(&naive(&a, &b)) < 1e-11, "{m} {k} {n}");
        }
        assert!(random(2, 3, "a").matmul(&random(2, 3, "b")).is_err());
        assert!(Matrix::new(2, 2, vec![0.0; 3]).is_err() && Matrix::new(usize::MAX, 2, vec![]).is_err());
    }

    #[test]
    fn svd_reconstructs_with_orthonormal_factors() {
        for (m, n) in [(1, 1), (8, 3), (3, 8), (40, 40), (90, 31)] {
            let a = random(m, n, "svd");
            let f = svd(&a).unwrap();
            assert!(f.reconstruct().max_abs_diff(&a) < 1e-12, "{m} x {n}");
            assert!(orthonormality(&f.u) < 1e-12 && orthonormality(&f.vt.transpose()) < 1e-12);
            assert!(f.sigma.windows(2).all(|w| w[0] >= w[1]) && f.sigma.iter().all(|&s| s >= 0.0));
            for j in 0..f.sigma.len() {
                let column: Vec<f64> = (0..m).map(|i| f.u[(i, j)]).collect();
                let largest = column.iter().cloned().max_by(|x, y| x.abs().total_cmp(&y.abs())).unwrap();
                assert!(largest > 0.0);
            }
        }
        assert_eq!(svd(&Matrix::zeros(4, 0)).unwrap().sigma, Vec::<f64>::new());
        // Negative control: one triplet less leaves exactly its singular value as the error in the Frobenius norm.
        let a = random(8, 5, "cut");
        let f = svd(&a).unwrap();
        let rest = f.sigma[4];
        let cut = f.truncate(4).reconstruct();
        let error: f64 = cut.data.iter().zip(&a.data).map(|(x, y)| (x - y).powi(2)).sum();
        assert!((error.sqrt() - rest).abs() < 1e-12 && rest > 0.1);
    }

    #[test]
    fn randomized_svd_finds_the_leading_triplets() {
        let (u, v) = (qr(&random(120, 60, "u")).unwrap().q, qr(&random(80, 60, "v")).unwrap().q);
        let sigma: Vec<f64> = (0..60).map(|i| 0.8_f64.powi(i)).collect();
        let a = Svd { u, sigma: sigma.clone(), vt: v.transpose() }.reconstruct();
        let f = randomized_svd(&a, 10, 8, 2, Seed(1)).unwrap();
        assert_eq!((f.u.cols, f.sigma.len(), f.vt.rows), (10, 10, 10));
        assert!(f.sigma.iter().zip(&sigma).all(|(x, y)| (x - y).abs() < 1e-4 * y));
        assert!(orthonormality(&f.u) < 1e-12 && orthonormality(&f.vt.transpose()) < 1e-12);
        let same = randomized_svd(&a, 10, 8, 2, Seed(1)).unwrap();
        let other = randomized_svd(&a, 10, 8, 2, Seed(2)).unwrap();
        assert_eq!(f.u, same.u);
        assert_ne!(f.u, other.u);
        // Of full width it is the exact decomposition; without power iterations it is visibly worse.
        let full = randomized_svd(&a, 80, 0, 0, Seed(1)).unwrap();
        assert!(full.reconstruct().max_abs_diff(&a) < 1e-12);
        let leading = |rank| leading_svd(&a, rank, Seed(1)).unwrap().u;
        assert_eq!(leading(4), randomized_svd(&a, 4, 16, 3, Seed(1)).unwrap().u);
        assert_eq!(leading(5), svd(&a).unwrap().truncate(5).u);
        let rough = randomized_svd(&a, 10, 0, 0, Seed(1)).unwrap();
        let (good, bad) = ((f.sigma[9] - sigma[9]).abs(), (rough.sigma[9] - sigma[9]).abs());
        assert!(bad > 10.0 * good, "{bad} {good}");
    }

    #[test]
    fn qr_has_a_non_negative_diagonal() {
        for (m, n) in [(6, 6), (50, 20), (20, 50), (1, 4)] {
            let a = random(m, n, "qr");
            let f = qr(&a).unwrap();
            assert!(naive(&f.q, &f.r).max_abs_diff(&a) < 1e-12);
            assert!(orthonormality(&f.q) < 1e-12);
            assert!((0..f.r.rows).all(|i| f.r[(i, i)] >= 0.0 && (0..i).all(|j| f.r[(i, j)] == 0.0)));
        }
    }

    #[test]
    fn cholesky_and_solve_invert_the_matrix() {
        for n in [1, 2, 17, 70] {
            let h = spd(n);
            let l = cholesky(&h).unwrap();
            let scale = h.data.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            assert!(naive(&l, &l.transpose()).max_abs_diff(&h) < 1e-13 * scale);
            assert!((0..n).all(|i| l[(i, i)] > 0.0 && (i + 1..n).all(|j| l[(i, j)] == 0.0)));
            let b = random(n, 3, "b");
            let x = solve_spd(&h, &b).unwrap();
            assert!(naive(&h, &x).max_abs_diff(&b) < 1e-10);
        }
    }

    #[test]
    fn gptq_factor_is_the_cholesky_of_the_inverse() {
        for n in [1, 5, 64, 130] {
            let h = spd(n);
            let u = cholesky_inverse_upper(&h).unwrap();
            // U^T U H = I, and the same U by the textbook's three steps.
            let inverse = naive(&u.transpose(), &u);
            assert!(naive(&inverse, &h).max_abs_diff(&Matrix::identity(n)) < 1e-9);
            let textbook = cholesky(&solve_spd(&h, &Matrix::identity(n)).unwrap()).unwrap().transpose();
            assert!(u.max_abs_diff(&textbook) < 1e-9);
            // Negative control: U U^T is not the inverse (the transpose on the wrong side is the usual slip).
            if n > 1 {
                let wrong = naive(&u, &u.transpose());
                assert!(naive(&wrong, &h).max_abs_diff(&Matrix::identity(n)) > 1e-3);
            }
        }
    }

    #[test]
    fn bad_matrices_are_typed_errors() {
        let mut indefinite = Matrix::identity(4);
        indefinite[(2, 2)] = -1.0;
        let expected = LinalgError::NotPositiveDefinite { pivot: 2, size: 4 };
        assert_eq!(cholesky(&indefinite).unwrap_err(), expected);
        assert_eq!(cholesky_inverse_upper(&indefinite).unwrap_err(), expected);
        assert_eq!(solve_spd(&indefinite, &Matrix::identity(4)).unwrap_err(), expected);
        // A dead input channel: singular, so GPTQ must add damping first.
        let mut dead = spd(4);
        (0..4).for_each(|i| (dead[(1, i)], dead[(i, 1)]) = (0.0, 0.0));
        assert!(matches!(
            cholesky_inverse_upper(&dead),
            Err(LinalgError::NotPositiveDefinite { pivot: 1, .. })
        ));
        let mut nan = Matrix::identity(3);
        nan[(1, 2)] = f64::NAN;
        assert!(matches!(svd(&nan), Err(LinalgError::NotFinite { row: 1, col: 2, .. })));
        assert!(symmetric_eigen(&nan).is_err() && cholesky(&nan).is_err() && qr(&nan).is_err());
        assert!(matches!(cholesky(&Matrix::zeros(2, 3)), Err(LinalgError::Shape { .. })));
        assert!(matches!(solve_spd(&spd(3), &Matrix::zeros(2, 1)), Err(LinalgError::Shape { .. })));
    }

    #[test]
    fn eigenvalues_descend_and_reconstruct() {
        for n in [1, 2, 30, 75] {
            let x = random(n, n, "eigen");
            let h = Matrix::from_fn(n, n, |i, j| x[(i, j)] + x[(j, i)]);
            let e = symmetric_eigen(&h).unwrap();
            assert!(orthonormality(&e.vectors) < 1e-12);
            assert!(e.values.windows(2).all(|w| w[0] >= w[1]));
            let scaled = Matrix::from_fn(n, n, |i, j| e.vectors[(i, j)] * e.values[j]);
            assert!(naive(&scaled, &e.vectors.transpose()).max_abs_diff(&h) < 1e-11);
            let alone = symmetric_eigenvalues(&h).unwrap();
            assert!(alone.iter().zip(&e.values).all(|(a, b)| (a - b).abs() < 1e-11));
        }
    }

    #[test]
    fn gram_is_x_transposed_x() {
        for (rows, n) in [(1, 1), (5, 3), (700, 20), (40, 300)] {
            let x: Vec<f32> = random(rows, n, "gram").to_f32();
            let mut gram = Gram::new(n);
            x.chunks(n * 3).for_each(|block| gram.add(block).unwrap());
            assert_eq!(gram.rows(), rows as u64);
            let (h, x) = (gram.finish(), Matrix::from_f32(rows, n, &x).unwrap());
            assert!(h.max_abs_diff(&naive(&x.transpose(), &x)) < 1e-10);
            assert!((0..n).all(|i| (0..n).all(|j| h[(i, j)] == h[(j, i)])));
        }
        assert!(Gram::new(3).add(&[1.0; 4]).is_err());
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        let (a, x) = (random(600, 310, "a"), random(900, 520, "x").to_f32());
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut gram = Gram::new(520);
                gram.add(&x).unwrap();
                let h = gram.finish();
                let r = randomized_svd(&a, 12, 4, 1, Seed(3)).unwrap();
                (a.matmul(&a.transpose()).unwrap(), cholesky_inverse_upper(&h).unwrap(), r.u, r.vt, h)
            })
        };
        assert!(run(1) == run(3));
    }

    #[test]
    fn rank_measures_are_ordered() {
        assert!((effective_rank(&[2.0; 6]) - 6.0).abs() < 1e-12);
        assert_eq!((stable_rank(&[2.0; 6]), participation_ratio(&[2.0; 6])), (6.0, 6.0));
        assert!((effective_rank(&[5.0, 0.0, 0.0]) - 1.0).abs() < 1e-12);
        assert_eq!(
            (effective_rank(&[0.0; 3]), stable_rank(&[]), participation_ratio(&[0.0])),
            (0.0, 0.0, 0.0)
        );
        let sigma = svd(&random(40, 25, "ranks")).unwrap().sigma;
        let (pr, er, sr) = (participation_ratio(&sigma), effective_rank(&sigma), stable_rank(&sigma));
        assert!(1.0 <= pr && pr <= er && er <= 25.0 && (1.0..=25.0).contains(&sr));
        // By hand: p = (3/4, 1/4).
        let entropy = -(0.75f64 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        assert!((effective_rank(&[3.0, 1.0]) - entropy.exp()).abs() < 1e-14);
        assert!((stable_rank(&[3.0, 1.0]) - 10.0 / 9.0).abs() < 1e-14);
        assert!((participation_ratio(&[3.0, 1.0]) - 1.6).abs() < 1e-14);
        // 1e-300 / 1e30 is 0.
        assert_eq!(effective_rank(&[1e30, 1e-300]), 1.0);
    }
}
