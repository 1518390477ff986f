//! Checkpoint files: round trips, hostile input, and other programs' readers and writers.

mod gguf;
mod hostile;
mod python;
mod pytorch;
mod safetensors;
mod sharded;
mod writer;

use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::TensorSpec;
use indexmap::IndexMap;
use proptest::prelude::*;

pub type Tensor = (TensorSpec, Vec<u8>);

/// Up to eight tensors with distinct names and random bytes.
pub fn tensors(dtypes: Vec<DType>, names: &'static str) -> impl Strategy<Value = Vec<Tensor>> {
    let tensor = (prop::sample::select(dtypes), prop::collection::vec(0usize..5, 0..4), any::<u64>())
        .prop_map(|(dtype, mut shape, seed)| {
            if dtype.is_packed() {
                shape.push(dtype.block_len() * (1 + seed as usize % 2));
            }
            let size = dtype.bytes_for_shape(&shape).unwrap();
            let bytes =
                (0..size as u64).map(|i| (seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()[6]);
            (dtype, shape, bytes.collect::<Vec<u8>>())
        });
    prop::collection::hash_map(names, tensor, 0..8).prop_map(|map| {
        let sorted: std::collections::BTreeMap<_, _> = map.into_iter().collect();
        sorted
            .into_iter()
            .map(|(name, (dtype, shape, bytes))| (TensorSpec::new(name, dtype, shape), bytes))
            .collect()
    })
}

pub fn strings(pairs: &[(&str, &str)]) -> IndexMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}
