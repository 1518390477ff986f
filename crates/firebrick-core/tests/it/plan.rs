use std::collections::BTreeMap;

use firebrick_core::{
    LayerPlan, Part, PlanError, Rule, Seed, Selector, Settings, Site, SiteEntry, SiteKind, SiteSet, SiteTable,
};
use proptest::prelude::*;
use proptest::sample::Index;
use rand::Rng;

use crate::table;

const PLAN: &str = r#"
version = 1
model = "tiny"

[[rules]]
select = "layers.*.attn.{q,k,v,o}"
rank = 8
alpha = 16.0

[[rules]]
select = "layers.-2--1.attn.q"
rank = 32

[[rules]]
select = "re:down_proj"
bits = 4
group = 32
extra = { order = "activation" }

[[rules]]
select = "layers.2-3.attn.q"
rank = 64
frozen = true
"#;

fn problems(error: PlanError) -> Vec<String> {
    match error {
        PlanError::Invalid { problems } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn later_rules_override_field_by_field() {
    let plan = LayerPlan::from_toml(PLAN).unwrap();
    let resolved = plan.resolve(&table()).unwrap();
    let q = |layer| resolved.get(Site::layer(layer, Part::AttnQ)).unwrap().clone();
    assert_eq!(q(0), Settings { rank: Some(8), alpha: Some(16.0), ..Settings::default() });
    let last = Settings { rank: Some(64), alpha: Some(16.0), frozen: Some(true), ..Settings::default() };
    assert_eq!(q(3), last);
    let down = resolved.get(Site::expert(3, Part::MlpDown, 1)).unwrap();
    assert_eq!(
        (down.bits, down.group, down.extra["order"].as_str()),
        (Some(4), Some(32), Some("activation"))
    );
    assert_eq!(resolved.get(Site::global(Part::Head)), None);

    let coverage = &resolved.coverage;
    let counts: Vec<(usize, usize)> =
        coverage.rules.iter().map(|r| (r.matched.len(), r.shadowed.len())).collect();
    assert_eq!(counts, [(16, 0), (2, 2), (6, 0), (2, 0)], "alpha of the first rule still holds everywhere");
    assert!(coverage.unmatched.contains(Site::global(Part::Embed)));
    assert_eq!(coverage.unmatched.len() + resolved.sites.len(), table().entries().len());
    let shown = coverage.to_string();
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 6, "{shown}");
    assert!(lines[2].contains("layers.-2--1.attn.q") && lines[2].ends_with("2         2"), "{shown}");
    assert!(
        lines[5].contains("no rule") && lines[5].contains("embed, norm, head, layers.0.block"),
        "{shown}"
    );
    let ends: Vec<usize> = lines[..5].iter().map(|l| l.chars().count()).collect();
    assert!(ends.iter().all(|e| *e == ends[0]), "columns are aligned\n{shown}");
}

/// Negative control: in the other order the same rules mean something else.
#[test]
fn the_order_of_rules_matters() {
    let plan = LayerPlan::from_toml(PLAN).unwrap();
    let mut reversed = plan.clone();
    reversed.rules.reverse();
    assert_ne!(plan.resolve(&table()).unwrap().sites, reversed.resolve(&table()).unwrap().sites);
}

#[test]
fn toml_and_json_round_trip_and_files_do() {
    let plan = LayerPlan::from_toml(PLAN).unwrap();
    assert_eq!(LayerPlan::from_toml(&plan.to_toml().unwrap()).unwrap(), plan);
    assert_eq!(LayerPlan::from_json(&plan.to_json().unwrap()).unwrap(), plan);
    assert_eq!(serde_json::from_str::<LayerPlan>(&plan.to_json().unwrap()).unwrap(), plan);
    let folder = tempfile::tempdir().unwrap();
    for name in ["plan.toml", "plan.json"] {
        let path = folder.path().join(name);
        plan.save(&path).unwrap();
        plan.save(&path).unwrap();
        assert_eq!(LayerPlan::load(&path).unwrap(), plan);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary files are left");
    assert!(matches!(plan.save(folder.path().join("plan.yaml")), Err(PlanError::Extension(_))));
    assert!(matches!(LayerPlan::load(folder.path().join("none.toml")), Err(PlanError::Io { .. })));
    std::fs::write(folder.path().join("bad.toml"), "version = 2").unwrap();
    let error = LayerPlan::load(folder.path().join("bad.toml")).unwrap_err().to_string();
    assert!(error.contains("bad.toml") && error.contains("line 1: version: version 2"), "{error}");
}

#[test]
fn a_file_lists_all_its_problems_with_lines() {
    let text = "version = 3\nmodle = \"x\"\n[[rules]]\nselect = \"attm.q\"\nrnk = 3\nbits = 0\n\
                [[rules]]\nrank = \"eight\"\n[[rules]]\nselect = \"attn\"\nweight = nan\ndrop = 1\ntop_k = 3\nexperts = 2\n";
    let found = problems(LayerPlan::from_toml(text).unwrap_err());
    for want in [
        "line 2: modle: unknown key; did you mean `model`?",
        "line 1: version: version 3; this release reads version 1",
        "line 5: rules[0].rnk: unknown key; did you mean `rank`?",
        "line 4: rules[0].select: unknown part `attm`; did you mean `attn`?",
        "line 6: rules[0].bits: bits 0",
        "line 7: rules[1].select: missing",
        "line 8: rules[1].rank: expected a whole number, found the text \"eight\"",
        "line 11: rules[2].weight: expected a finite number",
        "line 12: rules[2].drop: expected true or false, found 1",
        "line 13: rules[2].top_k: top_k 3 of 2 experts",
    ] {
        assert!(found.iter().any(|p| p.starts_with(want)), "{want}\n{found:#?}");
    }
    assert_eq!(found.len(), 10, "{found:#?}");
    let json = r#"{"version": 1, "rules": [{"select": "attn", "rank": -1}, 7]}"#;
    let found = problems(LayerPlan::from_json(json).unwrap_err());
    assert_eq!(
        found,
        [
            "rules[0].rank: expected a whole number, found -1",
            "rules[1]: a rule is a table with `select`, not 7"
        ]
    );
    assert!(matches!(LayerPlan::from_toml("version = "), Err(PlanError::Syntax(_))));
    assert!(matches!(LayerPlan::from_json("{"), Err(PlanError::Syntax(_))));
    assert_eq!(problems(LayerPlan::from_json("3").unwrap_err()).len(), 1);
    assert_eq!(problems(LayerPlan::from_toml("").unwrap_err()), ["version: missing; write `version = 1`"]);
}

#[test]
fn resolve_lists_all_problems() {
    let rule = |select: &str, settings: Settings| Rule { select: select.parse().unwrap(), settings };
    let plan = LayerPlan {
        version: 9,
        model: None,
        rules: vec![
            rule("layers.7.attn", Settings { rank: Some(0), ..Settings::default() }),
            rule("attn_post_norm", Settings::default()),
            rule("mlp", Settings { weight: Some(f64::NAN), bits: Some(33), ..Settings::default() }),
            rule("mlp", Settings { density: Some(0.0), dropout: Some(1.0), ..Settings::default() }),
        ],
    };
    let found = problems(plan.resolve(&table()).unwrap_err());
    for want in [
        "version 9",
        "rules[0]: rank 0",
        "rules[0].select: no layer 7",
        "rules[1].select: nothing in the model",
        "rules[2]: bits 33",
        "rules[2]: weight NaN",
        "rules[3]: dropout 1",
        "rules[3]: density 0",
    ] {
        assert!(found.iter().any(|p| p.starts_with(want)), "{want}\n{found:#?}");
    }
    assert_eq!(found.len(), 8, "{found:#?}");
    let together = LayerPlan {
        rules: vec![
            rule("mlp", Settings { experts: Some(2), ..Settings::default() }),
            rule("layers.3.mlp!", Settings { top_k: Some(4), ..Settings::default() }),
        ],
        ..LayerPlan::default()
    };
    let found = problems(together.resolve(&table()).unwrap_err());
    assert_eq!(found, ["layers.3.mlp: top_k 4 of 2 experts"]);
}

#[test]
fn an_allocation_is_written_compactly() {
    let rank = |r| Settings { rank: Some(r), ..Settings::default() };
    let ranks = [4, 8, 8, 4];
    let sites = (0..4).flat_map(|l| {
        let parts = [Part::AttnQ, Part::AttnV, Part::AttnO];
        parts.into_iter().map(move |part| (Site::layer(l, part), rank(ranks[l])))
    });
    let plan = LayerPlan::from_sites(sites);
    let selectors: Vec<String> = plan.rules.iter().map(|r| r.select.to_string()).collect();
    assert_eq!(selectors, ["layers.{0,3}.attn.{q,v,o}", "layers.1-2.attn.{q,v,o}"]);
    let experts = (0..2).map(|e| (Site::expert(3, Part::MlpUp, e), rank(2)));
    assert_eq!(LayerPlan::from_sites(experts).rules[0].select.to_string(), "layers.3.mlp.experts.0-1.up");
    let drop = Settings { drop: Some(true), ..Settings::default() };
    let plan = LayerPlan::from_sites([(Site::layer(1, Part::AttnSublayer), drop.clone())]);
    assert_eq!(plan.rules[0].select.to_string(), "layers.1.attn_sublayer!");
    assert_eq!(
        plan.resolve(&table()).unwrap().sites,
        BTreeMap::from([(Site::layer(1, Part::AttnSublayer), drop)])
    );
}

#[test]
fn a_plan_of_many_experts_can_be_read_back() {
    let kind = SiteKind::Linear { d_in: 8, d_out: 8 };
    let sites = (0..58).flat_map(|layer| {
        let parts = [Part::MlpGate, Part::MlpUp, Part::MlpDown];
        (0..256).flat_map(move |expert| parts.map(|part| Site::expert(layer, part, expert)))
    });
    let entries = sites.map(|site| SiteEntry { site, kind, tensor: None }).collect();
    let model = SiteTable::new(58, entries);
    let mut rng = Seed(5).stream("half");
    let half: SiteSet = model.all().iter().filter(|_| rng.random()).collect();
    let whole = Selector::exactly(&half).unwrap().to_string();
    assert!(whole.parse::<Selector>().is_err(), "control: one selector of {} bytes is not read", whole.len());
    let settings = Settings { bits: Some(3), ..Settings::default() };
    let plan = LayerPlan::from_sites(half.iter().map(|site| (site, settings.clone())));
    assert!(plan.rules.len() > 1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    plan.save(&path).unwrap();
    let read = LayerPlan::load(&path).unwrap();
    assert_eq!(read, plan);
    let resolved = read.resolve(&model).unwrap();
    assert_eq!(resolved.sites.keys().copied().collect::<SiteSet>(), half);
}

#[test]
fn a_plan_without_rules_selects_nothing() {
    let none = LayerPlan::default().resolve(&table()).unwrap();
    assert!(none.sites.is_empty() && none.coverage.rules.is_empty());
    assert_eq!(none.coverage.unmatched, table().all());
    let rule = Rule { select: "head".parse().unwrap(), settings: Settings::default() };
    let one = LayerPlan { rules: vec![rule], ..LayerPlan::default() }.resolve(&table()).unwrap();
    assert_eq!(one.sites.len(), 1, "control: one rule, one site");
    assert_eq!(one.coverage.unmatched.len(), table().entries().len() - 1);
}

#[test]
fn every_setting_round_trips() {
    // No `..`: a new field must be added here.
    let settings = Settings {
        rank: Some(8),
        alpha: Some(16.5),
        dropout: Some(0.1),
        bits: Some(4),
        group: Some(64),
        experts: Some(8),
        top_k: Some(2),
        weight: Some(-0.3),
        density: Some(0.2),
        learning_rate: Some(3e-4),
        frozen: Some(false),
        drop: Some(true),
        extra: BTreeMap::from([
            ("a.list".to_string(), serde_json::json!([1, "two", true])),
            ("b".to_string(), serde_json::json!({"c": 1.5})),
        ]),
    };
    assert_eq!(settings.names().len(), 14);
    let rule = Rule { select: "mlp".parse().unwrap(), settings: settings.clone() };
    let plan = LayerPlan { model: Some("tiny".into()), rules: vec![rule], ..LayerPlan::default() };
    let (toml, json) = (plan.to_toml().unwrap(), plan.to_json().unwrap());
    assert_eq!(LayerPlan::from_toml(&toml).unwrap(), plan);
    assert_eq!(LayerPlan::from_json(&json).unwrap(), plan);
    let other = LayerPlan::from_toml(&toml.replace("top_k = 2", "top_k = 3")).unwrap();
    assert_ne!(other, plan, "control: one field differs");
    let mut merged = Settings::default();
    merged.overlay(&settings);
    assert_eq!(merged, settings);
}

fn settings() -> impl Strategy<Value = Settings> {
    let rank = proptest::option::of(1usize..4);
    let weight =
        proptest::option::of(prop_oneof![Just(0.1), Just(-2.5e-17), Just(3.0), Just(f64::MIN_POSITIVE)]);
    let extra = proptest::option::of(any::<bool>());
    (rank, weight, proptest::option::of(any::<bool>()), extra).prop_map(|(rank, weight, drop, extra)| {
        Settings {
            rank,
            weight,
            drop,
            extra: extra.into_iter().map(|v| ("crate.key".to_string(), v.into())).collect(),
            ..Settings::default()
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn from_sites_resolves_to_the_same_sites(picks in proptest::collection::vec((any::<Index>(), settings()), 1..40)) {
        let all: Vec<Site> = table().all().iter().collect();
        let sites: BTreeMap<Site, Settings> =
            picks.into_iter().map(|(i, settings)| (all[i.index(all.len())], settings)).collect();
        let plan = LayerPlan::from_sites(sites.clone());
        let resolved = plan.resolve(&table()).unwrap();
        prop_assert_eq!(&resolved.sites, &sites);
        prop_assert!(resolved.coverage.rules.iter().all(|r| r.shadowed.is_empty()));
        prop_assert_eq!(&LayerPlan::from_toml(&plan.to_toml().unwrap()).unwrap(), &plan);
        prop_assert_eq!(&LayerPlan::from_json(&plan.to_json().unwrap()).unwrap(), &plan);
    }

    #[test]
    fn no_text_panics(text in any::<String>(), insert in "[a-z =\\[\\]{}\"0-9.]{0,12}", at in any::<Index>()) {
        let _ = LayerPlan::from_toml(&text);
        let _ = LayerPlan::from_json(&text);
        let mut damaged = PLAN.to_string();
        damaged.insert_str(at.index(PLAN.len()), &insert);
        let _ = LayerPlan::from_toml(&damaged);
    }
}
