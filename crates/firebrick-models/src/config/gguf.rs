//! The metadata of a GGUF file, in llama.cpp's keys.

use std::path::Path;

use firebrick_tensor::checkpoint::gguf::{Array, Gguf, Value};
use indexmap::IndexMap;
use serde_json::Map;

use super::{Biases, DecoderConfig, NormPlacement, all_but};
use crate::error::ModelError;
use crate::family::{Family, Flag, Windows};
use crate::rotary::RopeScaling;

/// What the tensors of a GGUF file say about the shape of its model.
pub struct GgufTensors<'a> {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether there is a tensor of this name.
    pub has: &'a dyn Fn(&str) -> bool,
    /// The values of `rope_freqs.weight`.
    pub rope_divisors: Option<Vec<f32>>,
}

/// Metadata under the prefix of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn size(&self, name: &str) -> Result<usize, ModelError> {
        Ok(self.gguf.u32(&self.key(name))? as usize)
    }

    fn size_or(&self, name: &str, default: usize) -> Result<usize, ModelError> {
        Ok(self.gguf.optional(&self.key(name), Gguf::u32)?.map_or(default, |n| n as usize))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let value = self.gguf.optional(&self.key(name), Gguf::f32)?;
        // The shortest number that f32 rounds to this one: 1e-5 was written, not 9.999999747378752e-6.
        Ok(value.map(|v| v.to_string().parse().unwrap_or(f64::from(v))))
    }

    fn str(&self, name: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.gguf.optional(&self.key(name), Gguf::str)?)
    }

    /// The window, and for each layer whether it has it: a list, or the period of the layers without.
    fn windows(&self, family: &Family, layers: usize) -> Result<(Option<usize>, Vec<bool>), String> {
        const WINDOW: &str = "attention.sliding_window";
        let window = self.gguf.optional(&self.key(WINDOW), Gguf::u32).map_err(|e| e.to_string())?;
        let window = window.map(|n| n as usize).filter(|n| *n > 0);
        let key = self.key("attention.sliding_window_pattern");
        let pattern = match self.gguf.metadata.get(&key) {
            None => None,
            Some(Value::Array(Array::Bool(list))) => Some(list.clone()),
            Some(Value::Array(list)) => {
                list.integers().map(|list| Some(list.iter().map(|n| *n != 0).collect())).ok_or_else(|| {
                    format!("`{key}` should be a number or a list of true and false, found {}", list.len())
                })?
            }
            Some(value) => {
                let period = value.integer().and_then(|n| usize::try_from(n).ok());
                Some(all_but(period.ok_or_else(|| format!("`{key}` should be a number"))?, layers))
            }
        };
        Ok(match (family.settings.windows, window) {
            (Windows::AllBut(period), window) => {
                // llama.cpp's files of models without windows have no size either.
                let on = window.is_some();
                let windowed = pattern.unwrap_or_else(|| all_but(if on { period } else { 1 }, layers));
                (Some(window.unwrap_or(4096)), windowed)
            }
            (Windows::From, Some(_)) => {
                (window, pattern.unwrap_or_else(|| vec![true; layers.min(super::MAX_LAYERS)]))
            }
            _ => (window, Vec::new()),
        })
    }

    fn scaling(&self, tensors: &GgufTensors<'_>, theta: f64, head_dim: usize) -> Result<RopeScaling, String> {
        let text = |e: ModelError| e.to_string();
        let linear = match self.str("rope.scaling.type").map_err(text)? {
            None | Some("none") => RopeScaling::None,
            Some("linear") => {
                let factor = self.number("rope.scaling.factor").map_err(text)?;
                RopeScaling::Linear { factor: factor.ok_or("the factor of the rotary scaling is missing")? }
            }
            Some(kind) => return Err(format!("rotary scaling `{kind}` is not supported")),
        };
        let Some(divisors) = &tensors.rope_divisors else { return Ok(linear) };
        if !linear.is_none() {
            return Err("two rotary scalings, one by `rope_freqs.weight`, are not supported".into());
        }
        let original = self.size_or(ORIGINAL_CONTEXT, 8192).map_err(text)?;
        RopeScaling::from_divisors(divisors, theta, head_dim, original)
            .ok_or("`rope_freqs.weight` is not a rotary scaling of Llama 3's kind".into())
    }
}

