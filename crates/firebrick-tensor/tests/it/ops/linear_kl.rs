use burn::tensor::DType;
use firebrick_tensor::ops::{Divergence, linear_kl};

use super::support::{Case, devices, flat, host, normal, wide};

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
            for device in devices() {
                case.check(&device, 5e-6, Some(1e-8));
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
fn nothing_from_itself_and_no_gradient_for_the_teacher() {
    for device in devices().iter().map(|device| device.clone().autodiff()) {
        let hidden = flat(&normal("x", 5 * 8), &device, DType::F32).require_grad();
        let weight = flat(&normal("w", 8 * 33), &device, DType::F32).require_grad();
        let (h, w) = (hidden.clone().reshape([5, 8]), weight.clone().reshape([8, 33]));
        let zero = linear_kl(h.clone(), w.clone(), h.clone(), w.clone(), 1.0, Divergence::ForwardKl);
        assert_eq!(host(zero.inner()), [0.0; 5]);
        let teacher = flat(&normal("y", 5 * 8), &device, DType::F32).require_grad();
        let t = teacher.clone().reshape([5, 8]);
        let grads = linear_kl(h, w.clone(), t, w, 1.0, Divergence::ReverseKl).sum().backward();
        assert!(teacher.grad(&grads).is_none());
        assert!(hidden.grad(&grads).is_some() && weight.grad(&grads).is_some());
    }
}
