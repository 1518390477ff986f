//! Round-to-nearest: every weight to the nearest code of its group.

use firebrick_tensor::grid::Grid;

use crate::{QuantError, QuantizedMatrix};

/// Quantizes `weight: [d_out, d_in]` (row-major) to the nearest codes of `grid`.
///
/// # Errors
/// If the bits are not in 2..=8, the length of `weight` is not a multiple of `d_in`, or a weight is not finite.
pub fn rtn(weight: &[f32], d_in: usize, grid: Grid) -> Result<QuantizedMatrix, QuantError> {
    let d_out = rows(weight, d_in, grid)?;
    let mut codes = Vec::with_capacity(weight.len());
    let mut params = Vec::new();
    for group in weight.chunks_exact(d_in).flat_map(|row| row.chunks(grid.group_len(d_in))) {
        let p = grid.fit(group);
        codes.extend(group.iter().map(|v| p.encode(*v)));
        params.push(p);
    }
    Ok(QuantizedMatrix { grid, d_out, d_in, codes, params })
}

/// The number of rows of `weight`, after checking it and the grid.
pub(crate) fn rows(weight: &[f32], d_in: usize, grid: Grid) -> Result<usize, QuantError> {
    grid.check().map_err(QuantError::Setting)?;
    if d_in == 0 || !weight.len().is_multiple_of(d_in) {
        return Err(QuantError::Size { what: "length of the weight", expected: d_in, found: weight.len() });
    }
    if weight.iter().any(|v| !v.is_finite()) {
        return Err(QuantError::NotFinite { what: "weight" });
    }
    Ok(weight.len() / d_in)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;
    use firebrick_tensor::grid::GridKind;

    #[test]
    fn codes_stand_for_the_rounded_weights() {
        let (d_out, d_in) = (7, 53);
        let weight = Seed(1).normal("rtn", d_out * d_in, 0.5);
        for kind in [GridKind::SymHalf, GridKind::Asym] {
            let grid = Grid { bits: 3, group: 16, kind, clip: false };
            let mut rounded = weight.clone();
            grid.round(&mut rounded, d_in);
            let q = rtn(&weight, d_in, grid).unwrap();
            assert_eq!(q.dequantize(), rounded);
            assert_eq!(q.params.len(), d_out * 4, "the last group of a row is shorter");
            assert_ne!(q.dequantize(), weight, "control: 3 bits change something");
        }
        assert!(rtn(&weight, 52, Grid { bits: 3, group: 16, kind: GridKind::Asym, clip: false }).is_err());
        assert!(rtn(&weight, 53, Grid { bits: 1, group: 16, kind: GridKind::Asym, clip: false }).is_err());
        let mut broken = weight.clone();
        broken[60] = f32::NAN;
        let fine = Grid { bits: 3, group: 16, kind: GridKind::Asym, clip: false };
        assert!(matches!(rtn(&broken, 53, fine), Err(QuantError::NotFinite { what: "weight" })));
    }
}
