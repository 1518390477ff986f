//! Shared device harness for the benchmarks.
