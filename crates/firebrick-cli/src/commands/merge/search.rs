//! `firebrick merge --search`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use firebrick_core::Seed;
use firebrick_merge::learned::{Granularity, Method, SearchConfig};
use firebrick_merge::{Merge, SearchText, SearchTexts, WeightReport};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_tensor::stream::Target;
use serde_json::json;

use super::Windows;
use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

/// The options of a search.
#[derive(Args)]
pub struct Search {
    /// Search the weights of a task_arithmetic or linear merge, one for each model and run of layers, with the merged model in memory;
    /// write the best merge, the merge.yaml that gives it again, and search.json.
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "coordinate", conflicts_with = "analyze")]
    search: Option<How>,
    /// Text or .jsonl files that lead the search by the mean over the files of the nats per token; each counts the same.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "search")]
    search_data: Vec<PathBuf>,
    /// Files that the search does not see and the report measures on; the last fifth of each --search-data if absent.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "search")]
    held_out: Vec<PathBuf>,
    /// Runs of layers with a weight for each model.
    #[arg(long, default_value_t = 4, value_name = "N", requires = "search")]
    groups: usize,
    /// Merged models to measure at most.
    #[arg(long, default_value_t = 100, value_name = "EVALUATIONS", requires = "search")]
    budget: usize,
}

/// How points are chosen.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// One weight after the other, up or else down: the default, and better by a small budget.
    Coordinate,
    /// An evolution strategy that learns which weights go together.
    CmaEs,
}

impl Search {
    /// Whether a search was asked for.
    pub fn asked(&self) -> bool {
        self.search.is_some()
    }

    /// What else is read.
    pub fn reads(&self) -> impl Iterator<Item = &PathBuf> {
        self.search_data.iter().chain(&self.held_out)
    }

    /// Everything that is wrong with what was asked, of the command line and of the merge.
    fn check(&self, merge: &Merge, config: &SearchConfig, windows: &Windows, global: &Global) -> Result<()> {
        let mut problems = Vec::new();
        if self.search_data.is_empty() {
            problems.push("give --search-data FILE, the texts that lead it".to_string());
        }
        for (option, value) in [("--groups", self.groups), ("--budget", self.budget)] {
            if value == 0 {
                problems.push(format!("{option} must be at least 1"));
            }
        }
        problems.extend(windows.problems());
        problems.extend(
            self.reads().filter(|p| !p.exists()).map(|p| format!("there is no file {}", p.display())),
        );
        problems.extend(merge.search_problems(config));
        if let Some(cap) = global.max_memory.filter(|cap| problems.is_empty() && cap.0 < merge.search_bytes())
        {
            let needs = merge.search_bytes();
            problems
                .push(format!("it holds all models in memory, {needs} bytes, and --max-memory is {}", cap.0));
        }
        match &problems[..] {
            [] => Ok(()),
            [one] => Err(Usage(format!("--search: {one}")).into()),
            many => Err(Usage(format!(
                "--search: {}",
                many.iter().map(|p| format!("\n  - {p}")).collect::<String>()
            ))
            .into()),
        }
    }

    /// The texts: what leads the search, and what is held out.
    fn texts(&self, tokenizer: &Tokenizer, windows: &Windows) -> Result<(Vec<SearchText>, Vec<SearchText>)> {
        let read = |path: &PathBuf| Ok(SearchText::read(path, tokenizer, windows.window, windows.windows)?);
        if self.held_out.is_empty() {
            let both = |path: &PathBuf| {
                Ok(SearchText::read_in_two(path, tokenizer, windows.window, windows.windows)?)
            };
            return Ok(self.search_data.iter().map(both).collect::<Result<Vec<_>>>()?.into_iter().unzip());
        }
        let all = |paths: &[PathBuf]| paths.iter().map(read).collect::<Result<Vec<_>>>();
        Ok((all(&self.search_data)?, all(&self.held_out)?))
    }

    /// Searches, and writes the merge that was found to `output`. The state is in `work`, beside it, until that is done.
    pub fn run(
        &self,
        merge: &Merge,
        windows: &Windows,
        output: &Path,
        work: &Path,
        global: &Global,
        terminal: &Terminal,
    ) -> Result<()> {
        let state = work.join("state.json");
        let config = SearchConfig {
            granularity: Granularity::LayerGroups(self.groups),
            method: if matches!(self.search, Some(How::Coordinate)) {
                Method::Coordinate
            } else {
                Method::CmaEs
            },
            evaluations: self.budget,
            seed: Seed(global.seed),
            state: Some(state.clone()),
            ..SearchConfig::default()
        };
        self.check(merge, &config, windows, global)?;
        if state.exists() && !global.resume && !global.overwrite && !global.dry_run {
            let what = "holds an interrupted search; say --resume to go on or --overwrite to start anew";
            return Err(Usage(format!("{} {what}", work.display())).into());
        }
        let (search, held_out) = self.texts(&merge.tokenizer()?, windows)?;
        let tokens = |texts: &[SearchText]| texts.iter().map(SearchText::tokens).sum::<usize>();
        if global.dry_run {
            let output = json!({
                "reads": self.reads().collect::<Vec<_>>(),
                "writes": output,
                "memory_bytes": merge.search_bytes(),
                "search_tokens": tokens(&search),
                "held_out_tokens": tokens(&held_out),
                "budget": self.budget,
            });
            return models::told(&output, terminal);
        }
        if !global.resume {
            models::discard(work)?;
        }
        std::fs::create_dir_all(work).with_context(|| work.display().to_string())?;
        models::sweep(work)?;
        let texts = SearchTexts { search: &search, held_out: &held_out, batch: windows.batch };
        // What a search resumes from is its state alone: without one it begins.
        let (found, report) =
            merge.search_weights(texts, &config, &models::device(global)?, terminal, global.resume)?;
        let mut target = found.target(output)?;
        if let Target::Folder { side_files, .. } = &mut target {
            side_files.push(("merge.yaml".into(), found.text().as_bytes().to_vec()));
            side_files.push(("search.json".into(), serde_json::to_vec_pretty(&report)?));
        }
        models::executor(global, terminal).run(&found, &target)?;
        models::discard(work)?;
        terminal.result(&report, || said(&report, output))
    }
}

/// What a reader at a terminal gets.
fn said(report: &WeightReport, output: &Path) -> String {
    let mut lines = vec![format!(
        "nats per token after {} merged models, held out in brackets:",
        report.search.evaluations
    )];
    for other in &report.search.comparisons {
        let unseen = other.held_out.map_or(String::new(), |nats| format!(" ({nats:.4})"));
        lines.push(format!("  {:8} {:.4}{unseen}", other.name, other.cost));
    }
    lines.push(format!("weights by {}:", report.search.groups.join(", ")));
    for (model, row) in report.models.iter().zip(&report.search.found().coefficients) {
        let row: Vec<String> = row.iter().map(|w| format!("{w:.3}")).collect();
        lines.push(format!("  {model}: {}", row.join(", ")));
    }
    lines.push(format!("wrote {}", output.display()));
    lines.join("\n")
}
