//! Runs as one HTML page: beside peers, beside the machine's limits, and over time.

use firebrick_analysis::{Bars, Lines, Report, Section, Table};

use crate::{Measured, SavedRun, compare};

/// A rate and its share of a limit.
type Rates = fn(&Measured) -> (Option<f64>, Option<f64>);

/// The page of `runs`, oldest first: the last one in full, the others as its history.
///
/// # Panics
/// If there are no runs.
pub fn page(runs: &[SavedRun]) -> Report {
    let now = runs.last().expect("at least one run");
    let (info, machine) = (&now.info, &now.info.machine);
    let mut report = Report::new("Firebrick benchmarks")
        .summary(summary(now))
        .fact("date", &info.date)
        .fact("commit", info.commit.as_deref().unwrap_or("unknown"))
        .fact("processor", &machine.cpu)
        .fact("instruction sets", machine.flags.join(" "))
        .fact("cores", machine.cores)
        .fact("system", &machine.system);
    if info.debug_build {
        report = report.summary("This run was built without optimization: its figures mean nothing.");
    }
    let sections = [peers(now), roofline(now), memory(now), changes(runs), history(runs)];
    report.sections(sections.into_iter().flatten()).section(all(now))
}

fn summary(run: &SavedRun) -> String {
    // A profile is beside its own forward passes, which no one else runs.
    let ratios: Vec<f64> = compared(run).filter(|m| m.suite != "profile").filter_map(|m| m.ratio).collect();
    let faster = ratios.iter().filter(|r| **r > 1.0).count();
    let peers = match ratios.len() {
        0 => "No peer was run.".to_string(),
        n => format!("Faster than the peer in {faster} of {n} cases that a peer ran too."),
    };
    format!("{} cases. {peers}", run.cases.len())
}

fn compared(run: &SavedRun) -> impl Iterator<Item = &Measured> {
    run.cases.iter().filter(|m| m.ratio.is_some_and(f64::is_finite))
}

fn peers(run: &SavedRun) -> Option<Section> {
    let mut bars = Bars::new("Times as fast as the peer").bar("as fast as the peer", 1.0);
    let mut table = Table::new("Medians").text_column("case");
    for name in ["ours", "peer's", "ratio"] {
        table = table.number_column(name);
    }
    table = table.text_column("unit").number_column("pairs").text_column("peer");
    for m in compared(run) {
        let (ratio, peer) = (m.ratio?, m.peer.as_deref().unwrap_or("unknown"));
        bars = bars.bar(format!("{} / {peer}", m.label()), ratio);
        if ratio > 1.0 {
            bars = bars.highlighted();
        }
        table = table.row([
            m.label().into(),
            m.median.into(),
            m.peer_median.into(),
            ratio.into(),
            m.unit.as_str().into(),
            m.repeats.into(),
            peer.into(),
        ]);
    }
    let text = "Above 1 we are faster. Both run in the same minutes, call by call in turns; a ratio is one of medians.";
    (!table.rows.is_empty()).then(|| Section::new("Beside peers").text(text).bars(bars).table(table))
}

fn roofline(run: &SavedRun) -> Option<Section> {
    let mut section = Section::new("Beside the machine's limits").text(
        "What a case has to compute or move, counted on paper, as a share of what a matrix product or a large buffer \
         reached in the same run.",
    );
    let mut found = false;
    let of_peak = |m: &Measured| (m.gflops, m.share_of_peak);
    let of_bandwidth = |m: &Measured| (m.gbytes_per_s, m.share_of_bandwidth);
    let kinds: [(&str, &str, Rates); 2] = [
        ("Compute-bound: share of the matrix product, percent", "GFLOP/s", of_peak),
        ("Memory-bound: share of the bandwidth, percent", "GB/s", of_bandwidth),
    ];
    for (title, unit, rates) in kinds {
        let mut bars = Bars::new(title).bar("the limit", 100.0);
        let mut table =
            Table::new("Rates").text_column("case").number_column(unit).number_column("%").folded();
        for m in &run.cases {
            if let (Some(rate), Some(share)) = rates(m) {
                bars = bars.bar(m.label(), 100.0 * share);
                table = table.row([m.label().into(), rate.into(), (100.0 * share).into()]);
            }
        }
        if !table.rows.is_empty() {
            section = section.bars(bars).table(table);
            found = true;
        }
    }
    let mut limits =
        Table::new("The limits").text_column("limit").number_column("median").text_column("unit");
    for m in run.cases.iter().filter(|m| m.suite == "roofline") {
        limits =
            limits.row([format!("{} {}", m.case, m.device).into(), m.median.into(), m.unit.as_str().into()]);
    }
    found.then(|| if limits.rows.is_empty() { section } else { section.table(limits) })
}

