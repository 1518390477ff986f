//! Merges of small checkpoints, from their YAML to the file that is written.

mod mergekit;
mod merges;
mod mistakes;
mod plans;
