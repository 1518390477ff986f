//! One suite for every op on every device, against plain f64 loops written here.

mod adamw;
mod attention;
mod cross_entropy;
mod decode_block;
mod embedding;
mod gelu;
mod grouped_matmul;
mod grouped_swiglu;
mod kv_cache;
mod linear;
mod linear_kl;
mod lora_linear;
mod packed;
mod permute;
mod rms_norm;
mod rope;
mod sparse_kl;
mod support;
mod swiglu;
mod threads;
