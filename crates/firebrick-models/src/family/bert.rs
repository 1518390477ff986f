//! BERT and what is built like it (MiniLM, BGE, E5): sites and names of an encoder's tensors.

use firebrick_core::{Part, Site, SiteEntry, SiteKind, SiteTable};
use firebrick_tensor::checkpoint::Format;

use crate::encoder::EncoderConfig;

/// `model_type` in Hugging Face's config.json and `general.architecture` in GGUF.
pub(crate) const BERT: &str = "bert";
/// `architectures[0]` in Hugging Face's config.json.
pub(crate) const ARCHITECTURE: &str = "BertModel";

/// A tensor of an encoder. Sites have a weight and a bias each; a few tensors belong to no site of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EncoderTensor {
    /// The weight of a site: `[vocab, d_model]`, `[d_out, d_in]`, or `[d_model]` for a norm.
    Weight(Site),
    /// The bias of a linear layer `[d_out]` or norm `[d_model]`.
    Bias(Site),
    /// The learned positions `[max_tokens, d_model]`.
    Positions,
    /// The token types `[token_types, d_model]`.
    TokenTypes,
    /// The factor of the norm on the embeddings, `[d_model]`.
    EmbedNormWeight,
    /// The bias of the norm on the embeddings, `[d_model]`.
    EmbedNormBias,
    /// The weight of the pooler `[d_model, d_model]`.
    PoolerWeight,
    /// The bias of the pooler `[d_model]`.
    PoolerBias,
}

/// What a part is called in Hugging Face's files and in GGUF, without `.weight` and `.bias`; `{}` stands for the layer.
const ROWS: &[(Part, &str, &str)] = &[
    (Part::Embed, "embeddings.word_embeddings", "token_embd"),
    (Part::AttnQ, "encoder.layer.{}.attention.self.query", "blk.{}.attn_q"),
    (Part::AttnK, "encoder.layer.{}.attention.self.key", "blk.{}.attn_k"),
    (Part::AttnV, "encoder.layer.{}.attention.self.value", "blk.{}.attn_v"),
    (Part::AttnO, "encoder.layer.{}.attention.output.dense", "blk.{}.attn_output"),
    (Part::AttnPostNorm, "encoder.layer.{}.attention.output.LayerNorm", "blk.{}.attn_output_norm"),
    (Part::MlpUp, "encoder.layer.{}.intermediate.dense", "blk.{}.ffn_up"),
    (Part::MlpDown, "encoder.layer.{}.output.dense", "blk.{}.ffn_down"),
    (Part::MlpPostNorm, "encoder.layer.{}.output.LayerNorm", "blk.{}.layer_output_norm"),
];

impl EncoderTensor {
    /// The name in a file of this format, `None` where the format has no place for it (GGUF has no pooler).
    pub fn name(self, format: Format) -> Option<String> {
        use EncoderTensor::*;
        let gguf = format == Format::Gguf;
        let site = |site: Site, suffix: &str| {
            let (_, hf, ggml) = ROWS.iter().find(|row| row.0 == site.part)?;
            let base = if gguf { ggml } else { hf };
            let layer = site.layer.map_or(String::new(), |l| l.to_string());
            Some(base.replace("{}", &layer) + suffix)
        };
        let (hf, ggml) = match self {
            Weight(s) => return site(s, ".weight"),
            Bias(s) => return site(s, ".bias"),
            Positions => ("embeddings.position_embeddings.weight", "position_embd.weight"),
            TokenTypes => ("embeddings.token_type_embeddings.weight", "token_types.weight"),
            EmbedNormWeight => ("embeddings.LayerNorm.weight", "token_embd_norm.weight"),
            EmbedNormBias => ("embeddings.LayerNorm.bias", "token_embd_norm.bias"),
            PoolerWeight | PoolerBias if gguf => return None,
            PoolerWeight => ("pooler.dense.weight", ""),
            PoolerBias => ("pooler.dense.bias", ""),
        };
        Some(if gguf { ggml } else { hf }.into())
    }
}

