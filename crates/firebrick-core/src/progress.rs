//! Progress events, and the way to stop a long run from outside.

/// Something a long-running function tells its caller.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A task begins; `total` in `unit`s if known.
    Begin {
        /// Name of the task, unique among those that run at the same time.
        task: &'a str,
        /// How many units there are, if known.
        total: Option<u64>,
        /// What is counted: `steps`, `tokens`, `bytes`, `layers`.
        unit: &'a str,
    },
    /// `done` units of the task are done; `note` says more (loss, tensor name).
    Advance {
        /// Name of the task.
        task: &'a str,
        /// Units done since the beginning.
        done: u64,
        /// Free text, such as `loss 2.31`.
        note: &'a str,
    },
    /// The task is over.
    End {
        /// Name of the task.
        task: &'a str,
    },
    /// Something the user should know.
    Note(&'a str),
    /// Something the user should act on.
    Warn(&'a str),
}

/// Receives progress events; the binary draws bars from them. Polled for cancellation between units of work.
pub trait Progress: Send + Sync {
    /// Takes one event.
    fn on(&self, event: Event<'_>);

    /// Whether the caller wants the work to stop; checked between units.
    fn cancelled(&self) -> bool {
        false
    }

    /// `Err` once the caller wants the work to stop.
    fn check(&self) -> Result<(), Cancelled> {
        if self.cancelled() { Err(Cancelled) } else { Ok(()) }
    }
}

/// Drops every event and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn on(&self, _event: Event<'_>) {}
}

/// The work was stopped from outside; what was finished can be resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted; run again with --resume to go on")]
pub struct Cancelled;

/// One task: begins on creation, ends when dropped.
pub struct Task<'a> {
    progress: &'a dyn Progress,
    name: &'a str,
    done: u64,
}

impl<'a> Task<'a> {
    /// Begins the task `name` of `total` `unit`s.
    pub fn begin(progress: &'a dyn Progress, name: &'a str, total: Option<u64>, unit: &str) -> Self {
        progress.on(Event::Begin { task: name, total, unit });
        Task { progress, name, done: 0 }
    }

    /// Counts `units` more as done; `Err` once the caller wants the work to stop.
    pub fn advance(&mut self, units: u64, note: &str) -> Result<(), Cancelled> {
        self.done += units;
        self.progress.on(Event::Advance { task: self.name, done: self.done, note });
        self.progress.check()
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.progress.on(Event::End { task: self.name });
    }
}
