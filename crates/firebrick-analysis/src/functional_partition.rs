//! Neurons of a feed-forward network in equal groups that speak together: what a network could be cut into experts by
//! (MoEfication, Zhang et al. 2022, arXiv:2110.01786; emergent modularity, arXiv:2305.18390).

use firebrick_core::Seed;
use firebrick_tensor::linalg::{LinalgError, Matrix};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// Rounds of assigning and averaging, if it does not settle before.
const ROUNDS: usize = 20;
/// Starts, of which the best is kept.
const STARTS: usize = 3;
/// Random partitions that stand for chance.
const CHANCES: usize = 4;

/// How well neurons fall into groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Partition {
    /// Number of groups of equal size.
    pub groups: usize,
    /// How many groups of a token are counted.
    pub top: usize,
    /// Share of a token's energy in its `top` strongest groups, on tokens the groups were not made from.
    pub share: f64,
    /// The same for random groups of that size.
    pub chance: f64,
    /// `share / chance`: 1 where groups say nothing.
    pub lift: f64,
    /// Adjusted Rand index of the groups made from two halves of the tokens: 1 if they agree, 0 by chance.
    pub stability: f64,
}

/// Cuts the neurons of `rows: [tokens, neurons]`, row-major, into `groups` equal groups by the correlation of `|h|` (on the even
/// tokens) and looks how much of a token's energy (on the odd ones) a quarter of them holds. `None` where there is too little to
/// cut: fewer than 2 neurons a group, 8 tokens a half or 2 groups.
///
/// # Errors
/// Activations that are not finite.
pub fn functional_partition(
    rows: &[f32],
    neurons: usize,
    groups: usize,
    seed: Seed,
) -> Result<Option<Partition>, LinalgError> {
    let tokens = rows.len() / neurons.max(1);
    if groups < 2 || neurons < 2 * groups || tokens < 16 {
        return Ok(None);
    }
    let half = |start: usize| -> Vec<&[f32]> { rows.chunks_exact(neurons).skip(start).step_by(2).collect() };
    let (even, odd) = (half(0), half(1));
    let made = balanced_groups(&even, neurons, groups, seed)?;
    let again = balanced_groups(&odd, neurons, groups, seed)?;
    let top = (groups / 4).max(1);
    let share = energy_share(&odd, &made, groups, top);
    let chance = |i: usize| {
        let mut random: Vec<usize> = (0..neurons).map(|j| j % groups).collect();
        shuffle(&mut random, seed, &format!("partition/chance/{i}"));
        energy_share(&odd, &random, groups, top)
    };
    let chance = (0..CHANCES).map(chance).sum::<f64>() / CHANCES as f64;
    let lift = if chance > 0.0 { share / chance } else { 1.0 };
    Ok(Some(Partition { groups, top, share, chance, lift, stability: adjusted_rand(&made, &again) }))
}

/// The group of each neuron, by balanced k-means on the unit vectors whose products are the correlations of `|h|` over `rows`.
///
/// Groups differ in size by at most one. Neurons that never vary go where there is room.
///
/// # Errors
/// Activations that are not finite.
pub fn balanced_groups(
    rows: &[&[f32]],
    neurons: usize,
    groups: usize,
    seed: Seed,
) -> Result<Vec<usize>, LinalgError> {
    let points = standardized(rows, neurons)?;
    let mut best: Option<(f64, Vec<usize>)> = None;
    for start in 0..STARTS {
        let found = settle(&points, groups, seed, start)?;
        if best.as_ref().is_none_or(|b| found.0 > b.0) {
            best = Some(found);
        }
    }
    Ok(best.map_or(Vec::new(), |b| b.1))
}

/// `[neurons, tokens]`: `|h|`, centred and of length 1.
fn standardized(rows: &[&[f32]], neurons: usize) -> Result<Matrix, LinalgError> {
    let tokens = rows.len();
    let mut data = vec![0.0f64; neurons * tokens];
    for (j, point) in data.chunks_mut(tokens.max(1)).enumerate() {
        point.iter_mut().zip(rows).for_each(|(p, row)| *p = f64::from(row[j].abs()));
        let mean = point.iter().sum::<f64>() / tokens as f64;
        point.iter_mut().for_each(|p| *p -= mean);
        unit(point);
    }
    Matrix::new(neurons, tokens, data)
}

fn unit(v: &mut [f64]) {
    let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length > 0.0 {
        v.iter_mut().for_each(|x| *x /= length);
    }
}

