//! The settings of quantize, prune and eval, by what they do to the model.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Site, Skip};
use firebrick_models::{Model, ModelFiles};
use firebrick_tensor::checkpoint::Checkpoint;
use serde_json::Value;

use crate::{family, json, run, text};

fn nll(dir: &Path, model: &str, extra: &[&str]) -> f64 {
    let args = ["eval", "--model", model, "--data", "known.txt", "--window", "64"];
    json(dir, &[&args, extra].concat())["mean_nll"].as_f64().unwrap()
}

/// Text of the kind the embedded model knows: on one that it finds absurd, worse weights may do better.
fn known(dir: &Path, bytes: usize) {
    let known = firebrick_train::domain("scripture").unwrap().held_out_text();
    std::fs::write(dir.join("known.txt"), &known[..bytes]).unwrap();
}

#[test]
fn quantize_does_as_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    known(dir.path(), 8 * 1024);
    let quantize = |out: &str, extra: &[&str]| {
        let args =
            ["quantize", "--model", "embedded", "--data", "known.txt", "--window", "64", "--windows", "4"];
        json(dir.path(), &[&args[..], &["--out", out], extra].concat())
    };
    let number = |found: &Value, key: &str| found[key].as_f64().unwrap();
    let rtn = quantize("rtn.gguf", &["--method", "rtn", "--bits", "3"]);
    assert_eq!(number(&rtn, "code_bits_per_weight"), 3.0);
    assert_eq!(number(&rtn, "stored_bits_per_weight"), 4.5, "q4_0");
    assert_eq!(rtn["stored_as_f16"].as_array().unwrap().len(), 0);
    let gptq = quantize("gptq.gguf", &["--bits", "3"]);
    let base = nll(dir.path(), "embedded", &[]);
    let (worse, better) = (nll(dir.path(), "rtn.gguf", &[]), nll(dir.path(), "gptq.gguf", &[]));
    assert!(base < better && better < worse, "{base} < {better} < {worse}");

    let asymmetric = quantize("asym.gguf", &["--method", "rtn", "--bits", "4", "--asymmetric"]);
    assert_eq!(number(&asymmetric, "stored_bits_per_weight"), 5.0, "q4_1");
    // A folder holds the same values, but for those that GGUF rounds to f16.
    let folder = quantize("folder", &["--bits", "3"]);
    assert_eq!(number(&folder, "stored_bits_per_weight"), 32.0);
    assert_eq!(folder["sites"], gptq["sites"]);
    assert!((nll(dir.path(), "folder", &[]) - better).abs() < 2e-3);

    // Groups that fill no block.
    let wide = quantize("wide.gguf", &["--method", "rtn", "--bits", "4", "--group", "48"]);
    assert_eq!(wide["stored_as_f16"].as_array().unwrap().len(), wide["sites"].as_array().unwrap().len());
    assert_eq!(number(&wide, "stored_bits_per_weight"), 16.0);

    let plan = "version = 1\n[[rules]]\nselect = \"layers.*.mlp.*\"\nbits = 8\n";
    std::fs::write(dir.path().join("plan.toml"), plan).unwrap();
    let planned = quantize("planned.gguf", &["--method", "rtn", "--bits", "3", "--plan", "plan.toml"]);
    for site in planned["sites"].as_array().unwrap() {
        let mlp = site["site"].as_str().unwrap().contains("mlp");
        assert_eq!(site["bits"], if mlp { 8 } else { 3 }, "{site}");
    }

    let error = |found: &Value| -> f64 {
        found["sites"].as_array().unwrap().iter().map(|s| s["weight_error"].as_f64().unwrap()).sum()
    };
    let clipped = quantize("clip.gguf", &["--method", "rtn", "--bits", "3", "--clip", "on"]);
    assert!(error(&clipped) < error(&rtn), "a clipped range rounds with less error");
    assert_eq!(
        quantize("off.gguf", &["--method", "rtn", "--bits", "3", "--clip", "off"])["sites"],
        rtn["sites"]
    );
    assert_eq!(
        quantize("on.gguf", &["--bits", "3", "--clip", "on"])["sites"],
        gptq["sites"],
        "gptq's default"
    );
}

