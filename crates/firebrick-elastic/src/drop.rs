//! Leaving out the blocks or sublayers that change the residual stream least.

use std::collections::BTreeMap;
use std::str::FromStr;

use firebrick_core::{LayerPlan, Part, Settings, Site, SiteSet, Skip};
use firebrick_models::Decoder;
use serde::{Deserialize, Serialize};

/// What is left out at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropKind {
    /// Attention sublayers, with their norm.
    Attn,
    /// Feed-forward sublayers, with their norm.
    Mlp,
    /// Attention and feed-forward sublayers, ranked in one list.
    Joint,
    /// Whole blocks.
    Block,
}

impl DropKind {
    /// The parts this kind leaves out.
    pub fn parts(self) -> &'static [Part] {
        match self {
            DropKind::Attn => &[Part::AttnSublayer],
            DropKind::Mlp => &[Part::MlpSublayer],
            DropKind::Joint => &[Part::AttnSublayer, Part::MlpSublayer],
            DropKind::Block => &[Part::Block],
        }
    }
}

impl FromStr for DropKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "attn" => Ok(DropKind::Attn),
            "mlp" => Ok(DropKind::Mlp),
            "joint" => Ok(DropKind::Joint),
            "block" => Ok(DropKind::Block),
            _ => Err(format!("`{text}` is not one of attn, mlp, joint, block")),
        }
    }
}

/// Influence of each residual site, `1 - E[cos(in, out)]`: 0 where the site could as well not be there.
pub type Scores = BTreeMap<Site, f64>;

/// What can go wrong when choosing what to leave out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DropError {
    /// More was asked for than there is.
    #[error("cannot leave out {count} of {available} candidates")]
    TooMany {
        /// How many were asked for.
        count: usize,
        /// How many there are.
        available: usize,
    },
    /// Only whole blocks can be cut out of a checkpoint.
    #[error(
        "`{site}` is not a whole block; only blocks can be cut out of a checkpoint, sublayers need their Skip brick"
    )]
    NotBlock {
        /// The site.
        site: Site,
    },
}

/// Sites to leave out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropPlan {
    /// The residual sites (`block`, `attn_sublayer`, `mlp_sublayer`).
    pub sites: SiteSet,
}

impl DropPlan {
    /// The `count` sites of `kind` with the least influence, in one shot. With `keep_ends`, the first and last layer stay:
    /// a cosine cannot see what the head needs from them.
    ///
    /// Ties go to the later layer; sites whose score is not a number count as important.
    ///
    /// # Errors
    /// [`DropError::TooMany`] if there are fewer candidates.
    pub fn lowest(scores: &Scores, kind: DropKind, count: usize, keep_ends: bool) -> Result<Self, DropError> {
        let last = scores.keys().filter_map(|s| s.layer).max();
        let inner = |s: &Site| !keep_ends || (s.layer != Some(0) && s.layer != last);
        let mut ranked: Vec<(Site, f64)> = scores
            .iter()
            .filter(|(s, _)| kind.parts().contains(&s.part) && inner(s))
            .map(|(s, v)| (*s, if v.is_nan() { f64::INFINITY } else { *v }))
            .collect();
        if count > ranked.len() {
            return Err(DropError::TooMany { count, available: ranked.len() });
        }
        ranked.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
        Ok(DropPlan { sites: ranked[..count].iter().map(|r| r.0).collect() })
    }

    /// One site at a time, measuring again after each: `measure` gives the scores of the model without the sites left out so far.
    ///
    /// # Errors
    /// As [`DropPlan::lowest`], and what `measure` answers.
    pub fn iterative<E: From<DropError>>(
        kind: DropKind,
        count: usize,
        keep_ends: bool,
        mut measure: impl FnMut(&Skip) -> Result<Scores, E>,
    ) -> Result<Self, E> {
        let mut plan = DropPlan::default();
        for _ in 0..count {
            let mut scores = measure(&plan.skip())?;
            if plan.sites.is_empty() {
                // Too many are refused as a whole, not when candidates run out.
                DropPlan::lowest(&scores, kind, count, keep_ends)?;
            }
            // Sites left out already look perfectly redundant.
            scores.retain(|site, _| !plan.sites.contains(*site));
            let next = DropPlan::lowest(&scores, kind, 1, keep_ends)?;
            plan.sites = plan.sites.iter().chain(next.sites.iter()).collect();
        }
        Ok(plan)
    }

    /// The plan as settings per site, `drop = true`.
    pub fn to_layer_plan(&self) -> LayerPlan {
        let drop = Settings { drop: Some(true), ..Settings::default() };
        LayerPlan::from_sites(self.sites.iter().map(|site| (site, drop.clone())))
    }

    /// The brick that leaves the sites out.
    pub fn skip(&self) -> Skip {
        Skip { sites: self.sites.clone() }
    }

