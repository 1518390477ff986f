//! Which elements of a task vector are kept: the largest (TIES), a random share (DARE), those neither large nor small (breadcrumbs), or a
//! random share by rank (DELLA).

use std::ops::Range;

use firebrick_core::Seed;
use pulp::{Arch, Simd, WithSimd};
use rand::RngCore;
use rand_chacha::ChaCha8Rng;

use super::TensorMerge;
use super::rounding::Rounding;
use super::select::{Key, keys_at};
use super::values::{map, sum_of_magnitudes};

/// Elements computed at once, small enough for the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// How a task vector is thinned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sparsifier {
    None,
    Magnitude,
    Random,
    Outliers,
    Magprune,
}

/// The elements that are kept.
#[derive(Clone, Debug)]
pub(super) enum Keep {
    All,
    None,
    /// From the first key on and before the second, in the order by magnitude.
    Between(Key, Option<Key>),
    /// Those whose draw from this stream is below the threshold.
    Drawn(Seed, u32),
    Mask(Mask),
}

/// One bit an element.
#[derive(Clone, Debug, Default)]
pub(super) struct Mask {
    words: Vec<u64>,
    len: usize,
}

impl Mask {
    fn from_bools(bits: &[bool]) -> Self {
        let word = |bits: &[bool]| bits.iter().rev().fold(0, |word, bit| word << 1 | u64::from(*bit));
        Mask { words: bits.chunks(64).map(word).collect(), len: bits.len() }
    }

    fn append(&mut self, other: &Mask) {
        let shift = self.len % 64;
        for (i, word) in other.words.iter().enumerate() {
            if shift == 0 {
                self.words.push(*word);
                continue;
            }
            if let Some(last) = self.words.last_mut() {
                *last |= word << shift;
            }
            if other.len - 64 * i > 64 - shift {
                self.words.push(word >> (64 - shift));
            }
        }
        self.len += other.len;
    }

    /// The bits of the 64 elements from `at` on; 0 beyond the end.
    fn word(&self, at: usize) -> u64 {
        let word = |i: usize| self.words.get(i).copied().unwrap_or(0);
        let (i, shift) = (at / 64, at % 64);
        if shift == 0 { word(i) } else { word(i) >> shift | word(i + 1) << (64 - shift) }
    }
}

/// Draws of the elements from `start` on, one word each whatever the range.
fn draws(seed: Seed, start: usize) -> ChaCha8Rng {
    let mut rng = seed.stream("draws");
    rng.set_word_pos(start as u128);
    rng
}

/// The next `out.len()` words.
fn fill(draws: &mut ChaCha8Rng, out: &mut [u32]) {
    draws.fill_bytes(bytemuck::cast_slice_mut(out));
    out.iter_mut().for_each(|word| *word = u32::from_le(*word));
}

/// A task vector as it enters the sum.
#[derive(Clone, Debug)]
pub(super) struct Sparse {
    keep: Keep,
    /// Gives it the L1 norm that it had; 1 for none.
    scale: f32,
}

impl Sparse {
    /// Drops and scales the elements from `start` on.
    #[inline(always)]
    pub(super) fn apply(&self, start: usize, delta: &mut [f32], round: impl Fn(f32) -> f32) {
        match &self.keep {
            Keep::All => {}
            Keep::None => delta.fill(0.0),
            Keep::Between(low, high) => {
                let below = Key { bits: u32::MAX, index: 0 };
                keep_between(start, delta, *low, high.unwrap_or(below));
            }
            Keep::Drawn(seed, threshold) => {
                let (mut draws, mut words) = (draws(*seed, start), [0; 256]);
                for delta in delta.chunks_mut(words.len()) {
                    let words = &mut words[..delta.len()];
                    fill(&mut draws, words);
                    for (d, word) in delta.iter_mut().zip(words) {
                        *d = if *word < *threshold { *d } else { 0.0 };
                    }
                }
            }
            Keep::Mask(mask) => {
                for (i, delta) in delta.chunks_mut(32).enumerate() {
                    let word = mask.word(start + 32 * i) as u32;
                    for (i, d) in delta.iter_mut().enumerate() {
                        *d = if word >> i & 1 != 0 { *d } else { 0.0 };
                    }
                }
            }
        }
        if self.scale != 1.0 {
            for d in delta {
                *d = round(*d * self.scale);
            }
        }
    }
}