/// The sites of an encoder of this shape.
pub(crate) fn site_table(c: &EncoderConfig) -> SiteTable {
    let d = c.d_model;
    let linear = |d_in, d_out| SiteKind::Linear { d_in, d_out };
    let norm = SiteKind::Norm { d };
    let block = [
        (Part::Block, SiteKind::Residual),
        (Part::AttnSublayer, SiteKind::Residual),
        (Part::Attn, SiteKind::Module),
        (Part::AttnQ, linear(d, d)),
        (Part::AttnK, linear(d, d)),
        (Part::AttnV, linear(d, d)),
        (Part::AttnO, linear(d, d)),
        (Part::AttnPostNorm, norm),
        (Part::MlpSublayer, SiteKind::Residual),
        (Part::Mlp, SiteKind::Module),
        (Part::MlpUp, linear(d, c.d_ff)),
        (Part::MlpDown, linear(c.d_ff, d)),
        (Part::MlpPostNorm, norm),
    ];
    let entry = |site: Site, kind| SiteEntry {
        site,
        kind,
        tensor: EncoderTensor::Weight(site).name(Format::Safetensors),
    };
    let mut entries =
        vec![entry(Site::global(Part::Embed), SiteKind::Embedding { vocab: c.vocab, d_model: d })];
    for layer in 0..c.layers {
        entries.extend(block.iter().map(|(part, kind)| entry(Site::layer(layer, *part), *kind)));
    }
    SiteTable::new(c.layers, entries)
}

/// Every tensor of an encoder of this shape, in the order data flows through them, with its shape in Hugging Face's layout.
pub(crate) fn tensors(c: &EncoderConfig) -> Vec<(EncoderTensor, Vec<usize>)> {
    use EncoderTensor::*;
    let d = c.d_model;
    let mut tensors = vec![
        (Weight(Site::global(Part::Embed)), vec![c.vocab, d]),
        (Positions, vec![c.max_tokens, d]),
        (TokenTypes, vec![c.token_types, d]),
        (EmbedNormWeight, vec![d]),
        (EmbedNormBias, vec![d]),
    ];
    for entry in site_table(c).entries() {
        match entry.kind {
            SiteKind::Linear { d_in, d_out } => {
                tensors.push((Weight(entry.site), vec![d_out, d_in]));
                tensors.push((Bias(entry.site), vec![d_out]));
            }
            SiteKind::Norm { d } => {
                tensors.push((Weight(entry.site), vec![d]));
                tensors.push((Bias(entry.site), vec![d]));
            }
            _ => {}
        }
    }
    if c.pooler {
        tensors.push((PoolerWeight, vec![d, d]));
        tensors.push((PoolerBias, vec![d]));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        let config = EncoderConfig::tiny(40);
        let all = tensors(&config);
        // Embeddings and their norm: 5; a layer: six linear layers and two norms, each with a bias; the pooler: 2.
        assert_eq!(all.len(), 5 + config.layers * 16 + 2);
        for format in [Format::Safetensors, Format::Gguf] {
            let names: Vec<String> = all.iter().filter_map(|(t, _)| t.name(format)).collect();
            let unique: HashSet<&String> = names.iter().collect();
            let expected = if format == Format::Gguf { all.len() - 2 } else { all.len() };
            assert_eq!((names.len(), unique.len()), (expected, expected), "{format:?}");
        }
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/bert.json")).unwrap();
        let known = golden["gguf_names"].as_object().unwrap();
        let all = tensors(&EncoderConfig { layers: 3, ..config });
        assert_eq!(known.len(), all.len() - 2, "all but the pooler's");
        for (tensor, _) in all {
            let hf = tensor.name(Format::Safetensors).unwrap();
            assert_eq!(known.get(&hf).and_then(|n| n.as_str()), tensor.name(Format::Gguf).as_deref(), "{hf}");
        }
        let q = EncoderTensor::Bias(Site::layer(1, Part::AttnQ));
        assert_eq!(q.name(Format::Safetensors).unwrap(), "encoder.layer.1.attention.self.query.bias");
        assert_eq!(q.name(Format::Gguf).unwrap(), "blk.1.attn_q.bias");
        assert_eq!(EncoderTensor::Weight(Site::layer(0, Part::MlpGate)).name(Format::Gguf), None, "control");
    }
}
