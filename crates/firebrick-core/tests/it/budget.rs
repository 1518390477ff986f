use firebrick_core::{
    Baseline, BudgetError, Choice, Seed, allocate, allocate_baseline, allocate_exact, allocate_greedy,
};
use proptest::prelude::*;

fn total(options: &[Vec<Choice>], allocation: &[usize]) -> (u64, f64) {
    assert_eq!(options.len(), allocation.len());
    let chosen = options.iter().zip(allocation).map(|(choices, i)| choices[*i]);
    chosen.fold((0, 0.0), |(cost, loss), c| (cost + c.cost, loss + c.loss))
}

/// Tries every combination.
fn brute_force(options: &[Vec<Choice>], budget: u64) -> Option<f64> {
    let mut sums = vec![(0u64, 0.0f64)];
    for choices in options {
        sums = sums.iter().flat_map(|(c, l)| choices.iter().map(move |x| (c + x.cost, l + x.loss))).collect();
    }
    sums.iter().filter(|(cost, _)| *cost <= budget).map(|(_, loss)| *loss).min_by(f64::total_cmp)
}

fn options() -> impl Strategy<Value = (Vec<Vec<Choice>>, u64)> {
    let choice =
        (0u64..13, -20i32..100).prop_map(|(cost, loss)| Choice { cost, loss: f64::from(loss) / 8.0 });
    let sites = proptest::collection::vec(proptest::collection::vec(choice, 1..5), 1..6);
    (sites, 1u64..8, 0u64..60).prop_map(|(mut sites, unit, budget)| {
        sites.iter_mut().flatten().for_each(|c| c.cost *= unit);
        (sites, budget * unit)
    })
}

fn baselines() -> [Baseline; 5] {
    [Baseline::Uniform, Baseline::First, Baseline::Last, Baseline::Random(Seed(3)), Baseline::Random(Seed(4))]
}

/// The largest drop of loss in one step along the lower hull of a site's table, by trying every pair of choices.
fn largest_hull_step(options: &[Vec<Choice>]) -> f64 {
    let mut largest = 0.0f64;
    for choices in options {
        let on_hull = |p: &Choice| {
            let beaten = choices.iter().any(|q| q.cost <= p.cost && q.loss <= p.loss && q != p);
            let below = choices.iter().any(|a| {
                choices.iter().any(|b| {
                    let inside = a.cost < p.cost && p.cost < b.cost;
                    let share = (p.cost.saturating_sub(a.cost)) as f64
                        / (b.cost.saturating_sub(a.cost)).max(1) as f64;
                    inside && a.loss + share * (b.loss - a.loss) < p.loss - 1e-12
                })
            });
            !beaten && !below
        };
        let mut hull: Vec<&Choice> = choices.iter().filter(|p| on_hull(p)).collect();
        hull.sort_by_key(|p| p.cost);
        // The steps between vertices; a point on an edge only makes a step shorter, so edges are merged.
        for (i, a) in hull.iter().enumerate() {
            for b in &hull[i..] {
                let slope = (a.loss - b.loss) / (b.cost - a.cost).max(1) as f64;
                let straight = hull
                    .iter()
                    .filter(|p| a.cost < p.cost && p.cost < b.cost)
                    .all(|p| (a.loss - p.loss - slope * (p.cost - a.cost) as f64).abs() < 1e-9);
                if straight {
                    largest = largest.max(a.loss - b.loss);
                }
            }
        }
    }
    largest
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn exact_is_the_best_of_all((options, budget) in options()) {
        match (brute_force(&options, budget), allocate_exact(&options, budget)) {
            (Some(best), Ok(allocation)) => {
                let (cost, loss) = total(&options, &allocation);
                prop_assert!(cost <= budget);
                prop_assert!((loss - best).abs() < 1e-9, "{} instead of {}", loss, best);
            }
            (None, Err(BudgetError::TooSmall { cheapest, short, .. })) => {
                prop_assert_eq!(short, cheapest - u128::from(budget));
                let fixed = u64::try_from(cheapest).unwrap();
                prop_assert!(allocate_exact(&options, fixed).is_ok(), "what is short is exactly what is missing");
                prop_assert!(fixed == 0 || allocate_exact(&options, fixed - 1).is_err());
            }
            (best, got) => prop_assert!(false, "{:?} against {:?}", best, got),
        }
        prop_assert_eq!(allocate(&options, budget), allocate_exact(&options, budget));
    }

    #[test]
    fn greedy_is_near_and_nothing_beats_exact((options, budget) in options()) {
        let Ok(exact) = allocate_exact(&options, budget) else {
            prop_assert!(allocate_greedy(&options, budget).is_err());
            prop_assert!(baselines().iter().all(|b| allocate_baseline(&options, budget, *b).is_err()));
            return Ok(());
        };
        let best = total(&options, &exact).1;
        let (cost, loss) = total(&options, &allocate_greedy(&options, budget).unwrap());
        prop_assert!(cost <= budget);
        prop_assert!(best <= loss + 1e-9);
        prop_assert!(loss <= best + largest_hull_step(&options) + 1e-9, "{} against {}", loss, best);
        for baseline in baselines() {
            let (cost, loss) = total(&options, &allocate_baseline(&options, budget, baseline).unwrap());
            prop_assert!(cost <= budget, "{} spends too much", baseline);
            prop_assert!(best <= loss + 1e-9, "{} beats the optimum", baseline);
        }
    }

    #[test]
    fn a_larger_budget_never_hurts((options, budget) in options(), more in 0u64..20) {
        if let Ok(less) = allocate_exact(&options, budget) {
            let richer = allocate_exact(&options, budget + more).unwrap();
            prop_assert!(total(&options, &richer).1 <= total(&options, &less).1 + 1e-9);
        }
    }
}

