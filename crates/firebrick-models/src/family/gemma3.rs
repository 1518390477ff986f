//! Gemma 3, text only (`gemma3_text`): four norms of `1 + weight`, norms on heads, five of six layers with windows.

use firebrick_core::Part;

use crate::config::{Activation, NormPlacement};

use super::{Cap, Family, Flag, PLAIN, Row, Settings, Windows};

/// The Gemma 3 family.
pub(super) const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    gguf: "gemma3",
    gguf_interleaves_qk: false,
    settings: Settings {
        qkv_bias: Flag::Key("attention_bias"),
        o_bias: Flag::Key("attention_bias"),
        qk_norm: true,
        norm_placement: Some(NormPlacement::Peri),
        norm_plus_one: true,
        scaled_embedding: true,
        activation: ("hidden_activation", Activation::GeluTanh),
        final_softcap: Cap::Or(None),
        query_scale: Some(256.0),
        windows: Windows::AllBut(6),
        local_theta: Some(10_000.0),
        head_dim: Some(256),
        tied_head: true,
        rope_theta: 1_000_000.0,
        gguf_silent: |config| {
            // Its scores are scaled by the width of the model for each head (gemma_pytorch's configuration of the 27B model).
            if config.query_scale.is_none() && config.layers == 62 {
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
        Row(Part::AttnQNorm, "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
        Row(Part::AttnKNorm, "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
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
