//! `merge --search`, and what `merge --analyze --calibration` measures.

use std::path::Path;

use serde_json::Value;

use crate::outputs::exits;
use crate::{files, json, text};

const CONFIG: &str = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: base+lamps\n- model: base+stones\nparameters: {weight: 0.5}\ndtype: bfloat16\n";
const SEARCH: [&str; 13] = [
    "--search",
    "cma-es",
    "--search-data",
    "lamp.txt",
    "stone.txt",
    "--window",
    "32",
    "--windows",
    "4",
    "--groups",
    "2",
    "--budget",
    "33",
];

/// The embedded model with two adapters, the text of each, and a merge.
fn prepare() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "base"]);
    for word in ["lamp", "stone"] {
        let file = format!("{word}.txt");
        text(dir.path(), &file, word, 6);
        let base = ["train", "--model", "base", "--steps", "6", "--batch", "2", "--window", "32"];
        let more = ["--learning-rate", "0.01", "--rank", "2", "--data", &file, "--out", &format!("{word}s")];
        json(dir.path(), &[&base[..], &more[..]].concat());
    }
    std::fs::write(dir.path().join("m.yml"), CONFIG).unwrap();
    dir
}

fn search(dir: &Path, out: &str, extra: &[&str]) -> Value {
    json(dir, &[&["merge", "m.yml", "--out", out], &SEARCH[..], extra].concat())
}

#[test]
fn a_search_writes_the_merge_it_found_and_how_to_repeat_it() {
    let dir = prepare();
    let report = search(dir.path(), "found", &["--seed", "1", "--threads", "1"]);
    let found = files(&dir.path().join("found"));
    let costs: Vec<f64> = report["comparisons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            assert!(c["held_out"].as_f64().unwrap() > 0.0);
            c["cost"].as_f64().unwrap()
        })
        .collect();
    println!("found, start, uniform, first, last, random: {costs:.4?}");
    // With so few evaluations, other spreads may cost less; it is never worse than the start.
    assert!(costs.len() == 6 && costs[1..3].iter().all(|cost| costs[0] <= *cost), "{costs:?}");
    assert!(costs[0] < costs[1] - 0.1, "{costs:?}");
    assert!(report["evaluations"].as_u64().unwrap() <= 33);
    assert_eq!(serde_json::from_slice::<Value>(&found["search.json"]).unwrap(), report);
    assert_eq!(report["texts"].as_array().unwrap().len(), 4, "the last fifth of each text is held out");
    assert!(!dir.path().join(".found.search").exists(), "the state goes when the merge is there");

    json(dir.path(), &["merge", "found/merge.yaml", "again"]);
    let again = files(&dir.path().join("again"));
    for name in ["model.safetensors", "config.json", "mergekit_config.yml", "README.md"] {
        assert!(again[name] == found[name], "{name}");
    }
    json(dir.path(), &["merge", "m.yml", "start"]);
    assert!(files(&dir.path().join("start"))["model.safetensors"] != again["model.safetensors"], "control");

    let other = search(dir.path(), "other", &["--seed", "1", "--threads", "2"]);
    assert_eq!(other, report, "on two threads");
    assert!(files(&dir.path().join("other")) == found, "on two threads");
    let held_out = ["--held-out", "lamp.txt", "--search", "coordinate", "--overwrite"];
    let tail = ["--search-data", "stone.txt", "--window", "32", "--windows", "2", "--budget", "9"];
    let report = json(dir.path(), &[&["merge", "m.yml", "other"], &tail[..], &held_out[..]].concat());
    assert_eq!((&report["search_method"], &report["evaluations"]), (&"coordinate".into(), &9.into()));
    let texts: Vec<(&Value, &Value)> =
        report["texts"].as_array().unwrap().iter().map(|t| (&t["name"], &t["held_out"])).collect();
    assert_eq!(texts, [(&"stone.txt".into(), &false.into()), (&"lamp.txt".into(), &true.into())]);
}

