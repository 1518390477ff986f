//! Two runs of the same cases: what became faster, what slower, and what only looks so.

use std::fmt;

use crate::{Measured, SavedRun};

/// How many combined deviations apart two medians must be.
///
/// The deviations of two runs are independent, so they add in squares. For normal noise a median absolute deviation is 0.67
/// standard deviations: three of them are two standard deviations of a single call, and medians of five calls and more
/// scatter half as much. What changes from run to run and not inside one (clock, neighbours, memory layout) no
/// deviation shows, hence the bar well above chance, and [`LEAST`].
const DEVIATIONS: f64 = 3.0;

/// Changes below this share of the older median are never significant.
const LEAST: f64 = 0.02;

/// With fewer repeats a deviation says nothing: that of one call is 0, of two calls it is luck.
const REPEATS: usize = 3;

/// What a change means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Significantly faster.
    Faster,
    /// Significantly slower.
    Slower,
    /// Within the noise.
    Same,
    /// Too few repeats to tell.
    Unknown,
}

/// A case that both runs have.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The older measurement.
    pub old: Measured,
    /// The newer one.
    pub new: Measured,
    /// How many times as fast the newer one is.
    pub ratio: f64,
    /// What that means.
    pub verdict: Verdict,
}

/// A run beside an older one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// The cases of both, in the order of the newer run.
    pub changes: Vec<Change>,
    /// Cases that only the older run has.
    pub gone: Vec<String>,
    /// Cases that only the newer run has.
    pub added: Vec<String>,
    /// Why the figures may not be comparable.
    pub caveats: Vec<String>,
}

/// Compares `new` with `old`, case by case.
pub fn compare(old: &SavedRun, new: &SavedRun) -> Comparison {
    let mut comparison = Comparison::default();
    for (what, old, new) in [
        ("processor", &old.info.machine.cpu, &new.info.machine.cpu),
        ("number of cores", &old.info.machine.cores.to_string(), &new.info.machine.cores.to_string()),
        ("instruction sets", &old.info.machine.flags.join(" "), &new.info.machine.flags.join(" ")),
    ] {
        if old != new {
            comparison.caveats.push(format!("another {what}: `{old}` before, `{new}` now"));
        }
    }
    if old.info.debug_build != new.info.debug_build {
        comparison.caveats.push("one of the runs was built without optimization".into());
    }
    let find = |run: &SavedRun, like: &Measured| {
        run.cases.iter().find(|c| c.key() == like.key() && c.unit == like.unit).cloned()
    };
    for case in &new.cases {
        match find(old, case) {
            Some(before) => comparison.changes.push(Change::new(before, case.clone())),
            None => comparison.added.push(case.label()),
        }
    }
    let gone = old.cases.iter().filter(|case| find(new, case).is_none());
    comparison.gone = gone.map(Measured::label).collect();
    comparison
}

impl Change {
    fn new(old: Measured, new: Measured) -> Self {
        let ratio = new.faster_than(old.median);
        let distance = (new.median - old.median).abs();
        let noise = DEVIATIONS * new.mad.hypot(old.mad);
        let verdict = match ratio {
            _ if old.repeats.min(new.repeats) < REPEATS || !ratio.is_finite() => Verdict::Unknown,
            _ if distance <= noise || distance <= LEAST * old.median.abs() => Verdict::Same,
            ratio if ratio > 1.0 => Verdict::Faster,
            _ => Verdict::Slower,
        };
        Change { old, new, ratio, verdict }
    }
}

