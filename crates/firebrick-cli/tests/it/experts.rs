//! `generate --expert`: small models that steer the one that generates.

use crate::{family, json, run, text};

#[test]
fn experts_steer_what_is_generated() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(dir.path(), "t.txt", "falcon", 24);
    let train =
        ["train", "--model", "embedded", "--data", file.to_str().unwrap(), "--window", "64", "--steps", "8"];
    json(
        dir.path(),
        &[&train[..], &["--batch", "2", "--learning-rate", "0.01", "--out", "adapter"]].concat(),
    );
    json(dir.path(), &["convert", "embedded", "coarse.gguf", "--type", "q2_k"]);
    let generate = |extra: &[&str]| {
        let base = [
            "generate",
            "--prompt",
            "The falcon number",
            "--max-tokens",
            "12",
            "--temperature",
            "1",
            "--seed",
            "1",
        ];
        json(dir.path(), &[&base[..], extra].concat())
    };
    let plain = generate(&["--model", "embedded"]);
    assert!(plain.get("expert_weights").is_none());
    let weights = |found: &serde_json::Value| -> Vec<Vec<f64>> {
        serde_json::from_value(found["expert_weights"].clone()).unwrap()
    };
    let steered =
        |extra: &[&str]| generate(&[&["--model", "embedded", "--expert-base", "embedded"], extra].concat());

    // The large model is the small one: with an expert it says what the expert says.
    let alone =
        [generate(&["--model", "embedded", "--adapter", "adapter"]), generate(&["--model", "coarse.gguf"])];
    for (expert, alone) in ["adapter", "coarse.gguf"].into_iter().zip(&alone) {
        assert_ne!(alone["ids"], plain["ids"], "control: {expert} says something else");
        let found = steered(&["--expert", expert]);
        assert_eq!(found["ids"], alone["ids"], "{expert}");
        assert!(weights(&found).iter().all(|w| w.len() == 1 && (w[0] - 1.0).abs() < 1e-3), "{expert}");
        let proxy = steered(&["--expert", expert, "--expert-weight", "1"]);
        assert_eq!(proxy["ids"], alone["ids"], "{expert}");
    }

    let same = steered(&["--expert", "embedded"]);
    assert_eq!(same["ids"], plain["ids"], "nothing was tuned");
    assert!(weights(&same).iter().flatten().all(|w| *w == 0.0));
    let both = weights(&steered(&["--expert", "adapter", "--expert", "coarse.gguf"]));
    assert_eq!(both.len(), 12);
    assert!(both.iter().all(|w| w.len() == 2 && w.contains(&0.0) && w.iter().any(|w| *w > 0.0)), "{both:?}");
}

#[test]
fn experts_of_other_vocabularies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path(), "llama", |_| ());
    let refused = |extra: &[&str], why: &str| {
        let base = ["generate", "--prompt", "the fox", "--max-tokens", "2"];
        let output = run(dir.path(), &[&base[..], extra].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(why), "{stderr}");
    };
    let base = ["--model", "embedded", "--expert-base"];
    refused(&[&base[..], &["llama", "--expert", "llama"]].concat(), "vocabulary");
    refused(&[&base[..], &["embedded", "--expert", "llama"]].concat(), "vocabulary");
    refused(&["--model", "embedded", "--expert", "embedded"], "--expert-base");
    refused(&["--model", "embedded", "--expert-base", "embedded"], "--expert");
}
