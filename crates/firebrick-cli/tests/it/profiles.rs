//! `profile --adapter --router`: a model with adapters in force, and how much each layer uses each of them.

use std::path::Path;

use firebrick_models::ModelFiles;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Metadata, TensorSpec, write_safetensors};
use serde_json::{Value, json};

use crate::outputs::exits;
use crate::{json, text};

/// A router over `left` and `right` that decides by these scores whatever the token is.
fn router(dir: &Path, scores: [f32; 2]) {
    let width = ModelFiles::embedded().unwrap().config.d_model;
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [
        (TensorSpec::new("weight", DType::F32, [width, 2]), bytes(&vec![0.0; 2 * width])),
        (TensorSpec::new("bias", DType::F32, [2]), bytes(&scores)),
    ];
    std::fs::create_dir_all(dir).unwrap();
    write_safetensors(dir.join("router.safetensors"), &Metadata::default(), &tensors).unwrap();
    std::fs::write(dir.join("router.json"), json!({"adapters": ["left", "right"]}).to_string()).unwrap();
}

#[test]
fn a_profile_says_how_much_each_layer_uses_each_adapter() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "falcon", 24);
    for (name, seed) in [("left", "1"), ("right", "2")] {
        let train = ["train", "--model", "embedded", "--data", "t.txt", "--window", "64", "--steps", "2"];
        let more = ["--batch", "2", "--learning-rate", "0.01", "--seed", seed, "--out", name];
        json(dir.path(), &[&train[..], &more].concat());
    }
    router(&dir.path().join("even"), [0.0, 0.0]);
    router(&dir.path().join("one-hot"), [200.0, 0.0]);
    let line = ["profile", "--model", "embedded", "--data", "t.txt", "--window", "64", "--windows", "4"];
    // In another order than the router's.
    let both = ["--adapter", "right", "--adapter", "left"];
    let measured = |out: &str, more: &[&str]| -> Value {
        json(dir.path(), &[&line[..], more, &["--out", out]].concat());
        let text = std::fs::read_to_string(dir.path().join(out).join("profile.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let routed = |out: &str, router: &str| measured(out, &[&both[..], &["--router", router]].concat());
    let (even, one_hot) = (routed("a", "even"), routed("b", "one-hot"));
    let layers = even["layers"].as_u64().unwrap() as usize;
    for (found, load, entropy) in [(&even, json!([0.5, 0.5]), 1.0), (&one_hot, json!([1.0, 0.0]), 0.0)] {
        assert_eq!(found["expert_names"], json!(["left", "right"]));
        let experts = found["experts"].as_array().unwrap();
        assert_eq!(experts.len(), layers);
        for (layer, e) in experts.iter().enumerate() {
            assert_eq!((&e["layer"], &e["load"], &e["tokens"]), (&json!(layer), &load, &json!(4 * 63)));
            assert!((e["entropy"].as_f64().unwrap() - entropy).abs() < 1e-12, "{e}");
        }
    }
    let html = std::fs::read_to_string(dir.path().join("b/report.html")).unwrap();
    assert!(html.contains("<h2>Experts</h2>") && html.contains("left"));

    // All weight on one adapter: the numbers are those of this adapter alone, to the bit.
    let alone = measured("c", &["--adapter", "left"]);
    let plain = measured("d", &[]);
    for part in ["residual", "linear", "lens"] {
        assert_eq!(one_hot[part], alone[part], "{part}");
        assert_ne!(one_hot[part], plain[part], "control: {part}");
        assert_ne!(one_hot[part], even[part], "control: {part}");
    }
    assert!(alone.get("experts").is_none() && plain.get("experts").is_none());

    for (more, says) in [
        (&["--router", "even"][..], "--adapter"),
        (&["--router", "even", "--adapter", "left"], "`right`"),
        (&["--router", "even", "--adapter", "left", "--adapter", "right", "--adapter", "a"], "left, right"),
        (&["--adapter", "left", "--metrics", "fisher"], "fisher"),
        (&["--adapter", "left", "--quantizer", "gptq"], "gptq"),
        (&["--adapter", "left", "--against", "embedded"], "--against"),
    ] {
        exits(dir.path(), &[&line[..], more, &["--out", "e"]].concat(), 2, says);
    }
}
