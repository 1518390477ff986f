//! Qwen 2 and 2.5: biases on q, k and v, windows from some layer on.

use firebrick_core::Part;

use super::{Family, Flag, PLAIN, Row, Settings, Windows};

/// The Qwen 2 family.
pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    gguf: "qwen2",
    gguf_interleaves_qk: false,
    settings: Settings { qkv_bias: Flag::Always, windows: Windows::From, ..PLAIN },
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
        Row(Part::MlpNorm, "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
        Row(Part::MlpGate, "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
        Row(Part::MlpUp, "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        Row(Part::MlpDown, "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
        Row(Part::Norm, "model.norm.weight", "output_norm.weight"),
        Row(Part::Head, "lm_head.weight", "output.weight"),
    ],
};
