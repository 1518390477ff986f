//! Tokenizers: Hugging Face's `tokenizer.json`, the keys of a GGUF file, or a byte-level BPE trained here.

mod gguf;
mod spm;
mod stream;
mod train;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use firebrick_core::{read_file, write_atomic};
use firebrick_tensor::checkpoint::Value;
use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

pub use stream::DecodeStream;
pub use train::{SPECIAL_TOKENS, train_bpe};

use crate::ModelError;

/// Text to token ids and back, with what belongs to it: special ids, chat template, and the files it came from.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    rows: usize,
    special: Special,
    chat_template: Option<String>,
    kept: Kept,
}

/// Ids with a meaning, and whether encoding adds them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Special {
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    add_bos: bool,
    add_eos: bool,
}

/// What was read and is written back as it was.
#[derive(Clone, Debug, Default)]
struct Kept {
    json: Option<Vec<u8>>,
    /// Of `tokenizer_config.json`; gone once something in it has changed.
    config_bytes: Option<Vec<u8>>,
    config: Map<String, Json>,
    generation: Option<Vec<u8>>,
    special_map: Option<Vec<u8>>,
    template_file: bool,
    pre: Option<String>,
    token_type: Vec<i32>,
    /// The end tokens of a GGUF file by key.
    ends: Vec<(&'static str, u32)>,
    gguf: IndexMap<String, Value>,
}

const JSON_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_FILE: &str = "special_tokens_map.json";
const GENERATION_FILE: &str = "generation_config.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Most bytes of each: several times the largest vocabulary there is.
const MAX_FILE: u64 = 256 << 20;

impl Tokenizer {
    /// Reads a Hugging Face model folder: `tokenizer.json`, and where they are there `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` (more end tokens) and `chat_template.jinja`.
    ///
    /// As in transformers 5, `add_bos_token` and `add_eos_token` of the configuration rule over the post-processor of
    /// `tokenizer.json`, whose truncation and padding are ignored.
    ///
    /// # Errors
    /// When a file can't be read or does not hold a tokenizer, or the begin or end token is not in the vocabulary.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Tokenizer, ModelError> {
        let folder = folder.as_ref();
        let path = folder.join(JSON_FILE);
        let Some(bytes) = read(&path)? else {
            return Err(ModelError::Unsupported(format!("{} has no {JSON_FILE}", folder.display())));
        };
        let inner = parse_json(&path, &bytes).and_then(|json| build(json, &path.display().to_string()))?;
        let (config_bytes, config) = read_map(&folder.join(CONFIG_FILE))?;
        let (generation_bytes, generation) = read_map(&folder.join(GENERATION_FILE))?;
        let (special_map, fallback) = read_map(&folder.join(SPECIAL_FILE))?;

        let named = |name: &str| token_text(config.get(name)).or_else(|| token_text(fallback.get(name)));
        let mut problems = Vec::new();
        let mut required = |name: &str| {
            let text = named(name)?;
            let id = inner.token_to_id(&text);
            if id.is_none() {
                problems.push(format!("{name} `{text}` is not in the vocabulary"));
            }
            id
        };
        let mut special = Special {
            bos: required("bos_token"),
            eos: required("eos_token").into_iter().collect(),
            pad: named("pad_token").and_then(|text| inner.token_to_id(&text)),
            unk: named("unk_token").and_then(|text| inner.token_to_id(&text)),
            ..Special::default()
        };
        if !problems.is_empty() {
            return Err(ModelError::Tokenizer(format!("{}: {}", folder.display(), problems.join("; "))));
        }
        // Transformers' files may name ids that the vocabulary does not have.
        let known = |id: &u32| inner.id_to_token(*id).is_some();
        for id in ids(generation.get("eos_token_id")).into_iter().filter(known) {
            if !special.eos.contains(&id) {
                special.eos.push(id);
            }
        }
        special.bos = special.bos.or_else(|| ids(generation.get("bos_token_id")).into_iter().find(known));
        special.pad = special.pad.or_else(|| ids(generation.get("pad_token_id")).into_iter().find(known));

