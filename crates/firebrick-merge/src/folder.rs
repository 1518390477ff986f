//! What lies beside the tensors of a merged model: configuration, tokenizer, chat template, card.

use std::collections::BTreeSet;
use std::path::Path;

use firebrick_core::read_file;
use firebrick_models::chat::ChatTemplate;
use firebrick_tensor::block::DType;
use firebrick_tensor::stream::Card;
use serde_json::Value as Json;

use crate::config::{MergeConfig, TokenizerSource};
use crate::input::InputModel;
use crate::merge::Merge;
use crate::names;
use crate::yaml::{Problems, suggestion};
use crate::{MergeError, chat_templates};

const CONFIG: &str = "config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Files of a tokenizer that a merged folder takes over.
const TOKENIZER: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE,
];

/// Most bytes of one of them: far above any tokenizer.
const MAX_FILE: u64 = 256 << 20;

type Files = Vec<(String, Vec<u8>)>;

/// Every side file of the output.
pub(crate) fn side_files(merge: &Merge) -> Result<Files, MergeError> {
    let model = config_model(&merge.config, &merge.models);
    let mut files: Files = vec![("mergekit_config.yml".into(), merge.text.clone().into_bytes())];
    if let Some(json) = config(merge) {
        files.push((CONFIG.into(), pretty(&json)));
    }
    let fail = |what: String| MergeError::Mismatch { path: model.folder(), problems: vec![what] };
    if let Some(vocabulary) = &merge.vocabulary {
        files.extend(vocabulary.files(merge.chat_template.clone()).map_err(fail)?);
        return Ok(files);
    }
    let mut tokenizer: Files = match model.is_gguf() {
        true => model.tokenizer().and_then(|t| t.files().map_err(|e| e.to_string())).map_err(fail)?,
        false => copies(&model.folder())?,
    };
    if let Some(template) = &merge.chat_template {
        tokenizer.retain(|(name, _)| name != TEMPLATE);
        for (_, bytes) in tokenizer.iter_mut().filter(|(name, _)| name == TOKENIZER_CONFIG) {
            if let Ok(Json::Object(mut map)) = serde_json::from_slice::<Json>(bytes)
                && map.remove("chat_template").is_some()
            {
                *bytes = pretty(&Json::Object(map));
            }
        }
        tokenizer.push((TEMPLATE.into(), template.clone().into_bytes()));
    }
    files.extend(tokenizer);
    Ok(files)
}

/// The configuration of the output: that of the base or of the first model, changed to what the output is.
pub(crate) fn config(merge: &Merge) -> Option<Json> {
    let mut json = config_model(&merge.config, &merge.models).config.clone()?;
    change_config(merge, &mut json);
    Some(json)
}

fn copies(folder: &Path) -> Result<Files, MergeError> {
    let mut files = Vec::new();
    for name in TOKENIZER {
        let file = folder.join(name);
        match read_file(&file, MAX_FILE) {
            Ok(bytes) => files.push(((*name).to_owned(), bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(MergeError::Io { path: file, source }),
        }
    }
    Ok(files)
}

pub(crate) fn pretty(json: &Json) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(json).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// The model whose configuration and tokenizer the output takes over: the base, or the first.
pub(crate) fn config_model<'m>(config: &MergeConfig, models: &'m [InputModel]) -> &'m InputModel {
    let base = config.base_model.as_ref().and_then(|base| models.iter().find(|m| m.reference == *base));
    base.unwrap_or(&models[0])
}

/// Makes a configuration say what the output is.
fn change_config(merge: &Merge, json: &mut Json) {
    let plan = &merge.plan;
    if let Some(name) = dtype_name(plan.tensors.iter().map(|t| (t.dtype, t.shape.iter().product()))) {
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = json.get_mut(key) {
                *value = name.into();
            }
        }
    }
    for (prefix, layers) in &plan.layers {
        let vision = ["vision", "visual"].iter().any(|part| prefix.contains(part));
        let nested = if vision { "vision_config" } else { "text_config" };
        let nested = json.get(nested).is_some_and(Json::is_object).then_some(nested);
        // The layers of a part that has no configuration of its own are not those of the whole model.
        if nested.is_none() && vision {
            continue;
        }
        let part = match nested {
            Some(key) => &mut json[key],
            None => &mut *json,
        };
        change_layers(merge, part, *layers, plan.layers.len() == 1);
    }
    let embedding = plan.tensors.iter().find(|t| names::is_embedding(&t.name));
    if let Some(rows) = embedding.and_then(|t| t.shape.first()).copied() {
        if let Some(value) = json.get_mut("vocab_size") {
            *value = rows.into();
        }
        if let Some(value) = json.get_mut("text_config").and_then(|c| c.get_mut("vocab_size")) {
            *value = rows.into();
        }
    }
    let untied = |m: &InputModel| {
        let says = m.config.as_ref().and_then(|c| c.get("tie_word_embeddings")).and_then(Json::as_bool);
        says != Some(true) && m.tensors.keys().any(|name| names::is_head(name))
    };
    let head = plan.tensors.iter().find(|t| names::is_head(&t.name));
    if let Some(head) = head
        && head.sources.iter().any(|s| untied(&merge.models[s.model]))
        && json.is_object()
    {
        json["tie_word_embeddings"] = false.into();
    }
    let config_model = config_model(&merge.config, &merge.models);
    if let Some(vocabulary) = &merge.vocabulary
        && let Some(model) = merge.models.iter().position(|m| m.reference == config_model.reference)
        && vocabulary.of(model).is_some()
        && json.is_object()
    {
        let basis = vocabulary.basis();
        let source = merge.config.tokenizer.as_ref().map(|t| &t.source);
        // What another model's tokenizer lacks is not left to point at one of its other tokens.
        let other = matches!(source, Some(TokenizerSource::Model(m)) if *m != config_model.reference);
        if other || basis.bos_id().is_some() {
            json["bos_token_id"] = basis.bos_id().into();
        }
        if other {
            json["pad_token_id"] = basis.pad_id().into();
        }
        match basis.eos_ids() {
            [] if other => json["eos_token_id"] = Json::Null,
            [] => {}
            [id] => json["eos_token_id"] = (*id).into(),
            ids => json["eos_token_id"] = ids.into(),
        }
    }
}

