//! Packed matrices from the blocks of GGUF files, without rounding.

use burn::tensor::{DType as TensorType, Device, Tensor, TensorData};
use half::f16;

use super::PackedMatrix;
use super::packed::PANEL;
use crate::block::{BlockError, DType};

/// Values of a block.
const BLOCK: usize = 32;

impl PackedMatrix {
    /// The matrix `[d_in, d_out]` whose transpose lies in `bytes` as blocks of 32: row `row(o)` there has the weights of output `o`.
    /// `None` for types other than `Q4_0`, `Q4_1` and `Q8_0`.
    ///
    /// Codes and scales are those of the blocks. The offset of `Q4_1` becomes a zero point in f32: a weight differs from the decoded one by
    /// f32's rounding at most. Scales stay f16 where `device` has that type.
    ///
    /// # Errors
    /// If `bytes` is not the size of whole rows.
    ///
    /// # Panics
    /// If `row` gives a row that is not there.
    pub fn from_blocks(
        dtype: DType,
        bytes: &[u8],
        [d_in, d_out]: [usize; 2],
        row: impl Fn(usize) -> usize,
        device: &Device,
    ) -> Result<Option<Self>, BlockError> {
        let bits = match dtype {
            DType::Q4_0 | DType::Q4_1 => 4,
            DType::Q8_0 => 8,
            _ => return Ok(None),
        };
        if !d_in.is_multiple_of(BLOCK) {
            return Err(BlockError::PartialBlock { dtype, elements: d_in });
        }
        if d_in.checked_mul(d_out).and_then(|n| dtype.bytes_for(n)) != Some(bytes.len()) {
            return Err(BlockError::Length {
                dtype,
                elements: d_in.saturating_mul(d_out),
                bytes: bytes.len(),
            });
        }
        let (groups, rows) = (d_in / BLOCK, d_in * bits / 32);
        let panels = d_out.div_ceil(PANEL);
        let mut words = vec![0i32; panels * rows * PANEL];
        let mut scale = vec![f16::ZERO; panels * groups * PANEL];
        let (zeros, zero) = match dtype {
            DType::Q4_0 => (1, 8.0),
            DType::Q8_0 => (1, 128.0),
            _ => (groups, 0.0),
        };
        let mut zero = vec![zero; panels * zeros * PANEL];
        for o in 0..d_out {
            let blocks = &bytes[row(o) * groups * dtype.block_bytes()..][..groups * dtype.block_bytes()];
            for (g, block) in blocks.chunks_exact(dtype.block_bytes()).enumerate() {
                let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
                let mut codes = [0u8; BLOCK];
                let at = (o / PANEL * groups + g) * PANEL + o % PANEL;
                scale[at] = half(0);
                match dtype {
                    DType::Q8_0 => codes.iter_mut().zip(&block[2..]).for_each(|(c, b)| *c = b ^ 128),
                    DType::Q4_0 => nibbles(&block[2..], &mut codes),
                    _ => {
                        nibbles(&block[4..], &mut codes);
                        if scale[at] == f16::ZERO {
                            // A constant block: the offset as the scale of ones.
                            (scale[at], codes) = (half(2), [1; BLOCK]);
                        } else {
                            zero[at] = -half(2).to_f32() / scale[at].to_f32();
                        }
                    }
                }
                let per_word = 32 / bits;
                for (w, codes) in codes.chunks_exact(per_word).enumerate() {
                    let word = codes.iter().rev().fold(0u32, |word, &c| word << bits | u32::from(c));
                    words[(o / PANEL * rows + g * BLOCK / per_word + w) * PANEL + o % PANEL] = word as i32;
                }
            }
        }
        let narrow = device.supports_dtype(TensorType::F16);
        let scale_type = if narrow { TensorType::F16 } else { TensorType::F32 };
        let scale = Tensor::from_data(TensorData::new(scale, [panels, groups, PANEL]), (device, scale_type));
        Ok(Some(Self {
            bits: bits as u8,
            group: BLOCK,
            d_in,
            d_out,
            words: Tensor::from_data(TensorData::new(words, [panels, rows, PANEL]), device),
            scale,
            zero: Tensor::from_data(TensorData::new(zero, [panels, zeros, PANEL]), device),
        }))
    }
}

/// Codes of 4 bits: the first half of a block in the low ones.
fn nibbles(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    let (low, high) = codes.split_at_mut(BLOCK / 2);
    for ((l, h), b) in low.iter_mut().zip(high).zip(bytes) {
        (*l, *h) = (b & 15, b >> 4);
    }
}