        let template_file = read(&folder.join(TEMPLATE_FILE))?;
        let chat_template = match &template_file {
            Some(bytes) => Some(String::from_utf8(bytes.clone()).map_err(|e| {
                ModelError::ChatTemplate(format!("{}: {e}", folder.join(TEMPLATE_FILE).display()))
            })?),
            None => template_text(config.get("chat_template")),
        };
        let flag = |name: &str| config.get(name).and_then(Json::as_bool);
        let flags = (flag("add_bos_token"), flag("add_eos_token"));
        let kept = Kept {
            json: Some(bytes),
            config_bytes,
            config,
            generation: generation_bytes,
            special_map,
            template_file: template_file.is_some(),
            ..Kept::default()
        };
        let mut tokenizer = Tokenizer::assemble(inner, special, chat_template, kept);
        if flags.0.is_some() || flags.1.is_some() {
            tokenizer.set_added(flags.0.unwrap_or(false), flags.1.unwrap_or(false))?;
        } else {
            tokenizer.find_added()?;
        }
        Ok(tokenizer)
    }

    fn assemble(
        inner: tokenizers::Tokenizer,
        special: Special,
        chat_template: Option<String>,
        kept: Kept,
    ) -> Tokenizer {
        let rows = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Tokenizer { inner, rows, special, chat_template, kept }
    }

