//! What an encoder is made of, from config.json and back.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::error::ModelError;
use crate::family::bert;

/// The shape of an encoder of the BERT family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    /// Family, by Hugging Face's `model_type`.
    pub model_type: String,
    /// Rows of the word embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width inside the feed-forward network.
    pub d_ff: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of attention heads; they share `d_model` evenly.
    pub heads: usize,
    /// Rows of the position embedding: the longest text, in tokens.
    pub max_tokens: usize,
    /// Rows of the token-type embedding.
    pub token_types: usize,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Whether there is a pooler; config.json does not say, the checkpoint does.
    pub pooler: bool,
    /// Keys of config.json that this type has no field for, kept for saving.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, serde_json::Value>,
}

/// The keys of config.json that are read here, and those that say nothing about the weights this crate writes.
const KNOWN: &[&str] = &[
    "architectures",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "hidden_act",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "position_embedding_type",
];

impl EncoderConfig {
    /// An encoder small enough for tests and examples: two layers of width 16, four heads, 32 positions.
    pub fn tiny(vocab: usize) -> Self {
        EncoderConfig {
            model_type: bert::BERT.into(),
            vocab,
            d_model: 16,
            d_ff: 32,
            layers: 2,
            heads: 4,
            max_tokens: 32,
            token_types: 2,
            norm_eps: 1e-12,
            pooler: true,
            extra: Map::new(),
        }
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.heads
    }

    /// Reads Hugging Face's `config.json` at `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is not JSON, or does not describe an encoder; every problem is listed.
    pub fn from_hf_file(path: &Path) -> Result<Self, ModelError> {
        let text = read_text(path, MAX_SETTINGS).map_err(|e| ModelError::io(path, e))?;
        let value = serde_json::from_str(&text)
            .map_err(|e| ModelError::Invalid { path: path.into(), problems: vec![e.to_string()] })?;
        Self::from_hf(&value).map_err(|problems| ModelError::Invalid { path: path.into(), problems })
    }

