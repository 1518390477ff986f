//! Llama 1-3 without rotary scaling, SmolLM2, TinyLlama and everything else that says `llama`.

use firebrick_core::Part;

use super::{Family, Row};

/// The Llama family.
pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    gguf: "llama",
    gguf_interleaves_qk: true,
    rows: &[
        Row { part: Part::Embed, hf: "model.embed_tokens.weight", gguf: "token_embd.weight" },
        Row {
            part: Part::AttnNorm,
            hf: "model.layers.{}.input_layernorm.weight",
            gguf: "blk.{}.attn_norm.weight",
        },
        Row {
            part: Part::AttnQ,
            hf: "model.layers.{}.self_attn.q_proj.weight",
            gguf: "blk.{}.attn_q.weight",
        },
        Row {
            part: Part::AttnK,
            hf: "model.layers.{}.self_attn.k_proj.weight",
            gguf: "blk.{}.attn_k.weight",
        },
        Row {
            part: Part::AttnV,
            hf: "model.layers.{}.self_attn.v_proj.weight",
            gguf: "blk.{}.attn_v.weight",
        },
        Row {
            part: Part::AttnO,
            hf: "model.layers.{}.self_attn.o_proj.weight",
            gguf: "blk.{}.attn_output.weight",
        },
        Row {
            part: Part::AttnPostNorm,
            hf: "model.layers.{}.attn_output_layernorm.weight",
            gguf: "blk.{}.post_attention_norm.weight",
        },
        Row {
            part: Part::MlpNorm,
            hf: "model.layers.{}.post_attention_layernorm.weight",
            gguf: "blk.{}.ffn_norm.weight",
        },
        Row {
            part: Part::MlpGate,
            hf: "model.layers.{}.mlp.gate_proj.weight",
            gguf: "blk.{}.ffn_gate.weight",
        },
        Row { part: Part::MlpUp, hf: "model.layers.{}.mlp.up_proj.weight", gguf: "blk.{}.ffn_up.weight" },
        Row {
            part: Part::MlpDown,
            hf: "model.layers.{}.mlp.down_proj.weight",
            gguf: "blk.{}.ffn_down.weight",
        },
        Row {
            part: Part::MlpPostNorm,
            hf: "model.layers.{}.mlp_output_layernorm.weight",
            gguf: "blk.{}.post_ffw_norm.weight",
        },
        Row { part: Part::Norm, hf: "model.norm.weight", gguf: "output_norm.weight" },
        Row { part: Part::Head, hf: "lm_head.weight", gguf: "output.weight" },
    ],
};
