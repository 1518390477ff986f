//! Builds, checks and fetches for the firebrick workspace: `cargo xtask --help`.
//!
//! Nothing here links the crates of the workspace: what needs them is started as a program of its own.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool talks to its user")]
#![allow(clippy::disallowed_methods, reason = "the environment is read here and handed on as arguments")]

mod bench;
mod ci;
mod cmd;
mod data;
mod fuzz;
mod model;
mod python;
mod test;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;
use test::Device;

#[derive(Parser)]
#[command(
    name = "xtask",
    bin_name = "cargo xtask",
    about = "Builds, checks and fetches for the firebrick workspace"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Everything that CI checks, cheapest first.
    Ci(ci::CiArgs),
    /// The tests, on the CPU or on a GPU backend.
    Test(test::TestArgs),
    /// The benchmarks (`cargo xtask bench -- --help` lists their own options).
    Bench(Passthrough),
    /// Fetch and verify a real model; its path is the only line on stdout.
    Model(model::ModelArgs),
    /// Rebuild the embedded texts and the corpus that the embedded model is trained on.
    Data(data::DataArgs),
    /// Train the embedded model again from its recipe.
    Pretrain(Passthrough),
    /// Make the Python environment of the interchange tests in target/py.
    Python,
    /// Fuzz the parsers with libFuzzer, which builds everything once more.
    Fuzz(fuzz::FuzzArgs),
    /// Check the rules of this repository that no other tool checks.
    Tidy,
    /// List the devices that the `firebrick` binary sees.
    Devices(DevicesArgs),
}

#[derive(clap::Args)]
struct Passthrough {
    /// Handed to the program as they are.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

#[derive(clap::Args)]
struct DevicesArgs {
    /// Look for these devices too: the binary is built for them.
    #[arg(long, value_enum, value_delimiter = ',')]
    device: Vec<Device>,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Ci(args) => return ci::run(&args),
        Verb::Tidy => tidy::run()?,
        Verb::Test(args) => test::run(&args)?,
        Verb::Model(args) => model::run(&args)?,
        Verb::Data(args) => data::run(&args)?,
        Verb::Fuzz(args) => fuzz::run(&args)?,
        Verb::Python => println!("{}", python::environment()?.display()),
        Verb::Bench(rest) => bench::run(&rest.args)?,
        // Without `-p`: for one package alone cargo picks other features of dependencies and builds burn again.
        Verb::Pretrain(rest) => {
            let mut cargo = cmd::cargo_with(&["run", "--release", "--example", "pretrain", "--"]);
            cmd::run(cargo.args(&rest.args))?;
        }
        Verb::Devices(args) => {
            let mut cargo = cmd::cargo_with(&["run", "--release", "--quiet", "--bin", "firebrick"]);
            cargo.args(Device::build_arguments(&args.device, "firebrick-cli"));
            cmd::run(cargo.args(["--", "devices"]))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_other_programs_pass_through() {
        let Verb::Bench(rest) = Cli::parse_from(["xtask", "bench", "merge", "--device", "flex"]).verb else {
            panic!("not bench");
        };
        assert_eq!(rest.args, ["merge", "--device", "flex"]);
    }
}
