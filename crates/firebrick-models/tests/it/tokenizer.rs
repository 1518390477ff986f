//! Tokenizers through files and back, and against reference ids.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use firebrick_models::ModelError;
use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Value};
use firebrick_tensor::checkpoint::{Checkpoint, Gguf, TensorSpec};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

const CORPUS: &str = "In the beginning was the word, and the word was short. The words that came after it were longer:\n\
    \tthe other one, the others' other ones, and then another.  There were  1234 of them; they'd been 98 before.\n\
    Élan, élève, là-bas: déjà vu, déjà là. 東京 東京 🙂🙂 🙂. for (i = 0; i < 10; i++) {    total += i;    }\n\n    x\n\n    y";

static SMALL: LazyLock<Tokenizer> =
    LazyLock::new(|| train_bpe([CORPUS, "a text of its own, then another one"], 300).unwrap());

const TEXTS: [&str; 7] = [
    "",
    "the other beginning",
    "don't    indent  1234\n\n\tthere, 5 and  6",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "Ünïcödé, 東京, emoji 🙂, tabs\tand   spaces.",
    "e\u{301}l\u{e8}ve \u{0} \u{7f} \u{fffd}",
    "١٢٣ Ⅻ ½ x²",
];

fn gguf(metadata: Metadata) -> Gguf {
    Gguf { path: PathBuf::from("test.gguf"), version: 3, alignment: 32, metadata }
}

fn assert_same(a: &Tokenizer, b: &Tokenizer, texts: &[&str]) {
    for text in texts {
        for special in [false, true] {
            assert_eq!(a.encode(text, special).unwrap(), b.encode(text, special).unwrap(), "{text:?}");
        }
    }
    assert_eq!(
        (a.bos_id(), a.eos_ids(), a.pad_id(), a.unk_id(), a.adds_bos(), a.vocab_size(), a.chat_template()),
        (b.bos_id(), b.eos_ids(), b.pad_id(), b.unk_id(), b.adds_bos(), b.vocab_size(), b.chat_template())
    );
}