/// Drops what is before `low` or not before `high`. The index counts among equal magnitudes only: before it, behind it and between those
/// of the two keys, comparing magnitudes is enough.
#[inline(always)]
fn keep_between(start: usize, delta: &mut [f32], low: Key, high: Key) {
    let end = start + delta.len();
    let mut cuts = [low.index.clamp(start, end), high.index.clamp(start, end)];
    cuts.sort_unstable();
    for range in [start..cuts[0], cuts[0]..cuts[1], cuts[1]..end] {
        // An equal magnitude is before a key if its index is.
        let from = low.bits.saturating_add(u32::from(range.start < low.index));
        let to = high.bits.saturating_add(u32::from(range.start < high.index));
        for d in &mut delta[range.start - start..range.end - start] {
            let bits = d.to_bits() & 0x7fff_ffff;
            *d = if bits >= from && bits < to { *d } else { 0.0 };
        }
    }
}

/// What is kept of each model that is not the base.
///
/// # Errors
/// Lists densities and ranges that are none.
pub(super) fn sparsify(
    tensor: &TensorMerge<'_>,
    how: Sparsifier,
    rescale: bool,
) -> Result<Vec<Sparse>, String> {
    let of = tensor.others();
    check(tensor, how, &of)?;
    let keeps = match (how, tensor.masks) {
        (Sparsifier::Random | Sparsifier::Magprune, Some(masks)) => {
            masks.iter().map(|mask| Keep::Mask(Mask::from_bools(mask))).collect()
        }
        (Sparsifier::None, _) => vec![Keep::All; of.len()],
        (Sparsifier::Magnitude | Sparsifier::Outliers, _) => ranked(tensor, how, &of)?,
        (Sparsifier::Random, _) => {
            let each = of.iter().enumerate();
            each.map(|(i, m)| random(tensor.per_model[*m].density, stream(tensor, i))).collect()
        }
        (Sparsifier::Magprune, _) => by_rank(tensor, &of)?,
    };
    let mut sparse: Vec<Sparse> = keeps.into_iter().map(|keep| Sparse { keep, scale: 1.0 }).collect();
    if rescale && sparse.iter().any(|s| !matches!(s.keep, Keep::All)) {
        let scales = scales(tensor, &of, &sparse)?;
        sparse.iter_mut().zip(scales).for_each(|(s, scale)| s.scale = scale);
    }
    Ok(sparse)
}

fn check(tensor: &TensorMerge<'_>, how: Sparsifier, of: &[usize]) -> Result<(), String> {
    let mut problems = Vec::new();
    for m in of {
        let p = &tensor.per_model[*m];
        if how != Sparsifier::None && p.density < 0.0 {
            problems.push(format!("density {} of model {m} is negative", p.density));
        }
        if how == Sparsifier::Outliers && !(0.0..=1.0).contains(&p.gamma) {
            problems.push(format!("gamma {} of model {m} is not between 0 and 1", p.gamma));
        }
        if how == Sparsifier::Magprune && !magprune_fits(p.density, p.epsilon) {
            problems.push(format!(
                "density {} of model {m} is within epsilon {} of 0 or 1",
                p.density, p.epsilon
            ));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

/// Whether the keep probabilities of DELLA, from `density - epsilon` to `density + epsilon`, are some; at 0 and 1 nothing is drawn.
pub(crate) fn magprune_fits(density: f64, epsilon: f64) -> bool {
    density <= 0.0 || density >= 1.0 || (density > epsilon && density + epsilon < 1.0)
}

/// The magnitudes of `x - b`.
struct Magnitudes<'a> {
    x: &'a [f32],
    b: &'a [f32],
    round: Rounding,
    out: &'a mut [u32],
}

impl WithSimd for Magnitudes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let pairs = self.out.iter_mut().zip(self.x).zip(self.b);
        // The choice is made outside the loop.
        match self.round {
            Rounding::Exact => {
                for ((key, x), b) in pairs {
                    *key = (x - b).to_bits() & 0x7fff_ffff;
                }
            }
            round => {
                for ((key, x), b) in pairs {
                    *key = round.round(x - b).to_bits() & 0x7fff_ffff;
                }
            }
        }
    }
}

