//! Which elements of a task vector are kept: the largest (TIES), a random share (DARE), those neither large nor small (breadcrumbs), or a
//! random share by rank (DELLA).

use std::ops::Range;

use firebrick_core::Seed;
use rand::RngCore;

use super::TensorMerge;
use super::rounding::Rounding;
use super::select::{Key, keys_at};
use super::values::map;

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
    Mask(Mask),
}

/// One bit an element.
#[derive(Clone, Debug, Default)]
pub(super) struct Mask {
    words: Vec<u64>,
    len: usize,
}

impl Mask {
    fn push(&mut self, keep: bool) {
        if self.len.is_multiple_of(64) {
            self.words.push(0);
        }
        if keep && let Some(word) = self.words.last_mut() {
            *word |= 1 << (self.len % 64);
        }
        self.len += 1;
    }

    fn from_bools(bits: impl IntoIterator<Item = bool>) -> Self {
        let mut mask = Mask::default();
        bits.into_iter().for_each(|bit| mask.push(bit));
        mask
    }

    fn append(&mut self, other: &Mask) {
        if self.len.is_multiple_of(64) {
            self.words.extend_from_slice(&other.words);
            self.len += other.len;
        } else {
            (0..other.len).for_each(|i| self.push(other.get(i)));
        }
    }

    fn get(&self, i: usize) -> bool {
        self.words[i / 64] >> (i % 64) & 1 != 0
    }
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
    pub(super) fn apply(&self, start: usize, delta: &mut [f32], round: Rounding) {
        match &self.keep {
            Keep::All => {}
            Keep::None => delta.fill(0.0),
            Keep::Between(low, high) => {
                for (i, d) in delta.iter_mut().enumerate() {
                    let key = Key { bits: d.to_bits() & 0x7fff_ffff, index: start + i };
                    if key < *low || high.is_some_and(|high| key >= high) {
                        *d = 0.0;
                    }
                }
            }
            Keep::Mask(mask) => {
                for (i, d) in delta.iter_mut().enumerate() {
                    if !mask.get(start + i) {
                        *d = 0.0;
                    }
                }
            }
        }
        if self.scale != 1.0 {
            delta.iter_mut().for_each(|d| *d = round.round(*d * self.scale));
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
            masks.iter().map(|mask| Keep::Mask(Mask::from_bools(mask.iter().copied()))).collect()
        }
        (Sparsifier::None, _) => vec![Keep::All; of.len()],
        (Sparsifier::Magnitude | Sparsifier::Outliers, _) => ranked(tensor, how, &of)?,
        (Sparsifier::Random, _) => {
            let n = tensor.elements();
            of.iter()
                .enumerate()
                .map(|(i, m)| random(tensor.per_model[*m].density, n, stream(tensor, i)))
                .collect()
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

/// The magnitudes of a piece of task vector `m`.
fn magnitudes(base: usize, m: usize, round: Rounding, views: &[&[f32]], out: &mut [u32]) {
    for ((key, x), b) in out.iter_mut().zip(views[m]).zip(views[base]) {
        *key = round.round(x - b).to_bits() & 0x7fff_ffff;
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
    let keys = keys_at(tensor.inputs, n, &asked, |m, _, views, out| magnitudes(base, m, round, views, out))?;
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

/// Draws of the elements from `start` on, one word each whatever the range.
fn draws(seed: Seed, start: usize) -> impl FnMut() -> f64 {
    let mut rng = seed.stream("draws");
    rng.set_word_pos(start as u128);
    move || f64::from(rng.next_u32()) / 4_294_967_296.0
}

fn random(density: f64, n: usize, seed: Seed) -> Keep {
    if density >= 1.0 {
        return Keep::All;
    }
    let mut draw = draws(seed, 0);
    Keep::Mask(Mask::from_bools((0..n).map(|_| draw() < density)))
}

/// DELLA: the keep probability grows linearly with the rank in the row, from `density - epsilon` to `density + epsilon`.
fn by_rank(tensor: &TensorMerge<'_>, of: &[usize]) -> Result<Vec<Keep>, String> {
    let (base, n, round) = (tensor.base()?, tensor.elements(), tensor.rounding());
    // mergekit ranks along the second axis; a vector is one row.
    let columns = if tensor.shape.len() > 1 { tensor.columns() } else { n };
    if n == 0 {
        return Ok(vec![Keep::All; of.len()]);
    }
    let one = |(i, m): (usize, &usize)| {
        let p = &tensor.per_model[*m];
        if p.density >= 1.0 {
            return Ok(Keep::All);
        }
        if p.density <= 0.0 {
            return Ok(Keep::None);
        }
        let seed = stream(tensor, i);
        let least = p.density - p.epsilon;
        let parts = map(tensor.inputs, n, columns, |range: &Range<usize>, views| {
            let mut draw = draws(seed, range.start);
            let mut mask = vec![false; range.len()];
            let mut order: Vec<u64> = Vec::with_capacity(columns);
            let mut levels = vec![0.0; columns];
            let rows = views[*m].chunks_exact(columns).zip(views[base].chunks_exact(columns));
            for ((x, b), mask) in rows.zip(mask.chunks_exact_mut(columns)) {
                // The rank that an element has to reach to be kept; none or all where its draw alone decides.
                levels.iter_mut().for_each(|level| *level = (draw() - least) / (2.0 * p.epsilon));
                order.clear();
                order.extend(x.iter().zip(b).enumerate().map(|(i, (x, b))| {
                    (u64::from(round.round(x - b).to_bits() & 0x7fff_ffff) << 32) | i as u64
                }));
                order.sort_unstable();
                for (rank, key) in order.iter().enumerate() {
                    let i = (key & 0xffff_ffff) as usize;
                    // A row of one element has no order: it is kept with the density.
                    let r = if columns > 1 { rank as f64 / (columns - 1) as f64 } else { 0.5 };
                    mask[i] = levels[i] < r;
                }
            }
            Mask::from_bools(mask)
        })?;
        let mut all = Mask::default();
        parts.iter().for_each(|part| all.append(part));
        Ok(Keep::Mask(all))
    };
    of.iter().enumerate().map(one).collect()
}

/// The factors that give each task vector the L1 norm that it had; 1 where either norm is almost 0.
fn scales(tensor: &TensorMerge<'_>, of: &[usize], sparse: &[Sparse]) -> Result<Vec<f32>, String> {
    /// Sums below it are left alone.
    const SMALLEST: f64 = 1e-7;
    let (base, n, round) = (tensor.base()?, tensor.elements(), tensor.rounding());
    let parts = map(tensor.inputs, n, 1, |range, views| {
        let mut delta = vec![0.0; range.len()];
        let sums = of.iter().zip(sparse).map(|(m, sparse)| {
            for ((d, x), b) in delta.iter_mut().zip(views[*m]).zip(views[base]) {
                *d = round.round(x - b);
            }
            let sum = |delta: &[f32]| delta.iter().map(|d| f64::from(d.abs())).sum::<f64>();
            let before = sum(&delta);
            sparse.apply(range.start, &mut delta, round);
            (before, sum(&delta))
        });
        sums.collect::<Vec<(f64, f64)>>()
    })?;
    let scale = |i: usize| {
        let before = f64::from(round.scalar(parts.iter().map(|p| p[i].0).sum()));
        let after = f64::from(round.scalar(parts.iter().map(|p| p[i].1).sum()));
        if before < SMALLEST || after < SMALLEST { 1.0 } else { round.scalar(before / after) }
    };
    Ok((0..of.len()).map(scale).collect())
}
