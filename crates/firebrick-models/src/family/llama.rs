//! Llama 1-3, SmolLM2, TinyLlama and everything else that says `llama`.

use firebrick_core::Part;

use super::{Family, Flag, PLAIN, Row, Settings};

/// The Llama family; the norms on outputs are an addition of this project.
pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    gguf: "llama",
    gguf_interleaves_qk: true,
    settings: Settings {
        qkv_bias: Flag::Key("attention_bias"),
        o_bias: Flag::Key("attention_bias"),
        mlp_bias: Flag::Key("mlp_bias"),
        norm_placement: None,
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
            "model.layers.{}.attn_output_layernorm.weight",
            "blk.{}.post_attention_norm.weight",
        ),
        Row(Part::MlpNorm, "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
        Row(Part::MlpGate, "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
        Row(Part::MlpUp, "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        Row(Part::MlpGateBias, "model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
        Row(Part::MlpUpBias, "model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
        Row(Part::MlpDown, "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
        Row(Part::MlpDownBias, "model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
        Row(Part::MlpPostNorm, "model.layers.{}.mlp_output_layernorm.weight", "blk.{}.post_ffw_norm.weight"),
        Row(Part::Norm, "model.norm.weight", "output_norm.weight"),
        Row(Part::Head, "lm_head.weight", "output.weight"),
    ],
};
