//! `firebrick train`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::Args;
use firebrick_core::{
    LayerPlan, Rule, Seed, Selector, Settings, Site, SiteTable, available_bytes, peak_resident_bytes,
    resident_bytes,
};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_peft::{LoraBank, LoraConfig, fit_lora_mixture, hf};
use firebrick_tensor::ops::Precision;
use firebrick_train::{
    Average, Document, Group, LarsForm, Mixture, Optimizer, Rows, Stage, StepMemory, TextData, TrainConfig,
    layer_decay, multi_task, read_documents, site_groups,
};
use serde_json::json;

use crate::args::{Global, Usage};
use crate::models::{self, Dtype};
use crate::ui::Terminal;

#[derive(Args)]
pub struct Train {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// Text file, one document; or .jsonl, a line with `text`, `prompt` and `completion`, or `messages`. Several are drawn in
    /// proportion to their rows.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Draw files of n rows in proportion to n^(1/T): 1 as they are, a high one nearly equally.
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    temperature: f64,
    /// Stages of the run, a JSON list of {"length", "draws": [{"source", "weight", "share"}]}; a source is a file's name without
    /// its ending.
    #[arg(long, value_name = "FILE", conflicts_with = "temperature")]
    stages: Option<PathBuf>,
    /// Pack documents into rows so that none sees another, as is done anyway where there are completions or messages (of which
    /// only the answers are learned).
    #[arg(long)]
    pack: bool,
    /// What counts alike in the loss of packed documents.
    #[arg(long, default_value = "token", value_parser = ["token", "document"])]
    average: String,
    /// What to train.
    #[arg(long, default_value = "lora", value_parser = ["lora"])]
    method: String,
    /// Rank of the adapters, if there is no plan.
    #[arg(long, default_value_t = 8, value_name = "R")]
    rank: usize,
    /// Strength of the adapters; twice the rank if absent.
    #[arg(long, value_name = "A")]
    alpha: Option<f64>,
    /// Probability that an element of the adapters' input is dropped.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    dropout: f64,
    /// Ranks per site, as `firebrick profile` writes them; where it gives none there is no adapter.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 200, value_name = "N")]
    steps: usize,
    /// Windows per pass.
    #[arg(long, default_value_t = 4, value_name = "N")]
    batch: usize,
    /// Passes per step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    accumulate: usize,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 1e-3, value_name = "X")]
    learning_rate: f64,
    /// What steps the parameters.
    #[arg(long, default_value = "adamw", value_parser = ["adamw", "lamb", "lars", "lars-paper"])]
    optimizer: String,
    /// Weight decay.
    #[arg(long, default_value_t = 0.01, value_name = "X")]
    weight_decay: f64,
    /// Learning rate of some sites, as a factor: layers.0-5=0.1; later ones win.
    #[arg(long, value_name = "SELECTOR=X", num_args = 1..)]
    layer_lr: Vec<LayerRate>,
    /// Factor on the learning rate from each layer to the one before it.
    #[arg(long, value_name = "X")]
    layer_decay: Option<f64>,
    /// Type that products take and frozen weights are stored in; bf16 is faster on CPUs with AMX and AMD's with AVX512-BF16.
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: Dtype,
    /// Compute each block again in the backward pass: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// Held-out text: the adapter written is the one with the lowest loss on it.
    #[arg(long, value_name = "FILE")]
    eval_data: Option<PathBuf>,
    /// Steps between losses on the held-out text; 0 for one at the end.
    #[arg(long, default_value_t = 0, value_name = "N", requires = "eval_data")]
    eval_every: usize,
    /// Stop after so many held-out losses in a row that are no lower than the lowest.
    #[arg(long, value_name = "N", requires = "eval_data")]
    patience: Option<usize>,
    /// Steps between checkpoints to resume from; 0 for none but the last.
    #[arg(long, default_value_t = 50, value_name = "N")]
    checkpoint_every: usize,
    /// Adapter folder to write (Hugging Face PEFT).
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// A selector with a factor.
#[derive(Clone, Debug)]
struct LayerRate {
    select: Selector,
    factor: f64,
}

impl FromStr for LayerRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (select, factor) =
            text.rsplit_once('=').ok_or_else(|| format!("`{text}` should be SELECTOR=FACTOR"))?;
        let number = factor.parse::<f64>().ok().filter(|f| f.is_finite() && *f >= 0.0);
        let factor = number.ok_or_else(|| format!("`{factor}` is not a factor"))?;
        Ok(LayerRate { select: select.parse::<Selector>().map_err(|e| e.to_string())?, factor })
    }
}

/// A text as it was read, and what rows are made of.
struct Source {
    name: String,
    documents: Vec<Document>,
    text: TextData,
}

