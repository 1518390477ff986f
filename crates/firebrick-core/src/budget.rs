//! Spending a budget over sites: which of its choices each site gets so that costs stay below the budget and losses are small.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::Seed;

/// One setting a site could have: a rank, a bit width, kept or dropped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What it costs, in the unit of the budget: bits, bytes, parameters, microseconds.
    pub cost: u64,
    /// What is lost by it, smaller is better; losses of different sites are added.
    pub loss: f64,
}

/// An allocation that looks at no loss of other sites; what every layer-wise allocation is compared with at the same budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Every site the same level of cost; the last incomplete level is spread evenly over depth.
    Uniform,
    /// The first sites get their best choice.
    First,
    /// The last sites get their best choice.
    Last,
    /// Sites in random order get their best choice.
    Random(Seed),
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Baseline::Uniform => f.write_str("uniform"),
            Baseline::First => f.write_str("first"),
            Baseline::Last => f.write_str("last"),
            Baseline::Random(seed) => write!(f, "random (seed {})", seed.0),
        }
    }
}

/// A budget cannot be spent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BudgetError {
    /// There is nothing to spend it on.
    #[error("there are no sites to spend the budget on")]
    NoSites,
    /// Sites, by their number from 0, without a choice.
    #[error("no choices for site(s) {}", list(sites))]
    NoChoices {
        /// Numbers of the sites.
        sites: Vec<usize>,
    },
    /// Losses that are infinite or not a number.
    #[error("the loss is not finite at (site, choice) {}", list(at))]
    NotFinite {
        /// Site and choice, from 0.
        at: Vec<(usize, usize)>,
    },
    /// Even the cheapest choice everywhere costs more than the budget.
    #[error("a budget of {budget} is {short} short: the cheapest choices together cost {cheapest}")]
    TooSmall {
        /// The budget.
        budget: u64,
        /// Cost of the cheapest allocation.
        cheapest: u128,
        /// What is missing.
        short: u128,
    },
    /// The exact table would be too large or take too long; [`allocate_greedy`] needs none.
    #[error("exact allocation needs {needed} {unit}, more than {limit}; allocate greedily")]
    TooLarge {
        /// What it needs.
        needed: u128,
        /// The most it may need.
        limit: u128,
        /// Of what: `bytes`, `steps` or `choices at a site`.
        unit: &'static str,
    },
}

fn list<T: fmt::Debug>(items: &[T]) -> String {
    const SHOWN: usize = 8;
    let mut shown: Vec<String> = items.iter().take(SHOWN).map(|i| format!("{i:?}")).collect();
    if items.len() > SHOWN {
        shown.push(format!("and {} more", items.len() - SHOWN));
    }
    shown.join(", ")
}

/// Bytes of the exact table: one for each (site, amount), and two rows of losses.
const MAX_BYTES: u128 = 50_000_000;
/// Triples (site, choice, amount) the exact table is filled from: about a second.
const MAX_STEPS: u128 = 1_000_000_000;
/// Choices of a site that a byte can number.
const MAX_CHOICES: u128 = 256;

/// Picks one choice per site, so that the costs sum to at most `budget` and the sum of losses is small: exactly minimal where
/// [`allocate_exact`] can tell, else by [`allocate_greedy`].
///
/// ```
/// use firebrick_core::{Choice, allocate};
/// let bits = |two: f64, four: f64| vec![Choice { cost: 2, loss: two }, Choice { cost: 4, loss: four }];
/// // Three layers at 8 bits together: the one that suffers most from 2 bits gets 4.
/// assert_eq!(allocate(&[bits(1.0, 0.1), bits(9.0, 0.1), bits(2.0, 0.1)], 8)?, [0, 1, 0]);
/// # Ok::<(), firebrick_core::BudgetError>(())
/// ```
///
/// # Errors
/// See [`BudgetError`]; never [`BudgetError::TooLarge`].
pub fn allocate(options: &[Vec<Choice>], budget: u64) -> Result<Vec<usize>, BudgetError> {
    match allocate_exact(options, budget) {
        Err(BudgetError::TooLarge { .. }) => allocate_greedy(options, budget),
        done => done,
    }
}

