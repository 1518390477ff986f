//! `firebrick inspect`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;
use firebrick_core::{Part, Progress, Site, SiteTable, Task};
use firebrick_models::{EncoderFiles, EncoderTensor, EncoderWeights, ModelFiles};
use firebrick_tensor::checkpoint::{Checkpoint, TensorInfo, is_gguf_name};
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Inspect {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name; of any other checkpoint the tensors.
    #[arg(value_name = "M")]
    model: String,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Read every tensor and look for values that are infinite or not numbers.
    #[arg(long)]
    check: bool,
}

/// Tensors, elements and bytes.
type Sizes = (usize, usize, usize);

impl Inspect {
    pub fn run(&self, _global: &Global, terminal: &Terminal) -> Result<()> {
        if models::is_encoder(&self.model) {
            return self.encoder(&models::open_encoder(&self.model)?, terminal);
        }
        match models::open_unchecked(&self.model) {
            Ok(files) => self.model(&files, terminal),
            // A file of tensors alone is no model, and can be shown nevertheless; a folder or GGUF file means to be one.
            Err(why) if Path::new(&self.model).is_file() && !is_gguf_name(Path::new(&self.model)) => {
                match Checkpoint::open(&self.model) {
                    Ok(checkpoint) => self.checkpoint(&checkpoint, &why, terminal),
                    Err(_) => Err(why),
                }
            }
            Err(why) => Err(why),
        }
    }

    fn model(&self, files: &ModelFiles, terminal: &Terminal) -> Result<()> {
        let types = types(&files.checkpoint);
        let (_, parameters, bytes) = total(&types);
        let parts = parts(&files.checkpoint, files.sites(), |site| files.weights().tensor_name(site));
        let mut problems = files.problems()?;
        problems.extend(self.values(&files.checkpoint, terminal)?);
        let sites: Vec<_> = files.sites().entries().iter().filter(|e| e.tensor.is_some()).collect();
        let config = &files.config;
        let output = json!({
            "name": files.name,
            "config": config,
            "parameters": parameters,
            "bytes": bytes,
            "types": types,
            "parts": named(&parts),
            "vocab": files.tokenizer.vocab_size(),
            "chat_template": files.tokenizer.chat_template().is_some(),
            "sites": sites,
            "tensors": listed(&files.checkpoint),
            "checked_values": self.check,
            "problems": problems,
        });
        terminal.result(&output, || {
            let mut text = format!(
                "{} ({})\n  {} layers, d_model {}, d_ff {}, {} heads of {} ({} key-value), vocabulary {}{}\n",
                files.name,
                config.model_type,
                config.layers,
                config.d_model,
                config.d_ff,
                config.heads,
                config.head_dim,
                config.kv_heads,
                config.vocab,
                if config.tied_head { ", tied head" } else { "" },
            );
            text += &sizes(&types);
            text += &parts_text(&parts, files.sites());
            text + &self.tail(&files.checkpoint, &problems)
        })?;
        verdict(&problems)
    }

    fn encoder(&self, files: &EncoderFiles, terminal: &Terminal) -> Result<()> {
        let types = types(&files.checkpoint);
        let (_, parameters, bytes) = total(&types);
        let weights = EncoderWeights::new(&files.checkpoint);
        let parts = parts(&files.checkpoint, files.sites(), |site| {
            Some(weights.find(EncoderTensor::Weight(site))?.name.clone())
        });
        let problems = self.values(&files.checkpoint, terminal)?;
        let sites: Vec<_> = files.sites().entries().iter().filter(|e| e.tensor.is_some()).collect();
        let (config, sentence) = (&files.config, &files.sentence);
        let (pooling, normalize) = (sentence.pooling.name(), sentence.normalize);
        let output = json!({
            "name": files.name,
            "config": config,
            "pooling": pooling,
            "normalize": normalize,
            "max_tokens": sentence.max_tokens,
            "parameters": parameters,
            "bytes": bytes,
            "types": types,
            "parts": named(&parts),
            "vocab": files.tokenizer.vocab_size(),
            "sites": sites,
            "tensors": listed(&files.checkpoint),
            "checked_values": self.check,
            "problems": problems,
        });
        terminal.result(&output, || {
            let mut text = format!(
                "{} ({}, encoder)\n  {} layers, d_model {}, d_ff {}, {} heads of {}, vocabulary {}, {} positions\n  pooling {pooling}{}\n",
                files.name,
                config.model_type,
                config.layers,
                config.d_model,
                config.d_ff,
                config.heads,
                config.head_dim(),
                config.vocab,
                config.max_tokens,
                if normalize { ", normalized" } else { "" },
            );
            text += &sizes(&types);
            text += &parts_text(&parts, files.sites());
            text + &self.tail(&files.checkpoint, &problems)
        })?;
        verdict(&problems)
    }

    fn checkpoint(&self, checkpoint: &Checkpoint, why: &anyhow::Error, terminal: &Terminal) -> Result<()> {
        let types = types(checkpoint);
        let (_, parameters, bytes) = total(&types);
        let problems = self.values(checkpoint, terminal)?;
        let output = json!({
            "name": self.model,
            "not_a_model": why.to_string(),
            "parameters": parameters,
            "bytes": bytes,
            "types": types,
            "tensors": listed(checkpoint),
            "checked_values": self.check,
            "problems": problems,
        });
        terminal.result(&output, || {
            let tail = self.tail(checkpoint, &problems);
            format!("{}\n  not a model that can be run: {why}\n{}{tail}", self.model, sizes(&types))
        })?;
        verdict(&problems)
    }

