//! The command line.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use firebrick_analysis::Metric;
use firebrick_core::DeviceSpec;

use crate::commands::{
    completions, convert, devices, diff, embed, eval, extract_lora, fetch, generate, imatrix, inspect, man,
    merge, profile, prune, quantize, train, transplant,
};
use crate::specialize;

/// Layer-wise specialization of pretrained models.
#[derive(Parser)]
#[command(name = "firebrick", version, about, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags that every verb takes.
#[derive(Args, Clone)]
pub struct Global {
    /// Where to compute: auto, flex, wgpu or cuda; `wgpu:1` is the second such device.
    #[arg(env = "FIREBRICK_DEVICE", long, global = true, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceSpec,
    /// Seed of every random draw.
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Worker threads; all processors if absent.
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Most memory that writing checkpoints may use, such as 1GiB, beside the program and the pages of the files in work.
    #[arg(long, global = true, value_name = "SIZE")]
    pub max_memory: Option<Size>,
    /// Most bytes of tensors in one file of a folder, such as 2GB; larger models get several files and an index.
    #[arg(long, global = true, value_name = "SIZE")]
    pub shard_size: Option<Size>,
    /// Say what would be read, written and needed, and stop.
    #[arg(long, global = true)]
    pub dry_run: bool,
    /// Go on where an interrupted run stopped.
    #[arg(long, global = true)]
    pub resume: bool,
    /// Replace an output that exists.
    #[arg(long, global = true)]
    pub overwrite: bool,
    /// Print the result as JSON on stdout; everything else goes to stderr.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more.
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Say nothing but errors.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Verb {
    /// The whole way: profile, plan, adapt, merge, route, quantize, distill, evaluate, report.
    Specialize(specialize::Specialize),
    /// Perplexity of a model on a text, its distance from another model, tasks.
    Eval(eval::Eval),
    /// Continue a prompt.
    Generate(generate::Generate),
    /// Texts as vectors, from an encoder.
    Embed(embed::Embed),
    /// Train adapters on a text.
    Train(Box<train::Train>),
    /// Measure what every layer does on a text.
    Profile(profile::Profile),
    /// Merge checkpoints as a mergekit YAML says.
    Merge(merge::Merge),
    /// Make an adapter of what a fine-tune has beyond its base.
    ExtractLora(extract_lora::ExtractLora),
    /// Give a model another model's tokenizer, without training.
    Transplant(transplant::Transplant),
    /// Quantize a model, by round-to-nearest or GPTQ.
    Quantize(quantize::Quantize),
    /// Leave out the layers that matter least.
    Prune(prune::Prune),
    /// Write a model in another type or format.
    Convert(convert::Convert),
    /// Measure which inputs of every layer matter, for `convert --imatrix` and llama.cpp.
    Imatrix(imatrix::Imatrix),
    /// Sizes, types, sites and tensors of a model, and what is wrong with it.
    Inspect(inspect::Inspect),
    /// Tensor by tensor, how two checkpoints differ.
    Diff(diff::Diff),
    /// Fetch a model of the Hugging Face Hub into the cache that its other clients share.
    Fetch(fetch::Fetch),
    /// The devices that can be computed on.
    Devices(devices::Devices),
    /// Print what a shell needs to complete command lines.
    Completions(completions::Completions),
    /// Write a manual page for each verb.
    Man(man::Man),
}

impl Verb {
    /// Whether the verb does the same over and over with one model, and so asks for the same buffers; the others go through stages,
    /// or move weights through a bounded amount of memory.
    pub fn repeats(&self) -> bool {
        matches!(self, Verb::Train(_) | Verb::Eval(_) | Verb::Generate(_) | Verb::Embed(_))
    }

    /// Whether an interrupted run of the verb can go on where it stopped.
    pub fn resumes(&self) -> bool {
        matches!(
            self,
            Verb::Specialize(_) | Verb::Train(_) | Verb::Merge(_) | Verb::Transplant(_) | Verb::Convert(_)
        )
    }
}

/// A number of bytes, such as `512MiB`, `1GiB`, `2G` or `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024f64.powi(2),
            "g" | "gib" => 1024f64.powi(3),
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            _ => return Err(format!("`{unit}` is not a unit; write for example 512MiB or 2GB")),
        };
        let number: f64 =
            number.parse().map_err(|_| format!("`{text}` is not a size; write for example 1GiB"))?;
        Ok(Size((number * factor) as u64))
    }
}

/// `NAME=FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    pub name: String,
    pub path: PathBuf,
}

impl FromStr for NamedFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = text.split_once('=').ok_or_else(|| format!("`{text}` should be NAME=FILE"))?;
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if name.is_empty() || !name.chars().all(fine) {
            return Err(format!("`{name}` is not a name; use letters, digits, - and _"));
        }
        Ok(NamedFile { name: name.into(), path: path.into() })
    }
}

/// Arguments that parse but make no sense together; exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Metrics of a profile, separated by commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics(pub BTreeSet<Metric>);

impl FromStr for Metrics {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Metrics(Metric::ALL.into())),
            "none" => Ok(Metrics(BTreeSet::new())),
            list => Ok(Metrics(list.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?)),
        }
    }
}

/// What chooses the codes of a quantized weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantizer {
    /// Round to nearest.
    Rtn,
    /// Let later columns absorb the errors of earlier ones.
    Gptq,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_names() {
        assert_eq!("1GiB".parse(), Ok(Size(1 << 30)));
        assert_eq!("1.5k".parse(), Ok(Size(1536)));
        assert_eq!("2GB".parse(), Ok(Size(2_000_000_000)));
        assert!("many".parse::<Size>().is_err());
        assert!("3 parsecs".parse::<Size>().is_err());
        let named: NamedFile = "law=a/b=c.txt".parse().unwrap();
        assert_eq!((named.name.as_str(), named.path), ("law", PathBuf::from("a/b=c.txt")));
        assert!("../x=y".parse::<NamedFile>().is_err());
        assert!("x".parse::<NamedFile>().is_err());
        let metrics = |text: &str| text.parse::<Metrics>().map(|m| m.0.len());
        assert_eq!((metrics("all"), metrics("none"), metrics("lens, fisher")), (Ok(7), Ok(0), Ok(2)));
        assert!(metrics("lens,entropy").is_err());
    }
}
