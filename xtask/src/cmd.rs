//! Starting other programs from the workspace root.

use anyhow::{Context, Result, bail};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The workspace root.
pub fn root() -> PathBuf {
    // The run-time value is right when a built binary has moved with its checkout.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// `program`, to run in the workspace root without standard input and with `target/tools/bin` on its path.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let root = root();
    let mut command = Command::new(program);
    command.current_dir(&root).stdin(Stdio::null());
    // Cargo describes xtask to its child in these; some build scripts watch them and would run again each time.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    if let Ok(path) = std::env::join_paths(search_path()) {
        command.env("PATH", path);
    }
    command
}

/// The cargo that started xtask.
pub fn cargo() -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `cargo ARGS`.
pub fn cargo_with(args: &[&str]) -> Command {
    let mut command = cargo();
    command.args(args);
    command
}

/// Shows `command` on stderr, runs it, and fails with its name when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    eprintln!("$ {shown}");
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}`: {status}");
    }
    Ok(())
}

/// What `command` would be on a shell's line, with the variables that xtask itself sets for it.
pub fn show(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        if let (Some(value), false) = (value, name == "PATH") {
            words.push(format!("{}={}", name.to_string_lossy(), quote(value)));
        }
    }
    let program = Path::new(command.get_program());
    words.push(quote(program.file_name().unwrap_or(command.get_program())));
    words.extend(command.get_args().map(quote));
    words.join(" ")
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    if !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./=:+,@".contains(c)) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The file that the shell would run for `name`, looked for in `target/tools/bin` first.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let file = OsString::from(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    search_path().into_iter().map(|dir| dir.join(&file)).find(|path| path.is_file())
}

fn search_path() -> Vec<PathBuf> {
    let mut dirs = vec![root().join("target/tools/bin")];
    dirs.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_a_shell_would_take_it() {
        let mut command = Command::new("/somewhere/cargo");
        command.env("KEY", "a b").args(["test", "-E", "test(x)", ""]);
        assert_eq!(show(&command), "KEY='a b' cargo test -E 'test(x)' ''");
    }

    #[test]
    fn a_failing_program_is_an_error_that_names_it() {
        let error = run(&mut cargo_with(&["no-such-subcommand-of-cargo"])).unwrap_err().to_string();
        assert!(error.contains("no-such-subcommand-of-cargo"), "{error}");
        assert!(run(&mut cargo_with(&["--version"])).is_ok());
    }

    #[test]
    fn a_missing_program_is_not_found() {
        assert!(find_program("no-such-program-anywhere").is_none());
    }
}
