//! Models written and read again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Brick, Event, Part, Progress, Run, Seed, Site, Skip};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{
    Decoder, DecoderConfig, EncodedWeight, Export, ExportType, Model, ModelFiles, NormPlacement,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, write_gguf};
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
fn peri_norms_go_to_both_formats() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let peri =
        DecoderConfig { norm_placement: NormPlacement::Peri, ..DecoderConfig::tiny(tokenizer.vocab_size()) };
    let decoder = Decoder::random(peri, Seed(2), &Device::flex()).unwrap();
    for name in ["peri", "peri.gguf"] {
        let path = dir.path().join(name);
        let export = Export::decoder("test", &decoder, &tokenizer, ExportType::F32);
        export.write(&path, &Executor::default()).unwrap();
        let back = open(&path).decoder;
        assert_eq!(back.config().norm_placement, NormPlacement::Peri);
        assert_eq!(difference(&decoder, &back), 0.0, "{name}");
        let skipped = Skip { sites: back.sites().all().of_part(Part::AttnPostNorm) };
        let bricks: [&dyn Brick; 1] = [&skipped];
        let tokens = Tensor::<2, Int>::from_ints([[5, 80, 17, 200, 3, 42]], &Device::flex());
        let without = back.forward(tokens, &mut Run::new(&bricks));
        assert!(
            (without - logits(&back)).abs().max().into_scalar::<f32>() > 1e-3,
            "control: the norms count"
        );
    }
}

/// Cancels after some parts.
struct Cancel(AtomicUsize);

impl Progress for Cancel {
    fn on(&self, event: Event<'_>) {
        if let Event::Advance { .. } = event {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 3
    }
}

#[test]
fn an_interrupted_export_of_another_model_is_not_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let config = DecoderConfig::tiny(tokenizer.vocab_size());
    let random = |seed| Decoder::random(config.clone(), Seed(seed), &Device::flex()).unwrap();
    let (a, b) = (random(1), random(2));
    let site = Site::layer(0, Part::MlpUp);
    let packed = |fill: u8| {
        BTreeMap::from([(site, EncodedWeight { dtype: DType::F32, bytes: vec![fill; 32 * 16 * 4] })])
    };
    let write = |name: &str, decoder: &Decoder, fill, executor: &Executor<'_>| {
        let path = dir.path().join(name);
        let export = Export::decoder("test", decoder, &tokenizer, ExportType::F32).with_encoded(packed(fill));
        export.write(&path, executor).map(|report| (std::fs::read(&path).unwrap(), report.resumed_parts))
    };
    let interrupt = |name: &str| {
        let cancel = Cancel(AtomicUsize::new(0));
        let executor = Executor { progress: &cancel, threads: Some(1), ..Executor::default() };
        write(name, &a, 0, &executor).unwrap_err();
    };
    let plain = Executor::default();
    let fresh = |decoder: &Decoder, fill| {
        write(&format!("fresh{fill}.gguf"), decoder, fill, &Executor { overwrite: true, ..plain }).unwrap().0
    };
    interrupt("same.gguf");
    let (bytes, resumed) = write("same.gguf", &a, 0, &plain).unwrap();
    assert!(resumed > 0, "control: the same model is taken up");
    assert!(bytes == fresh(&a, 0));
    interrupt("other.gguf");
    let (bytes, resumed) = write("other.gguf", &b, 0, &plain).unwrap();
    assert_eq!(resumed, 0);
    assert!(bytes == fresh(&b, 0));
    interrupt("packed.gguf");
    let (bytes, resumed) = write("packed.gguf", &a, 1, &plain).unwrap();
    assert_eq!(resumed, 0);
    assert!(bytes == fresh(&a, 1));
}

#[test]
fn a_gguf_source_keeps_its_keys_but_not_another_name_or_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let (first, second) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    let decoder = decoder(&tokenizer, true);
    Export::decoder("one", &decoder, &tokenizer, ExportType::F32)
        .write(&first, &Executor::default())
        .unwrap();
    let source = Checkpoint::open(&first).unwrap();
    let mut metadata = source.gguf().unwrap().metadata.clone();
    metadata.insert("general.license".into(), "mit".into());
    let tensors: Vec<_> =
        source.tensors().iter().map(|t| (t.spec(), source.bytes(&t.name).unwrap().to_vec())).collect();
    write_gguf(&first, &metadata, &tensors).unwrap();

    let mut files = ModelFiles::open(&first).unwrap();
    assert_eq!(files.name, "one");
    files.name = "two".into();
    files.tokenizer.set_chat_template(None);
    Export::files(&files, ExportType::F32).write(&second, &Executor::default()).unwrap();
    let written = Checkpoint::open(&second).unwrap();
    let written = &written.gguf().unwrap().metadata;
    assert_eq!((&written["general.license"], &written["general.name"]), (&"mit".into(), &"two".into()));
    assert!(
        metadata.contains_key("tokenizer.chat_template") && !written.contains_key("tokenizer.chat_template")
    );
    assert_eq!(written["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.tokens"]);
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