/// The allocation of smallest total loss, by dynamic programming over the money spent above the cheapest allocation, in
/// units of the greatest common divisor of the prices (the multiple-choice knapsack of Kellerer, Pferschy and Pisinger 2004,
/// chapter 11).
///
/// # Errors
/// See [`BudgetError`]; [`BudgetError::TooLarge`] above a table of 50 MB, 10^9 (site, choice, amount) triples or 256 useful
/// choices at a site.
pub fn allocate_exact(options: &[Vec<Choice>], budget: u64) -> Result<Vec<usize>, BudgetError> {
    let market = Market::new(options, budget)?;
    let open: Vec<usize> = (0..options.len()).filter(|s| market.fronts[*s].len() > 1).collect();
    let extra = |s: usize, i: usize| options[s][i].cost - market.floors[s];
    let extras: Vec<Vec<u64>> =
        open.iter().map(|s| market.fronts[*s].iter().map(|i| extra(*s, *i)).collect()).collect();
    let unit = extras.iter().flatten().copied().fold(0, gcd).max(1);
    let most: u128 = extras.iter().map(|e| u128::from(e.iter().copied().max().unwrap_or(0))).sum();
    let width = u128::from(market.spare).min(most) / u128::from(unit) + 1;
    let choices = || extras.iter().map(|e| e.len() as u128);
    for (needed, limit, unit) in [
        (choices().max().unwrap_or(0), MAX_CHOICES, "choices at a site"),
        (width * (open.len() as u128 + 16), MAX_BYTES, "bytes"),
        (width * choices().sum::<u128>(), MAX_STEPS, "steps"),
    ] {
        if needed > limit {
            return Err(BudgetError::TooLarge { needed, limit, unit });
        }
    }
    let width = width as usize;
    // best[w]: the smallest loss of the sites so far with at most w units; picked[site][w]: the last site's choice for it.
    let mut best = vec![0.0f64; width];
    let mut picked: Vec<Vec<u8>> = Vec::with_capacity(open.len());
    for (s, extras) in open.iter().zip(&extras) {
        let mut next = vec![f64::INFINITY; width];
        let mut row = vec![0u8; width];
        for (k, (i, extra)) in market.fronts[*s].iter().zip(extras).enumerate() {
            let loss = options[*s][*i].loss;
            let step = usize::try_from(extra / unit).unwrap_or(usize::MAX);
            for w in step.min(width)..width {
                let total = best[w - step] + loss;
                if total < next[w] {
                    next[w] = total;
                    row[w] = k as u8;
                }
            }
        }
        best = next;
        picked.push(row);
    }
    let mut allocation: Vec<usize> = market.fronts.iter().map(|front| front[0]).collect();
    let mut w = width - 1;
    for (s, row) in open.iter().zip(&picked).rev() {
        let i = market.fronts[*s][usize::from(row[w])];
        allocation[*s] = i;
        w -= (extra(*s, i) / unit) as usize;
    }
    Ok(allocation)
}

/// Starts with the cheapest choices and makes the affordable step with the largest drop of loss per cost, again and again
/// (the greedy of Sinha and Zoltners 1979 for the multiple-choice knapsack).
///
/// From a vertex of the lower convex hull of a site's (cost, loss) table the steepest step leads to the next vertex, so the
/// steps follow the hulls until one no longer fits, and then fill what is left. The total loss is above the optimum by
/// at most the largest drop of a single hull step.
///
/// # Errors
/// See [`BudgetError`]; never [`BudgetError::TooLarge`].
pub fn allocate_greedy(options: &[Vec<Choice>], budget: u64) -> Result<Vec<usize>, BudgetError> {
    let market = Market::new(options, budget)?;
    let mut at = vec![0usize; options.len()];
    let mut spare = market.spare;
    let mut heap: BinaryHeap<Step> =
        (0..options.len()).filter_map(|s| market.steepest(options, s, 0, spare)).collect();
    while let Some(step) = heap.pop() {
        if step.cost <= spare {
            spare -= step.cost;
            at[step.site] = step.to;
        }
        // A step that no longer fits is replaced by the steepest one that does.
        heap.extend(market.steepest(options, step.site, at[step.site], spare));
    }
    Ok(at.iter().enumerate().map(|(s, k)| market.fronts[s][*k]).collect())
}

