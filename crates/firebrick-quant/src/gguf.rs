//! Codes as GGUF blocks that stock llama.cpp reads, without a second rounding where the format allows it.

use std::collections::BTreeMap;

use firebrick_core::{Site, SiteSet};
use firebrick_models::EncodedWeight;
use firebrick_tensor::block::{DType, SuperBlock};
use firebrick_tensor::grid::GroupParams;
use half::f16;

use crate::QuantizedMatrix;

const BLOCK: usize = 32;
/// Values in a super-block of the K types.
const SUPER: usize = 256;

/// Which blocks may hold codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Those that stand for what the codes stand for, but for the offsets of `Q4_1` and `Q5_1`, which are rounded to f16.
    #[default]
    Exact,
    /// The smallest. The K types keep the scales of 8 or 16 groups as multiples of one f16, of 4 bits in `Q2_K` and 6 in the others:
    /// unless all groups of a super-block share theirs, scales and offsets are rounded once more.
    Small,
}

/// The blocks of a matrix, row-major in Hugging Face's order of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// The block type.
    pub dtype: DType,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether the blocks stand for exactly the values the codes stand for.
    pub exact: bool,
}

/// `matrix` as GGUF blocks, the smallest that `packing` allows.
///
/// In blocks of 32, for groups of a multiple of 32: symmetric codes of up to 4 bits as `Q4_0`, of 5 as `Q5_0`, of 8 as `Q8_0`;
/// asymmetric ones of up to 4 bits as `Q4_1`, of 5 as `Q5_1`. In super-blocks, for rows of a multiple of 256: codes of 2 bits as
/// `Q2_K`, symmetric ones of 3 as `Q3_K` and of 6 as `Q6_K` (groups of a multiple of 16), asymmetric ones of 3 and 4 as `Q4_K` and of
/// 5 as `Q5_K` (groups of a multiple of 32); without a second rounding that takes groups of a multiple of 256.
///
/// `None` where no block type holds the codes.
pub fn gguf_blocks(matrix: &QuantizedMatrix, packing: Packing) -> Option<Blocks> {
    let short = short_blocks(matrix);
    let Some(long) = super_blocks(matrix).filter(|b| b.exact || packing == Packing::Small) else {
        return short;
    };
    match short {
        Some(short) if short.bytes.len() < long.bytes.len() => Some(short),
        // Of equal sizes what is exact, of those the plainer.
        Some(short) if short.bytes.len() == long.bytes.len() && (short.exact || !long.exact) => Some(short),
        _ => Some(long),
    }
}

/// Whether zero is the middle code of every group.
fn symmetric(matrix: &QuantizedMatrix) -> bool {
    let middle = f32::from(1u16 << (matrix.grid.bits - 1));
    matrix.params.iter().all(|p| p.zero == middle)
}

/// Blocks of 32 with one f16 scale and, in the asymmetric types, one f16 offset.
fn short_blocks(matrix: &QuantizedMatrix) -> Option<Blocks> {
    let (grid, d_in) = (matrix.grid, matrix.d_in);
    let len = grid.group_len(d_in);
    if !d_in.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
        return None;
    }
    let middle = 1u8 << (grid.bits - 1);
    // The type, and what moves zero to its middle code.
    let (dtype, shift) = match (grid.bits, symmetric(matrix)) {
        (2..=4, true) => (DType::Q4_0, 8 - middle),
        (2..=4, false) => (DType::Q4_1, 0),
        (5, true) => (DType::Q5_0, 0),
        (5, false) => (DType::Q5_1, 0),
        (8, true) => (DType::Q8_0, 0),
        _ => return None,
    };
    let offsets = matches!(dtype, DType::Q4_1 | DType::Q5_1);
    let groups = matrix.groups();
    let mut bytes = Vec::with_capacity(dtype.bytes_for(matrix.codes.len())?);
    // An offset beyond what f16 holds makes a block of no numbers.
    let (mut exact, mut finite) = (true, true);
    for (i, codes) in matrix.codes.chunks_exact(BLOCK).enumerate() {
        let (row, column) = (i * BLOCK / d_in, i * BLOCK % d_in);
        let p = matrix.params[row * groups + column / len];
        let mut put = |value: f32| {
            let rounded = f16::from_f32(value);
            exact &= rounded.to_f32() == value;
            finite &= rounded.is_finite();
            bytes.extend(rounded.to_le_bytes());
        };
        put(p.scale);
        if offsets {
            put(-p.zero * p.scale);
        }
        if dtype == DType::Q8_0 {
            bytes.extend(codes.iter().map(|c| c.wrapping_sub(128)));
            continue;
        }
        if grid.bits == 5 {
            let fifth = |bits: u32, (j, code): (usize, &u8)| bits | (u32::from(code >> 4) << j);
            bytes.extend(codes.iter().enumerate().fold(0, fifth).to_le_bytes());
        }
        let (low, high) = codes.split_at(BLOCK / 2);
        bytes.extend(low.iter().zip(high).map(|(a, b)| ((a + shift) & 15) | (b + shift) << 4));
    }
    finite.then_some(Blocks { dtype, bytes, exact })
}

