//! `cargo xtask bench`: builds the benchmarks for the devices that are asked for, and runs them.

use crate::test::Device;
use crate::{cmd, model, python};
use anyhow::Result;
use clap::ValueEnum;
use std::ffi::OsString;
use std::process::Command;

pub fn run(args: &[OsString]) -> Result<()> {
    let devices = devices(args);
    cmd::run(&mut build(&devices))?;
    cmd::run(&mut program(&devices, args))
}

fn build(devices: &[Device]) -> Command {
    // What `cargo build` builds, and the benches: for other packages cargo picks other features of dependencies and builds
    // burn again.
    let mut cargo =
        cmd::cargo_with(&["build", "--release", "--workspace", "--exclude", "xtask", "--bin", "bench"]);
    cargo.args(Device::build_arguments(devices, "firebrick-benches"));
    cargo
}

fn program(devices: &[Device], args: &[OsString]) -> Command {
    let target = &Device::build_arguments(devices, "firebrick-benches")[1];
    let file = format!("bench{}", std::env::consts::EXE_SUFFIX);
    let mut bench = cmd::command(cmd::root().join(target).join("release").join(file));
    if let Some(path) = model::fetched("smollm2") {
        bench.arg("--smollm2").arg(path);
    }
    if let Some(python) = python::existing() {
        bench.env("FIREBRICK_PYTHON", python);
    }
    bench.args(args);
    bench
}

/// The backends of `--device`, which `bench` itself reads and checks.
fn devices(args: &[OsString]) -> Vec<Device> {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    let mut devices = Vec::new();
    for (n, arg) in args.iter().enumerate() {
        let list = match arg.strip_prefix("--device") {
            Some("") => args.get(n + 1).map(AsRef::as_ref),
            Some(rest) => rest.strip_prefix('='),
            None => None,
        };
        let names = list.unwrap_or_default().split(',').map(|spec| spec.split(':').next().unwrap_or(spec));
        devices.extend(names.filter_map(|name| Device::from_str(name, false).ok()));
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> String {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        cmd::show(&build(&devices(&args)))
    }

    #[test]
    fn devices_choose_features_and_a_target_directory() {
        assert!(of("forward --repeats 2").ends_with("--bin bench --target-dir target"));
        assert!(of("--device flex").ends_with("--target-dir target"), "control: flex needs no feature");
        assert!(of("--device wgpu:1 forward").ends_with("target/wgpu --features firebrick-benches/wgpu"));
        assert!(of("--device=flex,cuda").ends_with("target/cuda-test --features firebrick-benches/cuda"));
        let both = of("--device wgpu,cuda:0");
        assert!(both.ends_with("target/wgpu-cuda --features firebrick-benches/wgpu,firebrick-benches/cuda"));
        assert!(of("--device").ends_with("--target-dir target"), "bench itself says what is missing");
    }

    #[test]
    fn options_of_bench_come_after_its_own_model() {
        let shown = cmd::show(&program(&[], &["--repeats".into(), "2".into()]));
        assert!(shown.ends_with("--repeats 2"), "{shown}");
    }
}
