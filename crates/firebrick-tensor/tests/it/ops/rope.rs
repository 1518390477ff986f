use burn::tensor::DType;
use firebrick_tensor::ops::rope;

use super::support::{Case, devices, flat, normal, wide};

/// `pair(j, half)` are the two columns that turn together.
fn reference(
    x: &[f64],
    cos: &[f64],
    sin: &[f64],
    d: usize,
    pair: impl Fn(usize, usize) -> [usize; 2],
) -> Vec<f64> {
    let (half, tokens) = (d / 2, cos.len() / (d / 2));
    let mut out = vec![0.0; x.len()];
    for (row, (out, x)) in out.chunks_mut(d).zip(x.chunks(d)).enumerate() {
        for j in 0..half {
            let [a, b] = pair(j, half);
            let at = row % tokens * half + j;
            out[a] = x[a] * cos[at] - x[b] * sin[at];
            out[b] = x[b] * cos[at] + x[a] * sin[at];
        }
    }
    out
}

fn halves(j: usize, half: usize) -> [usize; 2] {
    [j, j + half]
}

#[test]
fn agrees_with_the_reference() {
    for [batch, heads, tokens, d] in
        [[1, 1, 1, 2], [2, 3, 5, 8], [1, 2, 7, 6], [2, 3, 11, 64], [1, 9, 67, 64]]
    {
        let angles = normal("angles", tokens * d / 2);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let n = batch * heads * tokens * d;
        // As rows of a projection, `[batch, tokens, heads, d]`, the way a model hands them over.
        let order = |x: &[f64]| -> Vec<f64> {
            let at = |i: usize| {
                let (b, h, t, j) = (i / d / tokens / heads, i / d / tokens % heads, i / d % tokens, i % d);
                x[((b * tokens + t) * heads + h) * d + j]
            };
            (0..n).map(at).collect()
        };
        for device in devices() {
            for transposed in [false, true] {
                let shape = if transposed { [batch, tokens, heads, d] } else { [batch, heads, tokens, d] };
                let case = Case {
                    name: format!("rope {shape:?}, transposed {transposed}"),
                    inputs: vec![normal("x", n)],
                    op: &|t| {
                        let [x] = t.try_into().expect("one input");
                        let (device, dtype) = (x.device(), x.dtype());
                        let x = x.reshape(shape);
                        let x = if transposed { x.swap_dims(1, 2) } else { x };
                        let angles = |a: &[f32]| flat(a, &device, dtype).reshape([tokens, d / 2]);
                        rope(x, angles(&cos), angles(&sin)).reshape([n])
                    },
                    reference: &|t| {
                        let x = if transposed { order(&t[0]) } else { t[0].clone() };
                        reference(&x, &wide(&cos), &wide(&sin), d, halves)
                    },
                };
                case.check(&device, 1e-6, Some(1e-7));
                if d > 2 && !transposed {
                    case.refutes(&device, &|t| {
                        reference(&t[0], &wide(&cos), &wide(&sin), d, |j, _| [2 * j, 2 * j + 1])
                    });
                }
            }
        }
    }
}

#[test]
fn rotation_keeps_lengths() {
    let device = burn::tensor::Device::flex();
    let angles = normal("angles", 5 * 4);
    let turn = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
        flat(&values, &device, DType::F32).reshape([5, 4])
    };
    let x = flat(&normal("x", 2 * 3 * 5 * 8), &device, DType::F32).reshape([2, 3, 5, 8]);
    let y = rope(x.clone(), turn(f32::cos), turn(f32::sin));
    let norm = |x: burn::tensor::Tensor<4>| super::support::host(x.square().sum_dim(3).reshape([30]));
    assert!(super::support::error(&norm(y), &norm(x)) < 1e-6);
}
