//! `firebrick merge`.

mod search;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use firebrick_analysis::{Bars, Heatmap, Report, Row, Section, Table};
use firebrick_core::{Event, Progress};
use firebrick_merge::{Drift, MergeAnalysis, Stages, TaskVectors};
use firebrick_tensor::stream::Executor;

use self::search::Search;
use crate::args::{Global, Usage};
use crate::models;
use crate::ui::{self, Terminal};

#[derive(Args)]
pub struct Merge {
    /// mergekit YAML.
    #[arg(value_name = "CONFIG.yml")]
    config: PathBuf,
    /// Folder to write.
    #[arg(value_name = "OUT", required_unless_present = "out")]
    output: Option<PathBuf>,
    /// The same, as other verbs have it.
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    out: Option<PathBuf>,
    /// Say how the models' task vectors relate (sizes, cosines, sign conflicts and shared subspaces by tensor), and merge nothing.
    #[arg(long)]
    analyze: bool,
    /// With --analyze, write report.html and report.json to this folder.
    #[arg(long, value_name = "DIR", requires = "analyze")]
    report: Option<PathBuf>,
    /// With --analyze, a text on which to measure how far the outputs of each model and of the merge are from the base's; two models in
    /// f32 are in memory at a time.
    #[arg(long, value_name = "FILE", requires = "analyze")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    search: Search,
    #[command(flatten)]
    windows: Windows,
}

/// How much of a text is measured.
#[derive(Args)]
struct Windows {
    /// Tokens per window of --search-data, --held-out and --calibration.
    #[arg(long, default_value_t = 128, value_name = "N")]
    window: usize,
    /// Windows of each text, spread over it.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// Windows at a time.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
}

impl Windows {
    fn problems(&self) -> Vec<String> {
        let least =
            [("--window", self.window, 2), ("--windows", self.windows, 1), ("--batch", self.batch, 1)];
        let low = least.into_iter().filter(|(_, value, least)| value < least);
        low.map(|(option, _, least)| format!("{option} must be at least {least}")).collect()
    }
}

impl Merge {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        if self.analyze && global.dry_run {
            return Err(Usage("--dry-run: --analyze writes nothing anyway".into()).into());
        }
        let output = self.output.as_ref().or(self.out.as_ref());
        let output = output.ok_or_else(|| Usage("which folder to write? give OUT".into()))?;
        if !self.analyze {
            models::check_output(output, None, global)?;
        }
        let stages = Stages::open(&self.config)?;
        let results = beside(output, "stages")?;
        let last = stages.configs().len() - 1;
        if last > 0 {
            if self.analyze || global.dry_run || self.search.asked() {
                let what = match self.analyze {
                    true => "--analyze",
                    false if self.search.asked() => "--search",
                    false => "--dry-run",
                };
                let why = "needs the results of the earlier documents; give it a file of one";
                return Err(Usage(format!(
                    "{what}: {} has {} documents, the last {why}",
                    self.config.display(),
                    last + 1
                ))
                .into());
            }
            stages.check_models(&self.config)?;
            if !global.resume {
                models::discard(&results)?;
            }
            // Ours, whatever an interrupted run left of it.
            let executor = Executor { overwrite: true, ..models::executor(global, terminal) };
            for (stage, config) in stages.configs()[..last].iter().enumerate() {
                let merge = stages.merge(stage, &self.config, &results)?;
                let name = config.name.as_deref().unwrap_or_default();
                let target = merge.target(&results.join(name))?;
                let (key, noted) = (executor.key(&merge, &target)?, results.join(format!("{stage}.key")));
                if target.path().exists() && std::fs::read_to_string(&noted).is_ok_and(|old| old == key) {
                    terminal.on(Event::Note(&format!("`{name}` is there from an interrupted run")));
                    continue;
                }
                executor.run(&merge, &target)?;
                std::fs::write(&noted, key)?;
            }
        }
        let merge = stages.merge(last, &self.config, &results)?;
        let written = match (self.analyze, self.search.asked()) {
            (true, _) => self.analyze(&merge, global, terminal),
            (_, true) => {
                let work = beside(output, "search")?;
                self.search.run(&merge, &self.windows, output, &work, global, terminal)
            }
            _ => write(&merge, output, global, terminal),
        };
        if last > 0 && !ui::interrupted() {
            models::discard(&results)?;
        }
        written
    }

    fn analyze(&self, merge: &firebrick_merge::Merge, global: &Global, terminal: &Terminal) -> Result<()> {
        if let Some(folder) = &self.report {
            models::check_folder(folder, global)?;
        }
        let drift = self.calibration.as_ref().map(|path| self.drift(path, merge, global, terminal));
        let analysis = MergeAnalysis { drift: drift.transpose()?, ..merge.analyze(terminal)? };
        if let Some(folder) = &self.report {
            models::write_folder(folder, |folder| Ok(report(&analysis).save(folder)?))?;
        }
        terminal.result(&analysis, || analysis.to_string())
    }

    /// How far the outputs move on a text.
    fn drift(
        &self,
        path: &Path,
        merge: &firebrick_merge::Merge,
        global: &Global,
        terminal: &Terminal,
    ) -> Result<Drift> {
        let mut problems = self.windows.problems();
        let needs = merge.drift_bytes();
        if let Some(cap) = global.max_memory.filter(|cap| cap.0 < needs) {
            problems
                .push(format!("it holds two models in memory, {needs} bytes, and --max-memory is {}", cap.0));
        }
        if !problems.is_empty() {
            return Err(Usage(format!("--calibration: {}", problems.join("; "))).into());
        }
        let Windows { window, windows, batch } = self.windows;
        let text = models::text(path, &merge.tokenizer()?, window)?;
        let ids = text.spread(window, windows).concat();
        Ok(merge.drift(&ids, window, batch, &models::device(global)?, terminal)?)
    }
}

