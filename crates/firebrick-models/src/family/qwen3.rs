//! Qwen 3 (dense): norms on query and key heads, windows from some layer on.

use firebrick_core::Part;

use super::{Family, Flag, PLAIN, Row, Settings, Windows};

/// The Qwen 3 family.
pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    gguf: "qwen3",
    gguf_interleaves_qk: false,
    settings: Settings {
        qkv_bias: Flag::Key("attention_bias"),
        o_bias: Flag::Key("attention_bias"),
        qk_norm: true,
        windows: Windows::From,
        head_dim: Some(128),
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
        Row(Part::MlpNorm, "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
        Row(Part::MlpGate, "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
        Row(Part::MlpUp, "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        Row(Part::MlpDown, "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
        Row(Part::Norm, "model.norm.weight", "output_norm.weight"),
        Row(Part::Head, "lm_head.weight", "output.weight"),
    ],
};
