use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{Divergence, linear_kl};

use super::support::{Case, devices, devices_and, error, flat, host, is_flex, normal, of_products, wide};

fn log_probabilities(x: &[f64], w: &[f64], d: usize, temperature: f64) -> Vec<Vec<f64>> {
    let vocab = w.len() / d;
    let row = |x: &[f64]| {
        let logit = |j: usize| (0..d).map(|i| x[i] * w[i * vocab + j]).sum::<f64>() / temperature;
        let logits: Vec<f64> = (0..vocab).map(logit).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
        let sum = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        logits.into_iter().map(|x| x - sum).collect()
    };
    x.chunks(d).map(row).collect()
}

fn kl(p: &[Vec<f64>], q: &[Vec<f64>]) -> Vec<f64> {
    p.iter().zip(q).map(|(p, q)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()).collect()
}

#[test]
fn agrees_with_the_reference() {
    for (n, ds, dt, vocab, temperature) in [(1, 1, 1, 2, 1.0), (5, 7, 3, 11, 1.0), (17, 8, 16, 101, 2.5)] {
        let (teacher, teacher_weight) = (normal("teacher", n * dt), normal("teacher weight", dt * vocab));
        for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
            let reference = |x: &[Vec<f64>], divergence: Divergence, temperature: f64| {
                let s = log_probabilities(&x[0], &x[1], ds, temperature);
                let t = log_probabilities(&wide(&teacher), &wide(&teacher_weight), dt, temperature);
                match divergence {
                    Divergence::ForwardKl => kl(&t, &s),
                    Divergence::ReverseKl => kl(&s, &t),
                }
            };
            let case = Case {
                name: format!("linear_kl [{n}, {ds}/{dt}, {vocab}] {divergence:?} at {temperature}"),
                inputs: vec![normal("student", n * ds), normal("student weight", ds * vocab)],
                op: &|x| {
                    let [student, weight] = x.try_into().expect("two inputs");
                    let (device, dtype) = (student.device(), student.dtype());
                    linear_kl(
                        student.reshape([n, ds]),
                        weight.reshape([ds, vocab]),
                        flat(&teacher, &device, dtype).reshape([n, dt]),
                        flat(&teacher_weight, &device, dtype).reshape([dt, vocab]),
                        temperature,
                        divergence,
                    )
                },
                reference: &|x| reference(x, divergence, temperature),
            };
            for device in devices_and(n == 17) {
                case.check(&device, of_products(&device, 5e-6), Some(1e-8));
                if n > 1 {
                    let other = match divergence {
                        Divergence::ForwardKl => Divergence::ReverseKl,
                        Divergence::ReverseKl => Divergence::ForwardKl,
                    };
                    case.refutes(&device, &|x| reference(x, other, temperature));
                    case.refutes(&device, &|x| reference(x, divergence, temperature * 2.0));
                }
            }
        }
    }
}

#[test]
fn nothing_from_itself() {
    for device in devices() {
        let hidden = flat(&normal("x", 5 * 8), &device, DType::F32).reshape([5, 8]);
        let weight = flat(&normal("w", 8 * 33), &device, DType::F32).reshape([8, 33]);
        for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
            let from = |teacher: Tensor<2>, tape: bool| {
                let to = |x: Tensor<2>| if tape { Tensor::from_inner(x) } else { x };
                let (h, w) = (to(hidden.clone()), to(weight.clone()));
                let kl = linear_kl(h, w.clone(), to(teacher), w, 1.0, divergence);
                host(if tape { kl.inner() } else { kl })
            };
            for tape in [false, true] {
                // Two kernels of a GPU may round differently.
                let most = if is_flex(&device) { 0.0 } else { 1e-6 };
                let zero = from(hidden.clone(), tape);
                assert!(zero.iter().all(|kl| kl.abs() <= most), "{divergence:?} on {device:?}: {zero:?}");
                let near = from(hidden.clone() * 1.01, tape);
                assert!(near.iter().all(|&kl| kl > 1e-6), "control: a teacher that is near has {near:?}");
            }
        }
    }
}

/// Divergence of `rows` rows from their heads, with the gradients of the student and its weight.
fn with_gradients(
    device: &Device,
    rows: std::ops::Range<usize>,
    [d, vocab]: [usize; 2],
    divergence: Divergence,
) -> [Vec<f64>; 3] {
    let some = |name: &str, width: usize| {
        let all = normal(name, rows.end * width);
        flat(&all[rows.start * width..], device, DType::F32)
    };
    let head = |name: &str| flat(&normal(name, d * vocab), device, DType::F32);
    let (student, weight) = (some("x", d).require_grad(), head("w").require_grad());
    let kl = linear_kl(
        student.clone().reshape([rows.len(), d]),
        weight.clone().reshape([d, vocab]),
        some("y", d).reshape([rows.len(), d]),
        head("v").reshape([d, vocab]),
        1.0,
        divergence,
    );
    let grads = (kl.clone() * some("weights", 1)).sum().backward();
    let grad = |leaf: &Tensor<1>| host(leaf.grad(&grads).expect("a gradient"));
    [host(kl.inner()), grad(&student), grad(&weight)]
}

/// 680 rows of 50021 logits are two chunks; 340 rows are one.
#[test]
fn chunks_of_rows_join() {
    let (n, sizes) = (680, [3, 50_021]);
    let run = |rows| with_gradients(&Device::flex().autodiff(), rows, sizes, Divergence::ReverseKl);
    let (whole, first, second) = (run(0..n), run(0..n / 2), run(n / 2..n));
    let join = |a: &[f64], b: &[f64]| [a, b].concat();
    let sum: Vec<f64> = first[2].iter().zip(&second[2]).map(|(a, b)| a + b).collect();
    let parts = [join(&first[0], &second[0]), join(&first[1], &second[1]), sum];
    for (what, (got, want)) in ["values", "student", "weight"].iter().zip(whole.iter().zip(&parts)) {
        let e = error(got, want);
        assert!(e < 1e-5, "{what}: off by {e:e}");
    }
    assert!(error(&whole[0], &join(&second[0], &first[0])) > 1e-2, "control: the halves differ");
    assert!(error(&whole[2], &first[2]) > 1e-2, "control: one chunk is not all of the gradient");
}

#[test]
fn long_rows_agree_on_every_device() {
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
        let run = |device: &Device| with_gradients(&device.clone().autodiff(), 0..3, [3, 50_021], divergence);
        let want = run(&Device::flex());
        for device in devices() {
            for (what, (got, want)) in
                ["values", "student", "weight"].iter().zip(run(&device).iter().zip(&want))
            {
                let e = error(got, want);
                let bound = of_products(&device, 1e-4);
                assert!(e < bound, "{what} {divergence:?}: off by {e:e} on {device:?}");
            }
        }
    }
}

#[test]
fn no_gradient_for_the_teacher() {
    for device in devices().iter().map(|device| device.clone().autodiff()) {
        let hidden = flat(&normal("x", 5 * 8), &device, DType::F32).require_grad();
        let weight = flat(&normal("w", 8 * 33), &device, DType::F32).require_grad();
        let (h, w) = (hidden.clone().reshape([5, 8]), weight.clone().reshape([8, 33]));
        let teacher = flat(&normal("y", 5 * 8), &device, DType::F32).require_grad();
        let t = teacher.clone().reshape([5, 8]);
        let grads = linear_kl(h, w.clone(), t, w, 1.0, Divergence::ReverseKl).sum().backward();
        assert!(teacher.grad(&grads).is_none());
        assert!(hidden.grad(&grads).is_some() && weight.grad(&grads).is_some());
    }
}
