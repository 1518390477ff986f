//! GPTQ (arXiv 2210.17323): quantize column by column, and let the columns still to come absorb each error.
//!
//! With `H = X^T X` and `U = chol_upper(H^-1)`, rounding column `i` to `q` costs `e = (w - q) / U_ii`, and every later
//! column `j` is moved by `-e U_ij`, which keeps the layer's output as close as it can be.

use firebrick_tensor::grid::{Grid, GroupParams};
use firebrick_tensor::linalg::{Matrix, cholesky_inverse_upper};
use rayon::prelude::*;

use crate::rtn::rows;
use crate::{QuantError, QuantizedMatrix};

/// Settings of GPTQ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqConfig {
    /// Added to the diagonal of the Hessian, as a share of its mean over the columns that are not dead, 0 to 1; raised by
    /// itself when the factorization fails.
    pub damp: f64,
    /// Columns whose updates are applied together; any value gives the same result, up to the rounding of sums.
    pub block: usize,
    /// Quantize the columns with the largest activations first, on group parameters fixed beforehand (act-order with static groups).
    pub act_order: bool,
}

impl Default for GptqConfig {
    fn default() -> Self {
        GptqConfig { damp: 0.01, block: 128, act_order: false }
    }
}

impl GptqConfig {
    /// What is wrong with these settings, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        let fine = (0.0..=1.0).contains(&self.damp);
        (!fine).then(|| format!("damp is {}; it lies in 0..=1", self.damp))
    }
}

/// What happened to one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqReport {
    /// Half the weighted squared error that GPTQ booked, in units of the damped Hessian.
    pub loss: f64,
    /// The damping that worked.
    pub damp: f64,
    /// Columns that no activation ever touched; they become 0.
    pub dead: usize,
}

/// Quantizes `weight: [d_out, d_in]` (row-major) for inputs with second moment `hessian: [d_in, d_in]`. The scale of the Hessian does
/// not matter.
///
/// Costs `O(d_in^3 + d_out d_in^2)`, in f64.
///
/// # Errors
/// If sizes disagree, a setting is out of range (bits 2..=8, damping 0..=1), a number is not finite, or no damping up to the mean of
/// the diagonal makes the Hessian positive definite.
pub fn gptq(
    weight: &[f32],
    d_in: usize,
    hessian: &Matrix,
    grid: Grid,
    config: GptqConfig,
) -> Result<(QuantizedMatrix, GptqReport), QuantError> {
    rows(weight, d_in, grid)?;
    if hessian.rows() != d_in {
        return Err(QuantError::Size { what: "rows of the Hessian", expected: d_in, found: hessian.rows() });
    }
    Factor::new(hessian, config)?.quantize(weight, grid)
}

/// The factored Hessian of an input: all that GPTQ needs to know of it, shared by the layers that read the same input.
pub(crate) struct Factor {
    /// `chol_upper(H^-1)` of the damped Hessian, rows and columns in the order of `order`.
    u: Matrix,
    /// The columns in the order they are quantized.
    order: Vec<usize>,
    /// Columns that no activation ever touched.
    dead: Vec<usize>,
    /// The damping that worked.
    damp: f64,
    config: GptqConfig,
}

impl Factor {
    /// Factors `hessian: [d_in, d_in]`.
    pub(crate) fn new(hessian: &Matrix, config: GptqConfig) -> Result<Self, QuantError> {
        let n = hessian.rows();
        if hessian.cols() != n {
            let found = hessian.cols();
            return Err(QuantError::Size { what: "columns of the Hessian", expected: n, found });
        }
        if let Some(problem) = config.problem() {
            return Err(QuantError::Setting(problem));
        }
        if hessian.data().iter().any(|v| !v.is_finite()) {
            return Err(QuantError::NotFinite { what: "Hessian" });
        }
        let mut h = hessian.data().to_vec();
        let (live, dead): (Vec<usize>, Vec<usize>) = (0..n).partition(|j| h[j * n + j] > 0.0);
        // Of live columns only, so that scaling the Hessian scales the damping, however many columns are dead.
        let mean = live.iter().map(|j| h[j * n + j]).sum::<f64>() / live.len() as f64;
        let mean = if live.is_empty() { 1.0 } else { mean };
        dead.iter().for_each(|j| h[j * n + j] = mean);
        let mut order: Vec<usize> = (0..n).collect();
        if config.act_order {
            order.sort_by(|a, b| h[b * n + b].total_cmp(&h[a * n + a]).then(a.cmp(b)));
        }
        let h = Matrix::from_fn(n, n, |a, b| h[order[a] * n + order[b]]);
        let (u, damp) = inverse_factor(&h, mean, config.damp)?;
        Ok(Factor { u, order, dead, damp, config })
    }