/// Super-blocks of 256, with scales and offsets as multiples of two f16.
fn super_blocks(matrix: &QuantizedMatrix) -> Option<Blocks> {
    let (grid, d_in) = (matrix.grid, matrix.d_in);
    // The type, the values in a group, the largest multiple, and whether it has offsets.
    let (dtype, unit, most, offsets) = match (grid.bits, symmetric(matrix)) {
        (2, _) => (DType::Q2K, 16, 15, true),
        (3, true) => (DType::Q3K, 16, 31, false),
        (6, true) => (DType::Q6K, 16, 127, false),
        (3 | 4, false) => (DType::Q4K, 32, 63, true),
        (5, false) => (DType::Q5K, 32, 63, true),
        _ => return None,
    };
    let len = grid.group_len(d_in);
    if !d_in.is_multiple_of(SUPER) || !len.is_multiple_of(unit) {
        return None;
    }
    let groups = matrix.groups();
    let mut bytes = Vec::with_capacity(dtype.bytes_for(matrix.codes.len())?);
    let mut exact = true;
    for (i, codes) in matrix.codes.as_chunks::<SUPER>().0.iter().enumerate() {
        let (row, column) = (i * SUPER / d_in, i * SUPER % d_in);
        let of = |j: usize| matrix.params[row * groups + (column + j * unit) / len];
        let params: Vec<GroupParams> = (0..SUPER / unit).map(of).collect();
        let (d, scales) = multiples(&params.iter().map(|p| p.scale).collect::<Vec<_>>(), most);
        let shifts: Vec<f32> = params.iter().map(|p| p.zero * p.scale).collect();
        let (dmin, mins) = if offsets { multiples(&shifts, most) } else { (0.0, [0; 16]) };
        for (j, p) in params.iter().enumerate() {
            exact &= d * f32::from(scales[j]) == p.scale;
            exact &= !offsets || dmin * f32::from(mins[j]) == shifts[j];
        }
        let block = SuperBlock { d, dmin, scales: scales.map(|s| s as i8), mins, codes: *codes };
        block.write(dtype, &mut bytes).ok()?;
    }
    Some(Blocks { dtype, bytes, exact })
}

/// The f16 `d` and the whole numbers up to `most` whose products with it come nearest to `values`, none of which is negative.
fn multiples(values: &[f32], most: u8) -> (f32, [u8; 16]) {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(*v));
    let (mut best, mut least) = ((0.0, [0; 16]), f32::INFINITY);
    // From 1 up: groups that share their scale keep it as it is.
    for top in 1..=most {
        let d = f16::from_f32(largest / f32::from(top)).to_f32();
        if d == 0.0 || !d.is_finite() {
            continue;
        }
        let mut found = [0; 16];
        let mut error = 0.0;
        for (v, k) in values.iter().zip(&mut found) {
            *k = (v / d).round_ties_even().min(f32::from(most)) as u8;
            error += (v - d * f32::from(*k)).powi(2);
        }
        if error < least {
            (best, least) = ((d, found), error);
        }
    }
    best
}

