//! Integration tests, in one binary.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod decoder;
mod diff;
mod encoder;
mod export;
mod families;
mod gemma3;
mod generate;
mod minilm;
mod model;
mod smollm2;
mod tokenizer;

use std::path::{Path, PathBuf};

/// The folder of all-MiniLM-L6-v2; none where it was not fetched, unless `FIREBRICK_REQUIRE` names `minilm`.
fn minilm() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("target/models/minilm");
    if path.join("model.safetensors").exists() {
        return Some(path);
    }
    let required = std::env::var("FIREBRICK_REQUIRE").unwrap_or_default();
    assert!(!required.contains("minilm"), "{} is required and missing", path.display());
    println!("skipped: `cargo xtask model minilm` fetches the model this test needs");
    None
}

/// The file of Gemma 3 270M; none where nobody put it, unless `FIREBRICK_REQUIRE` names `gemma3`.
fn gemma3() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("target/models/gemma3/gemma-3-270m-q4_k_m.gguf");
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("FIREBRICK_REQUIRE").unwrap_or_default();
    assert!(!required.contains("gemma3"), "{} is required and missing", path.display());
    println!("skipped: CONTRIBUTING.md says under which terms to fetch the model this test needs, and how");
    None
}

/// The file of SmolLM2-135M-Instruct; none where it was not fetched, unless `FIREBRICK_REQUIRE` names `smollm2`.
fn smollm2() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("target/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("FIREBRICK_REQUIRE").unwrap_or_default();
    assert!(!required.contains("smollm2"), "{} is required and missing", path.display());
    println!("skipped: `cargo xtask model smollm2` fetches the model this test needs");
    None
}