    /// With --check: the tensors that hold values which are no numbers.
    fn values(&self, checkpoint: &Checkpoint, terminal: &Terminal) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        if !self.check {
            return Ok(problems);
        }
        let tensors = checkpoint.tensors().iter().filter(|t| t.dtype.is_real());
        let bytes = tensors.clone().map(|t| t.len as u64).sum();
        let mut task = Task::begin(terminal as &dyn Progress, "check", Some(bytes), "bytes");
        for t in tensors {
            let count = checkpoint.count_not_finite(&t.name)?;
            if count > 0 {
                problems.push(format!(
                    "tensor `{}`: {count} of {} values are not finite",
                    t.name,
                    t.elements()
                ));
            }
            task.advance(t.len as u64, &t.name)?;
        }
        Ok(problems)
    }

    fn tail(&self, checkpoint: &Checkpoint, problems: &[String]) -> String {
        let mut text = String::new();
        if self.tensors {
            for t in checkpoint.tensors() {
                text += &format!("  {:50} {:6} {:?}\n", t.name, t.dtype.name(), t.shape);
            }
        }
        if self.check && problems.is_empty() {
            text += "  every value is a finite number\n";
        }
        problems.iter().for_each(|problem| text += &format!("  problem: {problem}\n"));
        text
    }
}

fn verdict(problems: &[String]) -> Result<()> {
    match problems.len() {
        0 => Ok(()),
        1 => bail!("{}", problems[0]),
        n => bail!("{n} problems, the first: {}", problems[0]),
    }
}

fn add(sizes: &mut Sizes, elements: usize, bytes: usize) {
    *sizes = (sizes.0 + 1, sizes.1 + elements, sizes.2 + bytes);
}

fn types(checkpoint: &Checkpoint) -> BTreeMap<&'static str, Sizes> {
    let mut types = BTreeMap::new();
    for t in checkpoint.tensors() {
        add(types.entry(t.dtype.name()).or_default(), t.elements(), t.len);
    }
    types
}

fn total(types: &BTreeMap<&str, Sizes>) -> Sizes {
    types.values().fold((0, 0, 0), |a, t| (a.0 + t.0, a.1 + t.1, a.2 + t.2))
}

fn sizes(types: &BTreeMap<&str, Sizes>) -> String {
    let (tensors, elements, bytes) = total(types);
    let bits = 8.0 * bytes as f64 / (elements as f64).max(1.0);
    let (millions, megabytes) = (elements as f64 / 1e6, bytes as f64 / 1e6);
    let mut text = format!(
        "  {millions:.1} M parameters in {tensors} tensors, {megabytes:.1} MB, {bits:.2} bits per parameter\n"
    );
    for (name, (count, elements, bytes)) in types {
        text += &format!("  {name:6} {count:4} tensors {elements:>12} values {bytes:>12} bytes\n");
    }
    text
}

fn listed(checkpoint: &Checkpoint) -> Vec<Value> {
    let one =
        |t: &TensorInfo| json!({"name": t.name, "type": t.dtype.name(), "shape": t.shape, "bytes": t.len});
    checkpoint.tensors().iter().map(one).collect()
}

/// Sizes by part of the sites that `name` finds a tensor for.
fn parts(
    checkpoint: &Checkpoint,
    sites: &SiteTable,
    name: impl Fn(Site) -> Option<String>,
) -> BTreeMap<Part, Sizes> {
    let mut parts = BTreeMap::<Part, Sizes>::new();
    for entry in sites.entries().iter().filter(|e| e.tensor.is_some()) {
        if let Some(t) = name(entry.site).and_then(|n| checkpoint.get(&n)) {
            add(parts.entry(entry.site.part).or_default(), t.elements(), t.len);
        }
    }
    parts
}

fn named(parts: &BTreeMap<Part, Sizes>) -> Map<String, Value> {
    parts.iter().map(|(part, sizes)| (part.to_string(), json!(sizes))).collect()
}

/// A line for each part, with the shapes of its linear layers.
fn parts_text(parts: &BTreeMap<Part, Sizes>, sites: &SiteTable) -> String {
    let mut text = String::new();
    let linears = linears(sites);
    for (part, (_, elements, bytes)) in parts {
        let shapes = linears.iter().filter(|l| l.0 == *part);
        let shapes = shapes.map(|(_, (d_in, d_out), count)| format!("  {count} sites   {d_in} -> {d_out}"));
        let shapes = shapes.collect::<String>();
        text += &format!("  {:14} {elements:>12} values {bytes:>12} bytes{shapes}\n", part.name());
    }
    text
}

/// The linear layers by part and shape `(d_in, d_out)`, and how many there are of each.
fn linears(sites: &SiteTable) -> Vec<(Part, (usize, usize), usize)> {
    let mut found: Vec<(Part, (usize, usize), usize)> = Vec::new();
    for entry in sites.entries() {
        let Some(shape) = sites.linear(entry.site) else { continue };
        match found.iter_mut().find(|(part, s, _)| (*part, *s) == (entry.site.part, shape)) {
            Some((_, _, count)) => *count += 1,
            None => found.push((entry.site.part, shape, 1)),
        }
    }
    found
}
