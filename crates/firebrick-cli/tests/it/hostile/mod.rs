//! Hostile input: whatever is wrong with a file, the binary says so in one message that names it, ends with 1 or 2, soon and in
//! little memory, and leaves nothing behind.

mod configs;
mod files;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use firebrick_core::Seed;
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType};
use firebrick_peft::{LoraConfig, hf};
use firebrick_tensor::stream::Executor;

/// Files by their path in the folder of a case.
type Files = BTreeMap<String, Vec<u8>>;

/// Most seconds that a case may take, and most kilobytes of address space that it may use.
const LIMITS: (u64, usize) = (10, 1 << 20);

/// What lies in a folder and is no plain file.
#[derive(Clone)]
enum Odd {
    Folder,
    Link(&'static str),
    Pipe,
}

/// One run of the binary that has to fail.
struct Case {
    name: String,
    arguments: Vec<String>,
    files: Files,
    odd: Vec<(String, Odd)>,
    /// What the message has to contain.
    says: Vec<String>,
}

/// How a case ended.
struct Outcome {
    /// None if a signal ended it.
    code: Option<i32>,
    seconds: f64,
    stdout: String,
    stderr: String,
    /// What is in the folder now and was not before, is gone, or is another.
    changed: Vec<String>,
}

/// A model small enough for hundreds of runs, in every form that is read.
struct Valid {
    /// `m/`: `config.json`, the tokenizer and `model.safetensors`; `t.txt` beside it.
    folder: Files,
    /// The same in shards with an index.
    sharded: Files,
    /// `m.gguf` and `t.txt`.
    gguf: Files,
    /// `folder` and an adapter for it in `a/`.
    adapter: Files,
}

static VALID: LazyLock<Valid> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let text = "the quick brown fox jumps over the lazy dog and the quick brown fox runs on. ".repeat(8);
    let tokenizer = train_bpe([text.as_str()], 272).unwrap();
    let config = DecoderConfig { tied_head: false, ..DecoderConfig::tiny(tokenizer.vocab_size()) };
    let device = Device::flex();
    let decoder = Decoder::random(config, Seed(9), &device).unwrap();
    let export = |out: &str, shard_bytes| {
        let executor = Executor { shard_bytes, ..Executor::default() };
        let path = dir.path().join(out);
        Export::decoder("tiny", &decoder, &tokenizer, ExportType::F32).write(&path, &executor).unwrap();
    };
    export("one/m", u64::MAX);
    export("many/m", 24 << 10);
    export("gguf/m.gguf", u64::MAX);
    let bank = LoraConfig { rank: 2, ..LoraConfig::default() };
    let bank = bank.init(decoder.sites(), &decoder.sites().block_linears(), Seed(1), &device).unwrap();
    hf::save(&bank, decoder.sites(), "tiny", &dir.path().join("adapter/a")).unwrap();
    let read = |name: &str| {
        let mut files = crate::files(&dir.path().join(name));
        files.insert("t.txt".into(), text.clone().into_bytes());
        files
    };
    let folder = read("one");
    let adapter = folder.iter().map(|(n, b)| (n.clone(), b.clone())).chain(read("adapter")).collect();
    Valid { folder, sharded: read("many"), gguf: read("gguf"), adapter }
});

/// Which verbs read what is damaged.
#[derive(Clone, Copy)]
enum Reader {
    /// Every verb that opens a model, in turn.
    Open,
    /// Every verb that needs all of a model, in turn.
    Load,
    /// The verbs that take an adapter, in turn.
    Adapter,
}

impl Reader {
    fn arguments(self, turn: usize, model: &str) -> Vec<String> {
        let eval = "eval --model M --data t.txt --window 8";
        let generate = "generate --model M --prompt the --max-tokens 2";
        let train = "train --model M --data t.txt --window 8 --batch 1 --steps 1 --out out";
        let quantize = "quantize --model M --data t.txt --window 8 --windows 2 --group 0 --out out.gguf";
        let adapted = [eval, generate].map(|line| format!("{line} --adapter a"));
        let convert = "convert M out";
        let open: [&str; 6] = [convert, eval, "inspect M", train, generate, quantize];
        let load: [&str; 5] = [convert, eval, train, generate, quantize];
        let line = match self {
            Reader::Open => open[turn % open.len()],
            Reader::Load => load[turn % load.len()],
            Reader::Adapter => &adapted[turn % adapted.len()],
        };
        line.split(' ').map(|word| if word == "M" { model.into() } else { word.into() }).collect()
    }
}

impl Case {
    fn new(name: impl Into<String>, arguments: Vec<String>, files: &Files, says: &[&str]) -> Case {
        let says = says.iter().map(ToString::to_string).collect();
        Case { name: name.into(), arguments, files: files.clone(), odd: Vec::new(), says }
    }

    fn line(name: impl Into<String>, line: &str, files: &Files, says: &[&str]) -> Case {
        Case::new(name, line.split(' ').map(String::from).collect(), files, says)
    }