/// Ranges of ranks, found without sorting.
fn ranked(tensor: &TensorMerge<'_>, how: Sparsifier, of: &[usize]) -> Result<Vec<Keep>, String> {
    let (base, n, round) = (tensor.base()?, tensor.elements(), tensor.rounding());
    // Of each model, the first rank kept and the first above that is not.
    let ranges: Vec<Option<(usize, usize)>> = of
        .iter()
        .map(|m| {
            let p = &tensor.per_model[*m];
            if p.density >= 1.0 {
                return None;
            }
            let target = (p.density * n as f64) as usize;
            if how == Sparsifier::Magnitude {
                return Some((n - target, n));
            }
            let top = (p.gamma * n as f64) as usize;
            // Where both ends do not fit, less is dropped at the top.
            let (bottom, top) = if target + top > n { (0, n - target) } else { (n - target - top, top) };
            Some((bottom, n - top))
        })
        .collect();
    let asked: Vec<(usize, usize)> = ranges
        .iter()
        .zip(of)
        .filter_map(|(range, m)| range.map(|(low, high)| (*m, low, high)))
        .flat_map(|(m, low, high)| [(m, low), (m, high)])
        .filter(|(_, rank)| *rank > 0 && *rank < n)
        .collect();
    let keys = keys_at(tensor.inputs, n, &asked, |m, _, views, out| {
        Arch::new().dispatch(Magnitudes { x: views[m], b: views[base], round, out });
    })?;
    let key = |m: usize, rank: usize| {
        asked.iter().position(|a| *a == (m, rank)).map(|i| keys[i]).unwrap_or(Key { bits: 0, index: 0 })
    };
    let keep = |(range, m): (&Option<(usize, usize)>, &usize)| match *range {
        None => Keep::All,
        Some((low, high)) if low >= high => Keep::None,
        Some((low, high)) => Keep::Between(key(*m, low), (high < n).then(|| key(*m, high))),
    };
    Ok(ranges.iter().zip(of).map(keep).collect())
}

/// The seed of what is drawn for the model at position `i` of those that are not the base.
fn stream(tensor: &TensorMerge<'_>, i: usize) -> Seed {
    tensor.seed.derive(&format!("keep/{i}"))
}

/// Words below it are as many, of all, as `share` says; `None` if that is all of them.
fn threshold(share: f64) -> Option<u32> {
    let count = (share * 4_294_967_296.0).ceil();
    (count < 4_294_967_296.0).then_some(count as u32)
}

fn random(density: f64, seed: Seed) -> Keep {
    threshold(density).map_or(Keep::All, |threshold| Keep::Drawn(seed, threshold))
}

/// DELLA: the keep probability grows linearly with the rank in the row, from `density - epsilon` to `density + epsilon`.
fn by_rank(tensor: &TensorMerge<'_>, of: &[usize]) -> Result<Vec<Keep>, String> {
    let (base, n, round) = (tensor.base()?, tensor.elements(), tensor.rounding());
    // mergekit ranks along the second axis; a vector is one row.
    let columns = if tensor.shape.len() > 1 { tensor.columns() } else { n };
    if n == 0 {
        return Ok(vec![Keep::All; of.len()]);
    }
    // Each model with its draws and, by rank, the word that a draw has to be below.
    let mut ranked: Vec<(usize, Seed, Vec<u64>)> = Vec::new();
    let mut keeps = Vec::new();
    for (i, m) in of.iter().enumerate() {
        let p = &tensor.per_model[*m];
        if p.density >= 1.0 || p.density <= 0.0 {
            keeps.push(if p.density >= 1.0 { Keep::All } else { Keep::None });
            continue;
        }
        // A row of one element has no order: it is kept with the density.
        let step = 2.0 * p.epsilon / (columns.max(2) - 1) as f64;
        let least = if columns > 1 { p.density - p.epsilon } else { p.density };
        let limit = |rank: usize| ((least + step * rank as f64) * 4_294_967_296.0).ceil() as u64;
        ranked.push((*m, stream(tensor, i), (0..columns).map(limit).collect()));
        keeps.push(Keep::Mask(Mask::default()));
    }
    let parts = map(tensor.inputs, n, columns, |range: &Range<usize>, views| {
        let (mut keys, mut words, mut order) = (vec![0; columns], vec![0; columns], ByMagnitude::default());
        let mut kept = vec![false; range.len()];
        let mask = |(m, seed, limits): &(usize, Seed, Vec<u64>)| {
            let mut draws = draws(*seed, range.start);
            let rows = views[*m].chunks_exact(columns).zip(views[base].chunks_exact(columns));
            for ((x, b), kept) in rows.zip(kept.chunks_exact_mut(columns)) {
                fill(&mut draws, &mut words);
                Arch::new().dispatch(Magnitudes { x, b, round, out: &mut keys });
                for (i, limit) in order.of(&keys).iter().zip(limits) {
                    let i = (i & 0xffff_ffff) as usize;
                    kept[i] = u64::from(words[i]) < *limit;
                }
            }
            Mask::from_bools(&kept)
        };
        ranked.iter().map(mask).collect::<Vec<Mask>>()
    })?;
    let masks =
        keeps.iter_mut().filter_map(|keep| if let Keep::Mask(mask) = keep { Some(mask) } else { None });
    for (i, mask) in masks.enumerate() {
        parts.iter().for_each(|part| mask.append(&part[i]));
    }
    Ok(keeps)
}

