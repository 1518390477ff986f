//! `cargo xtask test`: the tests, with the features and variables that each device needs.

use crate::{cmd, python};
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub struct TestArgs {
    /// The backend under test: every test on flex, those of the ops on the others.
    #[arg(long, value_enum, default_value_t = Device::Flex)]
    device: Device,
    /// Handed to nextest, or to the test program of a GPU run.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    Flex,
    Wgpu,
    Cuda,
}

/// The program that runs the tests, and how to get it.
pub const NEXTEST: (&str, &str) = ("cargo-nextest", "`cargo install cargo-nextest --locked`");

/// The tests of the ops, which are all that runs on GPUs.
pub const OPS: &str = "ops::";

impl Device {
    fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }

    /// Arguments with which cargo builds `package` for these devices: a feature for each GPU backend, and a target
    /// directory of its own for each set of features, so that one build does not replace another.
    pub fn build_arguments(devices: &[Self], package: &str) -> Vec<String> {
        let has = |device| devices.contains(&device);
        let (dir, features) = match (has(Self::Wgpu), has(Self::Cuda)) {
            (false, false) => return vec!["--target-dir".into(), "target".into()],
            (true, false) => ("target/wgpu", format!("{package}/wgpu")),
            (false, true) => ("target/cuda-test", format!("{package}/cuda")),
            (true, true) => ("target/wgpu-cuda", format!("{package}/wgpu,{package}/cuda")),
        };
        vec!["--target-dir".into(), dir.into(), "--features".into(), features]
    }
}

pub fn run(args: &TestArgs) -> Result<()> {
    let (program, hint) = NEXTEST;
    if args.device == Device::Flex && cmd::find_program(program).is_none() {
        bail!("{program} is missing: {hint}");
    }
    let mut command = command(args.device, args.device);
    let named = args.args.iter().any(|arg| !arg.to_string_lossy().starts_with('-'));
    if args.device != Device::Flex && !named {
        command.arg(OPS);
    }
    cmd::run(command.args(&args.args))
}

/// The tests that run on a GPU, in a build for `built_for`.
fn gpu_tests(built_for: Device) -> Command {
    let mut command = cmd::cargo_with(&["test", "--workspace", "--test", "it"]);
    command.args(Device::build_arguments(&[built_for], "firebrick-cli"));
    command
}

/// Builds the tests that run on a GPU.
pub fn build(built_for: Device) -> Command {
    let mut command = gpu_tests(built_for);
    command.arg("--no-run");
    command
}

/// The test run for `device`, in a build for `built_for`. A device that is asked for and missing fails the tests instead of
/// skipping them; others are left alone.
pub fn command(device: Device, built_for: Device) -> Command {
    let mut command = match device {
        Device::Flex => {
            let mut nextest = cmd::cargo_with(&["nextest", "run", "--workspace"]);
            nextest.args(Device::build_arguments(&[built_for], "firebrick-cli"));
            nextest
        }
        Device::Wgpu | Device::Cuda => gpu_tests(built_for),
    };
    command.env("FIREBRICK_REQUIRE_DEVICE", device.name()).env("FIREBRICK_DEVICE", device.name());
    if built_for == Device::Wgpu && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Without it Wayland's library complains wherever devices are looked for.
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    }
    if device != Device::Flex {
        command.env("CUBECL_AUTOTUNE_LEVEL", "minimal");
        // In one process, one after the other: a process for each test, as nextest has it, compiles the same kernels again and
        // again, which takes a software rasterizer over a minute a test.
        command.args(["--", "--test-threads", "1"]);
    }
    if device == Device::Wgpu
        && let Some(driver) = software_vulkan()
    {
        command.env("VK_ICD_FILENAMES", driver).env("CUBECL_WGPU_DEFAULT_DEVICE", "Cpu");
    }
    if let Some(python) = python::existing() {
        command.env("FIREBRICK_PYTHON", python);
    }
    command
}

/// The driver file of Mesa's lavapipe, unless the user has already chosen a Vulkan driver or wgpu device.
pub fn software_vulkan() -> Option<PathBuf> {
    let chosen = ["VK_ICD_FILENAMES", "VK_DRIVER_FILES", "CUBECL_WGPU_DEFAULT_DEVICE"];
    if chosen.iter().any(|name| std::env::var_os(name).is_some()) {
        return None;
    }
    lavapipe(Path::new("/usr/share/vulkan/icd.d"))
}

fn lavapipe(dir: &Path) -> Option<PathBuf> {
    let names = [format!("lvp_icd.{}.json", std::env::consts::ARCH), "lvp_icd.json".to_owned()];
    names.iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lavapipe_is_found_by_architecture_and_not_mistaken_for_another_driver() {
        let dir = std::env::temp_dir().join(format!("xtask-icd-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("radeon_icd.x86_64.json"), "{}").unwrap();
        assert_eq!(lavapipe(&dir), None);
        let wanted = dir.join(format!("lvp_icd.{}.json", std::env::consts::ARCH));
        std::fs::write(&wanted, "{}").unwrap();
        assert_eq!(lavapipe(&dir), Some(wanted));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_gpu_run_requires_its_device() {
        let shown = |device, built_for| cmd::show(&command(device, built_for));
        assert!(shown(Device::Wgpu, Device::Wgpu).contains("FIREBRICK_REQUIRE_DEVICE=wgpu"));
        assert!(shown(Device::Cuda, Device::Cuda).contains("FIREBRICK_REQUIRE_DEVICE=cuda"));
        // Whatever the build can do.
        assert!(shown(Device::Flex, Device::Wgpu).contains("FIREBRICK_REQUIRE_DEVICE=flex"));
    }
}