    /// Quantizes `weight: [d_out, d_in]`.
    pub(crate) fn quantize(
        &self,
        weight: &[f32],
        grid: Grid,
    ) -> Result<(QuantizedMatrix, GptqReport), QuantError> {
        let Factor { order, config, .. } = self;
        let (n, u) = (order.len(), self.u.data());
        let m = rows(weight, n, grid)?;
        let mut w: Vec<f64> = weight.iter().map(|v| f64::from(*v)).collect();
        for j in &self.dead {
            (0..m).for_each(|r| w[r * n + j] = 0.0);
        }
        let (len, groups) = (grid.group_len(n), grid.groups(n));
        let blank = GroupParams { scale: 1.0, zero: 0.0, top: 0.0 };
        let mut params = vec![blank; m * groups];
        if config.act_order {
            // The columns of a group are no longer neighbours, so its parameters come from the original weight.
            for (r, row) in w.chunks_exact(n).enumerate() {
                for (g, group) in row.chunks(len).enumerate() {
                    let group: Vec<f32> = group.iter().map(|v| *v as f32).collect();
                    params[r * groups + g] = grid.fit(&group);
                }
            }
        }
        let mut codes = vec![0u8; m * n];
        let mut losses = vec![0.0; m];
        // Columns in the order they are quantized, row-major, so that the updates run over contiguous memory.
        let mut w: Vec<f64> = w.chunks_exact(n).flat_map(|row| order.iter().map(|c| row[*c])).collect();
        for start in (0..n).step_by(config.block.max(1)) {
            let end = start.saturating_add(config.block.max(1)).min(n);
            let mut errors = vec![0.0; m * (end - start)];
            let rows = w.par_chunks_mut(n).zip(codes.par_chunks_mut(n)).zip(params.par_chunks_mut(groups));
            rows.zip(errors.par_chunks_mut(end - start)).zip(&mut losses).for_each(
                |((((row, codes), params), errors), loss)| {
                    for i in start..end {
                        let column = order[i];
                        let group = column / len;
                        if !config.act_order && i % len == 0 {
                            // Later columns of the group may lie beyond this block: bring them up to date first.
                            let stop = (i + len).min(n);
                            let fresh = |j| (row[j] - pending(errors, start, i, j, end, u, n)) as f32;
                            params[group] = grid.fit(&(i..stop).map(fresh).collect::<Vec<_>>());
                        }
                        let code = params[group].encode(row[i] as f32);
                        let error = (row[i] - f64::from(params[group].decode(code))) / u[i * n + i];
                        codes[column] = code;
                        *loss += error * error / 2.0;
                        errors[i - start] = error;
                        let ui = &u[i * n + i + 1..i * n + end];
                        row[i + 1..end].iter_mut().zip(ui).for_each(|(x, c)| *x -= error * c);
                    }
                },
            );
            if end < n {
                // What the block's errors give to all later columns: one matrix product.
                let later = Matrix::from_fn(end - start, n - end, |i, j| u[(start + i) * n + end + j]);
                let update = Matrix::new(m, end - start, errors).and_then(|e| e.matmul(&later));
                let update = update.map_err(|e| QuantError::Setting(e.to_string()))?;
                w.par_chunks_mut(n).zip(update.data().par_chunks(n - end)).for_each(|(row, update)| {
                    row[end..].iter_mut().zip(update).for_each(|(x, u)| *x -= u);
                });
            }
        }
        let report = GptqReport { loss: losses.iter().sum(), damp: self.damp, dead: self.dead.len() };
        Ok((QuantizedMatrix { grid, d_out: m, d_in: n, codes, params }, report))
    }
}

/// What column `j` still has to give for the errors of columns `start..i`, if it lies beyond the block that ends at `end`.
fn pending(errors: &[f64], start: usize, i: usize, j: usize, end: usize, u: &[f64], n: usize) -> f64 {
    if j < end { 0.0 } else { (start..i).map(|k| errors[k - start] * u[k * n + j]).sum() }
}