/// Spends `budget` without weighing the losses of sites against each other; see [`Baseline`].
///
/// Every baseline starts with the cheapest choices and spends what remains in its order on whatever still fits and helps.
///
/// # Errors
/// See [`BudgetError`]; never [`BudgetError::TooLarge`].
pub fn allocate_baseline(
    options: &[Vec<Choice>],
    budget: u64,
    baseline: Baseline,
) -> Result<Vec<usize>, BudgetError> {
    let market = Market::new(options, budget)?;
    let mut order: Vec<usize> = (0..options.len()).collect();
    match baseline {
        Baseline::Uniform => return Ok(uniform(options, market.spare)),
        Baseline::First => {}
        Baseline::Last => order.reverse(),
        Baseline::Random(seed) => order.shuffle(&mut seed.stream("budget/random")),
    }
    let mut spare = market.spare;
    let mut allocation: Vec<usize> = market.fronts.iter().map(|front| front[0]).collect();
    for s in order {
        // A front falls in loss as it rises in cost: its last affordable choice is the best one.
        let extra = |i: usize| options[s][i].cost - market.floors[s];
        if let Some(i) = market.fronts[s].iter().copied().rfind(|i| extra(*i) <= spare) {
            spare -= extra(i);
            allocation[s] = i;
        }
    }
    Ok(allocation)
}

fn uniform(options: &[Vec<Choice>], mut spare: u64) -> Vec<usize> {
    let levels: Vec<Vec<usize>> = options.iter().map(|choices| by_cost(choices)).collect();
    let mut at = vec![0usize; options.len()];
    let price = |s: usize, level: usize| -> Option<u64> {
        let (now, next) = (*levels[s].get(level)?, *levels[s].get(level + 1)?);
        Some(options[s][next].cost - options[s][now].cost)
    };
    for level in 0.. {
        let rising: Vec<usize> = (0..options.len()).filter(|s| price(*s, level).is_some()).collect();
        let total = |chosen: &mut dyn Iterator<Item = usize>| -> u128 {
            chosen.filter_map(|s| price(s, level)).map(u128::from).sum()
        };
        let rising = &rising;
        let spread = |count: usize| (0..count).map(move |j| rising[(2 * j + 1) * rising.len() / (2 * count)]);
        let cheapest = rising.iter().filter_map(|s| price(*s, level)).min().unwrap_or(1).max(1);
        let most = usize::try_from(spare / cheapest).unwrap_or(usize::MAX).min(rising.len());
        let count = (0..=most).rev().find(|n| total(&mut spread(*n)) <= u128::from(spare)).unwrap_or(0);
        for s in spread(count) {
            spare -= price(s, level).unwrap_or(0);
            at[s] += 1;
        }
        if count < rising.len() || rising.is_empty() {
            break;
        }
    }
    let mut raised = true;
    while raised {
        raised = false;
        for s in 0..options.len() {
            if let Some(cost) = price(s, at[s]).filter(|cost| *cost <= spare)
                && options[s][levels[s][at[s] + 1]].loss < options[s][levels[s][at[s]]].loss
            {
                spare -= cost;
                at[s] += 1;
                raised = true;
            }
        }
    }
    at.iter().enumerate().map(|(s, level)| levels[s][*level]).collect()
}

/// Checked options: for each site the choices worth their cost, and the money left after the cheapest of each.
struct Market {
    /// Numbers of choices, rising in cost and falling in loss.
    fronts: Vec<Vec<usize>>,
    floors: Vec<u64>,
    spare: u64,
}

