//! One vocabulary for models whose tokens differ: which row of the output stands for what, and the tokenizer that says so.
//!
//! Every model's embedding and head get the rows of the output's tokens first; then the method runs as on any other matrix. A token
//! that a model has not gets the row of the base if the base has the token, else that of the only model that has it, else the mean
//! over those that have it, else zeros. These rules are mergekit's. The order of the tokens that a union adds is not: here it is that
//! of the models and their ids, in mergekit that of a hash table. mergekit writes those tokens as words of their own that are looked
//! for in the raw text, where tokens of a byte-level vocabulary never match; here they join the vocabulary, with the merges that
//! make them behind those of the base.

use std::collections::{HashMap, HashSet};

use firebrick_models::tokenizer::Tokenizer;
use serde_json::{Value as Json, json};

use crate::config::{MergeConfig, ModelRef, TokenRule, TokenSource, TokenizerConfig, TokenizerSource};
use crate::input::InputModel;
use crate::names;
use crate::yaml::{Place, Problems};

/// Where a row of one model's embedding comes from, by model and row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    One(usize, usize),
    Mean(Vec<(usize, usize)>),
    Zero,
    /// The mean of all rows of tokens.
    Pad,
}

/// The vocabulary of the output.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    /// By id; `None` where the tokenizer has none.
    tokens: Vec<Option<String>>,
    rows: usize,
    /// By model; `None` where the rows are the model's own in their order, or the model is not merged.
    by_model: Vec<Option<Vec<Row>>>,
    basis: Tokenizer,
    /// Ids from here on are not of the basis.
    added_from: usize,
    /// The tokenizers that new tokens come from.
    donors: Vec<Tokenizer>,
}

impl Vocabulary {
    /// Rows of the output's embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of `model`; `None` if they are its own in their order.
    pub fn of(&self, model: usize) -> Option<&[Row]> {
        self.by_model.get(model)?.as_deref()
    }

    /// Whether the rows of any of `models` change.
    pub fn changes(&self, models: impl IntoIterator<Item = usize>) -> bool {
        models.into_iter().any(|m| self.of(m).is_some())
    }

    /// Whether a row of the output comes from `model`.
    pub fn reads(&self, model: usize) -> bool {
        let from = |row: &Row| match row {
            Row::One(m, _) => *m == model,
            Row::Mean(rows) => rows.iter().any(|(m, _)| *m == model),
            Row::Zero | Row::Pad => false,
        };
        self.by_model.iter().flatten().flatten().any(from)
    }

    /// The tokenizer that the output's is made from.
    pub fn basis(&self) -> &Tokenizer {
        &self.basis
    }