#[test]
fn a_pruned_sublayer_is_a_skipped_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 4);
    let device = Device::flex();
    let base = Model::embedded(&device).unwrap();
    let tokens =
        Tensor::<2, Int>::from_data(TensorData::new((1..33).collect::<Vec<i32>>(), [1, 32]), &device);
    let logits = |model: &Model, bricks: &[&dyn Brick]| {
        model.decoder.forward(tokens.clone(), &mut Run::new(bricks)).into_data()
    };
    for (kind, part) in [("attn", Part::AttnSublayer), ("mlp", Part::MlpSublayer)] {
        let prune = |out: &str| {
            let args =
                ["prune", "--model", "embedded", "--data", "t.txt", "--window", "32", "--windows", "2"];
            json(dir.path(), &[&args[..], &["--drop", kind, "--count", "2", "--out", out]].concat())
        };
        let names = [kind.to_string(), format!("{kind}.gguf"), format!("{kind}.toml")];
        let dropped = names.each_ref().map(|out| prune(out)["dropped"].clone());
        let sites: Vec<Site> =
            dropped[0].as_array().unwrap().iter().map(|s| s.as_str().unwrap().parse().unwrap()).collect();
        assert!(
            sites.len() == 2
                && sites.iter().all(|s| s.part == part)
                && dropped.iter().all(|d| *d == dropped[0])
        );
        let skip = Skip { sites: sites.into_iter().collect() };
        let skipped = logits(&base, &[&skip]);
        for name in &names[..2] {
            let pruned = Model::open(&dir.path().join(name), &device).unwrap();
            assert_eq!(logits(&pruned, &[]), skipped, "{name}");
        }
        assert_ne!(logits(&base, &[]), skipped, "control: the sublayers do something");
        let plan = std::fs::read_to_string(dir.path().join(&names[2])).unwrap();
        assert!(plan.contains("drop = true"), "{plan}");
    }
}

#[test]
fn every_family_goes_through_the_methods() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 3);
    let at = |verb: &str, model: &str, extra: &[&str]| {
        let arguments = [verb, "--model", model, "--data", "t.txt", "--window", "32"];
        json(dir.path(), &[&arguments[..], extra].concat())
    };
    let eval = |model: &str, extra: &[&str]| at("eval", model, extra)["mean_nll"].as_f64().unwrap();
    for name in ["llama", "qwen2", "qwen3", "gemma3"] {
        family(dir.path(), name, |_| ());
        let base = eval(name, &[]);

        let profile = format!("{name}-profile");
        at("profile", name, &["--windows", "4", "--out", &profile]);
        let bits = std::fs::read_to_string(dir.path().join(&profile).join("bits.toml")).unwrap();
        assert!(bits.contains("bits"), "{bits}");

        let adapter = format!("{name}-adapter");
        at("train", name, &["--steps", "3", "--out", &adapter]);
        assert_ne!(eval(name, &["--adapter", &adapter]), base, "control: training changed something");

        let quantized = |bits: &str| {
            let out = format!("{name}-{bits}.gguf");
            at("quantize", name, &["--windows", "4", "--bits", bits, "--out", &out]);
            (eval(&out, &[]) - base).abs()
        };
        let (eight, two) = (quantized("8"), quantized("2"));
        assert!(eight < two && eight < 0.02 * base, "{name}: {eight} at 8 bits, {two} at 2");
    }
}

