//! Tokenizers in GGUF metadata: the keys `tokenizer.*`, of byte-level BPE (`tokenizer.ggml.model` = `gpt2`) and of
//! SentencePiece's BPE (`llama`, see `spm.rs`).
//!
//! GGUF names its pre-tokenizers (`tokenizer.ggml.pre`) and leaves their rules to the reader: [`RULES`] is the part of
//! llama.cpp's list that the supported model families use, as the patterns of the models' own `tokenizer.json`.

use std::collections::HashSet;

use firebrick_tensor::checkpoint::Gguf;
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Strings, Value};
use serde_json::{Map, Value as Json, json};

use super::{Kept, Special, Tokenizer, build, merge_pair, spm};
use crate::ModelError;

/// How text is cut before the merges.
struct Rules {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Text is normalized to NFC.
    nfc: bool,
    cuts: &'static [Cut],
    /// A word that is a token needs no merges.
    ignore_merges: bool,
    /// What `tokenizer.ggml.add_bos_token` is when it is missing.
    add_bos: bool,
}

enum Cut {
    Digits,
    Gpt2Words,
    Pattern(&'static str),
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const RULES: [Rules; 7] = [
    Rules {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais"],
        nfc: false,
        cuts: &[Cut::Gpt2Words],
        ignore_merges: false,
        add_bos: false,
    },
    Rules {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        nfc: false,
        cuts: &[Cut::Digits, Cut::Gpt2Words],
        ignore_merges: false,
        add_bos: false,
    },
    Rules {
        names: &["llama-bpe", "llama3", "llama-v3"],
        nfc: false,
        cuts: &[Cut::Pattern(LLAMA3)],
        ignore_merges: true,
        add_bos: true,
    },
    Rules {
        names: &["smaug-bpe", "dbrx"],
        nfc: false,
        cuts: &[Cut::Pattern(LLAMA3)],
        ignore_merges: false,
        add_bos: false,
    },
    Rules {
        names: &["qwen2", "deepseek-r1-qwen"],
        nfc: true,
        cuts: &[Cut::Pattern(QWEN2)],
        ignore_merges: false,
        add_bos: false,
    },
    Rules {
        names: &["tekken"],
        nfc: false,
        cuts: &[Cut::Pattern(TEKKEN)],
        ignore_merges: true,
        add_bos: true,
    },
    Rules {
        names: &["default"],
        nfc: false,
        cuts: &[
            Cut::Pattern(r"[\p{P}\$\+<=>\^~\|]+"),
            Cut::Pattern(GPT2),
            Cut::Pattern(r"\p{N}+"),
            Cut::Pattern("[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        add_bos: false,
    },
];

impl Rules {
    fn named(pre: &str) -> Result<&'static Rules, ModelError> {
        RULES.iter().find(|rules| rules.names.contains(&pre)).ok_or_else(|| {
            let known: Vec<&str> = RULES.iter().flat_map(|rules| rules.names).copied().collect();
            ModelError::Unsupported(format!("tokenizer.ggml.pre `{pre}`; known are {}", known.join(", ")))
        })
    }

    fn normalizer(&self) -> Json {
        if self.nfc { json!({"type": "NFC"}) } else { Json::Null }
    }

    fn pre_tokenizer(&self) -> Json {
        let mut steps: Vec<Json> = self
            .cuts
            .iter()
            .map(|cut| match cut {
                Cut::Digits => json!({"type": "Digits", "individual_digits": true}),
                Cut::Gpt2Words => byte_level(true),
                Cut::Pattern(regex) => json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}),
            })
            .collect();
        if !matches!(self.cuts.last(), Some(Cut::Gpt2Words)) {
            steps.push(byte_level(false));
        }
        if steps.len() == 1 { steps.remove(0) } else { json!({"type": "Sequence", "pretokenizers": steps}) }
    }

    /// Whether a `tokenizer.json` cuts text this way.
    fn describes(&self, json: &Json) -> bool {
        json["normalizer"] == self.normalizer()
            && steps(&json["pre_tokenizer"]) == steps(&self.pre_tokenizer())
            && json["model"]["ignore_merges"].as_bool().unwrap_or(false) == self.ignore_merges
    }
}

fn byte_level(words: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words})
}

/// The steps of a pre-tokenizer, without what only moves offsets.
fn steps(pre_tokenizer: &Json) -> Vec<Json> {
    match pre_tokenizer["pretokenizers"].as_array() {
        Some(list) if pre_tokenizer["type"] == "Sequence" => list.iter().flat_map(steps).collect(),
        _ => {
            let mut step = pre_tokenizer.clone();
            if let Some(map) = step.as_object_mut() {
                map.remove("trim_offsets");
            }
            vec![step]
        }
    }
}

