use burn::tensor::{Int, Tensor, TensorData};
use firebrick_tensor::ops::embedding;

use super::support::{Case, below, devices, normal};

#[test]
fn agrees_with_the_reference() {
    // More rows than there are words: some words come twice, and one at least never does in the last.
    for (vocab, d, n) in [(1, 1, 1), (5, 7, 11), (300, 33, 64)] {
        let ids = below("ids", n, vocab);
        let reference = |w: &[f64], ids: &[usize]| -> Vec<f64> {
            ids.iter().flat_map(|id| w[id * d..][..d].to_vec()).collect()
        };
        let case = Case {
            name: format!("embedding [{vocab}, {d}] of {n}"),
            inputs: vec![normal("weight", vocab * d)],
            op: &|t| {
                let weight = t.into_iter().next().expect("an input");
                let wide: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
                let ids = Tensor::<1, Int>::from_data(TensorData::new(wide, [n]), &weight.device());
                embedding(weight.reshape([vocab, d]), ids).reshape([n * d])
            },
            reference: &|t| reference(&t[0], &ids),
        };
        for device in devices() {
            case.check(&device, 2e-6, Some(1e-9));
            if vocab > 1 {
                let other: Vec<usize> = ids.iter().map(|id| (id + 1) % vocab).collect();
                case.refutes(&device, &|t| reference(&t[0], &other));
            }
        }
    }
}
