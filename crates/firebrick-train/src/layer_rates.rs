//! Learning rates by layer.

use std::collections::BTreeMap;

use burn::module::ParamGroup;
use firebrick_core::{LayerPlan, Part, ResolvedPlan, Settings, Site, SiteTable};

use crate::Group;

/// Learning rates that fall by a factor of `decay` from each block to the one before it (ELECTRA, arXiv 2003.10555): the head and
/// the last norm have `learning_rate`, the last block `decay` times that, and the embedding `decay^(layers + 1)`.
pub fn layer_decay(sites: &SiteTable, learning_rate: f64, decay: f64) -> LayerPlan {
    let layers = sites.layers();
    let settings = |site: Site| {
        let below = match (site.layer, site.part) {
            (Some(layer), _) => layers.saturating_sub(layer),
            (None, Part::Embed) => layers + 1,
            _ => 0,
        };
        let rate = learning_rate * decay.powi(below as i32);
        (site, Settings { learning_rate: Some(rate), ..Settings::default() })
    };
    LayerPlan::from_sites(sites.all().iter().map(settings))
}

/// The groups of parameters that give every site the learning rate that `plan` sets there, and none where it is frozen.
///
/// `learning_rate` is the run's ([`crate::TrainConfig::learning_rate`]), more than 0; `paths` tells the paths of the trained
/// parameters at a site, in the module that trains (for a decoder, [`firebrick_models::Decoder::parameter`]).
pub fn site_groups(
    plan: &ResolvedPlan,
    learning_rate: f64,
    paths: &dyn Fn(Site) -> Vec<String>,
) -> Vec<Group> {
    // One group for all parameters of a factor; the bits order as the numbers do, which are not negative.
    let mut groups: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (&site, settings) in &plan.sites {
        let rate = if settings.frozen == Some(true) { Some(0.0) } else { settings.learning_rate };
        let Some(rate) = rate else { continue };
        groups.entry((rate / learning_rate).to_bits()).or_default().extend(paths(site));
    }
    let group = |(factor, paths): (u64, Vec<String>)| Group {
        params: ParamGroup::from_paths(paths),
        learning_rate: f64::from_bits(factor),
        weight_decay: None,
    };
    groups.into_iter().filter(|(_, paths)| !paths.is_empty()).map(group).collect()
}
