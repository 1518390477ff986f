//! Addresses in a wiring: parts, sites, sets of sites and the table of a model's sites.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A named place in a transformer.
///
/// Parts form a tree: `block` holds `attn_sublayer` and `mlp_sublayer` (residual stream in, residual stream out), each of which holds
/// its norms and the module proper (`attn`, `mlp`: normed input in, branch out, the boundary of Hugging Face's
/// `self_attn` and `mlp`), which holds the linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// Token embedding; a brick here sees the embedded tokens `[batch, tokens, d_model]`.
    Embed,
    /// A whole transformer block, residual stream to residual stream.
    Block,
    /// Norm, attention and residual add: residual stream to residual stream.
    AttnSublayer,
    /// The norm in front of attention.
    AttnNorm,
    /// Attention without norm and residual: normed input to branch output.
    Attn,
    /// Query projection.
    AttnQ,
    /// Key projection.
    AttnK,
    /// Value projection.
    AttnV,
    /// Bias of the query projection.
    AttnQBias,
    /// Bias of the key projection.
    AttnKBias,
    /// Bias of the value projection.
    AttnVBias,
    /// Norm over each query head.
    AttnQNorm,
    /// Norm over each key head.
    AttnKNorm,
    /// Output projection; its input is the concatenated heads `[batch, tokens, heads * head_dim]`.
    AttnO,
    /// Bias of the output projection.
    AttnOBias,
    /// The norm on attention's output (Peri placement), or on its sum with the residual (BERT).
    AttnPostNorm,
    /// Norm, feed-forward network and residual add: residual stream to residual stream.
    MlpSublayer,
    /// The norm in front of the feed-forward network.
    MlpNorm,
    /// Feed-forward network without norm and residual: normed input to branch output.
    Mlp,
    /// Router of a mixture-of-experts layer.
    MlpRouter,
    /// Gate projection.
    MlpGate,
    /// Up projection.
    MlpUp,
    /// Bias of the gate projection.
    MlpGateBias,
    /// Bias of the up projection.
    MlpUpBias,
    /// Down projection; its input is the hidden activation `[batch, tokens, d_ff]`.
    MlpDown,
    /// Bias of the down projection.
    MlpDownBias,
    /// The norm on the feed-forward network's output (Peri placement), or on its sum with the residual (BERT).
    MlpPostNorm,
    /// The norm in front of the head.
    Norm,
    /// Output projection to the vocabulary.
    Head,
}

impl Part {
    /// Every part, in the order data flows through them.
    pub const ALL: [Part; 29] = [
        Part::Embed,
        Part::Block,
        Part::AttnSublayer,
        Part::AttnNorm,
        Part::Attn,
        Part::AttnQ,
        Part::AttnK,
        Part::AttnV,
        Part::AttnQBias,
        Part::AttnKBias,
        Part::AttnVBias,
        Part::AttnQNorm,
        Part::AttnKNorm,
        Part::AttnO,
        Part::AttnOBias,
        Part::AttnPostNorm,
        Part::MlpSublayer,
        Part::MlpNorm,
        Part::Mlp,
        Part::MlpRouter,
        Part::MlpGate,
        Part::MlpUp,
        Part::MlpGateBias,
        Part::MlpUpBias,
        Part::MlpDown,
        Part::MlpDownBias,
        Part::MlpPostNorm,
        Part::Norm,
        Part::Head,
    ];

