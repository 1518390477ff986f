//! Merges of small checkpoints, from their YAML to the file that is written; fusion of what models predict.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they measured or skipped")]

mod distribution_fusion;
mod drift;
mod extract_lora;
mod golden;
mod inputs;
mod logits_fusion;
mod mergekit;
mod merges;
mod methods;
mod mistakes;
mod ot_fusion;
mod plans;
mod quality;
mod specialists;
mod twin;
mod vocabulary_transplant;
mod weak_to_strong;
mod weight_search;
