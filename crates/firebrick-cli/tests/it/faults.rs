//! Disks that are full and folders that can't be written: one message, and no half output.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Output};

use crate::outputs::{prepare, writers};
use crate::{files, json};

/// Runs the binary from `script`, a line of shell in which it is `"$0" "$@"`.
fn shell(dir: &Path, wrapper: &[&str], script: &str, arguments: &[&str]) -> Output {
    let line = [wrapper, &["sh", "-c", script, env!("CARGO_BIN_EXE_firebrick")], arguments].concat();
    Command::new(line[0]).args(&line[1..]).args(["--device", "flex"]).current_dir(dir).output().unwrap()
}

fn told(output: &Output, arguments: &[&str], part: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    assert!(
        stderr.contains(part) && stderr.contains("error: "),
        "{arguments:?} should say `{part}`: {stderr}"
    );
    assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
}

/// No file may grow beyond 50 kB: what a full disk is to a program, wherever the test runs.
const FULL: &str = "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"";

#[test]
fn a_full_disk_leaves_no_half_output() {
    let dir = prepare();
    let logits = ["eval", "--model", "embedded", "--data", "t.txt", "--window", "32", "--logits", "out"];
    for verb in writers("out").into_iter().chain([logits.to_vec()]) {
        let out = dir.path().join("out");
        let before = files(dir.path());
        let output = shell(dir.path(), &[], FULL, &verb);
        told(&output, &verb, "too large");
        let after = files(dir.path());
        // What remains is for --resume, in a folder that says so.
        let whole: Vec<&String> = after.keys().filter(|k| !before.contains_key(*k)).collect();
        let resumes = ["train", "specialize"].contains(&verb[0]);
        let unfinished =
            |name: &&String| resumes && (name.starts_with("out/.train/") || name.starts_with("out/.stages/"));
        assert!(whole.iter().all(unfinished), "{verb:?} left {whole:?}");
        assert!(resumes || !out.exists(), "{verb:?} left an empty folder");
        if verb[0] == "specialize" {
            // Its runs take many seconds; that it goes on from any stage is tested in `specialize.rs`.
            std::fs::remove_dir_all(&out).unwrap();
            continue;
        }
        if resumes {
            json(dir.path(), &[&verb[..], &["--resume"]].concat());
            let resumed = files(&out);
            json(dir.path(), &[&verb[..], &["--overwrite"]].concat());
            assert!(resumed == files(&out), "{verb:?}: resumed as if the disk had not been full");
        } else {
            json(dir.path(), &verb);
        }
        let old = files(dir.path());
        // An old output stays as it was.
        let output = shell(dir.path(), &[], FULL, &[&verb[..], &["--overwrite"]].concat());
        told(&output, &verb, "too large");
        if !resumes {
            assert!(files(dir.path()) == old, "{verb:?}: the old output is another");
        }
        match out.is_dir() {
            true => std::fs::remove_dir_all(&out).unwrap(),
            false => std::fs::remove_file(&out).unwrap(),
        }
    }
}

#[test]
fn a_small_disk_is_the_same() {
    let dir = prepare();
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    let script =
        "mount -t tmpfs -o size=4m none disk || exit 77; \"$0\" \"$@\"; code=$?; ls -A disk; exit $code";
    let arguments = ["convert", "a", "disk/out"];
    let output = shell(dir.path(), &["unshare", "-rm"], script, &arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || stderr.contains("unshare") {
        println!("skipped: no file system can be mounted here ({})", stderr.trim());
        return;
    }
    told(&output, &arguments, "No space left");
    // Parts that were finished wait for a larger disk; nothing lies under the name of the output.
    let left = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(left.is_empty() || left.trim() == ".out.partial", "{left}");
}

#[test]
fn what_can_not_be_written_is_named() {
    let dir = prepare();
    std::fs::write(dir.path().join("file"), "mine").unwrap();
    let before = files(dir.path());
    // A folder that is a file, and (of verbs that are soon at their end) one that the system does not let anybody make.
    let mut cases = writers("file/out");
    if cfg!(target_os = "linux") {
        cases.extend(writers("/proc/no-such-folder-here/out").into_iter().take(2));
    }
    for verb in cases {
        let output = shell(dir.path(), &[], "exec \"$0\" \"$@\"", &verb);
        let place = if verb.contains(&"file/out") { "file/out" } else { "/proc/no-such-folder-here" };
        told(&output, &verb, place);
        assert!(files(dir.path()) == before, "{verb:?}");
    }
}

#[test]
fn a_full_standard_output_is_an_error() {
    if !Path::new("/dev/full").exists() {
        println!("skipped: there is no /dev/full");
        return;
    }
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&["inspect", "embedded", "--json"][..], &["devices"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_firebrick"));
        let output = command.args(arguments).current_dir(dir.path()).stdout(full()).output().unwrap();
        told(&output, arguments, "No space left");
        // Nobody to tell: the exit code says it still.
        let mut command = Command::new(env!("CARGO_BIN_EXE_firebrick"));
        let status = command.args(arguments).current_dir(dir.path()).stdout(full()).stderr(full()).status();
        assert_eq!(status.unwrap().code(), Some(1), "{arguments:?}");
    }
}
