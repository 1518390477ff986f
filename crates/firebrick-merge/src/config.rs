//! mergekit's YAML: models, method, parameters as numbers, gradients over layers or lists of filters.
//!
//! Keys that nothing reads are errors with a suggestion: a misplaced `weight:` would otherwise change the result silently.

use std::collections::BTreeMap;

use firebrick_tensor::block::DType;
use serde_json::Value as Json;

use crate::methods::{MergeMethod, Numerics};

/// The value of a parameter: one for all tensors, or one that depends on the tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// The same everywhere.
    Scalar(f64),
    /// Piecewise linear over the layers, from the first to the last.
    Gradient(Vec<f64>),
    /// The first entry whose filter is part of the tensor's name, or that has none.
    Filters(Vec<(Option<String>, Value)>),
}

impl Value {
    /// The value for the tensor `name`, at `depth` (0 at the first layer, 1 at the last); `None` if no filter matches.
    pub fn at(&self, name: &str, depth: f64) -> Option<f64> {
        match self {
            Value::Scalar(v) => Some(*v),
            Value::Gradient(points) => {
                let position = depth * (points.len() - 1) as f64;
                let low = position as usize;
                let high = (low + 1).min(points.len() - 1);
                let share = position - low as f64;
                Some((1.0 - share) * points[low] + share * points[high])
            }
            Value::Filters(entries) => entries
                .iter()
                .find(|(filter, _)| filter.as_ref().is_none_or(|f| f == "*" || name.contains(f.as_str())))
                .and_then(|(_, value)| value.at(name, depth)),
        }
    }

    fn parse(json: &Json, at: &str, problems: &mut Vec<String>) -> Option<Value> {
        let value = match json {
            Json::Bool(b) => Some(Value::Scalar(f64::from(u8::from(*b)))),
            Json::Number(n) => n.as_f64().map(Value::Scalar),
            Json::Array(items) if !items.is_empty() => {
                let numbers: Option<Vec<f64>> = items.iter().map(Json::as_f64).collect();
                match numbers {
                    Some(points) => Some(Value::Gradient(points)),
                    None => items
                        .iter()
                        .map(|item| Self::parse_filter(item, at, problems))
                        .collect::<Option<Vec<_>>>()
                        .map(Value::Filters),
                }
            }
            _ => None,
        };
        if value.is_none() {
            problems.push(format!(
                "`{at}` should be a number, a list of numbers, or a list of {{filter, value}}, found {json}"
            ));
        }
        value
    }

    fn parse_filter(item: &Json, at: &str, problems: &mut Vec<String>) -> Option<(Option<String>, Value)> {
        let Json::Object(map) = item else {
            // A bare number at the end of a filter list is its default.
            return item.as_f64().map(|v| (None, Value::Scalar(v)));
        };
        unknown_keys(map, &["filter", "value"], at, problems);
        let filter = match map.get("filter") {
            None | Some(Json::Null) => None,
            Some(Json::String(filter)) => Some(filter.clone()),
            Some(other) => {
                problems.push(format!("`{at}`: `filter` should be a text, found {other}"));
                return None;
            }
        };
        Some((filter, Self::parse(map.get("value")?, at, problems)?))
    }
}

/// One model of a merge.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelEntry {
    /// Folder or file, as written in the configuration.
    pub model: String,
    /// Its parameters by name.
    pub parameters: BTreeMap<String, Value>,
}

/// A merge, as mergekit's YAML describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeConfig {
    /// The method.
    pub method: MergeMethod,
    /// The models, in order.
    pub models: Vec<ModelEntry>,
    /// The model that the others were made from.
    pub base_model: Option<String>,
    /// Type that inputs are rounded to before the merge; their own if absent.
    pub dtype: Option<DType>,
    /// Type of the output; `dtype` if absent.
    pub out_dtype: Option<DType>,
    /// Parameters of the merge, and of models that have none of their own, by name.
    pub parameters: BTreeMap<String, Value>,
    /// In which precision to compute.
    pub numerics: Numerics,
    /// Of the random methods; 0 by default.
    pub seed: u64,
}

const TOP: &[&str] = &[
    "merge_method",
    "models",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "tokenizer_source",
    "numerics",
    "seed",
];

impl MergeConfig {
    /// Reads YAML text.
    ///
    /// # Errors
    /// Every problem of the text, one line each.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let json: Json = serde_saphyr::from_str(text).map_err(|e| vec![e.to_string()])?;
        let Json::Object(map) = &json else { return Err(vec!["should be a map of keys".into()]) };
        let mut problems = Vec::new();
        for key in ["slices", "modules", "tokenizer", "chat_template"] {
            if map.contains_key(key) {
                problems.push(format!("`{key}` is not supported yet; list whole models under `models`"));
            }
        }
        let later = |k: &&String| !["slices", "modules", "tokenizer", "chat_template"].contains(&k.as_str());
        let rest = map.iter().filter(|(k, _)| later(k)).map(|(k, v)| (k.clone(), v.clone())).collect();
        unknown_keys(&rest, TOP, "the top level", &mut problems);

