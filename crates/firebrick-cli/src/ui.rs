//! Progress bars on stderr, results on stdout, and Ctrl-C.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use firebrick_core::{Event, Progress};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::Global;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Turns the first Ctrl-C into a clean stop at the next step, and the second into the end.
pub fn on_interrupt() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        complain("\nstopping after this step; press Ctrl-C again to stop at once");
    })
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Writes a line to stdout. A reader that went away has read enough.
pub fn print(line: &str) -> std::io::Result<()> {
    match writeln!(std::io::stdout().lock(), "{line}") {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a line to stderr, if anybody reads it.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Keeps the text of panics until [`panics`] is asked for it: libraries catch those of others, and then there is nothing to say.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        let mut kept = PANICS.lock().unwrap_or_else(|e| e.into_inner());
        // The last few: what was caught came before what was not.
        if kept.len() == 4 {
            kept.remove(0);
        }
        let trace = Backtrace::capture();
        let shown =
            if trace.status() == BacktraceStatus::Captured { format!("\n{trace}") } else { String::new() };
        kept.push(format!("{info}{shown}"));
    }));
}

/// The panics that were kept.
pub fn panics() -> String {
    PANICS.lock().unwrap_or_else(|e| e.into_inner()).join("\n")
}

/// An error and its causes on one line, none twice.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    printable(&text)
}

/// A message that a terminal may show: names in damaged files can hold control characters, and problems can be many.
fn printable(text: &str) -> String {
    const MOST: usize = 8 << 10;
    let mut shown = String::new();
    for (at, c) in text.char_indices() {
        if shown.len() >= MOST {
            let lines = text[at..].matches('\n').count();
            return format!("{shown} ...\n({} more bytes, {lines} more lines)", text.len() - at);
        }
        match c.is_control() && c != '\n' {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// Where progress and results go.
pub struct Terminal {
    bars: MultiProgress,
    tasks: Mutex<HashMap<String, Line>>,
    animated: bool,
    quiet: bool,
    verbose: bool,
    json: bool,
}

/// One task: a bar on a terminal, an occasional line elsewhere.
struct Line {
    bar: ProgressBar,
    total: Option<u64>,
    unit: String,
    said: Instant,
}

impl Terminal {
    pub fn new(global: &Global) -> Self {
        Terminal {
            bars: MultiProgress::new(),
            tasks: Mutex::default(),
            animated: std::io::stderr().is_terminal() && !global.quiet,
            quiet: global.quiet,
            verbose: global.verbose,
            json: global.json,
        }
    }

    /// Prints a result: `value` as JSON with `--json`, else `text`.
    pub fn result(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        let line = if self.json { serde_json::to_string(value)? } else { text().trim_end().to_string() };
        Ok(print(&line)?)
    }

    /// Says something on stderr, above the bars.
    pub fn say(&self, text: &str) {
        if self.quiet {
            return;
        }
        if self.animated {
            self.bars.suspend(|| complain(text));
        } else {
            complain(text);
        }
    }

    /// Clears the bars.
    pub fn finish(&self) {
        let _ = self.bars.clear();
    }
}

impl Progress for Terminal {
    fn on(&self, event: Event<'_>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(|e| e.into_inner());
        match event {
            Event::Begin { task, total, unit } if self.animated => {
                let style = if total.is_some() {
                    "{prefix:12} {bar:30} {pos}/{len} {msg} [{elapsed}, {eta} left]"
                } else {
                    "{prefix:12} {spinner} {pos} {msg} [{elapsed}]"
                };
                let style =
                    ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = self.bars.add(total.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
                bar.set_style(style);
                bar.set_prefix(task.to_string());
                bar.enable_steady_tick(Duration::from_millis(200));
                let line = Line { bar, total, unit: unit.into(), said: Instant::now() };
                tasks.insert(task.into(), line);
            }
            Event::Begin { task, total, unit } => {
                let line =
                    Line { bar: ProgressBar::hidden(), total, unit: unit.into(), said: Instant::now() };
                tasks.insert(task.into(), line);
            }
            Event::Advance { task, done, note } => {
                let Some(line) = tasks.get_mut(task) else { return };
                line.bar.set_position(done);
                line.bar.set_message(format!("{} {note}", line.unit));
                let due = line.said.elapsed() > Duration::from_secs(if self.verbose { 2 } else { 10 });
                if !self.animated && !self.quiet && due {
                    line.said = Instant::now();
                    let total = line.total.map_or(String::new(), |t| format!("/{t}"));
                    complain(&format!("{task}: {done}{total} {} {note}", line.unit));
                }
            }
            Event::End { task } => {
                if let Some(line) = tasks.remove(task) {
                    line.bar.finish_and_clear();
                    self.bars.remove(&line.bar);
                }
            }
            Event::Note(text) => {
                drop(tasks);
                self.say(text);
            }
            Event::Warn(text) => {
                drop(tasks);
                self.say(&format!("warning: {text}"));
            }
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        interrupted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_printable_and_end() {
        assert_eq!(printable("a\nb \u{e9}"), "a\nb \u{e9}");
        assert_eq!(printable("x\u{1b}[2J\0\r"), "x\\u{1b}[2J\\u{0}\\r");
        let long = printable(&"name\n".repeat(10_000));
        assert!(
            long.len() < 9_000 && long.ends_with("(41808 more bytes, 8362 more lines)"),
            "{}",
            &long[8_000..]
        );
    }
}
