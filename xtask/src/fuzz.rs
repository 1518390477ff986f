//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`.

use crate::cmd;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

#[derive(clap::Args)]
pub struct FuzzArgs {
    /// Targets to run, one after the other; all of them if none is named.
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// List the targets and run none.
    #[arg(long)]
    list: bool,
}

pub fn run(args: &FuzzArgs) -> Result<()> {
    let root = cmd::root();
    let all = targets(&root)?;
    if let Some(unknown) = args.targets.iter().find(|target| !all.contains(target)) {
        bail!("no target `{unknown}`; there are {}", all.join(", "));
    }
    let chosen = if args.targets.is_empty() { &all } else { &args.targets };
    if args.list {
        println!("{}", chosen.join("\n"));
        return Ok(());
    }
    if cmd::find_program("cargo-fuzz").is_none() {
        bail!("cargo-fuzz is missing: `cargo install cargo-fuzz --locked`");
    }
    // The versions of the workspace, so that what is fuzzed is what is tested.
    std::fs::copy(root.join("Cargo.lock"), root.join("fuzz/Cargo.lock"))?;
    for target in chosen {
        std::fs::create_dir_all(root.join("fuzz/found").join(target))?;
        cmd::run(&mut command(target, args.seconds))?;
    }
    Ok(())
}

/// The names of the programs in `fuzz/fuzz_targets`.
fn targets(root: &Path) -> Result<Vec<String>> {
    let folder = root.join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// New inputs go to `fuzz/found`, which git ignores; inputs that fail to `fuzz/artifacts`.
fn command(target: &str, seconds: u64) -> Command {
    let mut fuzz = cmd::cargo_with(&["fuzz", "run", target]);
    fuzz.args([format!("fuzz/found/{target}"), format!("fuzz/corpus/{target}")]);
    fuzz.args(["--", "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536"]);
    fuzz.arg(format!("-max_total_time={seconds}"));
    // Instrumentation is not stable; the compiler is the one that builds everything else.
    fuzz.env("RUSTC_BOOTSTRAP", "1");
    fuzz
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_a_command() {
        let root = cmd::root();
        let names = targets(&root).unwrap();
        assert!(names.len() >= 10 && names.contains(&"gguf".to_owned()), "{names:?}");
        for name in &names {
            assert!(root.join("fuzz/corpus").join(name).is_dir(), "{name}");
        }
        let shown = cmd::show(&command("gguf", 7));
        assert!(shown.starts_with("RUSTC_BOOTSTRAP=1 cargo fuzz run gguf fuzz/found/gguf"), "{shown}");
        assert!(shown.ends_with("-max_total_time=7"), "{shown}");
    }

    #[test]
    fn an_unknown_target_is_named() {
        let args = FuzzArgs { targets: vec!["elf".into()], seconds: 1, list: false };
        assert!(run(&args).unwrap_err().to_string().contains("no target `elf`; there are adapter_config"));
    }
}
