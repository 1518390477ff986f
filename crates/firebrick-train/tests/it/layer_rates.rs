//! Learning rates by layer reach the parameters of their sites.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use firebrick_core::{LayerPlan, Silent, Site};
use firebrick_models::Decoder;
use firebrick_train::{Group, TrainConfig, fit, layer_decay, site_groups};

use crate::tiny::{bits, decoder, loss, noise, settings, trainable};

/// The paths of all parameters.
fn paths(decoder: &Decoder) -> Vec<String> {
    #[derive(Default)]
    struct Paths(Vec<String>, Vec<String>);
    impl ModuleVisitor for Paths {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.1.push(self.0.join("."));
        }
    }
    let mut paths = Paths::default();
    decoder.visit(&mut paths);
    paths.1
}

fn groups(decoder: &Decoder, plan: &LayerPlan, learning_rate: f64) -> Vec<Group> {
    let of = |site: Site| decoder.parameter(site).into_iter().collect();
    site_groups(&plan.resolve(decoder.sites()).unwrap(), learning_rate, &of)
}

#[test]
fn rates_fall_from_the_head_to_the_embedding() {
    let decoder = decoder(&Device::flex());
    let groups = groups(&decoder, &layer_decay(decoder.sites(), 0.02, 0.5), 0.02);
    let id = burn::module::ParamId::new();
    for path in paths(&decoder) {
        let of: Vec<f64> =
            groups.iter().filter(|g| g.params.matches(&id, Some(&path))).map(|g| g.learning_rate).collect();
        let want = match path.split('.').collect::<Vec<_>>()[..] {
            ["embed"] => 0.125,
            ["layers", "0", ..] => 0.25,
            ["layers", "1", ..] => 0.5,
            ["norm"] | ["head", "weight"] => 1.0,
            _ => panic!("{path}"),
        };
        assert_eq!(of, [want], "{path}");
    }
}

#[test]
fn a_plan_freezes_and_speeds_up_its_sites() {
    let start = trainable();
    let plan = "version = 1\n[[rules]]\nselect = \"layers.0\"\nfrozen = true\n[[rules]]\nselect = \"layers.1.mlp\"\nlearning_rate = 0.05";
    let groups = groups(&start, &LayerPlan::from_toml(plan).unwrap(), 0.01);
    assert_eq!(groups.iter().map(|g| g.learning_rate).collect::<Vec<_>>(), [0.0, 5.0]);
    let run = |groups: Vec<Group>| {
        let config = TrainConfig { groups, warmup: 0, weight_decay: 0.0, ..settings(1) };
        let (after, _) = fit(start.clone(), &config, &noise(500), &mut loss, &Silent, false).unwrap();
        bits(&after)
    };
    let (with, without, before) = (run(groups), run(Vec::new()), bits(&start));
    let step = |after: &[u32], before: &[u32]| -> f64 {
        let value = |bits: u32| f64::from(f32::from_bits(bits));
        after.iter().zip(before).map(|(a, b)| (value(*a) - value(*b)).abs()).fold(0.0, f64::max)
    };
    for (i, path) in paths(&start).iter().enumerate() {
        let (a, b) = (step(&with[i], &before[i]), step(&without[i], &before[i]));
        assert!(b > 0.0, "{path}");
        if path.starts_with("layers.0.") {
            assert_eq!(a, 0.0, "{path}");
        } else if ["gate", "up", "down"].iter().any(|name| path.contains(name)) {
            assert!((a / b - 5.0).abs() < 1e-2, "{path}: {a} {b}");
        } else {
            assert_eq!(with[i], without[i], "{path}");
        }
    }
}