    fn with(mut self, path: &str, bytes: impl Into<Vec<u8>>) -> Case {
        self.files.insert(path.into(), bytes.into());
        self
    }

    fn without(mut self, path: &str) -> Case {
        assert!(self.files.remove(path).is_some(), "{}: there is no {path}", self.name);
        self
    }

    /// Something odd in the place of a file.
    fn odd(mut self, path: &str, odd: Odd) -> Case {
        self.files.remove(path);
        self.odd.push((path.into(), odd));
        self
    }

    fn prepare(&self, dir: &Path) {
        for (name, bytes) in &self.files {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        for (name, odd) in &self.odd {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match odd {
                Odd::Folder => std::fs::create_dir(path).unwrap(),
                Odd::Link(to) => std::os::unix::fs::symlink(to, path).unwrap(),
                Odd::Pipe => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
            }
        }
    }

    /// Runs it in a folder of its own inside `root`.
    fn run(&self, root: &Path, number: usize) -> Outcome {
        let (dir, log) = (root.join(number.to_string()), |end: &str| root.join(format!("{number}.{end}")));
        std::fs::create_dir(&dir).unwrap();
        self.prepare(&dir);
        let before = listing(&dir);
        let start = Instant::now();
        // Where address space can't be limited (macOS) the run goes on without.
        let limited = format!("ulimit -c 0; ulimit -v {} 2>/dev/null; exec \"$0\" \"$@\"", LIMITS.1);
        let mut child = Command::new("sh")
            .args(["-c", &limited, env!("CARGO_BIN_EXE_firebrick")])
            .args(&self.arguments)
            .args(["--threads", "1", "--device", "flex"])
            .env_remove("RUST_BACKTRACE")
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(File::create(log("out")).unwrap())
            .stderr(File::create(log("err")).unwrap())
            .spawn()
            .unwrap();
        let status = loop {
            match child.try_wait().unwrap() {
                None if start.elapsed() > Duration::from_secs(LIMITS.0) => {
                    child.kill().unwrap();
                    break child.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(2)),
                Some(status) => break status,
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        let said = |end: &str| String::from_utf8_lossy(&std::fs::read(log(end)).unwrap()).into_owned();
        let after = listing(&dir);
        let differs =
            |(path, state): (&String, &String)| (before.get(path) != Some(state)).then(|| path.clone());
        let mut changed: Vec<String> = after.iter().filter_map(differs).collect();
        changed.extend(before.keys().filter(|path| !after.contains_key(*path)).cloned());
        std::fs::remove_dir_all(&dir).unwrap();
        Outcome { code: status.code(), seconds, stdout: said("out"), stderr: said("err"), changed }
    }
}

/// Everything in a folder and below: what it is, and for a file its contents.
fn listing(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
            let state = match kind.is_file() {
                true => digest(&std::fs::read(&path).unwrap()),
                false => format!("{kind:?}"),
            };
            found.insert(path.strip_prefix(dir).unwrap().to_string_lossy().into_owned(), state);
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn digest(bytes: &[u8]) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{} bytes, {:x}", bytes.len(), hasher.finish())
}

impl Outcome {
    /// What is wrong with how a case ended.
    fn problems(&self, says: &[String]) -> Vec<String> {
        let Outcome { code, seconds, stdout, stderr, changed } = self;
        let mut problems = Vec::new();
        let mut check = |good: bool, what: String| {
            if !good {
                problems.push(what);
            }
        };
        check(matches!(code, Some(1 | 2)), format!("exit code {code:?}"));
        check(*seconds < LIMITS.0 as f64, format!("{seconds:.1} s"));
        check(stdout.is_empty(), format!("{} bytes on stdout", stdout.len()));
        let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
        check(errors == 1, format!("{errors} messages"));
        check(
            !["panicked", "RUST_BACKTRACE", "internal error"].iter().any(|p| stderr.contains(p)),
            "a panic".into(),
        );
        check(stderr.len() < 16 << 10, format!("{} bytes of message", stderr.len()));
        let strange = stderr.chars().find(|c| c.is_control() && *c != '\n');
        check(strange.is_none(), format!("{strange:?} in the message"));
        for part in says {
            check(stderr.contains(part.as_str()), format!("it does not say `{part}`"));
        }
        check(changed.is_empty(), format!("it left or changed {changed:?}"));
        problems
    }
}

/// Runs all cases, a few at a time, and fails with everything that is wrong with any of them.
fn check(kind: &str, cases: &[Case]) {
    let start = Instant::now();
    let root = tempfile::tempdir().unwrap();
    let (next, slowest) = (AtomicUsize::new(0), Mutex::new((0.0, String::new())));
    let failures = Mutex::new(BTreeMap::new());
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(number) else { return };
                    let outcome = case.run(root.path(), number);
                    let problems = outcome.problems(&case.says);
                    if !problems.is_empty() {
                        let head: String = outcome.stderr.chars().take(600).collect();
                        let text = format!(
                            "{}: {}\n  firebrick {}\n  {}",
                            case.name,
                            problems.join("; "),
                            case.arguments.join(" "),
                            head.trim_end()
                        );
                        failures.lock().unwrap().insert(number, text);
                    }
                    let mut slowest = slowest.lock().unwrap();
                    if outcome.seconds > slowest.0 {
                        *slowest = (outcome.seconds, case.name.clone());
                    }
                }
            });
        }
    });
    let (failures, slowest) = (failures.into_inner().unwrap(), slowest.into_inner().unwrap());
    println!(
        "{} {kind} in {:.1} s, the slowest in {:.2} s ({})",
        cases.len(),
        start.elapsed().as_secs_f64(),
        slowest.0,
        slowest.1
    );
    let texts: Vec<&String> = failures.values().collect();
    assert!(
        texts.is_empty(),
        "{} of {}:\n{}",
        texts.len(),
        cases.len(),
        texts.iter().map(|t| format!("{t}\n")).collect::<String>()
    );
}