const EPSILON: &str = "attention.layer_norm_rms_epsilon";
const ORIGINAL_CONTEXT: &str = "rope.scaling.original_context_length";

impl DecoderConfig {
    /// Reads the metadata of a GGUF file, with what its tensors say.
    ///
    /// # Errors
    /// If a key is missing or of another type than it should be, or the model is not supported.
    pub fn from_gguf(gguf: &Gguf, tensors: &GgufTensors<'_>, path: &Path) -> Result<Self, ModelError> {
        let arch = gguf.str("general.architecture")?;
        let fail = |problems| ModelError::Invalid { path: path.into(), problems };
        let families = Family::by_gguf(arch).map_err(|e| fail(vec![e.to_string()]))?;
        let mut problems = None;
        for family in families {
            match Self::of_family(family, &Keys { gguf, arch }, tensors)? {
                Ok(config) => return Ok(config),
                Err(found) => drop(problems.get_or_insert(found)),
            }
        }
        Err(fail(problems.unwrap_or_default()))
    }

    fn of_family(
        family: &'static Family,
        keys: &Keys<'_>,
        tensors: &GgufTensors<'_>,
    ) -> Result<Result<Self, Vec<String>>, ModelError> {
        let s = &family.settings;
        let mut problems = Vec::new();
        let (heads, d_model, layers) =
            (keys.size("attention.head_count")?, keys.size("embedding_length")?, keys.size("block_count")?);
        let head_dim = keys.size_or("attention.key_length", d_model.checked_div(heads).unwrap_or(0))?;
        let rotated = keys.size_or("rope.dimension_count", head_dim)?;
        if rotated != head_dim {
            problems.push(format!("{rotated} of {head_dim} rotary dimensions are not supported (only all)"));
        }
        let values = keys.size_or("attention.value_length", head_dim)?;
        if values != head_dim {
            problems.push(format!("values of {values} beside keys of {head_dim} are not supported"));
        }
        let fixed = s.norm_placement;
        let norm_placement = match (keys.str("firebrick.norm_placement")?, fixed) {
            (None, _) => fixed.unwrap_or_default(),
            (Some("pre"), None | Some(NormPlacement::Pre)) => NormPlacement::Pre,
            (Some("peri"), None | Some(NormPlacement::Peri)) => NormPlacement::Peri,
            (Some(other), _) => {
                let (key, name) = (keys.key("firebrick.norm_placement"), family.model_type);
                problems
                    .push(format!("`{key}` is `{other}`; known are `pre` and `peri`, where {name} has them"));
                fixed.unwrap_or_default()
            }
        };
        let rope_theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
        let local_theta = match s.local_theta {
            Some(default) => Some(keys.number("rope.freq_base_swa")?.unwrap_or(default)),
            None => None,
        };
        let rope_scaling = keys.scaling(tensors, rope_theta, head_dim).unwrap_or_else(|problem| {
            problems.push(problem);
            RopeScaling::None
        });
        let (window, windowed) = keys.windows(family, layers).unwrap_or_else(|problem| {
            problems.push(problem);
            (None, Vec::new())
        });
        let biased = |flag: Flag, name: &str| match flag {
            Flag::Always => true,
            Flag::Never => false,
            Flag::Key(_) => (tensors.has)(&format!("blk.0.{name}.bias")),
        };
        let query_scale = keys.number("attention.scale")?.map(|scale| {
            // The inverse square, without what f32 lost.
            let found = scale.powi(-2);
            if (found - found.round()).abs() < 1e-4 * found { found.round() } else { found }
        });
        let mut config = DecoderConfig {
            model_type: family.model_type.to_string(),
            vocab: tensors.vocab,
            d_model,
            d_ff: keys.size("feed_forward_length")?,
            layers,
            heads,
            kv_heads: keys.size_or("attention.head_count_kv", heads)?,
            head_dim,
            max_tokens: keys.size_or("context_length", 2048)?,
            rope_theta,
            norm_eps: match keys.number(EPSILON)? {
                Some(eps) => eps,
                None => keys.gguf.f32(&keys.key(EPSILON))?.into(),
            },
            tied_head: !(tensors.has)("output.weight"),
            norm_placement,
            biases: Biases {
                qkv: biased(s.qkv_bias, "attn_q"),
                o: biased(s.o_bias, "attn_output"),
                mlp: biased(s.mlp_bias, "ffn_up"),
            },
            qk_norm: s.qk_norm,
            norm_plus_one: s.norm_plus_one,
            scaled_embedding: s.scaled_embedding,
            activation: s.activation.1,
            query_scale,
            attn_softcap: keys.number("attn_logit_softcapping")?,
            final_softcap: keys.number("final_logit_softcapping")?,
            rope_scaling,
            local_theta,
            window,
            windowed,
            extra: Map::new(),
        };
        (s.gguf_silent)(&mut config);
        config.query_scale = config.query_scale.filter(|q| *q != head_dim as f64);
        problems.extend(config.problems());
        Ok(if problems.is_empty() { Ok(config) } else { Err(problems) })
    }

