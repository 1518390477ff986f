//! Gemma 2: four norms of `1 + weight`, capped scores and logits, windows in every other layer.

use firebrick_core::Part;

use crate::config::{Activation, NormPlacement};

use super::{Cap, Family, Flag, PLAIN, Row, Settings, Windows};

/// The Gemma 2 family.
pub(super) const GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    gguf: "gemma2",
    gguf_interleaves_qk: false,
    settings: Settings {
        qkv_bias: Flag::Key("attention_bias"),
        o_bias: Flag::Key("attention_bias"),
        norm_placement: Some(NormPlacement::Peri),
        norm_plus_one: true,
        scaled_embedding: true,
        activation: ("hidden_activation", Activation::GeluTanh),
        attn_softcap: Cap::Or(Some(50.0)),
        final_softcap: Cap::Or(Some(30.0)),
        query_scale: Some(256.0),
        windows: Windows::AllBut(2),
        head_dim: Some(256),
        tied_head: true,
        gguf_silent: |config| {
            // Its scores are scaled by the width of the model for each head (gemma_pytorch's configuration of the 27B model).
            if config.query_scale.is_none() && config.layers == 46 {
                config.query_scale = config.d_model.checked_div(config.heads).map(|n| n as f64);
            }
        },
        ..PLAIN
    },
    rows: &[
        Row(Part::Embed, "model.embed_tokens.weight", "token_embd.weight"),
        Row(Part::AttnNorm, "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
        Row(Part::AttnQ, "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
        Row(Part::AttnK, "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
        Row(Part::AttnV, "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
        Row(Part::AttnQBias, "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
        Row(Part::AttnKBias, "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
        Row(Part::AttnVBias, "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
        Row(Part::AttnO, "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
        Row(Part::AttnOBias, "model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
        Row(
            Part::AttnPostNorm,
            "model.layers.{}.post_attention_layernorm.weight",
            "blk.{}.post_attention_norm.weight",
        ),
        Row(Part::MlpNorm, "model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
        Row(Part::MlpGate, "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
        Row(Part::MlpUp, "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        Row(Part::MlpDown, "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
        Row(
            Part::MlpPostNorm,
            "model.layers.{}.post_feedforward_layernorm.weight",
            "blk.{}.post_ffw_norm.weight",
        ),
        Row(Part::Norm, "model.norm.weight", "output_norm.weight"),
        Row(Part::Head, "lm_head.weight", "output.weight"),
    ],
};
