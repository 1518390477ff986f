//! Wirings of pretrained architectures, tokenizers, chat templates and generation.
//!
//! The forward pass of an architecture is written once and asks at every [`Site`](firebrick_core::Site) whether a
//! [`Brick`](firebrick_core::Brick) sits there; see
//! [`Decoder`] and, for texts as vectors, [`Encoder`].
#![forbid(unsafe_code)]

mod attention_taps;
pub mod chat;
mod config;
mod constant;
mod decoder;
mod diff;
mod encoder;
mod error;
mod export;
mod family;
mod generate;
pub mod hub;
mod model;
mod rotary;
pub mod sampling;
pub mod token_alignment;
pub mod tokenizer;
mod tokens;
mod weights;

pub use attention_taps::AttentionTaps;
pub use config::{Activation, Biases, DecoderConfig, GgufTensors, NormPlacement};
pub use constant::constant_on;
pub use decoder::Decoder;
pub use diff::{Diff, Stored, SumDiff, TensorDiff, ValueDiff, diff, diff_checkpoints};
pub use encoder::{
    EmbedOptions, Encoder, EncoderConfig, EncoderFiles, EncoderModel, EncoderWeights, Padding, Pooling,
    SentenceConfig, TokenTypes, cosine, cosine_matrix, normalize, pool,
};
pub use error::ModelError;
pub use export::{EncodedWeight, Export, ExportType};
pub use family::Family;
pub use family::bert::EncoderTensor;
pub use generate::{AdjustLogits, GenerateOptions, generate, generate_with};
pub use model::{Model, ModelFiles};
pub use rotary::RopeScaling;
pub use tokens::token_tensor;
pub use weights::{CheckpointWeights, GgufForm, TensorSource};