/// One run of balanced k-means: the summed similarity to the centres, and the groups.
fn settle(
    points: &Matrix,
    groups: usize,
    seed: Seed,
    start: usize,
) -> Result<(f64, Vec<usize>), LinalgError> {
    let (n, width) = (points.rows(), points.cols());
    let mut centres = first_centres(points, groups, seed, start);
    let mut made = vec![usize::MAX; n];
    let mut total = 0.0;
    for _ in 0..ROUNDS {
        let similarity = points.matmul(&centres.transpose())?;
        let next = assign(&similarity, groups);
        total = next.iter().enumerate().map(|(i, g)| similarity[(i, *g)]).sum();
        let settled = next == made;
        made = next;
        if settled {
            break;
        }
        let mut sums = Matrix::zeros(groups, width);
        for (i, g) in made.iter().enumerate() {
            sums.data_mut()[g * width..(g + 1) * width]
                .iter_mut()
                .zip(points.row(i))
                .for_each(|(s, v)| *s += v);
        }
        sums.data_mut().chunks_mut(width.max(1)).for_each(unit);
        centres = sums;
    }
    Ok((total, made))
}

/// The surroundings of a random neuron, then always of the one least like those chosen: means of as many neurons as a group has,
/// because one neuron alone says little.
fn first_centres(points: &Matrix, groups: usize, seed: Seed, start: usize) -> Matrix {
    let (n, width) = (points.rows(), points.cols());
    let varies: Vec<bool> = (0..n).map(|i| points.row(i).iter().any(|v| *v != 0.0)).collect();
    let mut chosen = vec![seed.stream(&format!("partition/start/{start}")).random_range(0..n)];
    let mut closest = vec![f64::NEG_INFINITY; n];
    let mut centres = Matrix::zeros(groups, width);
    for (g, centre) in centres.data_mut().chunks_mut(width.max(1)).enumerate() {
        let products = |v: &[f64]| -> Vec<f64> {
            (0..n).map(|i| points.row(i).iter().zip(v).map(|(a, b)| a * b).sum()).collect()
        };
        let like = products(points.row(chosen[g]));
        let mut near: Vec<usize> = (0..n).collect();
        near.sort_by(|a, b| like[*b].total_cmp(&like[*a]).then(a.cmp(b)));
        for i in &near[..n / groups] {
            centre.iter_mut().zip(points.row(*i)).for_each(|(c, v)| *c += v);
        }
        unit(centre);
        closest.iter_mut().zip(products(centre)).for_each(|(c, s)| *c = c.max(s));
        let free = |i: &usize| varies[*i] && !chosen.contains(i);
        let next = (0..n).filter(free).min_by(|a, b| closest[*a].total_cmp(&closest[*b]));
        // With fewer neurons that vary than groups, any will do.
        chosen.push(next.or_else(|| (0..n).find(|i| !chosen.contains(i))).unwrap_or(0));
    }
    centres
}

/// The most similar pairs first, as long as a group has room.
fn assign(similarity: &Matrix, groups: usize) -> Vec<usize> {
    let n = similarity.rows();
    let mut pairs: Vec<(usize, usize)> = (0..n).flat_map(|i| (0..groups).map(move |g| (i, g))).collect();
    pairs.sort_by(|a, b| similarity[*b].total_cmp(&similarity[*a]).then(a.cmp(b)));
    let mut room: Vec<usize> = (0..groups).map(|g| n / groups + usize::from(g < n % groups)).collect();
    let mut made = vec![usize::MAX; n];
    for (i, g) in pairs {
        if made[i] == usize::MAX && room[g] > 0 {
            made[i] = g;
            room[g] -= 1;
        }
    }
    made
}

/// The share of a token's energy in its `top` strongest groups, mean over tokens that have any.
fn energy_share(rows: &[&[f32]], made: &[usize], groups: usize, top: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0usize);
    for row in rows {
        let mut energy = vec![0.0f64; groups];
        row.iter().zip(made).for_each(|(v, g)| energy[*g] += f64::from(*v).powi(2));
        let total: f64 = energy.iter().sum();
        if total > 0.0 {
            energy.sort_by(|a, b| b.total_cmp(a));
            sum += energy[..top].iter().sum::<f64>() / total;
            count += 1;
        }
    }
    if count > 0 { sum / count as f64 } else { 0.0 }
}

/// Hubert and Arabie's adjusted Rand index of two partitions: 1 for the same, 0 expected by chance.
pub fn adjusted_rand(a: &[usize], b: &[usize]) -> f64 {
    let size = |x: &[usize]| x.iter().max().map_or(0, |m| m + 1);
    let (rows, cols) = (size(a), size(b));
    let mut table = vec![0u64; rows * cols];
    a.iter().zip(b).for_each(|(i, j)| table[i * cols + j] += 1);
    let pairs = |n: u64| (n * n.saturating_sub(1) / 2) as f64;
    let both: f64 = table.iter().map(|n| pairs(*n)).sum();
    let of_rows: f64 = table.chunks(cols.max(1)).map(|r| pairs(r.iter().sum())).sum();
    let of_cols: f64 = (0..cols).map(|j| pairs(table.iter().skip(j).step_by(cols).sum())).sum();
    let all = pairs(a.len().min(b.len()) as u64);
    let expected = if all > 0.0 { of_rows * of_cols / all } else { 0.0 };
    let most = (of_rows + of_cols) / 2.0;
    if most > expected { (both - expected) / (most - expected) } else { 1.0 }
}

