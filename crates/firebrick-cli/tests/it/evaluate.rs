//! `firebrick eval` beyond plain perplexity: its fields, its exit codes, and what it leaves alone.

use std::path::Path;

use serde_json::{Value, json};

use crate::{json as result, run};

/// Text of the kind that the embedded model knows.
fn known(dir: &Path) {
    let text = firebrick_train::domain("glosses").unwrap().held_out_text();
    std::fs::write(dir.join("t.txt"), &text[..6 * 1024]).unwrap();
}

#[test]
fn stride_and_reference_have_their_fields() {
    let dir = tempfile::tempdir().unwrap();
    known(dir.path());
    let eval = |extra: &[&str]| {
        let base = ["eval", "--model", "embedded", "--data", "t.txt", "--window", "64"];
        result(dir.path(), &[&base, extra].concat())
    };
    let plain = eval(&[]);
    let keys: Vec<&String> = plain.as_object().unwrap().keys().collect();
    let stable = [
        "model",
        "dtype",
        "window",
        "tokens",
        "windows",
        "mean_nll",
        "standard_error",
        "perplexity",
        "bits_per_byte",
    ];
    assert_eq!(keys, stable, "what scripts read stays as it is");
    let strided = eval(&["--stride", "16"]);
    assert_eq!(strided["stride"], 16);
    assert!(strided["tokens"].as_u64() > plain["tokens"].as_u64());
    assert!(strided["mean_nll"].as_f64() < plain["mean_nll"].as_f64(), "more context helps");

    let same = eval(&["--reference", "embedded"]);
    let field = |value: &Value, name: &str| value["reference"][name].as_f64().unwrap();
    assert_eq!((field(&same, "mean_kl"), field(&same, "top1_agreement")), (0.0, 1.0));
    assert_eq!(same["mean_nll"], plain["mean_nll"]);
    result(dir.path(), &["convert", "embedded", "q4.gguf", "--type", "q4_0"]);
    let rounded = eval(&["--reference", "q4.gguf"]);
    assert!(
        field(&rounded, "mean_kl") > 1e-4 && field(&rounded, "top1_agreement") < 1.0,
        "control: {rounded}"
    );
    assert!(field(&rounded, "max_kl") >= field(&rounded, "p99_kl"));
}

#[test]
fn tasks_are_reported_as_the_harness_does() {
    let dir = tempfile::tempdir().unwrap();
    let eval = ["eval", "--model", "embedded", "--task", "gloss_pair", "gloss_rank", "--limit", "8"];
    let found = result(dir.path(), &[&eval[..], &["--samples", "s.jsonl"]].concat());
    assert!(found.get("mean_nll").is_none(), "no text was given");
    for task in ["gloss_pair", "gloss_rank"] {
        assert!(
            found["results"][task]["acc,none"].is_f64() && found["results"][task]["acc_stderr,none"].is_f64()
        );
        assert_eq!(found["n-samples"][task]["effective"], 8);
        assert_eq!((&found["versions"][task], &found["n-shot"][task]), (&json!(1), &json!(0)));
    }
    assert_eq!((&found["config"]["model"], &found["config"]["limit"]), (&json!("firebrick"), &json!(8)));
    assert!(found["confusion"]["gloss_rank"]["counts"].is_array());
    let samples = std::fs::read_to_string(dir.path().join("s.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 16);
    let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&first["task"], &first["doc_id"], &first["target"]),
        (&json!("gloss_pair"), &json!(0), &json!(0))
    );
    assert_eq!(first["filtered_resps"].as_array().unwrap().len(), 2);

    // The batch changes nothing but rounding; examples do.
    let small = result(dir.path(), &[&eval[..], &["--batch", "1", "--window", "96"]].concat());
    assert_eq!(small["results"], found["results"]);
    let shots = result(dir.path(), &[&eval[..], &["--num-fewshot", "2", "--window", "1024"]].concat());
    assert_eq!(shots["n-shot"]["gloss_rank"], 2);
    let output = run(dir.path(), &[&eval[..], &["--samples", "s.jsonl"]].concat());
    assert_eq!(output.status.code(), Some(2), "the samples are there already");
}

#[test]
fn dry_runs_and_wrong_calls_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    known(dir.path());
    std::fs::write(dir.path().join("bad.toml"), "name = \"x\"\nkind = \"guess\"\nprompt = 3\n").unwrap();
    let dry = [
        "eval",
        "--model",
        "embedded",
        "--data",
        "t.txt",
        "--task",
        "gloss_pair",
        "--limit",
        "5",
        "--dry-run",
        "--samples",
        "s.jsonl",
    ];
    let plan = result(dir.path(), &dry);
    assert_eq!((&plan["items of gloss_pair"], &plan["writes"]), (&json!(5), &json!(["s.jsonl"])));
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--task", "nowhere"], 2, "gloss_pair, gloss_rank"),
        (&["--task", "gloss_pair", "gloss_pair"], 2, "two tasks have the name `gloss_pair`"),
        (&["--task", "gloss_pair", "--limit", "0"], 2, "--limit"),
        (&["--task", "bad.toml"], 1, "2:8: `kind`: `guess`"),
        (&["--task", "bad.toml"], 1, "3:10: `prompt`: expected a text, found integer"),
        (&["--limit", "3", "--data", "t.txt"], 2, "--task"),
        (&["--reference", "embedded", "--task", "gloss_pair"], 2, "--data"),
        (&["--data", "t.txt", "--stride", "0"], 2, "--stride must be 1 to --window (512)"),
        (&["--data", "t.txt", "--window", "64", "--stride", "65"], 2, "--stride"),
        (&["--task", "gloss_rank", "--num-fewshot", "9999"], 1, "examples asked for"),
        (&["--task", "gloss_pair", "--window", "4"], 1, "larger window"),
        (&[], 2, "--data FILE, --task TASK, or both"),
    ];
    for (arguments, code, part) in cases {
        let output =
            run(dir.path(), &[&["eval", "--model", "embedded", "--device", "flex"], *arguments].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {stderr}");
        assert!(
            stderr.contains(part) && !stderr.contains("panicked"),
            "{arguments:?} should say `{part}`: {stderr}"
        );
        assert!(output.stdout.is_empty(), "{arguments:?} printed to stdout");
    }
    assert!(!dir.path().join("s.jsonl").exists());
}