    /// The layers of a model of `layers` layers that remain, if the plan holds whole blocks only.
    ///
    /// # Errors
    /// [`DropError::NotBlock`] if it holds a sublayer.
    pub fn kept_layers(&self, layers: usize) -> Result<Vec<usize>, DropError> {
        match self.sites.iter().find(|s| s.part != Part::Block) {
            Some(site) => Err(DropError::NotBlock { site }),
            None => Ok((0..layers).filter(|l| !self.sites.contains(Site::layer(*l, Part::Block))).collect()),
        }
    }

    /// `decoder` without the plan's blocks.
    ///
    /// # Errors
    /// As [`DropPlan::kept_layers`].
    pub fn cut(&self, decoder: Decoder) -> Result<Decoder, DropError> {
        let kept = self.kept_layers(decoder.config().layers)?;
        Ok(decoder.with_layers(&kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Int, Tensor};
    use firebrick_core::{Brick, Run, Seed};
    use firebrick_models::DecoderConfig;

    fn scores() -> Scores {
        let mut scores = Scores::new();
        for (layer, (attn, mlp)) in
            [(0.1, 0.9), (0.3, 0.2), (0.25, 0.8), (0.01, 0.02)].into_iter().enumerate()
        {
            scores.insert(Site::layer(layer, Part::AttnSublayer), attn);
            scores.insert(Site::layer(layer, Part::MlpSublayer), mlp);
            scores.insert(Site::layer(layer, Part::Block), attn + mlp);
        }
        scores
    }

    fn names(plan: &DropPlan) -> Vec<String> {
        plan.sites.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn the_least_influential_go_first() {
        let lowest = |kind, count, ends| names(&DropPlan::lowest(&scores(), kind, count, ends).unwrap());
        assert_eq!(lowest(DropKind::Attn, 2, false), ["layers.0.attn_sublayer", "layers.3.attn_sublayer"]);
        assert_eq!(lowest(DropKind::Attn, 2, true), ["layers.1.attn_sublayer", "layers.2.attn_sublayer"]);
        assert_eq!(lowest(DropKind::Joint, 2, true), ["layers.1.mlp_sublayer", "layers.2.attn_sublayer"]);
        assert_eq!(lowest(DropKind::Block, 1, false), ["layers.3.block"]);
        let err = DropPlan::lowest(&scores(), DropKind::Mlp, 3, true).unwrap_err();
        assert_eq!(err, DropError::TooMany { count: 3, available: 2 });
        let mut broken = scores();
        broken.insert(Site::layer(3, Part::Block), f64::NAN);
        assert_eq!(
            names(&DropPlan::lowest(&broken, DropKind::Block, 1, false).unwrap()),
            ["layers.1.block"],
            "a score that is not a number is never the lowest"
        );
    }

    #[test]
    fn cutting_blocks_equals_skipping_them() {
        let device = Device::flex();
        let config = DecoderConfig { layers: 4, ..DecoderConfig::tiny(40) };
        let decoder = Decoder::random(config, Seed(3), &device).unwrap();
        let tokens = Tensor::<2, Int>::from_ints([[1, 5, 9, 2, 7]], &device);
        let plan = DropPlan { sites: [1, 2].map(|l| Site::layer(l, Part::Block)).into_iter().collect() };
        let skip = plan.skip();
        let bricks: [&dyn Brick; 1] = [&skip];
        let full = decoder.forward(tokens.clone(), &mut Run::default());
        let skipped = decoder.forward(tokens.clone(), &mut Run::new(&bricks));
        let cut = plan.cut(decoder.clone()).unwrap();
        assert_eq!(cut.config().layers, 2);
        let cut = cut.forward(tokens.clone(), &mut Run::default());
        assert_eq!(cut.into_data(), skipped.clone().into_data());
        assert_ne!(full.clone().into_data(), skipped.into_data(), "control: the blocks do something");
        let nothing = DropPlan::default().cut(decoder).unwrap();
        assert_eq!(nothing.forward(tokens, &mut Run::default()).into_data(), full.into_data());
    }

    #[test]
    fn iterative_never_picks_a_site_twice() {
        let mut calls = 0;
        let plan = DropPlan::iterative::<DropError>(DropKind::Attn, 3, false, |skip| {
            assert_eq!(skip.sites.len(), calls);
            calls += 1;
            Ok(scores())
        });
        assert_eq!(plan.unwrap().sites.len(), 3);
        // Not even where nothing is left to tell them apart.
        let blind: Scores = scores().into_keys().map(|site| (site, f64::NAN)).collect();
        let iterative = |kind, count, ends, scores: &Scores| {
            DropPlan::iterative::<DropError>(kind, count, ends, |_| Ok(scores.clone()))
        };
        for count in 0..=4 {
            assert_eq!(iterative(DropKind::Attn, count, false, &blind).unwrap().sites.len(), count);
        }
        assert_eq!(
            names(&iterative(DropKind::Attn, 2, true, &scores()).unwrap()),
            names(&DropPlan::lowest(&scores(), DropKind::Attn, 2, true).unwrap())
        );
        let error = iterative(DropKind::Attn, 3, true, &scores()).unwrap_err();
        assert_eq!(error, DropError::TooMany { count: 3, available: 2 });
    }
}
