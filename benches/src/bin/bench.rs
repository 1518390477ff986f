//! `cargo xtask bench [SUITE...] [OPTIONS]`: arguments, and what is done with the results.
#![forbid(unsafe_code)]
// A benchmark prints its results.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use firebrick_benches::suites::{self, SUITES};
use firebrick_benches::{Bench, Comparison, Measured, PeerSettings, Roofline, RunInfo, SavedRun};
use firebrick_benches::{append, compare, markdown, page, read};
use firebrick_core::{DeviceSpec, list_devices};
use firebrick_models::ModelFiles;

/// As in the `firebrick` binary: what is measured is what users get.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures firebrick, beside its Python peers if asked.
#[derive(Parser)]
#[command(name = "bench", after_help = suites_help())]
struct Arguments {
    /// What to measure; everything if absent. With --load, nothing.
    #[arg(value_name = "SUITE", value_parser = SUITES.iter().map(|s| s.name).collect::<Vec<_>>())]
    suites: Vec<String>,
    /// Devices, separated by commas; `list` names those there are. Every one of this build but software rasterizers if absent.
    #[arg(long, value_delimiter = ',')]
    device: Vec<String>,
    /// Run the Python peers of the cases on flex and on the host in turns with ours, on as many threads, at least 5 pairs
    /// (FIREBRICK_PYTHON names the Python).
    #[arg(long)]
    peer: bool,
    /// SmolLM2 as GGUF, measured beside the embedded model (`cargo xtask bench` names the fetched one).
    #[arg(long, value_name = "FILE")]
    smollm2: Option<PathBuf>,
    /// Only cases that have TEXT in their suite, name and type, such as `smollm2 lora` or `q4_0 x int8`; may be given more than once.
    #[arg(long = "case", value_name = "TEXT")]
    cases: Vec<String>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// Measured calls per case.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Add the run to FILE, as JSON lines.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Take saved runs, oldest first, as the history of this one; without a SUITE the last of them is this one.
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    load: Vec<PathBuf>,
    /// Compare with the last run of FILE.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Exit with 1 if a case became significantly slower.
    #[arg(long, requires = "compare")]
    fail_on_regression: bool,
    /// Write a page with this run and its history.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a page of Markdown with this run and those that --load takes, as in docs/measured.md.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Folder for models made for measuring, kept from run to run (1.1 GB for the suite `merge`).
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    cache: PathBuf,
}

