//! A weight as codes on a grid.

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_tensor::grid::{Grid, GroupParams};
use firebrick_tensor::ops::PackedMatrix;

use crate::QuantError;

/// A linear layer's weight as codes, in Hugging Face's layout `[d_out, d_in]`, with groups along `d_in`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    /// The grid.
    pub grid: Grid,
    /// Rows.
    pub d_out: usize,
    /// Columns.
    pub d_in: usize,
    /// Codes, row-major `[d_out, d_in]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Scale and zero point, row-major `[d_out, groups]`.
    pub params: Vec<GroupParams>,
}

impl QuantizedMatrix {
    /// Number of groups in a row.
    pub fn groups(&self) -> usize {
        self.grid.groups(self.d_in)
    }

    /// The weight that the codes stand for, row-major `[d_out, d_in]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let (len, groups) = (self.grid.group_len(self.d_in), self.groups());
        let value = |(i, code): (usize, &u8)| {
            let (row, column) = (i / self.d_in, i % self.d_in);
            self.params[row * groups + column / len].decode(*code)
        };
        self.codes.iter().enumerate().map(value).collect()
    }

    /// What is lost of `weight: [d_out, d_in]`, the weight that was quantized.
    pub(crate) fn difference(&self, weight: &[f32]) -> Vec<f64> {
        weight.iter().zip(self.dequantize()).map(|(a, b)| f64::from(*a) - f64::from(b)).collect()
    }

    /// Bits per weight, with scales and zero points.
    pub fn bits_per_weight(&self) -> f64 {
        self.grid.bits_per_weight(self.d_in)
    }

    /// The packed form that [`PackedLinear`](crate::PackedLinear) computes with, `[d_in, d_out]` on `device`.
    ///
    /// # Errors
    /// If the bits are not in 1..=8, a size disagrees with the shape, or a code needs more bits.
    pub fn pack(&self, device: &Device) -> Result<PackedMatrix, QuantError> {
        self.check()?;
        let (m, n, groups) = (self.d_out, self.d_in, self.groups());
        let codes: Vec<u8> = (0..n).flat_map(|c| (0..m).map(move |r| self.codes[r * n + c])).collect();
        let table = |of: fn(&GroupParams) -> f32| {
            let values: Vec<f32> = self.params.iter().map(of).collect();
            Tensor::<2>::from_data(TensorData::new(values, [m, groups]), device).transpose()
        };
        let group = self.grid.group_len(n);
        let (scale, zero) = (table(|p| p.scale), table(|p| p.zero));
        Ok(PackedMatrix::pack(&codes, n, m, self.grid.bits, group, scale, zero))
    }

    /// Whether codes and parameters are those of a matrix of this shape on this grid.
    fn check(&self) -> Result<(), QuantError> {
        let (m, n, bits) = (self.d_out, self.d_in, self.grid.bits);
        if !(1..=8).contains(&bits) {
            return Err(QuantError::Setting(format!("{bits} bits cannot be packed; choose 1 to 8")));
        }
        if m == 0 || n == 0 {
            return Err(QuantError::Setting(format!("a matrix of {m} x {n} cannot be packed")));
        }
        let size = |what, expected, found| match expected == found {
            true => Ok(()),
            false => Err(QuantError::Size { what, expected, found }),
        };
        size("number of codes", m.saturating_mul(n), self.codes.len())?;
        size("number of group parameters", m.saturating_mul(self.groups()), self.params.len())?;
        match self.codes.iter().find(|c| u32::from(**c) >> bits != 0) {
            Some(code) => Err(QuantError::Setting(format!("code {code} needs more than {bits} bits"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtn;
    use firebrick_tensor::grid::GridKind;

    #[test]
    fn only_sound_matrices_are_packed() {
        let grid = Grid { bits: 3, group: 4, kind: GridKind::Asym, clip: false };
        let sound = rtn(&[0.5, -1.0, 2.0, 0.25, 1.0, -2.0, 0.0, 3.0, 1.0, 1.5], 5, grid).unwrap();
        let device = Device::flex();
        let fails = |change: fn(&mut QuantizedMatrix)| {
            let mut matrix = sound.clone();
            change(&mut matrix);
            matrix.pack(&device).is_err()
        };
        assert!(!fails(|_| {}), "control");
        assert!(fails(|m| m.grid.bits = 9));
        assert!(fails(|m| m.codes[3] = 8));
        assert!(fails(|m| m.codes.truncate(9)));
        assert!(fails(|m| m.params.truncate(3)));
        assert!(fails(|m| m.d_out = usize::MAX));
        assert!(fails(|m| m.d_in = 0));
    }
}