/// The pre-tokenizer that GGUF calls `pre`, as in `tokenizer.json`.
pub(super) fn pre_tokenizer_json(pre: &str) -> Result<Json, ModelError> {
    Ok(Rules::named(pre)?.pre_tokenizer())
}

/// A `tokenizer.json` of byte-level BPE; `types` are GGUF token types by id (1 where there are none).
pub(super) fn byte_level_json(
    pre: &str,
    vocab: Map<String, Json>,
    merges: Vec<Json>,
    types: &[i32],
) -> Result<Json, ModelError> {
    let rules = Rules::named(pre)?;
    let added =
        added_tokens(vocab.iter().filter_map(|(t, id)| Some((t.as_str(), id.as_u64()? as usize))), types);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": rules.normalizer(),
        "pre_tokenizer": rules.pre_tokenizer(),
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rules.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// The tokens that are looked for in a text before it is cut, as in `tokenizer.json`.
fn added_tokens<'a>(tokens: impl Iterator<Item = (&'a str, usize)>, types: &[i32]) -> Vec<Json> {
    let added = tokens.filter_map(|(content, id)| {
        let kind = types.get(id).copied().unwrap_or(NORMAL);
        let special = matches!(kind, UNKNOWN | CONTROL);
        (special || kind == USER).then(|| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special})
        })
    });
    added.collect()
}

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

const MODEL: &str = "tokenizer.ggml.model";
const SPM: &str = "llama";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
const UNK: &str = "tokenizer.ggml.unknown_token_id";
const PAD: &str = "tokenizer.ggml.padding_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const TEMPLATE: &str = "tokenizer.chat_template";
const OURS: [&str; 15] = [
    MODEL,
    PRE,
    TOKENS,
    TOKEN_TYPE,
    MERGES,
    BOS,
    EOS[0],
    EOS[1],
    EOS[2],
    UNK,
    PAD,
    ADD_BOS,
    ADD_EOS,
    SPACE_PREFIX,
    TEMPLATE,
];

impl Tokenizer {
    /// Builds the tokenizer that the `tokenizer.*` keys of a GGUF file describe.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for other types than byte-level and SentencePiece's BPE, and for unknown pre-tokenizers;
    /// [`ModelError::Tokenizer`] with everything that does not fit together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, ModelError> {
        let model = gguf.str(MODEL)?;
        if model != "gpt2" && model != SPM {
            let kind = match model {
                "bert" => " (WordPiece)",
                "t5" => " (Unigram)",
                _ => "",
            };
            return Err(ModelError::Unsupported(format!(
                "{}: tokenizer type `{model}`{kind} in GGUF; only `gpt2` (byte-level BPE) and `llama` (SentencePiece's BPE) are read, other types from tokenizer.json",
                gguf.path.display()
            )));
        }
        let pre = gguf.optional(PRE, Gguf::str)?.unwrap_or("default");
        let rules = Rules::named(pre).map_err(|e| match e {
            ModelError::Unsupported(what) => {
                ModelError::Unsupported(format!("{}: {what}", gguf.path.display()))
            }
            other => other,
        })?;
        let tokens = gguf.strings(TOKENS)?;
        let types = gguf.optional(TOKEN_TYPE, Gguf::i32s)?.unwrap_or_default();

