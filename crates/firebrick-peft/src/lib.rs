//! Parameter-efficient adapters and Hugging Face PEFT interchange.
//!
//! An adapter bank is a [`Brick`](firebrick_core::Brick) over the linear layers it adapts and a burn module whose parameters an optimizer
//! steps, while the wiring below stays frozen.
#![forbid(unsafe_code)]

mod error;
mod fit;
pub mod hf;
mod lora;

pub use error::PeftError;
pub use fit::{fit_lora, fit_lora_mixture};
pub use lora::{LoraBank, LoraConfig, LoraFactors, LoraSettings};