#[test]
fn damaged_files_are_refused() {
    let cases = files::cases(&VALID);
    assert!(cases.len() >= 150, "{} cases", cases.len());
    check("damaged files", &cases);
}

#[test]
fn wrong_configurations_are_refused() {
    let cases = configs::cases(&VALID);
    assert!(cases.len() >= 60, "{} cases", cases.len());
    check("wrong configurations", &cases);
}

/// Control: every reader takes the files as they were before they were damaged, within the same limits.
#[test]
fn undamaged_files_are_read() {
    let root = tempfile::tempdir().unwrap();
    let mut number = 0;
    for (model, files) in [("m", &VALID.folder), ("m", &VALID.sharded), ("m.gguf", &VALID.gguf)] {
        for turn in 0..6 {
            let case = Case::new("control", Reader::Open.arguments(turn, model), files, &[]);
            let outcome = case.run(root.path(), number);
            assert_eq!(outcome.code, Some(0), "{:?}: {}", case.arguments, outcome.stderr);
            number += 1;
        }
    }
    let [task, item] = configs::TASK;
    let stages = r#"[{"length": 1, "draws": [{"source": "t", "weight": 1, "share": 1}]}]"#;
    for line in configs::LINES.iter().chain(&["convert m out.gguf --type q4_0 --imatrix i.dat"]) {
        let data = if line.contains("--task") { item } else { "{\"text\": \"the quick brown fox\"}\n" };
        let case = Case::line("control", line, &VALID.folder, &[]).with("t.toml", task).with("d.jsonl", data);
        let outcome = case.with("s.json", stages).with("i.dat", files::importance()).run(root.path(), number);
        assert_eq!(outcome.code, Some(0), "{line}: {}", outcome.stderr);
        number += 1;
    }
    for turn in 0..2 {
        let case = Case::new("control", Reader::Adapter.arguments(turn, "m"), &VALID.adapter, &[]);
        let outcome = case.run(root.path(), number);
        assert_eq!(outcome.code, Some(0), "{:?}: {}", case.arguments, outcome.stderr);
        assert!(!outcome.problems(&[]).is_empty(), "control: a run that succeeds is no refusal");
        number += 1;
    }
}

/// Control: each of the things that are checked can be wrong.
#[test]
fn bad_endings_are_noticed() {
    let good = || Outcome {
        code: Some(1),
        seconds: 0.1,
        stdout: String::new(),
        stderr: "error: m.gguf: at byte 3: no\n".into(),
        changed: Vec::new(),
    };
    let says = vec!["m.gguf".to_string()];
    assert_eq!(good().problems(&says), Vec::<String>::new());
    for (bad, why) in [
        (Outcome { code: Some(101), ..good() }, "exit code"),
        (Outcome { code: None, ..good() }, "exit code"),
        (Outcome { seconds: 11.0, ..good() }, "11.0 s"),
        (Outcome { stdout: "x".into(), ..good() }, "stdout"),
        (Outcome { stderr: good().stderr.repeat(2), ..good() }, "2 messages"),
        (Outcome { stderr: good().stderr + "panicked at", ..good() }, "panic"),
        (Outcome { stderr: good().stderr + &"m".repeat(20_000), ..good() }, "bytes of message"),
        (Outcome { stderr: good().stderr + "\u{1b}[2J", ..good() }, "in the message"),
        (Outcome { stderr: "error: no\n".into(), ..good() }, "does not say `m.gguf`"),
        (Outcome { changed: vec!["out".into()], ..good() }, "it left"),
    ] {
        let problems = bad.problems(&says);
        assert!(problems.len() == 1 && problems[0].contains(why), "{why}: {problems:?}");
    }
    // The limit of memory is in force where there is one.
    if cfg!(target_os = "linux") {
        let shell = format!("ulimit -v {}; ulimit -v", LIMITS.1);
        let output = Command::new("sh").args(["-c", &shell]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), LIMITS.1.to_string());
    }
}
