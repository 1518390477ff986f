//! The sections of the metrics that a profile may have, and of two profiles side by side.

use std::collections::BTreeMap;

use firebrick_core::{Part, Site};

use super::Profile;
use crate::by_part;
use crate::report::{Cell, Heatmap, Lines, Row, Section, Strips, Table, number};
use crate::stats::mean;

impl Profile {
    /// Attention, neurons, similarity, lens, curvature and experts, as far as they were measured.
    pub(super) fn metric_sections(&self) -> Vec<Section> {
        [
            self.attention_section(),
            self.neuron_section(),
            self.similarity_section(),
            self.lens_section(),
            self.curvature_section(),
            self.expert_section(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// One value per layer; `None` where there is none.
    fn over_layers(&self, values: impl Iterator<Item = (Option<usize>, f64)>) -> Vec<Option<f64>> {
        let found: BTreeMap<usize, f64> = values.filter_map(|(l, v)| Some((l?, v))).collect();
        (0..self.layers).map(|l| found.get(&l).copied()).collect()
    }

    fn attention_section(&self) -> Option<Section> {
        if self.attention.is_empty() {
            return None;
        }
        let row = |label: &str, value: fn(&crate::AttentionProfile) -> f64| {
            Row::new(label, self.over_layers(self.attention.iter().map(|a| (a.site.layer, value(a)))))
        };
        let map = Heatmap::new("Attention, means over heads", "layer", self.layers)
            .row(row("entropy", |a| a.entropy.mean))
            .row(row("weight on the first token", |a| a.sink.mean))
            .row(row("distance, tokens", |a| a.distance.mean).log())
            .row(row("disagreement of the heads", |a| a.disagreement.mean));
        let strip = |title: &str, value: fn(&crate::HeadPattern) -> f64| {
            let of = |l: usize| {
                let found = self.attention.iter().filter(|a| a.site.layer == Some(l));
                found.flat_map(|a| a.heads.iter().map(value)).collect::<Vec<_>>()
            };
            Strips::new(title, "layer", "share", (0..self.layers).map(of))
        };
        let mut table = Table::new("Every layer's attention")
            .text_column("site")
            .number_column("entropy")
            .number_column("± ");
        for name in ["sink", "distance", "disagreement"] {
            table = table.number_column(name);
        }
        for a in &self.attention {
            let numbers =
                [a.entropy.mean, a.entropy.error, a.sink.mean, a.distance.mean, a.disagreement.mean]
                    .map(Cell::from);
            table = table.row(std::iter::once(a.site.to_string().into()).chain(numbers));
        }
        Some(
            Section::new("Attention")
                .text(
                    "Entropy is that of a head's weights as a share of uniform weights over the keys in sight: 0 for one key, \
                     1 for all alike. Weight on the first token is what a head does not need elsewhere. Disagreement is the \
                     Jensen-Shannon divergence between the heads, 1 if no two share a key.",
                )
                .heatmap(map)
                .strips(strip("Entropy of every head", |h| h.entropy))
                .strips(strip("Weight of every head on the first token", |h| h.sink))
                .text(format!("At most {} queries of each window were looked at.", self.options.queries))
                .table(table.folded()),
        )
    }

    fn neuron_section(&self) -> Option<Section> {
        let first = self.activation.first()?;
        let row = |label: &str, value: &dyn Fn(&crate::ActivationProfile) -> Option<f64>| {
            let of = self.activation.iter().filter_map(|a| Some((a.site.layer, value(a)?)));
            Row::new(label, self.over_layers(of))
        };
        let mut map = Heatmap::new("Neurons", "layer", self.layers)
            .row(row("share with 95 % of the energy", &|a| Some(a.active)))
            .row(row("Hoyer's sparsity", &|a| Some(a.hoyer)))
            .row(row("exact zeros", &|a| Some(a.zeros)))
            .row(row("dead neurons", &|a| Some(a.dead as f64)));
        for drop in &first.dropped {
            let label = format!("error without the weakest {:.0} %", 100.0 * drop.share);
            let share = drop.share;
            map =
                map.row(row(&label, &move |a| a.dropped.iter().find(|d| d.share == share).map(|d| d.error)));
        }
        let parts = self.activation.iter().filter_map(|a| a.partition.as_ref());
        let lifts: Vec<f64> = parts.clone().map(|p| p.lift).collect();
        let mut section = Section::new("Neurons")
            .text(
                "The inputs of the down projection, token by token. Errors are those of the layer's output when the weakest \
                 activations count as 0, as a share of its length.",
            )
            .heatmap(map);
        if let Some(partition) = parts.clone().next() {
            let of = |value: fn(&crate::Partition) -> f64| {
                let found =
                    self.activation.iter().filter_map(|a| Some((a.site.layer, value(a.partition.as_ref()?))));
                self.over_layers(found)
            };
            let groups =
                Heatmap::new(format!("Neurons in {} groups", partition.groups), "layer", self.layers)
                    .row(Row::new(format!("energy in the best {}", partition.top), of(|p| p.share)))
                    .row(Row::new("the same, random groups", of(|p| p.chance)))
                    .row(Row::new("lift", of(|p| p.lift)))
                    .row(Row::new("stability", of(|p| p.stability)));
            section = section.heatmap(groups).text(format!(
                "Groups of equal size by the correlation of their activations, judged on other tokens than they were made from; \
                 mean lift over random groups {}. Stability is the agreement of the groups from two halves of the tokens.",
                number(mean(&lifts))
            ));
        }
        Some(section)
    }

    fn similarity_section(&self) -> Option<Section> {
        let similarity = self.similarity.as_ref()?;
        let text = format!(
            "Linear centred kernel alignment of the residual stream before the first layer (0) and after each, unbiased, over \
             {} minibatches of {} tokens: 1 for the same up to rotation and scale, 0 for unrelated.",
            similarity.batches, similarity.tokens
        );
        Some(
            Section::new("Similarity of layers")
                .text(text)
                .heatmap(similarity.heatmap("Every layer beside every other")),
        )
    }

    fn lens_section(&self) -> Option<Section> {
        let lens = self.lens.as_ref()?;
        let x = || (0..lens.layers.len()).map(|l| l as f64);
        let of = |value: fn(&crate::LensLayer) -> f64| lens.layers.iter().map(value).collect::<Vec<_>>();
        Some(
            Section::new("Logit lens")
                .text(format!(
                    "What each layer would predict if the last norm and the head came right after it, on {} tokens; 0 is the \
                     embedding. On average the most likely token is final after {} of {} layers.",
                    number(lens.tokens as f64),
                    number(lens.prediction_depth),
                    lens.layers.len().saturating_sub(1)
                ))
                .lines(
                    Lines::new("Loss, entropy and distance from the final prediction", "layers passed", "nats", x())
                        .series("loss", of(|l| l.nll))
                        .series("entropy", of(|l| l.entropy))
                        // At the last layer it is 0, which has no logarithm.
                    .series("KL(final ‖ here)", lens.layers.iter().map(|l| (l.kl > 1e-4).then_some(l.kl)))
                    .log(),
                )
                .lines(
                    Lines::new("Most likely token is already the final one", "layers passed", "share of tokens", x())
                        .series("agreement", of(|l| l.agreement)),
                )
                .note(
                    "Early layers need not write in the basis that the head reads: a high loss there does not mean that they know \
                     nothing.",
                ),
        )
    }

    fn curvature_section(&self) -> Option<Section> {
        if self.fisher.is_empty() && self.hessian.is_empty() {
            return None;
        }
        let map = |title: &str, values: Vec<(Site, f64)>| {
            let map = Heatmap::new(title, "layer", self.layers);
            let rows = by_part(values, self.layers);
            rows.into_iter().fold(map, |map, (part, row)| map.row(Row::new(part, row).log()))
        };
        let mut section = Section::new("Curvature of the loss").text(
            "Traces per weight: how fast the loss bends when a layer's weights move. Fisher information is never negative; the Hessian \
             can be, where the text's loss is at no minimum.",
        );
        let per = |parameters: u64, trace: f64| trace / parameters.max(1) as f64;
        if !self.fisher.is_empty() {
            let values = self.fisher.iter().map(|f| (f.site, per(f.parameters, f.trace.mean))).collect();
            section =
                section.heatmap(map("Fisher information per weight, labels drawn from the model", values));
        }
        if !self.hessian.is_empty() {
            let values = self.hessian.iter().map(|h| (h.site, per(h.parameters, h.trace.mean))).collect();
            section = section.heatmap(map("Trace of the Hessian per weight", values));
        }
        let mut table = Table::new("Every trace").text_column("site");
        for name in ["weights", "Fisher", "standard error", "Hessian", "standard error"] {
            table = table.number_column(name);
        }
        let mut sites: Vec<Site> =
            self.fisher.iter().map(|f| f.site).chain(self.hessian.iter().map(|h| h.site)).collect();
        sites.sort_unstable();
        sites.dedup();
        for site in sites {
            let fisher = self.fisher.iter().find(|f| f.site == site);
            let hessian = self.hessian.iter().find(|h| h.site == site);
            let parameters = fisher.map(|f| f.parameters).or(hessian.map(|h| h.parameters));
            table = table.row([
                site.to_string().into(),
                parameters.map(|p| p as f64).into(),
                fisher.map(|f| f.trace.mean).into(),
                fisher.map(|f| f.trace.error).into(),
                hessian.map(|h| h.trace.mean).into(),
                hessian.map(|h| h.trace.error).into(),
            ]);
        }
        Some(section.table(table.folded()))
    }

    fn expert_section(&self) -> Option<Section> {
        let widest = self.experts.iter().map(|e| e.load.len()).max()?;
        let mut loads =
            Heatmap::new("Load of every expert over its fair share", "expert", widest).shared_scale();
        if self.expert_names.len() == widest {
            loads = loads.columns(self.expert_names.iter().cloned());
        }
        let mut table = Table::new("Every router").number_column("layer").number_column("tokens");
        for name in ["entropy", "squared variation", "largest violation", "dead experts"] {
            table = table.number_column(name);
        }
        for e in &self.experts {
            let share = e.load.iter().map(|f| Some(f * e.load.len() as f64));
            loads = loads.row(Row::new(format!("layer {}", e.layer), share));
            let numbers = [e.entropy, e.variation, e.violation].map(Cell::from);
            let first = [e.layer.into(), (e.tokens as f64).into()];
            table = table.row(first.into_iter().chain(numbers).chain([e.dead.len().into()]));
        }
        let strips = Strips::new(
            "Load over the fair share",
            "layer",
            "ratio",
            (0..self.layers).map(|layer| {
                let here = self.experts.iter().filter(|e| e.layer == layer);
                here.flat_map(|e| e.load.iter().map(|f| f * e.load.len() as f64)).collect()
            }),
        );
        let mut section = Section::new("Experts")
            .text("1 is a fair share of the tokens, or of the weight that a router gives; entropy 1 is a balanced router, 0 one that uses one expert.")
            .heatmap(loads)
            .strips(strips)
            .table(table);
        if let Some(e) = self.experts.iter().find(|e| !e.co_activation.is_empty()) {
            let n = e.co_activation.len();
            let title = format!("Layer {}: share of a row's tokens that also use the column", e.layer);
            let map = Heatmap::new(title, "expert", n).shared_scale().square();
            let rows = e.co_activation.iter().enumerate();
            section = section.heatmap(rows.fold(map, |map, (i, row)| {
                let values = row.iter().enumerate().map(|(j, v)| (i != j).then_some(*v));
                map.row(Row::new(i.to_string(), values))
            }));
        }
        Some(section)
    }

    /// This profile beside an earlier one of the same number of layers: what changed, layer by layer.
    ///
    /// A section with a note alone if the two cannot be compared.
    pub fn change_section(&self, before: &Profile) -> Section {
        let section = Section::new("Before and after");
        if self.layers != before.layers {
            return section.note(format!(
                "{} layers before and {} after: nothing to set side by side.",
                before.layers, self.layers
            ));
        }
        let mut section = section.text(format!("Before: {}. After: {}.", before.model, self.model));
        if self.text_hash != before.text_hash || self.options.window != before.options.window {
            section = section.note(
                "The two were measured on different text or windows: part of the difference is the text's."
                    .to_string(),
            );
        }
        let ratio = |a: f64, b: f64| (b != 0.0).then(|| a / b);
        let mut map = Heatmap::new("After over before", "layer", self.layers).shared_scale();
        let parts =
            [(Part::Block, "block"), (Part::AttnSublayer, "attention"), (Part::MlpSublayer, "feed-forward")];
        for (part, name) in parts {
            let of = |l: usize| {
                let site = Site::layer(l, part);
                let (a, b) = (self.residual_at(site)?, before.residual_at(site)?);
                ratio(a.influence.mean, b.influence.mean)
            };
            map = map.row(Row::new(format!("{name}: influence"), (0..self.layers).map(of)).log());
        }
        let paired = self.linear.iter().filter_map(|a| Some((a, before.linear_at(a.site)?)));
        let paired: Vec<_> = paired.collect();
        type Value = fn(&super::LinearProfile) -> f64;
        let numbers: [(&str, Value); 3] = [
            ("output energy", |l| l.output_energy),
            ("gradient energy", |l| l.gradient_energy),
            ("weight norm", |l| l.weight_norm),
        ];
        for (name, value) in numbers {
            let of = |l: usize| {
                let here = paired.iter().filter(|(a, _)| a.site.layer == Some(l));
                let ratios: Vec<f64> = here.filter_map(|(a, b)| ratio(value(a), value(b))).collect();
                (!ratios.is_empty()).then(|| mean(&ratios))
            };
            map = map.row(Row::new(format!("{name}, mean over parts"), (0..self.layers).map(of)).log());
        }
        section = section.heatmap(map);
        let curve = |p: &Profile| {
            let of = |l: usize| p.residual_at(Site::layer(l, Part::Block)).map(|r| r.influence.mean);
            (0..p.layers).map(of).collect::<Vec<_>>()
        };
        let x = (0..self.layers).map(|l| l as f64);
        section = section.lines(
            Lines::new("Influence of the blocks", "layer", "1 − cos(in, out)", x)
                .series("before", curve(before))
                .series("after", curve(self))
                .log(),
        );
        if let (Some(a), Some(b)) = (&before.lens, &self.lens)
            && a.layers.len() == b.layers.len()
        {
            let x = (0..a.layers.len()).map(|l| l as f64);
            section = section.lines(
                Lines::new("Loss of each layer's prediction", "layers passed", "nats", x)
                    .series("before", a.layers.iter().map(|l| l.nll).collect::<Vec<_>>())
                    .series("after", b.layers.iter().map(|l| l.nll).collect::<Vec<_>>()),
            );
        }
        section
    }
}

impl crate::Similarity {
    /// The alignments as a square heat map; rows are the first model's layers, columns the second's.
    pub fn heatmap(&self, title: impl Into<String>) -> Heatmap {
        let columns = self.cka.first().map_or(0, Vec::len);
        let map = Heatmap::new(title, "layers passed", columns).shared_scale().square();
        let rows = self.cka.iter().enumerate();
        rows.fold(map, |map, (i, row)| map.row(Row::new(i.to_string(), row.iter().copied())))
    }
}