    /// What GGUF has no place for in this config.
    pub(crate) fn gguf_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let scaled = matches!(self.rope_scaling, RopeScaling::Llama3 { .. });
        if scaled && !self.rope_scaling.follows_from_divisors(self.rope_theta, self.head_dim) {
            problems
                .push("rotary scaling with other factors than Llama 3's 1 and 4 has no place in GGUF".into());
        }
        problems
    }

    /// The values of `rope_freqs.weight`, if the file needs it.
    pub(crate) fn rope_divisors(&self) -> Option<Vec<f32>> {
        let scaled = matches!(self.rope_scaling, RopeScaling::Llama3 { .. });
        let divisors = self.rope_scaling.divisors(self.rope_theta, self.head_dim);
        scaled.then(|| divisors.iter().map(|d| *d as f32).collect())
    }

    /// The `general.*` and architecture keys of GGUF, in llama.cpp's order.
    pub fn to_gguf(&self, name: &str) -> IndexMap<String, Value> {
        let family = self.family();
        let arch = family.gguf;
        let key = |k: &str| format!("{arch}.{k}");
        let int = |n: usize| Value::U32(n as u32);
        let float = |v: f64| Value::F32(v as f32);
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
            (key("rope.freq_base"), float(self.rope_theta)),
            (key("rope.dimension_count"), int(self.head_dim)),
            (key(EPSILON), float(self.norm_eps)),
            (key("vocab_size"), int(self.vocab)),
        ]);
        let mut put = |k: &str, value: Value| drop(map.insert(key(k), value));
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                put("rope.scaling.type", "linear".into());
                put("rope.scaling.factor", float(factor));
            }
            RopeScaling::Llama3 { original_max_tokens, .. } => {
                put(ORIGINAL_CONTEXT, int(original_max_tokens))
            }
        }
        if let Some(local) = self.local_theta {
            put("rope.freq_base_swa", float(local));
        }
        if let Some(window) = self.window {
            put("attention.sliding_window", int(window));
            if !self.windowed.is_empty() {
                put("attention.sliding_window_pattern", self.window_pattern(family));
            }
        }
        if let Some(scale) = self.query_scale {
            put("attention.scale", float(scale.powf(-0.5)));
        }
        if let Some(cap) = self.attn_softcap {
            put("attn_logit_softcapping", float(cap));
        }
        if let Some(cap) = self.final_softcap {
            put("final_logit_softcapping", float(cap));
        }
        if family.settings.norm_placement.is_none() && self.norm_placement == NormPlacement::Peri {
            put("firebrick.norm_placement", Value::String("peri".into()));
        }
        map
    }

    /// The period where llama.cpp expects one and there is one, a list otherwise.
    fn window_pattern(&self, family: &Family) -> Value {
        let periodic = matches!(family.settings.windows, Windows::AllBut(_));
        match self.window_period().filter(|_| periodic) {
            Some(period) => Value::U32(period as u32),
            None => Value::Array(Array::Bool(self.windowed.clone())),
        }
    }
}
