//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`.

use crate::cmd;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// Packages that are built to tell libFuzzer where an input led: those that parse. Instrumenting all of burn takes gigabytes of memory.
const INSTRUMENTED: &[&str] = &[
    "firebrick-core",
    "firebrick-merge",
    "firebrick-models",
    "firebrick-peft",
    "firebrick-tensor",
    "minijinja",
    "safetensors",
    "tokenizers",
    "toml",
];

/// What such a package is compiled with, as cargo's configuration takes it; one unit of code generation, or the tables of the units
/// would be thrown away when linking.
const INSTRUMENTATION: &[&str] = &[
    concat!(
        r#"rustflags = ["-Cpasses=sancov-module", "-Cllvm-args=-sanitizer-coverage-level=4", "#,
        r#""-Cllvm-args=-sanitizer-coverage-inline-8bit-counters", "-Cllvm-args=-sanitizer-coverage-pc-table", "#,
        r#""-Cllvm-args=-sanitizer-coverage-trace-compares", "-Cdebug-assertions"]"#,
    ),
    "codegen-units = 1",
    "opt-level = 1",
];

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
    // The versions of the workspace, so that what is fuzzed is what is tested.
    std::fs::copy(root.join("Cargo.lock"), root.join("fuzz/Cargo.lock"))?;
    for target in chosen {
        for folder in ["found", "artifacts"] {
            std::fs::create_dir_all(root.join("fuzz").join(folder).join(target))?;
        }
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
    let mut fuzz =
        cmd::cargo_with(&["run", "--release", "--manifest-path", "fuzz/Cargo.toml", "--bin", target]);
    fuzz.arg("-Zprofile-rustflags");
    for package in INSTRUMENTED {
        for setting in INSTRUMENTATION {
            fuzz.args(["--config".into(), format!("profile.release.package.{package}.{setting}")]);
        }
    }
    fuzz.args(["--".into(), format!("fuzz/found/{target}"), format!("fuzz/corpus/{target}")]);
    fuzz.args(["-timeout=10", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1"]);
    fuzz.args([format!("-artifact_prefix=fuzz/artifacts/{target}/"), format!("-max_total_time={seconds}")]);
    // Flags of packages are not stable; the compiler is the one that builds everything else.
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
        assert!(shown.starts_with("RUSTC_BOOTSTRAP=1 cargo run --release --manifest-path fuzz/"), "{shown}");
        assert!(shown.contains("-- fuzz/found/gguf fuzz/corpus/gguf -timeout"), "{shown}");
        assert!(shown.ends_with("-max_total_time=7"), "{shown}");
    }

    #[test]
    fn an_unknown_target_is_named() {
        let args = FuzzArgs { targets: vec!["elf".into()], seconds: 1, list: false };
        assert!(run(&args).unwrap_err().to_string().contains("no target `elf`; there are adapter_config"));
    }
}