/// The number of layers, and what is listed by layer.
fn change_layers(merge: &Merge, json: &mut Json, layers: usize, only: bool) {
    let keys = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"];
    let before = keys.iter().find_map(|key| json.get(key)).and_then(Json::as_u64);
    for key in keys {
        if let Some(value) = json.get_mut(key) {
            *value = layers.into();
        }
    }
    let Some(list) = json.get("layer_types").and_then(Json::as_array).cloned() else { return };
    if !only || before != Some(list.len() as u64) || merge.plan.stacked.len() != layers {
        return;
    }
    let of = |(model, layer): &(usize, usize)| {
        let theirs = merge.models[*model].config.as_ref()?.get("layer_types")?.get(*layer);
        theirs.or_else(|| list.get(*layer)).cloned()
    };
    if let Some(types) = merge.plan.stacked.iter().map(of).collect::<Option<Vec<_>>>() {
        json["layer_types"] = types.into();
    }
}

/// What most elements are stored as; of each tensor the type and the number of elements.
pub(crate) fn dtype_name(tensors: impl Iterator<Item = (DType, usize)> + Clone) -> Option<&'static str> {
    let elements = |dtype: DType| -> usize { tensors.clone().filter(|t| t.0 == dtype).map(|t| t.1).sum() };
    let types = [(DType::F32, "float32"), (DType::F16, "float16"), (DType::BF16, "bfloat16")];
    types
        .into_iter()
        .max_by_key(|(dtype, _)| elements(*dtype))
        .filter(|(d, _)| elements(*d) > 0)
        .map(|(_, name)| name)
}

/// The text of the template that a configuration asks for.
pub(crate) fn chat_template(
    config: &MergeConfig,
    models: &[InputModel],
    problems: &mut Problems,
) -> Option<String> {
    let asked = config.chat_template.as_deref()?;
    if asked == "auto" {
        let templates = models.iter().filter_map(|m| m.tokenizer().ok()?.chat_template().map(String::from));
        let templates: Vec<String> = templates.collect();
        let count = |t: &String| templates.iter().filter(|other| *other == t).count();
        // Of templates that are as common, the first.
        return templates.iter().rev().max_by_key(|t| count(t)).cloned();
    }
    if let Some(text) = chat_templates::by_name(asked) {
        return Some(text.to_owned());
    }
    if asked.contains('{') {
        if let Err(error) = ChatTemplate::new(asked, None, None) {
            problems.add(config.places.chat_template, format!("`chat_template`: {error}"));
        }
        return Some(asked.to_owned());
    }
    let known = chat_templates::NAMES.iter().copied().chain(["auto"]);
    let text = format!(
        "`chat_template: {asked}` is neither a name that is known nor a template; {}",
        suggestion(asked, known)
    );
    problems.add(config.places.chat_template, text);
    None
}

/// The card, as mergekit writes one.
pub(crate) fn card(merge: &Merge) -> Card {
    let plain = |name: &str| {
        let path = Path::new(name);
        let last = path.file_name().filter(|_| path.is_absolute());
        last.map_or_else(|| name.to_owned(), |last| last.to_string_lossy().into_owned())
    };
    let merged: BTreeSet<usize> =
        merge.plan.tensors.iter().flat_map(|t| &t.sources).map(|s| s.model).collect();
    let names: Vec<String> = merged.iter().map(|m| plain(&merge.models[*m].reference.to_string())).collect();
    let base = merge.config.base_model.as_ref().map(|m| plain(&m.to_string()));
    let mut front_matter = vec!["library_name: transformers".to_owned(), "base_model:".to_owned()];
    front_matter.extend(names.iter().map(|n| format!("- {}", Json::from(n.as_str()))));
    let mut text = format!("## Merge\n\nMethod `{}`", merge.plan.method);
    if let Some(base) = &base {
        text += &format!(", with `{base}` as the base");
    }
    text += &format!(", of {}.\n", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "));
    for (prefix, layers) in &merge.plan.layers {
        text += &format!("\n{layers} layers `{prefix}`.\n");
    }
    // Paths of one machine are nobody's business.
    let mut config = merge.text.clone();
    for model in &merge.models {
        for path in [Some(&model.reference.path), model.reference.lora.as_ref()].into_iter().flatten() {
            config = config.replace(path.as_str(), &plain(path));
        }
    }
    text += &format!("\n```yaml\n{}\n```\n", config.trim_end());
    Card { tags: vec!["mergekit".into()], front_matter, text }
}