        let mut problems = Vec::new();
        if !types.is_empty() && types.len() != tokens.len() {
            problems.push(format!("{} tokens have {} types", tokens.len(), types.len()));
        }
        let mut vocab = Map::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = vocab.insert(token.to_string(), id.into()) {
                problems.push(format!("token {id} `{token}` is token {other} too"));
            }
        }
        let mut merges = Vec::new();
        let listed = if model == SPM { None } else { Some(gguf.strings(MERGES)?) };
        for merge in listed.into_iter().flat_map(|list| list.iter()) {
            match merge.split_once(' ') {
                Some((a, b)) => merges.push(json!([a, b])),
                None => problems.push(format!("merge `{merge}` has no space")),
            }
        }
        let mut id = |key: &str| -> Result<Option<u32>, ModelError> {
            let id = gguf.optional(key, Gguf::u32)?;
            if let Some(id) = id.filter(|id| *id as usize >= tokens.len()) {
                problems.push(format!("{key} is {id}, there are {} tokens", tokens.len()));
            }
            Ok(id)
        };
        let mut special = Special { bos: id(BOS)?, unk: id(UNK)?, pad: id(PAD)?, ..Special::default() };
        let mut ends = Vec::new();
        for key in EOS {
            let Some(id) = id(key)? else { continue };
            ends.push((key, id));
            if !special.eos.contains(&id) {
                special.eos.push(id);
            }
        }
        let origin = gguf.path.display().to_string();
        let prefix = gguf.optional(SPACE_PREFIX, Gguf::bool)?.unwrap_or(true);
        let mut pieces = None;
        if model == SPM && problems.is_empty() {
            let scores = gguf.f32s(SCORES)?;
            let kind = |id: usize| types.get(id).copied().unwrap_or(NORMAL);
            let added = added_tokens(tokens.iter().enumerate().map(|(id, token)| (token, id)), &types);
            match spm::tokenizer_json(tokens, scores, |id| kind(id) == NORMAL, added, special.unk, prefix) {
                Ok(json) => pieces = Some(json),
                Err(found) => problems.extend(found),
            }
        }
        if !problems.is_empty() {
            let shown = problems[..problems.len().min(5)].join("; ");
            let more =
                if problems.len() > 5 { format!("; {} more", problems.len() - 5) } else { String::new() };
            return Err(ModelError::Tokenizer(format!("{origin}: {shown}{more}")));
        }

        let adds = pieces.is_some() || rules.add_bos;
        let json = match pieces {
            Some(json) => json,
            None => byte_level_json(pre, vocab, merges, &types)?,
        };
        let inner = build(json, &origin)?;
        let add_bos = gguf.optional(ADD_BOS, Gguf::bool)?.unwrap_or(adds);
        let add_eos = gguf.optional(ADD_EOS, Gguf::bool)?.unwrap_or(false);
        let template = gguf.optional(TEMPLATE, Gguf::str)?.map(String::from);
        let foreign = gguf
            .metadata
            .iter()
            .filter(|(key, _)| key.starts_with("tokenizer.") && !OURS.contains(&key.as_str()));
        let kept = Kept {
            pre: Some(pre.into()),
            token_type: types,
            ends,
            gguf: foreign.map(|(key, value)| (key.clone(), value.clone())).collect(),
            ..Kept::default()
        };
        let mut tokenizer = Tokenizer::assemble(inner, special, template, kept);
        tokenizer.set_added(add_bos, add_eos)?;
        Ok(tokenizer)
    }

    /// The `tokenizer.*` keys of a GGUF file, from which [`Tokenizer::from_gguf`] makes a tokenizer that encodes the
    /// same; keys this crate does not know come along from the GGUF file that was read.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] when the tokenizer is neither byte-level nor SentencePiece's BPE, cuts text in a way GGUF has no name for, or has
    /// more than three end tokens, for which GGUF has keys.
    pub fn gguf_metadata(&self) -> Result<Metadata, ModelError> {
        self.gguf_metadata_padded(self.vocab_size())
    }

    /// As [`Tokenizer::gguf_metadata`], with unused tokens up to the `rows` of the embedding: GGUF readers want one
    /// token per row.
    ///
    /// # Errors
    /// As [`Tokenizer::gguf_metadata`], and when the embedding has fewer rows than the vocabulary.
    pub fn gguf_metadata_padded(&self, rows: usize) -> Result<Metadata, ModelError> {
        if rows < self.vocab_size() {
            return Err(ModelError::Tokenizer(format!(
                "{} tokens, but {rows} embedding rows",
                self.vocab_size()
            )));
        }
        let json = serde_json::to_value(&self.inner).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        let pieces = spm::describes(&json);
        let (tokens, mut types) = self.gguf_tokens(&json, rows);
        let mut metadata = Metadata::new();
        let mut put = |key: &str, value: Value| drop(metadata.insert(key.into(), value));
        if pieces.is_some() {
            refuse_greedy(&json)?;
            let scores = spm::scores(&json, rows);
            let scores =
                scores.map_err(|e| ModelError::Unsupported(format!("{e}: this has no place in GGUF")))?;
            for (id, kind) in types.iter_mut().enumerate() {
                let byte = |token: &str| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
                if *kind == NORMAL && tokens.get(id).is_some_and(byte) {
                    *kind = BYTE;
                } else if self.special.unk == Some(id as u32) {
                    *kind = UNKNOWN;
                }
            }
            put(MODEL, SPM.into());
            put(PRE, "default".into());
            put(TOKENS, Array::String(tokens).into());
            put(SCORES, Array::F32(self.kept_scores(rows).unwrap_or(scores)).into());
            put(TOKEN_TYPE, Array::I32(types).into());
        } else {
            let pre = self.gguf_pre(&json)?;
            let mut merges = Strings::default();
            for merge in json["model"]["merges"].as_array().into_iter().flatten() {
                match merge_pair(merge) {
                    Some((a, b)) if !a.contains(' ') && !b.contains(' ') => merges.push(&format!("{a} {b}")),
                    _ => {
                        return Err(ModelError::Unsupported(format!(
                            "merge {merge} has a space and can't be written to GGUF"
                        )));
                    }
                }
            }
            put(MODEL, "gpt2".into());
            put(PRE, pre.into());
            put(TOKENS, Array::String(tokens).into());
            put(TOKEN_TYPE, Array::I32(types).into());
            put(MERGES, Array::String(merges).into());
        }
        let Special { bos, eos, pad, unk, add_bos, add_eos } = &self.special;
        if eos.len() > EOS.len() {
            return Err(ModelError::Unsupported(format!(
                "{} end tokens ({eos:?}) in GGUF, which has keys for {}",
                eos.len(),
                EOS.len()
            )));
        }
        let ends = match &self.kept.ends[..] {
            [] => EOS.into_iter().zip(eos.iter().copied()).collect::<Vec<_>>(),
            kept => kept.to_vec(),
        };
        let one = |key, id: &Option<u32>| id.map(|id| (key, id));
        for (key, id) in one(BOS, bos).into_iter().chain(ends).chain(one(UNK, unk)).chain(one(PAD, pad)) {
            put(key, id.into());
        }
        put(SPACE_PREFIX, pieces.unwrap_or(false).into());
        put(ADD_BOS, (*add_bos).into());
        put(ADD_EOS, (*add_eos).into());
        if let Some(source) = &self.chat_template {
            put(TEMPLATE, source.as_str().into());
        }
        let foreign = self.kept.gguf.iter().filter(|(key, _)| pieces.is_none() || *key != SCORES);
        metadata.extend(foreign.map(|(key, value)| (key.clone(), value.clone())));
        Ok(metadata)
    }

    /// The scores of the GGUF file this was read from, with 0 for the tokens up to `rows`.
    fn kept_scores(&self, rows: usize) -> Option<Vec<f32>> {
        match self.kept.gguf.get(SCORES) {
            Some(Value::Array(Array::F32(scores))) => {
                let mut scores = scores.clone();
                scores.resize(rows, 0.0);
                Some(scores)
            }
            _ => None,
        }
    }

    /// GGUF's name for how this tokenizer cuts text.
    fn gguf_pre(&self, json: &Json) -> Result<&str, ModelError> {
        let model = &json["model"];
        let kind = model["type"].as_str().unwrap_or("unknown");
        let plain = |name: &str| model[name].as_str().unwrap_or("").is_empty();
        let bytes =
            json["decoder"]["type"] == "ByteLevel" && !model["byte_fallback"].as_bool().unwrap_or(false);
        if kind != "BPE" || !bytes || !plain("continuing_subword_prefix") || !plain("end_of_word_suffix") {
            return Err(ModelError::Unsupported(format!(
                "a {kind} tokenizer in GGUF; only byte-level BPE can be written"
            )));
        }
        refuse_greedy(json)?;
        if let Some(pre) = &self.kept.pre {
            return Ok(pre);
        }
        RULES.iter().find(|rules| rules.describes(json)).map(|rules| rules.names[0]).ok_or_else(|| {
            ModelError::Unsupported(format!(
                "GGUF has no known name for the pre-tokenizer {} with the normalizer {}",
                json["pre_tokenizer"], json["normalizer"]
            ))
        })
    }

    /// Every token by id with its type; ids without one get a name that no text contains.
    fn gguf_tokens(&self, json: &Json, rows: usize) -> (Strings, Vec<i32>) {
        let mut types = vec![NORMAL; rows];
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let id = token["id"].as_u64().unwrap_or(u64::MAX) as usize;
            if let Some(kind) = types.get_mut(id) {
                *kind = if token["special"] == true { CONTROL } else { USER };
            }
        }
        for (kind, kept) in types.iter_mut().zip(&self.kept.token_type) {
            *kind = *kept;
        }
        let tokens: Vec<Option<String>> = (0..rows as u32).map(|id| self.token(id)).collect();
        let taken: HashSet<&str> = tokens.iter().flatten().map(String::as_str).collect();
        let spelled = tokens.iter().enumerate().map(|(id, token)| match token {
            Some(token) => token.clone(),
            None => {
                types[id] = UNUSED;
                let mut name = format!("[PAD{id}]");
                while taken.contains(name.as_str()) {
                    name.push('_');
                }
                name
            }
        });
        let strings = spelled.collect();
        (strings, types)
    }
}

/// Tokens that take neighbouring spaces with them.
fn refuse_greedy(json: &Json) -> Result<(), ModelError> {
    let greedy = |token: &&Json| ["single_word", "lstrip", "rstrip"].iter().any(|flag| token[flag] == true);
    match json["added_tokens"].as_array().into_iter().flatten().find(greedy) {
        None => Ok(()),
        Some(token) => Err(ModelError::Unsupported(format!(
            "token {} swallows spaces, which GGUF can't say",
            token["content"]
        ))),
    }
}