fn read_json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn text_survives_and_digits_stand_alone() {
    for text in TEXTS {
        assert_eq!(SMALL.decode(&SMALL.encode(text, true).unwrap(), false).unwrap(), text);
    }
    let ids = SMALL.encode("1234", false).unwrap();
    assert_eq!(ids.iter().map(|&id| SMALL.token(id).unwrap()).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    assert!(SMALL.encode("the other", false).unwrap().len() < 4);
    let marked = SMALL.encode(TEXTS[3], false).unwrap();
    assert_eq!((marked[0], marked[marked.len() - 1]), (1, 0));
    assert_eq!(SMALL.decode(&marked, true).unwrap(), "user\nHi\n");
    assert_eq!(SMALL.id("<|im_end|>"), Some(2));
    assert_eq!(SMALL.decode(&[5000], false).unwrap(), "");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_survives_whole_and_streamed(text: String) {
        let ids = SMALL.encode(&text, false).unwrap();
        prop_assert_eq!(SMALL.decode(&ids, false).unwrap(), text.clone());
        prop_assert_eq!(streamed(&ids).concat(), text);
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(ids in prop::collection::vec(0u32..310, 0..60)) {
        prop_assert_eq!(streamed(&ids).concat(), SMALL.decode(&ids, false).unwrap());
    }
}

fn streamed(ids: &[u32]) -> Vec<String> {
    let mut stream = SMALL.decode_stream(false);
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.step(id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    pieces
}

#[test]
fn a_stream_waits_for_whole_characters() {
    let ids = SMALL.encode("a💡b", false).unwrap();
    assert_eq!(
        ids.len(),
        5,
        "the lamp shares its first two bytes with the smile of the corpus, the others are single"
    );
    assert_eq!(streamed(&ids), ["a", "💡", "b"]);
    assert_eq!(streamed(&ids[..3]), ["a", "\u{fffd}"]);
}

#[test]
fn training_repeats() {
    let again = train_bpe([CORPUS, "a text of its own, then another one"], 300).unwrap();
    assert_eq!(again.gguf_metadata().unwrap(), SMALL.gguf_metadata().unwrap());
    let other = train_bpe([CORPUS], 300).unwrap();
    assert_ne!(other.gguf_metadata().unwrap(), SMALL.gguf_metadata().unwrap());
}

#[test]
fn a_folder_gives_the_tokenizer_back() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    SMALL.save(first.path()).unwrap();
    let read = Tokenizer::from_folder(first.path()).unwrap();
    assert_same(&SMALL, &read, &TEXTS);
    read.save(second.path()).unwrap();
    for file in std::fs::read_dir(first.path()).unwrap() {
        let name = file.unwrap().file_name();
        let bytes = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert_eq!(bytes(first.path()), bytes(second.path()), "{name:?}");
    }
    let config = read_json(&first.path().join("tokenizer_config.json"));
    assert_eq!(config["eos_token"], "<|endoftext|>");
    assert_eq!(read_json(&first.path().join("generation_config.json"))["eos_token_id"], json!([0, 2]));
}

#[test]
fn a_folder_keeps_what_is_not_understood() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    SMALL.save(first.path()).unwrap();
    let config = r#"{"eos_token": {"content": "<|im_end|>", "lstrip": false}, "strange": [1, {"b": 2, "a": 1}],
        "model_max_length": 1000000000000000019884624838656,
        "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]}"#;
    let write = |name: &str, json: &Json| std::fs::write(first.path().join(name), json.to_string()).unwrap();
    std::fs::write(first.path().join("tokenizer_config.json"), config).unwrap();
    write("generation_config.json", &json!({"eos_token_id": 0, "temperature": 0.6}));
    write("special_tokens_map.json", &json!({"bos_token": "<|im_start|>"}));
    std::fs::remove_file(first.path().join("chat_template.jinja")).unwrap();
    let mut read = Tokenizer::from_folder(first.path()).unwrap();
    assert_eq!((read.bos_id(), read.eos_ids(), read.chat_template()), (Some(1), &[2, 0][..], Some("plain")));
    read.save(second.path()).unwrap();
    assert_eq!(std::fs::read_to_string(second.path().join("tokenizer_config.json")).unwrap(), config);
    assert_eq!(read_json(&second.path().join("generation_config.json"))["temperature"], 0.6);
    assert_eq!(read_json(&second.path().join("special_tokens_map.json"))["bos_token"], "<|im_start|>");
    assert!(!second.path().join("chat_template.jinja").exists());

    read.set_chat_template(Some("new".into()));
    read.save(second.path()).unwrap();
    let changed = read_json(&second.path().join("tokenizer_config.json"));
    assert_eq!((&changed["chat_template"], &changed["strange"][1]["b"]), (&json!("new"), &json!(2)));
    assert_eq!(Tokenizer::from_folder(second.path()).unwrap().chat_template(), Some("new"));
}

#[test]
fn begin_tokens_are_added_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    SMALL.save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer_config.json");
    let mut config = read_json(&path);
    config["add_bos_token"] = true.into();
    config["bos_token"] = "<|im_start|>".into();
    std::fs::write(&path, config.to_string()).unwrap();
    let read = Tokenizer::from_folder(folder.path()).unwrap();
    assert!(read.adds_bos() && !SMALL.adds_bos());
    let plain = SMALL.encode("the", true).unwrap();
    assert_eq!(read.encode("the", true).unwrap(), [&[1], &plain[..]].concat());
    assert_eq!(read.encode("the", false).unwrap(), plain);
    let metadata = read.gguf_metadata().unwrap();
    assert_eq!(metadata["tokenizer.ggml.add_bos_token"], Value::Bool(true));
    assert_same(&read, &Tokenizer::from_gguf(&gguf(metadata)).unwrap(), &TEXTS);
}

#[test]
fn gguf_gives_the_tokenizer_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.gguf");
    let mut metadata = SMALL.gguf_metadata_padded(310).unwrap();
    metadata.insert("tokenizer.ggml.strange".into(), Value::F32(0.5));
    firebrick_tensor::checkpoint::write_gguf(&path, &metadata, &[] as &[(TensorSpec, Vec<u8>)]).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let read = Tokenizer::from_gguf(checkpoint.gguf().unwrap()).unwrap();
    assert_eq!(read.vocab_size(), 310);
    for text in TEXTS {
        assert_eq!(read.encode(text, true).unwrap(), SMALL.encode(text, true).unwrap());
    }
    assert_eq!(read.eos_ids(), [0, 2]);
    assert_eq!(read.gguf_metadata().unwrap(), metadata);
    assert_eq!(read.token(309).unwrap(), "[PAD309]");
    assert!(SMALL.gguf_metadata_padded(299).is_err());

    // The name of the pre-tokenizer matters.
    metadata.insert("tokenizer.ggml.pre".into(), "gpt-2".into());
    let other = Tokenizer::from_gguf(&gguf(metadata)).unwrap();
    assert!(TEXTS.iter().any(|text| other.encode(text, true).unwrap() != SMALL.encode(text, true).unwrap()));
}