/// Layers that suffer differently from few bits, the suffering ones in the middle.
fn layers(count: usize) -> Vec<Vec<Choice>> {
    let weight = |l: usize| if l % 5 == 2 { 50.0 } else { 1.0 + (l % 3) as f64 };
    let bits = [2u64, 3, 4, 8];
    (0..count)
        .map(|l| {
            bits.iter().map(|b| Choice { cost: b * 1000, loss: weight(l) / 4f64.powi(*b as i32) }).collect()
        })
        .collect()
}

#[test]
fn allocation_beats_every_baseline_where_layers_differ() {
    let options = layers(30);
    let budget = 30 * 4000;
    let loss = |allocation: Vec<usize>| total(&options, &allocation).1;
    let best = loss(allocate(&options, budget).unwrap());
    assert!(loss(allocate_greedy(&options, budget).unwrap()) < 1.05 * best);
    for baseline in baselines() {
        let other = loss(allocate_baseline(&options, budget, baseline).unwrap());
        assert!(best < 0.9 * other, "{baseline}: {best} against {other}");
    }
    assert_eq!(allocate_baseline(&options, budget, Baseline::Uniform).unwrap(), vec![2; 30]);
}

/// Negative control: an allocation for a table whose layers are in the wrong order loses to the right one, and even to uniform.
#[test]
fn a_table_sorted_wrongly_loses() {
    let options = layers(30);
    let mut shifted = options.clone();
    shifted.rotate_left(1);
    let budget = 30 * 4000;
    let loss = |allocation: Vec<usize>| total(&options, &allocation).1;
    let right = loss(allocate(&options, budget).unwrap());
    let wrong = loss(allocate(&shifted, budget).unwrap());
    let uniform = loss(allocate_baseline(&options, budget, Baseline::Uniform).unwrap());
    assert!(wrong > 1.5 * right, "{wrong} against {right}");
    assert!(wrong > uniform, "{wrong} against uniform {uniform}");
}

#[test]
fn a_large_problem_goes_to_greedy_and_stays_near_its_bound() {
    // Prices without a common divisor: the exact table would have 10^9 cells.
    let site = |s: u64| {
        (0..8u64).map(move |k| Choice {
            cost: 1_000_003 * k + s * k,
            loss: (1.0 + s as f64) * 0.5f64.powi(k as i32),
        })
    };
    let options: Vec<Vec<Choice>> = (0..1000u64).map(|s| site(s).collect()).collect();
    let budget = 1_000_003 * 3000;
    assert!(matches!(allocate_exact(&options, budget), Err(BudgetError::TooLarge { .. })));
    let got = total(&options, &allocate(&options, budget).unwrap());
    assert!(got.0 <= budget && got.0 > budget - 8_000_000);
    let uniform = total(&options, &allocate_baseline(&options, budget, Baseline::Uniform).unwrap());
    assert!(got.1 < uniform.1);
}
