//! Files that go to Python and come back: transformers, peft, gguf, mergekit, llama.cpp.
//!
//! Runs when FIREBRICK_PYTHON names a Python that has them (`cargo xtask python` makes one); fails without one when
//! FIREBRICK_REQUIRE names `python`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use burn::tensor::Device;
use firebrick_core::Seed;
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType};
use firebrick_tensor::stream::Executor;
use serde_json::{Value, json};

use crate::{family, json, text};

pub fn python() -> Option<PathBuf> {
    let path = std::env::var_os("FIREBRICK_PYTHON").map(PathBuf::from);
    if path.is_none() {
        let required = std::env::var("FIREBRICK_REQUIRE").unwrap_or_default();
        assert!(!required.contains("python"), "a Python is required: FIREBRICK_PYTHON does not name one");
        eprintln!(
            "skipped: FIREBRICK_PYTHON does not name a Python with transformers, peft, gguf, mergekit and xllamacpp"
        );
    }
    path
}

/// A Python that runs one script after another, as `tests/python/serve.py` says.
struct Server {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Server {
    fn start(python: &Path) -> Self {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python");
        let mut process = Command::new(python)
            .arg(scripts.join("serve.py"))
            .env("PYTHONPATH", scripts)
            .env("HF_HUB_OFFLINE", "1")
            .env("OMP_NUM_THREADS", "2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, answers }
    }

    fn ask(&mut self, question: &Value) -> Value {
        writeln!(self.process.stdin.as_mut().unwrap(), "{question}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer)
            .unwrap_or_else(|e| panic!("{question}: Python ended or wrote {answer:?}: {e}"))
    }
}

static SERVER: Mutex<Option<Server>> = Mutex::new(None);

/// Runs one of `tests/python/*.py` in `dir` and gives the JSON it prints.
pub fn script(python: &Path, dir: &Path, name: &str, arguments: &[&str]) -> Value {
    let question = [&[dir.to_str().unwrap(), name], arguments].concat();
    // A test that failed meanwhile leaves a server that can still answer.
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    let answer = server.get_or_insert_with(|| Server::start(python)).ask(&json!(question));
    drop(server);
    let out =
        answer["out"].as_str().unwrap_or_else(|| panic!("{name}: {}", answer["error"].as_str().unwrap()));
    let line = out.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{name}: {e} in {out}"))
}

/// Evaluates in windows of 64, and leaves the last logits in `ours.safetensors`.
fn nll(dir: &Path, model: &str, data: &str, adapter: Option<&str>) -> f64 {
    let mut arguments = vec!["eval", "--model", model, "--data", data, "--window", "64", "--overwrite"];
    arguments.extend(["--logits", "ours.safetensors"]);
    arguments.extend(adapter.map(|a| ["--adapter", a]).iter().flatten());
    json(dir, &arguments)["mean_nll"].as_f64().unwrap()
}

/// Checks what a script found against our mean loss and `ours.safetensors`.
fn agree(theirs: &Value, ours: f64) {
    assert!((theirs["mean_nll"].as_f64().unwrap() - ours).abs() < 1e-4, "{theirs} against {ours}");
    assert_eq!(theirs["shape"][0], theirs["shape"][1]);
    assert!(theirs["largest_difference"].as_f64().unwrap() < 5e-3, "{theirs}");
    assert!(theirs["control"].as_f64().unwrap() > 0.5, "control: other windows, other logits: {theirs}");
    eprintln!("{theirs}");
}

#[test]
fn transformers_and_gguf_load_what_we_write() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "copper", 6);
    json(dir.path(), &["convert", "embedded", "folder"]);
    for dtype in ["f32", "q8_0", "q4_0", "q4_1"] {
        json(dir.path(), &["convert", "embedded", &format!("{dtype}.gguf"), "--type", dtype]);
    }
    let ours = nll(dir.path(), "folder", "t.txt", None);
    agree(&script(&python, dir.path(), "logits.py", &["folder", "t.txt", "64", "ours.safetensors"]), ours);
    for dtype in ["f32", "q8_0", "q4_0", "q4_1"] {
        let name = format!("{dtype}.gguf");
        let ours = nll(dir.path(), &name, "t.txt", None);
        agree(&script(&python, dir.path(), "logits.py", &[&name, "t.txt", "64", "ours.safetensors"]), ours);
    }
    // Every block decodes in our reader as in the gguf package.
    for dtype in ["f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"] {
        let (name, back) = (format!("{dtype}.gguf"), format!("{dtype}-back"));
        json(dir.path(), &["convert", "embedded", &name, "--type", dtype, "--overwrite"]);
        json(dir.path(), &["convert", &name, &back]);
        let blocks = script(&python, dir.path(), "gguf_equal.py", &[&name, &back]);
        assert_eq!(blocks["largest_difference"].as_f64(), Some(0.0), "{name}: {blocks}");
    }
}

#[test]
fn transformers_loads_a_transplanted_vocabulary() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "copper", 6);
    let prose = firebrick_train::domain("prose").unwrap().train_text();
    let tokenizer = train_bpe([prose.as_str()], 1200).unwrap();
    let donor = Decoder::random(DecoderConfig::tiny(1200), Seed(1), &Device::flex()).unwrap();
    let export = Export::decoder("donor", &donor, &tokenizer, ExportType::F32);
    export.write(&dir.path().join("donor"), &Executor::default()).unwrap();
    json(dir.path(), &["transplant", "embedded", "donor", "--out", "out", "--k", "8"]);
    let ours = nll(dir.path(), "out", "t.txt", None);
    agree(&script(&python, dir.path(), "logits.py", &["out", "t.txt", "64", "ours.safetensors"]), ours);
}

