//! What is fuzzed: every parser of foreign files, over its public entry points.
//!
//! Each target takes any bytes and says whether they were accepted. It panics where something does not hold that should hold
//! for any input: what is read is written and read back as the same, what is refused is refused with a reason. The same
//! functions run under libFuzzer (`cargo xtask fuzz`) and, with simpler mutations, in the tests of `firebrick-cli`.

use std::cell::RefCell;
use std::path::Path;

use burn::tensor::Device;
use firebrick_core::{LayerPlan, Selector, SiteTable};
use firebrick_merge::MergeConfig;
use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_models::{DecoderConfig, GgufTensors, ModelError};
use firebrick_peft::hf;
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Strings};
use firebrick_tensor::checkpoint::{Checkpoint, Gguf, Value};

/// Lets panics of the tokenizers crate, which `Tokenizer` catches, pass for what they are; any other ends the process, as
/// libFuzzer wants it.
#[cfg(not(test))]
pub fn let_tokenizers_panic() {
    let end = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|at| at.file().contains("/tokenizers-")) {
            end(panic);
        }
    }));
}

/// Runs one input; whether it was accepted.
pub type Target = fn(&[u8]) -> bool;

/// Every target by its name, which is that of its folder in `corpus/` and of its file in `fuzz_targets/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("safetensors", safetensors),
    ("gguf", gguf),
    ("sharded_index", sharded_index),
    ("plan_toml", plan_toml),
    ("plan_json", plan_json),
    ("selector", selector),
    ("mergekit", mergekit),
    ("adapter_config", adapter_config),
    ("model_config", model_config),
    ("gguf_tokenizer", gguf_tokenizer),
    ("tokenizer_json", tokenizer_json),
    ("chat_template", chat_template),
];

/// A safetensors file.
pub fn safetensors(data: &[u8]) -> bool {
    checkpoint(data, "fuzz.safetensors")
}

/// A GGUF file, with the configuration and the tokenizer in it.
pub fn gguf(data: &[u8]) -> bool {
    checkpoint(data, "fuzz.gguf")
}

fn checkpoint(data: &[u8], name: &str) -> bool {
    let checkpoint = match Checkpoint::from_bytes(data.to_vec(), name) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(&error.to_string(), name),
    };
    for tensor in checkpoint.tensors() {
        let bytes = checkpoint.bytes(&tensor.name).expect("it is listed");
        assert_eq!(bytes.len(), tensor.len);
        match checkpoint.read_f32(&tensor.name) {
            Ok(values) => assert_eq!(values.len(), tensor.elements()),
            Err(error) => assert!(!tensor.dtype.is_real(), "{error}"),
        }
    }
    if let Some(gguf) = checkpoint.gguf() {
        let has = |name: &str| checkpoint.get(name).is_some();
        let rope_divisors = checkpoint.read_f32("rope_freqs.weight").ok();
        let tensors = GgufTensors { vocab: 300, has: &has, rope_divisors };
        let _ = DecoderConfig::from_gguf(gguf, &tensors, Path::new(name)).map(|config| sites(&config));
        let _ = Tokenizer::from_gguf(gguf).map(|tokenizer| encodes(&tokenizer));
    }
    true
}

/// `model.safetensors.index.json` beside two shards, `a.safetensors` with `x` and `b.safetensors` with `y`.
pub fn sharded_index(data: &[u8]) -> bool {
    let shard = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"\0"].concat()
    };
    let files = [("a.safetensors", shard("x")), ("b.safetensors", shard("y"))];
    in_folder(&files, |folder| {
        write(folder, "model.safetensors.index.json", data);
        match Checkpoint::open(folder) {
            Ok(checkpoint) => {
                assert!(checkpoint.tensors().iter().all(|t| ["x", "y"].contains(&t.name.as_str())));
                true
            }
            Err(error) => refused(&error.to_string(), "model.safetensors.index.json"),
        }
    })
}