    /// The ids of `text`. Texts of special tokens in it become those tokens. `add_special` adds what the model expects
    /// around a text (a begin token, say); prompts from a chat template have it already.
    ///
    /// # Errors
    /// When the tokenizer fails, as one without an unknown token does on text outside its alphabet, or its
    /// post-processor adds an id that the vocabulary has not.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        let ids = guarded(|| Ok(self.inner.encode_fast(text, add_special)?.get_ids().to_vec()))?;
        match ids.iter().find(|id| **id as usize >= self.rows) {
            Some(id) => {
                Err(ModelError::Tokenizer(format!("id {id} is not in the vocabulary of {}", self.rows)))
            }
            None => Ok(ids),
        }
    }

    /// The text of `ids`; `skip_special` leaves special tokens out. Ids without a token are left out, and bytes that
    /// are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        guarded(|| self.inner.decode(ids, skip_special))
    }

    /// Decodes ids one by one, see [`DecodeStream`].
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// Rows an embedding needs: the highest id plus one. (Models often have more, for alignment.)
    pub fn vocab_size(&self) -> usize {
        self.rows
    }

    /// The token of `id` as the vocabulary spells it (in byte-level vocabularies a space is `Ġ`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of `token` as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Ids that end a text, the tokenizer's own first; the others come from `generation_config.json` or GGUF's end of
    /// turn and end of message.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The id that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The id that fills up batches.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad
    }

    /// The id of unknown tokens.
    pub fn unk_id(&self) -> Option<u32> {
        self.special.unk
    }

    /// Whether [`Tokenizer::encode`] with `add_special` begins with [`Tokenizer::bos_id`].
    pub fn adds_bos(&self) -> bool {
        self.special.add_bos
    }

    /// Source of the chat template, see [`crate::chat::ChatTemplate::of`].
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Replaces the chat template.
    pub fn set_chat_template(&mut self, source: Option<String>) {
        self.kept.config.shift_remove("chat_template");
        self.kept.config_bytes = None;
        self.kept.template_file = false;
        self.chat_template = source;
    }

    /// Writes the files of [`Tokenizer::files`], each atomically.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), ModelError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| ModelError::io(folder, e))?;
        for (name, bytes) in self.files()? {
            let path = folder.join(name);
            write_atomic(&path, &bytes).map_err(|e| ModelError::io(&path, e))?;
        }
        Ok(())
    }

    /// Names and contents of `tokenizer.json`, `tokenizer_config.json`, and where there is something to say
    /// `generation_config.json`, `special_tokens_map.json` and `chat_template.jinja`, as transformers' `AutoTokenizer`
    /// reads them. Files this tokenizer was read from come back with all they held.
    ///
    /// # Errors
    /// When the tokenizer can't be written as JSON.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let json = match &self.kept.json {
            Some(bytes) => bytes.clone(),
            None => {
                self.inner.to_string(true).map_err(|e| ModelError::Tokenizer(e.to_string()))?.into_bytes()
            }
        };
        let config = match &self.kept.config_bytes {
            Some(bytes) => bytes.clone(),
            None => pretty(&self.config())?,
        };
        let generation = match &self.kept.generation {
            Some(bytes) => Some(bytes.clone()),
            None if self.kept.json.is_none() => Some(pretty(&self.generation())?),
            None => None,
        };
        let mut files = vec![(JSON_FILE.to_string(), json), (CONFIG_FILE.to_string(), config)];
        files.extend(generation.map(|bytes| (GENERATION_FILE.to_string(), bytes)));
        files.extend(self.kept.special_map.clone().map(|bytes| (SPECIAL_FILE.to_string(), bytes)));
        // A list of named templates lives in the configuration, and a file would hide all but one of it.
        let listed = self.kept.config.get("chat_template").is_some_and(Json::is_array);
        if let Some(source) = self.chat_template.as_ref().filter(|_| self.kept.template_file || !listed) {
            files.push((TEMPLATE_FILE.to_string(), source.clone().into_bytes()));
        }
        Ok(files)
    }

    /// `tokenizer_config.json`: what was read, or made from what is known, with the chat template.
    fn config(&self) -> Map<String, Json> {
        let mut config = self.kept.config.clone();
        if self.kept.json.is_none() {
            config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
            let Special { bos, eos, pad, unk, .. } = &self.special;
            let names = ["bos_token", "eos_token", "pad_token", "unk_token"];
            for (name, id) in names.into_iter().zip([*bos, eos.first().copied(), *pad, *unk]) {
                if let Some(token) = id.and_then(|id| self.token(id)) {
                    config.insert(name.into(), token.into());
                }
            }
            config.insert("add_bos_token".into(), self.special.add_bos.into());
            config.insert("add_eos_token".into(), self.special.add_eos.into());
            config.insert("clean_up_tokenization_spaces".into(), false.into());
        }
        // Transformers before 4.43 read templates from here only; a folder that had the file alone stays as it was.
        if let (Some(source), false) = (&self.chat_template, self.kept.template_file) {
            config.entry("chat_template").or_insert_with(|| source.as_str().into());
        }
        config
    }

    /// Names the special tokens in the object of a `config.json`; null where there is none.
    pub fn put_ids(&self, config: &mut Json) {
        for (name, id) in self.special_ids() {
            config[name] = id;
        }
    }

    /// `generation_config.json` with the ids that transformers' `generate` needs.
    fn generation(&self) -> Map<String, Json> {
        let there = self.special_ids().into_iter().filter(|(_, id)| !id.is_null());
        there.map(|(name, id)| (name.to_string(), id)).collect()
    }

    /// The ids of the special tokens by transformers' names: null, a number, or a list where there are several.
    fn special_ids(&self) -> [(&'static str, Json); 3] {
        let Special { bos, eos, pad, .. } = &self.special;
        let end = match &eos[..] {
            [] => Json::Null,
            [one] => (*one).into(),
            many => many.into(),
        };
        [("bos_token_id", (*bos).into()), ("eos_token_id", end), ("pad_token_id", (*pad).into())]
    }

    /// Makes encoding add a begin and an end token, or nothing.
    fn set_added(&mut self, bos: bool, eos: bool) -> Result<(), ModelError> {
        let begin = if bos { self.special.bos } else { None };
        let end = if eos { self.special.eos.first().copied() } else { None };
        self.special.add_bos = begin.is_some();
        self.special.add_eos = end.is_some();
        let piece = |id: Option<u32>, kind: u32| -> Vec<Json> {
            let token = id.and_then(|id| self.token(id));
            token.map(|token| json!({"SpecialToken": {"id": token, "type_id": kind}})).into_iter().collect()
        };
        let text = |name: &str, kind: u32| -> Vec<Json> {
            let middle = vec![json!({"Sequence": {"id": name, "type_id": kind}})];
            [piece(begin, kind), middle, piece(end, kind)].concat()
        };
        let mut tokens = Map::new();
        for id in [begin, end].into_iter().flatten() {
            let token = self
                .token(id)
                .ok_or_else(|| ModelError::Tokenizer(format!("special id {id} is not in the vocabulary")))?;
            tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        let processor = (!tokens.is_empty()).then(|| {
            let (single, pair) = (text("A", 0), [text("A", 0), text("B", 1)].concat());
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
        });
        let processor: Option<tokenizers::PostProcessorWrapper> = processor
            .map(serde_json::from_value)
            .transpose()
            .map_err(|e| ModelError::Tokenizer(e.to_string()))?;
        self.inner.with_post_processor(processor);
        Ok(())
    }

    /// Finds out what the post-processor adds.
    fn find_added(&mut self) -> Result<(), ModelError> {
        let (bare, full) = (self.encode("a", false)?, self.encode("a", true)?);
        let longer = full.len() > bare.len();
        self.special.add_bos = longer && self.special.bos.is_some_and(|id| full.first() == Some(&id));
        self.special.add_eos = longer && full.last().is_some_and(|id| self.special.eos.contains(id));
        Ok(())
    }
}

/// A tokenizer from the contents of a `tokenizer.json`; `origin` names it in errors.
fn build(json: Json, origin: &str) -> Result<tokenizers::Tokenizer, ModelError> {
    let fail = |what: String| ModelError::Tokenizer(format!("{origin}: {what}"));
    if let Some(model) = json.get("model") {
        let problems = merge_problems(model);
        if !problems.is_empty() {
            let more =
                if problems.len() > 5 { format!(" and {} more", problems.len() - 5) } else { String::new() };
            return Err(fail(problems[..problems.len().min(5)].join("; ") + &more));
        }
    }
    let mut problems = template_problems(&json["post_processor"]);
    problems.extend(pattern_problems(&json["normalizer"]));
    problems.extend(pattern_problems(&json["decoder"]));
    if !problems.is_empty() {
        return Err(fail(problems.join("; ")));
    }
    let inner = guarded(|| {
        let mut inner: tokenizers::Tokenizer = serde_json::from_value(json)?;
        inner.with_truncation(None)?;
        inner.with_padding(None);
        Ok(inner)
    });
    inner.map_err(|e| match e {
        ModelError::Tokenizer(what) => fail(what),
        other => other,
    })
}

/// Runs code of the tokenizers crate, which panics on some of the files it reads.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ModelError> {
    let panicked = |_| ModelError::Tokenizer("the tokenizers library fails on it".into());
    catch_unwind(AssertUnwindSafe(work)).map_err(panicked)?.map_err(|e| ModelError::Tokenizer(e.to_string()))
}

