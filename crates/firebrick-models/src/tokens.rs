//! Token ids on a device.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Stacks windows of equal length into `[windows, tokens]` on `device`.
///
/// # Panics
/// If the windows differ in length.
pub fn token_tensor(windows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let tokens = windows.first().map_or(0, |w| w.len());
    assert!(windows.iter().all(|w| w.len() == tokens), "windows of a batch have one length");
    let ids: Vec<i32> = windows.iter().flat_map(|w| w.iter().map(|&id| id as i32)).collect();
    Tensor::from_data(TensorData::new(ids, [windows.len(), tokens]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_hold_the_ids() {
        let tensor = token_tensor(&[&[1, 2, 3], &[4, 5, 70000]], &Device::flex());
        assert_eq!(tensor.dims(), [2, 3]);
        assert_eq!(tensor.into_data().iter::<i64>().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 70000]);
    }
}