#[test]
fn every_known_pre_tokenizer_survives_both_formats() {
    let metadata = SMALL.gguf_metadata().unwrap();
    for pre in ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"] {
        let mut metadata = metadata.clone();
        metadata.insert("tokenizer.ggml.pre".into(), pre.into());
        let first = Tokenizer::from_gguf(&gguf(metadata.clone())).unwrap();
        let folder = tempfile::tempdir().unwrap();
        first.save(folder.path()).unwrap();
        let second = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(second.gguf_metadata().unwrap(), metadata, "{pre}");
        assert_same(&first, &second, &TEXTS);
    }
}

#[test]
fn damaged_gguf_is_an_error_that_names_the_damage() {
    let good = SMALL.gguf_metadata().unwrap();
    let broken = |key: &str, value: Value| {
        let mut metadata = good.clone();
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
        Tokenizer::from_gguf(&gguf(metadata)).unwrap_err()
    };
    let strings = |list: &[&str]| Value::Array(Array::String(list.iter().collect()));
    let bert = broken("model", "bert".into());
    assert!(matches!(&bert, ModelError::Unsupported(text) if text.contains("WordPiece")), "{bert}");
    assert!(broken("model", "llama".into()).to_string().contains("scores"));
    assert!(matches!(broken("pre", "made-up".into()), ModelError::Unsupported(_)));
    assert!(broken("bos_token_id", Value::U32(300)).to_string().contains("bos_token_id"));
    assert!(broken("eos_token_id", "text".into()).to_string().contains("eos_token_id"));
    assert!(broken("token_type", Value::Array(Array::I32(vec![1; 3]))).to_string().contains("3 types"));
    assert!(broken("merges", strings(&["ab"])).to_string().contains("space"));
    // Both sides are tokens, and together longer than any token: lengths the tokenizers crate would trust.
    assert!(broken("merges", strings(&["<|endoftext|> <|endoftext|>"])).to_string().contains("does not fit"));
    assert!(broken("tokens", strings(&["a", "b", "a"])).to_string().contains("token 2 `a`"));
    let mut missing = good.clone();
    missing.shift_remove("tokenizer.ggml.merges");
    assert!(Tokenizer::from_gguf(&gguf(missing)).unwrap_err().to_string().contains("merges"));
}

/// The keys of a SentencePiece model of `tests/golden/spm.json`, made by `tests/golden/spm.py`.
fn pieces(model: &Json) -> Metadata {
    let list = |key: &str| model[key].as_array().unwrap().iter();
    let tokens = list("pieces").map(|t| t.as_str().unwrap()).collect();
    let scores = list("scores").map(|s| s.as_f64().unwrap() as f32).collect();
    let types = list("types").map(|t| t.as_i64().unwrap() as i32).collect();
    [
        ("model", "llama".into()),
        ("tokens", Array::String(tokens).into()),
        ("scores", Array::F32(scores).into()),
        ("token_type", Array::I32(types).into()),
        ("unknown_token_id", Value::U32(0)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
        ("add_space_prefix", model["prefix"].as_bool().unwrap().into()),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .into_iter()
    .collect()
}

#[test]
fn sentencepiece_in_gguf_cuts_as_sentencepiece_does() {
    let golden: Json = serde_json::from_str(include_str!("../golden/spm.json")).unwrap();
    let models = golden["models"].as_array().unwrap();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    for model in models {
        let prefix = model["prefix"] == true;
        let tokenizer = Tokenizer::from_gguf(&gguf(pieces(model))).unwrap();
        assert!(tokenizer.adds_bos(), "as llama.cpp does where nothing is said");
        let other = models.iter().find(|m| m["prefix"] != model["prefix"]).unwrap();
        let other = Tokenizer::from_gguf(&gguf(pieces(other))).unwrap();
        for (text, ids) in texts.iter().zip(model["ids"].as_array().unwrap()) {
            let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            // Behind a token found in the text llama.cpp puts a space as in front of it all, SentencePiece does not.
            if prefix && text.contains("<user>") {
                continue;
            }
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}, prefix: {prefix}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), *text);
            assert!(text.trim().is_empty() || other.encode(text, false).unwrap() != ids, "control: {text:?}");
        }

        // Through a folder, where the merges are, and back to scores.
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        assert_same(&tokenizer, &read, &texts);
        let written = read.gguf_metadata_padded(430).unwrap();
        let again = Tokenizer::from_gguf(&gguf(written.clone())).unwrap();
        for text in &texts {
            assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
        }
        let Value::Array(Array::I32(types)) = &written["tokenizer.ggml.token_type"] else { panic!() };
        let known: Vec<i32> = serde_json::from_value(model["types"].clone()).unwrap();
        assert_eq!(types[..known.len()], known);
        assert!(types[known.len()..].iter().all(|t| *t == 5));
        // From GGUF to GGUF the scores stay as they were.
        let kept = tokenizer.gguf_metadata().unwrap();
        assert_eq!(kept["tokenizer.ggml.scores"], pieces(model)["tokenizer.ggml.scores"]);
    }
}

