//! One table per family of architectures: site, Hugging Face name, GGUF name, and what its `config.json` can say.

pub(crate) mod bert;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use firebrick_core::{Part, Site, SiteEntry, SiteKind, SiteTable};

use crate::config::{Activation, DecoderConfig, NormPlacement};
use crate::error::ModelError;

/// One row of a family's table: part, Hugging Face's name, GGUF's name; `{}` in the names stands for the layer.
#[derive(Clone, Copy, Debug)]
struct Row(Part, &'static str, &'static str);

/// A family of decoders: what it is called in files, where each of its tensors belongs, and which settings it has.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in Hugging Face's config.json.
    pub model_type: &'static str,
    /// `architectures[0]` in Hugging Face's config.json.
    pub architecture: &'static str,
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// Whether GGUF stores the rows of q and k for interleaved rotary pairs (llama.cpp's permutation).
    pub gguf_interleaves_qk: bool,
    pub(crate) settings: Settings,
    rows: &'static [Row],
}

/// What a family's files say, and what they leave to the architecture.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Biases of q, k and v.
    pub qkv_bias: Flag,
    /// Bias of the attention's output.
    pub o_bias: Flag,
    /// Biases of the feed-forward network.
    pub mlp_bias: Flag,
    /// Norms over each query and key head.
    pub qk_norm: bool,
    /// Where norms sit; `None` where `norm_placement` may say it.
    pub norm_placement: Option<NormPlacement>,
    /// Norms multiply by `1 + weight`; GGUF holds the sum.
    pub norm_plus_one: bool,
    /// Embedded tokens are multiplied by `sqrt(d_model)`.
    pub scaled_embedding: bool,
    /// The key of the activation in config.json, and the only one there is.
    pub activation: (&'static str, Activation),
    /// The cap of attention scores, `attn_logit_softcapping`.
    pub attn_softcap: Cap,
    /// The cap of logits, `final_logit_softcapping`.
    pub final_softcap: Cap,
    /// What is meant where config.json does not say `query_pre_attn_scalar`; `None` where it can't.
    pub query_scale: Option<f64>,
    /// Which layers can have windows.
    pub windows: Windows,
    /// Base of the rotary frequencies in layers with windows, where it is another one.
    pub local_theta: Option<f64>,
    /// What is meant where config.json does not say `head_dim`; `None`: `d_model / heads`.
    pub head_dim: Option<usize>,
    /// What is meant where config.json does not say `tie_word_embeddings`.
    pub tied_head: bool,
    /// What is meant where config.json does not say the base of the rotary frequencies.
    pub rope_theta: f64,
    /// Fills in what llama.cpp knows of the architecture and its GGUF files do not say.
    pub gguf_silent: fn(&mut DecoderConfig),
}

/// A choice that the architecture makes, or leaves to a key of config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flag {
    Always,
    Never,
    Key(&'static str),
}

/// Whether values can be capped, and what is meant where config.json does not say it (null says: no cap).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cap {
    Never,
    Or(Option<f64>),
}

/// Which layers of a family can have windows, by its keys of config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    /// No layer.
    Never,
    /// All layers, if there is a `sliding_window`.
    All,
    /// `layer_types`, or layers from `max_window_layers` on; only with `use_sliding_window`.
    From,
    /// `layer_types`, or all but every `sliding_window_pattern`-th (or so many-th); there always is a `sliding_window`.
    AllBut(usize),
}

/// What most families have in common; a family's table says what differs.
const PLAIN: Settings = Settings {
    qkv_bias: Flag::Never,
    o_bias: Flag::Never,
    mlp_bias: Flag::Never,
    qk_norm: false,
    norm_placement: Some(NormPlacement::Pre),
    norm_plus_one: false,
    scaled_embedding: false,
    activation: ("hidden_act", Activation::Silu),
    attn_softcap: Cap::Never,
    final_softcap: Cap::Never,
    query_scale: None,
    windows: Windows::Never,
    local_theta: None,
    head_dim: None,
    tied_head: false,
    rope_theta: 10_000.0,
    gguf_silent: |_| (),
};

/// Every family that can be loaded. Where two share a name in GGUF, the first one that has what a file asks for is meant.
const FAMILIES: &[&Family] =
    &[&llama::LLAMA, &mistral::MISTRAL, &qwen2::QWEN2, &qwen3::QWEN3, &gemma2::GEMMA2, &gemma3::GEMMA3];