impl Market {
    fn new(options: &[Vec<Choice>], budget: u64) -> Result<Self, BudgetError> {
        if options.is_empty() {
            return Err(BudgetError::NoSites);
        }
        let sites: Vec<usize> = (0..options.len()).filter(|s| options[*s].is_empty()).collect();
        if !sites.is_empty() {
            return Err(BudgetError::NoChoices { sites });
        }
        let pairs =
            options.iter().enumerate().flat_map(|(s, c)| c.iter().enumerate().map(move |(i, c)| (s, i, c)));
        let at: Vec<(usize, usize)> = pairs.filter(|p| !p.2.loss.is_finite()).map(|p| (p.0, p.1)).collect();
        if !at.is_empty() {
            return Err(BudgetError::NotFinite { at });
        }
        let fronts: Vec<Vec<usize>> = options.iter().map(|choices| front(choices)).collect();
        let floors: Vec<u64> = fronts.iter().zip(options).map(|(front, c)| c[front[0]].cost).collect();
        let cheapest: u128 = floors.iter().copied().map(u128::from).sum();
        match u64::try_from(cheapest).ok().and_then(|c| budget.checked_sub(c)) {
            Some(spare) => Ok(Market { fronts, floors, spare }),
            None => Err(BudgetError::TooSmall { budget, cheapest, short: cheapest - u128::from(budget) }),
        }
    }

    /// The affordable step with the largest drop of loss per cost from place `from` of the site's front.
    fn steepest(&self, options: &[Vec<Choice>], site: usize, from: usize, spare: u64) -> Option<Step> {
        let front = &self.fronts[site];
        let now = options[site][front[from]];
        let steps = (from + 1..front.len()).map(|to| {
            let then = options[site][front[to]];
            let cost = then.cost - now.cost;
            Step { gain: (now.loss - then.loss) / cost as f64, cost, site, to }
        });
        steps.filter(|s| s.cost <= spare).max()
    }
}

#[derive(Clone, Copy, Debug)]
struct Step {
    gain: f64,
    cost: u64,
    site: usize,
    to: usize,
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        let earlier = (other.site, other.to).cmp(&(self.site, self.to));
        self.gain.total_cmp(&other.gain).then(earlier)
    }
}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Step {}

/// Numbers of the choices by rising cost; of equal costs only the one with the smallest loss.
fn by_cost(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    let key = |i: usize| (choices[i].cost, choices[i].loss);
    order.sort_by(|a, b| key(*a).0.cmp(&key(*b).0).then(key(*a).1.total_cmp(&key(*b).1)));
    order.dedup_by_key(|i| choices[*i].cost);
    order
}

/// Numbers of the choices no other choice beats in both cost and loss, by rising cost.
fn front(choices: &[Choice]) -> Vec<usize> {
    let mut front: Vec<usize> = Vec::new();
    for i in by_cost(choices) {
        if front.last().is_none_or(|last| choices[i].loss < choices[*last].loss) {
            front.push(i);
        }
    }
    front
}

