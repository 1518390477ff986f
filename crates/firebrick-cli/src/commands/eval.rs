//! `firebrick eval`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use firebrick_core::{Brick, Run, Task, write_atomic};
use firebrick_models::{Decoder, Model, ModelFiles};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Metadata, TensorSpec, write_safetensors};
use firebrick_train::eval::{
    BUILT_IN, Batching, EvalTask, ReferenceReport, TaskResult, TaskSettings, compare, results, run_task,
    strided_perplexity,
};
use firebrick_train::{EvalReport, TextData, perplexity, token_tensor};
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::args::{Global, Usage};
use crate::models::{self, Dtype, Packed};
use crate::ui::Terminal;

#[derive(Args)]
pub struct Eval {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Text file.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Tokens per window, and most tokens of a task's sequences.
    #[arg(long, default_value_t = 512, value_name = "N")]
    window: usize,
    /// Tokens from one window to the next: each token counts once, with at least --window minus N before it; --window if absent.
    #[arg(long, value_name = "N", requires = "data")]
    stride: Option<usize>,
    /// Windows at a time; tasks take as many tokens at a time.
    #[arg(long, default_value_t = 4, value_name = "N")]
    batch: usize,
    /// Write the logits at the last position of every window, `logits: [windows, vocabulary]`, as safetensors.
    #[arg(long, value_name = "FILE", requires = "data")]
    logits: Option<PathBuf>,
    /// Compare with this model (without adapters) on the text: Kullback-Leibler divergence, agreement, perplexity ratio.
    #[arg(long, value_name = "M", requires = "data")]
    reference: Option<String>,
    /// Task: a TOML file, `gloss_pair` or `gloss_rank`; several are given one after the other.
    #[arg(long, value_name = "TASK", num_args = 1..)]
    task: Vec<String>,
    /// Only the first items of each task.
    #[arg(long, value_name = "N", requires = "task")]
    limit: Option<usize>,
    /// Solved examples before each prompt; each task's own number if absent.
    #[arg(long, value_name = "N", requires = "task")]
    num_fewshot: Option<usize>,
    /// Begin the prompts of tasks with what the model expects around a text, such as a begin token.
    #[arg(long, requires = "task")]
    add_bos: bool,
    /// Write every item of the tasks with its log-likelihoods, one JSON object a line.
    #[arg(long, value_name = "FILE", requires = "task")]
    samples: Option<PathBuf>,
    /// Compute with bf16 weights, and with the Q4_0, Q4_1 and Q8_0 blocks of a GGUF file; the reference does not.
    #[arg(long, default_value = "off", value_name = "HOW")]
    packed: Packed,
    /// Type that products take and weights are stored in; bf16 is faster on CPUs with AMX and AMD's with AVX512-BF16. The reference is computed in f32.
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    dtype: Dtype,
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    dtype: &'static str,
    window: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    stride: Option<usize>,
    #[serde(flatten)]
    report: Option<EvalReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<Reference<'a>>,
    #[serde(flatten)]
    tasks: Option<Json>,
}

#[derive(Serialize)]
struct Reference<'a> {
    model: &'a str,
    #[serde(flatten)]
    report: ReferenceReport,
}

