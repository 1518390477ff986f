//! What a decoder is made of, from config.json or GGUF metadata and back.

use std::path::Path;

use firebrick_tensor::checkpoint::gguf::{Gguf, Value};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use crate::error::ModelError;
use crate::family::Family;

/// Where the norms of a sublayer sit (Peri-LN, arXiv 2502.02732).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// In front of the sublayer: `x + f(norm(x))`.
    #[default]
    Pre,
    /// In front of the sublayer and on its output: `x + norm(f(norm(x)))`.
    Peri,
}

impl NormPlacement {
    /// Whether there is a norm on the output of each sublayer.
    pub fn has_post_norm(self) -> bool {
        self == NormPlacement::Peri
    }
}

/// The shape of a decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// Family, by Hugging Face's `model_type`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width inside the feed-forward network.
    pub d_ff: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Longest context the model was trained for, in tokens.
    pub max_tokens: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Whether the head is the embedding, transposed.
    pub tied_head: bool,
    /// Where the norms sit.
    #[serde(default)]
    pub norm_placement: NormPlacement,
    /// Keys of config.json that this type has no field for, kept for saving.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, serde_json::Value>,
}

/// The keys of config.json that [`DecoderConfig`] has fields for.
const KNOWN: &[&str] = &[
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rms_norm_eps",
    "tie_word_embeddings",
    "norm_placement",
];

impl DecoderConfig {
    /// A decoder small enough for tests and examples: two layers of width 16, four query and two key-value heads.
    pub fn tiny(vocab: usize) -> Self {
        DecoderConfig {
            model_type: "llama".into(),
            vocab,
            d_model: 16,
            d_ff: 32,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            max_tokens: 512,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            tied_head: true,
            norm_placement: NormPlacement::Pre,
            extra: Map::new(),
        }
    }

