//! Models written and read again.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Run, Seed};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType, Model, ModelFiles};
use firebrick_tensor::stream::Executor;

const TEXT: &str = "the quick brown fox jumps over the lazy dog and the quick brown fox runs on";

fn tokenizer() -> Tokenizer {
    train_bpe([TEXT], 272).unwrap()
}

fn decoder(tokenizer: &Tokenizer, tied_head: bool) -> Decoder {
    let vocab = tokenizer.vocab_size();
    let config =
        DecoderConfig { d_model: 32, d_ff: 64, head_dim: 8, tied_head, ..DecoderConfig::tiny(vocab) };
    Decoder::random(config, Seed(9), &Device::flex()).unwrap()
}

fn logits(decoder: &Decoder) -> Tensor<3> {
    let tokens = Tensor::<2, Int>::from_ints([[5, 80, 17, 200, 3, 42]], &Device::flex());
    decoder.forward(tokens, &mut Run::default())
}

fn difference(a: &Decoder, b: &Decoder) -> f32 {
    (logits(a) - logits(b)).abs().max().into_scalar()
}

fn open(path: &Path) -> Model {
    Model::open(path, &Device::flex()).unwrap()
}

#[test]
fn folder_and_gguf_hold_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    for tied in [true, false] {
        let decoder = decoder(&tokenizer, tied);
        for (name, dtype, tolerance) in [
            ("f32", ExportType::F32, 0.0),
            ("f32.gguf", ExportType::F32, 0.0),
            ("bf16", ExportType::BF16, 2e-2),
            ("f16.gguf", ExportType::F16, 1e-2),
            ("q8_0.gguf", ExportType::Q8_0, 2e-2),
        ] {
            let path = dir.path().join(format!("{tied}-{name}"));
            Export::decoder("test", &decoder, &tokenizer, dtype).write(&path, &Executor::default()).unwrap();
            let back = open(&path);
            assert_eq!(back.decoder.config().tied_head, tied);
            let found = difference(&decoder, &back.decoder);
            assert!(found <= tolerance, "{name}: logits differ by {found}");
            assert!(tolerance == 0.0 || found > 0.0, "control: {name} rounds");
            assert_eq!(back.tokenizer.encode(TEXT, false).unwrap(), tokenizer.encode(TEXT, false).unwrap());
        }
    }
}

#[test]
fn converting_there_and_back_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, gguf, again) = (dir.path().join("a"), dir.path().join("b.gguf"), dir.path().join("c"));
    let tokenizer = tokenizer();
    let decoder = decoder(&tokenizer, true);
    let executor = Executor::default();
    Export::decoder("test", &decoder, &tokenizer, ExportType::F32).write(&folder, &executor).unwrap();
    let files = ModelFiles::open(&folder).unwrap();
    Export::files(&files, ExportType::F32).write(&gguf, &executor).unwrap();
    let files = ModelFiles::open(&gguf).unwrap();
    Export::files(&files, ExportType::F32).write(&again, &executor).unwrap();
    let bytes = |p: &Path| std::fs::read(p.join("model.safetensors")).unwrap();
    assert_eq!(bytes(&folder), bytes(&again));
    // llama.cpp's order of q and k differs from Hugging Face's, or the permutation would go untested.
    let (a, b) = (ModelFiles::open(&folder).unwrap(), files);
    let q = |f: &ModelFiles, n: &str| f.checkpoint.read_f32(n).unwrap();
    assert_ne!(q(&a, "model.layers.0.self_attn.q_proj.weight"), q(&b, "blk.0.attn_q.weight"), "control");
    assert_eq!(q(&a, "model.layers.0.self_attn.v_proj.weight"), q(&b, "blk.0.attn_v.weight"));
}

#[test]
fn packed_types_need_gguf_and_layers_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let decoder = decoder(&tokenizer, true);
    let packed = Export::decoder("test", &decoder, &tokenizer, ExportType::Q8_0);
    assert!(packed.write(&dir.path().join("folder"), &Executor::default()).is_err());
    let path = dir.path().join("one");
    let export = Export::decoder("test", &decoder, &tokenizer, ExportType::F32).with_layers(vec![1]);
    export.write(&path, &Executor::default()).unwrap();
    let back = open(&path);
    assert_eq!(back.decoder.config().layers, 1);
    assert_eq!(difference(&decoder.clone().with_layers(&[1]), &back.decoder), 0.0);
    assert!(difference(&decoder.with_layers(&[0]), &back.decoder) > 0.0, "control: it was the other layer");
}

#[test]
fn damaged_models_are_refused_with_every_reason() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let decoder = decoder(&tokenizer, true);
    let path = dir.path().join("m");
    Export::decoder("test", &decoder, &tokenizer, ExportType::F32)
        .write(&path, &Executor::default())
        .unwrap();
    let config = path.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"hidden_size\": 32", "\"hidden_size\": 64")).unwrap();
    let error = Model::open(&path, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("model.norm"), "{error}");
    std::fs::write(
        &config,
        text.replace("silu", "gelu").replace("\"attention_bias\": false", "\"attention_bias\": true"),
    )
    .unwrap();
    let error = Model::open(&path, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("gelu") && error.contains("attention_bias"), "{error}");
}
