use firebrick_analysis::{
    AnalysisError, Plans, Profile, RankBudget, Report, allocate_bits, allocate_ranks, bit_plans, rank_plans,
};
use firebrick_core::{Part, Seed, Site, SiteTable};

use crate::{decoder, measured};

const BITS: [u8; 4] = [2, 3, 4, 8];
const RANKS: [usize; 6] = [0, 2, 4, 8, 16, 32];

fn setup() -> (Profile, SiteTable) {
    let decoder = decoder();
    (measured(&decoder), decoder.sites().clone())
}

fn weights(table: &SiteTable) -> u64 {
    table.block_linears().iter().map(|s| table.linear(s).map_or(0, |(i, o)| (i * o) as u64)).sum()
}

/// Within the budget, and no baseline loses less.
fn check(plans: &Plans) {
    for (name, a) in plans.all() {
        assert!(a.cost <= plans.budget, "{name} costs {} of {}", a.cost, plans.budget);
        assert!(plans.planned.loss <= a.loss, "{name} loses less");
    }
    assert_eq!(plans.all().len(), 4 + plans.random.len());
}

#[test]
fn bits_beat_every_baseline_within_the_budget() {
    let (profile, table) = setup();
    let seeds = [Seed(1), Seed(2), Seed(3)];
    for mean in [2.5, 3.0, 3.3, 4.0, 6.1] {
        let plans = bit_plans(&profile, &table, mean, &BITS, &seeds).unwrap();
        check(&plans);
        for (name, a) in plans.all().into_iter().skip(1) {
            assert!(
                plans.planned.loss < 0.999 * a.loss,
                "{mean} bits, {name}: {} {}",
                plans.planned.loss,
                a.loss
            );
        }
        assert_eq!(plans.budget, (mean * weights(&table) as f64).round() as u64);
        assert!(plans.planned.cost as f64 > 0.97 * plans.budget as f64, "the budget is spent");
        let plan = allocate_bits(&profile, &table, mean, &BITS).unwrap();
        assert_eq!(plan, plans.planned.plan);
        let resolved = plan.resolve(&table).unwrap();
        for (site, bits) in &plans.planned.levels {
            assert_eq!(resolved.get(*site).unwrap().bits, Some(*bits as u32));
        }
    }
    // At a whole number of bits the uniform plan is uniform.
    let plans = bit_plans(&profile, &table, 4.0, &BITS, &[]).unwrap();
    assert!(plans.uniform.levels.values().all(|b| *b == 4));
    assert!(plans.planned.levels.values().any(|b| *b != 4), "control: the planned one is not");
    assert_eq!(plans.first.levels[&Site::layer(0, Part::AttnQ)], 8);
    assert_eq!(plans.last.levels[&Site::layer(0, Part::AttnQ)], 2);
}

#[test]
fn ranks_beat_every_baseline_within_the_budget() {
    let (profile, table) = setup();
    for budget in [RankBudget::MeanRank(6.5), RankBudget::Parameters(9000)] {
        let plans = rank_plans(&profile, &table, budget, &RANKS, &[Seed(1), Seed(2)]).unwrap();
        check(&plans);
        let plan = allocate_ranks(&profile, &table, budget, &RANKS).unwrap();
        assert_eq!(plan, plans.planned.plan);
        let resolved = plan.resolve(&table).unwrap();
        let cost: usize = resolved
            .sites
            .iter()
            .map(|(s, set)| {
                let (d_in, d_out) = table.linear(*s).unwrap();
                set.rank.unwrap() * (d_in + d_out)
            })
            .sum();
        assert_eq!(cost as u64, plans.planned.cost, "sites of rank 0 have no rule");
    }
    let none = rank_plans(&profile, &table, RankBudget::Parameters(0), &RANKS, &[]).unwrap();
    assert!(none.planned.plan.rules.is_empty() && none.planned.levels.values().all(|r| *r == 0));
    let all: f64 = profile.linear.iter().map(|l| l.ranks[0].rise).sum();
    assert!((none.planned.loss / all - 1.0).abs() < 1e-9 && all > 0.0, "rank 0 loses everything");
}

#[test]
fn what_cannot_be_allocated_is_said() {
    let (profile, table) = setup();
    assert!(matches!(allocate_bits(&profile, &table, 1.5, &BITS), Err(AnalysisError::Budget(_))));
    let unknown = allocate_bits(&profile, &table, 4.0, &[4, 5, 6]);
    let Err(AnalysisError::Options { problems }) = unknown else { panic!("accepted") };
    assert_eq!(problems.len(), 2);
    let nonsense = allocate_ranks(&profile, &table, RankBudget::MeanRank(f64::NAN), &[]);
    let Err(AnalysisError::Options { problems }) = nonsense else { panic!("accepted") };
    assert_eq!(problems.len(), 2, "{problems:?}");

    let mut other = profile.clone();
    other.linear[3].d_in += 1;
    other.linear.remove(0);
    let Err(AnalysisError::Mismatch { problems }) = allocate_bits(&other, &table, 4.0, &BITS) else {
        panic!("accepted")
    };
    assert_eq!(problems.len(), 2, "{problems:?}");
}

#[test]
fn plans_show_all_five() {
    let (profile, table) = setup();
    let plans = bit_plans(&profile, &table, 3.5, &BITS, &[Seed(1)]).unwrap();
    let html = Report::new("plan").section(plans.section("Bits")).to_html();
    for name in ["planned", "uniform", "first layers", "last layers", "random 1"] {
        assert!(html.contains(&format!("<td>{name}</td>")), "{name}");
    }
    let json = serde_json::to_value(&plans).unwrap();
    assert_eq!(
        json["planned"]["levels"]["layers.0.attn.q"],
        plans.planned.levels[&Site::layer(0, Part::AttnQ)]
    );
}