#[test]
fn a_wrong_search_is_told_everything_at_once_and_writes_nothing() {
    let dir = prepare();
    std::fs::write(dir.path().join("ties.yml"), CONFIG.replace("task_arithmetic", "ties")).unwrap();
    let before = files(dir.path());
    let wrong = ["--search", "--groups", "0", "--budget", "0", "--window", "1", "--held-out", "nowhere.txt"];
    for part in
        ["--search-data", "--groups", "--budget", "--window", "nowhere.txt", "task_arithmetic and linear"]
    {
        exits(dir.path(), &[&["merge", "ties.yml", "out"], &wrong[..]].concat(), 2, part);
    }
    let line = [&["merge", "m.yml", "out"], &SEARCH[..]].concat();
    exits(dir.path(), &[&line[..], &["--max-memory", "1MiB"]].concat(), 2, "--max-memory");
    exits(dir.path(), &[&line[..], &["--analyze"]].concat(), 2, "--analyze");
    exits(dir.path(), &["merge", "m.yml", "out", "--budget", "3"], 2, "--search");
    exits(dir.path(), &["merge", "m.yml", "--search"], 2, "OUT");
    exits(dir.path(), &["merge", "m.yml", "out", "--calibration", "lamp.txt"], 2, "--analyze");
    let plan = search(dir.path(), "out", &["--dry-run"]);
    assert_eq!((plan["search_tokens"].as_u64(), plan["budget"].as_u64()), (Some(256), Some(33)), "{plan}");
    assert!(files(dir.path()) == before);

    // What an interrupted search left is gone on from or replaced, never passed over.
    std::fs::create_dir(dir.path().join(".out.search")).unwrap();
    std::fs::write(dir.path().join(".out.search/state.json"), "{}").unwrap();
    exits(dir.path(), &line, 2, "--resume");
    exits(dir.path(), &[&line[..], &["--resume"]].concat(), 1, "state of a search");
    search(dir.path(), "out", &["--overwrite"]);
    assert!(!dir.path().join(".out.search").exists());
}

#[test]
fn an_analysis_measures_how_far_the_outputs_move() {
    let dir = prepare();
    let common = ["--window", "32", "--windows", "4", "--report", "before"];
    let analyze = ["merge", "m.yml", "out", "--analyze", "--calibration", "lamp.txt"];
    let drift = json(dir.path(), &[&analyze[..], &common[..]].concat())["drift"].clone();
    assert_eq!((&drift["reference"], &drift["window"]), (&"base".into(), &32.into()));
    assert_eq!(drift["merged"]["tokens"], 4 * 31);
    let alone = drift["models"][0][1]["mean_kl"].as_f64().unwrap();
    let merged = drift["merged"]["mean_kl"].as_f64().unwrap();
    assert!(alone > 0.0 && merged > 0.0, "{drift}");
    let html = std::fs::read_to_string(dir.path().join("before/report.html")).unwrap();
    assert!(html.contains("Output drift") && html.contains("KL, nats a token"));
    assert!(!dir.path().join("out").exists());

    // What was measured is what `eval` finds in the merge that is written.
    json(dir.path(), &["merge", "m.yml", "out"]);
    let slice: String =
        std::fs::read_to_string(dir.path().join("lamp.txt")).unwrap().chars().take(1500).collect();
    std::fs::write(dir.path().join("part.txt"), slice).unwrap();
    let same = ["--window", "32", "--windows", "1000"];
    let again = ["merge", "m.yml", "out", "--analyze", "--calibration", "part.txt"];
    let drift = json(dir.path(), &[&again[..], &same[..]].concat())["drift"].clone();
    let eval = ["eval", "--model", "out", "--reference", "base", "--data", "part.txt", "--window", "32"];
    let eval = json(dir.path(), &eval);
    let kl = |v: &Value| v["mean_kl"].as_f64().unwrap();
    let (measured, told) = (kl(&drift["merged"]), kl(&eval["reference"]));
    assert!((measured - told).abs() < 1e-6, "{measured} {told}");

    std::fs::write(dir.path().join("m.yml"), CONFIG.replace("0.5", "0").replace("bfloat16", "float32"))
        .unwrap();
    let none = json(dir.path(), &[&analyze[..], &same[..]].concat())["drift"]["merged"].clone();
    assert_eq!((none["mean_kl"].as_f64(), none["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    exits(dir.path(), &[&analyze[..], &["--max-memory", "1MiB"]].concat(), 2, "--max-memory");
    assert!(json(dir.path(), &["merge", "m.yml", "out", "--analyze"]).get("drift").is_none());
}
