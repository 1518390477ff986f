//! Finding Python, and the environment of the tests that exchange files with Python peers.

use crate::cmd;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Stdio;

const REQUIREMENTS: &str = ".ci/python.txt";
const UV: &str = "uv==0.11.3";

/// The interpreter of the test environment: `FIREBRICK_PYTHON`, or the one in `target/py` once it is complete.
pub fn existing() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FIREBRICK_PYTHON") {
        return Some(path.into());
    }
    let dir = cmd::root().join("target/py");
    let stamp = std::fs::read_to_string(dir.join("requirements.txt")).ok()?;
    let wanted = std::fs::read_to_string(cmd::root().join(REQUIREMENTS)).ok()?;
    (stamp == wanted).then(|| interpreter(&dir))
}

/// Makes the test environment unless it is there, and returns its interpreter.
pub fn environment() -> Result<PathBuf> {
    if let Some(path) = existing() {
        return Ok(path);
    }
    let root = cmd::root();
    let requirements = root.join(REQUIREMENTS);
    let wanted =
        std::fs::read_to_string(&requirements).with_context(|| format!("{}", requirements.display()))?;
    let dir = root.join("target/py");
    let python = interpreter(&dir);
    eprintln!("xtask: making target/py (torch and its libraries: some GB, some minutes)");
    if !python.is_file() {
        let base = system()?;
        cmd::run(cmd::command(&base).args(["-m", "venv"]).arg(&dir))
            .context("`python3 -m venv` failed; on Debian and Ubuntu install python3-venv")?;
    }
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV];
    cmd::run(cmd::command(&python).args(pip))?;
    // Twice as fast as pip, which unpacks one file at a time.
    let install = ["-m", "uv", "pip", "install", "--quiet", "--no-cache", "--python"];
    cmd::run(cmd::command(&python).args(install).arg(&python).arg("--requirement").arg(&requirements))?;
    // Written last: an interrupted installation is taken up again.
    std::fs::write(dir.join("requirements.txt"), wanted)?;
    eprintln!("xtask: FIREBRICK_PYTHON={} runs the interchange tests", python.display());
    Ok(python)
}

/// A Python with pip: `FIREBRICK_PYTHON`, `target/py`, or what the path offers.
pub fn with_pip() -> Result<PathBuf> {
    let python = match existing() {
        Some(path) => path,
        None => system()?,
    };
    if !succeeds(&python, &["-m", "pip", "--version"]) {
        bail!(
            "{} has no pip: install python3-pip, run `{0} -m ensurepip`, or set FIREBRICK_PYTHON to another Python",
            python.display()
        );
    }
    Ok(python)
}

fn system() -> Result<PathBuf> {
    // On Windows `python3` may be a stub that opens a shop, so each candidate has to run.
    ["python3", "python"]
        .iter()
        .filter_map(|name| cmd::find_program(name))
        .find(|path| succeeds(path, &["-c", "import sys; sys.exit(sys.version_info < (3, 9))"]))
        .context(
            "no Python 3.9 or later found: install python3 with pip, or set FIREBRICK_PYTHON to its path",
        )
}

fn succeeds(python: &Path, args: &[&str]) -> bool {
    let mut command = cmd::command(python);
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// A program that lies beside the interpreter of the test environment.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = existing()?.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    path.is_file().then_some(path)
}

fn interpreter(environment: &Path) -> PathBuf {
    environment.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
}