impl Family {
    /// Every family that can be loaded.
    pub fn all() -> &'static [&'static Family] {
        FAMILIES
    }

    /// The family of a config.json `model_type`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the ones that are known.
    pub fn by_model_type(name: &str) -> Result<&'static Family, ModelError> {
        find(name, |f| f.model_type).map(|families| families[0])
    }

    /// The families of a GGUF `general.architecture`, at least one.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the ones that are known.
    pub fn by_gguf(name: &str) -> Result<Vec<&'static Family>, ModelError> {
        find(name, |f| f.gguf)
    }

    fn row(&self, part: Part) -> Option<&Row> {
        self.rows.iter().find(|r| r.0 == part)
    }

    /// Hugging Face's tensor name of `site`, `None` where the family has no weight.
    pub fn hf_name(&self, site: Site) -> Option<String> {
        Some(fill(self.row(site.part)?.1, site.layer))
    }

    /// GGUF's tensor name of `site`, `None` where the family has no weight.
    pub fn gguf_name(&self, site: Site) -> Option<String> {
        Some(fill(self.row(site.part)?.2, site.layer))
    }

    /// The table of all sites of a model of this family.
    pub fn site_table(&self, config: &DecoderConfig) -> SiteTable {
        let (c, d) = (config, config.d_model);
        let entry = |site: Site, kind| SiteEntry { site, kind, tensor: self.hf_name(site) };
        let mut entries =
            vec![entry(Site::global(Part::Embed), SiteKind::Embedding { vocab: c.vocab, d_model: d })];
        let block = block(config);
        for layer in 0..c.layers {
            entries.extend(block.iter().map(|(part, kind)| entry(Site::layer(layer, *part), *kind)));
        }
        entries.push(entry(Site::global(Part::Norm), SiteKind::Norm { d }));
        let mut head = entry(Site::global(Part::Head), SiteKind::Linear { d_in: d, d_out: c.vocab });
        if c.tied_head {
            head.tensor = None;
        }
        entries.push(head);
        SiteTable::new(c.layers, entries)
    }

    /// What `config` asks for that files of this family can't say.
    pub(crate) fn problems(&self, config: &DecoderConfig) -> Vec<String> {
        let (c, s) = (config, &self.settings);
        let name = self.model_type;
        let mut problems = Vec::new();
        let weighs = |kind: &SiteKind| !matches!(kind, SiteKind::Residual | SiteKind::Module);
        let nowhere =
            block(config).into_iter().filter(|(part, kind)| weighs(kind) && self.row(*part).is_none());
        problems.extend(nowhere.map(|(part, _)| format!("`{part}` has no place in {name}")));
        let biases = [
            ("the biases of q, k and v", s.qkv_bias, c.biases.qkv),
            ("the bias of the attention's output", s.o_bias, c.biases.o),
            ("the biases of the feed-forward network", s.mlp_bias, c.biases.mlp),
        ];
        for (what, flag, on) in biases {
            match flag {
                Flag::Always if !on => problems.push(format!("{name} does not go without {what}")),
                Flag::Never if on => problems.push(format!("{name} does not have {what}")),
                _ => {}
            }
        }
        // One key of config.json says both.
        if s.qkv_bias == s.o_bias && matches!(s.o_bias, Flag::Key(_)) && c.biases.qkv != c.biases.o {
            problems.push(format!("in {name} either all of q, k, v and o have a bias or none has"));
        }
        let fixed = [
            ("norms on heads", c.qk_norm, s.qk_norm),
            ("norms of `1 + weight`", c.norm_plus_one, s.norm_plus_one),
            ("a scaled embedding", c.scaled_embedding, s.scaled_embedding),
            ("a rotary base of layers with windows", c.local_theta.is_some(), s.local_theta.is_some()),
        ];
        for (what, _, expected) in fixed.into_iter().filter(|(_, found, expected)| found != expected) {
            let verb = if expected { "always has" } else { "does not have" };
            problems.push(format!("{name} {verb} {what}"));
        }
        if s.norm_placement.is_some_and(|placement| placement != c.norm_placement) {
            problems.push(format!("norms are not placed like this in {name}"));
        }
        if c.activation != s.activation.1 {
            problems.push(format!("activation \"{}\" is not one of {name}", c.activation.hf_name()));
        }
        let extras = [
            ("`attn_logit_softcapping`", c.attn_softcap, s.attn_softcap == Cap::Never),
            ("`final_logit_softcapping`", c.final_softcap, s.final_softcap == Cap::Never),
            ("`query_pre_attn_scalar`", c.query_scale, s.query_scale.is_none()),
        ];
        for (key, ..) in extras.into_iter().filter(|(_, value, never)| value.is_some() && *never) {
            problems.push(format!("{name} has no {key}"));
        }
        let windows = match (s.windows, c.window) {
            (Windows::Never, Some(_)) => Some("has no windows"),
            (Windows::All, Some(_)) if !c.windowed.is_empty() => Some("has windows in all layers or in none"),
            (Windows::AllBut(_), None) => Some("does not go without a window"),
            (Windows::AllBut(_) | Windows::From, Some(_)) if c.windowed.is_empty() => {
                Some("says for each layer whether it has a window")
            }
            _ => None,
        };
        problems.extend(windows.map(|what| format!("{name} {what}")));
        problems
    }
}