/// Templates of a post-processor that ask for tokens or texts that are not there, which the tokenizers crate finds out
/// when it encodes. It takes templates by their form too, without a type.
fn template_problems(processor: &Json) -> Vec<String> {
    let nested = processor["processors"].as_array().into_iter().flatten().flat_map(template_problems);
    let mut problems: Vec<String> = nested.collect();
    for piece in ["single", "pair"].iter().flat_map(|name| processor[name].as_array()).flatten() {
        if let Some(token) = piece["SpecialToken"]["id"].as_str()
            && processor["special_tokens"].get(token).is_none()
        {
            problems.push(format!("the post-processor adds `{token}`, which it does not define"));
        }
    }
    if processor["single"].as_array().into_iter().flatten().any(|piece| piece["Sequence"]["id"] == "B") {
        problems.push("the post-processor wants a second text where there is one".into());
    }
    problems
}

/// Replacements of nothing by something, and tables whose size is not that of their data, for which memory would be taken.
fn pattern_problems(step: &Json) -> Vec<String> {
    let steps = ["normalizers", "decoders"].iter().flat_map(|name| step[name].as_array()).flatten();
    let mut problems: Vec<String> = steps.flat_map(pattern_problems).collect();
    if step["type"] == "Replace" && ["String", "Regex"].iter().any(|kind| step["pattern"][kind] == "") {
        problems.push("a replacement of the empty text".into());
    }
    if let (Some("Precompiled"), Some(map)) = (step["type"].as_str(), step["precompiled_charsmap"].as_str())
        && table_bytes(map).is_none_or(|bytes| bytes > map.len() / 4 * 3)
    {
        problems.push("a precompiled table longer than its data".into());
    }
    problems
}