/// `chol_upper((H + damp * mean * I)^-1)`, with more damping until it exists, up to 1.
fn inverse_factor(h: &Matrix, mean: f64, mut damp: f64) -> Result<(Matrix, f64), QuantError> {
    let n = h.rows();
    loop {
        let mut damped = h.clone();
        (0..n).for_each(|j| damped.data_mut()[j * n + j] += damp * mean);
        match cholesky_inverse_upper(&damped) {
            Ok(u) => return Ok((u, damp)),
            Err(e) if damp >= 1.0 => return Err(QuantError::NotDefinite(e.to_string())),
            Err(_) => damp = if damp == 0.0 { 1e-6 } else { (damp * 4.0).min(1.0) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtn;
    use firebrick_core::Seed;
    use firebrick_tensor::grid::GridKind;

    /// Correlated inputs with log-normal channel scales, as layers really see them.
    fn problem(m: usize, n: usize, seed: u64) -> (Vec<f32>, Matrix) {
        let seed = Seed(seed);
        let mix = seed.normal("mix", n * n, (1.0 / n as f64).sqrt());
        let scale = seed.normal("scale", n, 0.8);
        let tokens = 4 * n;
        let z = seed.normal("z", tokens * n, 1.0);
        let mut h = Matrix::zeros(n, n);
        for t in 0..tokens {
            let row: Vec<f64> = (0..n)
                .map(|j| {
                    let mixed: f64 = (0..n)
                        .map(|k| {
                            let own = if j == k { 0.5 } else { 0.0 };
                            f64::from(z[t * n + k]) * (own + f64::from(mix[k * n + j]))
                        })
                        .sum();
                    mixed * f64::from(scale[j]).exp()
                })
                .collect();
            for a in 0..n {
                for b in 0..n {
                    h.data_mut()[a * n + b] += row[a] * row[b];
                }
            }
        }
        (seed.normal("weight", m * n, 1.0), h)
    }

    /// `tr(D H D^T)`, the output error that `q` causes.
    fn output_error(weight: &[f32], q: &QuantizedMatrix, h: &Matrix) -> f64 {
        let n = h.rows();
        let d: Vec<f64> =
            weight.iter().zip(q.dequantize()).map(|(a, b)| f64::from(*a) - f64::from(b)).collect();
        d.chunks_exact(n)
            .map(|row| {
                (0..n)
                    .map(|a| (0..n).map(|b| row[a] * h.data()[a * n + b] * row[b]).sum::<f64>())
                    .sum::<f64>()
            })
            .sum()
    }

    fn grid(bits: u8, group: usize) -> Grid {
        Grid { bits, group, kind: GridKind::SymHalf, clip: false }
    }

    fn codes(weight: &[f32], h: &Matrix, grid: Grid, config: GptqConfig) -> Vec<u8> {
        gptq(weight, h.rows(), h, grid, config).unwrap().0.codes
    }

    #[test]
    fn block_size_and_threads_change_nothing() {
        let (weight, h) = problem(5, 48, 1);
        for (group, act_order, kind, clip) in [
            (0, false, GridKind::SymHalf, false),
            (16, false, GridKind::Asym, true),
            (20, false, GridKind::SymHalf, true),
            (16, true, GridKind::Asym, false),
            (20, true, GridKind::SymHalf, true),
        ] {
            let grid = Grid { bits: 3, group, kind, clip };
            let of = |block, damp| codes(&weight, &h, grid, GptqConfig { damp, block, act_order });
            let reference = of(1, 0.01);
            assert_eq!(of(7, 0.01), reference, "{grid:?}");
            assert_eq!(of(128, 0.01), reference, "{grid:?}");
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert_eq!(pool.install(|| of(7, 0.01)), reference, "{grid:?} on {threads} threads");
            }
            assert_ne!(of(7, 0.3), reference, "control: {grid:?} does depend on its settings");
            assert_ne!(rtn(&weight, 48, grid).unwrap().codes, reference, "control: and on the updates");
        }
    }

    #[test]
    fn diagonal_hessian_is_round_to_nearest_and_scale_does_not_matter() {
        let (weight, mut h) = problem(6, 40, 2);
        let diagonal = Matrix::from_fn(40, 40, |a, b| if a == b { h.data()[a * 40 + a] } else { 0.0 });
        for act_order in [false, true] {
            let config = GptqConfig { act_order, ..Default::default() };
            let nearest = rtn(&weight, 40, grid(4, 8)).unwrap();
            assert_eq!(codes(&weight, &diagonal, grid(4, 8), config), nearest.codes);
            assert_ne!(codes(&weight, &h, grid(4, 8), config), nearest.codes, "control: correlations matter");
        }
        // With a dead column too, whose diagonal says nothing about the scale.
        for j in 0..40 {
            h.data_mut()[5 * 40 + j] = 0.0;
            h.data_mut()[j * 40 + 5] = 0.0;
        }
        let config = GptqConfig::default();
        let full = codes(&weight, &h, grid(4, 8), config);
        for factor in [8.0, 1e-6, 1e6] {
            let scaled = Matrix::from_fn(40, 40, |a, b| h.data()[a * 40 + b] * factor);
            assert_eq!(codes(&weight, &scaled, grid(4, 8), config), full, "{factor}");
        }
        let damped = codes(&weight, &h, grid(4, 8), GptqConfig { damp: 0.5, ..config });
        assert_ne!(damped, full, "control: the codes do depend on the damping");
    }

    #[test]
    fn beats_round_to_nearest_on_the_output() {
        for seed in 0..3 {
            let (weight, h) = problem(24, 96, 10 + seed);
            for (bits, kind, clip) in [
                (3, GridKind::SymHalf, false),
                (4, GridKind::SymHalf, false),
                (3, GridKind::SymHalf, true),
                (3, GridKind::Asym, false),
                (3, GridKind::Asym, true),
            ] {
                let grid = Grid { bits, group: 32, kind, clip };
                let nearest = output_error(&weight, &rtn(&weight, 96, grid).unwrap(), &h);
                let of = |act_order| {
                    let config = GptqConfig { act_order, ..Default::default() };
                    output_error(&weight, &gptq(&weight, 96, &h, grid, config).unwrap().0, &h)
                };
                let (plain, ordered) = (of(false), of(true));
                assert!(plain < 0.85 * nearest, "{grid:?}, seed {seed}: {plain} against {nearest}");
                assert!(ordered < plain, "{grid:?}, seed {seed}: act-order {ordered} against {plain}");
            }
        }
    }

    #[test]
    fn dead_columns_become_zero_and_singular_hessians_are_damped() {
        let (weight, mut h) = problem(4, 16, 3);
        for j in 0..16 {
            h.data_mut()[5 * 16 + j] = 0.0;
            h.data_mut()[j * 16 + 5] = 0.0;
        }
        let (q, report) = gptq(&weight, 16, &h, grid(4, 0), GptqConfig::default()).unwrap();
        assert_eq!(report.dead, 1);
        assert!((0..4).all(|r| q.dequantize()[r * 16 + 5] == 0.0));
        let rank_one = Matrix::from_fn(16, 16, |a, b| (a + 1) as f64 * (b + 1) as f64);
        let config = GptqConfig { damp: 0.0, ..Default::default() };
        let (_, report) = gptq(&weight, 16, &rank_one, grid(4, 0), config).unwrap();
        assert!(report.damp > 0.0);
    }

    #[test]
    fn what_cannot_be_factored_is_said() {
        let (weight, h) = problem(3, 8, 4);
        let fail = |h: &Matrix, damp| {
            gptq(&weight, 8, h, grid(4, 0), GptqConfig { damp, ..Default::default() }).unwrap_err()
        };
        for damp in [-0.1, 1.5, f64::NAN] {
            assert!(matches!(fail(&h, damp), QuantError::Setting(_)), "{damp}");
        }
        assert!(matches!(fail(&Matrix::zeros(8, 6), 0.01), QuantError::Size { expected: 8, found: 6, .. }));
        assert!(matches!(fail(&Matrix::identity(12), 0.01), QuantError::Size { expected: 8, found: 12, .. }));
        let mut broken = h.clone();
        broken.data_mut()[9] = f64::NAN;
        assert!(matches!(fail(&broken, 0.01), QuantError::NotFinite { what: "Hessian" }));
        let indefinite = Matrix::from_fn(8, 8, |a, b| if a == b { 1.0 } else { 3.0 });
        assert!(matches!(fail(&indefinite, 0.01), QuantError::NotDefinite(_)));
        // The smallest eigenvalue is -0.9, the mean of the diagonal 1.
        let barely = Matrix::from_fn(8, 8, |a, b| if a == b { 1.0 } else { 1.9 });
        let (_, report) = gptq(&weight, 8, &barely, grid(4, 0), GptqConfig::default()).unwrap();
        assert_eq!(report.damp, 1.0);
        let zero = Matrix::zeros(8, 8);
        let (q, report) = gptq(&weight, 8, &zero, grid(4, 0), GptqConfig::default()).unwrap();
        assert!(report.dead == 8 && q.dequantize().iter().all(|v| *v == 0.0));
        let not_finite = [f32::INFINITY; 8];
        let error = gptq(&not_finite, 8, &h, grid(4, 0), GptqConfig::default()).unwrap_err();
        assert!(matches!(error, QuantError::NotFinite { what: "weight" }), "{error}");
    }
}