fn shuffle(values: &mut [usize], seed: Seed, name: &str) {
    let mut rng = seed.stream(name);
    for i in (1..values.len()).rev() {
        values.swap(i, rng.random_range(0..=i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEURONS: usize = 96;
    const GROUPS: usize = 8;

    /// Gated neurons, of either sign, in groups that see a subspace each, of which a token wakes two; shuffled. Returns the true groups.
    fn planted(tokens: usize, seed: Seed) -> (Vec<f32>, Vec<usize>) {
        let mut truth: Vec<usize> = (0..NEURONS).map(|j| j % GROUPS).collect();
        shuffle(&mut truth, seed, "truth");
        let weights = seed.normal("w", NEURONS * 4, 1.0);
        let mut rng = seed.stream("tokens");
        let mut rows = Vec::new();
        for t in 0..tokens {
            let (a, b) = (rng.random_range(0..GROUPS), rng.random_range(0..GROUPS));
            let input = seed.normal(&format!("x/{t}"), 4 * GROUPS, 1.0);
            for (j, g) in truth.iter().enumerate() {
                let size = if *g == a || *g == b { 1.0 } else { 0.05 };
                let dot: f32 = (0..4).map(|c| weights[j * 4 + c] * input[g * 4 + c]).sum();
                rows.push(size * dot);
            }
        }
        (rows, truth)
    }

    #[test]
    fn planted_groups_are_found_and_noise_has_none() {
        for seed in [Seed(1), Seed(2), Seed(3)] {
            let (rows, truth) = planted(400, seed);
            let all: Vec<&[f32]> = rows.chunks(NEURONS).collect();
            let made = balanced_groups(&all, NEURONS, GROUPS, seed).unwrap();
            let found = adjusted_rand(&made, &truth);
            assert!(found > 0.95, "{seed:?}: {found}");
            let quality = functional_partition(&rows, NEURONS, GROUPS, seed).unwrap().unwrap();
            assert!(quality.lift > 1.5 && quality.stability > 0.9 && quality.share > 0.9, "{quality:?}");
            // Negative control: neurons that know nothing of each other.
            let noise = seed.normal("noise", 400 * NEURONS, 1.0);
            let none = functional_partition(&noise, NEURONS, GROUPS, seed).unwrap().unwrap();
            assert!((none.lift - 1.0).abs() < 0.05 && none.stability < 0.2, "{none:?}");
        }
    }

    #[test]
    fn groups_have_one_size_and_the_same_seed_the_same_groups() {
        let rows = Seed(4).normal("h", 50 * 30, 1.0);
        let all: Vec<&[f32]> = rows.chunks(30).collect();
        let made = balanced_groups(&all, 30, 4, Seed(0)).unwrap();
        let mut sizes = [0; 4];
        made.iter().for_each(|g| sizes[*g] += 1);
        sizes.sort_unstable();
        assert_eq!(sizes, [7, 7, 8, 8]);
        assert_eq!(made, balanced_groups(&all, 30, 4, Seed(0)).unwrap());
        // Neurons that never vary are given a group too.
        let flat = vec![1.0f32; 50 * 30];
        let flat: Vec<&[f32]> = flat.chunks(30).collect();
        assert!(balanced_groups(&flat, 30, 4, Seed(0)).unwrap().iter().all(|g| *g < 4));
        assert_eq!(
            functional_partition(&rows, 30, 16, Seed(0)).unwrap(),
            None,
            "fewer than two neurons a group"
        );
    }

    #[test]
    fn the_rand_index_knows_agreement_from_chance() {
        let a = [0, 0, 1, 1, 2, 2];
        assert_eq!(adjusted_rand(&a, &[2, 2, 0, 0, 1, 1]), 1.0, "names do not count");
        // By hand: 1 shared pair of 3 and 3, of 15.
        let found = adjusted_rand(&a, &[0, 0, 1, 2, 1, 2]);
        assert!((found - (1.0 - 0.6) / (3.0 - 0.6)).abs() < 1e-12, "{found}");
        let n = 3000;
        let draw = |name: &str| -> Vec<usize> {
            Seed(5).uniform(name, n, 4.0).iter().map(|v| (v + 4.0) as usize % 8).collect()
        };
        assert!(adjusted_rand(&draw("a"), &draw("b")).abs() < 0.01);
    }
}
