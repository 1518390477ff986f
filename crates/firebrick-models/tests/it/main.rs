//! Integration tests, in one binary.

mod decoder;
mod export;
mod smollm2;
mod tokenizer;
