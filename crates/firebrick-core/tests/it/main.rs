//! Properties of selectors, plans and budgets.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod budget;
mod plan;
mod selector;

use firebrick_core::{Part, Site, SiteEntry, SiteKind, SiteTable};

/// Four layers; the last two have two experts each in place of a dense feed-forward network.
pub fn table() -> SiteTable {
    let mut entries = Vec::new();
    let mut add =
        |site: Site, kind: SiteKind, tensor: Option<String>| entries.push(SiteEntry { site, kind, tensor });
    let linear = SiteKind::Linear { d_in: 8, d_out: 8 };
    let embedding = SiteKind::Embedding { vocab: 32, d_model: 8 };
    add(Site::global(Part::Embed), embedding, Some("model.embed_tokens.weight".into()));
    for layer in 0..4 {
        let at = |part| Site::layer(layer, part);
        let name = |rest: &str| Some(format!("model.layers.{layer}.{rest}.weight"));
        add(at(Part::Block), SiteKind::Residual, None);
        add(at(Part::AttnSublayer), SiteKind::Residual, None);
        add(at(Part::AttnNorm), SiteKind::Norm { d: 8 }, name("input_layernorm"));
        add(at(Part::Attn), SiteKind::Module, None);
        for (part, hf) in [(Part::AttnQ, "q"), (Part::AttnK, "k"), (Part::AttnV, "v"), (Part::AttnO, "o")] {
            add(at(part), linear, name(&format!("self_attn.{hf}_proj")));
        }
        add(at(Part::MlpSublayer), SiteKind::Residual, None);
        add(at(Part::Mlp), SiteKind::Module, None);
        let weights = [(Part::MlpGate, "gate"), (Part::MlpUp, "up"), (Part::MlpDown, "down")];
        if layer < 2 {
            for (part, hf) in weights {
                add(at(part), linear, name(&format!("mlp.{hf}_proj")));
            }
            continue;
        }
        add(at(Part::MlpRouter), linear, name("mlp.gate"));
        for expert in 0..2 {
            add(Site::expert(layer, Part::Mlp, expert), SiteKind::Module, None);
            for (part, hf) in weights {
                add(
                    Site::expert(layer, part, expert),
                    linear,
                    name(&format!("mlp.experts.{expert}.{hf}_proj")),
                );
            }
        }
    }
    add(Site::global(Part::Norm), SiteKind::Norm { d: 8 }, Some("model.norm.weight".into()));
    add(Site::global(Part::Head), linear, Some("lm_head.weight".into()));
    SiteTable::new(4, entries)
}