/// A plan in TOML.
pub fn plan_toml(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match LayerPlan::from_toml(text) {
        Ok(plan) => {
            if let Ok(written) = plan.to_toml() {
                assert_eq!(
                    LayerPlan::from_toml(&written).expect("what was written reads"),
                    plan,
                    "{written}"
                );
            }
            resolves(&plan)
        }
        Err(error) => refused(&error.to_string(), ""),
    }
}

/// A plan in JSON.
pub fn plan_json(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match LayerPlan::from_json(text) {
        Ok(plan) => {
            let written = plan.to_json().expect("numbers are finite");
            assert_eq!(LayerPlan::from_json(&written).expect("what was written reads"), plan, "{written}");
            resolves(&plan)
        }
        Err(error) => refused(&error.to_string(), ""),
    }
}

fn resolves(plan: &LayerPlan) -> bool {
    let table = table();
    match plan.resolve(&table) {
        Ok(resolved) => {
            let again = LayerPlan::from_sites(resolved.sites.clone()).resolve(&table);
            assert!(resolved.sites.is_empty() || again.expect("sites are sites").sites == resolved.sites);
            let _ = resolved.coverage.to_string();
        }
        Err(error) => {
            refused(&error.to_string(), "");
        }
    }
    true
}

/// A selector.
pub fn selector(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let selector: Selector = match text.parse() {
        Ok(selector) => selector,
        Err(error) => return refused(&format!("{error}"), ""),
    };
    let written = selector.to_string();
    assert_eq!(written.parse::<Selector>().expect("what was written reads"), selector, "{written}");
    if let Ok(sites) = selector.resolve(&table()) {
        let exact = Selector::exactly(&sites).expect("it matches something");
        assert_eq!(exact.resolve(&table()).expect("it matches the same"), sites, "{text} as {exact}");
    }
    true
}

/// mergekit's YAML.
pub fn mergekit(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match MergeConfig::parse_all(text) {
        Ok(configs) => {
            for config in &configs {
                let sources = config.modules.iter().flat_map(|m| &m.slices).flat_map(|s| &s.sources);
                let all = sources.map(|s| &s.parameters).chain([&config.parameters]);
                for (_, value) in all.flat_map(|p| p.iter()) {
                    for (name, depth) in [("model.layers.0.mlp.up_proj.weight", 0.0), ("", 0.3), ("x", 1.0)] {
                        let _ = value.at(name, depth, &|_| false);
                    }
                }
            }
            true
        }
        Err(problems) => refused(&problems.join("\n"), ""),
    }
}

/// `adapter_config.json`, beside the weights of an adapter of rank 1 on one layer.
pub fn adapter_config(data: &[u8]) -> bool {
    let prefix = "base_model.model.model.layers.0.self_attn.q_proj";
    let header = format!(
        r#"{{"{prefix}.lora_A.weight":{{"dtype":"F32","shape":[1,16],"data_offsets":[0,64]}},"{prefix}.lora_B.weight":{{"dtype":"F32","shape":[16,1],"data_offsets":[64,128]}}}}"#
    );
    let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 128]].concat();
    in_folder(&[(hf::WEIGHTS_FILE, weights)], |folder| {
        write(folder, hf::CONFIG_FILE, data);
        match hf::load(folder, &table(), &Device::flex()) {
            Ok((bank, _)) => {
                assert!((0.0..1.0).contains(&bank.dropout()));
                true
            }
            Err(error) => refused(&error.to_string(), "adapter"),
        }
    })
}

/// `config.json`.
pub fn model_config(data: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice(data) else { return false };
    match DecoderConfig::from_hf(&value) {
        Ok(config) => {
            assert!(config.problems().is_empty());
            assert_eq!(
                DecoderConfig::from_hf(&config.to_hf("float32")).expect("what was written reads"),
                config
            );
            sites(&config);
            true
        }
        Err(problems) => refused(&problems.join("\n"), ""),
    }
}

