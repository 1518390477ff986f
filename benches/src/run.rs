//! Runs as they are kept: JSON lines, first what the run was made on, then its cases. A file holds any number of runs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use firebrick_core::write_atomic;
use serde::{Deserialize, Serialize};

use crate::Measured;

/// The version of the format written here.
const VERSION: u32 = 1;

/// The machine of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What the processor calls itself.
    pub cpu: String,
    /// Those of its instruction sets that matter here: `avx2`, `avx512f`, `avx512_bf16`, `amx_tile`, ...
    pub flags: Vec<String>,
    /// Processors that the run may use.
    pub cores: usize,
    /// Operating system and architecture.
    pub system: String,
}

/// What a run was made on; the first line of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Version of the format: 1.
    pub version: u32,
    /// The machine.
    pub machine: Machine,
    /// Commit of the checkout, with a `+` if files had been changed; absent outside a checkout.
    pub commit: Option<String>,
    /// Date and time, UTC: `2026-01-31T12:00:00Z`.
    pub date: String,
    /// Whether it was built without optimization, so that its figures mean nothing.
    pub debug_build: bool,
}

/// A run with its cases.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SavedRun {
    /// What it was made on.
    pub info: RunInfo,
    /// Its cases, in the order in which they were measured.
    pub cases: Vec<Measured>,
}

/// Instruction sets that change which kernels run, as Linux names them.
const FLAGS: &[&str] = &[
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
];

impl Machine {
    /// This machine; what the system does not tell stays empty.
    pub fn here() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let (mut cpu, flags) = cpu_info(&info);
        if cpu.is_empty() {
            cpu = said("sysctl", &["-n", "machdep.cpu.brand_string"]).unwrap_or_default();
        }
        Machine {
            cpu,
            flags,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// Name and flags from the text of `/proc/cpuinfo`.
fn cpu_info(text: &str) -> (String, Vec<String>) {
    let value = |keys: &[&str]| {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        pairs.into_iter().find(|(key, _)| keys.contains(&key.trim())).map(|(_, value)| value.trim())
    };
    let flags: Vec<&str> = value(&["flags", "Features"]).unwrap_or_default().split_whitespace().collect();
    let known = FLAGS.iter().filter(|flag| flags.contains(flag));
    (value(&["model name"]).unwrap_or_default().to_string(), known.map(|f| f.to_string()).collect())
}

/// What a program says, if it is there and succeeds.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}

impl RunInfo {
    /// A run on this machine, now, of the checkout in the current folder.
    pub fn now() -> Self {
        let commit = said("git", &["rev-parse", "--short=12", "HEAD"]).map(|commit| {
            let changed = said("git", &["status", "--porcelain", "--untracked-files=no"]);
            if changed.is_some_and(|files| !files.is_empty()) { commit + "+" } else { commit }
        });
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        RunInfo {
            version: VERSION,
            machine: Machine::here(),
            commit,
            date: utc(seconds),
            debug_build: cfg!(debug_assertions),
        }
    }
}

/// Seconds since 1970 as a date and time in UTC.
fn utc(seconds: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut days, mut year, mut month) = (seconds / 86400, 1970, 0);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{:02}-{:02}T{h:02}:{m:02}:{s:02}Z", month + 1, days + 1)
}

/// Reads the runs of a file, oldest first.
///
/// # Errors
/// If it cannot be read, is of another version, or has lines that are neither a run nor a case: all of them, by number.
pub fn read(path: &Path) -> Result<Vec<SavedRun>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let (mut runs, mut problems) = (Vec::<SavedRun>::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        match (parse(line), runs.last_mut()) {
            (Ok(Line::Run(info)), _) if info.version != VERSION => {
                problems.push(format!("line {number}: version {}, not {VERSION}", info.version));
            }
            (Ok(Line::Run(info)), _) => runs.push(SavedRun { info, cases: Vec::new() }),
            (Ok(Line::Case(case)), Some(run)) => run.cases.push(*case),
            (Ok(Line::Case(_)), None) => problems.push(format!("line {number}: a case before any run")),
            (Err(e), _) => problems.push(format!("line {number}: {e}")),
        }
    }
    if problems.is_empty() && runs.is_empty() {
        problems.push("it has no runs".into());
    }
    if !problems.is_empty() {
        bail!("{} does not hold runs:\n  {}", path.display(), problems.join("\n  "));
    }
    Ok(runs)
}

enum Line {
    Run(RunInfo),
    Case(Box<Measured>),
}

fn parse(line: &str) -> Result<Line, serde_json::Error> {
    let json: serde_json::Value = serde_json::from_str(line)?;
    match json.get("machine") {
        Some(_) => serde_json::from_value(json).map(Line::Run),
        None => serde_json::from_value(json).map(|case| Line::Case(Box::new(case))),
    }
}

/// Adds `run` to the runs in `path`, or makes the file.
///
/// # Errors
/// If the file cannot be written, or is there and does not hold runs.
pub fn append(path: &Path, run: &SavedRun) -> Result<()> {
    let mut text = match path.exists() {
        true => {
            read(path)?;
            fs::read_to_string(path)?
        }
        false => String::new(),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text += &(serde_json::to_string(&run.info)? + "\n");
    for case in &run.cases {
        text += &(serde_json::to_string(case)? + "\n");
    }
    write_atomic(path, text.as_bytes()).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(date: &str) -> SavedRun {
        let info = RunInfo { version: VERSION, date: date.into(), ..RunInfo::now() };
        let case = |case: &str| Measured {
            suite: "forward".into(),
            case: case.into(),
            median: 2.5,
            ratio: Some(1.5),
            ..Measured::default()
        };
        SavedRun { info, cases: vec![case("a"), case("b")] }
    }

    #[test]
    fn runs_are_appended_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let (first, second) = (run("2026-01-01T00:00:00Z"), run("2026-01-02T00:00:00Z"));
        append(&path, &first).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 3);
        fs::write(&path, text.trim_end()).unwrap();
        append(&path, &second).unwrap();
        assert_eq!(read(&path).unwrap(), [first, second], "also after a last line without its end");
    }

    #[test]
    fn every_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        append(&path, &run("x")).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let (info, case) = good.split_once('\n').unwrap();
        let later = info.replace("\"version\":1", "\"version\":2");
        fs::write(&path, format!("{case}{{\n[1]\n{later}\n{info}\n{{\"suite\":1}}\n")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        for line in [
            "line 1: a case before",
            "line 2: a case before",
            "line 3:",
            "line 4:",
            "line 5: version 2",
            "line 7:",
        ] {
            assert!(error.contains(line), "{line} in {error}");
        }
        let before = fs::read(&path).unwrap();
        assert!(append(&path, &run("y")).is_err(), "what is not runs is not added to");
        assert_eq!(fs::read(&path).unwrap(), before);
        fs::write(&path, "\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("no runs"));
        assert!(read(&folder.path().join("none")).is_err());
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(read(&path).is_err());
    }

    #[test]
    fn dates_are_utc() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), date);
        }
    }

    #[test]
    fn a_processor_is_read_from_what_linux_says() {
        let text =
            "processor\t: 0\nmodel name\t: Some CPU @ 2\nflags\t\t: fpu avx2 avx512f xyz amx_tile avx\n";
        let (name, flags) = cpu_info(text);
        assert_eq!(
            (name.as_str(), flags),
            ("Some CPU @ 2", vec!["avx2".into(), "avx512f".into(), "amx_tile".into()])
        );
        assert_eq!(cpu_info("nonsense"), (String::new(), vec![]));
        assert!(Machine::here().cores > 0);
    }
}