#[test]
fn a_pruned_sublayer_leaves_no_bias_behind() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 3);
    family(dir.path(), "llama", |_| ());
    let device = Device::flex();
    let base = Model::open(&dir.path().join("llama"), &device).unwrap();
    for kind in ["attn", "mlp"] {
        let prune = ["prune", "--model", "llama", "--data", "t.txt", "--window", "32", "--windows", "2"];
        let found = json(
            dir.path(),
            &[&prune[..], &["--drop", kind, "--count", "1", "--ends", "--out", kind]].concat(),
        );
        let site: Site = found["dropped"][0].as_str().unwrap().parse().unwrap();
        let skip = Skip { sites: [site].into_iter().collect() };
        let tokens = Tensor::<2, Int>::from_ints([[5, 80, 17, 200, 3, 42]], &device);
        let skipped = base.decoder.forward(tokens.clone(), &mut Run::new(&[&skip as &dyn Brick])).into_data();
        let pruned = Model::open(&dir.path().join(kind), &device).unwrap();
        assert_eq!(
            pruned.decoder.forward(tokens.clone(), &mut Run::default()).into_data(),
            skipped,
            "{kind}"
        );
        assert_ne!(base.decoder.forward(tokens, &mut Run::default()).into_data(), skipped, "control");
    }
}

#[test]
fn adapters_add_up_and_logits_are_saved() {
    let dir = tempfile::tempdir().unwrap();
    known(dir.path(), 4 * 1024);
    for (name, word) in [("x", "stone"), ("y", "river")] {
        let file = format!("{word}.txt");
        text(dir.path(), &file, word, 8);
        let train = ["train", "--model", "embedded", "--data", &file, "--out", name, "--steps", "3"];
        let small = ["--window", "32", "--batch", "1", "--learning-rate", "0.02"];
        json(dir.path(), &[&train[..], &small].concat());
    }
    let x = nll(dir.path(), "embedded", &["--adapter", "x"]);
    let y = nll(dir.path(), "embedded", &["--adapter", "y"]);
    let both =
        nll(dir.path(), "embedded", &["--adapter", "x", "--adapter", "y", "--logits", "both.safetensors"]);
    let turned = nll(dir.path(), "embedded", &["--adapter", "y", "--adapter", "x"]);
    assert!((both - turned).abs() < 1e-4, "sums do not depend on their order: {both} and {turned}");
    assert!((both - x).abs() > 1e-3 && (both - y).abs() > 1e-3, "control: both do something: {x} {y} {both}");

    let vocabulary = ModelFiles::embedded().unwrap().config.vocab;
    let logits = Checkpoint::open(dir.path().join("both.safetensors")).unwrap();
    let shape = &logits.get("logits").unwrap().shape;
    assert!(shape[0] > 1 && shape[1] == vocabulary, "{shape:?}");
    nll(dir.path(), "embedded", &["--logits", "base.safetensors"]);
    let base = Checkpoint::open(dir.path().join("base.safetensors")).unwrap();
    assert_ne!(base.read_f32("logits").unwrap(), logits.read_f32("logits").unwrap(), "control");
}

#[test]
fn quiet_says_nothing_and_devices_says_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "stone", 4);
    let quantize = ["quantize", "--model", "embedded", "--data", "t.txt", "--method", "rtn", "--group", "48"];
    let loud = run(dir.path(), &[&quantize[..], &["--out", "a.gguf"]].concat());
    assert!(String::from_utf8_lossy(&loud.stderr).contains("f16"), "control: there is something to say");
    let quiet = run(dir.path(), &[&quantize[..], &["--out", "b.gguf", "--quiet"]].concat());
    assert!(quiet.status.success() && quiet.stderr.is_empty());
    assert!(
        !run(dir.path(), &["eval", "--model", "none", "--data", "t.txt", "-q"]).stderr.is_empty(),
        "errors stay"
    );

    let devices = json(dir.path(), &["devices"]);
    let last = devices.as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["device"], &last["kind"], &last["software"]),
        (&"flex".into(), &"cpu".into(), &false.into())
    );

    let inspect = run(dir.path(), &["inspect", "embedded"]);
    let inspect = String::from_utf8_lossy(&inspect.stdout).into_owned();
    let config = ModelFiles::embedded().unwrap().config;
    let down = format!("{} sites   {} -> {}", config.layers, config.d_ff, config.d_model);
    assert!(inspect.lines().any(|l| l.contains("mlp.down") && l.contains(&down)), "{inspect}");
}