    /// Brings the vocabularies of `models`, one for each of [`MergeConfig::models`], together.
    pub fn new(
        config: &MergeConfig,
        tokenizer: &TokenizerConfig,
        models: &[InputModel],
        problems: &mut Problems,
    ) -> Option<Self> {
        let position = |model: &ModelRef| models.iter().position(|m| m.reference == *model);
        let mut merged: Vec<usize> = Vec::new();
        for source in config.modules.iter().flat_map(|m| &m.slices).flat_map(|s| &s.sources) {
            let model = position(&source.model)?;
            if !merged.contains(&model) {
                merged.push(model);
            }
        }
        let base = config.base_model.as_ref().and_then(position);
        let basis = match &tokenizer.source {
            TokenizerSource::Model(model) => position(model)?,
            TokenizerSource::Union | TokenizerSource::Base => base.or(merged.first().copied())?,
        };
        let mut read: HashMap<usize, (Tokenizer, HashMap<String, usize>)> = HashMap::new();
        let named = tokenizer.tokens.iter().filter_map(|rule| match rule.source.as_ref()? {
            TokenSource::Model(m) | TokenSource::Token(m, _) => position(m),
            TokenSource::Row(..) | TokenSource::Zero => None,
        });
        let wanted: HashSet<usize> = merged.iter().copied().chain([basis]).chain(base).chain(named).collect();
        let mut fits = true;
        for model in wanted {
            match models[model].tokenizer() {
                Ok(found) => {
                    let ids = ids(&found, embedding_rows(&models[model]));
                    read.insert(model, (found, ids));
                }
                Err(error) => {
                    problems.add(
                        tokenizer.place,
                        format!("the tokenizer of `{}`: {error}", models[model].reference),
                    );
                    fits = false;
                }
            }
        }
        if !fits {
            return None;
        }
        let (basis_tokenizer, _) = read.get(&basis)?;
        let mut tokens: Vec<Option<String>> =
            (0..basis_tokenizer.vocab_size()).map(|id| basis_tokenizer.token(id as u32)).collect();
        let added_from = tokens.len();
        let mut known: HashSet<String> = tokens.iter().flatten().cloned().collect();
        let mut donors = Vec::new();
        if tokenizer.source == TokenizerSource::Union {
            for model in base.into_iter().chain(merged.iter().copied()).filter(|m| *m != basis) {
                let donor = &read[&model].0;
                let before = tokens.len();
                for id in 0..donor.vocab_size() {
                    if let Some(token) = donor.token(id as u32)
                        && known.insert(token.clone())
                    {
                        tokens.push(Some(token));
                    }
                }
                if tokens.len() > before {
                    donors.push(donor.clone());
                }
            }
        }
        for rule in tokenizer.tokens.iter().filter(|rule| !known.contains(&rule.token)) {
            tokens.push(Some(rule.token.clone()));
        }
        let mut rules: HashMap<&str, (Option<Row>, &TokenRule)> = HashMap::new();
        for rule in &tokenizer.tokens {
            rules.insert(&rule.token, (row_of_rule(rule, models, &read, problems), rule));
        }
        let rows = tokenizer.pad_to_multiple_of.map_or(tokens.len(), |n| tokens.len().div_ceil(n) * n);
        let mut by_model = vec![None; models.len()];
        for &model in &merged {
            let row = |id: usize, token: &Option<String>| match token {
                // Rows without a token are those of the basis, as far as it goes.
                None if embedding_rows(&models[basis]).is_some_and(|rows| id < rows) => Row::One(basis, id),
                None => Row::Zero,
                Some(token) => {
                    let own = read[&model].1.get(token).map(|id| Row::One(model, *id));
                    match (rules.get(token.as_str()), own) {
                        (Some((Some(row), rule)), own) if rule.force || own.is_none() => row.clone(),
                        (_, Some(own)) => own,
                        (_, None) => usual(token, base, &merged, &read),
                    }
                }
            };
            let mut all: Vec<Row> = tokens.iter().enumerate().map(|(id, token)| row(id, token)).collect();
            all.resize(rows, Row::Pad);
            let own = |(id, row): (usize, &Row)| *row == Row::One(model, id);
            let same = embedding_rows(&models[model]) == Some(rows) && all.iter().enumerate().all(own);
            by_model[model] = (!same).then_some(all);
        }
        let basis = basis_tokenizer.clone();
        Some(Vocabulary { tokens, rows, by_model, basis, added_from, donors })
    }

    /// The files of the output's tokenizer, with this chat template if there is one.
    ///
    /// # Errors
    /// If the tokenizer cannot be written.
    pub fn files(&self, chat_template: Option<String>) -> Result<Vec<(String, Vec<u8>)>, String> {
        let mut basis = self.basis.clone();
        if chat_template.is_some() {
            basis.set_chat_template(chat_template);
        }
        let mut files = basis.files().map_err(|e| e.to_string())?;
        if self.tokens.len() == self.added_from {
            return Ok(files);
        }
        let (_, bytes) =
            files.iter_mut().find(|(name, _)| name == TOKENIZER_FILE).ok_or("no tokenizer.json")?;
        let mut json: Json = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let donors = self.donors.iter().map(tokenizer_json).collect::<Result<Vec<_>, _>>()?;
        anchor_words(&mut json);
        // Of several donors the first holds.
        let words: HashMap<&str, &Json> = donors
            .iter()
            .rev()
            .flat_map(|d| d["added_tokens"].as_array().into_iter().flatten())
            .filter_map(|word| Some((word["content"].as_str()?, word)))
            .collect();
        let new = self.tokens.iter().enumerate().skip(self.added_from);
        for (id, token) in new.filter_map(|(id, token)| Some((id, token.as_deref()?))) {
            add_token(&mut json, id, token, words.get(token).copied(), &donors);
        }
        donors.iter().for_each(|donor| add_merges(&mut json["model"], &donor["model"]));
        *bytes = serde_json::to_vec(&json).map_err(|e| e.to_string())?;
        Ok(files)
    }
}

const TOKENIZER_FILE: &str = "tokenizer.json";

