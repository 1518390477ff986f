//! Uniform quantization grids: scale and zero point of a group of weights, codes, and round-to-nearest.
//!
//! Conventions of GPTQ and compressed-tensors: groups run along the input dimension, codes are `0..2^bits`,
//! `w = scale * (code - zero)`, scales are rounded to f16 before anything is quantized with them, and rounding is half to even.

use half::f16;
use serde::{Deserialize, Serialize};

/// How a group's scale and zero point follow from its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GridKind {
    /// `scale = max|w| / (2^(bits-1) - 1)`, zero in the middle code (QuaRot, AWQ's symmetric grid).
    SymNarrow,
    /// `scale = 2 max|w| / (2^bits - 1)`, zero at code `2^(bits-1)` (GPTQ's symmetric grid).
    #[default]
    SymHalf,
    /// `scale = (max - min) / (2^bits - 1)` over a range that contains 0, zero at the code nearest to 0.
    Asym,
}

/// Bits, group length and kind of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// Bits per code, 2 to 8.
    pub bits: u8,
    /// Number of consecutive inputs that share scale and zero point; 0 for a whole row.
    pub group: usize,
    /// How scale and zero point are chosen.
    pub kind: GridKind,
    /// Shrink each group's range to the one, of 32 between 30 % and all of it, that rounds the group with the least squared
    /// error, instead of covering every value. (AutoGPTQ's `mse` tries 80 with the exponent 2.4.)
    pub clip: bool,
}

/// Scale and zero point of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupParams {
    /// Distance between codes; a value of f16.
    pub scale: f32,
    /// The code that stands for 0.
    pub zero: f32,
    /// The largest code.
    pub top: f32,
}

/// Ranges tried by [`Grid::clip`].
const CLIP_STEPS: usize = 32;
/// The narrowest of them leaves out this share of the range.
const CLIP_MOST: f32 = 0.7;

impl Grid {
    /// Whether the grid can be used: with 1 bit a symmetric grid has no code but 0, codes are bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        match self.bits {
            2..=8 => Ok(()),
            bits => Err(format!("{bits} bits; a grid has 2 to 8")),
        }
    }

    /// Group length for rows of `columns` values.
    pub fn group_len(&self, columns: usize) -> usize {
        if self.group == 0 { columns } else { self.group.min(columns).max(1) }
    }

    /// Number of groups in a row of `columns` values.
    pub fn groups(&self, columns: usize) -> usize {
        columns.div_ceil(self.group_len(columns))
    }

    /// Bits per weight of a row of `columns` values, with a 16-bit scale and, for [`GridKind::Asym`], a code-sized zero point per group.
    pub fn bits_per_weight(&self, columns: usize) -> f64 {
        let zero = if self.kind == GridKind::Asym { f64::from(self.bits) } else { 0.0 };
        f64::from(self.bits) + self.groups(columns) as f64 * (16.0 + zero) / columns as f64
    }

    /// Scale and zero point for `values`; a group of zeros gets scale 1.
    pub fn fit(&self, values: &[f32]) -> GroupParams {
        let low = values.iter().fold(0.0f32, |m, v| m.min(*v));
        let high = values.iter().fold(0.0f32, |m, v| m.max(*v));
        let whole = self.cover(low, high);
        if !self.clip {
            return whole;
        }
        let error = |p: &GroupParams| -> f32 {
            let (inverse, low, high) = (p.scale.recip(), -p.zero, p.top - p.zero);
            let one = |v: &f32| (p.scale * near((v * inverse).clamp(low, high)) - v).powi(2);
            // Sums side by side: a single one waits for each addition.
            let mut sums = [0.0f32; 8];
            values.chunks(8).for_each(|eight| sums.iter_mut().zip(eight).for_each(|(s, v)| *s += one(v)));
            sums.iter().sum()
        };
        let mut best = (error(&whole), whole);
        for step in 1..=CLIP_STEPS {
            let keep = 1.0 - step as f32 * (CLIP_MOST / CLIP_STEPS as f32);
            let params = self.cover(keep * low, keep * high);
            let error = error(&params);
            if error < best.0 {
                best = (error, params);
            }
        }
        best.1
    }

    /// Scale and zero point for the range from `low <= 0` to `high >= 0`.
    fn cover(&self, low: f32, high: f32) -> GroupParams {
        let top = (1u32 << self.bits) as f32 - 1.0;
        let middle = (1u32 << (self.bits - 1)) as f32;
        let amax = high.max(-low);
        let raw = match self.kind {
            GridKind::SymNarrow => amax / (middle - 1.0),
            GridKind::SymHalf => 2.0 * amax / top,
            GridKind::Asym => (high - low) / top,
        };
        // A scale below f16's smallest positive value would divide by zero.
        let scale = match f16::from_f32(raw).to_f32() {
            s if raw == 0.0 || s == 0.0 || !s.is_finite() => {
                if raw > 1.0 {
                    f16::MAX.to_f32()
                } else {
                    1.0
                }
            }
            s => s,
        };
        let zero = match self.kind {
            GridKind::Asym => (-low / scale).round_ties_even().clamp(0.0, top),
            _ => middle,
        };
        GroupParams { scale, zero, top }
    }

    /// Rounds `weight: [rows, columns]` to the nearest codes (RTN), in place.
    ///
    /// # Panics
    /// If `columns` is 0 or does not divide the length of `weight`.
    pub fn round(&self, weight: &mut [f32], columns: usize) {
        let whole = columns > 0 && weight.len().is_multiple_of(columns);
        assert!(whole, "Grid::round: {} values in rows of {columns}", weight.len());
        for row in weight.chunks_exact_mut(columns) {
            for group in row.chunks_mut(self.group_len(columns)) {
                let params = self.fit(group);
                group.iter_mut().for_each(|v| *v = params.round(*v));
            }
        }
    }
}

