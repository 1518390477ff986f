//! Custom ops with their kernels: one file per op, a composed default body, kernels and a backward pass.
//!
//! Every function here takes ordinary burn tensors and works on any device the crate was built for. Behind it
//! is a backend trait whose default body composes burn's own ops (the reference, and what a device without a
//! kernel runs); a backend with a kernel overrides the method, and gradients are hand-written. [`decode_block`] alone is the kernel
//! without the rest: it says where it has none.

mod adamw;
mod attention;
mod attention_cpu;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod awake;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cubecl-backend")]
mod cross_entropy_cube;
#[cfg(feature = "cubecl-backend")]
mod cube;
mod decode_block;
mod embedding;
mod gelu;
mod gemm_bf16;
mod gemm_f32;
mod grouped_matmul;
#[cfg(feature = "cubecl-backend")]
mod grouped_matmul_cube;
mod grouped_swiglu;
#[cfg(all(test, target_os = "linux"))]
mod guarded;
mod kv_cache;
mod linear;
mod linear_cross_entropy;
mod linear_kl;
mod lora_linear;
mod matmul;
mod packed;
mod packed_blocks;
#[cfg(feature = "cubecl-backend")]
mod packed_cube;
mod packed_dots;
mod packed_f32;
mod permute;
mod rms_norm;
#[cfg(feature = "cubecl-backend")]
mod rms_norm_cube;
mod rope;
#[cfg(feature = "cubecl-backend")]
mod rope_cube;
mod sparse_kl;
mod swiglu;

pub use adamw::{AdamWOptions, adamw};
pub use attention::{AttentionOptions, Segments, attention, segmented_attention};
pub use awake::awake;
pub use cross_entropy::cross_entropy;
pub use decode_block::{
    BlockLinear, BlockMatrix, BlockOptions, BlockPacked, BlockWeights, Gate, PackedWeight, decode_block,
};
pub use embedding::embedding;
pub use gelu::gelu;
pub use grouped_matmul::grouped_matmul;
pub use grouped_swiglu::grouped_swiglu;
pub use kv_cache::KvCache;
pub use linear::{linear, linear_add};
pub use linear_cross_entropy::linear_cross_entropy;
pub use linear_kl::{Divergence, kl, linear_kl};
pub use lora_linear::lora_linear;
pub use matmul::Precision;
pub use packed::{PackedInputs, PackedMatrix, packed_matmul};
pub use permute::{permute, unpermute};
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use sparse_kl::{linear_sparse_kl, sparse_kl};
pub use swiglu::swiglu;
