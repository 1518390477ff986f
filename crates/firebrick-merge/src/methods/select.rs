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

/// The bits of a magnitude that each pass looks at, from the highest on: first of them, and how many. Tables of so few counters stay in
/// the first-level cache.
const DIGITS: [(u32, u32); 3] = [(20, 11), (10, 10), (0, 10)];

/// Where the search for a rank stands.
#[derive(Clone, Copy)]
struct Search {
    channel: usize,
    /// The digits found.
    prefix: u32,
    /// Rank among the elements that begin with them.
    rest: usize,
    /// The element is 0, which needs no more digits.
    zero: bool,
}

/// The key of each of `ranks` (0-based, ascending) of some channels of magnitudes: `ranks[i]` is a channel and a rank below `n`.
/// `bits(channel, range, inputs, out)` gives the magnitudes of a piece. NaN counts as the largest.
pub(crate) fn keys_at(
    inputs: &[Values<'_>],
    n: usize,
    ranks: &[(usize, usize)],
    bits: impl Fn(usize, &Range<usize>, &[&[f32]], &mut [u32]) + Sync,
) -> Result<Vec<Key>, String> {
    let fill = |channel: usize, range: &Range<usize>, views: &[&[f32]], out: &mut [u32]| {
        bits(channel, range, views, &mut out[..range.len()]);
    };
    let start =
        |(channel, rank): &(usize, usize)| Search { channel: *channel, prefix: 0, rest: *rank, zero: false };
    let mut found: Vec<Search> = ranks.iter().map(start).collect();
    for (shift, width) in DIGITS {
        let open = found.iter().filter(|s| !s.zero).map(|s| (s.channel, s.prefix));
        let mut groups: Vec<(usize, u32)> = open.collect();
        groups.dedup();
        if groups.is_empty() {
            break;
        }
        // Zeros have a bucket of their own, the first: a task vector may hold little else.
        let buckets = (1 << width) + 1;
        // Four counters a bucket, taken in turn: equal neighbours would wait for one another.
        let counts = count(inputs, n, groups.len() * buckets * 4, |range, views, counts| {
            let (mut keys, mut filled) = ([0; PIECE], None);
            for ((channel, prefix), counts) in groups.iter().zip(counts.chunks_exact_mut(4 * buckets)) {
                if filled != Some(*channel) {
                    fill(*channel, range, views, &mut keys);
                    filled = Some(*channel);
                }
                let counts = counts.as_chunks_mut::<4>().0;
                let digit = |key: u32| (key >> shift) as usize & (buckets - 2);
                let bucket = |key: u32| if key == 0 { 0 } else { 1 + digit(key) };
                if shift + width == 31 {
                    let (fours, rest) = keys[..range.len()].as_chunks::<4>();
                    for [a, b, c, d] in fours {
                        counts[bucket(*a)][0] += 1;
                        counts[bucket(*b)][1] += 1;
                        counts[bucket(*c)][2] += 1;
                        counts[bucket(*d)][3] += 1;
                    }
                    rest.iter().for_each(|a| counts[bucket(*a)][0] += 1);
                    continue;
                }
                for keys in keys[..range.len()].chunks(16) {
                    // Few begin so: most often none of so many.
                    let same = |key: u32| key >> (shift + width) == *prefix && key != 0;
                    let mut any = false;
                    for key in keys {
                        any |= same(*key);
                    }
                    if any {
                        keys.iter().filter(|k| same(**k)).for_each(|k| counts[1 + digit(*k)][0] += 1);
                    }
                }
            }
        })?;
        for search in found.iter_mut().filter(|s| !s.zero) {
            let Some(group) = groups.iter().position(|g| *g == (search.channel, search.prefix)) else {
                continue;
            };
            let counts = counts[group * 4 * buckets..][..4 * buckets].as_chunks::<4>().0;
            let (bucket, rest) = bucket(counts.iter().map(|four| four.iter().sum()), search.rest);
            search.rest = rest;
            match bucket.checked_sub(1) {
                None => search.zero = true,
                Some(digit) => search.prefix = search.prefix << width | digit as u32,
            }
        }
    }
    // All digits make the magnitude, and the rest is the rank among equals. The first of them has no element before it to look for.
    if found.iter().all(|s| s.rest == 0) {
        return Ok(found.iter().map(|s| Key { bits: s.prefix, index: 0 }).collect());
    }
    let equal = map(inputs, n, 1, |range, views| {
        let (mut keys, mut filled) = ([0; PIECE], None);
        let of = |search: &Search| {
            if filled != Some(search.channel) {
                fill(search.channel, range, views, &mut keys);
                filled = Some(search.channel);
            }
            keys[..range.len()].iter().map(|k| u32::from(*k == search.prefix)).sum::<u32>()
        };
        found.iter().map(of).collect::<Vec<u32>>()
    })?;
    let key = |(i, &Search { channel, prefix, rest, .. }): (usize, &Search)| {
        if rest == 0 {
            return Ok(Key { bits: prefix, index: 0 });
        }
        let (piece, rest) = bucket(equal.iter().map(|counts| u64::from(counts[i])), rest);
        let range = piece * PIECE..n.min((piece + 1) * PIECE);
        let index = with_piece(inputs, &range, &mut Vec::new(), |views| {
            let mut keys = [0; PIECE];
            fill(channel, &range, views, &mut keys);
            let equal = keys[..range.len()].iter().enumerate().filter(|(_, k)| **k == prefix);
            range.start + equal.map(|(i, _)| i).nth(rest).unwrap_or(0)
        })?;
        Ok(Key { bits: prefix, index })
    };
    found.iter().enumerate().map(key).collect()
}

/// The bucket that holds the element of this rank, and its rank among those of the bucket.
fn bucket(counts: impl Iterator<Item = u64>, rank: usize) -> (usize, usize) {
    let (mut rest, mut last) = (rank as u64, 0);
    for (i, count) in counts.enumerate() {
        if rest < count {
            return (i, rest as usize);
        }
        rest -= count;
        last = i;
    }
    (last, 0)
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
        let tiny: Vec<f32> = smooth.iter().map(|v| (v * 4.0).round() * 1e-44).collect();
        let inputs = [&smooth, &coarse, &tiny].map(|v| Values::from(&v[..]));
        let bits = |channel: usize, _: &Range<usize>, views: &[&[f32]], out: &mut [u32]| {
            out.iter_mut().zip(views[channel]).for_each(|(k, v)| *k = v.abs().to_bits());
        };
        let ranks = [
            (0, 0),
            (0, n / 3),
            (0, n - 1),
            (1, 0),
            (1, 1),
            (1, n / 2),
            (1, n - 2),
            (2, 0),
            (2, n / 8),
            (2, n / 2),
            (2, n - 1),
        ];
        let found = keys_at(&inputs, n, &ranks, bits).unwrap();
        for ((channel, rank), key) in ranks.iter().zip(found) {
            let values = [&smooth, &coarse, &tiny][*channel];
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
