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

    /// Bits per weight, with scales and zero points.
    pub fn bits_per_weight(&self) -> f64 {
        self.grid.bits_per_weight(self.d_in)
    }

    /// The packed form that [`PackedLinear`](crate::PackedLinear) computes with, `[d_in, d_out]` on `device`.
    pub fn pack(&self, device: &Device) -> Result<PackedMatrix, QuantError> {
        if ![2, 3, 4, 8].contains(&self.grid.bits) {
            return Err(QuantError::Setting(format!(
                "{} bits cannot be packed; choose 2, 3, 4 or 8",
                self.grid.bits
            )));
        }
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
}
