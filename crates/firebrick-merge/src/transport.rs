//! Which unit of one model belongs to which of another: exact assignment, and entropic transport plans for soft alignment and
//! different widths.

use firebrick_tensor::linalg::Matrix;

/// What cannot be transported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// More rows than columns: some would have no partner.
    #[error("{rows} units have no partner each among {cols}")]
    TooFew {
        /// Rows of the costs.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// Numbers of units that only very small parts divide.
    #[error(
        "an exact plan between {rows} and {cols} units has {parts} parts; {MOST_PARTS} are the most: use an entropic one"
    )]
    TooManyParts {
        /// Rows of the costs.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Their least common multiple.
        parts: usize,
    },
    /// A cost that is not finite, or no cost at all.
    #[error("costs should be finite, and there should be some")]
    Costs,
    /// A regularization that is not positive.
    #[error("the regularization should be above 0")]
    Regularization,
    /// The marginals did not come right.
    #[error(
        "the plan's marginals are still wrong after {iterations} rounds; a larger regularization converges faster"
    )]
    NoConvergence {
        /// Rounds made.
        iterations: usize,
    },
}

/// The column for each row of `cost: [n, m]`, `n <= m`, no two the same, at the least total cost (Jonker and Volgenant 1987:
/// shortest augmenting paths, at most `n^2 m` steps).
///
/// # Errors
/// More rows than columns, or costs that are not finite.
pub fn assignment(cost: &Matrix) -> Result<Vec<usize>, TransportError> {
    let (n, m) = (cost.rows(), cost.cols());
    if n > m {
        return Err(TransportError::TooFew { rows: n, cols: m });
    }
    if cost.data().iter().any(|c| !c.is_finite()) {
        return Err(TransportError::Costs);
    }
    // Prices of rows and columns, counted from 1; row_of[0] is the row that seeks a column.
    let (mut rows, mut cols) = (vec![0.0; n + 1], vec![0.0; m + 1]);
    let mut row_of = vec![0; m + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut least, mut before, mut done) =
            (vec![f64::INFINITY; m + 1], vec![0; m + 1], vec![false; m + 1]);
        let mut col = 0;
        loop {
            done[col] = true;
            let at = row_of[col];
            let (mut step, mut next) = (f64::INFINITY, 0);
            for j in (1..=m).filter(|j| !done[*j]) {
                let reduced = cost[(at - 1, j - 1)] - rows[at] - cols[j];
                if reduced < least[j] {
                    (least[j], before[j]) = (reduced, col);
                }
                if least[j] < step {
                    (step, next) = (least[j], j);
                }
            }
            for j in 0..=m {
                if done[j] {
                    rows[row_of[j]] += step;
                    cols[j] -= step;
                } else {
                    least[j] -= step;
                }
            }
            col = next;
            if row_of[col] == 0 {
                break;
            }
        }
        while col != 0 {
            row_of[col] = row_of[before[col]];
            col = before[col];
        }
    }
    let mut found = vec![0; n];
    for (col, &row) in row_of.iter().enumerate().skip(1).filter(|(_, row)| **row > 0) {
        found[row - 1] = col - 1;
    }
    Ok(found)
}

/// A transport plan between `n` and `m` units of equal weight: its rows add up to `1 / n`, its columns to `1 / m`.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// `[n, m]`, nowhere negative.
    pub mass: Matrix,
}

impl Plan {
    /// Each of `n` units stays where it is.
    pub fn identity(n: usize) -> Plan {
        Plan { mass: Matrix::from_fn(n, n, |i, j| if i == j { 1.0 / n as f64 } else { 0.0 }) }
    }

    /// For each column the row that most of its mass comes from, of equal ones the first.
    pub fn matches(&self) -> Vec<usize> {
        let better =
            |j, best: usize, i: usize| if self.mass[(i, j)] > self.mass[(best, j)] { i } else { best };
        (0..self.mass.cols()).map(|j| (0..self.mass.rows()).fold(0, |best, i| better(j, best, i))).collect()
    }

    /// The plan as a map in front of a weight: rows add up to 1, so that what a unit passes on arrives in full.
    pub fn incoming(&self) -> Matrix {
        let n = self.mass.rows() as f64;
        Matrix::from_fn(self.mass.rows(), self.mass.cols(), |i, j| self.mass[(i, j)] * n)
    }

    /// The plan as a map behind a weight: columns add up to 1, so that a unit is the mean of those it comes from.
    pub fn outgoing(&self) -> Matrix {
        let m = self.mass.cols() as f64;
        Matrix::from_fn(self.mass.rows(), self.mass.cols(), |i, j| self.mass[(i, j)] * m)
    }