    /// Reads Hugging Face's `config.json` at `path`. Every problem is listed.
    pub fn from_hf_file(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))?;
        let value = serde_json::from_str(&text)
            .map_err(|e| ModelError::Invalid { path: path.into(), problems: vec![e.to_string()] })?;
        Self::from_hf(&value).map_err(|problems| ModelError::Invalid { path: path.into(), problems })
    }

    /// Reads the object of a Hugging Face `config.json`; the error lists every problem.
    pub fn from_hf(value: &serde_json::Value) -> Result<Self, Vec<String>> {
        let Some(map) = value.as_object() else { return Err(vec!["not a JSON object".into()]) };
        let mut problems = Vec::new();
        let mut size = |key: &str, default: Option<usize>| match map.get(key) {
            None | Some(serde_json::Value::Null) => default.unwrap_or_else(|| {
                problems.push(format!("`{key}` is missing"));
                0
            }),
            Some(v) => v.as_u64().map_or_else(
                || {
                    problems.push(format!("`{key}` should be a whole number, found {v}"));
                    0
                },
                |n| n as usize,
            ),
        };
        let (vocab, d_model, d_ff) =
            (size("vocab_size", None), size("hidden_size", None), size("intermediate_size", None));
        let (layers, heads) = (size("num_hidden_layers", None), size("num_attention_heads", None));
        let kv_heads = size("num_key_value_heads", Some(heads));
        let head_dim = size("head_dim", Some(d_model.checked_div(heads).unwrap_or(0)));
        let max_tokens = size("max_position_embeddings", Some(2048));

        let rope = map.get("rope_parameters").or_else(|| map.get("rope_scaling")).filter(|v| !v.is_null());
        let theta = map.get("rope_theta").or_else(|| rope.and_then(|r| r.get("rope_theta")));
        let rope_type = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type")));
        if let Some(kind) = rope_type.and_then(|t| t.as_str()).filter(|t| *t != "default") {
            problems.push(format!("rotary scaling of type `{kind}` is not supported (only `default`)"));
        }
        let flag = |key: &str| map.get(key).and_then(|v| v.as_bool()).unwrap_or(false);
        for key in ["attention_bias", "mlp_bias"] {
            if flag(key) {
                problems.push(format!("`{key}: true` is not supported"));
            }
        }
        if let Some(act) = map.get("hidden_act").and_then(|v| v.as_str()).filter(|a| *a != "silu") {
            problems.push(format!("activation `{act}` is not supported (only `silu`)"));
        }
        let norm_placement = match map.get("norm_placement").map(|v| serde_json::from_value(v.clone())) {
            None => NormPlacement::Pre,
            Some(Ok(placement)) => placement,
            Some(Err(e)) => {
                problems.push(format!("`norm_placement`: {e}"));
                NormPlacement::Pre
            }
        };
        let config = DecoderConfig {
            model_type: map.get("model_type").and_then(|v| v.as_str()).unwrap_or_default().to_string(),
            vocab,
            d_model,
            d_ff,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_tokens,
            rope_theta: theta.and_then(|v| v.as_f64()).unwrap_or(10_000.0),
            norm_eps: map.get("rms_norm_eps").and_then(|v| v.as_f64()).unwrap_or(1e-6),
            tied_head: flag("tie_word_embeddings"),
            norm_placement,
            extra: map
                .iter()
                .filter(|(k, _)| !KNOWN.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        };
        problems.extend(config.problems());
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// Reads the metadata of a GGUF file; `tied_head` is whether the file has no `output.weight`.
    pub fn from_gguf(gguf: &Gguf, vocab: usize, tied_head: bool, path: &Path) -> Result<Self, ModelError> {
        let fail = |problems| ModelError::Invalid { path: path.into(), problems };
        let arch = gguf.str("general.architecture")?;
        let family = Family::by_gguf(arch)?;
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| gguf.u32(&key(name)).map(|n| n as usize);
        let heads = size("attention.head_count")?;
        let d_model = size("embedding_length")?;
        let optional = |name: &str, default: usize| {
            if gguf.metadata.contains_key(&key(name)) { size(name) } else { Ok(default) }
        };
        let head_dim = optional("attention.key_length", d_model.checked_div(heads).unwrap_or(0))?;
        if gguf.metadata.contains_key(&key("rope.scaling.type")) {
            let kind = gguf.str(&key("rope.scaling.type"))?;
            if kind != "none" {
                return Err(fail(vec![format!("rotary scaling `{kind}` is not supported")]));
            }
        }
        let theta = key("rope.freq_base");
        let peri = key("firebrick.norm_placement");
        let config = DecoderConfig {
            model_type: family.model_type.to_string(),
            vocab,
            d_model,
            d_ff: size("feed_forward_length")?,
            layers: size("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv", heads)?,
            head_dim,
            max_tokens: optional("context_length", 2048)?,
            rope_theta: if gguf.metadata.contains_key(&theta) { gguf.f32(&theta)? as f64 } else { 10_000.0 },
            norm_eps: gguf.f32(&key("attention.layer_norm_rms_epsilon"))? as f64,
            tied_head,
            norm_placement: match gguf.metadata.contains_key(&peri).then(|| gguf.str(&peri)).transpose()? {
                Some("peri") => NormPlacement::Peri,
                _ => NormPlacement::Pre,
            },
            extra: Map::new(),
        };
        match config.problems() {
            p if p.is_empty() => Ok(config),
            p => Err(fail(p)),
        }
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
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                problems.push(format!("`{name}` is {value}; it should lie in 1..={limit}"));
            }
        }
        if self.kv_heads != 0 && !self.heads.is_multiple_of(self.kv_heads) {
            problems.push(format!(
                "{} query heads cannot share {} key-value heads evenly",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems
                .push(format!("`head_dim` is {}; rotary position embedding needs it even", self.head_dim));
        }
        if let Err(e) = Family::by_model_type(&self.model_type) {
            problems.push(e.to_string());
        }
        problems
    }

    /// The family of this model.
    pub fn family(&self) -> &'static Family {
        Family::by_model_type(&self.model_type).expect("checked when the config was made")
    }

    /// The object of Hugging Face's `config.json` (transformers 5 and 4 read it).
    pub fn to_hf(&self, dtype: &str) -> serde_json::Value {
        let mut map = self.extra.clone();
        let fields = json!({
            "architectures": [self.family().architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_tokens,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_head,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "dtype": dtype,
        });
        map.extend(fields.as_object().expect("an object").clone());
        if self.norm_placement != NormPlacement::Pre {
            map.insert("norm_placement".into(), json!(self.norm_placement));
        }
        map.remove("_name_or_path");
        map.into()
    }

    /// The `general.*` and architecture keys of GGUF, in llama.cpp's order.
    pub fn to_gguf(&self, name: &str) -> IndexMap<String, Value> {
        let arch = self.family().gguf;
        let key = |k: &str| format!("{arch}.{k}");
        let int = |n: usize| Value::U32(n as u32);
        let mut map = IndexMap::from([
            ("general.architecture".to_string(), Value::String(arch.into())),
            ("general.type".to_string(), Value::String("model".into())),
            ("general.name".to_string(), Value::String(name.into())),
            (key("block_count"), int(self.layers)),
            (key("context_length"), int(self.max_tokens)),
            (key("embedding_length"), int(self.d_model)),
            (key("feed_forward_length"), int(self.d_ff)),
            (key("attention.head_count"), int(self.heads)),
            (key("attention.head_count_kv"), int(self.kv_heads)),
            (key("attention.key_length"), int(self.head_dim)),
            (key("attention.value_length"), int(self.head_dim)),
            (key("rope.freq_base"), Value::F32(self.rope_theta as f32)),
            (key("rope.dimension_count"), int(self.head_dim)),
            (key("attention.layer_norm_rms_epsilon"), Value::F32(self.norm_eps as f32)),
            (key("vocab_size"), int(self.vocab)),
        ]);
        if self.norm_placement == NormPlacement::Peri {
            map.insert(key("firebrick.norm_placement"), Value::String("peri".into()));
        }
        map
    }
}
