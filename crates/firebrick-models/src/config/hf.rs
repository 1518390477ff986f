//! Hugging Face's `config.json`.

use std::path::Path;

use firebrick_core::{MAX_SETTINGS, read_text};
use serde_json::{Map, Value, json};

use super::{Activation, Biases, DecoderConfig, NormPlacement, all_but};
use crate::error::ModelError;
use crate::family::{Cap, Family, Flag, Windows};
use crate::rotary::RopeScaling;

/// The keys that [`DecoderConfig::from_hf`] reads and [`DecoderConfig::to_hf`] writes for some family, and those that say
/// nothing about the weights this crate writes.
const KNOWN: &[&str] = &[
    "architectures",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "hidden_act",
    "hidden_activation",
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
    "rope_local_base_freq",
    "rms_norm_eps",
    "tie_word_embeddings",
    "norm_placement",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
];

/// Keys that change what a model computes, in a way that the wiring does not know.
const REFUSED: &[&str] = &["use_bidirectional_attention"];

/// The window where a configuration says nothing of one.
const SILENT_WINDOW: usize = 4096;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// An object of a file, and what is wrong with it.
struct Reader<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Transformers writes null for what is not set.
    fn given(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Notes that `key` should be something else; gives `instead` to go on with.
    fn wrong<T>(&mut self, key: &str, what: &str, instead: T) -> T {
        let found = self.map.get(key).map_or("nothing".into(), short);
        self.problems.push(format!("`{key}` should be {what}, found {found}"));
        instead
    }

    fn size_or(&mut self, key: &str, default: usize) -> usize {
        match self.given(key) {
            None => default,
            Some(v) => match v.as_u64() {
                Some(n) => n as usize,
                None => self.wrong(key, "a whole number", 0),
            },
        }
    }

    fn size(&mut self, key: &str) -> usize {
        if self.given(key).is_none() {
            self.problems.push(format!("`{key}` is missing"));
        }
        self.size_or(key, 0)
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        match self.given(key)?.as_f64() {
            Some(v) => Some(v),
            None => self.wrong(key, "a number", None),
        }
    }

    fn flag_or(&mut self, key: &str, default: bool) -> bool {
        match self.given(key).map(Value::as_bool) {
            None => default,
            Some(Some(on)) => on,
            Some(None) => self.wrong(key, "true or false", default),
        }
    }

    fn cap(&mut self, key: &str, cap: Cap) -> Option<f64> {
        match cap {
            Cap::Or(default) if !self.map.contains_key(key) => default,
            _ => self.number(key),
        }
    }

    fn choice(&mut self, flag: Flag) -> bool {
        match flag {
            Flag::Always => true,
            Flag::Never => false,
            Flag::Key(key) => self.flag_or(key, false),
        }
    }

    /// The objects at `key`, with a problem if something else is there.
    fn object(&mut self, key: &str) -> Option<&'a Map<String, Value>> {
        match self.given(key)? {
            Value::Object(map) => Some(map),
            _ => self.wrong(key, "an object", None),
        }
    }

    fn biases(&mut self, family: &Family) -> Biases {
        let s = &family.settings;
        for key in ["attention_bias", "mlp_bias"] {
            let known = [s.qkv_bias, s.o_bias, s.mlp_bias].contains(&Flag::Key(key));
            if self.flag_or(key, false) && !known {
                self.problems.push(format!("`{key}: true` is not supported in {}", family.model_type));
            }
        }
        // A flag that is no flag was noted above.
        let noted = self.problems.len();
        let biases =
            Biases { qkv: self.choice(s.qkv_bias), o: self.choice(s.o_bias), mlp: self.choice(s.mlp_bias) };
        self.problems.truncate(noted);
        biases
    }

    fn activation(&mut self, family: &Family) -> Activation {
        let (key, activation) = family.settings.activation;
        // Gemma's files had both keys for a while; transformers reads the one of the family.
        if let Some(found) = self.given(key).filter(|a| *a != activation.hf_name()) {
            let known = activation.hf_name();
            self.problems.push(format!("activation {} is not supported (only \"{known}\")", short(found)));
        }
        activation
    }

    /// Base, scaling and base of layers with windows. Transformers 5 writes `rope_parameters`, with an object for each type
    /// of layer where they differ; 4 wrote `rope_theta`, `rope_scaling` and `rope_local_base_freq`. The base of the former wins, and
    /// the scaling of the latter.
    fn rope(&mut self, family: &Family) -> (f64, RopeScaling, Option<f64>) {
        let (mut theta, mut local) = (None, None);
        let mut scaling = RopeScaling::None;
        for key in ["rope_parameters", "rope_scaling"] {
            let Some(map) = self.object(key) else { continue };
            let mut rope = Reader { map, problems: Vec::new() };
            if family.settings.local_theta.is_some() {
                if let Some(map) = rope.object(SLIDING) {
                    let mut sliding = Reader { map, problems: Vec::new() };
                    local = local.or(sliding.number("rope_theta"));
                    if !sliding.scaling().is_none() {
                        sliding
                            .problems
                            .push("rotary scaling in layers with windows is not supported".into());
                    }
                    self.problems.append(&mut sliding.problems);
                }
                if let Some(map) = rope.object(FULL) {
                    self.problems.append(&mut rope.problems);
                    rope = Reader { map, problems: Vec::new() };
                }
            }
            theta = theta.or(rope.number("rope_theta"));
            let found = rope.scaling();
            if !found.is_none() {
                scaling = found;
            }
            for problem in rope.problems {
                if !self.problems.contains(&problem) {
                    self.problems.push(problem);
                }
            }
        }
        let theta = theta.or(self.number("rope_theta")).unwrap_or(family.settings.rope_theta);
        let local_of = |default: f64| local.or(self.number("rope_local_base_freq")).unwrap_or(default);
        (theta, scaling, family.settings.local_theta.map(local_of))
    }

    /// The scaling that an object of rotary settings asks for.
    fn scaling(&mut self) -> RopeScaling {
        if let Some(part) = self.number("partial_rotary_factor").filter(|p| *p != 1.0) {
            self.problems.push(format!("`partial_rotary_factor` {part} is not supported (only 1)"));
        }
        let kind = self.given("rope_type").or(self.given("type"));
        let noted = self.problems.len();
        let scaling = match kind.map(|k| k.as_str().unwrap_or_default()) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: self.needed("factor") },
            Some("llama3") => RopeScaling::Llama3 {
                factor: self.needed("factor"),
                low_freq_factor: self.needed("low_freq_factor"),
                high_freq_factor: self.needed("high_freq_factor"),
                original_max_tokens: self.size("original_max_position_embeddings"),
            },
            Some(_) => {
                let found = kind.map_or(String::new(), short);
                self.problems.push(format!(
                    "rotary scaling of type {found} is not supported (only \"default\", \"linear\" and \"llama3\")"
                ));
                RopeScaling::None
            }
        };
        if self.problems.len() == noted { scaling } else { RopeScaling::None }
    }

    fn needed(&mut self, key: &str) -> f64 {
        if self.given(key).is_none() {
            self.problems.push(format!("`{key}` of the rotary scaling is missing"));
        }
        self.number(key).unwrap_or_default()
    }

    /// The window, and for each layer whether it has it.
    fn windows(&mut self, family: &Family, layers: usize) -> (Option<usize>, Vec<bool>) {
        // Where nothing is said, not even null, transformers has a window.
        let window = |r: &mut Self| match r.map.contains_key("sliding_window") {
            true => r.given("sliding_window").map(|_| r.size("sliding_window")),
            false => Some(SILENT_WINDOW),
        };
        match family.settings.windows {
            Windows::Never => (None, Vec::new()),
            Windows::All => {
                let window = window(self);
                if window.is_some() && self.layer_types().is_some_and(|types| types.contains(&false)) {
                    let name = family.model_type;
                    self.problems.push(format!("`layer_types` without windows are not supported in {name}"));
                }
                (window, Vec::new())
            }
            Windows::From => {
                let on = self.flag_or("use_sliding_window", false);
                let types = self.layer_types();
                let window = window(self).filter(|_| on);
                if window.is_none() {
                    return (None, Vec::new());
                }
                let from = self.size_or("max_window_layers", 28);
                let by_depth = || all_but(0, layers).iter().enumerate().map(|(l, _)| l >= from).collect();
                (window, types.unwrap_or_else(by_depth))
            }
            Windows::AllBut(default) => {
                let size = self.size_or("sliding_window", SILENT_WINDOW);
                let newer = self.size_or("_sliding_window_pattern", default);
                let period = self.size_or("sliding_window_pattern", newer);
                if period == 0 {
                    self.problems.push("`sliding_window_pattern` is 0".into());
                }
                let types = self.layer_types();
                (Some(size), types.unwrap_or_else(|| all_but(period, layers)))
            }
        }
    }

    /// For each layer of `layer_types` whether it has a window.
    fn layer_types(&mut self) -> Option<Vec<bool>> {
        let types = self.given("layer_types")?;
        let of = |t: &Value| match t.as_str() {
            Some(FULL) => Some(false),
            Some(SLIDING) => Some(true),
            _ => None,
        };
        match types.as_array().map(|list| list.iter().map(of).collect::<Option<Vec<bool>>>()) {
            Some(Some(types)) => Some(types),
            _ => self.wrong("layer_types", "a list of \"full_attention\" and \"sliding_attention\"", None),
        }
    }
}

