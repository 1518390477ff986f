//! One table per family of architectures: site, Hugging Face name, GGUF name.

mod llama;

use firebrick_core::{Part, Site, SiteEntry, SiteKind, SiteTable};

use crate::config::DecoderConfig;
use crate::error::ModelError;

/// One row of a family's table; `{}` in the names stands for the layer.
#[derive(Clone, Copy, Debug)]
struct Row {
    part: Part,
    hf: &'static str,
    gguf: &'static str,
}

/// A family of decoders: what it is called in files, and where each of its tensors belongs.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in Hugging Face's config.json.
    pub model_type: &'static str,
    /// `architectures[0]` in Hugging Face's config.json.
    pub architecture: &'static str,
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// Whether GGUF stores the rows of q and k for interleaved rotary pairs (llama.cpp's permutation).
    pub gguf_interleaves_qk: bool,
    rows: &'static [Row],
}

/// Every family that can be loaded.
const FAMILIES: &[&Family] = &[&llama::LLAMA];

impl Family {
    /// The family of a config.json `model_type`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the ones that are known.
    pub fn by_model_type(name: &str) -> Result<&'static Family, ModelError> {
        find(name, |f| f.model_type)
    }

    /// The family of a GGUF `general.architecture`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the ones that are known.
    pub fn by_gguf(name: &str) -> Result<&'static Family, ModelError> {
        find(name, |f| f.gguf)
    }

    fn row(&self, part: Part) -> Option<&Row> {
        self.rows.iter().find(|r| r.part == part)
    }

    /// Hugging Face's tensor name of `site`, `None` where the family has no weight.
    pub fn hf_name(&self, site: Site) -> Option<String> {
        Some(fill(self.row(site.part)?.hf, site.layer))
    }

    /// GGUF's tensor name of `site`, `None` where the family has no weight.
    pub fn gguf_name(&self, site: Site) -> Option<String> {
        Some(fill(self.row(site.part)?.gguf, site.layer))
    }

    /// The table of all sites of a model of this family.
    pub fn site_table(&self, config: &DecoderConfig) -> SiteTable {
        let c = config;
        let (d, q, kv) = (c.d_model, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let linear = |d_in, d_out| SiteKind::Linear { d_in, d_out };
        let norm = SiteKind::Norm { d };
        let mut block = vec![
            (Part::Block, SiteKind::Residual),
            (Part::AttnSublayer, SiteKind::Residual),
            (Part::AttnNorm, norm),
            (Part::Attn, SiteKind::Module),
            (Part::AttnQ, linear(d, q)),
            (Part::AttnK, linear(d, kv)),
            (Part::AttnV, linear(d, kv)),
            (Part::AttnO, linear(q, d)),
            (Part::AttnPostNorm, norm),
            (Part::MlpSublayer, SiteKind::Residual),
            (Part::MlpNorm, norm),
            (Part::Mlp, SiteKind::Module),
            (Part::MlpGate, linear(d, c.d_ff)),
            (Part::MlpUp, linear(d, c.d_ff)),
            (Part::MlpDown, linear(c.d_ff, d)),
            (Part::MlpPostNorm, norm),
        ];
        if !c.norm_placement.has_post_norm() {
            block.retain(|(p, _)| !matches!(p, Part::AttnPostNorm | Part::MlpPostNorm));
        }
        let entry = |site: Site, kind| SiteEntry { site, kind, tensor: self.hf_name(site) };
        let mut entries =
            vec![entry(Site::global(Part::Embed), SiteKind::Embedding { vocab: c.vocab, d_model: d })];
        for layer in 0..c.layers {
            entries.extend(block.iter().map(|(part, kind)| entry(Site::layer(layer, *part), *kind)));
        }
        entries.push(entry(Site::global(Part::Norm), norm));
        let mut head = entry(Site::global(Part::Head), linear(d, c.vocab));
        if c.tied_head {
            head.tensor = None;
        }
        entries.push(head);
        SiteTable::new(c.layers, entries)
    }
}

fn fill(pattern: &str, layer: Option<usize>) -> String {
    layer.map_or(pattern.to_string(), |l| pattern.replace("{}", &l.to_string()))
}

fn find(name: &str, key: impl Fn(&Family) -> &'static str) -> Result<&'static Family, ModelError> {
    FAMILIES.iter().find(|f| key(f) == name).copied().ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().map(|f| key(f)).collect();
        ModelError::Unsupported(format!("architecture `{name}`; these can be loaded: {}", known.join(", ")))
    })
}