/// The matrices that a GGUF block type holds, ready for [`Export::with_encoded`](firebrick_models::Export::with_encoded), and the
/// sites of those that none holds.
pub fn gguf_weights(
    matrices: &BTreeMap<Site, QuantizedMatrix>,
    packing: Packing,
) -> (BTreeMap<Site, EncodedWeight>, SiteSet) {
    let (mut encoded, mut left_out) = (BTreeMap::new(), SiteSet::default());
    for (site, matrix) in matrices {
        match gguf_blocks(matrix, packing) {
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

    fn decoded(blocks: &Blocks, len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        decode(blocks.dtype, &blocks.bytes, &mut values).unwrap();
        values
    }

    #[test]
    fn blocks_stand_for_the_same_values() {
        use GridKind::*;
        let d_out = 3;
        for (bits, group, kind, d_in, dtype) in [
            (2, 64, SymHalf, 128, DType::Q4_0),
            (3, 64, SymHalf, 128, DType::Q4_0),
            (4, 64, SymNarrow, 128, DType::Q4_0),
            (3, 64, Asym, 128, DType::Q4_1),
            (4, 64, Asym, 128, DType::Q4_1),
            (5, 32, SymHalf, 128, DType::Q5_0),
            (5, 64, Asym, 128, DType::Q5_1),
            (8, 64, SymHalf, 128, DType::Q8_0),
            // One scale for a super-block or more needs no second rounding.
            (2, 256, SymHalf, 512, DType::Q2K),
            (2, 256, Asym, 512, DType::Q2K),
            (2, 0, Asym, 512, DType::Q2K),
            (3, 0, SymHalf, 512, DType::Q3K),
            (3, 256, Asym, 512, DType::Q4K),
            (4, 512, Asym, 512, DType::Q4K),
            (4, 512, SymHalf, 512, DType::Q4_0),
            (5, 256, Asym, 512, DType::Q5K),
            (6, 256, SymHalf, 512, DType::Q6K),
        ] {
            let weight = Seed(4).normal("blocks", d_out * d_in, 0.02);
            let q = rtn(&weight, d_in, Grid { bits, group, kind, clip: false }).unwrap();
            let blocks = gguf_blocks(&q, Packing::Exact).unwrap();
            assert_eq!(blocks.dtype, dtype, "{bits} bits {kind:?}");
            let expected = q.dequantize();
            for (a, b) in decoded(&blocks, weight.len()).iter().zip(&expected) {
                let tolerance = if blocks.exact { 0.0 } else { 2e-3 * 0.1 };
                assert!((a - b).abs() <= tolerance, "{bits} bits {kind:?}: {a} against {b}");
            }
            assert!(blocks.exact || matches!(dtype, DType::Q4_1 | DType::Q5_1));
            assert_ne!(expected, weight, "control: the codes are lossy");
            if dtype.block_len() == SUPER {
                assert_eq!(gguf_blocks(&q, Packing::Small), Some(blocks), "there is nothing smaller");
            }
        }
    }

    #[test]
    fn small_blocks_round_scales_once_more_and_lose_little() {
        use GridKind::*;
        let (d_out, d_in) = (16, 1024);
        let weight = Seed(6).normal("small", d_out * d_in, 0.02);
        let error = |values: &[f32]| -> f64 {
            weight.iter().zip(values).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        // The bits, the type, and the most by which the squared error of round-to-nearest may grow.
        for (bits, group, kind, exact, small, most) in [
            (2, 64, SymHalf, Some(DType::Q4_0), DType::Q2K, 1.01),
            (2, 64, Asym, Some(DType::Q4_1), DType::Q2K, 1.05),
            (2, 16, Asym, None, DType::Q2K, 1.1),
            (3, 64, SymHalf, Some(DType::Q4_0), DType::Q3K, 1.01),
            (3, 16, SymHalf, None, DType::Q3K, 1.01),
            (4, 64, Asym, Some(DType::Q4_1), DType::Q4K, 1.01),
        ] {
            let q = rtn(&weight, d_in, Grid { bits, group, kind, clip: false }).unwrap();
            assert_eq!(gguf_blocks(&q, Packing::Exact).map(|b| b.dtype), exact);
            let blocks = gguf_blocks(&q, Packing::Small).unwrap();
            assert_eq!((blocks.dtype, blocks.exact), (small, false));
            let ratio = error(&decoded(&blocks, weight.len())) / error(&q.dequantize());
            assert!(ratio > 0.99 && ratio < most, "{bits} bits {kind:?}: {ratio}");
        }
    }

    #[test]
    fn what_no_block_type_holds_is_refused() {
        let weight = Seed(5).normal("blocks", 96, 1.0);
        let of = |bits, group, kind, d_in| {
            let matrix = rtn(&weight, d_in, Grid { bits, group, kind, clip: false }).unwrap();
            gguf_blocks(&matrix, Packing::Small)
        };
        assert!(of(4, 16, GridKind::SymHalf, 96).is_none());
        assert!(of(4, 32, GridKind::SymHalf, 48).is_none());
        assert!(of(6, 32, GridKind::SymHalf, 96).is_none());
        assert!(of(8, 32, GridKind::Asym, 96).is_none());
        assert!(of(4, 32, GridKind::SymHalf, 96).is_some());

        let on =
            |bits| rtn(&weight, 96, Grid { bits, group: 32, kind: GridKind::SymHalf, clip: false }).unwrap();
        let sites = [0, 1].map(|layer| Site::layer(layer, Part::AttnQ));
        let matrices = sites.into_iter().zip([on(6), on(4)]).collect();
        let (encoded, left_out) = gguf_weights(&matrices, Packing::Exact);
        assert_eq!(left_out.iter().collect::<Vec<_>>(), [sites[0]]);
        assert_eq!(encoded.keys().copied().collect::<Vec<_>>(), [sites[1]]);
    }

    #[test]
    fn multiples_are_exact_where_they_can_be() {
        assert_eq!(multiples(&[0.5; 16], 15), (0.5, [1; 16]));
        assert_eq!(multiples(&[0.0; 16], 15).1, [0; 16]);
        let (d, found) = multiples(&[0.25, 1.25, 0.75], 15);
        assert_eq!((d, &found[..3]), (0.25, &[1, 5, 3][..]));
        let (d, found) = multiples(&[0.3, 0.7], 15);
        assert!((d * f32::from(found[0]) - 0.3).abs() < 0.7 / 30.0 && d * f32::from(found[1]) != 0.7);
    }
}
