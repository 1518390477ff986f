//! A peer: a program that does the same work as a case, one call at a time, whenever it is told to.
//!
//! It loads its model and warms up, prints `{"peer": NAME}` (or `{"missing": WHY}` where it cannot work here), and then does the
//! work once for every line `go` on its input, printing `{"seconds": S}` after each. So its calls alternate with ours, and
//! whatever else the machine does falls on both.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::memory;

/// A running peer; dropping it ends its process.
#[derive(Debug)]
pub struct Peer {
    /// What it calls itself, such as `torch 2.15.0`.
    pub name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What became of starting a peer.
#[derive(Debug)]
pub enum Started {
    /// It is loaded, warm, and waits for its turn.
    Ready(Peer),
    /// It is not installed here; why not.
    Missing(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Peer(String),
    Missing(String),
    Seconds(f64),
}

/// The longest answer of a peer that is read.
const LONGEST: u64 = 1 << 16;

impl Peer {
    /// Starts `command` and waits until it has loaded and warmed up; what it writes to stderr goes to the file `log`.
    ///
    /// # Errors
    /// If it does not start, or ends or says something else before it is ready: with the end of its log.
    pub fn start(mut command: Command, log: &Path) -> Result<Started> {
        let stderr = std::fs::File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let shown = format!("{:?}", command.get_program());
        let mut child = command.spawn().with_context(|| format!("cannot start {shown}"))?;
        let input = child.stdin.take().expect("stdin is a pipe");
        let output = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut peer = Peer { name: String::new(), child, input, output };
        match peer.answer() {
            Ok(Answer::Peer(name)) => peer.name = name,
            Ok(Answer::Missing(why)) => return Ok(Started::Missing(why)),
            Ok(Answer::Seconds(_)) => bail!("the peer measured before it was asked to"),
            Err(e) => return Err(e.context(format!("the peer failed; its log ends:\n{}", end_of(log)))),
        }
        memory::reset(&peer.pid());
        Ok(Started::Ready(peer))
    }

    /// Lets it do its work once, and returns the seconds that took by its own clock.
    ///
    /// # Errors
    /// If it has ended or answers something else.
    pub fn turn(&mut self) -> Result<f64> {
        self.input.write_all(b"go\n").and_then(|()| self.input.flush()).context("the peer has ended")?;
        match self.answer()? {
            Answer::Seconds(s) if s.is_finite() && s > 0.0 => Ok(s),
            Answer::Seconds(s) => bail!("the peer took {s} seconds"),
            Answer::Peer(_) | Answer::Missing(_) => bail!("the peer did not answer with its seconds"),
        }
    }

    /// The most bytes it had resident since it was ready, where that is known.
    pub fn peak(&self) -> Option<u64> {
        memory::peak(&self.pid())
    }

    /// How many page faults it had so far, where that is known.
    pub fn faults(&self) -> Option<u64> {
        memory::faults(&self.pid())
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = Vec::new();
        std::io::Read::take(&mut self.output, LONGEST).read_until(b'\n', &mut line)?;
        let line = String::from_utf8_lossy(&line);
        if line.is_empty() {
            bail!("it ended without an answer");
        }
        serde_json::from_str(&line).with_context(|| format!("it said {:?}", line.trim_end()))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It holds nothing that has to be put in order.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a file.
fn end_of(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn start(script: &str) -> Result<Started> {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Peer::start(command, &folder.path().join("log"))
    }

    #[test]
    fn a_peer_works_once_for_each_turn() {
        let script = r#"echo '{"peer":"shell 1"}'; n=0; while read go; do n=$((n+1)); echo "{\"seconds\":$n.5}"; done"#;
        let Ok(Started::Ready(mut peer)) = start(script) else { panic!("it is ready") };
        assert_eq!(peer.name, "shell 1");
        assert_eq!(
            [peer.turn().unwrap(), peer.turn().unwrap()],
            [1.5, 2.5],
            "the first turn is the first call"
        );
        if cfg!(target_os = "linux") {
            assert!(peer.peak().is_some_and(|bytes| bytes > 4096));
        }
    }

    #[test]
    fn a_missing_peer_says_why() {
        let Ok(Started::Missing(why)) = start(r#"echo '{"missing":"no torch"}'"#) else { panic!("missing") };
        assert_eq!(why, "no torch");
    }

    #[test]
    fn peers_that_fail_are_errors_with_their_last_words() {
        let failed = |script| format!("{:#}", start(script).unwrap_err());
        assert!(failed("echo went wrong >&2; exit 3").contains("went wrong"));
        assert!(failed("echo hello").contains("hello"));
        assert!(failed(r#"echo '{"seconds":1}'"#).contains("before it was asked"));
        for answer in [r#"{"seconds":0}"#, r#"{"seconds":-1}"#, r#"{"peer":"again"}"#, "1.5", ""] {
            let script = format!(r#"echo '{{"peer":"p"}}'; read go; echo '{answer}'"#);
            let Ok(Started::Ready(mut peer)) = start(&script) else { panic!("it is ready") };
            assert!(peer.turn().is_err(), "{answer}");
        }
        let missing = Peer::start(
            Command::new("no-such-program-anywhere"),
            &tempfile::tempdir().unwrap().path().join("l"),
        );
        assert!(missing.is_err());
    }
}
