//! Integration tests.

mod blocks;
mod checkpoint;
mod ops;
mod stream;