#[test]
fn every_family_goes_to_transformers_and_gguf() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"] {
        family(dir.path(), name, |_| ());
        let (folder, file) = (format!("{name}-again"), format!("{name}.gguf"));
        json(dir.path(), &["convert", name, &folder]);
        json(dir.path(), &["convert", name, &file, "--type", "f32"]);
        let found = script(&python, dir.path(), "families.py", &[name, &folder, &file]);
        eprintln!("{name}: {found}");
        assert_eq!(found["same_class"].as_bool(), Some(true), "{name}: {found}");
        assert!(found["largest_difference"].as_f64().unwrap() < 1e-5, "{name}: {found}");
        assert!(found["control"].as_f64().unwrap() > 0.1, "{name}: {found}");
        assert!(found["largest_weight_difference"].as_f64().unwrap() < 1e-6, "{name}: {found}");
        for list in ["foreign_tensors", "names_differ", "foreign_keys"] {
            assert_eq!(found[list].as_array().map(Vec::len), Some(0), "{name}: {found}");
        }
    }
}

#[test]
fn llama_cpp_runs_every_family() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let ids = |answer: &Value| answer["ids"].as_array().unwrap().clone();
    for name in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"] {
        // What llama.cpp does not read for the family is as it takes for granted.
        family(dir.path(), name, |config| match name {
            "mistral" => config["sliding_window"] = Value::Null,
            "qwen2" => config["use_sliding_window"] = false.into(),
            "gemma2" | "gemma3" => config["query_pre_attn_scalar"] = config["head_dim"].clone(),
            _ => {}
        });
        let file = format!("{name}.gguf");
        json(dir.path(), &["convert", name, &file, "--type", "f32"]);
        let generate = |prompt: &str| {
            let arguments = ["--prompt", prompt, "--max-tokens", "12", "--temperature", "0"];
            json(dir.path(), &[&["generate", "--model", &file], &arguments[..]].concat())
        };
        // More tokens than the windows are wide; llama.cpp goes on where our text ends.
        let prompts = ["the other fox and", "a lazy brown dog", "(x + 1) * 2 = y"];
        let texts = prompts.map(|prompt| (prompt, generate(prompt)));
        let (prompt, ours) =
            texts.iter().find(|(_, ours)| ids(ours).len() == 12).expect("some text goes on for 12 tokens");
        let theirs = script(&python, dir.path(), "llama.py", &[&file, prompt, "12"]);
        eprintln!("{name}: {} and {}", ours["ids"], theirs["ids"]);
        // llama.cpp does not list tokens that end within a character: the others come in the same order.
        let follows = |ours: &Value| {
            let mut rest = ids(ours).into_iter();
            ids(&theirs).iter().all(|id| rest.any(|other| other == *id))
        };
        assert!(ids(&theirs).len() >= 4 && follows(ours), "{name}: {ours} and {theirs}");
        let others = texts.iter().filter(|(other, _)| other != prompt).map(|(_, text)| text);
        let same = ids(ours).iter().all(|id| *id == ids(ours)[0]);
        assert!(same || others.into_iter().any(|other| !follows(other)), "control: {name}, another prompt");
    }
}

