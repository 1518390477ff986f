//! `cargo xtask bench [SUITE...] [--device D,...] [--peer] [--json] [--repeats N]`.
#![forbid(unsafe_code)]
// A benchmark prints its results.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use firebrick_benches::{Measured, time};
use firebrick_core::{Brick, DeviceSpec, Run, Seed, Silent};
use firebrick_models::{Export, ExportType, ModelFiles};
use firebrick_peft::LoraConfig;
use firebrick_tensor::stream::Executor;
use firebrick_train::AdamW;
use firebrick_train::eval::{Batching, EvalTask, Request, TaskSettings, loglikelihoods, run_task};

/// Measures firebrick, beside its Python peers if asked.
#[derive(Parser)]
struct Arguments {
    /// forward, train, decode, choices, checkpoint; all if absent.
    suites: Vec<String>,
    /// Devices, separated by commas.
    #[arg(long, default_value = "flex", value_delimiter = ',')]
    device: Vec<DeviceSpec>,
    /// Run the Python peer of each case on flex too, on as many threads (FIREBRICK_PYTHON names the Python).
    #[arg(long)]
    peer: bool,
    /// SmolLM2 as GGUF, measured beside the embedded model (`cargo xtask bench` names the fetched one).
    #[arg(long, value_name = "FILE")]
    smollm2: Option<PathBuf>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// Measured calls per case.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

struct Bench {
    device: Device,
    name: String,
    models: Vec<(&'static str, ModelFiles)>,
    repeats: usize,
    python: Option<PathBuf>,
}

type Suite = fn(&Bench) -> Result<Vec<Measured>>;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let all: [(&str, Suite); 5] = [
        ("forward", forward),
        ("train", train),
        ("decode", decode),
        ("choices", choices),
        ("checkpoint", checkpoint),
    ];
    if let Some(unknown) = arguments.suites.iter().find(|s| all.iter().all(|(name, _)| name != s)) {
        bail!("`{unknown}` is not one of forward, train, decode, choices, checkpoint");
    }
    #[allow(clippy::disallowed_methods, reason = "where Python is comes from the environment")]
    let python = std::env::var_os("FIREBRICK_PYTHON").map(PathBuf::from);
    if arguments.peer && python.is_none() {
        bail!("--peer needs FIREBRICK_PYTHON; `cargo xtask python` makes one");
    }
    for spec in &arguments.device {
        let device = spec.open()?;
        let on_cpu = device == Device::flex();
        if arguments.peer && !on_cpu {
            eprintln!("no peers on {spec}: they compute on the CPU");
        }
        let bench = Bench {
            device,
            name: spec.to_string(),
            models: models(arguments.smollm2.as_deref())?,
            repeats: arguments.repeats.max(1),
            python: python.clone().filter(|_| arguments.peer && on_cpu),
        };
        for (name, suite) in all {
            if !arguments.suites.is_empty() && !arguments.suites.iter().any(|s| s == name) {
                continue;
            }
            for measured in suite(&bench)? {
                print(&measured, arguments.json)?;
            }
        }
    }
    Ok(())
}

fn print(m: &Measured, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(m)?);
        return Ok(());
    }
    let peer = match (&m.peer, m.peer_median, m.ratio) {
        (Some(peer), Some(median), Some(ratio)) => format!("   {ratio:.2}x of {peer} ({median:.1})"),
        _ => String::new(),
    };
    println!(
        "{:10} {:28} {:8} {:10.2} {:6} ±{:.2}{peer}",
        m.suite, m.case, m.device, m.median, m.unit, m.mad
    );
    Ok(())
}

fn models(smollm2: Option<&Path>) -> Result<Vec<(&'static str, ModelFiles)>> {
    let mut models = vec![("embedded", ModelFiles::embedded()?)];
    match smollm2 {
        Some(path) => models.push(("smollm2", ModelFiles::open(path)?)),
        None => eprintln!("without SmolLM2: `cargo xtask model smollm2` fetches it"),
    }
    Ok(models)
}

/// `[batch, tokens]` ids that are the same in every run and for every peer.
fn tokens(vocab: usize, batch: usize, length: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..batch * length).map(|i| (i * 7919 % vocab) as i32).collect();
    Tensor::from_data(TensorData::new(ids, [batch, length]), device)
}

impl Bench {
    fn load(&self, files: &ModelFiles, device: &Device) -> Result<firebrick_models::Decoder> {
        Ok(firebrick_models::Decoder::load(files.config.clone(), &files.weights(), device)?)
    }

    /// Runs a peer script on the model as a folder; it prints one number in the unit of the case.
    fn peer(&self, measured: Measured, script: &str, files: &ModelFiles) -> Result<Measured> {
        let Some(python) = &self.python else { return Ok(measured) };
        let dir = std::env::temp_dir().join(format!("firebrick-bench-{}", std::process::id()));
        let folder = dir.join(&files.name);
        Export::files(files, ExportType::F32)
            .write(&folder, &Executor { overwrite: true, ..Executor::default() })?;
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(script);
        let numbers = [self.repeats, rayon::current_num_threads()].map(|n| n.to_string());
        let output = Command::new(python).arg(file).arg(&folder).args(numbers).output()?;
        let removed = std::fs::remove_dir_all(&dir);
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().last().unwrap_or_default();
        let (name, value) = line.split_once(' ').with_context(|| {
            format!("{script} printed `{line}`: {}", String::from_utf8_lossy(&output.stderr))
        })?;
        removed?;
        Ok(measured.with_peer(name, value.parse()?))
    }
}

