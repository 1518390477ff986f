//! Codes as GGUF blocks that stock llama.cpp reads, without a second rounding where the format allows it.

use std::collections::BTreeMap;

use firebrick_core::{Site, SiteSet};
use firebrick_models::EncodedWeight;
use firebrick_tensor::block::DType;
use half::f16;

use crate::QuantizedMatrix;

const BLOCK: usize = 32;

/// The blocks of a matrix, row-major in Hugging Face's order of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// `Q4_0`, `Q4_1` or `Q8_0`.
    pub dtype: DType,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether the blocks stand for exactly the values the codes stand for (`Q4_1` rounds its offset to f16).
    pub exact: bool,
}

/// `matrix` as GGUF blocks: symmetric codes of up to 4 bits as `Q4_0`, asymmetric ones as `Q4_1`, symmetric 8-bit codes as `Q8_0`.
///
/// `None` where no block type holds the codes: groups that are not a multiple of 32, rows that are not, asymmetric codes of
/// more than 4 bits, 5 to 7 bits.
pub fn gguf_blocks(matrix: &QuantizedMatrix) -> Option<Blocks> {
    let (grid, d_in) = (matrix.grid, matrix.d_in);
    let len = grid.group_len(d_in);
    if !d_in.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
        return None;
    }
    let middle = f32::from(1u16 << (grid.bits - 1));
    let symmetric = matrix.params.iter().all(|p| p.zero == middle);
    let dtype = match (grid.bits, symmetric) {
        (2..=4, true) => DType::Q4_0,
        (2..=4, false) => DType::Q4_1,
        (8, true) => DType::Q8_0,
        _ => return None,
    };
    let groups = matrix.groups();
    let mut bytes = Vec::with_capacity(dtype.bytes_for(matrix.codes.len())?);
    let mut exact = true;
    for (i, codes) in matrix.codes.chunks_exact(BLOCK).enumerate() {
        let (row, column) = (i * BLOCK / d_in, i * BLOCK % d_in);
        let p = matrix.params[row * groups + column / len];
        let scale = f16::from_f32(p.scale);
        exact &= scale.to_f32() == p.scale;
        bytes.extend(scale.to_le_bytes());
        match dtype {
            DType::Q8_0 => bytes.extend(codes.iter().map(|c| c.wrapping_sub(128))),
            _ => {
                let shift = if dtype == DType::Q4_0 { 8 - middle as u8 } else { 0 };
                if dtype == DType::Q4_1 {
                    let offset = -p.zero * p.scale;
                    let rounded = f16::from_f32(offset);
                    exact &= rounded.to_f32() == offset;
                    bytes.extend(rounded.to_le_bytes());
                }
                let (low, high) = codes.split_at(BLOCK / 2);
                bytes.extend(low.iter().zip(high).map(|(a, b)| (a + shift) | (b + shift) << 4));
            }
        }
    }
    Some(Blocks { dtype, bytes, exact })
}

/// The matrices that a GGUF block type holds, ready for [`Export::with_encoded`](firebrick_models::Export::with_encoded), and the
/// sites of those that none holds.
pub fn gguf_weights(matrices: &BTreeMap<Site, QuantizedMatrix>) -> (BTreeMap<Site, EncodedWeight>, SiteSet) {
    let (mut encoded, mut left_out) = (BTreeMap::new(), SiteSet::default());
    for (site, matrix) in matrices {
        match gguf_blocks(matrix) {
            Some(b) => {
                encoded.insert(*site, EncodedWeight { dtype: b.dtype, bytes: b.bytes });
            }
            None => {
                left_out.insert(*site);
            }
        }
    }
    (encoded, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtn;
    use firebrick_core::{Part, Seed};
    use firebrick_tensor::block::decode;
    use firebrick_tensor::grid::{Grid, GridKind};

    #[test]
    fn blocks_stand_for_the_same_values() {
        let (d_out, d_in) = (3, 128);
        let weight = Seed(4).normal("blocks", d_out * d_in, 0.02);
        for (bits, kind, dtype) in [
            (2, GridKind::SymHalf, DType::Q4_0),
            (3, GridKind::SymHalf, DType::Q4_0),
            (4, GridKind::SymNarrow, DType::Q4_0),
            (3, GridKind::Asym, DType::Q4_1),
            (4, GridKind::Asym, DType::Q4_1),
            (8, GridKind::SymHalf, DType::Q8_0),
        ] {
            let q = rtn(&weight, d_in, Grid { bits, group: 64, kind, clip: false }).unwrap();
            let blocks = gguf_blocks(&q).unwrap();
            assert_eq!(blocks.dtype, dtype);
            let mut values = vec![0.0; weight.len()];
            decode(blocks.dtype, &blocks.bytes, &mut values).unwrap();
            let expected = q.dequantize();
            for (a, b) in values.iter().zip(&expected) {
                let tolerance = if blocks.exact { 0.0 } else { 2e-3 * 0.1 };
                assert!((a - b).abs() <= tolerance, "{bits} bits {kind:?}: {a} against {b}");
            }
            assert!(blocks.exact || dtype == DType::Q4_1);
            assert_ne!(expected, weight, "control: the codes are lossy");
        }
    }

    #[test]
    fn what_no_block_type_holds_is_refused() {
        let weight = Seed(5).normal("blocks", 96, 1.0);
        let of = |bits, group, kind, d_in| {
            gguf_blocks(&rtn(&weight, d_in, Grid { bits, group, kind, clip: false }).unwrap())
        };
        assert!(of(4, 16, GridKind::SymHalf, 96).is_none());
        assert!(of(4, 32, GridKind::SymHalf, 48).is_none());
        assert!(of(6, 32, GridKind::SymHalf, 96).is_none());
        assert!(of(8, 32, GridKind::Asym, 96).is_none());
        assert!(of(4, 32, GridKind::SymHalf, 96).is_some());

        let on =
            |bits| rtn(&weight, 96, Grid { bits, group: 32, kind: GridKind::SymHalf, clip: false }).unwrap();
        let sites = [0, 1].map(|layer| Site::layer(layer, Part::AttnQ));
        let (encoded, left_out) = gguf_weights(&sites.into_iter().zip([on(6), on(4)]).collect());
        assert_eq!(left_out.iter().collect::<Vec<_>>(), [sites[0]]);
        assert_eq!(encoded.keys().copied().collect::<Vec<_>>(), [sites[1]]);
    }
}