fn memory(run: &SavedRun) -> Option<Section> {
    let mut table = Table::new("Largest resident set while working, MB").text_column("case");
    table = table.number_column("ours").number_column("peer's").folded();
    let megabytes = |bytes: Option<u64>| bytes.map(|b| (b as f64 / 1e6).round());
    for m in run.cases.iter().filter(|m| m.peak_bytes.is_some() && m.suite != "roofline") {
        let (ours, theirs) = (megabytes(m.peak_bytes), megabytes(m.peer_peak_bytes));
        table = table.row([m.label().into(), ours.into(), theirs.into()]);
    }
    (!table.rows.is_empty()).then(|| Section::new("Memory").table(table))
}

fn changes(runs: &[SavedRun]) -> Option<Section> {
    let [.., before, now] = runs else { return None };
    let comparison = compare(before, now);
    let mut section = Section::new("Since the run before");
    for caveat in &comparison.caveats {
        section = section.note(caveat);
    }
    let mut table = Table::new("Medians").text_column("case");
    for name in ["before", "now", "times as fast"] {
        table = table.number_column(name);
    }
    table = table.text_column("unit").text_column("verdict");
    for (row, change) in comparison.changes.iter().enumerate() {
        let (old, new) = (&change.old, &change.new);
        table = table.row([
            new.label().into(),
            old.median.into(),
            new.median.into(),
            change.ratio.into(),
            new.unit.as_str().into(),
            change.verdict.to_string().into(),
        ]);
        if comparison.regressions().any(|r| r == change) {
            table = table.highlight(row);
        }
    }
    Some(section.table(table))
}

/// Curves of each suite over the runs, each case relative to the first run that has it.
fn history(runs: &[SavedRun]) -> Option<Section> {
    if runs.len() < 2 {
        return None;
    }
    let now = runs.last()?;
    let mut section = Section::new("Over time")
        .text("Times as fast as in the first run that has the case. Compare runs of one machine only.");
    let mut suites: Vec<&str> = now.cases.iter().map(|m| m.suite.as_str()).collect();
    suites.dedup();
    for suite in suites {
        let mut lines = Lines::new(suite, "run", "times as fast", (1..=runs.len()).map(|n| n as f64)).even();
        for case in now.cases.iter().filter(|m| m.suite == suite) {
            let found: Vec<Option<&Measured>> = runs
                .iter()
                .map(|run| run.cases.iter().find(|m| m.key() == case.key() && m.unit == case.unit))
                .collect();
            let Some(first) = found.iter().flatten().next().map(|m| m.median) else { continue };
            lines = lines.series(case.label(), found.iter().map(|m| m.map(|m| m.faster_than(first))));
        }
        section = section.lines(lines);
    }
    let mut table = Table::new("Runs").number_column("run").text_column("date").text_column("commit");
    table = table.text_column("processor").number_column("cores").number_column("cases");
    for (n, SavedRun { info, cases }) in (1usize..).zip(runs) {
        table = table.row([
            n.into(),
            info.date.as_str().into(),
            info.commit.clone().into(),
            info.machine.cpu.as_str().into(),
            info.machine.cores.into(),
            cases.len().into(),
        ]);
    }
    Some(section.table(table))
}