/// The size that a precompiled table (SentencePiece's, in base 64) begins with: 32 bits, little-endian.
fn table_bytes(base64: &str) -> Option<usize> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(u64::from(c - b'A')),
        b'a'..=b'z' => Some(u64::from(c - b'a') + 26),
        b'0'..=b'9' => Some(u64::from(c - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    // Six digits are 36 bits, of which the upper 32 are the first four bytes.
    let bits = base64.as_bytes().get(..6)?.iter().try_fold(0, |bits, &c| Some(bits << 6 | digit(c)?))?;
    Some(((bits >> 4) as u32).swap_bytes() as usize)
}

/// Merges that the vocabulary can't make: the tokenizers crate takes these on trust, down to their lengths.
fn merge_problems(model: &Json) -> Vec<String> {
    let (Some(Json::Object(vocab)), Some(Json::Array(merges))) = (model.get("vocab"), model.get("merges"))
    else {
        return Vec::new();
    };
    let prefix = model.get("continuing_subword_prefix").and_then(Json::as_str).unwrap_or("");
    let mut problems = Vec::new();
    for merge in merges {
        let pair = merge_pair(merge);
        let made = pair.and_then(|(a, b)| Some(format!("{a}{}", b.strip_prefix(prefix)?)));
        let known = |token: &str| vocab.contains_key(token);
        match (pair, made) {
            (Some((a, b)), Some(made)) if known(a) && known(b) && known(&made) => {}
            _ => problems.push(format!("merge {merge} does not fit the vocabulary")),
        }
    }
    problems
}

/// The two sides of a merge, written as `"a b"` or `["a", "b"]`.
fn merge_pair(merge: &Json) -> Option<(&str, &str)> {
    match merge {
        Json::String(text) => text.split_once(' '),
        Json::Array(sides) => match &sides[..] {
            [Json::String(a), Json::String(b)] => Some((a, b)),
            _ => None,
        },
        _ => None,
    }
}

/// The text of a special token: a string, or an object with `content`.
fn token_text(value: Option<&Json>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content").and_then(Json::as_str)).map(String::from)
}

/// A template, or the one named `default` of a list.
fn template_text(value: Option<&Json>) -> Option<String> {
    match value? {
        Json::String(text) => Some(text.clone()),
        Json::Array(list) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .and_then(|entry| entry.get("template").and_then(Json::as_str))
            .map(String::from),
        _ => None,
    }
}

/// An id or a list of ids.
fn ids(value: Option<&Json>) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Json::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    match read_file(path, MAX_FILE) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ModelError::io(path, e)),
    }
}

fn parse_json(path: &Path, bytes: &[u8]) -> Result<Json, ModelError> {
    serde_json::from_slice(bytes).map_err(|e| ModelError::Tokenizer(format!("{}: {e}", path.display())))
}

type JsonFile = (Option<Vec<u8>>, Map<String, Json>);

/// The bytes of a JSON file and the object in it; empty where there is no file.
fn read_map(path: &Path) -> Result<JsonFile, ModelError> {
    let Some(bytes) = read(path)? else { return Ok((None, Map::new())) };
    match parse_json(path, &bytes)? {
        Json::Object(map) => Ok((Some(bytes), map)),
        _ => Err(ModelError::Tokenizer(format!("{}: not a JSON object", path.display()))),
    }
}

fn pretty(map: &Map<String, Json>) -> Result<Vec<u8>, ModelError> {
    let text = serde_json::to_string_pretty(map).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
    Ok((text + "\n").into_bytes())
}
