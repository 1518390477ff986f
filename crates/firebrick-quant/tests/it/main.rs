//! Quantized models: packed and dequantized weights compute the same, and GPTQ beats rounding on a trained model.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]
#![allow(clippy::disallowed_methods, reason = "tests are told by the environment what is there")]

mod gguf;
mod model;
mod packed;
