use burn::tensor::Device;
use firebrick_core::Brick;
use firebrick_peft::{LoraBank, LoraSettings, hf};

use crate::{decoder, fresh, largest, logits, trained};

#[test]
fn a_saved_bank_loads_as_it_was() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let dir = tempfile::tempdir().unwrap();
    hf::save(&bank, decoder.sites(), "some/base", dir.path()).unwrap();
    let (back, config) = hf::load(dir.path(), decoder.sites(), &device).unwrap();
    assert_eq!(config.base_model_name_or_path.as_deref(), Some("some/base"));
    assert_eq!(back.sites(), bank.sites());
    for site in bank.sites().iter() {
        assert_eq!(back.get(site).unwrap().0, bank.get(site).unwrap().0, "{site}");
    }
    // The factors are the same numbers in another layout in memory, which changes the order of sums.
    assert!(largest(logits(&decoder, &[&back]), logits(&decoder, &[&bank])) < 1e-6);
    let again = tempfile::tempdir().unwrap();
    hf::save(&back, decoder.sites(), "some/base", again.path()).unwrap();
    for file in [hf::CONFIG_FILE, hf::WEIGHTS_FILE] {
        let bytes = |d: &tempfile::TempDir| std::fs::read(d.path().join(file)).unwrap();
        assert_eq!(bytes(&dir), bytes(&again), "{file}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_every_reason() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let dir = tempfile::tempdir().unwrap();
    hf::save(&bank, decoder.sites(), "base", dir.path()).unwrap();
    let path = dir.path().join(hf::CONFIG_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let refused = |text: String| {
        std::fs::write(&path, text).unwrap();
        hf::load(dir.path(), decoder.sites(), &device).unwrap_err().to_string()
    };
    let error = refused(text.replace("\"use_dora\": false", "\"use_dora\": true").replace("LORA", "IA3"));
    assert!(error.contains("use_dora") && error.contains("IA3"), "{error}");
    let error =
        refused(text.replace("\"rank_pattern\": {", "\"rank_pattern\": {\"layers.0.self_attn.q_proj\": 9,"));
    assert!(error.contains("rank 9"), "{error}");
    for (extra, part) in [
        ("\"init_lora_weights\": \"pissa_niter_16\"", "pissa_niter_16"),
        ("\"init_lora_weights\": \"olora\"", "olora"),
        ("\"target_parameters\": [\"mlp.experts\"]", "target_parameters"),
        ("\"alora_invocation_tokens\": [1, 2]", "alora_invocation_tokens"),
        ("\"lora_dropout\": 1.5", "dropout 1.5"),
        ("\"rank_pattern\": {\"q_proj\": \"two\"}", "q_proj"),
    ] {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let change: serde_json::Value = serde_json::from_str(&format!("{{{extra}}}")).unwrap();
        json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let error = refused(json.to_string());
        assert!(error.contains(part), "{error}");
    }
    let eva = text.replace("\"init_lora_weights\": true", "\"init_lora_weights\": \"eva\"");
    assert_ne!(eva, text);
    std::fs::write(&path, eva).unwrap();
    hf::load(dir.path(), decoder.sites(), &device).unwrap();
    let error = refused("{".into());
    assert!(error.contains(hf::CONFIG_FILE), "{error}");
    std::fs::write(&path, text).unwrap();
    // A model of other widths.
    let config = firebrick_models::DecoderConfig { d_model: 32, ..decoder.config().clone() };
    let other = firebrick_models::Decoder::random(config, firebrick_core::Seed(0), &device).unwrap();
    let error = hf::load(dir.path(), other.sites(), &device).unwrap_err().to_string();
    assert!(error.contains("layers.0.attn.q") && error.contains("layers.1.mlp.down"), "{error}");
    let fine = hf::load(dir.path(), decoder.sites(), &device).unwrap().0;
    assert!(
        largest(logits(&decoder, &[&fine]), logits(&decoder, &[])) > 1e-3,
        "control: the sound folder loads"
    );
}

#[test]
fn the_first_pattern_that_matches_holds() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = fresh(&decoder, &device);
    let dir = tempfile::tempdir().unwrap();
    hf::save(&bank, decoder.sites(), "base", dir.path()).unwrap();
    let path = dir.path().join(hf::CONFIG_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let alpha = |patterns: &str| {
        let with = text.replace("\"alpha_pattern\": {}", &format!("\"alpha_pattern\": {{{patterns}}}"));
        assert_ne!(with, text);
        std::fs::write(&path, with).unwrap();
        let (bank, _) = hf::load(dir.path(), decoder.sites(), &device).unwrap();
        ["layers.0.attn.q", "layers.1.attn.q", "layers.1.attn.k"]
            .map(|site| bank.get(site.parse().unwrap()).unwrap().0.alpha)
    };
    // Not in the order of the alphabet.
    assert_eq!(alpha("\"self_attn.q_proj\": 3, \"layers.0.*\": 5"), [3.0, 3.0, 16.0]);
    assert_eq!(alpha("\"layers.0.*\": 5, \"self_attn.q_proj\": 3"), [5.0, 3.0, 16.0]);
}

#[test]
fn banks_of_mixed_scales_keep_them() {
    let device = Device::flex();
    let decoder = decoder(&device);
    let bank = trained(&decoder, &device);
    let saved = |rslora: &dyn Fn(usize) -> bool| {
        let part = |(i, site)| {
            let (settings, f) = bank.get(site).unwrap();
            (site, LoraSettings { rslora: rslora(i), ..settings }, f.a.val(), f.b.val())
        };
        let parts = bank.sites().iter().enumerate().map(part).collect();
        let bank = LoraBank::from_parts(parts, 0.0).unwrap();
        let dir = tempfile::tempdir().unwrap();
        hf::save(&bank, decoder.sites(), "base", dir.path()).unwrap();
        let (back, config) = hf::load(dir.path(), decoder.sites(), &device).unwrap();
        for site in bank.sites().iter() {
            let (a, b) = (bank.get(site).unwrap().0.scale(), back.get(site).unwrap().0.scale());
            assert!((a / b - 1.0).abs() < 1e-12, "{site}: {a} {b}");
        }
        config.use_rslora
    };
    assert!(saved(&|_| true));
    assert!(!saved(&|_| false));
    assert!(!saved(&|i| i % 2 == 0));
}