/// Forward pass without the head, 2 x 256 tokens.
fn forward(bench: &Bench) -> Result<Vec<Measured>> {
    let one = |(name, files): &(&str, ModelFiles)| {
        let decoder = bench.load(files, &bench.device)?;
        let ids = tokens(files.config.vocab, 2, 256, &bench.device);
        let seconds = time(&bench.device, bench.repeats, || {
            decoder.hidden(ids.clone(), &mut Run::default());
        });
        let case = format!("{name} 2x256");
        let measured = Measured::new("forward", &case, &bench.name, "tok/s", 512.0, &seconds);
        bench.peer(measured, "forward.py", files)
    };
    bench.models.iter().map(one).collect()
}

/// One LoRA step (rank 8, every linear layer), 2 x 256 tokens.
fn train(bench: &Bench) -> Result<Vec<Measured>> {
    let one = |(name, files): &(&str, ModelFiles)| {
        let device = bench.device.clone().autodiff();
        let decoder = bench.load(files, &device)?;
        let targets = decoder.sites().block_linears();
        let bank = LoraConfig::default().init(decoder.sites(), &targets, Seed(0), &device)?;
        let ids = tokens(files.config.vocab, 2, 256, &device);
        let mut optimizer = AdamW::default();
        let mut bank = Some(bank);
        let seconds = time(&bench.device, bench.repeats, || {
            let current = bank.take().expect("put back below");
            let bricks: [&dyn Brick; 1] = [&current];
            let loss = decoder.nll(ids.clone(), &mut Run::new(&bricks)).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &current);
            bank = Some(optimizer.step(1e-4, current, gradients));
        });
        let case = format!("{name} lora 2x256");
        let measured = Measured::new("train", &case, &bench.name, "tok/s", 512.0, &seconds);
        bench.peer(measured, "lora.py", files)
    };
    bench.models.iter().map(one).collect()
}

/// 32 tokens after a prompt of 64, one at a time.
fn decode(bench: &Bench) -> Result<Vec<Measured>> {
    let one = |(name, files): &(&str, ModelFiles)| {
        let decoder = bench.load(files, &bench.device)?;
        let ids = tokens(files.config.vocab, 1, 96, &bench.device);
        let seconds = time(&bench.device, bench.repeats, || {
            let mut run = Run::default();
            run.insert(decoder.kv_cache(1, 96));
            decoder.hidden(ids.clone().narrow(1, 0, 64), &mut run);
            for i in 64..96 {
                decoder.forward(ids.clone().narrow(1, i, 1), &mut run);
            }
        });
        let case = format!("{name} 64+32");
        Ok(Measured::new("decode", &case, &bench.name, "tok/s", 32.0, &seconds))
    };
    bench.models.iter().map(one).collect()
}

/// The built-in tasks, 40 items each with and without examples, beside one sequence at a time; in tokens that the latter takes.
fn choices(bench: &Bench) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for (model, files) in &bench.models {
        let decoder = bench.load(files, &bench.device)?;
        for (name, shots) in [("gloss_pair", 0), ("gloss_rank", 0), ("gloss_rank", 4)] {
            let task = EvalTask::built_in(name).with_context(|| format!("no task {name}"))?;
            let batching = Batching { longest: 1024, tokens: 2048 };
            let settings = TaskSettings { shots: Some(shots), limit: Some(40), special: false, batching };
            let asked = run_task(&decoder, &[], &files.tokenizer, &task, &settings, &Silent)?;
            let requests = asked.samples.iter().map(|s| {
                let texts: Vec<&str> = s.arguments.iter().map(|(_, text)| text.as_str()).collect();
                Request::encode(&files.tokenizer, &s.arguments[0].0, &texts, false)
            });
            let requests = requests.collect::<Result<Vec<_>, _>>()?;
            let one = |(r, c): (&Request, &Vec<u32>)| Request {
                context: r.context.clone(),
                continuations: vec![c.clone()],
            };
            let single: Vec<[Request; 1]> =
                requests.iter().flat_map(|r| r.continuations.iter().map(move |c| [one((r, c))])).collect();
            let score = |requests: &[Request]| {
                loglikelihoods(&decoder, &[], requests, batching, &Silent).unwrap_or_else(|e| panic!("{e}"));
            };
            let tokens = requests.iter().map(Request::tokens).sum::<usize>() as f64;
            let together = time(&bench.device, bench.repeats, || score(&requests));
            let naive = time(&bench.device, bench.repeats, || single.iter().for_each(|r| score(r)));
            let case = format!("{model} {name}, {shots} shots");
            let measure =
                |seconds: &[f64]| Measured::new("choices", &case, &bench.name, "tok/s", tokens, seconds);
            let naive = measure(&naive).median;
            all.push(measure(&together).with_peer("one at a time", naive));
        }
    }
    Ok(all)
}

/// Writing the model as a bf16 folder.
fn checkpoint(bench: &Bench) -> Result<Vec<Measured>> {
    let one = |(name, files): &(&str, ModelFiles)| {
        let out = std::env::temp_dir().join(format!("firebrick-bench-{}-{name}", std::process::id()));
        let executor = Executor { overwrite: true, sha256: false, ..Executor::default() };
        let mut written = 0;
        let mut failed = None;
        let seconds = time(&bench.device, bench.repeats, || {
            match Export::files(files, ExportType::BF16).write(&out, &executor) {
                Ok(report) => written = report.written_bytes,
                Err(e) => failed = Some(e),
            }
        });
        if let Some(e) = failed {
            return Err(e.into());
        }
        std::fs::remove_dir_all(&out)?;
        let case = format!("{name} to bf16");
        Ok(Measured::new("checkpoint", &case, "host", "MB/s", written as f64 / 1e6, &seconds))
    };
    bench.models.iter().map(one).collect()
}