impl Source {
    fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let documents = read_documents(path, tokenizer)?;
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Ok(Source { name, text: TextData::from_encoded(&documents), documents })
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

impl Train {
    /// The settings of the loop.
    fn config(&self, global: &Global, work: &Path) -> TrainConfig {
        let plain = TrainConfig::default();
        let lars = |form| Optimizer::Lars { form, trust: 1e-3, clamp: None };
        let (optimizer, eps) = match self.optimizer.as_str() {
            "lamb" => (Optimizer::Lamb { clamp: None }, 1e-6),
            "lars" => (lars(LarsForm::Original), plain.eps),
            "lars-paper" => (lars(LarsForm::Paper), plain.eps),
            _ => (Optimizer::AdamW, plain.eps),
        };
        TrainConfig {
            steps: self.steps,
            batch: self.batch,
            accumulate: self.accumulate,
            window: self.window,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            optimizer,
            eps,
            recompute: self.recompute,
            eval_every: self.eval_every,
            patience: self.patience,
            seed: global.seed,
            checkpoint_every: self.checkpoint_every,
            out: Some(work.to_path_buf()),
            ..plain
        }
    }

    /// The rows of a source, packed or as windows.
    fn rows<'a>(&self, source: &'a Source, path: &Path, packed: bool, pad: u32) -> Result<Rows<'a>> {
        if !packed {
            models::fills(source.text.ids.len(), self.window, path)?;
            return Ok(Rows::windows(&source.text, self.window)?);
        }
        let average = if self.average == "document" { Average::Document } else { Average::Token };
        let rows = Rows::pack(&source.documents, self.window, pad, average);
        rows.with_context(|| path.display().to_string())
    }

    /// The sources with their stages.
    fn mixture<'a>(&self, sources: &'a [Source], packed: bool, pad: u32) -> Result<Mixture<'a>> {
        let rows = |(source, path): (&'a Source, &PathBuf)| {
            Ok((source.name.clone(), self.rows(source, path, packed, pad)?))
        };
        let mut all = sources.iter().zip(&self.data).map(rows).collect::<Result<Vec<_>>>()?;
        if let Some(path) = &self.stages {
            let text = models::read_text(path)?;
            let stages: Vec<Stage> =
                serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            return Mixture::new(all, stages).with_context(|| path.display().to_string());
        }
        if let ([source], false) = (sources, packed) {
            return Ok(Mixture::text(&source.text, self.window)?);
        }
        if all.len() == 1 {
            return Ok(Mixture::of(all.remove(0).1));
        }
        let names: Vec<&str> = sources.iter().map(|s| s.name.as_str()).collect();
        let mut stages = multi_task(&names);
        stages.iter_mut().for_each(|stage| stage.temperature = self.temperature);
        Ok(Mixture::new(all, stages)?)
    }

    /// The learning rates by site.
    fn groups(&self, sites: &SiteTable, bank: &LoraBank) -> Result<Vec<Group>> {
        let mut plan = match self.layer_decay {
            Some(decay) => layer_decay(sites, self.learning_rate, decay),
            None => LayerPlan::default(),
        };
        for LayerRate { select, factor } in &self.layer_lr {
            if select.resolve(sites)?.iter().all(|site| bank.get(site).is_none()) {
                bail!("--layer-lr {select}: no adapter there");
            }
            let rate = Some(factor * self.learning_rate);
            let settings = Settings { learning_rate: rate, ..Settings::default() };
            plan.rules.push(Rule { select: select.clone(), settings });
        }
        Ok(site_groups(&plan.resolve(sites)?, self.learning_rate, &|site| bank.parameters(site)))
    }

    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let work = self.out.join(".train");
        models::check_output(&self.out, Some(&work), global)?;
        let lora = LoraConfig {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            dropout: self.dropout,
            rslora: false,
        };
        if lora.rank == 0 || !lora.alpha.is_finite() || !(0.0..1.0).contains(&lora.dropout) {
            let what = "--rank must be at least 1, --alpha a number, and --dropout at least 0 and below 1";
            return Err(Usage(what.into()).into());
        }
        if self.layer_decay.is_some_and(|decay| !(decay > 0.0 && decay.is_finite())) {
            return Err(Usage("--layer-decay must be more than 0".into()).into());
        }
        if self.learning_rate == 0.0 && (self.layer_decay.is_some() || !self.layer_lr.is_empty()) {
            return Err(Usage(
                "--layer-lr and --layer-decay are factors on a --learning-rate above 0".into(),
            )
            .into());
        }
        let mut config = self.config(global, &work);
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(Usage(problems.join("; ")).into());
        }
        let files = models::open(&self.model)?;
        let targets = files.sites().block_linears();
        let plan = match &self.plan {
            Some(path) => Some(models::plan(path, &files)?),
            None => None,
        };
        let read = |path: &PathBuf| Source::read(path, &files.tokenizer);
        let sources = self.data.iter().map(read).collect::<Result<Vec<_>>>()?;
        let held_out = self.eval_data.as_ref().map(read).transpose()?;
        let every = || sources.iter().chain(&held_out).flat_map(|source| &source.documents);
        let packed = self.pack || every().any(Document::is_masked);
        let ends = files.tokenizer.eos_ids().first().copied();
        let pad = files.tokenizer.pad_id().or(ends).unwrap_or(0);
        let data = self.mixture(&sources, packed, pad)?;
        let held_out = match (&held_out, &self.eval_data) {
            (Some(source), Some(path)) => Some(self.rows(source, path, packed, pad)?),
            _ => None,
        };
        let adapter = |site: Site| {
            let rank = plan.as_ref().map_or(Some(lora.rank), |plan| plan.get(site)?.rank)?;
            files.sites().linear(site).map(|(d_in, d_out)| rank.saturating_mul(d_in + d_out))
        };
        let adapters = targets.iter().filter_map(adapter).fold(0, usize::saturating_add);
        let frozen = models::parameters(&files);
        let mut memory =
            StepMemory::predict(&files.config, &config, frozen.saturating_add(adapters), adapters);
        if self.dtype == Dtype::Bf16 && Precision::Bf16.available() {
            memory.weights = memory.weights.saturating_sub(2 * frozen as u64);
        }
        if global.dry_run {
            let tokens = [self.batch, self.accumulate, self.window]
                .into_iter()
                .fold(self.steps, usize::saturating_mul);
            let rows: usize = data.sources().iter().map(|(_, rows)| rows.count()).sum();
            let text: usize = sources.iter().map(|source| source.text.ids.len()).sum();
            let facts = json!({
                "tokens_in_text": text,
                "tokens_to_train": tokens,
                "sites": targets.len(),
                "rows": rows,
                "packed": packed,
                "step_memory_bytes": memory.total(),
            });
            let reads: Vec<&Path> = self.data.iter().chain(&self.eval_data).map(PathBuf::as_path).collect();
            return models::preview(&files, &reads, &[&self.out], facts, terminal);
        }
        // A checkpoint numbers its factors: other sites of the same shapes would take them.
        let placed: Vec<String> = targets
            .iter()
            .filter_map(|site| {
                let settings = plan.as_ref()?.get(site)?;
                let alpha = settings.alpha.map_or(String::new(), |alpha| format!(" alpha {alpha}"));
                Some(format!(", {site} rank {}{alpha}", settings.rank?))
            })
            .collect();
        config.identity = Some(format!(
            "model {}, products in {}, rank {}, alpha {}, dropout {}{}{}",
            files.digest()?,
            self.dtype.name(),
            lora.rank,
            lora.alpha,
            lora.dropout,
            placed.concat(),
            held_out.as_ref().map_or(String::new(), |rows| format!(", held out {}", rows.digest()))
        ));
        if global.resume && work.exists() {
            models::sweep(&self.out)?;
        } else if global.overwrite {
            models::discard(&work)?;
        }
        let device = models::device(global)?;
        let precision = self.dtype.precision(&device, terminal);
        let device = device.autodiff();
        let model = models::load_in(files, precision, &device)?;
        let seed = Seed(global.seed);
        let bank = match &plan {
            Some(plan) => lora.init_plan(model.decoder.sites(), plan, seed, &device)?,
            None => lora.init(model.decoder.sites(), &targets, seed, &device)?,
        };
        config.groups = self.groups(model.decoder.sites(), &bank)?;
        let (decoder, rows) = (&model.decoder, held_out.as_ref());
        // What is there already, the weights among it, is known better than predicted.
        let predicted = resident_bytes().map(|bytes| bytes.saturating_add(memory.beside_weights()));
        if let (Some(predicted), Some(free)) = (predicted, available_bytes())
            && memory.beside_weights() > free
        {
            terminal.say(&format!(
                "a step takes some {}, {} more than is free: try a smaller --batch or --window, or --recompute",
                gigabytes(predicted),
                gigabytes(memory.beside_weights() - free)
            ));
        }
        let (bank, report) =
            fit_lora_mixture(decoder, &[], bank, &config, &data, rows, terminal, global.resume)?;
        hf::save(&bank, model.decoder.sites(), &model.name, &self.out)?;
        models::copy_log(&work.join("log.jsonl"), &self.out.join("log.jsonl"))?;
        models::discard(&work)?;
        let peak = peak_resident_bytes();
        let mut output = json!({
            "out": self.out,
            "steps": report.steps,
            "tokens": report.tokens,
            "first_loss": report.first_loss(),
            "final_loss": report.final_loss(),
            "seconds": report.seconds,
            "memory_predicted_bytes": predicted,
            "memory_peak_bytes": peak,
        });
        if let Some(step) = report.best_step {
            output["held_out"] = json!(report.held_out);
            output["best_step"] = json!(step);
        }
        terminal.result(&output, || {
            let loss = |l: Option<f64>| l.map_or("-".into(), |l| format!("{l:.4}"));
            let best = report.held_out.iter().find(|held_out| Some(held_out.step) == report.best_step);
            let best = best.map_or(String::new(), |best| {
                format!("; of step {}, held-out loss {:.4}", best.step, best.loss)
            });
            let memory = peak.zip(predicted).map_or(String::new(), |(peak, predicted)| {
                format!("; {} of memory, {} predicted", gigabytes(peak), gigabytes(predicted))
            });
            format!(
                "wrote {}: {} steps, loss {} -> {}{best}{memory}",
                self.out.display(),
                report.steps,
                loss(report.first_loss()),
                loss(report.final_loss())
            )
        })
    }
}
