//! Order statistics in a few passes by histograms of the bits of non-negative floats, whose order is that of the numbers.

use std::ops::Range;

use super::values::{PIECE, Values, count, map, with_piece};

/// A place in the order by magnitude and, among equals, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Bits of the magnitude.
    pub(crate) bits: u32,
    /// Index of the element in the tensor.
    pub(crate) index: usize,
}

impl Key {
    /// The magnitude.
    pub(crate) fn magnitude(self) -> f32 {
        f32::from_bits(self.bits)
    }
}

const HIGH: usize = 1 << 16;
const LOW_BITS: u32 = 15;
const LOW: usize = 1 << LOW_BITS;

/// The key of each of `ranks` (0-based, ascending) of some channels of magnitudes: `ranks[i]` is a channel and a rank below `n`.
/// `bits(channel, range, inputs, out)` gives the magnitudes of a piece. NaN counts as the largest.
pub(crate) fn keys_at(
    inputs: &[Values<'_>],
    n: usize,
    ranks: &[(usize, usize)],
    bits: impl Fn(usize, &Range<usize>, &[&[f32]], &mut [u32]) + Sync,
) -> Result<Vec<Key>, String> {
    let mut channels: Vec<usize> = ranks.iter().map(|(channel, _)| *channel).collect();
    channels.dedup();
    let fill = |channel: usize, range: &Range<usize>, views: &[&[f32]], out: &mut [u32]| {
        bits(channel, range, views, &mut out[..range.len()]);
    };
    let high = count(inputs, n, channels.len() * HIGH, |range, views, counts| {
        let mut keys = [0; PIECE];
        for (channel, counts) in channels.iter().zip(counts.chunks_exact_mut(HIGH)) {
            fill(*channel, range, views, &mut keys);
            keys[..range.len()].iter().for_each(|k| counts[((k >> LOW_BITS) as usize) & (HIGH - 1)] += 1);
        }
    })?;
    // The bucket of each rank, and its rank there.
    let found: Vec<(usize, u32, usize)> = ranks
        .iter()
        .map(|(channel, rank)| {
            let slot = channels.iter().position(|c| c == channel).unwrap_or(0);
            let (bucket, rest) = bucket(&high[slot * HIGH..][..HIGH], *rank);
            (*channel, bucket as u32, rest)
        })
        .collect();
    let low = count(inputs, n, found.len() * LOW, |range, views, counts| {
        let mut keys = [0; PIECE];
        let mut filled = None;
        for ((channel, bucket, _), counts) in found.iter().zip(counts.chunks_exact_mut(LOW)) {
            if filled != Some(*channel) {
                fill(*channel, range, views, &mut keys);
                filled = Some(*channel);
            }
            for k in &keys[..range.len()] {
                if k >> LOW_BITS == *bucket {
                    counts[(k & (LOW as u32 - 1)) as usize] += 1;
                }
            }
        }
    })?;
    found
        .iter()
        .enumerate()
        .map(|(i, (channel, high, rest))| {
            let (low, rest) = bucket(&low[i * LOW..][..LOW], *rest);
            let value = (high << LOW_BITS) | low as u32;
            let keys =
                |range: &Range<usize>, views: &[&[f32]], out: &mut [u32]| fill(*channel, range, views, out);
            Ok(Key {
                bits: value,
                index: if rest == 0 { 0 } else { occurrence(inputs, n, value, rest, keys)? },
            })
        })
        .collect()
}

/// The bucket that holds the element of this rank, and its rank among those of the bucket.
fn bucket(counts: &[u64], rank: usize) -> (usize, usize) {
    let mut rest = rank as u64;
    for (i, count) in counts.iter().enumerate() {
        if rest < *count {
            return (i, rest as usize);
        }
        rest -= count;
    }
    (counts.len() - 1, 0)
}

/// The index of occurrence `rank` of a value.
fn occurrence(
    inputs: &[Values<'_>],
    n: usize,
    value: u32,
    rank: usize,
    keys: impl Fn(&Range<usize>, &[&[f32]], &mut [u32]) + Sync,
) -> Result<usize, String> {
    let counts = map(inputs, n, 1, |range, views| {
        let mut out = [0; PIECE];
        keys(range, views, &mut out);
        out[..range.len()].iter().filter(|k| **k == value).count() as u64
    })?;
    let (piece, rest) = bucket(&counts, rank);
    let range = piece * PIECE..n.min((piece + 1) * PIECE);
    with_piece(inputs, &range, &mut Vec::new(), |views| {
        let mut out = [0; PIECE];
        keys(&range, views, &mut out);
        let equal = out[..range.len()].iter().enumerate().filter(|(_, k)| **k == value);
        range.start + equal.map(|(i, _)| i).nth(rest).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    /// Against a sort, with many equal magnitudes, over several pieces.
    #[test]
    fn keys_are_those_of_a_sort() {
        let n = 3 * PIECE + 17;
        let smooth = Seed(1).normal("smooth", n, 1.0);
        let coarse: Vec<f32> = smooth.iter().map(|v| (v * 4.0).round() / 4.0).collect();
        let inputs = [Values::from(&smooth[..]), Values::from(&coarse[..])];
        let bits = |channel: usize, _: &Range<usize>, views: &[&[f32]], out: &mut [u32]| {
            out.iter_mut().zip(views[channel]).for_each(|(k, v)| *k = v.abs().to_bits());
        };
        let ranks = [(0, 0), (0, n / 3), (0, n - 1), (1, 0), (1, 1), (1, n / 2), (1, n - 2)];
        let found = keys_at(&inputs, n, &ranks, bits).unwrap();
        for ((channel, rank), key) in ranks.iter().zip(found) {
            let values = [&smooth, &coarse][*channel];
            let mut sorted: Vec<Key> =
                values.iter().enumerate().map(|(index, v)| Key { bits: v.abs().to_bits(), index }).collect();
            sorted.sort();
            let before = |k: Key| sorted.iter().filter(|s| **s < k).count();
            assert_eq!(before(key), *rank, "channel {channel}");
            assert_eq!(key.bits, sorted[*rank].bits);
        }
        assert!(keys_at(&inputs, n, &[], bits).unwrap().is_empty());
    }
}
