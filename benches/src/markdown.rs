//! Runs as a page of Markdown for the documentation: each case beside its peer and beside what bounds it.

use firebrick_analysis::number;

use crate::{Measured, SavedRun};

/// The page of `runs`, the last one first, a section each.
pub fn markdown(runs: &[SavedRun]) -> String {
    let mut text = String::from(
        "# Measured\n\nWritten by `cargo xtask bench --peer --markdown FILE`, not by hand; `docs/guide/bench.md` says what the figures are, \
         `docs/performance.md` why they are so.\n\n\
         Ours and the peer's are medians of calls that take turns; a ratio above 1 means that we are faster. What bounds a case is counted on paper; \
         the share is that of a matrix product, or of reading or copying memory, in the same run. Memory is the largest resident set, faults are \
         page faults of a call: ours, the peer's.\n",
    );
    for run in runs.iter().rev() {
        text += &section(run);
    }
    text
}

fn section(run: &SavedRun) -> String {
    let info = &run.info;
    let commit = info.commit.as_deref().unwrap_or("unknown");
    let mut text = format!(
        "\n## {}, {} cores\n\n{}; {}; commit {}; {}.{}\n\n",
        cell(&info.machine.cpu),
        info.machine.cores,
        cell(&info.machine.flags.join(" ")),
        cell(&info.machine.system),
        cell(commit),
        cell(&info.date),
        if info.debug_build { " **Built without optimization: the figures mean nothing.**" } else { "" },
    );
    let (limits, cases): (Vec<_>, Vec<_>) = run.cases.iter().partition(|m| m.suite == "roofline");
    text += "| limit | type | median | unit |\n|---|---|---|---|\n";
    for m in limits {
        text += &format!(
            "| {} | {} | {} | {} |\n",
            cell(&m.case),
            cell(&m.dtype),
            number(m.median),
            cell(&m.unit)
        );
    }
    text += "\n| case | type | ours | ± | unit | peer | its | ratio | bound by | rate | share | memory, GB | faults |\n";
    text += "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for m in cases {
        text += &row(m);
    }
    text
}

fn row(m: &Measured) -> String {
    let some = |value: Option<f64>| value.map_or(String::new(), number);
    let percent = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share));
    let pair = |ours: Option<String>, theirs: Option<String>| {
        ours.into_iter().chain(theirs).collect::<Vec<_>>().join(", ")
    };
    let gigabytes = |bytes: Option<u64>| bytes.map(|bytes| format!("{:.2}", bytes as f64 / 1e9));
    let whole = |faults: Option<f64>| faults.map(|faults| format!("{faults:.0}"));
    let (bound, rate, share) = match (m.gflops, m.gbytes_per_s) {
        (Some(rate), _) => ("compute", format!("{} GFLOP/s", number(rate)), m.share_of_peak),
        (None, Some(rate)) => ("memory", format!("{} GB/s", number(rate)), m.share_of_bandwidth),
        (None, None) => ("", String::new(), None),
    };
    let cells = [
        format!("{} {}", cell(&m.suite), cell(&m.case)),
        cell(&m.dtype),
        number(m.median),
        number(m.mad),
        cell(&m.unit),
        m.peer.as_deref().map_or(String::new(), cell),
        some(m.peer_median),
        m.ratio.map_or(String::new(), |ratio| format!("**{ratio:.2}**")),
        bound.to_string(),
        rate,
        percent(share),
        pair(gigabytes(m.peak_bytes), gigabytes(m.peer_peak_bytes)),
        pair(whole(m.faults), whole(m.peer_faults)),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// Text that stays in its cell.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Machine, RunInfo};

    #[test]
    fn a_page_has_a_section_a_run_and_a_row_a_case() {
        let case = Measured {
            suite: "decode".into(),
            case: "a|b".into(),
            median: 12.5,
            mad: 0.25,
            ..Measured::default()
        };
        let beside = Measured {
            peer: Some("<other>".into()),
            peer_median: Some(5.0),
            ratio: Some(2.5),
            gbytes_per_s: Some(21.0),
            share_of_bandwidth: Some(0.7),
            peak_bytes: Some(1_500_000_000),
            peer_peak_bytes: Some(2_000_000_000),
            faults: Some(0.4),
            ..case.clone()
        };
        let limit =
            Measured { suite: "roofline".into(), case: "read".into(), median: 30.0, ..Measured::default() };
        let run = |cpu: &str| {
            let machine = Machine { cpu: cpu.into(), cores: 2, ..Machine::default() };
            let info = RunInfo { machine, ..RunInfo::default() };
            SavedRun { info, cases: vec![limit.clone(), case.clone(), beside.clone()] }
        };
        let page = markdown(&[run("One"), run("Two")]);
        let [two, one] = ["## Two, 2 cores", "## One, 2 cores"].map(|title| page.find(title).unwrap());
        assert!(two < one, "the last run is the first section");
        assert!(page.contains("| read |  | 30 |  |\n"));
        assert!(page.contains("| decode a\\|b |  | 12.5 | 0.25 |  |  |  |  |  |  |  |  |  |\n"), "{page}");
        let row = "| &lt;other> | 5 | **2.50** | memory | 21 GB/s | 70 % | 1.50, 2.00 | 0 |\n";
        assert!(page.contains(row), "{page}");
        // Every row has as many cells as the heading.
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        let wide: Vec<usize> = page
            .lines()
            .filter(|l| l.starts_with("| case") || l.starts_with("| decode"))
            .map(cells)
            .collect();
        assert!(wide.iter().all(|n| *n == wide[0]), "{wide:?}");
    }
}