impl Comparison {
    /// Cases that became significantly slower.
    pub fn regressions(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(|change| change.verdict == Verdict::Slower)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "SLOWER",
            Verdict::Same => "same",
            Verdict::Unknown => "too few repeats",
        })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for caveat in &self.caveats {
            writeln!(f, "note: {caveat}")?;
        }
        for Change { old, new, ratio, verdict } in &self.changes {
            let (label, unit) = (new.label(), &new.unit);
            writeln!(
                f,
                "{label:40} {:10.4} -> {:10.4} {unit:9} {ratio:5.2}x  {verdict}",
                old.median, new.median
            )?;
        }
        for (what, labels) in [("only before", &self.gone), ("only now", &self.added)] {
            if !labels.is_empty() {
                writeln!(f, "{what}: {}", labels.join(", "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Machine, RunInfo};

    fn measured(unit: &str, median: f64, mad: f64) -> Measured {
        let (suite, case, dtype, unit) = ("s".into(), "c".into(), "f32".into(), unit.into());
        Measured { suite, case, dtype, unit, median, mad, repeats: 5, ..Measured::default() }
    }

    fn verdict(unit: &str, old: (f64, f64), new: (f64, f64)) -> Verdict {
        Change::new(measured(unit, old.0, old.1), measured(unit, new.0, new.1)).verdict
    }

    #[test]
    fn changes_beyond_three_combined_deviations_count() {
        // Combined 5, so the bar is at 15.
        assert_eq!(verdict("tok/s", (100.0, 3.0), (114.9, 4.0)), Verdict::Same);
        assert_eq!(verdict("tok/s", (100.0, 3.0), (115.1, 4.0)), Verdict::Faster);
        assert_eq!(verdict("tok/s", (100.0, 3.0), (84.9, 4.0)), Verdict::Slower);
        assert_eq!(verdict("s", (100.0, 3.0), (84.9, 4.0)), Verdict::Faster, "fewer seconds are faster");
        assert_eq!(verdict("s", (100.0, 3.0), (115.1, 4.0)), Verdict::Slower);
        // Without noise a change of 2 % is not significant, one of 3 % is.
        assert_eq!(verdict("tok/s", (100.0, 0.0), (98.0, 0.0)), Verdict::Same);
        assert_eq!(verdict("tok/s", (100.0, 0.0), (97.0, 0.0)), Verdict::Slower);
    }

    #[test]
    fn few_repeats_tell_nothing() {
        let few = |repeats| Measured { repeats, ..measured("s", 200.0, 0.0) };
        let change = |repeats| Change::new(measured("s", 100.0, 0.0), few(repeats));
        assert_eq!((change(2).verdict, change(2).ratio), (Verdict::Unknown, 0.5));
        assert_eq!(change(3).verdict, Verdict::Slower, "control");
        assert_eq!(verdict("s", (1.0, 0.0), (0.0, 0.0)), Verdict::Unknown, "an infinite ratio");
    }

    #[test]
    fn cases_meet_by_suite_case_device_type_and_unit() {
        let of = |case: &str, device: &str, median| Measured {
            case: case.into(),
            device: device.into(),
            ..measured("tok/s", median, 1.0)
        };
        let info = |cpu: &str| RunInfo {
            machine: Machine { cpu: cpu.into(), ..Machine::default() },
            ..RunInfo::default()
        };
        let old = SavedRun {
            info: info("one"),
            cases: vec![of("a", "flex", 100.0), of("a", "wgpu:0", 1000.0), of("b", "flex", 1.0)],
        };
        let new = SavedRun {
            info: info("two"),
            cases: vec![of("a", "wgpu:0", 500.0), of("a", "flex", 101.0), of("c", "flex", 1.0)],
        };
        let comparison = compare(&old, &new);
        let verdicts: Vec<_> = comparison.changes.iter().map(|c| (c.ratio, c.verdict)).collect();
        assert_eq!(verdicts, [(0.5, Verdict::Slower), (1.01, Verdict::Same)]);
        assert_eq!(
            (comparison.gone.as_slice(), comparison.added.as_slice()),
            (&["s b".into()][..], &["s c".into()][..])
        );
        assert_eq!(comparison.regressions().count(), 1);
        let text = comparison.to_string();
        for part in
            ["another processor: `one` before, `two` now", "SLOWER", "only before: s b", "only now: s c"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        let itself = compare(&old, &old);
        assert!(itself.caveats.is_empty() && itself.regressions().count() == 0, "control");
        assert!(itself.changes.iter().all(|c| c.verdict == Verdict::Same && c.ratio == 1.0));
    }
}
