//! A profile as sections of a report.

use firebrick_core::{Part, Site};

use super::{LinearProfile, Profile};
use crate::by_part;
use crate::report::{Bars, Cell, Heatmap, Lines, Row, Section, Table, number};
use crate::stats::mean;

/// Below this the order of the layers would change with the text.
const STABLE: f64 = 0.9;

impl Profile {
    /// What the profile was measured on, as facts for the top of a report.
    pub fn facts(&self) -> Vec<(String, String)> {
        let text = format!("{} in {} windows", number(self.tokens as f64), number(self.windows as f64));
        vec![
            ("model".into(), self.model.clone()),
            ("layers".into(), self.layers.to_string()),
            ("calibration tokens".into(), text),
            ("calibration text".into(), self.text_hash.chars().take(12).collect()),
            ("seed".into(), self.options.seed.0.to_string()),
        ]
    }

    /// The profile as sections: residual stream, linear layers, rounding, rank, and what else was measured.
    pub fn sections(&self) -> Vec<Section> {
        let mut sections = vec![self.residual_section()];
        if !self.linear.is_empty() {
            sections.extend([self.linear_section(), self.bit_section(), self.rank_section()]);
        }
        sections.extend(self.metric_sections());
        sections
    }

    fn residual_section(&self) -> Section {
        let parts =
            [(Part::Block, "block"), (Part::AttnSublayer, "attention"), (Part::MlpSublayer, "feed-forward")];
        let influence = |part: Part| self.residual_row(part, |r| r.influence.mean);
        let mut map = Heatmap::new("Influence and relative update", "layer", self.layers);
        let x = (0..self.layers).map(|l| l as f64);
        let mut curves = Lines::new("Influence over depth", "layer", "1 − cos(in, out)", x).log();
        for (part, name) in parts {
            map = map.row(Row::new(format!("{name}: influence"), influence(part)).log());
            curves = curves.series(name, influence(part));
        }
        for (part, name) in parts {
            let update = self.residual_row(part, |r| r.update.mean);
            map = map.row(Row::new(format!("{name}: update"), update).log());
        }
        let mut table = Table::new("Every block and sublayer")
            .text_column("site")
            .number_column("influence")
            .number_column("standard error")
            .number_column("relative update")
            .number_column("standard error");
        for r in &self.residual {
            let numbers =
                [r.influence.mean, r.influence.error, r.update.mean, r.update.error].map(Cell::from);
            table = table.row(std::iter::once(r.site.to_string().into()).chain(numbers));
        }
        let say = |v: Option<f64>| v.map_or("not defined".to_string(), number);
        let mut section = Section::new("Residual stream")
            .text(
                "Influence is one minus the cosine between the residual stream before and after a block or sublayer, averaged \
                 over tokens. Update is the length of what is added, relative to what was there.",
            )
            .heatmap(map)
            .lines(curves)
            .text(format!(
                "Order of the layers on two halves of the text, Spearman correlation: {} over blocks, {} over sublayers.",
                say(self.split_half.blocks),
                say(self.split_half.sublayers)
            ));
        let halves = [self.split_half.blocks, self.split_half.sublayers];
        if halves.iter().flatten().any(|v| *v < STABLE) {
            section = section.note(format!(
                "The two halves agree on less than {STABLE}: take more text before trusting the order of the layers."
            ));
        }
        section
            .note(
                "The cosine does not see changes of length, nor what the head needs: the last layers look more dispensable \
                 than they are, and two neighbours can each be dispensable but not both. Measure the loss before dropping.",
            )
            .table(table.folded())
    }

    fn linear_section(&self) -> Section {
        let bars = self.weight_skew.layers.iter().enumerate();
        let bars = bars
            .fold(Bars::new("Mean weight norm by layer"), |bars, (l, v)| bars.bar(format!("layer {l}"), *v));
        let mut table = Table::new("Every linear layer").text_column("site").text_column("shape");
        for name in [
            "input energy",
            "activation rank",
            "participation ratio",
            "weight norm",
            "weight rank",
            "stable rank",
            "output energy",
            "gradient energy",
        ] {
            table = table.number_column(name);
        }
        for l in &self.linear {
            let numbers = [
                l.input_energy,
                l.activation_rank,
                l.participation_ratio,
                l.weight_norm,
                l.weight_rank,
                l.stable_rank,
                l.output_energy,
                l.gradient_energy,
            ]
            .map(Cell::from);
            let names = [l.site.to_string().into(), format!("{} × {}", l.d_out, l.d_in).into()];
            table = table.row(names.into_iter().chain(numbers));
        }
        Section::new("Linear layers")
            .text(
                "Effective ranks count the directions that matter: of the inputs from the eigenvalues of their second moments \
                 (not centred), of the weights from their singular values.",
            )
            .heatmap(self.by_part("Effective rank of the inputs", |l| Some(l.activation_rank)))
            .heatmap(self.by_part("Effective rank of the weights", |l| Some(l.weight_rank)))
            .heatmap(self.by_part("Stable rank of the weights", |l| Some(l.stable_rank)))
            .heatmap(self.by_part("Mean squared length of the inputs", |l| Some(l.input_energy)))
            .heatmap(self.by_part("Frobenius norm of the weights", |l| Some(l.weight_norm)))
            .text(format!(
                "Weight norms over layers: largest over median {}, Gini coefficient {}.",
                number(self.weight_skew.max_over_median),
                number(self.weight_skew.gini)
            ))
            .bars(bars)
            .table(table.folded())
    }