        let method = match map.get("merge_method").and_then(Json::as_str) {
            Some(name) => name.parse().map_err(|e| problems.push(e)).ok(),
            None => {
                problems.push("`merge_method` is missing".into());
                None
            }
        };
        let mut dtype = |key: &str| {
            let name = map.get(key).filter(|v| !v.is_null())?.as_str().unwrap_or_default();
            let found = match name {
                "float32" | "f32" => Some(DType::F32),
                "float16" | "f16" => Some(DType::F16),
                "bfloat16" | "bf16" => Some(DType::BF16),
                _ => None,
            };
            if found.is_none() {
                problems.push(format!("`{key}: {name}` is not one of float32, float16, bfloat16"));
            }
            found
        };
        let (dtype, out_dtype) = (dtype("dtype"), dtype("out_dtype"));
        let numerics = match map.get("numerics").map(|v| v.as_str().unwrap_or_default()) {
            None | Some("f32") => Numerics::F32,
            Some("mergekit") => Numerics::Mergekit,
            Some(other) => {
                problems.push(format!("`numerics: {other}` is not one of f32, mergekit"));
                Numerics::F32
            }
        };
        let seed = map.get("seed").map_or(0, |v| {
            v.as_u64().unwrap_or_else(|| {
                problems.push(format!("`seed: {v}` is not a whole number"));
                0
            })
        });
        match map.get("tokenizer_source") {
            None | Some(Json::Null) => {}
            Some(source) if source == "base" => {}
            Some(other) => {
                problems.push(format!("`tokenizer_source: {other}` is not supported yet (only `base`)"));
            }
        }
        let known = method.map(MergeMethod::parameters).unwrap_or_default();
        let names: Vec<&str> = known.iter().map(|p| p.name).collect();
        let own: Vec<&str> = known.iter().filter(|p| p.per_model).map(|p| p.name).collect();
        // Without a method nothing is known about parameters.
        let lists = method.map(|_| (&names[..], &own[..]));
        let all = parameters(map.get("parameters"), lists.map(|l| l.0), "parameters", &mut problems);
        let models = models(map.get("models"), lists.map(|l| l.1), &mut problems);
        let base_model = map.get("base_model").and_then(|v| model_name(v, "base_model", &mut problems));
        if let Some(method) = method.filter(|m| m.needs_base() && base_model.is_none()) {
            problems.push(format!("`{}` needs `base_model`", method.name()));
        }
        for p in known.iter().filter(|p| p.default.is_none() && !all.contains_key(p.name)) {
            if !p.per_model {
                problems.push(format!("`parameters` has no `{}`", p.name));
                continue;
            }
            // The base has to have them only where it is a model like the others.
            let needs = |m: &&ModelEntry| {
                method == Some(MergeMethod::Linear) || base_model.as_ref() != Some(&m.model)
            };
            for entry in models.iter().filter(needs).filter(|m| !m.parameters.contains_key(p.name)) {
                problems.push(format!("model `{}` has no `{}`", entry.model, p.name));
            }
        }
        match (method, problems.is_empty()) {
            (Some(method), true) => Ok(MergeConfig {
                method,
                models,
                base_model,
                dtype,
                out_dtype,
                parameters: all,
                numerics,
                seed,
            }),
            _ => Err(problems),
        }
    }
}

fn models(json: Option<&Json>, known: Option<&[&str]>, problems: &mut Vec<String>) -> Vec<ModelEntry> {
    let Some(Json::Array(items)) = json else {
        problems.push("`models` should be a list of models".into());
        return Vec::new();
    };
    if items.is_empty() {
        problems.push("`models` is empty".into());
    }
    let mut entries = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let at = format!("models[{i}]");
        let Json::Object(map) = item else {
            problems.push(format!("`{at}` should be a map with `model`, found {item}"));
            continue;
        };
        unknown_keys(map, &["model", "parameters"], &at, problems);
        let Some(model) = map.get("model") else {
            problems.push(format!("`{at}` has no `model`"));
            continue;
        };
        let parameters = parameters(map.get("parameters"), known, &format!("{at}.parameters"), problems);
        if let Some(model) = model_name(model, &at, problems) {
            entries.push(ModelEntry { model, parameters });
        }
    }
    entries
}

