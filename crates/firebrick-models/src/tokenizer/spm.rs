//! SentencePiece's BPE in GGUF (`tokenizer.ggml.model` = `llama`): scores of pieces in place of a list of merges.
//!
//! SentencePiece joins the neighbours whose union has the highest score, whatever they are; a `tokenizer.json` lists the
//! pairs that may be joined, the first one first. The list made here is transformers': every split of every piece into
//! two pieces, by falling score.

use std::collections::{BTreeMap, HashMap};

use firebrick_tensor::checkpoint::gguf::Strings;
use serde_json::{Map, Value as Json, json};

use super::merge_pair;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Longest piece in bytes; the longest of published models have about a hundred.
const MAX_PIECE: usize = 256;

/// How text is made ready: spaces become [`SPACE`], and where `prefix` is set one is put in front.
fn normalizer(prefix: bool) -> Json {
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}),
        false => spaces,
    }
}

fn decoder(prefix: bool) -> Json {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// The `tokenizer.json` of SentencePiece's BPE with these pieces; `normal` says which pieces merging can make, `added`
/// are the tokens that are looked for in the text beforehand.
///
/// # Errors
/// Lists what does not fit together.
pub(super) fn tokenizer_json(
    tokens: &Strings,
    scores: &[f32],
    normal: impl Fn(usize) -> bool,
    added: Vec<Json>,
    unk: Option<u32>,
    prefix: bool,
) -> Result<Json, Vec<String>> {
    let mut problems = Vec::new();
    if scores.len() != tokens.len() {
        problems.push(format!("{} tokens have {} scores", tokens.len(), scores.len()));
        return Err(problems);
    }
    let mut pieces: HashMap<&str, f32> = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| normal(*id)) {
        if !scores[id].is_finite() {
            problems.push(format!("the score of token {id} is {}", scores[id]));
        }
        if token.len() > MAX_PIECE {
            problems.push(format!("token {id} is {} bytes long, at most {MAX_PIECE} are read", token.len()));
        } else {
            pieces.insert(token, scores[id]);
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (&piece, &score) in &pieces {
        merges.extend(splits(piece, &pieces).map(|(a, b)| (score, a, b)));
    }
    merges.sort_by(|(s, a, b), (t, c, d)| {
        let longer = (c.chars().count(), d.chars().count()).cmp(&(a.chars().count(), b.chars().count()));
        t.total_cmp(s).then(longer).then(a.cmp(c)).then(b.cmp(d))
    });
    let merges: Vec<Json> = merges.iter().map(|(_, a, b)| json!([a, b])).collect();
    let vocab: Map<String, Json> =
        tokens.iter().enumerate().map(|(id, t)| (t.to_string(), id.into())).collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer(prefix),
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": decoder(prefix),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unk.and_then(|id| tokens.get(id as usize)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// The splits of `piece` into two of `pieces`.
fn splits<'a, T>(piece: &'a str, pieces: &HashMap<&str, T>) -> impl Iterator<Item = (&'a str, &'a str)> {
    let at = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
    at.filter(|(a, b)| pieces.contains_key(a) && pieces.contains_key(b))
}

/// Whether a `tokenizer.json` is of this kind, and if so whether it puts a space in front of the text.
pub(super) fn describes(json: &Json) -> Option<bool> {
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] != true || model["ignore_merges"] == true {
        return None;
    }
    let (spaces, pre) = (&json["normalizer"], &json["pre_tokenizer"]);
    // What Gemma's files split at is gone by then.
    let no_split = pre.is_null() || (pre["type"] == "Split" && pre["pattern"]["String"] == " ");
    if no_split {
        return [true, false].into_iter().find(|prefix| *spaces == normalizer(*prefix));
    }
    let meta = pre["type"] == "Metaspace" && pre["replacement"] == SPACE && pre["split"] == false;
    match pre["prepend_scheme"].as_str() {
        Some("first" | "always") if meta && spaces.is_null() => Some(true),
        Some("never") if meta && spaces.is_null() => Some(false),
        _ => None,
    }
}

/// Scores of `rows` tokens that order the merges of a `tokenizer.json` as its list does: 0 for what no merge makes.
///
/// # Errors
/// Where SentencePiece would join what the list does not, or in another order.
pub(super) fn scores(json: &Json, rows: usize) -> Result<Vec<f32>, String> {
    let model = &json["model"];
    let vocab: HashMap<&str, u64> = model["vocab"]
        .as_object()
        .map(|map| map.iter().filter_map(|(t, id)| Some((t.as_str(), id.as_u64()?))).collect())
        .unwrap_or_default();
    // Pieces by their first merge, with the pairs that make them.
    let mut made: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    let mut index: BTreeMap<String, usize> = BTreeMap::new();
    for (a, b) in model["merges"].as_array().into_iter().flatten().filter_map(merge_pair) {
        let piece = format!("{a}{b}");
        match index.get(&piece) {
            Some(at) if at + 1 == made.len() => made[*at].1.push((a, b)),
            Some(_) => return Err(format!("the merges that make `{piece}` do not stand side by side")),
            None => {
                index.insert(piece.clone(), made.len());
                made.push((piece, vec![(a, b)]));
            }
        }
    }
    let mut out = vec![0.0; rows];
    for (rank, (piece, pairs)) in made.iter().enumerate() {
        if piece.len() > MAX_PIECE {
            return Err(format!(
                "piece `{}...` is {} bytes long",
                piece.chars().take(20).collect::<String>(),
                piece.len()
            ));
        }
        // A part that no merge makes and that is no single character never stands in a text.
        let stands = |part: &str| part.chars().count() == 1 || index.contains_key(part);
        let missing =
            splits(piece, &vocab).find(|(a, b)| stands(a) && stands(b) && !pairs.contains(&(*a, *b)));
        if let Some((a, b)) = missing {
            return Err(format!("SentencePiece would join `{a}` and `{b}`, which the merges do not"));
        }
        if let Some(slot) = vocab.get(piece.as_str()).and_then(|id| out.get_mut(*id as usize)) {
            *slot = -(rank as f32) - 1.0;
        }
    }
    Ok(out)
}
