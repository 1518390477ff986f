//! `cargo xtask ci`: what CI checks, cheapest first.

use crate::test::{self, Device};
use crate::{cmd, python, tidy};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct CiArgs {
    /// Run only these steps, in the usual order.
    #[arg(value_enum)]
    steps: Vec<Step>,
    /// Leave these steps out.
    #[arg(long, value_enum, value_delimiter = ',')]
    skip: Vec<Step>,
    /// List the steps and run none.
    #[arg(long)]
    list: bool,
}

/// In the order they run. The tests come last, so that a log ends with nextest's own summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    Fmt,
    Tidy,
    Typos,
    Deny,
    Clippy,
    Doc,
    Wgpu,
    Extend,
    Doctest,
    Test,
}

pub fn run(args: &CiArgs) -> Result<ExitCode> {
    let steps = select(&args.steps, &args.skip);
    if args.list {
        for step in &steps {
            println!("{:<11} {}", step.name(), step.what());
        }
        return Ok(ExitCode::SUCCESS);
    }
    require_tools(&steps)?;
    if steps.contains(&Step::Test) && python::existing().is_none() {
        eprintln!(
            "xtask: no target/py (`cargo xtask python`): the tests against Python peers will be skipped"
        );
    }
    // Everything that runs comes from one build, with the GPU backend if that is among it: a second one takes longest of all.
    let built_for = if steps.contains(&Step::Wgpu) { Device::Wgpu } else { Device::Flex };
    let mut done: Vec<(Step, Duration)> = Vec::new();
    let mut beside: Option<Beside> = None;
    for (n, &step) in steps.iter().enumerate() {
        if n + 1 == steps.len() && n > 0 {
            eprintln!("\n{}{:<11} next", summary(&done), step.name());
        }
        eprintln!("\n==> [{}/{}] {}: {}", n + 1, steps.len(), step.name(), step.what());
        let start = Instant::now();
        // A software rasterizer compiles its kernels on one core, once the tests are built.
        let begun = match step == Step::Wgpu && steps.contains(&Step::Extend) {
            true => cmd::run(&mut test::build(built_for))
                .and_then(|()| Beside::start(Step::Extend, built_for))
                .map(|other| beside = Some(other)),
            false => Ok(()),
        };
        let result = begun.and_then(|()| match beside.take_if(|other| other.step == step) {
            Some(other) => other.finish(),
            None => step.run(built_for),
        });
        if let Err(error) = result {
            // The last step has said by itself what failed.
            if step != Step::Test {
                eprintln!("\n{}{:<11} FAILED {:>9}", summary(&done), step.name(), seconds(start.elapsed()));
                eprintln!("xtask: {error:#}");
            }
            return Ok(ExitCode::FAILURE);
        }
        done.push((step, start.elapsed()));
        if step != Step::Test {
            eprintln!("==> {} ok, {}", step.name(), seconds(start.elapsed()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A step that runs beside another one. What it says is kept until its turn comes.
struct Beside {
    step: Step,
    child: Child,
    log: PathBuf,
}

impl Beside {
    fn start(step: Step, built_for: Device) -> Result<Self> {
        step.prepare()?;
        let log = cmd::root().join("target").join(format!("{}.log", step.name()));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = step.command(built_for).context("only a program can run beside another one")?;
        eprintln!("$ {} > {} &", cmd::show(&command), log.display());
        let child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Self { step, child, log })
    }

    fn finish(mut self) -> Result<()> {
        let status = self.child.wait()?;
        eprint!("{}", std::fs::read_to_string(&self.log)?);
        if !status.success() {
            bail!("the step {}: {status}", self.step.name());
        }
        Ok(())
    }
}

impl Drop for Beside {
    /// Nothing goes on in the background when another step has failed.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn select(only: &[Step], skip: &[Step]) -> Vec<Step> {
    let all = Step::value_variants().iter().copied();
    all.filter(|step| (only.is_empty() || only.contains(step)) && !skip.contains(step)).collect()
}

fn summary(done: &[(Step, Duration)]) -> String {
    let mut table = format!("{:<11} result {:>9}\n", "step", "time");
    for (step, time) in done {
        table += &format!("{:<11} ok     {:>9}\n", step.name(), seconds(*time));
    }
    let total = done.iter().map(|(_, time)| *time).sum();
    table + &format!("{:<11}        {:>9}\n", "so far", seconds(total))
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// Fails with every tool that the steps need and this machine lacks.
fn require_tools(steps: &[Step]) -> Result<()> {
    let missing: Vec<String> = steps
        .iter()
        .filter_map(|step| step.tool().map(|(name, hint)| (step, name, hint)))
        .filter(|(_, name, _)| find(name).is_none())
        .map(|(step, name, hint)| format!("  {name}, for the step {}: {hint}", step.name()))
        .collect();
    if !missing.is_empty() {
        bail!(
            "missing tools (or leave steps out with --skip; .ci/run installs all):\n{}",
            missing.join("\n")
        );
    }
    Ok(())
}

fn find(tool: &str) -> Option<PathBuf> {
    cmd::find_program(tool).or_else(|| python::tool(tool))
}

/// A cargo command that generates no code, over the workspace with every feature. All such steps share what they know of
/// the dependencies, which is most of their work.
fn every_feature(command: &str) -> Command {
    let mut cargo = cmd::cargo_with(&[command, "--locked", "--workspace", "--profile", "quick"]);
    cargo.args(["--features", "firebrick-cli/cuda,firebrick-cli/wgpu,firebrick-cli/hub"]);
    cargo.args(["--target-dir", "target/check"]);
    // The build scripts of cubecl's LLVM then download nothing, and nothing is linked.
    cargo.env("DOCS_RS", "1");
    cargo
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value().expect("no step is hidden").get_name().to_owned()
    }

    fn what(self) -> &'static str {
        match self {
            Self::Fmt => "the code is formatted",
            Self::Tidy => "the rules of this repository",
            Self::Typos => "spelling",
            Self::Deny => "licences, banned crates and sources of dependencies",
            Self::Clippy => "types and lints, in tests and benches too, with every feature: cuda, wgpu, hub",
            Self::Doc => "the documentation builds without a warning, with every feature",
            Self::Wgpu => "the ops on wgpu (Mesa's lavapipe where installed), forward and backward",
            Self::Extend => "a brick in a crate outside the workspace builds and trains through public API",
            Self::Doctest => "the examples in the documentation",
            Self::Test => "all tests on the CPU",
        }
    }

    /// A program beyond cargo, and how to get it.
    fn tool(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Typos => Some(("typos", "`cargo xtask python`, or `cargo install typos-cli --locked`")),
            Self::Deny => Some(("cargo-deny", "`cargo install cargo-deny --locked`")),
            Self::Test => Some(test::NEXTEST),
            _ => None,
        }
    }

    fn prepare(self) -> Result<()> {
        if self == Self::Extend {
            // The versions of the workspace, so that this crate is built with what everything else is tested with.
            let lock = cmd::root().join("Cargo.lock");
            std::fs::copy(lock, cmd::root().join("docs/guide/extend/Cargo.lock"))?;
        }
        Ok(())
    }

    fn run(self, built_for: Device) -> Result<()> {
        self.prepare()?;
        match self.command(built_for) {
            Some(mut command) => cmd::run(&mut command),
            None => tidy::run(),
        }
    }

    /// The program that the step is; `None` for tidy, which is part of xtask.
    fn command(self, built_for: Device) -> Option<Command> {
        Some(match self {
            Self::Tidy => return None,
            Self::Fmt => cmd::cargo_with(&["fmt", "--all", "--check"]),
            Self::Typos => cmd::command(find("typos").unwrap_or_else(|| "typos".into())),
            Self::Deny => cmd::cargo_with(&["deny", "check", "licenses", "bans", "sources"]),
            Self::Clippy => {
                let mut clippy = every_feature("clippy");
                clippy.args(["--all-targets", "--", "-D", "warnings"]);
                clippy
            }
            Self::Doc => {
                let mut doc = every_feature("doc");
                doc.arg("--no-deps").env("RUSTDOCFLAGS", "-Dwarnings");
                doc
            }
            Self::Wgpu => {
                let mut test = test::command(Device::Wgpu, built_for);
                test.arg(test::OPS);
                test
            }
            Self::Extend => {
                let manifest = ["test", "--manifest-path", "docs/guide/extend/Cargo.toml"];
                let mut test = cmd::cargo();
                test.args(manifest).args(["--target-dir", "target/extend"]);
                test
            }
            Self::Doctest => {
                let mut test = cmd::cargo_with(&["test", "--locked", "--workspace", "--doc"]);
                test.args(Device::build_arguments(&[built_for], "firebrick-cli"));
                test
            }
            Self::Test => {
                let mut test = test::command(Device::Flex, built_for);
                test.args(["--locked", "--profile", "ci"]);
                test
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_chosen_by_name_and_keep_their_order() {
        assert_eq!(select(&[], &[]).last(), Some(&Step::Test));
        assert_eq!(select(&[Step::Deny, Step::Fmt], &[]), [Step::Fmt, Step::Deny]);
        assert_eq!(select(&[Step::Deny, Step::Fmt], &[Step::Fmt]), [Step::Deny]);
        assert!(!select(&[], &[Step::Wgpu]).contains(&Step::Wgpu));
    }

    #[test]
    fn every_step_but_tidy_is_a_program() {
        for step in Step::value_variants() {
            assert_eq!(step.command(Device::Wgpu).is_none(), *step == Step::Tidy, "{step:?}");
        }
    }

    #[test]
    fn the_workflow_runs_every_step() {
        let workflow = std::fs::read_to_string(cmd::root().join(".github/workflows/ci.yml")).unwrap();
        let runs = workflow.lines().filter_map(|line| line.split_once("cargo xtask ci "));
        let named: Vec<&str> = runs.flat_map(|(_, steps)| steps.split_whitespace()).collect();
        for step in Step::value_variants() {
            assert!(named.contains(&step.name().as_str()), "{step:?}");
        }
        assert!(!named.contains(&"no-such-step"), "control");
    }

    #[test]
    fn the_summary_lists_each_step_and_the_total() {
        let table =
            summary(&[(Step::Fmt, Duration::from_millis(1500)), (Step::Extend, Duration::from_secs(2))]);
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["fmt", "ok", "1.5", "s"]);
        assert_eq!(lines[2], ["extend", "ok", "2.0", "s"]);
        assert_eq!(lines[3], ["so", "far", "3.5", "s"]);
    }
}