/// Sorts rows of magnitudes.
#[derive(Default)]
struct ByMagnitude {
    order: Vec<u64>,
    unsorted: Vec<u64>,
    ends: Vec<u32>,
}

impl ByMagnitude {
    const BUCKETS: u32 = 512;
    /// Bits of a float below those that choose the bucket: 32 buckets for each power of two.
    const SHIFT: u32 = 18;

    /// The indexes of `keys`, in the lower halves, by magnitude and among equals by index.
    fn of(&mut self, keys: &[u32]) -> &[u64] {
        self.order.resize(keys.len(), 0);
        self.unsorted.resize(keys.len(), 0);
        // Zeros, of which a task vector may hold many, are first, in their order.
        let (mut zeros, mut others) = (0, 0);
        for (i, key) in keys.iter().enumerate() {
            self.order[zeros] = i as u64;
            self.unsorted[others] = u64::from(*key) << 32 | i as u64;
            zeros += usize::from(*key == 0);
            others += usize::from(*key != 0);
        }
        let (order, unsorted) = (&mut self.order[zeros..], &self.unsorted[..others]);
        // Most buckets hold a few: all that is 16 powers of two and more below the largest shares the first.
        let largest = keys.iter().copied().max().unwrap_or(0) >> Self::SHIFT;
        let first = largest.saturating_sub(Self::BUCKETS - 1);
        let bucket = |item: u64| ((item >> 32) as u32 >> Self::SHIFT).saturating_sub(first) as usize;
        self.ends.clear();
        self.ends.resize(Self::BUCKETS as usize, 0);
        unsorted.iter().for_each(|item| self.ends[bucket(*item)] += 1);
        let mut end = 0;
        for slot in &mut self.ends {
            (*slot, end) = (end, end + *slot);
        }
        for item in unsorted {
            let slot = &mut self.ends[bucket(*item)];
            order[*slot as usize] = *item;
            *slot += 1;
        }
        let mut start = 0;
        for end in &self.ends {
            let end = *end as usize;
            if end - start > 1 {
                order[start..end].sort_unstable();
            }
            start = end;
        }
        &self.order
    }
}

/// The factors that give each task vector the L1 norm that it had; 1 where either norm is almost 0.
fn scales(tensor: &TensorMerge<'_>, of: &[usize], sparse: &[Sparse]) -> Result<Vec<f32>, String> {
    /// Sums below it are left alone.
    const SMALLEST: f64 = 1e-7;
    let (base, n, round) = (tensor.base()?, tensor.elements(), tensor.rounding());
    let parts = map(tensor.inputs, n, 1, |range, views| {
        let sums = of.iter().zip(sparse).map(|(m, sparse)| {
            let norms = Norms { start: range.start, x: views[*m], b: views[base], sparse, round };
            Arch::new().dispatch(norms)
        });
        sums.collect::<Vec<[f64; 2]>>()
    })?;
    let scale = |i: usize| {
        let before = f64::from(round.scalar(parts.iter().map(|p| p[i][0]).sum()));
        let after = f64::from(round.scalar(parts.iter().map(|p| p[i][1]).sum()));
        if before < SMALLEST || after < SMALLEST { 1.0 } else { round.scalar(before / after) }
    };
    Ok((0..of.len()).map(scale).collect())
}

/// L1 norms of the task vector `x - b`, whole and thinned out.
struct Norms<'a> {
    start: usize,
    x: &'a [f32],
    b: &'a [f32],
    sparse: &'a Sparse,
    round: Rounding,
}

