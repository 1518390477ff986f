//! What a decoder is made of, from config.json or GGUF metadata and back.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, read_text};
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

/// The keys of config.json that [`DecoderConfig::from_hf`] reads and [`DecoderConfig::to_hf`] writes, and those that say
/// nothing about the weights this crate writes.
const KNOWN: &[&str] = &[
    "architectures",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
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

    /// Reads Hugging Face's `config.json` at `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is not JSON, or does not describe a decoder; every problem is listed.
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
        let mut size = |key: &str, default: Option<usize>| match given(key) {
            None => default.unwrap_or_else(|| {
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

        let ropes: Vec<_> = ["rope_parameters", "rope_scaling"].into_iter().filter_map(given).collect();
        if let Some(other) = ropes.iter().find(|r| !r.is_object()) {
            problems.push(format!("rotary settings should be an object, found {other}"));
        }
        for kind in ropes.iter().flat_map(|r| [r.get("rope_type"), r.get("type")]).flatten() {
            if !kind.is_null() && kind != "default" {
                problems.push(format!("rotary scaling of type {kind} is not supported (only \"default\")"));
            }
        }
        let mut number = |key: &str, value: Option<&serde_json::Value>, default: f64| {
            value.map_or(default, |v| {
                v.as_f64().unwrap_or_else(|| {
                    problems.push(format!("`{key}` should be a number, found {v}"));
                    default
                })
            })
        };
        let nested = ropes.iter().filter_map(|r| r.get("rope_theta").filter(|v| !v.is_null())).next();
        let rope_theta = number("rope_theta", given("rope_theta").or(nested), 10_000.0);
        let norm_eps = number("rms_norm_eps", given("rms_norm_eps"), 1e-6);
        let mut flag = |key: &str| {
            given(key).is_some_and(|v| {
                v.as_bool().unwrap_or_else(|| {
                    problems.push(format!("`{key}` should be true or false, found {v}"));
                    false
                })
            })
        };
        let tied_head = flag("tie_word_embeddings");
        let biased = ["attention_bias", "mlp_bias"].map(|key| (key, flag(key)));
        for (key, _) in biased.into_iter().filter(|(_, on)| *on) {
            problems.push(format!("`{key}: true` is not supported"));
        }
        if let Some(act) = given("hidden_act").filter(|a| *a != "silu") {
            problems.push(format!("activation {act} is not supported (only \"silu\")"));
        }
        let norm_placement = match given("norm_placement").map(|v| serde_json::from_value(v.clone())) {
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
            rope_theta,
            norm_eps,
            tied_head,
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

    /// Reads the metadata of a GGUF file; `vocab` are the rows of its embedding, `tied_head` is whether it has no
    /// `output.weight`.
    ///
    /// # Errors
    /// If a key is missing or of another type than it should be, or the model is not supported.
    pub fn from_gguf(gguf: &Gguf, vocab: usize, tied_head: bool, path: &Path) -> Result<Self, ModelError> {
        let fail = |problems| ModelError::Invalid { path: path.into(), problems };
        let arch = gguf.str("general.architecture")?;
        let family = Family::by_gguf(arch).map_err(|e| fail(vec![e.to_string()]))?;
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
        let rotated = optional("rope.dimension_count", head_dim)?;
        if rotated != head_dim {
            return Err(fail(vec![format!(
                "{rotated} of {head_dim} rotary dimensions are not supported (only all)"
            )]));
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
                None | Some("pre") => NormPlacement::Pre,
                Some("peri") => NormPlacement::Peri,
                Some(other) => {
                    return Err(fail(vec![format!("`{peri}` is `{other}`; known are `pre` and `peri`")]));
                }
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
            ("max_position_embeddings", self.max_tokens, u32::MAX as usize),
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
        // Both are f32 in GGUF and in the kernels.
        let theta = self.rope_theta as f32;
        if !(theta.is_finite() && theta > 0.0) {
            problems.push(format!("`rope_theta` is {}; it should be a positive number", self.rope_theta));
        }
        let eps = self.norm_eps as f32;
        if !(eps.is_finite() && self.norm_eps >= 0.0) {
            problems.push(format!(
                "`rms_norm_eps` is {}; it should be a number that is not negative",
                self.norm_eps
            ));
        }
        if let Err(e) = Family::by_model_type(&self.model_type) {
            problems.push(e.to_string());
        }
        problems
    }

    /// The family of this model.
    ///
    /// # Panics
    /// If there is no such family; [`DecoderConfig::problems`] says so.
    pub fn family(&self) -> &'static Family {
        Family::by_model_type(&self.model_type).expect("checked when the config was made")
    }

    /// The object of Hugging Face's `config.json` (transformers 5 and 4 read it); `dtype` is PyTorch's name of the
    /// weights' type, such as `bfloat16`.
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn hf(change: impl FnOnce(&mut serde_json::Value)) -> Result<DecoderConfig, String> {
        let mut value = DecoderConfig::tiny(40).to_hf("float32");
        change(&mut value);
        DecoderConfig::from_hf(&value).map_err(|problems| problems.join("\n"))
    }

    fn gguf(
        config: &DecoderConfig,
        change: impl FnOnce(&mut IndexMap<String, Value>),
    ) -> Result<DecoderConfig, String> {
        let mut metadata = config.to_gguf("test");
        change(&mut metadata);
        let path = PathBuf::from("test.gguf");
        let file = Gguf { path: path.clone(), version: 3, alignment: 32, metadata };
        DecoderConfig::from_gguf(&file, config.vocab, config.tied_head, &path).map_err(|e| e.to_string())
    }

    #[test]
    fn both_formats_give_the_config_back() {
        let mut extra = Map::new();
        extra.insert("initializer_range".into(), json!(0.02));
        for norm_placement in [NormPlacement::Pre, NormPlacement::Peri] {
            let config = DecoderConfig {
                tied_head: false,
                norm_placement,
                rope_theta: 500_000.0,
                norm_eps: 0.25,
                extra: extra.clone(),
                ..DecoderConfig::tiny(40)
            };
            assert_eq!(DecoderConfig::from_hf(&config.to_hf("bfloat16")).unwrap(), config);
            let plain = DecoderConfig { extra: Map::new(), ..config.clone() };
            assert_eq!(gguf(&config, |_| ()).unwrap(), plain, "GGUF has no place for what is not understood");
            assert_ne!(plain, config, "control");
            let changed = DecoderConfig { d_ff: 33, ..config.clone() };
            assert_ne!(DecoderConfig::from_hf(&changed.to_hf("bfloat16")).unwrap(), config, "control");
        }
    }

    #[test]
    fn what_describes_other_weights_is_not_kept() {
        let config = hf(|v| {
            v["torch_dtype"] = "float16".into();
            v["quantization_config"] = json!({"bits": 4});
            v["bos_token_id"] = 1.into();
        });
        let written = config.unwrap().to_hf("float32");
        assert_eq!((written.get("torch_dtype"), written.get("quantization_config")), (None, None));
        assert_eq!((&written["dtype"], &written["bos_token_id"]), (&json!("float32"), &json!(1)));
    }

    #[test]
    fn null_is_absent() {
        let theta = |change: fn(&mut serde_json::Value)| hf(change).unwrap().rope_theta;
        assert_eq!(
            theta(|v| {
                v["rope_theta"] = serde_json::Value::Null;
                v["rope_parameters"]["rope_theta"] = 7.0.into();
            }),
            7.0
        );
        assert_eq!(
            theta(|v| {
                v["rope_theta"] = serde_json::Value::Null;
                v["rope_parameters"] = serde_json::Value::Null;
            }),
            10_000.0
        );
        for hidden in ["rope_parameters", "rope_scaling"] {
            let error = hf(|v| {
                v["rope_parameters"] = serde_json::Value::Null;
                v[hidden] = json!({"rope_type": null, "type": "llama3"});
            });
            assert!(error.unwrap_err().contains("llama3"), "{hidden}");
        }
        assert_eq!(hf(|v| v["rms_norm_eps"] = serde_json::Value::Null).unwrap().norm_eps, 1e-6);
        assert_eq!(hf(|v| v["num_key_value_heads"] = serde_json::Value::Null).unwrap().kv_heads, 4);
    }

    #[test]
    fn values_of_another_kind_are_listed() {
        let error = hf(|v| {
            v["rope_theta"] = "10000".into();
            v["rms_norm_eps"] = json!([1e-5]);
            v["tie_word_embeddings"] = "true".into();
            v["norm_placement"] = "post".into();
            v["hidden_size"] = (-1).into();
        })
        .unwrap_err();
        for key in ["rope_theta", "rms_norm_eps", "tie_word_embeddings", "norm_placement", "hidden_size"] {
            assert!(error.contains(key), "{key} in {error}");
        }
    }

    #[test]
    fn numbers_that_can_not_be_meant_are_problems() {
        assert!(DecoderConfig::tiny(40).problems().is_empty());
        let bad = [
            DecoderConfig { rope_theta: 0.0, ..DecoderConfig::tiny(40) },
            DecoderConfig { rope_theta: f64::NAN, ..DecoderConfig::tiny(40) },
            DecoderConfig { rope_theta: 1e300, ..DecoderConfig::tiny(40) },
            DecoderConfig { norm_eps: -1e-5, ..DecoderConfig::tiny(40) },
            DecoderConfig { norm_eps: f64::INFINITY, ..DecoderConfig::tiny(40) },
            DecoderConfig { max_tokens: 0, ..DecoderConfig::tiny(40) },
            DecoderConfig { max_tokens: 1 << 32, ..DecoderConfig::tiny(40) },
        ];
        for config in bad {
            assert_eq!(config.problems().len(), 1, "{config:?}");
        }
        assert!(DecoderConfig { norm_eps: 0.0, ..DecoderConfig::tiny(40) }.problems().is_empty());
    }

    #[test]
    fn gguf_keys_that_are_not_understood_are_refused() {
        let config = DecoderConfig::tiny(40);
        let broken = |key: &str, value: Value| {
            gguf(&config, |m| drop(m.insert(format!("llama.{key}"), value))).unwrap_err()
        };
        assert!(broken("firebrick.norm_placement", "post".into()).contains("post"));
        assert!(broken("rope.dimension_count", Value::U32(2)).contains("2 of 4 rotary dimensions"));
        assert!(broken("rope.scaling.type", "yarn".into()).contains("yarn"));
        let pre = gguf(&config, |m| drop(m.insert("llama.firebrick.norm_placement".into(), "pre".into())));
        assert_eq!(pre.unwrap().norm_placement, NormPlacement::Pre);
    }

    proptest! {
        #[test]
        fn no_change_of_a_config_panics(at in any::<prop::sample::Index>(), kind in 0usize..8, number: f64, text: String) {
            let mut value = DecoderConfig::tiny(40).to_hf("float32");
            let map = value.as_object_mut().unwrap();
            let key = map.keys().nth(at.index(map.len())).unwrap().clone();
            let new = [
                json!(null), json!(number), json!(text), json!([]), json!({"rope_theta": text}), json!(u64::MAX), json!(-1),
                json!(0),
            ];
            map.insert(key, new[kind].clone());
            if let Ok(config) = DecoderConfig::from_hf(&value) {
                prop_assert!(config.problems().is_empty());
                prop_assert_eq!(DecoderConfig::from_hf(&config.to_hf("float32")).unwrap(), config);
            }
        }
    }
}
