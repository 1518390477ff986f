//! TEMPORARY.
#![allow(clippy::print_stderr)]
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use firebrick_tensor::ops::*;
use std::time::Instant;

use super::support::{below, flat, normal};

fn time(name: &str, mut f: impl FnMut()) {
    f();
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    eprintln!("{name:50} {:10.3} ms", best * 1e3);
}

fn leaf<const D: usize>(name: &str, shape: [usize; D]) -> Tensor<D> {
    let n = shape.iter().product();
    flat(&normal(name, n), &Device::flex(), DType::F32).reshape(shape)
}
fn ad<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(x.clone()).require_grad()
}

fn both<const D: usize>(name: &str, inputs: &[Tensor<D>], f: impl Fn(&[Tensor<D>]) -> Tensor<D>) {
    time(&format!("{name} fwd"), || {
        std::hint::black_box(f(inputs));
    });
    let y = f(inputs);
    let w = y.ones_like();
    time(&format!("{name} fwd+bwd"), || {
        let leaves: Vec<_> = inputs.iter().map(ad).collect();
        let y = f(&leaves);
        let g = (y * Tensor::from_inner(w.clone())).sum().backward();
        std::hint::black_box(leaves[0].grad(&g));
    });
}

#[test]
#[ignore]
fn speed() {
    for [n, d] in [[512, 576], [2048, 2048]] {
        let (x, gamma) = (leaf("x", [n, d]), leaf("g", [1, d]));
        both(&format!("rms_norm {n}x{d} kernel"), &[x.clone(), gamma.clone()], |t| {
            rms_norm(t[0].clone(), t[1].clone().reshape([d]), 1e-5)
        });
        both(&format!("rms_norm {n}x{d} composed"), &[x, gamma], |t| {
            let x = t[0].clone();
            let rms = (x.clone().square().mean_dim(1) + 1e-5).sqrt();
            x / rms * t[1].clone()
        });
    }
    for [n, d] in [[512, 1536], [2048, 5632]] {
        let (x, u) = (leaf("x", [n, d]), leaf("g", [n, d]));
        both(&format!("swiglu {n}x{d} kernel"), &[x.clone(), u.clone()], |t| {
            swiglu(t[0].clone(), t[1].clone())
        });
        both(&format!("swiglu {n}x{d} composed"), &[x, u], |t| activation::silu(t[0].clone()) * t[1].clone());
    }
    {
        let x = leaf("x", [2, 256, 9, 64]);
        let (c, s) = (leaf("c", [256, 32]), leaf("s", [256, 32]));
        let up = |t: &Tensor<4>, x: &Tensor<2>| {
            if t.is_autodiff() { Tensor::from_inner(x.clone()) } else { x.clone() }
        };
        both("rope 2x9x256x64 kernel", std::slice::from_ref(&x), |t| {
            rope(t[0].clone().swap_dims(1, 2), up(&t[0], &c), up(&t[0], &s))
        });
        both("rope 2x9x256x64 composed", &[x], |t| {
            let x = t[0].clone().swap_dims(1, 2);
            let (x1, x2) = (x.clone().narrow(3, 0, 32), x.narrow(3, 32, 32));
            let (c, s) = (up(&t[0], &c).unsqueeze::<4>(), up(&t[0], &s).unsqueeze::<4>());
            Tensor::cat(vec![x1.clone() * c.clone() - x2.clone() * s.clone(), x2 * c + x1 * s], 3)
        });
    }
    for t in [256, 1024] {
        let (q, k, v) = (leaf("q", [2, 9, t, 64]), leaf("k", [2, 3, t, 64]), leaf("v", [2, 3, t, 64]));
        both(&format!("attention 2x9/3x{t}x64 kernel"), &[q.clone(), k.clone(), v.clone()], |x| {
            let o = AttentionOptions { scale: 0.125, causal: true, window: None, softcap: None };
            attention(x[0].clone(), x[1].clone(), x[2].clone(), o)
        });
        both(&format!("attention 2x9/3x{t}x64 composed"), &[q.clone(), k.clone(), v.clone()], |x| {
            let q = x[0].clone().reshape([2, 3, 3 * t, 64]);
            let s = (q.matmul(x[1].clone().swap_dims(2, 3)) * 0.125).reshape([2, 9, t, t]);
            let mask = Tensor::<2, burn::tensor::Bool>::tril_mask([t, t], 0, &x[0].device());
            let s = s.mask_fill(mask.unsqueeze::<4>().expand([2, 9, t, t]), f32::NEG_INFINITY);
            let p = activation::softmax(s, 3).reshape([2, 3, 3 * t, t]);
            p.matmul(x[2].clone()).reshape([2, 9, t, 64])
        });
        both(&format!("attention 2x9x{t}x64 burn (kv repeated)"), &[q, k, v], |x| {
            let wide = |x: &Tensor<4>| {
                x.clone().reshape([2, 3, 1, t, 64]).expand([2, 3, 3, t, 64]).reshape([2, 9, t, 64])
            };
            burn::tensor::module::attention(
                x[0].clone(),
                wide(&x[1]),
                wide(&x[2]),
                None,
                None,
                burn::tensor::ops::AttentionModuleOptions { scale: None, softcap: None, is_causal: true },
            )
        });
    }
    for n in [256, 512] {
        let (h, w) = (leaf("h", [n, 576]), leaf("w", [576, 49152]));
        let t: Vec<i32> = below("t", n, 49152).into_iter().map(|t| t as i32).collect();
        let t = Tensor::<1, Int>::from_data(TensorData::new(t, [n]), &Device::flex());
        let up = |x: &Tensor<2>| if x.is_autodiff() { Tensor::from_inner(t.clone()) } else { t.clone() };
        both(&format!("linear CE {n} kernel"), &[h.clone(), w.clone()], |x| {
            linear_cross_entropy(x[0].clone(), x[1].clone(), up(&x[0])).reshape([n, 1])
        });
        both(&format!("linear CE {n} composed"), &[h.clone(), w.clone()], |x| {
            activation::log_softmax(x[0].clone().matmul(x[1].clone()), 1)
                .gather(1, up(&x[0]).reshape([n, 1]))
                .neg()
        });
        let w = w.clone();
        time(&format!("linear CE {n} kernel, frozen head, fwd+bwd"), || {
            let l = ad(&h);
            let y =
                linear_cross_entropy(l.clone(), Tensor::from_inner(w.clone()), Tensor::from_inner(t.clone()));
            std::hint::black_box(l.grad(&y.sum().backward()));
        });
        time(&format!("linear CE {n} composed, frozen head, fwd+bwd"), || {
            let l = ad(&h);
            let y = activation::log_softmax(l.clone().matmul(Tensor::from_inner(w.clone())), 1)
                .gather(1, Tensor::from_inner(t.clone()).reshape([n, 1]))
                .neg();
            std::hint::black_box(l.grad(&y.sum().backward()));
        });
    }
    {
        let (x, w) = (leaf("x", [1024, 576]), leaf("w", [8 * 576, 1536]));
        let offsets = [0, 100, 250, 300, 500, 600, 800, 900, 1024];
        both("grouped 1024x576x1536, 8 experts kernel", &[x.clone(), w.clone()], |t| {
            grouped_matmul(t[0].clone(), t[1].clone().reshape([8, 576, 1536]), &offsets)
        });
        both("grouped composed", &[x.clone(), w.clone()], |t| {
            let parts = (0..8)
                .map(|e| {
                    let x = t[0].clone().narrow(0, offsets[e], offsets[e + 1] - offsets[e]);
                    x.matmul(t[1].clone().slice([e * 576..(e + 1) * 576]))
                })
                .collect();
            Tensor::cat(parts, 0)
        });
        time("dense 1024x576x1536", || {
            std::hint::black_box(x.clone().matmul(w.clone().slice([0..576])));
        });
    }
    for (d_in, d_out) in [(576, 1536), (2048, 5632)] {
        let codes: Vec<u8> = below("codes", d_in * d_out, 16).into_iter().map(|c| c as u8).collect();
        let ones = || Tensor::<2>::ones([d_in / 64, d_out], &Device::flex());
        let packed = PackedMatrix::pack(&codes, d_in, d_out, 4, 64, ones(), ones() * 8);
        let w = packed.unpack();
        for rows in [1, 4, 7, 8, 256] {
            let x = leaf("x", [rows, d_in]);
            time(&format!("packed {rows}x{d_in}x{d_out}"), || {
                std::hint::black_box(packed_matmul(x.clone(), &packed));
            });
            time(&format!("dense  {rows}x{d_in}x{d_out}"), || {
                std::hint::black_box(x.clone().matmul(w.clone()));
            });
        }
        time(&format!("unpack {d_in}x{d_out}"), || {
            std::hint::black_box(packed.unpack());
        });
    }
}
