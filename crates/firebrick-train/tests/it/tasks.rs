use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_core::{Run, Silent};
use firebrick_models::Model;
use firebrick_train::eval::{
    Batching, EvalTask, Metric, TaskKind, TaskResult, TaskSettings, results, run_task,
};
use firebrick_train::{TrainError, token_tensor};
use serde_json::{Value, json};

const SETTINGS: TaskSettings = TaskSettings {
    shots: None,
    limit: Some(12),
    special: false,
    batching: Batching { longest: 512, tokens: 2048 },
};

fn embedded() -> Model {
    Model::embedded(&Device::flex()).unwrap()
}

fn run(model: &Model, task: &EvalTask, settings: TaskSettings) -> TaskResult {
    run_task(&model.decoder, &[], &model.tokenizer, task, &settings, &Silent).unwrap()
}

/// A task file beside its data.
fn write(dir: &Path, toml: &str, items: &[Value]) -> PathBuf {
    let lines: String = items.iter().map(|i| format!("{i}\n")).collect();
    std::fs::write(dir.join("items.jsonl"), lines).unwrap();
    std::fs::write(dir.join("task.toml"), toml).unwrap();
    dir.join("task.toml")
}

const CHOICE: &str = r#"
name = "verses"
kind = "multiple_choice"
data = "items.jsonl"
prompt = "{{ verse }}"
choices = "ends"
answer = "right"
"#;

fn verses() -> Vec<Value> {
    [
        ("In the beginning God created the heaven and the", "earth", "verse", "wine"),
        ("And God said, Let there be", "light", "lemon", "lock"),
        ("The fear of the LORD is the beginning of", "wisdom", "gravel", "sleeves"),
        ("Vanity of vanities, saith the", "Preacher", "compiler", "pebble"),
    ]
    .iter()
    .map(|(verse, a, b, c)| json!({"verse": verse, "ends": [a, b, c], "right": 0}))
    .collect()
}

/// The log-likelihood of the tokens of `text` after those of `context`, in `f64`; both as one text.
fn plain(model: &Model, context: &str, text: &str) -> f64 {
    let ids = model.tokenizer.encode(&format!("{context}{text}"), false).unwrap();
    let given = model.tokenizer.encode(context, false).unwrap().len();
    let logits = model.decoder.forward(token_tensor(&[&ids], &Device::flex()), &mut Run::default());
    let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
    let vocab = model.decoder.config().vocab;
    let nats = |j: usize| {
        let row = &logits[(j - 1) * vocab..j * vocab];
        let top = row.iter().copied().fold(f64::MIN, f64::max);
        top + row.iter().map(|l| (l - top).exp()).sum::<f64>().ln() - row[ids[j] as usize]
    };
    -(given..ids.len()).map(nats).sum::<f64>()
}

#[test]
fn log_likelihoods_are_those_of_whole_texts() {
    let (model, dir) = (embedded(), tempfile::tempdir().unwrap());
    let task = EvalTask::load(&write(dir.path(), CHOICE, &verses())).unwrap();
    let found = run(&model, &task, SETTINGS);
    assert_eq!((found.samples.len(), found.items, found.shots), (4, 4, 0));
    for sample in &found.samples {
        for ((context, text), found) in sample.arguments.iter().zip(&sample.filtered_resps) {
            let want = plain(&model, context, text);
            assert!((found - want).abs() < 1e-4, "{context}{text}: {found} {want}");
        }
    }
    let right = |s: &firebrick_train::eval::Sample| s.predicted(Metric::Acc, TaskKind::MultipleChoice) == 0;
    let share = found.samples.iter().filter(|s| right(s)).count() as f64 / 4.0;
    assert_eq!(found.scores[0].value, share);
    assert!(share >= 0.5, "the embedded model has read the Bible: {found:?}");
}

#[test]
fn permuted_choices_give_the_permuted_answer() {
    let (model, dir) = (embedded(), tempfile::tempdir().unwrap());
    let forward = run(&model, &EvalTask::load(&write(dir.path(), CHOICE, &verses())).unwrap(), SETTINGS);
    let turned: Vec<Value> = verses()
        .into_iter()
        .map(|mut item| {
            item["ends"].as_array_mut().unwrap().rotate_left(1);
            // By text this time, which means the same.
            item["right"] = item["ends"][2].clone();
            item
        })
        .collect();
    let turned = run(&model, &EvalTask::load(&write(dir.path(), CHOICE, &turned)).unwrap(), SETTINGS);
    assert_eq!(
        forward.scores.iter().map(|s| s.value).collect::<Vec<_>>(),
        turned.scores.iter().map(|s| s.value).collect::<Vec<_>>()
    );
    for (a, b) in forward.samples.iter().zip(&turned.samples) {
        let of = |s: &firebrick_train::eval::Sample| s.predicted(Metric::AccNorm, TaskKind::MultipleChoice);
        assert_eq!(of(a), (of(b) + 1) % 3);
        assert_eq!((a.target, b.target), (0, 2));
    }
    // The control: with another answer, another score.
    let wrong: Vec<Value> = verses()
        .into_iter()
        .map(|mut item| {
            item["right"] = json!(1);
            item
        })
        .collect();
    let wrong = run(&model, &EvalTask::load(&write(dir.path(), CHOICE, &wrong)).unwrap(), SETTINGS);
    assert!(wrong.scores[0].value < forward.scores[0].value);
}

