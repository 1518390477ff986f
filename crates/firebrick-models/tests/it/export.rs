//! Models written and read again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType as Stored, Device, Int, Tensor};
use firebrick_core::{Brick, Event, Part, Progress, Run, Seed, Site, Skip};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{
    Decoder, DecoderConfig, EncodedWeight, Export, ExportType, Model, ModelFiles, NormPlacement,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, write_gguf};
use firebrick_tensor::imatrix::{Importance, ImportanceMatrix};
use firebrick_tensor::ops::Precision;
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
fn weights_in_bf16_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (tokenizer, device) = (tokenizer(), Device::flex());
    for tied in [true, false] {
        let decoder = decoder(&tokenizer, tied);
        for name in ["folder", "file.gguf"] {
            let path = dir.path().join(format!("{tied}-{name}"));
            let export = Export::decoder("test", &decoder, &tokenizer, ExportType::BF16);
            export.write(&path, &Executor::default()).unwrap();
            let (half, packed) =
                ModelFiles::open(&path).unwrap().load_packed(Precision::F32, &device).unwrap();
            let (half, whole) = (half.decoder, open(&path).decoder);
            assert!(packed.is_empty());
            assert_eq!(
                (half.head_weight().dtype(), whole.head_weight().dtype()),
                (Stored::BF16, Stored::F32)
            );
            for entry in half.sites().entries() {
                let (Some(a), Some(b)) = (half.weight(entry.site), whole.weight(entry.site)) else {
                    continue;
                };
                assert!(a.equal(b).all().into_scalar::<bool>(), "{}", entry.site);
            }
            let e = difference(&half, &whole);
            assert!(e < 1e-5, "{name}: logits differ by {e}");
            // Token by token, which has kernels of its own.
            let steps = |decoder: &Decoder| {
                let mut run = Run::default();
                run.insert(decoder.kv_cache(1, 6));
                let step = |id: i32| {
                    let token = Tensor::<2, Int>::from_ints([[id]], &device);
                    decoder.forward(token, &mut run)
                };
                Tensor::cat([5, 80, 17, 200, 3, 42].map(step).into(), 1)
            };
            let e = (steps(&half) - logits(&whole)).abs().max().into_scalar::<f32>();
            assert!(e < 1e-4, "{name}: logits of single tokens differ by {e}");
            assert!(difference(&half, &decoder) > 1e-5, "control: {name} rounds");
            let bf16 = ModelFiles::open(&path).unwrap().load_in_bf16(&device).unwrap().decoder;
            assert_eq!((bf16.head_weight().dtype(), bf16.precision()), (Stored::BF16, Precision::Bf16));
            let e = difference(&bf16, &whole.with_precision(Precision::Bf16));
            assert!(e < 1e-5, "{name}: logits of products in bf16 differ by {e}");
            // A file of f32 is rounded to the same.
            let export = Export::decoder("test", &decoder, &tokenizer, ExportType::F32);
            let path = dir.path().join(format!("{tied}-whole-{name}"));
            export.write(&path, &Executor::default()).unwrap();
            let (rounded, _) =
                ModelFiles::open(&path).unwrap().load_packed(Precision::Bf16, &device).unwrap();
            assert_eq!(rounded.decoder.precision(), Precision::Bf16);
            assert_eq!(difference(&rounded.decoder, &bf16), 0.0);
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

fn wide(tokenizer: &Tokenizer, d_model: usize, d_ff: usize) -> Decoder {
    let config = DecoderConfig { d_model, d_ff, head_dim: 64, ..DecoderConfig::tiny(tokenizer.vocab_size()) };
    Decoder::random(config, Seed(9), &Device::flex()).unwrap()
}

#[test]
fn every_type_is_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let decoder = wide(&tokenizer, 256, 512);
    for name in ExportType::NAMES.split(", ") {
        let dtype: ExportType = name.parse().unwrap();
        let path = dir.path().join(format!("{name}.gguf"));
        let export = Export::decoder("test", &decoder, &tokenizer, dtype);
        assert!(export.fallbacks().is_empty(), "{name}");
        export.write(&path, &Executor::default()).unwrap();
        let back = ModelFiles::open(&path).unwrap();
        let of = |name: &str| back.checkpoint.get(name).unwrap().dtype;
        assert_eq!(of("blk.1.ffn_down.weight"), dtype.dtype());
        assert_eq!(of("blk.1.attn_norm.weight"), DType::F32);
        let embedding = match dtype.dtype() {
            d if !d.is_packed() => d,
            d if d.block_len() == 256 => DType::Q6K,
            _ => DType::Q8_0,
        };
        assert_eq!(of("token_embd.weight"), embedding);
        let back = back.load(&Device::flex()).unwrap().decoder;
        let weight = |d: &Decoder| d.weight(Site::layer(1, Part::AttnQ)).unwrap();
        let error: f32 = (weight(&decoder) - weight(&back)).powi_scalar(2).mean().sqrt().into_scalar();
        let size: f32 = weight(&decoder).powi_scalar(2).mean().sqrt().into_scalar();
        let bits = dtype.dtype().bits_per_element() as f32;
        assert!(error <= size * (2.6 - bits.min(8.5)).exp2(), "{name}: {error} of {size}");
        assert!(bits == 32.0 || error > 0.0, "control: {name} rounds");
    }
    assert!("f64".parse::<ExportType>().is_err() && "i32".parse::<ExportType>().is_err());
    for dtype in DType::all().filter(|d| d.is_real() && *d != DType::F64) {
        assert!(ExportType::NAMES.split(", ").any(|n| n == dtype.name()), "{dtype}");
    }
}

#[test]
fn rows_that_blocks_do_not_divide_become_what_llama_cpp_makes_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    // Rows of 96 everywhere but in the down projections, of 256; and of 40.
    for (d_model, d_ff, named) in [
        (
            96,
            256,
            [("q2_k", DType::Iq4Nl), ("q4_k", DType::Q5_0), ("q5_k", DType::Q5_1), ("q6_k", DType::Q8_0)],
        ),
        (40, 256, [("q2_k", DType::F16), ("q4_k", DType::F16), ("q5_0", DType::F16), ("iq4_xs", DType::F16)]),
    ] {
        let decoder = wide(&tokenizer, d_model, d_ff);
        for (name, expected) in named {
            let dtype: ExportType = name.parse().unwrap();
            let path = dir.path().join(format!("{d_model}-{name}.gguf"));
            let export = Export::decoder("test", &decoder, &tokenizer, dtype);
            let fallbacks = export.fallbacks();
            export.write(&path, &Executor::default()).unwrap();
            let back = Checkpoint::open(&path).unwrap();
            let of = |name: &str| back.get(name).unwrap().dtype;
            assert_eq!((of("blk.0.attn_q.weight"), of("blk.0.ffn_down.weight")), (expected, dtype.dtype()));
            let said = |part| fallbacks.iter().find(|(s, _)| *s == Site::layer(0, part)).map(|f| f.1);
            assert_eq!((said(Part::AttnQ), said(Part::MlpDown)), (Some(expected), None), "{name}");
            open(&path);
        }
    }
}