impl GroupParams {
    /// The code nearest to `value`.
    pub fn encode(&self, value: f32) -> u8 {
        self.code(value) as u8
    }

    fn code(&self, value: f32) -> f32 {
        near((value / self.scale).clamp(-self.zero, self.top - self.zero)) + self.zero
    }

    /// What `value` becomes: the value of its nearest code.
    pub fn round(&self, value: f32) -> f32 {
        self.scale * (self.code(value) - self.zero)
    }

    /// The value of a code.
    pub fn decode(&self, code: u8) -> f32 {
        self.scale * (f32::from(code) - self.zero)
    }
}

/// `x` to the nearest integer, half to even, for `|x| < 2^22`: `round_ties_even` is a call where the target has no SSE4.1.
pub(crate) fn near(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    #[test]
    fn near_is_half_to_even() {
        for x in (-600..600).map(|i| i as f32 / 4.0) {
            assert_eq!(near(x), x.round_ties_even(), "{x}");
        }
    }

    fn relative_mse(bits: u8, group: usize, kind: GridKind, clip: bool) -> f64 {
        let (rows, columns) = (1024, 768);
        let original = Seed(0).normal("grid", rows * columns, 1.0);
        let mut rounded = original.clone();
        Grid { bits, group, kind, clip }.round(&mut rounded, columns);
        let error: f64 = original.iter().zip(&rounded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        error / original.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>()
    }

    #[test]
    fn error_on_normal_weights_is_as_published() {
        use GridKind::*;
        let known = [
            (2, 64, SymNarrow, false, 0.516),
            (2, 64, Asym, false, 0.209),
            (3, 64, SymNarrow, false, 0.0632),
            (3, 64, Asym, false, 0.0382),
            (4, 32, SymNarrow, false, 0.00941),
            (4, 64, Asym, false, 0.00829),
            (4, 128, SymNarrow, false, 0.01380),
            (4, 0, Asym, false, 0.01500),
            (2, 64, SymNarrow, true, 0.145),
            (2, 64, Asym, true, 0.127),
            (3, 64, SymNarrow, true, 0.0364),
            (3, 64, Asym, true, 0.0313),
            (4, 128, Asym, true, 0.00907),
            (4, 0, SymNarrow, true, 0.01184),
        ];
        for (bits, group, kind, clip, expected) in known {
            let found = relative_mse(bits, group, kind, clip);
            // The published clipped errors minimize |error|^2.4; ours may be lower.
            let low = if clip { 0.97 } else { 0.98 };
            assert!(
                (low..1.02).contains(&(found / expected)),
                "{bits} bits, group {group}, {kind:?}, clip {clip}: {found}"
            );
        }
        // GPTQ's symmetric grid lies between: it wastes half a code instead of one.
        let half = relative_mse(3, 64, SymHalf, false);
        assert!(half < 0.0632 && half > 0.0382, "{half}");
    }

    #[test]
    fn clipping_loses_no_more_in_any_group_and_less_with_an_outlier() {
        let error = |values: &[f32], clip| -> f32 {
            let mut rounded = values.to_vec();
            Grid { bits: 3, group: 0, kind: GridKind::Asym, clip }.round(&mut rounded, values.len());
            values.iter().zip(&rounded).map(|(a, b)| (a - b).powi(2)).sum()
        };
        for seed in 0..50 {
            let mut values = Seed(seed).normal("clip", 64, 1.0);
            assert!(error(&values, true) <= error(&values, false));
            values[seed as usize] = 9.0;
            assert!(error(&values, true) < error(&values, false), "an outlier is worth cutting off");
        }
        let on_grid: Vec<f32> = (0..8).map(|c| c as f32 - 3.0).collect();
        assert_eq!(error(&on_grid, true), 0.0, "control: nothing to gain, nothing cut off");
    }

    #[test]
    fn bits_that_make_no_grid_are_told() {
        for (bits, good) in [(0, false), (1, false), (2, true), (8, true), (9, false)] {
            let grid = Grid { bits, group: 0, kind: GridKind::SymNarrow, clip: false };
            assert_eq!(grid.check().is_ok(), good, "{bits}");
        }
    }

    #[test]
    #[should_panic(expected = "7 values in rows of 3")]
    fn a_part_of_a_row_is_refused() {
        Grid { bits: 4, group: 0, kind: GridKind::Asym, clip: false }.round(&mut [1.0; 7], 3);
    }

    #[test]
    fn zeros_constants_and_extremes_survive() {
        for kind in [GridKind::SymNarrow, GridKind::SymHalf, GridKind::Asym] {
            for bits in [2, 3, 4, 8] {
                let grid = Grid { bits, group: 0, kind, clip: false };
                for value in [0.0, 1e-30, -1e-8, 3.0, -5e4, 1e30] {
                    let mut row = [value; 5];
                    grid.round(&mut row, 5);
                    assert!(row.iter().all(|v| v.is_finite()), "{grid:?} {value}");
                    if value == 0.0 {
                        assert_eq!(row, [0.0; 5]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_code_survives_its_own_value() {
        for kind in [GridKind::SymNarrow, GridKind::SymHalf, GridKind::Asym] {
            for bits in 2..=8 {
                let grid = Grid { bits, group: 0, kind, clip: false };
                let params = grid.fit(&Seed(3).normal("codes", 64, 0.3));
                for code in 0..=params.top as u8 {
                    assert_eq!(params.encode(params.decode(code)), code, "{grid:?}");
                }
                let off_grid = params.decode(1) + 0.4 * params.scale;
                assert_ne!(
                    params.decode(params.encode(off_grid)),
                    off_grid,
                    "control: values between codes move"
                );
            }
        }
    }
}
