//! Integration tests, in one binary.

mod tokenizer;