fn all(run: &SavedRun) -> Section {
    let mut table = Table::new("All cases").text_column("case").text_column("device").text_column("type");
    table = table.number_column("median").number_column("MAD").text_column("unit").number_column("repeats");
    for m in &run.cases {
        table = table.row([
            format!("{} {}", m.suite, m.case).into(),
            m.device.as_str().into(),
            m.dtype.as_str().into(),
            m.median.into(),
            m.mad.into(),
            m.unit.as_str().into(),
            m.repeats.into(),
        ]);
    }
    let text = "MAD: median absolute deviation of the repeats.";
    Section::new("Everything").text(text).table(table.folded())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Machine, RunInfo};

    const HOSTILE: &str = "\"'></title><script>alert(1)</script>";

    fn run(date: &str, speed: f64) -> SavedRun {
        let case = |suite: &str, unit: &str, median: f64| Measured {
            suite: suite.into(),
            case: HOSTILE.into(),
            device: "flex".into(),
            dtype: "f32".into(),
            unit: unit.into(),
            median,
            mad: 0.1,
            repeats: 5,
            ..Measured::default()
        };
        let mut forward = case("forward", "tok/s", 100.0 * speed);
        (forward.peer, forward.peer_median, forward.ratio) =
            (Some("torch 2".into()), Some(80.0), Some(1.25 * speed));
        (forward.gflops, forward.share_of_peak, forward.peak_bytes) =
            (Some(50.0), Some(0.5), Some(3_000_000));
        let mut decode = case("decode", "tok/s", 10.0);
        (decode.gbytes_per_s, decode.share_of_bandwidth) = (Some(7.0), Some(0.7));
        let machine =
            Machine { cpu: "Some CPU".into(), flags: vec!["avx2".into()], cores: 2, system: "linux".into() };
        let info = RunInfo {
            version: 1,
            machine,
            commit: Some("abc".into()),
            date: date.into(),
            debug_build: false,
        };
        SavedRun { info, cases: vec![case("roofline", "GFLOP/s", 90.0), forward, decode] }
    }

    fn titles(report: &Report) -> Vec<&str> {
        report.sections.iter().map(|s| s.title.as_str()).collect()
    }

    #[test]
    fn a_page_shows_peers_limits_and_history() {
        let report = page(&[run("2026-01-01", 1.0), run("2026-01-02", 2.0)]);
        let wanted = [
            "Beside peers",
            "Beside the machine's limits",
            "Memory",
            "Since the run before",
            "Over time",
            "Everything",
        ];
        assert_eq!(titles(&report), wanted);
        let html = report.to_html();
        for part in ["2.50", "torch 2", "Some CPU", "avx2", "2026-01-01", "faster", "<svg", "1 of 1 cases"] {
            assert!(html.contains(part), "{part}");
        }
        for part in ["prefers-color-scheme:dark", "width=device-width", "max-width:34rem"] {
            assert!(html.contains(part), "{part}");
        }
        for part in ["<script>alert", "http://", "https://", "src=\"", "<link"] {
            assert!(!html.contains(part), "{part}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_shown() {
        let alone = page(&[run("2026-01-01", 1.0)]);
        assert!(!titles(&alone).contains(&"Over time") && !titles(&alone).contains(&"Since the run before"));
        let mut bare = run("2026-01-01", 1.0);
        bare.cases = vec![Measured { median: 1.0, ..Measured::default() }];
        assert_eq!(titles(&page(&[bare.clone()])), ["Everything"]);
        bare.info.debug_build = true;
        assert!(page(&[bare.clone()]).to_html().contains("without optimization"));
        bare.cases.clear();
        assert!(page(&[bare]).to_html().contains("0 cases"));
    }

    #[test]
    fn a_slower_case_stands_out() {
        let report = page(&[run("a", 1.0), run("b", 0.5)]);
        let section = report.sections.iter().find(|s| s.title == "Since the run before").unwrap();
        let firebrick_analysis::Item::Table(table) = &section.items[0] else { panic!("a table") };
        assert_eq!(table.highlighted, [1], "the forward pass, not the others");
    }
}