/// A model reference: a path, or a map with `model: {path}`.
fn model_name(json: &Json, at: &str, problems: &mut Vec<String>) -> Option<String> {
    let name = match json {
        Json::String(name) => Some(name.as_str()),
        Json::Object(map) => map.get("model").and_then(|m| m.get("path")).and_then(Json::as_str),
        _ => None,
    };
    if name.is_none() {
        problems.push(format!("`{at}`: the model should be a path, found {json}"));
    }
    if name.is_some_and(|n| n.contains('+')) {
        problems.push(format!(
            "`{at}`: adapters (`model+adapter`) are not supported yet; merge the adapter first"
        ));
    }
    name.map(String::from)
}

/// Those that are given; `known` are the names that there may be, if it is known.
fn parameters(
    json: Option<&Json>,
    known: Option<&[&str]>,
    at: &str,
    problems: &mut Vec<String>,
) -> BTreeMap<String, Value> {
    let map = match json {
        None | Some(Json::Null) => return BTreeMap::new(),
        Some(Json::Object(map)) => map,
        Some(other) => {
            problems.push(format!("`{at}` should be a map, found {other}"));
            return BTreeMap::new();
        }
    };
    if let Some(known) = known {
        // mergekit accepts this one everywhere and it changes nothing numerically.
        let known: Vec<&str> = known.iter().copied().chain(["int8_mask"]).collect();
        unknown_keys(map, &known, at, problems);
    }
    let mut found = BTreeMap::new();
    for (name, json) in map {
        if let Some(value) = Value::parse(json, &format!("{at}.{name}"), problems) {
            found.insert(name.clone(), value);
        }
    }
    found
}

fn unknown_keys(map: &serde_json::Map<String, Json>, known: &[&str], at: &str, problems: &mut Vec<String>) {
    for key in map.keys().filter(|k| !known.contains(&k.as_str())) {
        let near = known
            .iter()
            .find(|k| strip(k) == strip(key) || k.starts_with(key.as_str()) || key.starts_with(**k));
        let hint =
            near.map_or(format!("known keys: {}", known.join(", ")), |k| format!("did you mean `{k}`?"));
        problems.push(format!("unknown key `{key}` in {at}; {hint}"));
    }
}

/// A key without what is most often mistyped about it.
fn strip(key: &str) -> String {
    key.to_lowercase()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric())
        .collect::<String>()
        .trim_end_matches('s')
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0, 1]
        - value: 0.5
  - model: b
dtype: bfloat16
parameters:
  weight: 0.3
  lambda: 0.7
";

    #[test]
    fn reads_what_mergekit_reads() {
        let config = MergeConfig::parse(GOOD).unwrap();
        assert_eq!(config.method, MergeMethod::TaskArithmetic);
        assert_eq!(config.dtype, Some(DType::BF16));
        let weight = &config.models[0].parameters["weight"];
        assert_eq!(weight.at("model.layers.1.self_attn.q_proj.weight", 0.25), Some(0.25));
        assert_eq!(weight.at("model.layers.1.mlp.up_proj.weight", 0.25), Some(0.5));
        assert_eq!(config.parameters["weight"], Value::Scalar(0.3));
    }

    #[test]
    fn lists_every_problem() {
        let text = "merge_metod: linear\nmodels:\n  - model: a\n    weight: 1\n  - {}\ndtype: int4\n";
        let problems = MergeConfig::parse(text).unwrap_err();
        for part in
            ["`merge_metod`", "`merge_method` is missing", "`weight` in models[0]", "models[1]", "int4"]
        {
            assert!(problems.iter().any(|p| p.contains(part)), "{part} in {problems:?}");
        }
        assert!(MergeConfig::parse(&GOOD.replace("base_model: base", "")).is_err());
        for (change, part) in [
            ("tokenizer_source: {model: a}", "`tokenizer_source: {"),
            ("tokenizer_source: union", "union"),
            ("parameters:\n  normalize:\n    - {filter: 5, value: 1}", "`filter` should be a text, found 5"),
        ] {
            let text = GOOD.replace("parameters:\n  weight: 0.3\n  lambda: 0.7\n", change);
            let problems = MergeConfig::parse(&text).unwrap_err();
            assert!(problems.iter().any(|p| p.contains(part)), "{part} in {problems:?}");
        }
        for fine in ["tokenizer_source: base", "tokenizer_source: null"] {
            MergeConfig::parse(&format!("{GOOD}{fine}\n")).unwrap();
        }
        assert!(MergeConfig::parse("[1, 2]").is_err());
        assert!(MergeConfig::parse("a: [").is_err());
    }

    #[test]
    fn gradients_are_piecewise_linear() {
        let gradient = Value::Gradient(vec![0.0, 1.0, 0.0]);
        for (depth, expected) in [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 0.0)] {
            assert_eq!(gradient.at("x", depth), Some(expected));
        }
        assert_eq!(Value::Filters(vec![(Some("mlp".into()), Value::Scalar(1.0))]).at("attn", 0.0), None);
    }
}