    /// The name used in selectors, plans and reports, such as `attn.q`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Embed => "embed",
            Part::Block => "block",
            Part::AttnSublayer => "attn_sublayer",
            Part::AttnNorm => "attn_norm",
            Part::Attn => "attn",
            Part::AttnQ => "attn.q",
            Part::AttnK => "attn.k",
            Part::AttnV => "attn.v",
            Part::AttnQBias => "attn.q_bias",
            Part::AttnKBias => "attn.k_bias",
            Part::AttnVBias => "attn.v_bias",
            Part::AttnQNorm => "attn.q_norm",
            Part::AttnKNorm => "attn.k_norm",
            Part::AttnO => "attn.o",
            Part::AttnOBias => "attn.o_bias",
            Part::AttnPostNorm => "attn_post_norm",
            Part::MlpSublayer => "mlp_sublayer",
            Part::MlpNorm => "mlp_norm",
            Part::Mlp => "mlp",
            Part::MlpRouter => "mlp.router",
            Part::MlpGate => "mlp.gate",
            Part::MlpUp => "mlp.up",
            Part::MlpGateBias => "mlp.gate_bias",
            Part::MlpUpBias => "mlp.up_bias",
            Part::MlpDown => "mlp.down",
            Part::MlpDownBias => "mlp.down_bias",
            Part::MlpPostNorm => "mlp_post_norm",
            Part::Norm => "norm",
            Part::Head => "head",
        }
    }

    /// The part that holds this one, or `None` for `block`, `embed`, `norm` and `head`.
    pub fn parent(self) -> Option<Part> {
        match self {
            Part::Embed | Part::Block | Part::Norm | Part::Head => None,
            Part::AttnSublayer | Part::MlpSublayer => Some(Part::Block),
            Part::AttnNorm | Part::Attn | Part::AttnPostNorm => Some(Part::AttnSublayer),
            Part::MlpNorm | Part::Mlp | Part::MlpPostNorm => Some(Part::MlpSublayer),
            Part::AttnQ | Part::AttnK | Part::AttnV | Part::AttnO => Some(Part::Attn),
            Part::AttnQBias | Part::AttnKBias | Part::AttnVBias | Part::AttnOBias => Some(Part::Attn),
            Part::AttnQNorm | Part::AttnKNorm => Some(Part::Attn),
            Part::MlpRouter | Part::MlpGate | Part::MlpUp | Part::MlpDown => Some(Part::Mlp),
            Part::MlpGateBias | Part::MlpUpBias | Part::MlpDownBias => Some(Part::Mlp),
        }
    }

    /// Where the bias of this linear layer sits; `None` for parts that are no linear layer in a block.
    ///
    /// A bias is a site of its own behind its layer, so that what replaces a matrix need not know of it.
    pub fn bias(self) -> Option<Part> {
        match self {
            Part::AttnQ => Some(Part::AttnQBias),
            Part::AttnK => Some(Part::AttnKBias),
            Part::AttnV => Some(Part::AttnVBias),
            Part::AttnO => Some(Part::AttnOBias),
            Part::MlpGate => Some(Part::MlpGateBias),
            Part::MlpUp => Some(Part::MlpUpBias),
            Part::MlpDown => Some(Part::MlpDownBias),
            _ => None,
        }
    }

    /// Whether the part exists once per layer (as opposed to once per model).
    pub fn in_layer(self) -> bool {
        !matches!(self, Part::Embed | Part::Norm | Part::Head)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An address in a wiring: a part, in a layer, of an expert.
///
/// Written `head`, `layers.3.attn.q` or `layers.3.mlp.experts.5.up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// Layer, from 0; `None` for parts that exist once per model.
    pub layer: Option<usize>,
    /// The part.
    pub part: Part,
    /// Expert, from 0, inside a mixture-of-experts layer.
    pub expert: Option<usize>,
}

impl Site {
    /// A part that exists once per model.
    pub fn global(part: Part) -> Self {
        Site { layer: None, part, expert: None }
    }

    /// A part of layer `layer`.
    pub fn layer(layer: usize, part: Part) -> Self {
        Site { layer: Some(layer), part, expert: None }
    }

    /// A part of expert `expert` in layer `layer`: `mlp` for all of it, or its gate, up or down projection.
    pub fn expert(layer: usize, part: Part, expert: usize) -> Self {
        Site { layer: Some(layer), part, expert: Some(expert) }
    }

    /// The site that holds this one in the tree of parts.
    pub fn parent(self) -> Option<Site> {
        match (self.expert, self.part) {
            (Some(_), Part::Mlp) => Some(Site { expert: None, ..self }),
            _ => self.part.parent().map(|part| Site { part, ..self }),
        }
    }

    /// The name below `layers.N.`, such as `attn.q` or `mlp.experts.5.up`.
    pub(crate) fn local_name(self) -> String {
        match self.expert {
            None => self.part.name().to_string(),
            Some(e) => match self.part.name().split_once('.') {
                Some((_, leaf)) => format!("mlp.experts.{e}.{leaf}"),
                None => format!("mlp.experts.{e}"),
            },
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}.")?;
        }
        f.write_str(&self.local_name())
    }
}

