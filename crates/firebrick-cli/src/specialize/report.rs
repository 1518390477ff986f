//! The report of a specialization.

use firebrick_analysis::{Bars, Cell, Heatmap, Lines, Report, Row, Scatter, Section, Table};

use super::Settings;
use super::results::{Results, Variant};

/// Everything on one page.
pub fn build(results: &Results, settings: &Settings) -> Report {
    let linear: usize = results.profile.linear.iter().map(|l| l.d_in * l.d_out).sum();
    Report::new(format!("{}, specialized", results.model))
        .summary(summary(results))
        .fact("model", &results.model)
        .fact("layers", results.profile.layers)
        .fact("weights in blocks", linear)
        .fact("domains", results.domains.join(", "))
        .fact("seed", settings.seed)
        .section(variants(results))
        .section(learning(results))
        .section(merging(results))
        .section(bit_plans(results, settings))
        .sections(results.profile.sections())
        .section(results.ranks.section(&format!("Ranks, {} on average", settings.rank)))
        .section(results.bits.section(&format!("Bits, {} on average", settings.bits)))
        .section(student(results))
}

fn find<'a>(results: &'a Results, name: &str) -> Option<&'a Variant> {
    results.variants.iter().find(|v| v.name == name)
}

/// Change of a perplexity in percent.
fn change(from: f64, to: f64) -> f64 {
    100.0 * (to / from - 1.0)
}

fn summary(results: &Results) -> String {
    let Some(base) = find(results, "base") else { return String::new() };
    let own = |i: usize| find(results, &format!("adapter {}", results.domains[i]))?.perplexity[i];
    let gains: Vec<f64> =
        (0..results.domains.len()).filter_map(|i| Some(change(base.perplexity[i]?, own(i)?))).collect();
    let mean = gains.iter().sum::<f64>() / gains.len().max(1) as f64;
    let gap = |name: &str| {
        let variant = find(results, name)?;
        let gaps = (0..results.domains.len()).filter_map(|i| Some(change(own(i)?, variant.perplexity[i]?)));
        gaps.max_by(f64::total_cmp)
    };
    let worst = gap("routed adapters").map_or(String::new(), |g| {
        format!(" Routed per token, the adapters stay within {g:.1} % of each specialist on its own domain.")
    });
    format!(
        "One adapter per domain changes held-out perplexity on its own domain by {mean:.1} % on average.{worst}"
    )
}

fn variants(results: &Results) -> Section {
    let mut table = Table::new("Held-out perplexity").text_column("variant");
    for domain in &results.domains {
        table = table.number_column(domain);
    }
    table = table.number_column("MB of block weights");
    let mut map = Heatmap::new("Perplexity relative to the base", "ratio", results.domains.len())
        .columns(results.domains.iter().cloned())
        .shared_scale();
    let base = find(results, "base");
    for variant in &results.variants {
        let cells = variant.perplexity.iter().map(|p| p.map_or(Cell::Empty, Cell::Number));
        let size = variant.bytes.map_or(Cell::Empty, |b| Cell::Number(b as f64 / 1e6));
        table = table.row([Cell::Text(variant.name.clone())].into_iter().chain(cells).chain([size]));
        let ratio = |i: usize| Some(variant.perplexity[i]? / base?.perplexity[i]?);
        if variant.name != "base" {
            map = map.row(Row::new(&variant.name, (0..results.domains.len()).map(ratio)));
        }
    }
    // Of the variants that were measured everywhere.
    let mut sizes = Scatter::new("Quality against size", "MB of block weights", "perplexity, geometric mean");
    for variant in &results.variants {
        let logs: Option<Vec<f64>> = variant.perplexity.iter().map(|p| p.map(f64::ln)).collect();
        if let (Some(logs), Some(bytes)) = (logs, variant.bytes) {
            let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
            sizes = sizes.point("variant", &variant.name, bytes as f64 / 1e6, mean.exp());
        }
    }
    Section::new("Every variant on every domain")
        .text("Perplexity per token on text that no adapter was trained on; lower is better.")
        .heatmap(map)
        .scatter(sizes.named().front())
        .table(table)
}

fn learning(results: &Results) -> Section {
    let steps = results.learned.iter().map(|l| l.losses.len()).max().unwrap_or(0);
    let mut lines = Lines::new("Training loss", "step", "nats per token", numbers(steps));
    let mut table = Table::new("Adapters")
        .text_column("domain")
        .number_column("first loss")
        .number_column("final loss")
        .number_column("parameters");
    for (domain, learned) in results.domains.iter().zip(&results.learned) {
        lines = lines.series(domain, learned.losses.iter().copied());
        table = table.row([
            Cell::Text(domain.clone()),
            Cell::Number(learned.first_loss),
            Cell::Number(learned.final_loss),
            Cell::Number(learned.parameters as f64),
        ]);
    }
    Section::new("Adapters")
        .text("LoRA on every linear layer, ranks as planned below.")
        .lines(lines)
        .table(table)
}

fn merging(results: &Results) -> Section {
    let mut bars = Bars::new("Mean nats per token by weight of the task vectors");
    for (weight, nll) in &results.merged.tried {
        bars = bars.bar(format!("{weight}"), *nll);
    }
    Section::new("Merge and route")
        .text(format!(
            "The merged checkpoint is the base plus {} times the sum of all adapters' updates (task arithmetic), the weight \
             chosen on training text. The router decides per token from the tokens so far; it picks the right adapter \
             for {:.1} % of tokens.",
            results.merged.weight,
            100.0 * results.routed.accuracy
        ))
        .bars(bars)
}

fn bit_plans(results: &Results, settings: &Settings) -> Section {
    let mut bars = Bars::new("Mean nats per token on held-out text, after GPTQ");
    let mut table = Table::new("Plans of equal code size")
        .text_column("plan")
        .number_column("bits per code")
        .number_column("MB in a GGUF file");
    for domain in &results.domains {
        table = table.number_column(domain);
    }
    for (i, plan) in results.tried.iter().enumerate() {
        bars = bars.bar(&plan.name, plan.mean_nll);
        if i == 0 {
            bars = bars.highlighted();
        }
        let cells = plan.perplexity.iter().map(|p| Cell::Number(*p));
        let sizes = [Cell::Number(plan.mean_bits), Cell::Number(plan.file_bytes as f64 / 1e6)];
        table = table.row([Cell::Text(plan.name.clone())].into_iter().chain(sizes).chain(cells));
    }
    let others: Vec<&str> = results.tried.iter().skip(1).map(|plan| plan.name.as_str()).collect();
    Section::new("Does the plan pay?")
        .text(format!(
            "The merged model quantized to codes of {} bits on average: bits where the profile wants them, beside the same \
             budget of code bits spent otherwise ({}). A GGUF file stores codes of 2 to 4 bits in 4-bit blocks, so that its \
             size does not follow the bits of the codes.",
            settings.bits,
            others.join(", ")
        ))
        .bars(bars)
        .table(table)
}

fn student(results: &Results) -> Section {
    let losses = &results.student.losses;
    Section::new("Student")
        .text(format!(
            "A copy of the merged model without {}, taught by the merged model (forward KL and text).",
            results.student.dropped.join(", ")
        ))
        .lines(
            Lines::new("Distillation loss", "step", "loss", numbers(losses.len()))
                .series("student", losses.iter().copied()),
        )
}

/// 1, 2, ... up to `count`.
fn numbers(count: usize) -> impl Iterator<Item = f64> {
    (1..=count).map(|i| i as f64)
}
