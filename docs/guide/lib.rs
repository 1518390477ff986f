//! The pages of the guide: `cargo test --doc` runs their code.
#![forbid(unsafe_code)]

#[doc = include_str!("start.md")]
pub mod start {}

#[doc = include_str!("core.md")]
pub mod core {}

#[doc = include_str!("tensor.md")]
pub mod tensor {}

#[doc = include_str!("models.md")]
pub mod models {}

#[doc = include_str!("train.md")]
pub mod train {}

#[doc = include_str!("analysis.md")]
pub mod analysis {}

#[doc = include_str!("peft.md")]
pub mod peft {}

#[doc = include_str!("moe.md")]
pub mod moe {}

#[doc = include_str!("merge.md")]
pub mod merge {}

#[doc = include_str!("quant.md")]
pub mod quant {}

#[doc = include_str!("distill.md")]
pub mod distill {}

#[doc = include_str!("elastic.md")]
pub mod elastic {}

#[doc = include_str!("evaluate.md")]
pub mod evaluate {}

#[doc = include_str!("bench.md")]
pub mod bench {}

#[doc = include_str!("family.md")]
pub mod family {}

#[doc = include_str!("extend.md")]
pub mod extend {}