#[test]
fn llama_cpp_generates_from_what_we_write() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let prompt = "And the king said unto the people";
    for dtype in ["f32", "q8_0", "q4_0", "q4_1"] {
        let name = format!("{dtype}.gguf");
        json(dir.path(), &["convert", "embedded", &name, "--type", dtype]);
        let generate =
            ["generate", "--model", &name, "--prompt", prompt, "--max-tokens", "12", "--temperature", "0"];
        let ours = json(dir.path(), &generate);
        let theirs = script(&python, dir.path(), "llama.py", &[&name, prompt, "12"]);
        eprintln!("{dtype}: {} and {}", ours["ids"], theirs["ids"]);
        let ids = |answer: &Value| answer["ids"].as_array().unwrap().clone();
        assert_eq!(
            theirs["prompt_tokens"].as_u64().unwrap() as usize,
            ours["prompt_ids"].as_array().unwrap().len()
        );
        assert_eq!(ids(&theirs).len(), 12);
        // llama.cpp rounds activations to 8 bits before it multiplies packed weights: near ties may fall the other way later on.
        let same = ids(&ours).iter().zip(&ids(&theirs)).take_while(|(a, b)| a == b).count();
        assert!(same >= if dtype == "f32" { 12 } else { 1 }, "{dtype}: {ours} against {theirs}");
    }
}

#[test]
fn adapters_go_both_ways() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "t.txt", "violin", 12);
    json(dir.path(), &["convert", "embedded", "folder"]);
    let train =
        ["train", "--model", "folder", "--data", "t.txt", "--steps", "5", "--window", "64", "--out", "ours"];
    json(dir.path(), &train);
    let base = nll(dir.path(), "folder", "t.txt", None);
    let ours = nll(dir.path(), "folder", "t.txt", Some("ours"));
    let arguments = ["folder", "ours", "t.txt", "64", "ours.safetensors"];
    agree(&script(&python, dir.path(), "peft_eval.py", &arguments), ours);
    assert!((base - ours).abs() > 1e-3, "control: the adapter changes something");

    let saved = script(&python, dir.path(), "peft_save.py", &["folder", "theirs", "t.txt", "64"]);
    let read = nll(dir.path(), "folder", "t.txt", Some("theirs"));
    assert!((saved["mean_nll"].as_f64().unwrap() - read).abs() < 1e-4, "{saved} against {read}");
    assert!((base - read).abs() > 1e-3, "control");
}

#[test]
fn merges_equal_mergekit() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "base", "--type", "bf16"]);
    script(&python, dir.path(), "perturb.py", &["base", "a", "b", "c"]);
    // mergekit takes a bare name for one on the Hub.
    let at = dir.path().to_str().unwrap();
    for (method, base) in [("linear", String::new()), ("task_arithmetic", format!("base_model: {at}/base\n"))]
    {
        for dtype in ["float32", "bfloat16"] {
            let yaml = format!(
                "merge_method: {method}\n{base}models:\n  - model: {at}/a\n    parameters: {{weight: 0.5}}\n  - model: {at}/b\n    parameters: {{weight: 0.3}}\n  - model: {at}/c\n    parameters: {{weight: 0.2}}\ndtype: {dtype}\n"
            );
            std::fs::write(dir.path().join("theirs.yml"), &yaml).unwrap();
            std::fs::write(dir.path().join("ours.yml"), yaml + "numerics: mergekit\n").unwrap();
            let out = format!("{method}-{dtype}");
            json(dir.path(), &["merge", "ours.yml", &out]);
            let found = script(&python, dir.path(), "mergekit_equal.py", &["theirs.yml", &out]);
            assert_eq!(found["different"].as_u64(), Some(0), "{method} {dtype}: {found}");
            eprintln!("{method} {dtype}: {found}");
            assert!(found["tensors"].as_u64().unwrap() > 10);
        }
    }
}