impl Norms<'_> {
    #[inline(always)]
    fn run(self, r: impl Fn(f32) -> f32 + Copy) -> [f64; 2] {
        let (mut sums, mut delta) = ([0.0; 2], [0.0; BLOCK]);
        for (i, (x, b)) in self.x.chunks(BLOCK).zip(self.b.chunks(BLOCK)).enumerate() {
            let delta = &mut delta[..x.len()];
            for ((d, x), b) in delta.iter_mut().zip(x).zip(b) {
                *d = r(x - b);
            }
            sums[0] += sum_of_magnitudes(delta);
            self.sparse.apply(self.start + i * BLOCK, delta, r);
            sums[1] += sum_of_magnitudes(delta);
        }
        sums
    }
}

impl WithSimd for Norms<'_> {
    type Output = [f64; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [f64; 2] {
        let round = self.round;
        match round {
            Rounding::Exact => self.run(|v| v),
            _ => self.run(|v| round.round(v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_read_from_any_element_and_grows_by_any_number() {
        let bits = |n: usize, salt: u64| -> Vec<bool> {
            (0..n as u64).map(|i| (i * i + salt * i) % 7 < 3).collect()
        };
        let mut all = Vec::new();
        let mut mask = Mask::default();
        for (salt, n) in [1, 63, 64, 130, 5, 0, 200].into_iter().enumerate() {
            let more = bits(n, salt as u64);
            mask.append(&Mask::from_bools(&more));
            all.extend(more);
        }
        assert_eq!((mask.len, mask.words.len()), (all.len(), all.len().div_ceil(64)));
        for at in 0..all.len() {
            let word = mask.word(at);
            for i in 0..64 {
                assert_eq!(word >> i & 1 != 0, all.get(at + i) == Some(&true), "{at} {i}");
            }
        }
    }

    /// The same words whatever range is drawn.
    #[test]
    fn drawn_elements_do_not_depend_on_the_range() {
        let sparse = Sparse { keep: random(0.4, Seed(3)), scale: 1.0 };
        let mut whole = vec![1.0f32; 3000];
        sparse.apply(0, &mut whole, |v| v);
        let kept = whole.iter().sum::<f32>();
        assert!((kept - 1200.0).abs() < 3.0 * (3000.0f32 * 0.24).sqrt(), "{kept}");
        for (start, len) in [(1, 7), (255, 300), (1024, 1024), (2999, 1)] {
            let mut part = vec![1.0; len];
            sparse.apply(start, &mut part, |v| v);
            assert_eq!(part, whole[start..start + len], "{start}");
        }
        assert!(matches!(random(1.0, Seed(3)), Keep::All) && threshold(0.0) == Some(0), "all and none");
    }

    #[test]
    fn keys_that_tie_are_kept_by_their_index() {
        let values: Vec<f32> = (0..50).map(|i| [1.0, -1.0, 2.0, 0.0][i % 4]).collect();
        let key = |i: usize| Key { bits: values[i].abs().to_bits(), index: i };
        for (low, high) in [(13, Some(34)), (34, Some(14)), (0, None), (21, Some(21)), (4, Some(40))] {
            let sparse = Sparse { keep: Keep::Between(key(low), high.map(key)), scale: 1.0 };
            for start in [0, 7, 14, 35] {
                let mut kept = values[start..].to_vec();
                sparse.apply(start, &mut kept, |v| v);
                for (i, (kept, v)) in (start..).zip(kept.iter().zip(&values[start..])) {
                    let inside = key(i) >= key(low) && high.is_none_or(|high| key(i) < key(high));
                    assert_eq!(*kept, if inside { *v } else { 0.0 }, "{low} {high:?} {start} {i}");
                }
            }
        }
    }

    #[test]
    fn rows_are_sorted_by_magnitude_and_index() {
        let smooth = Seed(5).normal("smooth", 1000, 1.0);
        let rows: [Vec<f32>; 4] = [
            smooth.clone(),
            smooth.iter().map(|v| (v * 2.0).round()).collect(),
            // One far above the rest, which shares a bucket.
            smooth.iter().enumerate().map(|(i, v)| if i == 500 { 1e30 } else { *v }).collect(),
            vec![f32::NAN, 0.0, f32::INFINITY, -0.0, 1e-45],
        ];
        let mut sorter = ByMagnitude::default();
        for row in &rows {
            let keys: Vec<u32> = row.iter().map(|v| v.to_bits() & 0x7fff_ffff).collect();
            let mut sorted: Vec<u64> =
                keys.iter().enumerate().map(|(i, key)| u64::from(*key) << 32 | i as u64).collect();
            sorted.sort_unstable();
            assert_eq!(sorter.of(&keys), sorted);
        }
    }
}
