//! What the names of tensors say: layers, modules, embeddings, heads.
//!
//! No table of architectures is needed for a merge: layers are the numbers behind `layers`, `h` or `blocks`, as in every family of
//! transformers, and what lies outside them comes before or after by what it is called.

/// Most layers that a name can speak of; larger numbers are something else.
const MAX_LAYER: usize = 1 << 12;

/// What the numbers of layers stand behind, in the names of all known families.
const LAYER_LISTS: &[&str] = &["layers", "layer", "h", "blocks", "block", "resblocks"];

/// Matrices with one row per token that are read, by the end of their names.
const EMBEDDINGS: &[&str] = &[
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
];

/// Matrices with one row per token that give logits.
const HEADS: &[&str] = &["lm_head.weight", "embed_out.weight", "output.weight", "lm_head.bias"];

/// A tensor of a layer: `model.layers` + 3 + `mlp.up_proj.weight`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerName<'a> {
    pub prefix: &'a str,
    pub layer: usize,
    pub rest: &'a str,
}

/// The first number that is a whole part of a dotted name and stands behind a list of layers.
pub(crate) fn layer_name(name: &str) -> Option<LayerName<'_>> {
    split(name, |prefix| LAYER_LISTS.contains(&prefix.rsplit('.').next().unwrap_or_default()))
}

/// The same for names of no known kind: the first number, whatever it stands behind.
pub(crate) fn numbered_name(name: &str) -> Option<LayerName<'_>> {
    split(name, |_| true)
}

/// The name of a tensor of the layers behind `prefix`.
pub(crate) fn behind<'a>(name: &'a str, prefix: &str) -> Option<LayerName<'a>> {
    split(name, |p| p == prefix)
}

fn split(name: &str, takes: impl Fn(&str) -> bool) -> Option<LayerName<'_>> {
    let mut start = 0;
    for part in name.split('.') {
        let end = start + part.len();
        if start > 0
            && end < name.len()
            && part.bytes().all(|b| b.is_ascii_digit())
            && let Ok(layer) = part.parse::<usize>()
            && layer < MAX_LAYER
            && takes(&name[..start - 1])
        {
            return Some(LayerName { prefix: &name[..start - 1], layer, rest: &name[end + 1..] });
        }
        start = end + 1;
    }
    None
}

fn ends_with_any(name: &str, ends: &[&str]) -> bool {
    ends.iter()
        .any(|end| name.strip_suffix(end).is_some_and(|start| start.is_empty() || start.ends_with('.')))
}

/// Whether it is the embedding of tokens.
pub(crate) fn is_embedding(name: &str) -> bool {
    ends_with_any(name, EMBEDDINGS)
}

/// Whether it is the head, which a model that ties it to the embedding has not.
pub(crate) fn is_head(name: &str) -> bool {
    ends_with_any(name, HEADS)
}

/// Whether a tensor outside the layers lies before them.
pub(crate) fn is_before_layers(name: &str) -> bool {
    let parts = ["embed", "wte", "wpe", "patch", "cls_token", "class_token"];
    !is_head(name) && parts.iter().any(|part| name.contains(part))
}

/// Tables that follow from the configuration, which old versions of transformers saved.
pub(crate) fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn.masked_bias")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbers_behind_their_lists() {
        let name = layer_name("model.layers.11.mlp.experts.3.w1.weight").unwrap();
        assert_eq!((name.prefix, name.layer, name.rest), ("model.layers", 11, "mlp.experts.3.w1.weight"));
        assert_eq!(layer_name("transformer.h.0.ln_1.bias").unwrap().prefix, "transformer.h");
        assert_eq!(layer_name("encoder.layer.2.output.dense.weight").unwrap().layer, 2);
        for other in [
            "model.norm.weight",
            "visual.merger.mlp.0.weight",
            "layers.99999999999999999999.w",
            "layers.4096.w",
            "0.w",
            "layers.1",
        ] {
            assert_eq!(layer_name(other), None, "{other}");
        }
        assert_eq!(numbered_name("visual.mlp.0.weight").unwrap().prefix, "visual.mlp");
    }

    #[test]
    fn embeddings_and_heads_are_known_by_their_ends() {
        assert!(
            is_embedding("model.embed_tokens.weight")
                && is_embedding("wte.weight")
                && !is_embedding("xwte.weight")
        );
        assert!(
            is_head("lm_head.weight")
                && is_head("language_model.lm_head.weight")
                && !is_head("model.norm.weight")
        );
        assert!(
            is_before_layers("embeddings.position_embeddings.weight")
                && !is_before_layers("embed_out.weight")
        );
        assert!(
            !is_before_layers("model.norm.weight")
                && is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
        );
    }
}
