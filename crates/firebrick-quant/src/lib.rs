//! Post-training quantization: round-to-nearest, GPTQ, packed layers and exports.
//!
//! A quantizer turns the weight of a linear layer into codes on a [`Grid`](firebrick_tensor::grid::Grid) ([`QuantizedMatrix`]);
//! [`PackedLinear`] is the brick that computes with them, [`quantize`] walks a whole model, block after block.
#![forbid(unsafe_code)]

mod bit_losses;
mod error;
mod gguf;
mod gptq;
mod matrix;
mod packed_linear;
mod rtn;
mod sequential;

pub use bit_losses::gptq_bit_losses;
pub use error::QuantError;
pub use gguf::{Blocks, Packing, gguf_blocks, gguf_weights};
pub use gptq::{GptqConfig, GptqReport, gptq};
pub use matrix::QuantizedMatrix;
pub use packed_linear::PackedLinear;
pub use rtn::rtn;
pub use sequential::{Method, QuantConfig, QuantizedModel, SiteReport, quantize};