#[test]
fn mergekit_repeats_a_searched_merge() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "base", "--type", "bf16"]);
    script(&python, dir.path(), "perturb.py", &["base", "a", "b", "c"]);
    text(dir.path(), "t.txt", "river", 4);
    let at = dir.path().to_str().unwrap();
    let yaml = format!(
        "merge_method: linear\nbase_model: {at}/base\nmodels: [{{model: {at}/base}}, {{model: {at}/a}}, {{model: {at}/b}}]\nparameters: {{weight: 0.3}}\ndtype: float32\nnumerics: mergekit\n"
    );
    std::fs::write(dir.path().join("m.yml"), yaml).unwrap();
    let line = "merge m.yml --out out --search --search-data t.txt --window 32 --windows 2 --budget 12";
    let report = json(dir.path(), &line.split(' ').collect::<Vec<_>>());
    let weights = &report["comparisons"][0]["coefficients"];
    assert_ne!(*weights, report["comparisons"][1]["coefficients"], "something was found: {report}");
    let found = script(&python, dir.path(), "mergekit_equal.py", &["out/merge.yaml", "out"]);
    assert_eq!(found["different"].as_u64(), Some(0), "{found}");
    assert!(found["tensors"].as_u64().unwrap() > 10);
}

/// Items of a task of each kind from the glosses: four glosses of a word, what sort of name it is, a pair of glosses.
fn gloss_tasks(dir: &Path, items: usize) {
    let glosses = firebrick_train::domain("glosses").unwrap();
    let entries: Vec<(&str, &str)> =
        glosses.documents().flat_map(str::lines).filter_map(|l| l.split_once(" (noun): ")).collect();
    let (mut choice, mut class, mut pair) = (String::new(), String::new(), String::new());
    for i in 0..items {
        let (words, gloss) = entries[i * 9];
        // The right one at another place each time, the others from elsewhere in the text.
        let mut texts: Vec<&str> = (1..4).map(|j| entries[(i * 9 + 131 * j) % entries.len()].1).collect();
        texts.insert(i % 4, gloss);
        choice += &format!("{}\n", json!({"words": words, "texts": texts, "right": i % 4}));
        let sort = if words.contains("genus ") {
            "genus"
        } else if words.contains("family ") {
            "family"
        } else {
            "thing"
        };
        class += &format!("{}\n", json!({"gloss": gloss, "sort": sort}));
        pair += &format!("{}\n", json!({"words": words, "gloss": gloss, "other": texts[(i + 1) % 4]}));
    }
    let task = |name: &str, lines: &str, rest: &str| {
        std::fs::write(dir.join(format!("{name}.jsonl")), lines).unwrap();
        let toml = format!("name = \"{name}\"\ndata = \"{name}.jsonl\"\n{rest}");
        std::fs::write(dir.join(format!("{name}.toml")), toml).unwrap();
    };
    // A space at the end of a prompt has to move to the choices.
    let rest = "kind = \"multiple_choice\"\nprompt = \"{{ words }} (noun): \"\nchoices = \"texts\"\nanswer = \"right\"\ntarget_delimiter = \"\"\nmetrics = [\"acc\"]\n";
    task("choice", &choice, rest);
    let rest = "kind = \"classification\"\nprompt = \"{{ gloss }}\\nThis is a\"\nchoices = [\"genus\", \"family\", \"thing\"]\nanswer = \"sort\"\n[fewshot]\ncount = 2\n";
    task("class", &class, rest);
    let rest = "kind = \"pair\"\nprompt = \"{{ words }} (noun):\"\nchoices = [\"{{ gloss }}\", \"{{ other }}\"]\nmetrics = [\"acc\", \"acc_norm\", \"acc_mutual_info\"]\n";
    task("pair", &pair, rest);
}

