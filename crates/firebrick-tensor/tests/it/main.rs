//! Integration tests.

mod blocks;
mod checkpoint;