    /// The total cost.
    pub fn cost(&self, cost: &Matrix) -> f64 {
        self.mass.data().iter().zip(cost.data()).map(|(p, c)| p * c).sum()
    }
}

/// Parts that [`exact`] splits units into, at most: the assignment takes the cube of it.
const MOST_PARTS: usize = 4096;

/// The plan of least cost (earth mover's distance): an [`assignment`] of parts of equal weight, as many a unit as it takes for both
/// sides to have the same number.
///
/// # Errors
/// Costs that are not finite, or none; numbers of units whose least common multiple is above 4096.
pub fn exact(cost: &Matrix) -> Result<Plan, TransportError> {
    let (n, m) = (cost.rows(), cost.cols());
    if n * m == 0 {
        return Err(TransportError::Costs);
    }
    let (mut divisor, mut rest) = (n, m);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    let parts = (n / divisor).saturating_mul(m);
    if parts > MOST_PARTS {
        return Err(TransportError::TooManyParts { rows: n, cols: m, parts });
    }
    let (row_of, col_of) = (|part: usize| part * n / parts, |part: usize| part * m / parts);
    let found = assignment(&Matrix::from_fn(parts, parts, |a, b| cost[(row_of(a), col_of(b))]))?;
    let mut mass = Matrix::zeros(n, m);
    for (a, b) in found.into_iter().enumerate() {
        mass[(row_of(a), col_of(b))] += 1.0 / parts as f64;
    }
    Ok(Plan { mass })
}

/// Largest error of a marginal, as a share of it.
const TOLERANCE: f64 = 1e-6;
const MOST_ROUNDS: usize = 20_000;

/// The plan of least `cost - regularization * entropy` (Cuturi 2013, arXiv 1306.0895), by Sinkhorn's rounds in the log domain.
/// Near 0 it is the exact plan, and takes many rounds.
///
/// # Errors
/// Costs that are not finite, a regularization that is not positive, marginals that do not come within a relative 1e-6.
pub fn sinkhorn(cost: &Matrix, regularization: f64) -> Result<Plan, TransportError> {
    let (n, m) = (cost.rows(), cost.cols());
    if n * m == 0 || cost.data().iter().any(|c| !c.is_finite()) {
        return Err(TransportError::Costs);
    }
    if !(regularization.is_finite() && regularization > 0.0) {
        return Err(TransportError::Regularization);
    }
    let kernel = Matrix::from_fn(n, m, |i, j| -cost[(i, j)] / regularization);
    let (row, col) = (-(n as f64).ln(), -(m as f64).ln());
    let (mut f, mut g) = (vec![0.0; n], vec![0.0; m]);
    for _ in 0..MOST_ROUNDS {
        for (i, f) in f.iter_mut().enumerate() {
            *f = row - log_sum_exp((0..m).map(|j| kernel[(i, j)] + g[j]));
        }
        // The rows are right now; so are the columns where these sums are what they should be.
        let mut worst: f64 = 0.0;
        for (j, g) in g.iter_mut().enumerate() {
            let sum = log_sum_exp((0..n).map(|i| kernel[(i, j)] + f[i]));
            worst = worst.max(((sum + *g - col).exp() - 1.0).abs());
            *g = col - sum;
        }
        if worst < TOLERANCE {
            let mass = Matrix::from_fn(n, m, |i, j| (kernel[(i, j)] + f[i] + g[j]).exp());
            return Ok(Plan { mass });
        }
    }
    Err(TransportError::NoConvergence { iterations: MOST_ROUNDS })
}

fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + values.map(|v| (v - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    fn total(cost: &Matrix, columns: &[usize]) -> f64 {
        columns.iter().enumerate().map(|(i, j)| cost[(i, *j)]).sum()
    }

    /// The least total cost, by trying all.
    fn brute_force(cost: &Matrix, row: usize, used: &mut Vec<bool>) -> f64 {
        if row == cost.rows() {
            return 0.0;
        }
        let mut best = f64::INFINITY;
        for col in 0..cost.cols() {
            if !used[col] {
                used[col] = true;
                best = best.min(cost[(row, col)] + brute_force(cost, row + 1, used));
                used[col] = false;
            }
        }
        best
    }

    #[test]
    fn assignments_are_those_of_trying_all() {
        for seed in 0..30 {
            for (n, m) in [(1, 1), (5, 5), (4, 6), (6, 6)] {
                let cost = Matrix::random_normal(n, m, Seed(seed), "cost");
                let found = assignment(&cost).unwrap();
                let mut used = vec![false; m];
                assert!(found.iter().all(|j| !std::mem::replace(&mut used[*j], true)), "{found:?}");
                let best = brute_force(&cost, 0, &mut vec![false; m]);
                assert!((total(&cost, &found) - best).abs() < 1e-12, "{n} x {m}: {found:?}");
            }
        }
        let cost = Matrix::random_normal(6, 6, Seed(1), "cost");
        let plain: Vec<usize> = (0..6).collect();
        assert!(total(&cost, &plain) > total(&cost, &assignment(&cost).unwrap()) + 0.1, "control");
        assert_eq!(assignment(&Matrix::zeros(3, 2)), Err(TransportError::TooFew { rows: 3, cols: 2 }));
        assert_eq!(assignment(&Matrix::from_fn(1, 1, |_, _| f64::NAN)), Err(TransportError::Costs));
    }

    #[test]
    fn plans_have_their_marginals_and_near_0_are_exact() {
        for seed in 0..3 {
            let cost = Matrix::random_normal(7, 7, Seed(seed), "cost");
            let exact = total(&cost, &assignment(&cost).unwrap()) / 7.0;
            let mut before = f64::INFINITY;
            for regularization in [1.0, 0.3, 0.1] {
                let plan = sinkhorn(&cost, regularization).unwrap();
                for i in 0..7 {
                    let row: f64 = (0..7).map(|j| plan.mass[(i, j)]).sum();
                    let col: f64 = (0..7).map(|j| plan.mass[(j, i)]).sum();
                    assert!((row - 1.0 / 7.0).abs() < 1e-5 && (col - 1.0 / 7.0).abs() < 1e-5);
                }
                let found = plan.cost(&cost);
                assert!(found > exact - 1e-6 && found < before, "{found} after {before}, exact {exact}");
                // Entropies of two plans differ by at most that of all against all.
                assert!(found - exact < regularization * 7f64.ln() + 1e-6, "{found} against {exact}");
                before = found;
            }
        }
    }

    #[test]
    fn exact_plans_cost_least_and_split_units() {
        for seed in 0..3 {
            for (n, m) in [(6, 6), (4, 6), (6, 4), (2, 6)] {
                let cost = Matrix::random_normal(n, m, Seed(seed), "cost");
                let plan = exact(&cost).unwrap();
                for i in 0..n {
                    assert!(((0..m).map(|j| plan.mass[(i, j)]).sum::<f64>() - 1.0 / n as f64).abs() < 1e-12);
                }
                for j in 0..m {
                    assert!(((0..n).map(|i| plan.mass[(i, j)]).sum::<f64>() - 1.0 / m as f64).abs() < 1e-12);
                }
                // Entropic plans cost more, by at most what their entropy weighs.
                let soft = sinkhorn(&cost, 0.3).unwrap().cost(&cost);
                let (least, most) = (plan.cost(&cost), 0.3 * (n.min(m) as f64).ln());
                assert!(least < soft + 1e-6 && soft < least + most + 1e-6, "{least} {soft}");
            }
        }
        let diagonal = Matrix::from_fn(3, 3, |i, j| f64::from(u8::from(i != (j + 1) % 3)));
        assert_eq!(exact(&diagonal).unwrap().matches(), [1, 2, 0]);
        assert_eq!(Plan::identity(3).matches(), [0, 1, 2]);
        let odd = exact(&Matrix::zeros(97, 101)).unwrap_err();
        assert_eq!(odd, TransportError::TooManyParts { rows: 97, cols: 101, parts: 9797 });
        assert_eq!(exact(&Matrix::zeros(3, 0)), Err(TransportError::Costs));
    }

    #[test]
    fn plans_between_different_widths_have_two_normalizations() {
        let cost = Matrix::random_normal(4, 6, Seed(3), "cost");
        let plan = sinkhorn(&cost, 0.5).unwrap();
        let (incoming, outgoing) = (plan.incoming(), plan.outgoing());
        for i in 0..4 {
            assert!(((0..6).map(|j| incoming[(i, j)]).sum::<f64>() - 1.0).abs() < 1e-5);
        }
        for j in 0..6 {
            assert!(((0..4).map(|i| outgoing[(i, j)]).sum::<f64>() - 1.0).abs() < 1e-5);
        }
        assert!(incoming.max_abs_diff(&outgoing) > 0.01, "control: they differ");
        assert_eq!(sinkhorn(&cost, 0.0), Err(TransportError::Regularization));
        assert_eq!(sinkhorn(&Matrix::zeros(0, 3), 1.0), Err(TransportError::Costs));
    }
}
