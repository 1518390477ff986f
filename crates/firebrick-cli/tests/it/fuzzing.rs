//! The fuzz targets of `fuzz/`, on their corpus and on mutations of it: a cheap part of what `cargo xtask fuzz` does.

#[path = "../../../../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use firebrick_core::Seed;

/// Mutations of each target, and most seconds spent on them.
const EFFORT: (u64, u64) = (20_000, 2);

/// A stream of numbers from a seed.
struct Draws(Seed, u64);

impl Draws {
    fn next(&mut self, below: usize) -> usize {
        self.1 += 1;
        (self.0.derive(&self.1.to_string()).0 % below.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.next(items.len())]
    }

    /// A range inside `len` bytes.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let (a, b) = (self.next(len + 1), self.next(len + 1));
        a.min(b)..a.max(b)
    }
}

/// The corpus of a target: name and bytes.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

/// The runs of letters or digits in `bytes`, and each sign.
fn words(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = bytes
        .chunk_by(|a, b| a.is_ascii_alphanumeric() && b.is_ascii_alphanumeric())
        .map(<[u8]>::to_vec)
        .collect();
    words.sort();
    words.dedup();
    words
}

/// One change of `bytes`: of a bit, a length, a number, a word, or a piece that goes, comes twice or from another input.
fn mutate(bytes: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], words: &[Vec<u8>], draws: &mut Draws) {
    let at = draws.next(bytes.len());
    let numbers: &[&str] = &[
        "0",
        "-1",
        "1e999",
        "18446744073709551616",
        "4294967296",
        "0.5",
        "nan",
        "null",
        "true",
        "[]",
        "{}",
        "\"\"",
    ];
    match draws.next(10) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << draws.next(8),
        1 if !bytes.is_empty() => bytes[at] = draws.next(256) as u8,
        2 if bytes.len() >= 8 => {
            let at = draws.next(bytes.len() - 7);
            let number = [0, 1, 2, 31, 1 << 20, 1 << 32, u64::MAX >> 3, u64::MAX][draws.next(8)];
            let width = [1, 4, 8][draws.next(3)];
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        3 => drop(bytes.drain(draws.range(bytes.len()))),
        4 => {
            let piece = bytes[draws.range(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
        }
        5 => {
            let (_, other) = draws.of(corpus);
            let piece = other[draws.range(other.len())].to_vec();
            bytes.splice(at..at, piece);
        }
        6 => {
            let word = draws.of(words).clone();
            bytes.splice(at..at, word);
        }
        7 | 8 => {
            // A whole word, so that what stays around it is still well-formed.
            let starts =
                |i: usize| i == 0 || bytes[i - 1].is_ascii_alphanumeric() != bytes[i].is_ascii_alphanumeric();
            let begin = (0..=at).rev().find(|&i| i < bytes.len() && starts(i)).unwrap_or(0);
            let end = (at + 1..bytes.len()).find(|&i| starts(i)).unwrap_or(bytes.len());
            let new = match draws.next(2) {
                0 => draws.of(numbers).as_bytes().to_vec(),
                _ => draws.of(words).clone(),
            };
            bytes.splice(begin..end, new);
        }
        _ => {
            let piece = bytes[draws.range(bytes.len())].to_vec();
            let piece = &piece[..piece.len().min(8)];
            let many = piece.repeat(draws.next(2000));
            bytes.splice(at..at, many);
        }
    }
    bytes.truncate(1 << 16);
}

fn fuzz(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|(n, _)| *n == name).expect("a target of this name");
    let corpus = corpus(name);
    let run = |input: &[u8], what: &str| {
        let begun = Instant::now();
        let accepted = catch_unwind(AssertUnwindSafe(|| target(input)))
            .unwrap_or_else(|_| panic!("{name}: {what}: panicked on b\"{}\"", input.escape_ascii()));
        let seconds = begun.elapsed().as_secs_f64();
        assert!(seconds < 5.0, "{name}: {what}: {seconds:.1} s for b\"{}\"", input.escape_ascii());
        accepted
    };
    for (file, bytes) in &corpus {
        // Control: the target comes to its end, and can refuse.
        assert_eq!(run(bytes, file), file.starts_with("ok-"), "{name}/{file}");
    }
    let words = words(&corpus.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect::<Vec<_>>());
    let (begun, mut accepted, mut done) = (Instant::now(), 0u64, 0u64);
    for number in 0..EFFORT.0 {
        if begun.elapsed() > Duration::from_secs(EFFORT.1) {
            break;
        }
        let mut draws = Draws(Seed(41).derive(&format!("{name}/{number}")), 0);
        let mut bytes = draws.of(&corpus).1.clone();
        for _ in 0..1 + draws.next(4) {
            mutate(&mut bytes, &corpus, &words, &mut draws);
        }
        accepted += u64::from(run(&bytes, &format!("mutation {number}")));
        done += 1;
    }
    println!("{name}: {done} mutations, {accepted} accepted");
    assert!(accepted > 0 && accepted < done, "mutations are neither all fine nor all refused at once");
}

#[test]
fn safetensors() {
    fuzz("safetensors");
}

#[test]
fn gguf() {
    fuzz("gguf");
}

#[test]
fn sharded_index() {
    fuzz("sharded_index");
}

#[test]
fn plan_toml() {
    fuzz("plan_toml");
}

#[test]
fn plan_json() {
    fuzz("plan_json");
}

#[test]
fn selector() {
    fuzz("selector");
}

#[test]
fn mergekit() {
    fuzz("mergekit");
}

#[test]
fn adapter_config() {
    fuzz("adapter_config");
}

#[test]
fn model_config() {
    fuzz("model_config");
}

#[test]
fn gguf_tokenizer() {
    fuzz("gguf_tokenizer");
}

#[test]
fn tokenizer_json() {
    fuzz("tokenizer_json");
}

#[test]
fn chat_template() {
    fuzz("chat_template");
}

/// Every target has a program for libFuzzer, a corpus and a test here.
#[test]
fn targets_are_complete() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let programs = std::fs::read_dir(folder.join("fuzz_targets")).unwrap();
    let mut names: Vec<String> =
        programs.map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    let mut targets: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
    targets.sort_unstable();
    assert_eq!(names, targets);
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    let source = include_str!("fuzzing.rs");
    for name in targets {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        assert!(source.contains(&format!("fuzz(\"{name}\")")), "{name}");
        assert!(corpus(name).len() > 1, "{name}");
    }
}