fn suites_help() -> String {
    let lines = SUITES.iter().map(|s| format!("  {:11} {}\n", s.name, s.what));
    format!(
        "Suites:\n{}  {:11} limits of the machine, always measured",
        lines.collect::<String>(),
        "roofline"
    )
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // As in the `firebrick` binary.
    let _pool = rayon::ThreadPoolBuilder::new().use_current_thread().build()?;
    if arguments.device.iter().any(|d| d == "list") {
        for device in list_devices() {
            let software = if device.software { ", software" } else { "" };
            println!("{:8} {} ({}{software})", device.spec.to_string(), device.name, device.kind);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let earlier = match &arguments.compare {
        Some(path) => read(path)?.pop(),
        None => None,
    };
    let mut runs = Vec::new();
    for path in &arguments.load {
        runs.extend(read(path)?);
    }
    if arguments.load.is_empty() || !arguments.suites.is_empty() {
        let run = SavedRun { info: RunInfo::now(), cases: measure(&arguments)? };
        if let Some(path) = &arguments.save {
            append(path, &run)?;
        }
        runs.push(run);
    }
    if let Some(path) = &arguments.html {
        let html = page(&runs).to_html();
        firebrick_core::write_atomic(path, html.as_bytes()).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &arguments.markdown {
        firebrick_core::write_atomic(path, markdown(&runs).as_bytes())
            .with_context(|| path.display().to_string())?;
    }
    let now = runs.last().expect("measured or loaded above");
    let Some(earlier) = earlier else { return Ok(ExitCode::SUCCESS) };
    let comparison = compare(&earlier, now);
    show(&comparison, arguments.json);
    let failed = arguments.fail_on_regression && comparison.regressions().next().is_some();
    Ok(ExitCode::from(u8::from(failed)))
}

/// With `--json` only results go to stdout.
fn show(comparison: &Comparison, json: bool) {
    if json {
        eprint!("{comparison}");
    } else {
        print!("\n{comparison}");
    }
}

fn measure(arguments: &Arguments) -> Result<Vec<Measured>> {
    let peers = peers(arguments)?;
    if cfg!(debug_assertions) {
        eprintln!("note: built without optimization; the figures mean nothing");
    }
    let models = models(arguments.smollm2.as_deref())?;
    let print = |m: &Measured| print(m, arguments.json);
    let note = |text: &str| eprintln!("note: {text}");
    let bench = |spec: DeviceSpec, name: &str, roofline: Option<Roofline>| -> Result<Bench<'_>> {
        Ok(Bench {
            device: spec.open()?,
            name: name.into(),
            models: &models,
            only: arguments.cases.clone(),
            repeats: arguments.repeats,
            peers: peers.clone().filter(|_| spec == DeviceSpec::Flex),
            cache: arguments.cache.clone(),
            roofline,
            limit_in_turns: spec == DeviceSpec::Flex,
            measured: &print,
            note: &note,
            results: Default::default(),
        })
    };
    let asked: Vec<_> = SUITES
        .iter()
        .filter(|s| arguments.suites.is_empty() || arguments.suites.iter().any(|a| a == s.name))
        .collect();
    let (mut cases, mut host) = (Vec::new(), None);
    for spec in devices(&arguments.device)? {
        let mut bench = bench(spec, &spec.to_string(), None)?;
        let limits = suites::roofline(&bench)?;
        if spec == DeviceSpec::Flex {
            host = Some(limits);
        } else if peers.is_some() {
            note(&format!("no peers on {spec}: they compute on the CPU"));
        }
        bench.roofline = Some(limits);
        for suite in asked.iter().filter(|s| !s.on_host) {
            (suite.run)(&bench).with_context(|| format!("suite {} on {spec}", suite.name))?;
        }
        cases.extend(bench.results.into_inner());
    }
    if asked.iter().any(|s| s.on_host) {
        let mut bench = bench(DeviceSpec::Flex, "flex", host)?;
        if bench.roofline.is_none() {
            bench.roofline = Some(suites::roofline(&bench)?);
        }
        bench.name = "host".into();
        for suite in asked.iter().filter(|s| s.on_host) {
            (suite.run)(&bench).with_context(|| format!("suite {}", suite.name))?;
        }
        cases.extend(bench.results.into_inner());
    }
    if !arguments.cases.is_empty() && cases.iter().all(|m| m.suite == "roofline") {
        bail!("no case of these suites has {} in its name", arguments.cases.join(" or "));
    }
    Ok(cases)
}

fn devices(names: &[String]) -> Result<Vec<DeviceSpec>> {
    if names.is_empty() {
        return Ok(list_devices().into_iter().filter(|d| !d.software).map(|d| d.spec).collect());
    }
    Ok(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?)
}

fn peers(arguments: &Arguments) -> Result<Option<PeerSettings>> {
    #[allow(clippy::disallowed_methods, reason = "where Python is comes from the environment")]
    let python = std::env::var_os("FIREBRICK_PYTHON").map(PathBuf::from);
    match python {
        _ if !arguments.peer => Ok(None),
        None => bail!("--peer needs FIREBRICK_PYTHON; `cargo xtask python` makes one"),
        Some(python) => {
            let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
            Ok(Some(PeerSettings { python, scripts }))
        }
    }
}

fn models(smollm2: Option<&Path>) -> Result<Vec<(&'static str, ModelFiles)>> {
    let mut models = vec![("embedded", ModelFiles::embedded()?)];
    match smollm2 {
        Some(path) => models.push(("smollm2", ModelFiles::open(path)?)),
        None => eprintln!("note: without SmolLM2; `cargo xtask model smollm2` fetches it"),
    }
    Ok(models)
}

fn print(m: &Measured, json: bool) {
    if json {
        println!("{}", serde_json::to_string(m).expect("texts and numbers are JSON"));
        return;
    }
    let mut more = String::new();
    if let (Some(gflops), Some(share)) = (m.gflops, m.share_of_peak) {
        more += &format!("  {gflops:.1} GFLOP/s, {:.0} % of peak", 100.0 * share);
    }
    if let (Some(rate), Some(share)) = (m.gbytes_per_s, m.share_of_bandwidth) {
        more += &format!("  {rate:.2} GB/s, {:.0} % of bandwidth", 100.0 * share);
    }
    if let (Some(peer), Some(median), Some(ratio)) = (&m.peer, m.peer_median, m.ratio) {
        more += &format!("  {ratio:.2}x of {peer} ({median:.2})");
    }
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    match (m.peak_bytes, m.peer_peak_bytes) {
        (Some(ours), Some(theirs)) => {
            more += &format!("  {:.2} of {:.2} GB", gigabytes(ours), gigabytes(theirs));
        }
        (Some(ours), None) => more += &format!("  {:.2} GB", gigabytes(ours)),
        _ => {}
    }
    match (m.faults, m.peer_faults) {
        (Some(ours), Some(theirs)) => more += &format!("  {ours:.0} of {theirs:.0} page faults"),
        (Some(ours), None) => more += &format!("  {ours:.0} page faults"),
        _ => {}
    }
    println!(
        "{:10} {:28} {:6} {:>10.2} {:9} ±{:.2}{more}",
        m.suite, m.case, m.device, m.median, m.unit, m.mad
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
        let parse = |line: &str| Arguments::try_parse_from(line.split(' '));
        let parsed = parse("bench forward moe --device flex,wgpu:1 --load a,b --repeats 2").unwrap();
        assert_eq!(
            (parsed.suites, parsed.device.len(), parsed.load.len()),
            (vec!["forward".into(), "moe".into()], 2, 2)
        );
        assert!(parse("bench backward").is_err(), "no such suite");
        assert!(parse("bench --fail-on-regression").is_err(), "nothing to compare with");
    }

    #[test]
    fn devices_are_those_named_or_all() {
        assert_eq!(devices(&["flex".into()]).unwrap(), [DeviceSpec::Flex]);
        assert!(devices(&["gpu".into()]).is_err());
        assert_eq!(devices(&[]).unwrap().last(), Some(&DeviceSpec::Flex));
    }
}