#[test]
fn merges_that_scores_can_not_say_are_refused() {
    let golden: Json = serde_json::from_str(include_str!("../golden/spm.json")).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf(pieces(&golden["models"][0]))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let json = read_json(&path);
    let error = |change: &dyn Fn(&mut Vec<Json>)| {
        let mut json = json.clone();
        change(json["model"]["merges"].as_array_mut().unwrap());
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap().gguf_metadata().map_err(|e| e.to_string())
    };
    assert!(error(&|_| ()).is_ok(), "control");
    let merges = json["model"]["merges"].as_array().unwrap();
    let piece = |m: &Json| format!("{}{}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
    let same = |i: usize, j: usize| piece(&merges[i]) == piece(&merges[j]);
    let twice = (1..merges.len() - 1).find(|i| same(*i, i - 1) && !same(*i, i + 1)).unwrap();
    assert!(error(&|m| drop(m.remove(twice))).unwrap_err().contains("would join"));
    assert!(error(&|m| m.swap(twice, twice + 1)).unwrap_err().contains("side by side"));
}

#[test]
fn damaged_folders_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_folder(folder.path()), Err(ModelError::Unsupported(_))));
    SMALL.save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let good = read_json(&path);
    let broken = |change: &dyn Fn(&mut Json)| {
        let mut json = good.clone();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).map(drop)
    };
    assert!(broken(&|_| ()).is_ok());
    assert!(broken(&|json| json["model"]["merges"] = json!([["<|endoftext|>", "<|endoftext|>"]])).is_err());
    assert!(broken(&|json| json["model"]["merges"] = json!([["x"]])).is_err());
    assert!(broken(&|json| json["model"]["continuing_subword_prefix"] = "####".into()).is_err());
    assert!(broken(&|json| json["model"]["vocab"] = json!({"a": -1})).is_err());
    assert!(
        broken(&|json| json["pre_tokenizer"] =
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}))
        .is_err()
    );
    assert!(broken(&|json| *json = json!([])).is_err());
    // What the tokenizers crate takes and panics on later.
    let template = |single: Json, ids: Json| json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}}});
    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let config = folder.path().join("tokenizer_config.json");
    let mut plain = read_json(&config);
    plain.as_object_mut().unwrap().retain(|key, _| !key.starts_with("add_"));
    std::fs::write(&config, plain.to_string()).unwrap();
    let processed = |processor: Json| broken(&move |json| json["post_processor"] = processor.clone());
    processed(template(json!([token("<s>"), a]), json!([3]))).unwrap();
    assert!(processed(template(json!([token("</s>"), a]), json!([3]))).is_err());
    assert!(processed(template(json!([a, {"Sequence": {"id": "B", "type_id": 0}}]), json!([3]))).is_err());
    let nested = json!({"type": "Sequence", "processors": [template(json!([token("</s>")]), json!([3]))]});
    assert!(processed(nested).is_err());
    assert!(processed(template(json!([token("<s>"), a]), json!([4_000_000]))).is_err(), "no such row");
    let mut untyped = template(json!([token("</s>"), a]), json!([3]));
    untyped.as_object_mut().unwrap().remove("type");
    let error = processed(untyped).unwrap_err().to_string();
    assert!(error.contains("adds `</s>`, which it does not define"), "{error}");
    let normalized = |normalizer: Json| broken(&move |json| json["normalizer"] = normalizer.clone());
    assert!(normalized(json!({"type": "Precompiled", "precompiled_charsmap": "AAA="})).is_err());
    let replace = |pattern: Json| json!({"type": "Replace", "pattern": pattern, "content": "x"});
    normalized(replace(json!({"Regex": "a"}))).unwrap();
    assert!(normalized(replace(json!({"Regex": ""}))).is_err());
    let nested = json!({"type": "Sequence", "normalizers": [replace(json!({"String": ""}))]});
    assert!(normalized(nested).is_err());
    std::fs::write(&path, good.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "</missing>"}"#).unwrap();
    assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("</missing>"));
}