impl Eval {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        self.check()?;
        for out in self.writes() {
            models::check_file(out, global)?;
        }
        // Everything that can be wrong with what was given, before a model is loaded.
        let tasks = self.task.iter().map(|name| task(name)).collect::<Result<Vec<_>>>()?;
        self.check_names(&tasks)?;
        let files = models::open(&self.model)?;
        let data = self.data.as_ref().map(|path| self.text(path, &files)).transpose()?;
        let reference = match (&self.reference, &self.data) {
            (Some(name), Some(path)) => Some(reference(name, path, &files)?),
            _ => None,
        };
        if global.dry_run {
            return self.preview(&files, data.as_ref(), &tasks, terminal);
        }
        let device = models::device(global)?;
        let precision = self.dtype.precision(&device, terminal);
        let (model, packed) = models::load_packed(files, self.packed, precision, &device)?;
        let reference = reference.map(|files| files.load(&device)).transpose()?;
        let banks = models::adapters(&self.adapter, &model, &device)?;
        let bricks = models::bricks(&packed, &banks);
        let report =
            data.as_ref().map(|d| self.perplexity(&model.decoder, &bricks, d, terminal)).transpose()?;
        let compared = match (&reference, &data) {
            (Some(other), Some(data)) => {
                Some(self.compare(&model.decoder, &bricks, other, data, terminal)?)
            }
            _ => None,
        };
        let asked =
            tasks.iter().map(|t| self.ask(&model, &bricks, t, terminal)).collect::<Result<Vec<_>>>()?;
        if let (Some(out), Some(data)) = (&self.logits, &data) {
            self.save_logits(&model.decoder, &bricks, data, out, terminal)?;
        }
        if let Some(out) = &self.samples {
            save_samples(&asked, out)?;
        }
        let text = self.told(report.as_ref(), compared.as_ref(), &asked);
        let output = Output {
            model: &model.name,
            dtype: self.dtype.name(),
            window: self.window,
            stride: self.stride,
            report,
            reference: compared
                .zip(reference.as_ref())
                .map(|(report, m)| Reference { model: &m.name, report }),
            tasks: (!asked.is_empty()).then(|| results(&asked, self.config(&model, global))),
        };
        terminal.result(&output, || text)
    }

    fn check(&self) -> Result<()> {
        if self.data.is_none() && self.task.is_empty() {
            return Err(Usage("what to evaluate on? give --data FILE, --task TASK, or both".into()).into());
        }
        if self.window < 2 || self.batch == 0 {
            return Err(Usage("--window must be at least 2 and --batch at least 1".into()).into());
        }
        if self.stride.is_some_and(|s| s == 0 || s > self.window) {
            return Err(Usage(format!("--stride must be 1 to --window ({})", self.window)).into());
        }
        if self.limit == Some(0) {
            return Err(Usage("--limit must be at least 1".into()).into());
        }
        Ok(())
    }

    /// Results are filed under the names of the tasks.
    fn check_names(&self, tasks: &[EvalTask]) -> Result<()> {
        let twice = tasks.iter().enumerate().find(|(i, t)| tasks[..*i].iter().any(|o| o.name() == t.name()));
        match twice {
            Some((_, task)) => Err(Usage(format!("two tasks have the name `{}`", task.name())).into()),
            None => Ok(()),
        }
    }

    fn writes(&self) -> Vec<&Path> {
        self.logits.iter().chain(&self.samples).map(PathBuf::as_path).collect()
    }

    /// The text as one piece, without special tokens: windows mean the same as in transformers.
    fn text(&self, path: &Path, files: &ModelFiles) -> Result<TextData> {
        let text = models::read_text(path)?;
        let data = TextData::new(files.tokenizer.encode(&text, false)?, text.len());
        models::fills(data.ids.len(), self.window, path)?;
        Ok(data)
    }

    fn preview(
        &self,
        files: &ModelFiles,
        data: Option<&TextData>,
        tasks: &[EvalTask],
        terminal: &Terminal,
    ) -> Result<()> {
        let mut facts = serde_json::Map::new();
        if let Some(data) = data {
            facts.insert("tokens".into(), json!(data.ids.len()));
            facts.insert("windows".into(), json!(data.windows(self.window).len()));
        }
        for task in tasks {
            let items = task.items().len().min(self.limit.unwrap_or(usize::MAX));
            facts.insert(format!("items of {}", task.name()), json!(items));
        }
        let reads = self.data.iter().map(PathBuf::as_path);
        let of_tasks = self.task.iter().filter(|t| !BUILT_IN.contains(&t.as_str())).map(Path::new);
        let reads: Vec<&Path> = reads.chain(of_tasks).collect();
        models::preview(files, &reads, &self.writes(), facts.into(), terminal)
    }

    fn perplexity(
        &self,
        decoder: &Decoder,
        bricks: &[&dyn Brick],
        data: &TextData,
        terminal: &Terminal,
    ) -> Result<EvalReport> {
        let (ids, bytes) = (&data.ids, data.bytes);
        Ok(match self.stride {
            Some(stride) => {
                strided_perplexity(decoder, bricks, ids, bytes, self.window, stride, self.batch, terminal)?
            }
            None => perplexity(decoder, bricks, ids, bytes, self.window, self.batch, terminal)?,
        })
    }

    fn compare(
        &self,
        decoder: &Decoder,
        bricks: &[&dyn Brick],
        reference: &Model,
        data: &TextData,
        terminal: &Terminal,
    ) -> Result<ReferenceReport> {
        let reference = (&reference.decoder, &[][..]);
        Ok(compare(decoder, bricks, reference, &data.ids, self.window, self.batch, terminal)?)
    }

    fn ask(
        &self,
        model: &Model,
        bricks: &[&dyn Brick],
        task: &EvalTask,
        terminal: &Terminal,
    ) -> Result<TaskResult> {
        let settings = TaskSettings {
            shots: self.num_fewshot,
            limit: self.limit,
            special: self.add_bos,
            batching: Batching { longest: self.window, tokens: self.window.saturating_mul(self.batch) },
        };
        Ok(run_task(&model.decoder, bricks, &model.tokenizer, task, &settings, terminal)?)
    }

    /// The run, in the words of lm-evaluation-harness.
    fn config(&self, model: &Model, global: &Global) -> Json {
        let adapters: String = self.adapter.iter().map(|a| format!(",peft={}", a.display())).collect();
        json!({
            "model": "firebrick",
            "model_args": format!(
                "pretrained={}{adapters},dtype={},add_bos_token={}",
                self.model,
                if self.dtype == Dtype::F32 { "float32" } else { "bfloat16" },
                self.add_bos
            ),
            "model_num_parameters": burn::module::Module::num_params(&model.decoder),
            "batch_size": self.batch,
            "max_length": self.window,
            "device": global.device.to_string(),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
        })
    }

    /// What a reader at a terminal gets.
    fn told(
        &self,
        report: Option<&EvalReport>,
        reference: Option<&ReferenceReport>,
        tasks: &[TaskResult],
    ) -> String {
        let mut lines = Vec::new();
        if let Some(r) = report {
            let bits = r.bits_per_byte.map_or(String::new(), |b| format!(", {b:.4} bits per byte"));
            lines.push(format!("perplexity {:.4} on {} tokens{bits}", r.perplexity, r.tokens));
        }
        if let Some(r) = reference {
            let error = |e: Option<f64>| e.map_or(String::new(), |e| format!(" ± {e:.4}"));
            lines.push(format!(
                "KL from the reference: mean {:.5}{}, median {:.5}, 99 % below {:.5}, largest {:.5} nats",
                r.mean_kl,
                error(r.mean_kl_standard_error),
                r.median_kl,
                r.p99_kl,
                r.max_kl
            ));
            lines.push(format!(
                "same likeliest token {:.2} %, perplexity {:.4} against {:.4}, ratio {:.4}{}",
                100.0 * r.top1_agreement,
                r.perplexity,
                r.reference_perplexity,
                r.perplexity_ratio,
                error(r.perplexity_ratio_standard_error)
            ));
        }
        for task in tasks {
            for score in &task.scores {
                let error = score.standard_error.map_or(String::new(), |e| format!(" ± {e:.4}"));
                let (name, metric) = (&task.name, score.metric.name());
                let shots = task.shots;
                let items = task.samples.len();
                lines.push(format!(
                    "{name}: {metric} {:.4}{error} on {items} items, {shots} examples",
                    score.value
                ));
            }
            for class in task.confusion.iter().flat_map(|c| c.classes()) {
                lines.push(format!(
                    "  {}: accuracy {:.4}, precision {:.4}, F1 {:.4} on {} items",
                    class.label, class.accuracy, class.precision, class.f1, class.items
                ));
            }
        }
        lines.join("\n")
    }

    fn save_logits(
        &self,
        decoder: &Decoder,
        bricks: &[&dyn Brick],
        data: &TextData,
        out: &Path,
        terminal: &Terminal,
    ) -> Result<()> {
        let windows: Vec<&[u32]> = data.windows(self.window).collect();
        let mut bytes = Vec::new();
        let mut task = Task::begin(terminal, "logits", Some(windows.len() as u64), "windows");
        for batch in windows.chunks(self.batch) {
            let mut run = Run::new(bricks);
            let hidden = decoder.hidden(token_tensor(batch, &decoder.device()), &mut run);
            let logits = decoder.logits(hidden.narrow(1, self.window - 1, 1), &mut run);
            let values = logits.into_data().try_into_vec_as::<f32>().map_err(|e| anyhow!("{e:?}"))?;
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            task.advance(batch.len() as u64, "")?;
        }
        let spec = TensorSpec::new("logits", DType::F32, [windows.len(), decoder.config().vocab]);
        Ok(write_safetensors(out, &Metadata::default(), &[(spec, bytes)])?)
    }
}

