//! Mistral 7B and others that say `mistral`: Llama with windows in all layers. llama.cpp calls it `llama`.

use firebrick_core::Part;

use super::{Family, PLAIN, Row, Settings, Windows};

/// The Mistral family.
pub(super) const MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    gguf: "llama",
    gguf_interleaves_qk: true,
    settings: Settings { windows: Windows::All, ..PLAIN },
    rows: &[
        Row(Part::Embed, "model.embed_tokens.weight", "token_embd.weight"),
        Row(Part::AttnNorm, "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
        Row(Part::AttnQ, "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
        Row(Part::AttnK, "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
        Row(Part::AttnV, "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
        Row(Part::AttnO, "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
        Row(Part::MlpNorm, "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
        Row(Part::MlpGate, "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
        Row(Part::MlpUp, "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
        Row(Part::MlpDown, "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
        Row(Part::Norm, "model.norm.weight", "output_norm.weight"),
        Row(Part::Head, "lm_head.weight", "output.weight"),
    ],
};
