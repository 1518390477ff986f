//! Rows of tokens that training never reached.
//!
//! Such rows are near 0 where weight decay took them there, or stand as many of them were made, all alike. They say nothing of what
//! their tokens mean (Land and Bartolo 2024, arXiv 2405.05417).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use firebrick_tensor::checkpoint::{Checkpoint, CheckpointError};

/// Share of the median norm up to which a row counts as 0.
const NEAR_ZERO: f64 = 0.01;
/// Rows that are the same bit for bit, from which on none of them was trained.
const ALIKE: usize = 3;
/// Rows that are read together.
const BATCH: usize = 1024;

/// Whether each row of the matrix `name` `[rows, width]`, one for each token, is untrained.
///
/// # Errors
/// If it can't be read.
pub(super) fn untrained(checkpoint: &Checkpoint, name: &str) -> Result<Vec<bool>, CheckpointError> {
    let shape = &checkpoint.tensor(name)?.shape;
    let [rows, width] = shape[..] else { return Ok(Vec::new()) };
    let mut found: Vec<(f64, u64)> = Vec::with_capacity(rows);
    let mut values = vec![0.0; BATCH.min(rows) * width];
    for start in (0..rows).step_by(BATCH) {
        let count = BATCH.min(rows - start);
        let values = &mut values[..count * width];
        checkpoint.read_f32_into(name, start * width..(start + count) * width, values)?;
        found.extend(values.chunks(width.max(1)).map(|row| {
            let mut hash = DefaultHasher::new();
            row.iter().for_each(|v| hash.write_u32(v.to_bits()));
            (row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt(), hash.finish())
        }));
    }
    let mut norms: Vec<f64> = found.iter().map(|(norm, _)| *norm).collect();
    norms.sort_unstable_by(f64::total_cmp);
    let least = NEAR_ZERO * norms.get(norms.len() / 2).copied().unwrap_or(0.0);
    let mut alike: HashMap<u64, usize> = HashMap::new();
    found.iter().for_each(|(_, hash)| *alike.entry(*hash).or_default() += 1);
    Ok(found.iter().map(|(norm, hash)| *norm <= least || alike[hash] >= ALIKE).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;
    use firebrick_tensor::block::DType;
    use firebrick_tensor::checkpoint::{TensorSpec, write_safetensors};

    #[test]
    fn rows_near_zero_and_rows_alike_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (rows, width) = (BATCH + 200, 8);
        let mut values = Seed(1).normal("rows", rows * width, 0.02);
        let first = values[..width].to_vec();
        let mut put = |row: usize, with: &dyn Fn(f32) -> f32| {
            let row = &mut values[row * width..][..width];
            row.iter_mut().zip(&first).for_each(|(v, f)| *v = with(*f));
        };
        // Three alike in two batches, a pair that is left alone, one near 0, one that is small but no more.
        [5, 6, BATCH + 3].iter().for_each(|row| put(*row, &|f| 2.0 * f));
        [20, 21].iter().for_each(|row| put(*row, &|f| 3.0 * f));
        put(30, &|f| 1e-5 * f);
        put(31, &|f| 0.1 * f);
        put(32, &|_| 0.0);
        let path = dir.path().join("model.safetensors");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let spec = TensorSpec::new("w", DType::F32, [rows, width]);
        write_safetensors(&path, &Default::default(), &[(spec, bytes)]).unwrap();
        let found = untrained(&Checkpoint::open(&path).unwrap(), "w").unwrap();
        let found: Vec<usize> = (0..rows).filter(|row| found[*row]).collect();
        assert_eq!(found, [5, 6, 30, 32, BATCH + 3]);
    }
}