/// The sites of one block.
fn block(config: &DecoderConfig) -> Vec<(Part, SiteKind)> {
    let c = config;
    let (d, q, kv) = (c.d_model, c.heads.saturating_mul(c.head_dim), c.kv_heads.saturating_mul(c.head_dim));
    let linear = |d_in, d_out| SiteKind::Linear { d_in, d_out };
    let (norm, head_norm) = (SiteKind::Norm { d }, SiteKind::Norm { d: c.head_dim });
    let bias = |d| SiteKind::Bias { d };
    let post = c.norm_placement.has_post_norm();
    let all = [
        (Part::Block, SiteKind::Residual, true),
        (Part::AttnSublayer, SiteKind::Residual, true),
        (Part::AttnNorm, norm, true),
        (Part::Attn, SiteKind::Module, true),
        (Part::AttnQ, linear(d, q), true),
        (Part::AttnK, linear(d, kv), true),
        (Part::AttnV, linear(d, kv), true),
        (Part::AttnQBias, bias(q), c.biases.qkv),
        (Part::AttnKBias, bias(kv), c.biases.qkv),
        (Part::AttnVBias, bias(kv), c.biases.qkv),
        (Part::AttnQNorm, head_norm, c.qk_norm),
        (Part::AttnKNorm, head_norm, c.qk_norm),
        (Part::AttnO, linear(q, d), true),
        (Part::AttnOBias, bias(d), c.biases.o),
        (Part::AttnPostNorm, norm, post),
        (Part::MlpSublayer, SiteKind::Residual, true),
        (Part::MlpNorm, norm, true),
        (Part::Mlp, SiteKind::Module, true),
        (Part::MlpGate, linear(d, c.d_ff), true),
        (Part::MlpUp, linear(d, c.d_ff), true),
        (Part::MlpGateBias, bias(c.d_ff), c.biases.mlp),
        (Part::MlpUpBias, bias(c.d_ff), c.biases.mlp),
        (Part::MlpDown, linear(c.d_ff, d), true),
        (Part::MlpDownBias, bias(d), c.biases.mlp),
        (Part::MlpPostNorm, norm, post),
    ];
    all.into_iter().filter(|(_, _, there)| *there).map(|(part, kind, _)| (part, kind)).collect()
}

fn fill(pattern: &str, layer: Option<usize>) -> String {
    layer.map_or(pattern.to_string(), |l| pattern.replace("{}", &l.to_string()))
}

fn find(name: &str, key: impl Fn(&Family) -> &'static str) -> Result<Vec<&'static Family>, ModelError> {
    let found: Vec<_> = FAMILIES.iter().filter(|f| key(f) == name).copied().collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let mut known: Vec<_> = FAMILIES.iter().map(|f| key(f)).collect();
    known.dedup();
    Err(ModelError::Unsupported(format!("architecture `{name}`; these can be loaded: {}", known.join(", "))))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_name_stands_for_two_tensors() {
        for family in FAMILIES {
            let parts: HashSet<Part> = family.rows.iter().map(|r| r.0).collect();
            let hf: HashSet<&str> = family.rows.iter().map(|r| r.1).collect();
            let gguf: HashSet<&str> = family.rows.iter().map(|r| r.2).collect();
            let n = family.rows.len();
            assert_eq!((parts.len(), hf.len(), gguf.len()), (n, n, n), "{}", family.model_type);
            for Row(part, hf, gguf) in family.rows {
                assert_eq!((hf.contains("{}"), gguf.contains("{}")), (part.in_layer(), part.in_layer()));
            }
        }
        let types: HashSet<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        assert_eq!(types.len(), FAMILIES.len());
    }
}