/// A value as it stands in a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(60).chain("...".chars()).collect() } else { text }
}

impl DecoderConfig {
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
    pub fn from_hf(value: &Value) -> Result<Self, Vec<String>> {
        let Some(map) = value.as_object() else { return Err(vec!["not a JSON object".into()]) };
        let model_type = map.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        // What else is wrong in a file of an unknown family is said by the rules of the best known one.
        let family = Family::by_model_type(&model_type).unwrap_or(Family::all()[0]);
        let mut r = Reader { map, problems: Vec::new() };
        let (vocab, d_model, d_ff) =
            (r.size("vocab_size"), r.size("hidden_size"), r.size("intermediate_size"));
        let (layers, heads) = (r.size("num_hidden_layers"), r.size("num_attention_heads"));
        let kv_heads = r.size_or("num_key_value_heads", heads);
        let by_width = d_model.checked_div(heads).unwrap_or(0);
        let head_dim = r.size_or("head_dim", family.settings.head_dim.unwrap_or(by_width));
        let max_tokens = r.size_or("max_position_embeddings", 2048);
        let (rope_theta, rope_scaling, local_theta) = r.rope(family);
        let norm_eps = r.number("rms_norm_eps").unwrap_or(1e-6);
        let tied_head = r.flag_or("tie_word_embeddings", family.settings.tied_head);
        let biases = r.biases(family);
        let activation = r.activation(family);
        let placement = r.given("norm_placement").map(|v| serde_json::from_value(v.clone()));
        let norm_placement = match placement {
            None => family.settings.norm_placement.unwrap_or_default(),
            Some(Ok(placement)) => placement,
            Some(Err(e)) => {
                r.problems.push(format!("`norm_placement`: {e}"));
                family.settings.norm_placement.unwrap_or_default()
            }
        };
        let (window, windowed) = r.windows(family, layers);
        let attn_softcap = r.cap("attn_logit_softcapping", family.settings.attn_softcap);
        let final_softcap = r.cap("final_logit_softcapping", family.settings.final_softcap);
        let query_scale = r.number("query_pre_attn_scalar").or(family.settings.query_scale);
        for key in REFUSED {
            if r.flag_or(key, false) {
                r.problems.push(format!("`{key}: true` is not supported"));
            }
        }
        let mut problems = r.problems;
        let config = DecoderConfig {
            model_type,
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
            biases,
            qk_norm: family.settings.qk_norm,
            norm_plus_one: family.settings.norm_plus_one,
            scaled_embedding: family.settings.scaled_embedding,
            activation,
            query_scale: query_scale.filter(|q| *q != head_dim as f64),
            attn_softcap,
            final_softcap,
            rope_scaling,
            local_theta,
            window,
            windowed,
            extra: map
                .iter()
                .filter(|(k, _)| !KNOWN.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
        };
        problems.extend(config.problems());
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// The object of Hugging Face's `config.json` (transformers 5 and 4 read it); `dtype` is PyTorch's name of the
    /// weights' type, such as `bfloat16`.
    pub fn to_hf(&self, dtype: &str) -> Value {
        let family = self.family();
        let s = &family.settings;
        let mut map = self.extra.clone();
        let fields = json!({
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_tokens,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_head,
            "dtype": dtype,
        });
        map.extend(fields.as_object().expect("an object").clone());
        let mut put = |key: &str, value: Value| drop(map.insert(key.into(), value));
        put(s.activation.0, self.activation.hf_name().into());
        let biases =
            [(s.qkv_bias, self.biases.qkv), (s.o_bias, self.biases.o), (s.mlp_bias, self.biases.mlp)];
        for (flag, on) in biases {
            if let Flag::Key(key) = flag {
                put(key, on.into());
            }
        }
        self.put_rope(&mut put);
        self.put_windows(s.windows, &mut put);
        if s.query_scale.is_some() {
            put("query_pre_attn_scalar", number(self.query_scale.unwrap_or(self.head_dim as f64)));
        }
        let caps = [
            ("attn_logit_softcapping", s.attn_softcap, self.attn_softcap),
            ("final_logit_softcapping", s.final_softcap, self.final_softcap),
        ];
        for (key, _, value) in caps.into_iter().filter(|(_, cap, _)| *cap != Cap::Never) {
            put(key, json!(value));
        }
        if s.norm_placement.is_none() && self.norm_placement != NormPlacement::Pre {
            put("norm_placement", json!(self.norm_placement));
        }
        map.into()
    }

    /// The rotary settings as transformers 5 reads them, and as 4 did.
    fn put_rope(&self, put: &mut dyn FnMut(&str, Value)) {
        let scaling = match self.rope_scaling {
            RopeScaling::None => json!({"rope_type": "default"}),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_tokens } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_tokens,
            }),
        };
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = self.rope_theta.into();
        put("rope_theta", self.rope_theta.into());
        if let Some(local) = self.local_theta {
            put("rope_local_base_freq", local.into());
            parameters = json!({FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": local}});
        }
        put("rope_parameters", parameters);
        if !self.rope_scaling.is_none() {
            put("rope_scaling", scaling);
        }
    }

    fn put_windows(&self, windows: Windows, put: &mut dyn FnMut(&str, Value)) {
        if windows == Windows::Never {
            return;
        }
        put("sliding_window", json!(self.window));
        if windows == Windows::All {
            return;
        }
        let on: Vec<bool> = (0..self.layers).map(|l| self.is_windowed(l)).collect();
        put("layer_types", on.iter().map(|on| if *on { SLIDING } else { FULL }).collect());
        if windows == Windows::From {
            put("use_sliding_window", self.window.is_some().into());
            // For readers that do not know `layer_types`.
            put("max_window_layers", on.iter().rposition(|on| !on).map_or(0, |l| l + 1).into());
        } else if let Some(period) = self.window_period() {
            put("sliding_window_pattern", period.into());
        }
    }
}

/// A whole number as one: transformers 5 takes nothing else for `query_pre_attn_scalar` (and only fractions for caps).
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
