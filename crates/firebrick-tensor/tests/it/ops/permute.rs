use firebrick_core::Seed;
use firebrick_tensor::ops::{permute, unpermute};

use super::support::{Case, devices, normal};

/// Slots `0..n` in some order.
fn order(n: usize) -> Vec<usize> {
    let draws = Seed(n as u64).uniform("order", n, 1.0);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| draws[a].total_cmp(&draws[b]));
    order
}

/// Tokens, slots for each, width.
const SHAPES: [(usize, usize, usize); 4] = [(1, 1, 1), (5, 2, 7), (13, 3, 33), (300, 4, 65)];

#[test]
fn permute_agrees_with_the_reference() {
    for (tokens, k, d) in SHAPES {
        let order = order(tokens * k);
        let reference = |x: &[f64], order: &[usize]| -> Vec<f64> {
            order.iter().flat_map(|slot| x[slot / k * d..][..d].to_vec()).collect()
        };
        let case = Case {
            name: format!("permute [{tokens}, {d}], {k} slots"),
            inputs: vec![normal("x", tokens * d)],
            op: &|t| {
                let x = t.into_iter().next().expect("an input").reshape([tokens, d]);
                permute(x, &order).reshape([tokens * k * d])
            },
            reference: &|t| reference(&t[0], &order),
        };
        for device in devices() {
            case.check(&device, 1e-6, Some(1e-9));
            if tokens > 1 {
                let mut other = order.clone();
                other.rotate_left(1);
                case.refutes(&device, &|t| reference(&t[0], &other));
            }
        }
    }
}

#[test]
fn unpermute_agrees_with_the_reference() {
    for (tokens, k, d) in SHAPES {
        let order = order(tokens * k);
        let reference = |rows: &[f64], weights: &[f64], order: &[usize]| {
            let mut out = vec![0.0; tokens * d];
            for (row, slot) in rows.chunks(d).zip(order) {
                for (y, x) in out[slot / k * d..][..d].iter_mut().zip(row) {
                    *y += weights[*slot] * x;
                }
            }
            out
        };
        let case = Case {
            name: format!("unpermute [{tokens}, {d}], {k} slots"),
            inputs: vec![normal("rows", tokens * k * d), normal("weights", tokens * k)],
            op: &|t| {
                let [rows, weights] = t.try_into().expect("two inputs");
                unpermute(rows.reshape([tokens * k, d]), weights.reshape([tokens, k]), &order)
                    .reshape([tokens * d])
            },
            reference: &|t| reference(&t[0], &t[1], &order),
        };
        for device in devices() {
            case.check(&device, 2e-6, Some(1e-9));
            if tokens > 1 {
                let mut other = order.clone();
                other.rotate_left(1);
                case.refutes(&device, &|t| reference(&t[0], &t[1], &other));
            }
        }
    }
}

#[test]
#[should_panic(expected = "one of them twice")]
fn an_order_with_a_slot_twice_is_refused() {
    permute(burn::tensor::Tensor::zeros([2, 3], &burn::tensor::Device::flex()), &[0, 1, 1, 3]);
}
