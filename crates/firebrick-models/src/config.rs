//! What a decoder is made of.

mod gguf;
mod hf;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::family::Family;
use crate::rotary::RopeScaling;

pub use gguf::GgufTensors;

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

/// What the gate of the feed-forward network passes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x sigmoid(x)`: SwiGLU (arXiv 2002.05202).
    #[default]
    Silu,
    /// The Gaussian error linear unit (arXiv 1606.08415), its approximation by a hyperbolic tangent: GeGLU.
    GeluTanh,
}

impl Activation {
    /// Hugging Face's name.
    pub fn hf_name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        }
    }
}

/// Which linear layers have a bias; each is a site of its own ([`firebrick_core::Part::bias`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: bool,
    /// The attention's output projection.
    pub o: bool,
    /// Gate, up and down projections.
    pub mlp: bool,
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
    /// Which linear layers have a bias.
    #[serde(default, skip_serializing_if = "is_default")]
    pub biases: Biases,
    /// Whether each query and key head passes a norm before it is rotated.
    #[serde(default, skip_serializing_if = "is_default")]
    pub qk_norm: bool,
    /// Whether norms multiply by `1 + weight` instead of `weight`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm_plus_one: bool,
    /// Whether embedded tokens are multiplied by `sqrt(d_model)`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scaled_embedding: bool,
    /// What the gate of the feed-forward network passes through.
    #[serde(default, skip_serializing_if = "is_default")]
    pub activation: Activation,
    /// Attention scores are multiplied by `query_scale ^ -0.5`; `None`: by `head_dim ^ -0.5`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub query_scale: Option<f64>,
    /// Attention scores become `cap tanh(score / cap)` (Gemma 2, arXiv 2408.00118).
    #[serde(default, skip_serializing_if = "is_default")]
    pub attn_softcap: Option<f64>,
    /// Logits become `cap tanh(logit / cap)`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub final_softcap: Option<f64>,
    /// How rotary frequencies were changed for a longer context; not in layers with a base of their own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rope_scaling: RopeScaling,
    /// Base of the rotary frequencies in layers with a window, where it is another one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub local_theta: Option<f64>,
    /// In layers with a window, a token sees this many tokens, itself included.
    #[serde(default, skip_serializing_if = "is_default")]
    pub window: Option<usize>,
    /// For each layer whether it has the window; empty: all have it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub windowed: Vec<bool>,
    /// Keys of config.json that this type has no field for, kept for saving.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, serde_json::Value>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

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
            biases: Biases::default(),
            qk_norm: false,
            norm_plus_one: false,
            scaled_embedding: false,
            activation: Activation::Silu,
            query_scale: None,
            attn_softcap: None,
            final_softcap: None,
            rope_scaling: RopeScaling::None,
            local_theta: None,
            window: None,
            windowed: Vec::new(),
            extra: Map::new(),
        }
    }

    /// Whether layer `layer` has the window.
    pub fn is_windowed(&self, layer: usize) -> bool {
        self.window.is_some() && self.windowed.get(layer).is_none_or(|on| *on)
    }

    /// Factor on attention scores.
    pub fn attention_scale(&self) -> f64 {
        self.query_scale.unwrap_or(self.head_dim as f64).powf(-0.5)
    }

    /// The config of a decoder with only these layers of this one, in this order.
    pub(crate) fn with_layers(&self, layers: &[usize]) -> Self {
        let mut config = DecoderConfig { layers: layers.len(), ..self.clone() };
        if !self.windowed.is_empty() {
            config.windowed = layers.iter().map(|l| self.is_windowed(*l)).collect();
        }
        config
    }

    /// What makes this shape impossible, or impossible to write in its family's files; empty if nothing does.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let sizes = [
            ("vocab_size", self.vocab, 1 << 22),
            ("hidden_size", self.d_model, 1 << 17),
            ("intermediate_size", self.d_ff, 1 << 20),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
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
        if self.window.is_some_and(|w| w == 0 || w > u32::MAX as usize) {
            problems.push(format!("`sliding_window` is {}", self.window.unwrap_or(0)));
        }
        if !self.windowed.is_empty() && self.windowed.len() != self.layers {
            let (n, layers) = (self.windowed.len(), self.layers);
            problems.push(format!("{n} layers are said to have a window or none, there are {layers}"));
        }
        if !self.windowed.is_empty() && self.window.is_none() {
            problems.push("layers have windows, but `sliding_window` is missing".into());
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
        // These are f32 in GGUF and in the kernels.
        let positive = [
            ("rope_theta", Some(self.rope_theta)),
            ("rope_local_base_freq", self.local_theta),
            ("query_pre_attn_scalar", self.query_scale),
            ("attn_logit_softcapping", self.attn_softcap),
            ("final_logit_softcapping", self.final_softcap),
        ];
        for (name, value) in positive.into_iter().filter_map(|(n, v)| Some((n, v?))) {
            if !((value as f32).is_finite() && value as f32 > 0.0) {
                problems.push(format!("`{name}` is {value}; it should be a positive number"));
            }
        }
        let eps = self.norm_eps as f32;
        if !(eps.is_finite() && self.norm_eps >= 0.0) {
            problems.push(format!(
                "`rms_norm_eps` is {}; it should be a number that is not negative",
                self.norm_eps
            ));
        }
        problems.extend(self.rope_scaling.problem());
        match Family::by_model_type(&self.model_type) {
            Ok(family) => problems.extend(family.problems(self)),
            Err(e) => problems.push(e.to_string()),
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

    /// The smallest period in which the last layer alone has no window, if the windows have one.
    fn window_period(&self) -> Option<usize> {
        let has = |p: usize| (0..self.layers).all(|l| self.is_windowed(l) == ((l + 1) % p != 0));
        (1..=self.layers + 1).find(|p| has(*p))
    }
}

/// Most layers a model can have.
const MAX_LAYERS: usize = 1 << 12;

/// For each of `layers` layers whether it has a window, if all but every `period`-th have.
fn all_but(period: usize, layers: usize) -> Vec<bool> {
    // A count that no file bears out is not to be allocated.
    (0..layers.min(MAX_LAYERS)).map(|l| period == 0 || (l + 1) % period != 0).collect()
}