#[test]
fn end_tokens_keep_their_keys() {
    let mut metadata = SMALL.gguf_metadata().unwrap();
    let eos = "tokenizer.ggml.eos_token_id";
    metadata.shift_remove(eos);
    metadata.insert("tokenizer.ggml.eom_token_id".into(), Value::U32(5));
    let read = Tokenizer::from_gguf(&gguf(metadata.clone())).unwrap();
    assert_eq!(read.eos_ids(), [2, 5]);
    let written = read.gguf_metadata().unwrap();
    for name in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        assert_eq!(written.get(&key), metadata.get(&key), "{key}");
    }

    let folder = tempfile::tempdir().unwrap();
    SMALL.save(folder.path()).unwrap();
    let ends = |ids: Json| {
        let json = json!({"eos_token_id": ids}).to_string();
        std::fs::write(folder.path().join("generation_config.json"), json).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap().gguf_metadata()
    };
    assert_eq!(ends(json!([0, 2, 5])).unwrap()["tokenizer.ggml.eom_token_id"], Value::U32(5));
    let error = ends(json!([0, 2, 5, 6])).unwrap_err().to_string();
    assert!(error.contains("4 end tokens"), "{error}");
}

/// Replaces the value at a random place of `json`.
fn mutate(json: &mut Json, path: &[prop::sample::Index], new: &Json) {
    let Some((at, rest)) = path.split_first() else { return *json = new.clone() };
    match json {
        Json::Object(map) if !map.is_empty() => {
            let at = at.index(map.len());
            mutate(map.values_mut().nth(at).unwrap(), rest, new);
        }
        Json::Array(list) if !list.is_empty() => {
            let at = at.index(list.len());
            mutate(&mut list[at], rest, new);
        }
        other => *other = new.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_change_of_a_tokenizer_panics(
        path in prop::collection::vec(any::<prop::sample::Index>(), 1..6), kind in 0usize..8, number: i64, text: String,
    ) {
        static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
            let folder = tempfile::tempdir().unwrap();
            SMALL.save(folder.path()).unwrap();
            folder
        });
        let file = FOLDER.path().join("tokenizer.json");
        static GOOD: LazyLock<Json> = LazyLock::new(|| read_json(&FOLDER.path().join("tokenizer.json")));
        let mut json = GOOD.clone();
        let new = [json!(null), json!(number), json!(text), json!([]), json!({}), json!(true), json!(""), json!(0)];
        mutate(&mut json, &path, &new[kind]);
        std::fs::write(&file, json.to_string()).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_folder(FOLDER.path()) {
            for text in TEXTS {
                if let Ok(ids) = tokenizer.encode(text, true) {
                    drop(tokenizer.decode(&ids, true));
                }
            }
        }
        std::fs::write(&file, GOOD.to_string()).unwrap();
    }
}

#[test]
fn a_space_swallowing_token_is_refused_by_gguf() {
    let folder = tempfile::tempdir().unwrap();
    SMALL.save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json = read_json(&path);
    json["added_tokens"][1]["rstrip"] = true.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let read = Tokenizer::from_folder(folder.path()).unwrap();
    assert!(matches!(read.gguf_metadata(), Err(ModelError::Unsupported(_))));
}

#[test]
fn smollm2_matches_transformers() {
    let Some(path) = crate::smollm2() else { return };
    let golden = read_json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json"));
    let ids = |case: &Json| -> Vec<u32> {
        case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(checkpoint.gguf().unwrap()).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_ids()), (49152, Some(1), &[2][..]));

    let metadata = tokenizer.gguf_metadata().unwrap();
    for (key, value) in
        checkpoint.gguf().unwrap().metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."))
    {
        assert!(metadata[key] == *value, "{key}");
    }
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let again = Tokenizer::from_gguf(&gguf(metadata)).unwrap();
    let saved = Tokenizer::from_folder(folder.path()).unwrap();

    let texts = golden["texts"].as_array().unwrap();
    for case in texts {
        let text = case["text"].as_str().unwrap();
        for tokenizer in [&tokenizer, &again, &saved] {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(case), "{text}");
        }
        assert_eq!(tokenizer.decode(&ids(case), true).unwrap(), text);
    }
    let template = ChatTemplate::of(&tokenizer).unwrap();
    let chats = golden["chats"].as_array().unwrap();
    for case in chats {
        let messages = [Message::user(case["user"].as_str().unwrap())];
        assert_eq!(template.render(&messages, &ChatOptions::answer()).unwrap(), case["prompt"]);
        assert_eq!(template.encode(&tokenizer, &messages, &ChatOptions::answer()).unwrap(), ids(case));
    }
    assert_eq!((texts.len(), chats.len()), (4, 2));
}
