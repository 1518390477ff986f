//! Output drift of merges: what is measured before they are written.

use burn::tensor::Device;
use firebrick_core::Silent;
use firebrick_merge::MergeMethod;
use firebrick_models::Model;
use firebrick_train::{TextData, eval};

use crate::weight_search::{Suite, TASKS};

const WINDOW: usize = 24;

fn ids(suite: &Suite) -> Vec<u32> {
    let text = std::fs::read_to_string(suite.path("first.txt")).unwrap();
    TextData::from_text(&text[..2000], &suite.tokenizer).unwrap().ids
}

#[test]
fn weights_of_0_do_not_drift_and_larger_ones_drift_further() {
    for seed in 0..3 {
        let suite = Suite::new(seed);
        let ids = ids(&suite);
        let mut last = 0.0;
        for weight in [0.0, 0.25, 0.5, 0.75, 1.0] {
            let yaml = TASKS.replace("0.6", &weight.to_string()).replace("0.4", "0");
            let drift = suite.open(&yaml).drift(&ids, WINDOW, 8, &Device::flex(), &Silent).unwrap();
            assert_eq!(drift.reference, suite.path("base").display().to_string());
            assert_eq!(drift.models.len(), 2);
            let found = drift.merged.mean_kl;
            println!("seed {seed}, weight {weight}: {found:.5}");
            match weight {
                0.0 => assert_eq!((found, drift.merged.top1_agreement), (0.0, 1.0)),
                _ => assert!(found > last, "seed {seed}, weight {weight}: {found} {last}"),
            }
            last = found;
            // With all the weight on it, the merge is the first model up to rounding.
            let alone = drift.models[0].1.mean_kl;
            assert_eq!((found - alone).abs() < 1e-5, weight == 1.0, "{found} {alone}");
        }
    }
}

/// For every method, in bf16 and of a model with an adapter: what is measured is what would be written, to the bit.
#[test]
fn the_drift_of_a_merge_is_that_of_the_model_it_writes() {
    let suite = Suite::new(0);
    let ids = ids(&suite);
    for method in MergeMethod::all() {
        let has = |name: &str| method.parameters().iter().any(|p| p.name == name);
        let parameters: String = [("t", "0.4"), ("density", "0.5"), ("weight", "0.5"), ("lambda", "0.9")]
            .iter()
            .filter(|(name, _)| has(name))
            .map(|(name, value)| format!("  {name}: {value}\n"))
            .collect();
        let models = match method {
            MergeMethod::Passthrough => "- model: '@base+@second'\n",
            MergeMethod::Slerp | MergeMethod::Nearswap | MergeMethod::ArceeFusion => {
                "- model: '@base'\n- model: '@base+@second'\n"
            }
            _ => "- model: '@first'\n- model: '@base+@second'\n",
        };
        let base = if method.needs_base() { "base_model: '@base'\n" } else { "" };
        let name = method.name();
        let yaml = format!(
            "merge_method: {name}\n{base}models:\n{models}parameters:\n{parameters}  int8_mask: true\ndtype: bfloat16\n"
        );
        let merge = suite.open(&yaml);
        let drift = merge.drift(&ids, WINDOW, 8, &Device::flex(), &Silent).unwrap();
        suite.write(&merge, name);
        let open = |name: &str| Model::open(&suite.path(name), &Device::flex()).unwrap().decoder;
        let written = open(name);
        // The reference of the methods without a base is the first model, here one that was not written.
        if method.needs_base() {
            let again = eval::compare(&written, &[], (&open("base"), &[]), &ids, WINDOW, 8, &Silent).unwrap();
            assert_eq!(drift.merged, again, "{name}");
            assert!(drift.merged.mean_kl > 0.0, "control: {name}");
        }
        let nats = |perplexity: f64| perplexity.ln();
        let own = firebrick_train::perplexity(&written, &[], &ids, 0, WINDOW, 8, &Silent).unwrap();
        assert!((nats(own.perplexity) - nats(drift.merged.perplexity)).abs() < 1e-5, "{name}");
    }
}

#[test]
fn merges_of_other_things_than_whole_models_have_no_drift() {
    let suite = Suite::new(0);
    let slices = "merge_method: passthrough\nslices:\n- sources: [{model: '@base', layer_range: [0, 2]}]\n- sources: [{model: '@first', layer_range: [1, 4]}]\n";
    let error = suite.open(slices).drift(&ids(&suite), WINDOW, 8, &Device::flex(), &Silent).unwrap_err();
    assert!(error.to_string().contains("slices"), "{error}");
}