fn tokenizer_json(tokenizer: &Tokenizer) -> Result<Json, String> {
    let files = tokenizer.files().map_err(|e| e.to_string())?;
    let (_, bytes) = files.iter().find(|(name, _)| name == TOKENIZER_FILE).ok_or("no tokenizer.json")?;
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

/// Ids by token, of those that the embedding has a row for; none where there is no embedding.
fn ids(tokenizer: &Tokenizer, rows: Option<usize>) -> HashMap<String, usize> {
    let count = tokenizer.vocab_size().min(rows.unwrap_or(0));
    (0..count).filter_map(|id| Some((tokenizer.token(id as u32)?, id))).collect()
}

/// Rows of the embedding of a model.
fn embedding_rows(model: &InputModel) -> Option<usize> {
    let (_, stored) = model.tensors.iter().find(|(name, _)| names::is_embedding(name))?;
    stored.shape.first().copied()
}

/// The row of a token that a model has not.
fn usual(
    token: &str,
    base: Option<usize>,
    merged: &[usize],
    read: &HashMap<usize, (Tokenizer, HashMap<String, usize>)>,
) -> Row {
    let row = |model: usize| read.get(&model)?.1.get(token).map(|row| (model, *row));
    if let Some((model, row)) = base.and_then(row) {
        return Row::One(model, row);
    }
    let holders: Vec<(usize, usize)> = merged.iter().filter_map(|m| row(*m)).collect();
    match holders[..] {
        [] => Row::Zero,
        [(model, row)] => Row::One(model, row),
        _ => Row::Mean(holders),
    }
}

fn row_of_rule(
    rule: &TokenRule,
    models: &[InputModel],
    read: &HashMap<usize, (Tokenizer, HashMap<String, usize>)>,
    problems: &mut Problems,
) -> Option<Row> {
    let position = |model: &ModelRef| models.iter().position(|m| m.reference == *model);
    let mut named = |model: &ModelRef, token: &str, place: Place| {
        let model = position(model)?;
        let row = read.get(&model)?.1.get(token);
        if row.is_none() {
            problems.add(place, format!("`{}` has no token `{token}`", models[model].reference));
        }
        row.map(|row| Row::One(model, *row))
    };
    match rule.source.as_ref()? {
        TokenSource::Zero => Some(Row::Zero),
        TokenSource::Model(model) => named(model, &rule.token, rule.place),
        TokenSource::Token(model, token) => named(model, token, rule.place),
        TokenSource::Row(model, row) => {
            let model = position(model)?;
            let rows = embedding_rows(&models[model]).unwrap_or(0);
            if *row >= rows {
                let text = format!("`{}` has {rows} rows, none is {row}", models[model].reference);
                problems.add(rule.place, text);
            }
            Some(Row::One(model, *row))
        }
    }
}

/// Adds a token: to the vocabulary, and to the words that are looked for first if it is one of them in a donor (`word`), or comes
/// from a vocabulary of another kind.
fn add_token(json: &mut Json, id: usize, token: &str, word: Option<&Json>, donors: &[Json]) {
    let kind = json["model"]["type"].clone();
    let mut piece =
        donors.iter().any(|d| d["model"]["type"] == kind && d["model"]["vocab"].get(token).is_some());
    // The library numbers words anew unless the vocabulary has them. A vocabulary that is a list has no room for them, nor for pieces
    // behind words.
    match &mut json["model"]["vocab"] {
        Json::Object(vocab) => {
            vocab.insert(token.to_owned(), id.into());
        }
        _ => piece = false,
    }
    if piece && word.is_none() {
        return;
    }
    let mut entry = word.cloned().unwrap_or_else(|| {
        json!({
            "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false,
        })
    });
    entry["id"] = id.into();
    push(&mut json["added_tokens"], entry);
}

/// Gives the words of a tokenizer their ids in its vocabulary, without which they would be numbered behind what is added to it.
fn anchor_words(json: &mut Json) {
    let words = json["added_tokens"].as_array().cloned().unwrap_or_default();
    let Json::Object(vocab) = &mut json["model"]["vocab"] else { return };
    for word in &words {
        if let Some(token) = word["content"].as_str() {
            vocab.entry(token).or_insert_with(|| word["id"].clone());
        }
    }
}

fn push(list: &mut Json, entry: Json) {
    match list {
        Json::Array(items) => items.push(entry),
        other => *other = json!([entry]),
    }
}

/// Adds the merges of `donor` that the vocabulary of `model` can make, behind its own.
fn add_merges(model: &mut Json, donor: &Json) {
    let sides = |merge: &Json| -> Option<(String, String)> {
        match merge {
            Json::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
            Json::Array(pair) => {
                Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned()))
            }
            _ => None,
        }
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default().to_owned();
    let Some(theirs) = donor["merges"].as_array() else { return };
    let Some(ours) = model["merges"].as_array() else { return };
    let as_text = ours.first().is_some_and(Json::is_string);
    let known: HashSet<(String, String)> = ours.iter().filter_map(sides).collect();
    let makes = |(a, b): &(String, String)| {
        let vocab = &model["vocab"];
        let made = format!("{a}{}", b.strip_prefix(prefix.as_str()).unwrap_or(b));
        [a, b, &made].into_iter().all(|token| vocab.get(token.as_str()).is_some())
    };
    let new: Vec<Json> = theirs
        .iter()
        .filter_map(sides)
        .filter(|pair| !known.contains(pair) && makes(pair))
        .map(|(a, b)| if as_text { json!(format!("{a} {b}")) } else { json!([a, b]) })
        .collect();
    if let Some(ours) = model["merges"].as_array_mut() {
        ours.extend(new);
    }
}
