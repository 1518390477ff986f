//! Merges of small checkpoints, from their YAML to the file that is written.

mod golden;
mod inputs;
mod mergekit;
mod merges;
mod methods;
mod mistakes;
mod ot_fusion;
mod plans;
mod twin;