/// A task that is built in, or one in a file.
fn task(name: &str) -> Result<EvalTask> {
    if let Some(task) = EvalTask::built_in(name) {
        return Ok(task);
    }
    let path = Path::new(name);
    if !path.exists() {
        let known = BUILT_IN.join(", ");
        return Err(Usage(format!("--task {name}: no such file; give a TOML file or one of {known}")).into());
    }
    Ok(EvalTask::load(path)?)
}

/// Opens the reference. It has to cut the text as the model does: its distributions are over other tokens otherwise.
fn reference(name: &str, data: &Path, files: &ModelFiles) -> Result<ModelFiles> {
    let reference = models::open(name)?;
    let text = models::read_text(data)?;
    if reference.tokenizer.encode(&text, false)? != files.tokenizer.encode(&text, false)? {
        let message = format!("--reference {name}: its tokenizer cuts {} into other tokens", data.display());
        return Err(Usage(message).into());
    }
    Ok(reference)
}

fn save_samples(tasks: &[TaskResult], out: &Path) -> Result<()> {
    let mut lines = String::new();
    for task in tasks {
        for sample in &task.samples {
            let mut line = serde_json::to_value(sample)?;
            line["task"] = json!(task.name);
            lines += &line.to_string();
            lines.push('\n');
        }
    }
    write_atomic(out, lines.as_bytes()).with_context(|| out.display().to_string())
}