#[test]
fn importance_decides_what_packed_types_round() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let decoder = wide(&tokenizer, 256, 256);
    let (q, v) = (Site::layer(0, Part::AttnQ), Site::layer(0, Part::AttnV));
    let columns: Vec<f32> = (0..256).map(|i| if i % 4 == 0 { 100.0 } else { 0.01 }).collect();
    let of = |name: &str, sums: Vec<f32>| {
        let entry = Importance { sums, counts: vec![1.0] };
        ImportanceMatrix { entries: BTreeMap::from([(name.to_owned(), entry)]), ..Default::default() }
    };
    let matrix = of("blk.0.attn_q.weight", columns);
    let write = |name: &str, export: Export<'_>| {
        let path = dir.path().join(name);
        export.write(&path, &Executor::default()).unwrap();
        open(&path).decoder
    };
    let (folder, dtype) = (dir.path().join("f32"), "q3_k".parse::<ExportType>().unwrap());
    Export::decoder("test", &decoder, &tokenizer, ExportType::F32)
        .write(&folder, &Executor::default())
        .unwrap();
    let files = ModelFiles::open(&folder).unwrap();
    let plain = write("plain.gguf", Export::files(&files, dtype));
    let weighted = write("weighted.gguf", Export::files(&files, dtype).with_imatrix(&matrix).unwrap());
    let export = Export::decoder("test", &decoder, &tokenizer, dtype).with_imatrix(&matrix).unwrap();
    let again = write("again.gguf", export);
    let error = |d: &Decoder, site: Site, every: usize| -> f64 {
        let read = |d: &Decoder| d.weight(site).unwrap().into_data().try_into_vec_as::<f32>().unwrap();
        let pairs = read(&decoder).into_iter().zip(read(d)).step_by(every);
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let gain = error(&weighted, q, 4) / error(&plain, q, 4);
    assert!(gain < 0.8, "the columns that matter: {gain}");
    assert!(error(&weighted, q, 1) > error(&plain, q, 1), "control: the others pay");
    assert_eq!(error(&weighted, v, 1), error(&plain, v, 1), "control: no importance, no difference");
    assert_eq!(difference(&weighted, &again), 0.0, "from a decoder as from files");

    let short =
        Export::files(&files, dtype).with_imatrix(&of("blk.0.attn_q.weight", vec![1.0; 128])).unwrap();
    let error = short.write(&dir.path().join("x.gguf"), &Executor::default()).unwrap_err().to_string();
    assert!(error.contains("layers.0.attn.q") && error.contains("128 numbers"), "{error}");
    assert!(Export::files(&files, dtype).with_imatrix(&of("another", vec![1.0; 256])).is_err());
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
        text.replace("silu", "gelu").replace("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\""),
    )
    .unwrap();
    let error = Model::open(&path, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("gelu") && error.contains("yarn"), "{error}");
}