/// The `tokenizer.*` keys of GGUF, in parts parted by zeros: model, pre-tokenizer, tokens and merges (by line), types (a byte
/// each), chat template, and the numbers of special tokens (a byte each).
pub fn gguf_tokenizer(data: &[u8]) -> bool {
    let parts: Vec<&[u8]> = data.splitn(7, |&b| b == 0).collect();
    let part = |i: usize| parts.get(i).copied().unwrap_or_default();
    let text = |i: usize| String::from_utf8_lossy(part(i)).into_owned();
    let lines = |i: usize| {
        let mut strings = Strings::default();
        text(i).lines().for_each(|line| strings.push(line));
        Value::from(Array::String(strings))
    };
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value: Value| drop(metadata.insert(format!("tokenizer.{key}"), value));
    put("ggml.model", text(0).as_str().into());
    put("ggml.pre", text(1).as_str().into());
    put("ggml.tokens", lines(2));
    put("ggml.merges", lines(3));
    if !part(4).is_empty() {
        put("ggml.token_type", Array::I32(part(4).iter().map(|&b| i32::from(b) - 48).collect()).into());
    }
    if !part(5).is_empty() {
        put("chat_template", text(5).as_str().into());
    }
    for (name, id) in ["bos", "eos", "eot", "eom", "unknown", "padding"].into_iter().zip(part(6)) {
        put(&format!("ggml.{name}_token_id"), Value::U32(u32::from(*id)));
    }
    put("ggml.add_bos_token", (part(6).len() > 6).into());
    let gguf = Gguf { path: "fuzz.gguf".into(), version: 3, alignment: 32, metadata };
    let tokenizer = match Tokenizer::from_gguf(&gguf) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return refused(&error.to_string(), ""),
    };
    encodes(&tokenizer);
    if let Ok(metadata) = tokenizer.gguf_metadata() {
        let again = Tokenizer::from_gguf(&Gguf { metadata, ..gguf }).expect("what was written reads");
        assert_eq!(again.vocab_size(), tokenizer.vocab_size());
        let ids = |t: &Tokenizer| t.encode("the fox", true).ok();
        assert_eq!(ids(&again), ids(&tokenizer));
    }
    true
}

/// `tokenizer.json`.
pub fn tokenizer_json(data: &[u8]) -> bool {
    in_folder(&[], |folder| {
        write(folder, "tokenizer.json", data);
        match Tokenizer::from_folder(folder) {
            Ok(tokenizer) => {
                encodes(&tokenizer);
                true
            }
            Err(error) => refused(&error.to_string(), ""),
        }
    })
}

/// A chat template, with two messages.
pub fn chat_template(data: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(data) else { return false };
    let messages = [Message::system("Be brief."), Message::user("Hi <b>\n")];
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>"));
    match template.and_then(|t| t.render(&messages, &ChatOptions::answer())) {
        Ok(prompt) => {
            assert!(prompt.len() <= 2 << 20, "{} bytes", prompt.len());
            true
        }
        Err(ModelError::ChatTemplate(why)) => {
            assert!(!why.contains("panicked"), "{why}");
            refused(&why, "")
        }
        Err(other) => panic!("another error: {other}"),
    }
}

/// Ids are below the size of the vocabulary, and decode without a panic.
fn encodes(tokenizer: &Tokenizer) {
    for text in ["", "the fox", " 12\n\u{e9}\u{1f525}", "<s>\0"] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let _ = tokenizer.decode(&ids, false);
        }
    }
}

fn refused(why: &str, part: &str) -> bool {
    assert!(!why.trim().is_empty() && why.contains(part), "`{part}` in `{why}`");
    false
}

fn table() -> SiteTable {
    sites(&DecoderConfig::tiny(40))
}

fn sites(config: &DecoderConfig) -> SiteTable {
    config.family().site_table(config)
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).expect("a temporary folder can be written");
}

thread_local! {
    static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

/// Runs `work` in a folder that holds these files, which are always the same.
fn in_folder(files: &[(&str, Vec<u8>)], work: impl FnOnce(&Path) -> bool) -> bool {
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| tempfile::tempdir().expect("a temporary folder"));
        let missing = files.iter().filter(|(name, _)| !folder.path().join(name).exists());
        missing.for_each(|(name, bytes)| write(folder.path(), name, bytes));
        work(folder.path())
    })
}