fn gcd(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(pairs: &[(u64, f64)]) -> Vec<Choice> {
        pairs.iter().map(|&(cost, loss)| Choice { cost, loss }).collect()
    }

    #[test]
    fn a_case_where_greedy_is_not_optimal() {
        // The steepest step (7 for 4) blocks the better pair (5 + 5 for 3 + 3).
        let options =
            [choices(&[(0, 7.0), (4, 0.0)]), choices(&[(0, 5.0), (3, 0.0)]), choices(&[(0, 5.0), (3, 0.0)])];
        assert_eq!(allocate_exact(&options, 6), Ok(vec![0, 1, 1]));
        assert_eq!(allocate_greedy(&options, 6), Ok(vec![1, 0, 0]));
        assert_eq!(allocate(&options, 6), Ok(vec![0, 1, 1]));
    }

    #[test]
    fn unordered_and_dominated_choices() {
        let options = [choices(&[(9, 0.0), (1, 5.0), (5, 6.0), (1, 4.0), (4, 1.0)])];
        for (budget, want) in [(1, 3), (3, 3), (4, 4), (8, 4), (9, 0), (u64::MAX, 0)] {
            assert_eq!(allocate_exact(&options, budget), Ok(vec![want]), "budget {budget}");
            assert_eq!(allocate_greedy(&options, budget), Ok(vec![want]), "budget {budget}");
        }
    }

    #[test]
    fn baselines_spend_where_they_say() {
        let options = vec![choices(&[(1, 1.0), (2, 0.0)]); 6];
        let run = |baseline| allocate_baseline(&options, 9, baseline).unwrap();
        assert_eq!(run(Baseline::First), [1, 1, 1, 0, 0, 0]);
        assert_eq!(run(Baseline::Last), [0, 0, 0, 1, 1, 1]);
        assert_eq!(run(Baseline::Uniform), [0, 1, 0, 1, 0, 1]);
        let random = run(Baseline::Random(Seed(1)));
        assert_eq!(random.iter().sum::<usize>(), 3);
        assert_eq!(random, run(Baseline::Random(Seed(1))));
        assert!((2..20).any(|s| run(Baseline::Random(Seed(s))) != random), "the seed matters");
        let three = vec![choices(&[(2, 9.0), (3, 4.0), (4, 1.0)]); 4];
        assert_eq!(
            allocate_baseline(&three, 12, Baseline::Uniform),
            Ok(vec![1; 4]),
            "a whole level is exactly uniform"
        );
    }

    #[test]
    fn errors_say_what_is_wrong() {
        assert_eq!(allocate(&[], 1), Err(BudgetError::NoSites));
        let one = choices(&[(3, 1.0)]);
        assert_eq!(
            allocate(&[one.clone(), vec![], one.clone(), vec![]], 9),
            Err(BudgetError::NoChoices { sites: vec![1, 3] })
        );
        assert_eq!(
            allocate(&[one.clone(), choices(&[(1, f64::NAN), (2, f64::INFINITY)])], 9),
            Err(BudgetError::NotFinite { at: vec![(1, 0), (1, 1)] })
        );
        let short = allocate(&[one.clone(), one], 4).unwrap_err();
        assert_eq!(short, BudgetError::TooSmall { budget: 4, cheapest: 6, short: 2 });
        assert!(short.to_string().contains("2 short"));
    }

    #[test]
    fn exact_allocation_says_when_it_needs_too_much() {
        let unit_of = |options: &[Vec<Choice>]| match allocate_exact(options, u64::MAX) {
            Ok(_) => "",
            Err(BudgetError::TooLarge { unit, needed, limit }) if needed > limit => unit,
            Err(other) => panic!("{other}"),
        };
        let many = |n: u64, last: u64| -> Vec<Choice> {
            let cost = |i: u64| if i + 1 == n { last } else { i };
            (0..n).map(|i| Choice { cost: cost(i), loss: -(i as f64) }).collect()
        };
        // One site and two rows of losses: bytes even without many sites.
        assert_eq!(unit_of(&[many(3, 3_000_000)]), "bytes");
        assert_eq!(unit_of(&[many(3, 300_000)]), "", "control");
        assert_eq!(unit_of(&[many(257, 300)]), "choices at a site");
        assert_eq!(unit_of(&[many(256, 300)]), "", "control");
        // 20 sites of 256 choices over 1.2 million amounts.
        assert_eq!(unit_of(&vec![many(256, 60_000); 20]), "steps");
    }

    #[test]
    fn huge_numbers_neither_overflow_nor_allocate() {
        let top = u64::MAX;
        let options = vec![choices(&[(top, 1.0), (top - 1, 2.0), (7, 3.0)]); 3];
        assert!(matches!(allocate_exact(&options, top), Err(BudgetError::TooLarge { .. })));
        assert_eq!(allocate(&options, 21), Ok(vec![2, 2, 2]));
        for baseline in [Baseline::Uniform, Baseline::First, Baseline::Last, Baseline::Random(Seed(0))] {
            assert!(allocate_baseline(&options, top, baseline).is_ok());
        }
        let too_dear = vec![choices(&[(top, 1.0)]); 2];
        let error = allocate(&too_dear, top).unwrap_err();
        assert_eq!(
            error,
            BudgetError::TooSmall { budget: top, cheapest: 2 * u128::from(top), short: u128::from(top) }
        );
    }
}