#[test]
fn evaluation_equals_transformers() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let text = firebrick_train::domain("prose").unwrap().held_out_text();
    std::fs::write(dir.path().join("t.txt"), &text[..11_000]).unwrap();
    gloss_tasks(dir.path(), 200);
    json(dir.path(), &["convert", "embedded", "folder"]);
    script(&python, dir.path(), "perturb.py", &["folder", "moved"]);
    let eval = ["eval", "--model", "folder"];
    let text = ["--data", "t.txt", "--window", "64", "--stride", "16", "--reference", "moved"];
    let tasks = ["--samples", "s.jsonl", "--task", "choice.toml", "class.toml", "pair.toml"];
    let ours = json(dir.path(), &[&eval[..], &text].concat());
    let results = &json(dir.path(), &[&eval[..], &tasks].concat())["results"];
    assert!(ours["windows"].as_u64().unwrap() >= 200, "{}", ours["windows"]);
    let theirs =
        script(&python, dir.path(), "evaluate.py", &["folder", "moved", "t.txt", "64", "16", "s.jsonl"]);
    let near = |what: &str, ours: &Value, theirs: &Value| {
        let apart = (ours.as_f64().unwrap() - theirs.as_f64().unwrap()).abs();
        assert!(apart < 1e-4, "{what}: {ours} against {theirs}");
    };
    assert_eq!(ours["tokens"], theirs["strided"]["tokens"]);
    near("strided", &ours["mean_nll"], &theirs["strided"]["mean_nll"]);
    for (name, value) in theirs["reference"].as_object().unwrap() {
        near(name, &ours["reference"][name], value);
    }
    assert!(theirs["reference"]["mean_kl"].as_f64().unwrap() > 1e-3, "control: the copy is another model");
    let tasks = &theirs["tasks"];
    assert_eq!(
        (tasks["items"].as_u64(), tasks["sequences"].as_u64()),
        (Some(600), Some(200 * (4 + 3 + 2 + 2)))
    );
    assert!(tasks["largest_difference"].as_f64().unwrap() < 1e-4, "{tasks}");
    assert!(tasks["control"].as_f64().unwrap() > 1.0, "control: choices differ: {tasks}");
    for task in ["choice", "class", "pair"] {
        let figures = results[task].as_object().unwrap();
        for (name, value) in figures.iter().filter(|(_, value)| value.is_f64()) {
            near(&format!("{task} {name}"), value, &tasks["results"][task][name]);
        }
    }
    println!("{theirs}");
}

#[test]
fn extracted_adapters_equal_mergekit_and_load_in_peft() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    // A head of its own, and one that is tied to the embedding.
    for (name, tied) in [("mistral", false), ("llama", true)] {
        family(dir.path(), name, |_| ());
        let [base, tuned, ours, full] =
            ["base", "tuned", "ours", "full"].map(|what| format!("{name}-{what}"));
        json(dir.path(), &["convert", name, &base, "--type", "f32"]);
        script(&python, dir.path(), "perturb.py", &[&base, &tuned]);
        let extract = |out: &str, rank: &str, more: &[&str]| {
            let line = ["extract-lora", &base, &tuned, "--out", out, "--rank", rank];
            json(dir.path(), &[&line[..], more].concat())["kept"].as_f64().unwrap()
        };
        // mergekit saves the head whole.
        assert!(extract(&ours, "8", &["--save-whole", "head"]) < 0.99, "control: a rank that is cut");
        let embedding: &[&str] = if tied { &[] } else { &["--embedding"] };
        assert!((extract(&full, "999", embedding) - 1.0).abs() < 1e-9);
        let found = script(&python, dir.path(), "extract_lora.py", &[&base, &tuned, &ours, &full, "8"]);
        eprintln!("{name}: {found}");
        assert_eq!(found["modules"].as_u64(), Some(14), "{name}: {found}");
        assert!(found["largest_relative"].as_f64().unwrap() < 1e-4, "{name}: {found}");
        assert!(found["control"].as_f64().unwrap() > 0.5, "{name}: {found}");
        assert_eq!(found["largest_whole"].as_f64(), Some(0.0), "{name}: {found}");
        assert_eq!(found["r"], json!([8, 8]), "{name}: {found}");
        for list in ["only_ours", "only_mergekit"] {
            assert_eq!(found[list], json!([]), "{name}: {found}");
        }
        // As a module and merged: where the head is tied, that must not count the embedding's change twice.
        for how in ["peft_difference", "merged_difference"] {
            assert!(found[how].as_f64().unwrap() < 1e-4, "{name}: {found}");
        }
        assert!(found["peft_control"].as_f64().unwrap() > 0.01, "{name}: {found}");
    }
}