#[test]
fn built_in_tasks_run_and_their_figures_add_up() {
    let model = embedded();
    let built_in = |name: &str, limit| {
        run(&model, &EvalTask::built_in(name).unwrap(), TaskSettings { limit, ..SETTINGS })
    };
    let pair = built_in("gloss_pair", Some(20));
    let acc = pair.scores[0];
    assert!((acc.standard_error.unwrap() - (acc.value * (1.0 - acc.value) / 19.0).sqrt()).abs() < 1e-12);
    assert!(pair.samples.iter().all(|s| s.unconditional.len() == 2), "mutual information is asked for");

    let rank = built_in("gloss_rank", None);
    let confusion = rank.confusion.as_ref().unwrap();
    let right: usize = (0..3).map(|i| confusion.counts[i][i]).sum();
    assert_eq!(confusion.counts.iter().flatten().sum::<usize>(), 129);
    assert_eq!(rank.scores[0].value, right as f64 / 129.0);
    assert_eq!(rank.scores[2].value, confusion.macro_f1());
    assert_eq!(rank.scores[2].standard_error, None);
    println!("gloss_pair {:?}, gloss_rank {:?} {confusion:?}", pair.scores, rank.scores);

    let found = results(&[pair, rank], json!({"model": "firebrick"}));
    assert!(found["results"]["gloss_pair"]["acc,none"].is_f64());
    assert!(found["results"]["gloss_pair"]["acc_norm_stderr,none"].is_f64());
    assert_eq!(found["results"]["gloss_rank"]["macro_f1_stderr,none"], "N/A");
    assert_eq!(found["n-samples"]["gloss_pair"], json!({"original": 295, "effective": 20}));
    assert_eq!((&found["versions"]["gloss_rank"], &found["n-shot"]["gloss_rank"]), (&json!(1), &json!(0)));
    assert_eq!(found["classes"]["gloss_rank"][0]["label"], "species");
    assert!(found["confusion"].get("gloss_pair").is_none());
}

#[test]
fn examples_are_drawn_once_and_never_show_the_item() {
    let (model, dir) = (embedded(), tempfile::tempdir().unwrap());
    let toml = format!("{CHOICE}description = \"Verses.\\n\"\n[fewshot]\ncount = 2\nseed = 5\n");
    let load = |toml: &str| EvalTask::load(&write(dir.path(), toml, &verses())).unwrap();
    let found = run(&model, &load(&toml), SETTINGS);
    assert_eq!(found.shots, 2);
    for (sample, item) in found.samples.iter().zip(verses()) {
        let (context, prompt) = (&sample.arguments[0].0, item["verse"].as_str().unwrap());
        assert!(context.starts_with("Verses.\n") && context.ends_with(&format!("\n\n{prompt}")), "{context}");
        assert_eq!(context.matches("\n\n").count(), 2);
        assert_eq!(context.matches(prompt).count(), 1, "the item itself is no example: {context}");
    }
    assert_eq!(run(&model, &load(&toml), SETTINGS), found, "the same examples again");
    let other = run(&model, &load(&toml.replace("seed = 5", "seed = 6")), SETTINGS);
    let contexts = |r: &TaskResult| r.samples.iter().map(|s| s.arguments[0].0.clone()).collect::<Vec<_>>();
    assert_ne!(contexts(&other), contexts(&found), "control: the seed counts");
    let error = run_task(
        &model.decoder,
        &[],
        &model.tokenizer,
        &load(&toml),
        &TaskSettings { shots: Some(4), ..SETTINGS },
        &Silent,
    )
    .unwrap_err();
    assert!(error.to_string().contains("4 examples asked for, there are 3"), "{error}");
}

#[test]
fn bad_files_are_told_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let message = |toml: &str, items: &[Value]| {
        EvalTask::load(&write(dir.path(), toml, items)).unwrap_err().to_string()
    };
    let mut items = verses();
    items[1]["right"] = json!(3);
    items[2].as_object_mut().unwrap().remove("verse");
    items[3]["ends"] = json!(["one"]);
    let found = message(CHOICE, &items);
    for part in
        ["items.jsonl:2: `right` is 3", "items.jsonl:3: line 1 of the template", "items.jsonl:4: 1 choice"]
    {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert!(message(&CHOICE.replace("{{ verse }}", "{{ verse"), &verses()).contains("`prompt`: line 1"));
    assert!(message(&CHOICE.replace("kind", "knid"), &verses()).contains("task.toml"));
    let path = write(dir.path(), CHOICE, &[]);
    assert!(matches!(EvalTask::load(&path), Err(TrainError::EmptyFile { .. })));
    std::fs::write(dir.path().join("items.jsonl"), "{\"verse\": 1\n[2]\n".repeat(30)).unwrap();
    let found = EvalTask::load(&path).unwrap_err().to_string();
    assert!(found.contains("items.jsonl:2: not an object") && found.contains("and 40 more lines"), "{found}");
    std::fs::write(dir.path().join("items.jsonl"), b"\xff").unwrap();
    assert!(matches!(EvalTask::load(&path), Err(TrainError::NotUtf8 { offset: 0, .. })));
}

#[test]
fn items_that_cannot_be_scored_are_all_listed() {
    let (model, dir) = (embedded(), tempfile::tempdir().unwrap());
    // Without a delimiter the tokenizer joins the choice with the word before it.
    let toml = format!("{CHOICE}target_delimiter = \"\"\n");
    let whole = model.tokenizer.encode(" the", false).unwrap();
    assert_eq!(whole.len(), 1, "the tests below need a token that ` t` begins");
    let items: Vec<Value> =
        (0..3).map(|_| json!({"verse": "a t", "ends": ["he", "x"], "right": 0})).collect();
    let task = EvalTask::load(&write(dir.path(), &toml, &items)).unwrap();
    let error =
        run_task(&model.decoder, &[], &model.tokenizer, &task, &SETTINGS, &Silent).unwrap_err().to_string();
    assert!(error.contains("item 0: `he` has no token") && error.contains("item 2"), "{error}");
}