/// A text is not the address of a site.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a site; write for example `layers.3.attn.q`, `layers.0.mlp` or `head`")]
pub struct ParseSiteError(pub String);

impl FromStr for Site {
    type Err = ParseSiteError;

    fn from_str(text: &str) -> Result<Self, ParseSiteError> {
        let fail = || ParseSiteError(text.to_string());
        let (layer, local) = match text.strip_prefix("layers.") {
            Some(rest) => {
                let (number, local) = rest.split_once('.').ok_or_else(fail)?;
                (Some(number.parse().map_err(|_| fail())?), local)
            }
            None => (None, text),
        };
        let (expert, name) = match local.strip_prefix("mlp.experts.") {
            Some(rest) => {
                let (number, leaf) = rest.split_once('.').map_or((rest, None), |(n, l)| (n, Some(l)));
                let name = leaf.map_or("mlp".to_string(), |l| format!("mlp.{l}"));
                (Some(number.parse().map_err(|_| fail())?), name)
            }
            None => (None, local.to_string()),
        };
        let part = Part::ALL.into_iter().find(|p| p.name() == name).ok_or_else(fail)?;
        let site = Site { layer, part, expert };
        let in_expert = matches!(part, Part::Mlp | Part::MlpGate | Part::MlpUp | Part::MlpDown);
        // One site, one spelling: no `+3`, no `03`.
        let good =
            part.in_layer() == layer.is_some() && (expert.is_none() || in_expert) && site.to_string() == text;
        if good { Ok(site) } else { Err(fail()) }
    }
}

impl Serialize for Site {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Site {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An ordered set of sites.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SiteSet(BTreeSet<Site>);

impl SiteSet {
    /// Whether `site` is in the set.
    pub fn contains(&self, site: Site) -> bool {
        self.0.contains(&site)
    }

    /// Number of sites.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The sites of one layer, in order.
    pub fn of_layer(&self, layer: usize) -> impl Iterator<Item = Site> + '_ {
        let first = |layer| Site { layer: Some(layer), part: Part::ALL[0], expert: None };
        self.0.range(first(layer)..first(layer + 1)).copied()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sites, by layer and then in the order of [`Part`].
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Site> + '_ {
        self.0.iter().copied()
    }

    /// Adds a site; returns whether it was new.
    pub fn insert(&mut self, site: Site) -> bool {
        self.0.insert(site)
    }

    /// The sites of this set for which `keep` holds.
    pub fn filter(&self, keep: impl Fn(Site) -> bool) -> SiteSet {
        self.iter().filter(|s| keep(*s)).collect()
    }

    /// The sites of this set whose part is `part`.
    pub fn of_part(&self, part: Part) -> SiteSet {
        self.filter(|s| s.part == part)
    }
}

impl FromIterator<Site> for SiteSet {
    fn from_iter<I: IntoIterator<Item = Site>>(sites: I) -> Self {
        SiteSet(sites.into_iter().collect())
    }
}

/// What sits at a site of a wiring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SiteKind {
    /// `y = x W`, `x: [.., d_in]`, `y: [.., d_out]`; a bias is the site behind it.
    Linear {
        /// Width of the input.
        d_in: usize,
        /// Width of the output.
        d_out: usize,
    },
    /// A table of `vocab` rows of width `d_model`.
    Embedding {
        /// Number of rows.
        vocab: usize,
        /// Width of a row.
        d_model: usize,
    },
    /// A vector of width `d` added to the output of a linear layer, `x: [.., d]`.
    Bias {
        /// Width.
        d: usize,
    },
    /// A norm over groups of `d` values of the last dimension: over all of it, or over each head.
    Norm {
        /// Width.
        d: usize,
    },
    /// Residual stream in, residual stream out: `block`, `attn_sublayer`, `mlp_sublayer`.
    Residual,
    /// A module between a norm and the residual add: `attn`, `mlp`.
    Module,
}

impl SiteKind {
    /// Shape of the weight as a checkpoint holds it, `[d_out, d_in]` for a linear layer; `None` where there is none.
    pub fn weight_shape(self) -> Option<Vec<usize>> {
        match self {
            SiteKind::Linear { d_in, d_out } => Some(vec![d_out, d_in]),
            SiteKind::Embedding { vocab, d_model } => Some(vec![vocab, d_model]),
            SiteKind::Norm { d } | SiteKind::Bias { d } => Some(vec![d]),
            SiteKind::Residual | SiteKind::Module => None,
        }
    }
}

