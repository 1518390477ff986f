use burn::tensor::Device;
use firebrick_core::Brick;
use firebrick_peft::hf;

use crate::{decoder, largest, logits, trained};

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
