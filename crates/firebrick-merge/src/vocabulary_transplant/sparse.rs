//! Rows written as combinations of few others: orthogonal matching pursuit, and nearest neighbours.

use firebrick_tensor::linalg::{LinalgError, Matrix};
use rayon::prelude::*;

/// Indices of atoms with their coefficients, in the order in which they were chosen.
pub type Combination = Vec<(usize, f64)>;

/// Share of a row's norm below which a residual is the rounding of f32.
const EXACT: f64 = 1e-7;

/// Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993): each row of `targets` `[n, d]` as a combination of at most
/// `k` rows of `atoms` `[m, d]`.
///
/// Each step takes the atom with the largest `|residual . atom|` (of equals the first), makes it orthogonal to those taken before (a
/// column of a QR decomposition), and takes its direction off the residual; the coefficients come from the triangular system. A row
/// ends before `k` atoms when nothing but rounding is left of it, or no atom has anything new. Costs `2 n m d k` operations.
///
/// # Errors
/// If `atoms` and `targets` differ in columns.
pub fn omp(atoms: &Matrix, targets: &Matrix, k: usize) -> Result<Vec<Combination>, LinalgError> {
    let mut fits: Vec<Fit> = (0..targets.rows()).map(|i| Fit::new(targets.row(i))).collect();
    for _ in 0..k.min(atoms.rows()) {
        let residuals: Vec<f64> = fits.iter().flat_map(|fit| fit.residual.iter().copied()).collect();
        let residuals = Matrix::new(targets.rows(), targets.cols(), residuals)?;
        let scores = atoms.matmul(&residuals.transpose())?;
        let best = largest(&scores, &fits);
        fits.par_iter_mut().zip(best).for_each(|(fit, best)| match best {
            Some(atom) if !fit.done => fit.done = !fit.add(atom, atoms.row(atom)),
            _ => fit.done = true,
        });
        if fits.iter().all(|fit| fit.done) {
            break;
        }
    }
    Ok(fits.iter().map(Fit::coefficients).collect())
}

/// Each row of `targets` `[n, d]` as the least-squares combination of the `k` rows of `atoms` `[m, d]` with the largest cosine to it
/// (of equals the first); of atoms that depend on closer ones the closer count.
///
/// # Errors
/// If `atoms` and `targets` differ in columns.
pub fn nearest(atoms: &Matrix, targets: &Matrix, k: usize) -> Result<Vec<Combination>, LinalgError> {
    let scores = targets.matmul(&atoms.transpose())?;
    let norms: Vec<f64> = (0..atoms.rows()).map(|i| norm(atoms.row(i))).collect();
    let one = |i: usize| {
        let cosine = |atom: &usize| if norms[*atom] > 0.0 { scores[(i, *atom)] / norms[*atom] } else { -1.0 };
        let mut order: Vec<usize> = (0..atoms.rows()).collect();
        let closer = |a: &usize, b: &usize| cosine(b).total_cmp(&cosine(a)).then(a.cmp(b));
        if k < order.len() {
            order.select_nth_unstable_by(k, closer);
            order.truncate(k);
        }
        order.sort_unstable_by(closer);
        let mut fit = Fit::new(targets.row(i));
        if !fit.done {
            for atom in order {
                fit.add(atom, atoms.row(atom));
            }
        }
        fit.coefficients()
    };
    Ok((0..targets.rows()).into_par_iter().map(one).collect())
}

/// For each fit the atom with the largest score in magnitude that it has not; `scores` is `[atoms, fits]`.
fn largest(scores: &Matrix, fits: &[Fit]) -> Vec<Option<usize>> {
    let mut best: Vec<(f64, Option<usize>)> = vec![(0.0, None); fits.len()];
    for atom in 0..scores.rows() {
        for ((best, score), fit) in best.iter_mut().zip(scores.row(atom)).zip(fits) {
            if score.abs() > best.0 && !fit.chosen.contains(&atom) {
                *best = (score.abs(), Some(atom));
            }
        }
    }
    best.into_iter().map(|(_, atom)| atom).collect()
}

/// A row, the atoms taken for it, and their QR decomposition.
struct Fit {
    residual: Vec<f64>,
    /// Norm below which nothing is left.
    least: f64,
    done: bool,
    chosen: Vec<usize>,
    /// Orthonormal directions.
    q: Vec<Vec<f64>>,
    /// Column `j` has the `j + 1` products of atom `j` with the directions.
    r: Vec<Vec<f64>>,
    /// The row along each direction.
    z: Vec<f64>,
}

impl Fit {
    fn new(target: &[f64]) -> Fit {
        let least = EXACT * norm(target);
        Fit {
            residual: target.to_vec(),
            least,
            done: least == 0.0,
            chosen: Vec::new(),
            q: Vec::new(),
            r: Vec::new(),
            z: Vec::new(),
        }
    }

    /// Takes an atom; whether it had a direction of its own and something is left.
    fn add(&mut self, index: usize, atom: &[f64]) -> bool {
        let mut direction = atom.to_vec();
        let mut column = vec![0.0; self.q.len()];
        // Twice is enough to be orthogonal to rounding.
        for _ in 0..2 {
            for (q, entry) in self.q.iter().zip(&mut column) {
                let along = dot(q, &direction);
                *entry += along;
                subtract(&mut direction, along, q);
            }
        }
        let length = norm(&direction);
        if length <= EXACT * norm(atom) {
            return false;
        }
        direction.iter_mut().for_each(|v| *v /= length);
        column.push(length);
        let along = dot(&direction, &self.residual);
        subtract(&mut self.residual, along, &direction);
        self.chosen.push(index);
        self.q.push(direction);
        self.r.push(column);
        self.z.push(along);
        norm(&self.residual) > self.least
    }

    /// Solves `R c = z` from the last row up.
    fn coefficients(&self) -> Combination {
        let mut c = self.z.clone();
        for j in (0..c.len()).rev() {
            c[j] /= self.r[j][j];
            for i in 0..j {
                c[i] -= self.r[j][i] * c[j];
            }
        }
        self.chosen.iter().copied().zip(c).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn subtract(a: &mut [f64], factor: f64, b: &[f64]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a -= factor * b);
}