/// One site of a model, with the checkpoint tensor behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteEntry {
    /// The address.
    pub site: Site,
    /// What sits there.
    pub kind: SiteKind,
    /// Hugging Face's name of the weight, e.g. `model.layers.3.self_attn.q_proj.weight`; `None` where the site has no weight of its own.
    pub tensor: Option<String>,
}

/// All sites of one model, in the order data flows through them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SiteTable {
    entries: Vec<SiteEntry>,
    layers: usize,
    index: BTreeMap<Site, usize>,
}

impl SiteTable {
    /// Makes the table of a model with `layers` layers.
    pub fn new(layers: usize, entries: Vec<SiteEntry>) -> Self {
        let index = entries.iter().enumerate().map(|(i, e)| (e.site, i)).collect();
        SiteTable { entries, layers, index }
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The entries, in the order data flows through them.
    pub fn entries(&self) -> &[SiteEntry] {
        &self.entries
    }

    /// The entry of one site.
    pub fn get(&self, site: Site) -> Option<&SiteEntry> {
        self.index.get(&site).map(|i| &self.entries[*i])
    }

    /// The widths `(d_in, d_out)` of the linear layer at `site`, if one is there.
    pub fn linear(&self, site: Site) -> Option<(usize, usize)> {
        match self.get(site)?.kind {
            SiteKind::Linear { d_in, d_out } => Some((d_in, d_out)),
            _ => None,
        }
    }

    /// The site whose weight has this Hugging Face name.
    pub fn by_tensor(&self, name: &str) -> Option<Site> {
        self.entries.iter().find(|e| e.tensor.as_deref() == Some(name)).map(|e| e.site)
    }

    /// All sites.
    pub fn all(&self) -> SiteSet {
        self.entries.iter().map(|e| e.site).collect()
    }

    /// The linear layers inside the blocks (without the head): what adapters, quantizers and experts work on.
    pub fn block_linears(&self) -> SiteSet {
        let linears = self.entries.iter().filter(|e| matches!(e.kind, SiteKind::Linear { .. }));
        linears.map(|e| e.site).filter(|s| s.layer.is_some()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for part in Part::ALL {
            let site = if part.in_layer() { Site::layer(7, part) } else { Site::global(part) };
            assert_eq!(site.to_string().parse::<Site>(), Ok(site));
        }
        let expert = Site::expert(2, Part::MlpUp, 11);
        assert_eq!(expert.to_string(), "layers.2.mlp.experts.11.up");
        assert_eq!(expert.to_string().parse::<Site>(), Ok(expert));
        for bad in [
            "",
            "layers.x.attn",
            "layers.1",
            "attn.q",
            "layers.1.head",
            "layers.1.attn.z",
            "layers.+3.attn",
            "layers.03.attn",
            "layers.3.mlp.experts.+1.up",
            "layers.3.mlp.experts.01",
            "layers.0.mlp.experts.1.router",
            "mlp.experts.1.up",
        ] {
            assert!(bad.parse::<Site>().is_err(), "{bad}");
        }
        let no_expert = Site::expert(0, Part::AttnQ, 1).to_string();
        assert!(no_expert.parse::<Site>().is_err(), "{no_expert} is no site");
    }

    #[test]
    fn biases_lie_beside_their_layers() {
        let biases: Vec<Part> = Part::ALL.into_iter().filter_map(Part::bias).collect();
        assert_eq!(biases.len(), 7);
        for part in Part::ALL.into_iter().filter(|p| p.bias().is_some()) {
            let bias = part.bias().unwrap();
            assert_eq!((bias.parent(), bias.name()), (part.parent(), &*format!("{part}_bias")));
            assert!(bias > part, "behind it in the order of data");
        }
    }

    #[test]
    fn every_layer_part_descends_from_block() {
        for part in Part::ALL.into_iter().filter(|p| p.in_layer()) {
            let mut site = Site::layer(0, part);
            while let Some(parent) = site.parent() {
                site = parent;
            }
            assert_eq!(site.part, Part::Block);
        }
    }
}