/// A hidden folder beside the output for what is kept until that is written.
fn beside(output: &Path, what: &str) -> Result<PathBuf> {
    // Absolute, so that what is written about the merge says the names of the documents alone.
    let output = std::path::absolute(output)?;
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(firebrick_core::folder(&output).join(format!(".{name}.{what}")))
}

fn write(merge: &firebrick_merge::Merge, output: &Path, global: &Global, terminal: &Terminal) -> Result<()> {
    let target = merge.target(output)?;
    let executor = models::executor(global, terminal);
    if global.dry_run {
        return models::planned(&executor.plan(merge, &target)?, terminal);
    }
    let report = executor.run(merge, &target)?;
    models::written(&report, terminal)
}

/// What the analysis found, over layers and parts.
fn report(found: &MergeAnalysis) -> Report {
    let mut sizes = Bars::new("Norm of each task vector, in % of the reference's");
    for (model, relative) in found.models.iter().zip(&found.whole.relative) {
        sizes = sizes.bar(model, 100.0 * relative);
    }
    let mut pairs =
        Table::new("Pairs of models").text_column("first").text_column("second").number_column("cosine");
    let mut cosines = found.whole.cosines.iter();
    for (a, first) in found.models.iter().enumerate() {
        for second in &found.models[a + 1..] {
            pairs =
                pairs.row([first.as_str().into(), second.as_str().into(), cosines.next().copied().into()]);
        }
    }
    let worst = |values: &[f64]| values.iter().copied().max_by(f64::total_cmp);
    let mean =
        |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
    let layers = Section::new("Layer by layer")
        .text("Conflicting signs cancel when task vectors are added, a shared subspace means that they write over one another.")
        .heatmap(over_layers(found, "Opposite signs, in % of the elements", &|t| Some(100.0 * t.sign_conflict)))
        .heatmap(over_layers(found, "Largest task vector, in % of the reference", &|t| {
            worst(&t.relative).map(|r| 100.0 * r)
        }))
        .heatmap(over_layers(found, "Cosine, mean over pairs", &|t| mean(&t.cosines)))
        .heatmap(over_layers(found, "Overlap of the leading subspaces, mean over pairs", &|t| mean(&t.overlaps)));
    Report::new("Before the merge")
        .fact("reference", &found.reference)
        .fact("models", found.models.join(", "))
        .fact("opposite signs", format!("{:.2} % of the elements", 100.0 * found.whole.sign_conflict))
        .section(Section::new("As a whole").bars(sizes).table(pairs))
        .sections(found.drift.as_ref().map(moved))
        .section(layers)
}

/// How far the outputs move.
fn moved(drift: &Drift) -> Section {
    let mut table = Table::new("Outputs beside the reference's")
        .text_column("model")
        .number_column("KL, nats a token")
        .number_column("standard error")
        .number_column("same likeliest token, %")
        .number_column("perplexity ratio");
    let merged = std::iter::once(("the merge", &drift.merged));
    for (name, report) in drift.models.iter().map(|(name, report)| (name.as_str(), report)).chain(merged) {
        table = table.row([
            name.into(),
            report.mean_kl.into(),
            report.mean_kl_standard_error.into(),
            (100.0 * report.top1_agreement).into(),
            report.perplexity_ratio.into(),
        ]);
    }
    Section::new("Output drift")
        .text(format!(
            "Measured on {} tokens in windows of {}, with the merge as it would be stored.",
            drift.merged.tokens, drift.window
        ))
        .table(table)
}

/// Rows and columns of a heat map, at most: a file can name its tensors as it likes.
const MOST: (usize, usize) = (64, 1024);

/// A row for each part of a layer: the tensors whose names differ in the layer alone.
fn over_layers(found: &MergeAnalysis, title: &str, value: &dyn Fn(&TaskVectors) -> Option<f64>) -> Heatmap {
    let mut rows: Vec<(String, Vec<Option<f64>>)> = Vec::new();
    let mut layers = 0;
    for (name, vectors) in &found.tensors {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |part: &&str| part.parse::<usize>().ok();
        let Some((at, layer)) = parts.iter().enumerate().find_map(|(at, part)| Some((at, number(part)?)))
        else {
            continue;
        };
        let label = parts[at + 1..].join(".");
        let label = label.trim_end_matches(".weight");
        let row = rows.iter().position(|(known, _)| known == label).unwrap_or_else(|| {
            rows.push((label.to_string(), Vec::new()));
            rows.len() - 1
        });
        if row < MOST.0 && layer < MOST.1 {
            layers = layers.max(layer + 1);
            let values = &mut rows[row].1;
            values.resize(values.len().max(layer + 1), None);
            values[layer] = value(vectors);
        }
        rows.truncate(MOST.0);
    }
    rows.retain(|(_, values)| values.iter().any(Option::is_some));
    rows.into_iter().fold(Heatmap::new(title, "layer", layers).shared_scale(), |map, (label, mut values)| {
        values.resize(layers, None);
        map.row(Row::new(label, values))
    })
}