    /// Reads the object of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Lists every value that is missing, of another type than it should be, or not supported.
    pub fn from_hf(value: &serde_json::Value) -> Result<Self, Vec<String>> {
        let Some(map) = value.as_object() else { return Err(vec!["not a JSON object".into()]) };
        let mut problems = Vec::new();
        // Transformers writes null for what is not set.
        let given = |key: &str| map.get(key).filter(|v| !v.is_null());
        let mut size = |key: &str, default: Option<usize>| match given(key).map(|v| (v, v.as_u64())) {
            Some((_, Some(n))) => n as usize,
            Some((v, None)) => {
                problems.push(format!("`{key}` should be a whole number, found {v}"));
                1
            }
            None => default.unwrap_or_else(|| {
                problems.push(format!("`{key}` is missing"));
                1
            }),
        };
        let (vocab, d_model, d_ff) =
            (size("vocab_size", None), size("hidden_size", None), size("intermediate_size", None));
        let (layers, heads) = (size("num_hidden_layers", None), size("num_attention_heads", None));
        let (max_tokens, token_types) =
            (size("max_position_embeddings", Some(512)), size("type_vocab_size", Some(2)));
        let norm_eps = match given("layer_norm_eps").map(|v| (v, v.as_f64())) {
            None => 1e-12,
            Some((_, Some(eps))) => eps,
            Some((v, None)) => {
                problems.push(format!("`layer_norm_eps` should be a number, found {v}"));
                0.0
            }
        };
        let mut only = |key: &str, allowed: serde_json::Value| {
            if let Some(v) = given(key).filter(|v| **v != allowed) {
                problems.push(format!("`{key}` {v} is not supported (only {allowed})"));
            }
        };
        only("model_type", json!(bert::BERT));
        // Transformers' `gelu` is the exact one, with the error function.
        only("hidden_act", json!("gelu"));
        only("position_embedding_type", json!("absolute"));
        only("is_decoder", json!(false));
        only("add_cross_attention", json!(false));
        let config = EncoderConfig {
            model_type: bert::BERT.into(),
            vocab,
            d_model,
            d_ff,
            layers,
            heads,
            max_tokens,
            token_types,
            norm_eps,
            pooler: true,
            extra: map
                .iter()
                .filter(|(k, _)| !KNOWN.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        };
        if given("model_type").is_none() {
            problems.push("`model_type` is missing".into());
        }
        problems.extend(config.problems());
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// What makes this shape impossible; empty if nothing does.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let sizes = [
            ("vocab_size", self.vocab, 1 << 22),
            ("hidden_size", self.d_model, 1 << 17),
            ("intermediate_size", self.d_ff, 1 << 20),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("num_attention_heads", self.heads, 1 << 12),
            ("max_position_embeddings", self.max_tokens, 1 << 24),
            ("type_vocab_size", self.token_types, 1 << 16),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                problems.push(format!("`{name}` is {value}; it should lie in 1..={limit}"));
            }
        }
        if self.heads != 0 && !self.d_model.is_multiple_of(self.heads) {
            problems.push(format!("{} heads cannot share a width of {} evenly", self.heads, self.d_model));
        }
        if !((self.norm_eps as f32).is_finite() && self.norm_eps >= 0.0) {
            let eps = self.norm_eps;
            problems.push(format!("`layer_norm_eps` is {eps}; it should be a number that is not negative"));
        }
        if self.model_type != bert::BERT {
            problems.push(format!("architecture `{}`; this can be loaded: {}", self.model_type, bert::BERT));
        }
        problems
    }

    /// The object of Hugging Face's `config.json`; `dtype` is PyTorch's name of the weights' type, such as `bfloat16`.
    pub fn to_hf(&self, dtype: &str) -> serde_json::Value {
        let mut map = self.extra.clone();
        let fields = json!({
            "architectures": [bert::ARCHITECTURE],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.max_tokens,
            "type_vocab_size": self.token_types,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "dtype": dtype,
        });
        map.extend(fields.as_object().expect("an object").clone());
        map.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hf(change: impl FnOnce(&mut serde_json::Value)) -> Result<EncoderConfig, String> {
        let mut value = EncoderConfig::tiny(40).to_hf("float32");
        change(&mut value);
        EncoderConfig::from_hf(&value).map_err(|problems| problems.join("\n"))
    }

    #[test]
    fn the_file_gives_the_config_back() {
        let mut extra = Map::new();
        extra.insert("pad_token_id".into(), json!(0));
        let config = EncoderConfig { norm_eps: 0.25, token_types: 3, extra, ..EncoderConfig::tiny(40) };
        assert_eq!(EncoderConfig::from_hf(&config.to_hf("bfloat16")).unwrap(), config);
        let changed = EncoderConfig { d_ff: 33, ..config.clone() };
        assert_ne!(EncoderConfig::from_hf(&changed.to_hf("bfloat16")).unwrap(), config, "control");
        assert_eq!(hf(|v| v["layer_norm_eps"] = serde_json::Value::Null).unwrap().norm_eps, 1e-12);
    }

    #[test]
    fn everything_wrong_is_listed() {
        let error = hf(|v| {
            v["hidden_act"] = "gelu_new".into();
            v["position_embedding_type"] = "relative_key".into();
            v["is_decoder"] = true.into();
            v["hidden_size"] = "16".into();
            v["num_attention_heads"] = 0.into();
            v["layer_norm_eps"] = (-1.0).into();
            v.as_object_mut().unwrap().remove("vocab_size");
        })
        .unwrap_err();
        let keys =
            ["hidden_act", "position_embedding_type", "is_decoder", "hidden_size", "num_attention_heads"];
        for key in keys.into_iter().chain(["layer_norm_eps", "vocab_size"]) {
            assert!(error.contains(key), "{key} in {error}");
        }
        assert!(hf(|v| v["model_type"] = "llama".into()).unwrap_err().contains("llama"));
        assert!(hf(|v| v["num_attention_heads"] = 3.into()).unwrap_err().contains("3 heads"));
        assert!(EncoderConfig::tiny(40).problems().is_empty(), "control");
    }

    proptest! {
        #[test]
        fn no_change_of_a_config_panics(at in any::<prop::sample::Index>(), kind in 0usize..8, number: f64, text: String) {
            let mut value = EncoderConfig::tiny(40).to_hf("float32");
            let map = value.as_object_mut().unwrap();
            let key = map.keys().nth(at.index(map.len())).unwrap().clone();
            let new = [
                json!(null), json!(number), json!(text), json!([]), json!({}), json!(u64::MAX), json!(-1), json!(0),
            ];
            map.insert(key, new[kind].clone());
            if let Ok(config) = EncoderConfig::from_hf(&value) {
                prop_assert!(config.problems().is_empty());
                prop_assert_eq!(EncoderConfig::from_hf(&config.to_hf("float32")).unwrap(), config);
            }
        }
    }
}
