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

/// `file` below `target/models`; none where it is not, unless `FIREBRICK_REQUIRE` names `model`. `how` says how it gets there.
fn fetched(model: &str, file: &str, how: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/models").join(file);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("FIREBRICK_REQUIRE").unwrap_or_default();
    assert!(!required.contains(model), "{} is required and missing", path.display());
    println!("skipped: {how} the model this test needs");
    None
}

/// The folder of all-MiniLM-L6-v2.
fn minilm() -> Option<PathBuf> {
    let file = fetched("minilm", "minilm/model.safetensors", "`cargo xtask model minilm` fetches")?;
    file.parent().map(Path::to_path_buf)
}

/// The file of Gemma 3 270M.
fn gemma3() -> Option<PathBuf> {
    let how = "CONTRIBUTING.md says under which terms to fetch, and how,";
    fetched("gemma3", "gemma3/gemma-3-270m-q4_k_m.gguf", how)
}

/// The file of SmolLM2-135M-Instruct.
fn smollm2() -> Option<PathBuf> {
    let file = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    fetched("smollm2", file, "`cargo xtask model smollm2` fetches")
}
