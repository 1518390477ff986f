//! Calibration profiles, layer diagnostics, budget allocation and reports.
//!
//! [`profile`] runs a text through a decoder once and measures every block, sublayer and linear layer; [`allocate_bits`] and
//! [`allocate_ranks`] turn the [`Profile`] into a [`LayerPlan`](firebrick_core::LayerPlan), and [`bit_plans`] and [`rank_plans`]
//! set it beside uniform, first-layers, last-layers and random allocations of the same budget; [`Report`] writes any of it as JSON
//! and as one HTML file.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use firebrick_core::{Part, Site};

mod activation_sparsity;
mod allocation;
mod attention_pattern;
mod cka;
mod error;
mod expert_usage;
mod file;
mod fisher;
mod functional_partition;
mod hessian_trace;
mod host;
mod importance;
mod logit_lens;
mod metric;
mod profile;
mod report;
mod residual_flow;
mod sample;
mod second_moments;
mod stats;
mod weight_gradients;

pub use activation_sparsity::{ActivationProfile, DropLoss};
pub use allocation::{
    Allocation, Plans, RankBudget, allocate_bits, allocate_ranks, bit_front, bit_plans, rank_plans,
};
pub use attention_pattern::{AttentionPattern, AttentionProfile, HeadPattern};
pub use cka::{LayerGrams, Similarity, SimilarityOptions, cka, layer_grams};
pub use error::AnalysisError;
pub use expert_usage::{ExpertProfile, ExpertUsage};
pub use fisher::{FisherOptions, FisherProfile, Labels, fisher_diagonal, fisher_traces};
pub use functional_partition::{Partition, adjusted_rand, balanced_groups, functional_partition};
pub use hessian_trace::{Blocks, HessianOptions, HessianProfile, hessian_traces, hutchinson};
pub use host::{output_energies, weight_on_host};
pub use importance::importance;
pub use logit_lens::{LensLayer, LogitLens, logit_lens};
pub use metric::Metric;
pub use profile::{
    BitLoss, LinearProfile, Profile, ProfileOptions, RankLoss, ResidualProfile, SplitHalf, WeightSkew,
    profile, profile_with,
};
pub use report::{
    Bar, Bars, Cell, Column, Heatmap, Item, Lines, Point, Report, Row, Scatter, Section, Series, Strips,
    Table, number,
};
pub use residual_flow::{ResidualFlow, TokenFlow};
pub use second_moments::{SecondMoments, input_site};
pub use stats::{Estimate, gini, spearman};

/// Values by part and layer, one row per part in the order data flows; experts of a layer are averaged.
fn by_part(values: impl IntoIterator<Item = (Site, f64)>, layers: usize) -> Vec<(String, Vec<Option<f64>>)> {
    let mut sums: BTreeMap<Part, Vec<(f64, usize)>> = BTreeMap::new();
    for (site, value) in values {
        let row = sums.entry(site.part).or_insert_with(|| vec![(0.0, 0); layers]);
        if let Some(slot) = site.layer.and_then(|l| row.get_mut(l)) {
            *slot = (slot.0 + value, slot.1 + 1);
        }
    }
    let average = |(sum, n): (f64, usize)| (n > 0).then(|| sum / n as f64);
    sums.into_iter().map(|(part, row)| (part.to_string(), row.into_iter().map(average).collect())).collect()
}
