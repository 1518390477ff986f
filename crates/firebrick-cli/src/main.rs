//! The `firebrick` binary: verbs and recipes; nothing but glue.
//!
//! With `--json`, stdout carries JSON only. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
#![forbid(unsafe_code)]
// This is the one place that talks to the terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod commands;
mod models;
mod specialize;
mod ui;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::ui::{Terminal, interrupted};

/// Keeps freed activations for the next step; the system's allocator returns them and pays page faults to get them back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let terminal = Terminal::new(&cli.global);
    if let Err(e) = ui::on_interrupt() {
        eprintln!("warning: Ctrl-C will not stop cleanly: {e}");
    }
    match commands::run(&cli, &terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => {
            terminal.finish();
            eprintln!("interrupted; run the same command with --resume to go on");
            ExitCode::from(130)
        }
        Err(e) => {
            terminal.finish();
            eprintln!("error: {}", ui::chain(&e));
            ExitCode::from(if e.is::<args::Usage>() { 2 } else { 1 })
        }
    }
}
