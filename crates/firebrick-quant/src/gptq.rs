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
    /// Added to the diagonal of the Hessian, as a share of its mean; raised by itself when the factorization fails.
    pub damp: f64,
    /// Columns whose updates are applied together; any value gives the same result.
    pub block: usize,
    /// Quantize the columns with the largest activations first, on group parameters fixed beforehand (act-order with static groups).
    pub act_order: bool,
}

impl Default for GptqConfig {
    fn default() -> Self {
        GptqConfig { damp: 0.01, block: 128, act_order: false }
    }
}

/// What happened to one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqReport {
    /// Half the weighted squared error that GPTQ booked, in units of the Hessian.
    pub loss: f64,
    /// The damping that worked.
    pub damp: f64,
    /// Columns that no activation ever touched; they become 0.
    pub dead: usize,
}

/// Quantizes `weight: [d_out, d_in]` (row-major) for inputs with second moment `hessian: [d_in, d_in]` (any scale).
///
/// Costs `O(d_in^3 + d_out d_in^2)`, in f64.
///
/// # Errors
/// If sizes disagree, the bits are not in 2..=8, or no damping up to the mean of the diagonal makes the Hessian positive definite.
pub fn gptq(
    weight: &[f32],
    hessian: &Matrix,
    grid: Grid,
    config: GptqConfig,
) -> Result<(QuantizedMatrix, GptqReport), QuantError> {
    let n = hessian.rows();
    let m = rows(weight, n, grid)?;
    let mut h = hessian.data().to_vec();
    let mut w: Vec<f64> = weight.iter().map(|v| f64::from(*v)).collect();
    let mut dead = 0;
    for j in 0..n {
        if h[j * n + j] <= 0.0 {
            h[j * n + j] = 1.0;
            (0..m).for_each(|r| w[r * n + j] = 0.0);
            dead += 1;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    if config.act_order {
        order.sort_by(|a, b| h[b * n + b].total_cmp(&h[a * n + a]).then(a.cmp(b)));
    }
    let (u, damp) = inverse_factor(&permuted(&h, &order), n, config.damp)?;

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
        let end = (start + config.block.max(1)).min(n);
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
                        let fresh = |j| (row[j] - pending(errors, start, i, j, end, &u, n)) as f32;
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
    let loss = losses.iter().sum();
    Ok((QuantizedMatrix { grid, d_out: m, d_in: n, codes, params }, GptqReport { loss, damp, dead }))
}

/// What column `j` still has to give for the errors of columns `start..i`, if it lies beyond the block that ends at `end`.
fn pending(errors: &[f64], start: usize, i: usize, j: usize, end: usize, u: &[f64], n: usize) -> f64 {
    if j < end { 0.0 } else { (start..i).map(|k| errors[k - start] * u[k * n + j]).sum() }
}

fn permuted(h: &[f64], order: &[usize]) -> Vec<f64> {
    let n = order.len();
    order.iter().flat_map(|a| order.iter().map(move |b| h[a * n + b])).collect()
}

/// `chol_upper((H + damp * mean(diag) * I)^-1)`, with more damping until it exists.
fn inverse_factor(h: &[f64], n: usize, damp: f64) -> Result<(Vec<f64>, f64), QuantError> {
    let mean = (0..n).map(|j| h[j * n + j]).sum::<f64>() / n as f64;
    let mut damp = damp.max(0.0);
    let mut failure = String::new();
    while damp <= 1.0 {
        let mut damped = h.to_vec();
        (0..n).for_each(|j| damped[j * n + j] += damp * mean);
        let matrix = Matrix::new(n, n, damped).map_err(|e| QuantError::Setting(e.to_string()))?;
        match cholesky_inverse_upper(&matrix) {
            Ok(u) => return Ok((u.data().to_vec(), damp)),
            Err(e) => failure = e.to_string(),
        }
        damp = if damp == 0.0 { 1e-6 } else { damp * 4.0 };
    }
    Err(QuantError::Setting(format!("the Hessian is not positive definite even with damping 1: {failure}")))
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

    #[test]
    fn block_size_changes_nothing() {
        let (weight, h) = problem(5, 48, 1);
        for group in [0, 16, 20] {
            let of = |block| {
                gptq(&weight, &h, grid(3, group), GptqConfig { block, ..Default::default() }).unwrap().0
            };
            let reference = of(1);
            assert_eq!(of(7).codes, reference.codes, "group {group}");
            assert_eq!(of(128).codes, reference.codes, "group {group}");
        }
    }

    #[test]
    fn diagonal_hessian_is_round_to_nearest_and_scale_does_not_matter() {
        let (weight, h) = problem(6, 40, 2);
        let diagonal = Matrix::from_fn(40, 40, |a, b| if a == b { h.data()[a * 40 + a] } else { 0.0 });
        let nearest = rtn(&weight, 40, grid(4, 8)).unwrap();
        let config = GptqConfig::default();
        assert_eq!(gptq(&weight, &diagonal, grid(4, 8), config).unwrap().0.codes, nearest.codes);
        let full = gptq(&weight, &h, grid(4, 8), config).unwrap().0;
        assert_ne!(full.codes, nearest.codes, "control: correlations do matter");
        let scaled = Matrix::from_fn(40, 40, |a, b| h.data()[a * 40 + b] * 8.0);
        assert_eq!(gptq(&weight, &scaled, grid(4, 8), config).unwrap().0.codes, full.codes);
    }

    #[test]
    fn beats_round_to_nearest_on_the_output() {
        for seed in 0..3 {
            let (weight, h) = problem(24, 96, 10 + seed);
            for bits in [3, 4] {
                let nearest = output_error(&weight, &rtn(&weight, 96, grid(bits, 32)).unwrap(), &h);
                let of = |act_order| {
                    let config = GptqConfig { act_order, ..Default::default() };
                    output_error(&weight, &gptq(&weight, &h, grid(bits, 32), config).unwrap().0, &h)
                };
                let (plain, ordered) = (of(false), of(true));
                assert!(plain < 0.85 * nearest, "{bits} bits, seed {seed}: {plain} against {nearest}");
                assert!(ordered < plain, "{bits} bits, seed {seed}: act-order {ordered} against {plain}");
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
        let (q, report) = gptq(&weight, &h, grid(4, 0), GptqConfig::default()).unwrap();
        assert_eq!(report.dead, 1);
        assert!((0..4).all(|r| q.dequantize()[r * 16 + 5] == 0.0));
        let rank_one = Matrix::from_fn(16, 16, |a, b| (a + 1) as f64 * (b + 1) as f64);
        let config = GptqConfig { damp: 0.0, ..Default::default() };
        let (_, report) = gptq(&weight, &rank_one, grid(4, 0), config).unwrap();
        assert!(report.damp > 0.0);
    }
}
