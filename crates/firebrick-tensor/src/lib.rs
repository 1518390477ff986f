//! Checkpoints, the streaming executor, block formats, host linear algebra and every custom op.
//!
//! This is the only crate that knows burn's backends; everything above it uses burn's public tensors.

pub mod block;
pub mod checkpoint;
pub mod grid;
pub mod imatrix;
pub mod linalg;
#[cfg(feature = "mimalloc")]
pub mod memory;
pub mod ops;
pub mod stream;