    fn bit_section(&self) -> Section {
        let mut bits = self.options.bits.clone();
        bits.sort_unstable();
        bits.dedup();
        let error =
            |l: &LinearProfile, b: u8| l.bits.iter().find(|loss| loss.bits == b).map(|loss| loss.relative);
        let mut table = Table::new("Output error of rounding, and what it should cost")
            .number_column("bits")
            .number_column("mean over layers")
            .number_column("largest")
            .text_column("at")
            .number_column("expected rise, all layers (nats per token)");
        for &b in &bits {
            let errors: Vec<f64> = self.linear.iter().filter_map(|l| error(l, b)).collect();
            let worst = self
                .linear
                .iter()
                .max_by(|x, y| error(x, b).partial_cmp(&error(y, b)).unwrap_or(std::cmp::Ordering::Equal));
            let rises = self.linear.iter().flat_map(|l| l.bits.iter()).filter(|loss| loss.bits == b);
            let rise: f64 = rises.map(|loss| loss.rise).sum();
            table = table.row([
                usize::from(b).into(),
                mean(&errors).into(),
                worst.and_then(|l| error(l, b)).into(),
                worst.map(|l| l.site.to_string()).into(),
                rise.into(),
            ]);
        }
        let mut section = Section::new("Rounding")
            .text(format!(
                "Share of a layer's output energy lost when its weight alone is rounded by {}, in groups of {}, for the inputs it \
                 has on this text; and the rise of the loss to expect from the gradient at its outputs.",
                self.quantizer.to_uppercase(),
                self.options.group
            ))
            .table(table);
        if let Some(b) = bits.iter().copied().min_by_key(|b| b.abs_diff(4)) {
            let rise = |l: &LinearProfile| l.bits.iter().find(|loss| loss.bits == b).map(|loss| loss.rise);
            section = section
                .heatmap(self.by_part(format!("Relative output error at {b} bits"), |l| error(l, b)))
                .heatmap(
                    self.by_part(format!("Expected rise at {b} bits, nats per token"), rise).shared_scale(),
                );
        }
        section.note(
            "Each layer is measured with all others intact. Errors of early layers travel through later ones, so these orders \
             can mislead: judge a plan by the loss of the whole model.",
        )
    }

    fn rank_section(&self) -> Section {
        let mut ranks: Vec<usize> = self.linear.iter().flat_map(|l| l.ranks.iter().map(|r| r.rank)).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let error = |l: &LinearProfile, rank: usize| {
            let full = rank >= l.d_in.min(l.d_out);
            let loss = l.ranks.iter().find(|r| r.rank == rank).map(|r| r.relative);
            loss.or(full.then_some(0.0))
        };
        let x = ranks.iter().map(|r| *r as f64);
        let mut curves =
            Lines::new("Tail energy, mean over layers", "rank", "share of the output energy", x).even();
        for part in self.parts() {
            let of: Vec<&LinearProfile> = self.linear.iter().filter(|l| l.site.part == part).collect();
            let tail = |rank: &usize| mean(&of.iter().filter_map(|l| error(l, *rank)).collect::<Vec<_>>());
            curves = curves.series(part.name(), ranks.iter().map(tail).collect::<Vec<_>>());
        }
        let middle = ranks.iter().copied().filter(|r| *r > 0).take(4).last();
        let section = Section::new("Rank")
            .text(
                "Share of a layer's output energy that is lost when its weight is replaced by the best approximation of a rank, \
                 for the inputs it has on this text.",
            )
            .lines(curves);
        match middle {
            Some(rank) => {
                section.heatmap(self.by_part(format!("Tail energy beyond rank {rank}"), |l| error(l, rank)))
            }
            None => section,
        }
    }

    fn residual_row(&self, part: Part, value: impl Fn(&super::ResidualProfile) -> f64) -> Vec<Option<f64>> {
        (0..self.layers).map(|l| self.residual_at(Site::layer(l, part)).map(&value)).collect()
    }

    fn parts(&self) -> Vec<Part> {
        Part::ALL.into_iter().filter(|p| self.linear.iter().any(|l| l.site.part == *p)).collect()
    }

    fn by_part(&self, title: impl Into<String>, value: impl Fn(&LinearProfile) -> Option<f64>) -> Heatmap {
        let values = self.linear.iter().filter_map(|l| Some((l.site, value(l)?)));
        let map = Heatmap::new(title, "layer", self.layers);
        by_part(values, self.layers).into_iter().fold(map, |map, (part, row)| map.row(Row::new(part, row)))
    }
}
