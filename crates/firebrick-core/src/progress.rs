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

    /// Ends a function with `?` where it may stop.
    ///
    /// # Errors
    /// [`Cancelled`] once the caller wants the work to stop.
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
#[error("interrupted")]
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

    /// Counts `units` more as done.
    ///
    /// # Errors
    /// [`Cancelled`] once the caller wants the work to stop.
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Notes every event as text, and cancels after a number of advances.
    struct Record {
        events: Mutex<Vec<String>>,
        stop_after: usize,
    }

    impl Record {
        fn new(stop_after: usize) -> Self {
            Record { events: Mutex::default(), stop_after }
        }
    }

    impl Progress for Record {
        fn on(&self, event: Event<'_>) {
            let text = match event {
                Event::Begin { task, total, unit } => format!("begin {task} {total:?} {unit}"),
                Event::Advance { task, done, note } => format!("advance {task} {done} {note}"),
                Event::End { task } => format!("end {task}"),
                Event::Note(text) | Event::Warn(text) => text.to_string(),
            };
            self.events.lock().unwrap().push(text);
        }

        fn cancelled(&self) -> bool {
            let events = self.events.lock().unwrap();
            events.iter().filter(|e| e.starts_with("advance")).count() >= self.stop_after
        }
    }

    #[test]
    fn a_task_begins_counts_and_ends() {
        let record = Record::new(9);
        let mut task = Task::begin(&record, "profile", Some(7), "layers");
        assert_eq!(task.advance(3, "a"), Ok(()));
        assert_eq!(task.advance(4, "b"), Ok(()));
        assert_eq!(record.events.lock().unwrap().len(), 3, "no end before the drop");
        drop(task);
        let events = record.events.into_inner().unwrap();
        assert_eq!(
            events,
            ["begin profile Some(7) layers", "advance profile 3 a", "advance profile 7 b", "end profile"]
        );
    }

    #[test]
    fn a_cancelled_task_says_so_and_still_ends() {
        let record = Record::new(2);
        let work = || {
            let mut task = Task::begin(&record, "train", None, "steps");
            (0..5).try_for_each(|_| task.advance(1, ""))
        };
        assert_eq!(work(), Err(Cancelled));
        assert_eq!(record.check(), Err(Cancelled));
        let events = record.events.into_inner().unwrap();
        assert_eq!(events, ["begin train None steps", "advance train 1 ", "advance train 2 ", "end train"]);
        assert_eq!(Silent.check(), Ok(()), "control: nobody cancels");
    }
}
