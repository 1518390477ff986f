//! Text data, the training loop, optimizers, schedules and evaluation.
//!
//! [`fit`] trains any burn module (an adapter bank over a frozen decoder, or a decoder itself) on the windows of a
//! [`TextData`] and resumes bit for bit; [`fit_mixture`] does so on documents with loss masks ([`read_documents`]), packed into
//! [`Rows`] of which a [`Mixture`] draws, and stops early; [`perplexity`] and [`eval`] evaluate a decoder with bricks; [`domains`] are five small
//! texts that need no download.
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use firebrick_core::{Run, Seed, Silent};
//! use firebrick_models::{Decoder, DecoderConfig};
//! use firebrick_train::{TextData, TrainConfig, fit};
//!
//! # let config: DecoderConfig = DecoderConfig::from_hf(&serde_json::json!({
//! #     "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
//! #     "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5
//! # })).unwrap();
//! let device = Device::flex().autodiff();
//! let decoder = Decoder::random(config, Seed(1), &device)?.trainable();
//! let data = TextData::new((0..200).map(|i| i % 16).collect(), 200);
//! let settings = TrainConfig { steps: 3, batch: 2, window: 10, learning_rate: 1e-2, ..TrainConfig::default() };
//! let loss = &mut |decoder: &Decoder, tokens: Tensor<2, Int>, seed| {
//!     let mut run = Run::new(&[]);
//!     run.seed = seed;
//!     decoder.nll(tokens, &mut run).mean()
//! };
//! let (decoder, report) = fit(decoder, &settings, &data, loss, &Silent, false)?;
//! assert_eq!(report.steps, 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod adamw;
mod checkpoint;
mod clip;
mod data;
mod documents;
mod domains;
mod error;
pub mod eval;
mod lamb;
mod lars;
mod layer_rates;
mod mixture;
mod optimizer;
mod params;
mod recompute;
mod retrieval;
mod rows;
mod schedule;
mod step_memory;
mod trainer;

pub use adamw::AdamW;
pub use clip::clip_global_norm;
pub use data::{Batches, TextData};
pub use documents::{BadLine, Document, read_documents};
pub use domains::{Domain, domain, domains};
pub use error::TrainError;
pub use eval::{EvalReport, perplexity};
pub use firebrick_models::token_tensor;
pub use lamb::Lamb;
pub use lars::{Lars, LarsForm};
pub use layer_rates::{layer_decay, site_groups};
pub use mixture::{Draw, Mixture, Sampler, Stage, dmt, multi_task, sequential, specialist_or_generalist};
pub use optimizer::Group;
pub use params::ordered_sum;
pub use recompute::{Wired, recompute};
pub use retrieval::{RetrievalReport, pearson, rank, recall_at, reciprocal_rank, retrieval, spearman};
pub use rows::{Average, Batch, Rows, held_out_loss};
pub use schedule::Schedule;
pub use step_memory::StepMemory;
pub use trainer::{
    HeldOut, HeldOutLoss, Loss, Optimizer, Pass, TrainConfig, TrainReport, fit, fit_mixture, fit_passes,
};
