use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{AdamWOptions, adamw};

use super::support::{devices, error, flat, host, is_flex, normal, wide};

const OPTIONS: AdamWOptions =
    AdamWOptions { betas: [0.9, 0.99], eps: 1e-8, learning_rate: 0.03, weight_decay: 0.1, step: 1 };

/// Values and moments after three steps, in f64; the gradient of step `t` is `gradients[t]`.
fn reference(values: &[f64], gradients: &[Vec<f64>], o: AdamWOptions) -> [Vec<f64>; 3] {
    let n = values.len();
    let [mut w, mut m, mut v] = [values.to_vec(), vec![0.0; n], vec![0.0; n]];
    for (t, gradient) in gradients.iter().enumerate() {
        let correction = o.betas.map(|b| 1.0 - b.powi(t as i32 + 1));
        for i in 0..n {
            m[i] = o.betas[0] * m[i] + (1.0 - o.betas[0]) * gradient[i];
            v[i] = o.betas[1] * v[i] + (1.0 - o.betas[1]) * gradient[i] * gradient[i];
            let update = m[i] / correction[0] / ((v[i] / correction[1]).sqrt() + o.eps);
            w[i] -= o.learning_rate * (o.weight_decay * w[i] + update);
        }
    }
    [w, m, v]
}

#[test]
fn three_steps_agree_with_the_definition_and_with_the_composed_body() {
    for n in [1, 7, 33, 70_001] {
        let values = normal("values", n);
        let gradients = ["a", "b", "c"].map(|name| normal(name, n));
        let exact = gradients.each_ref().map(|g| wide(g));
        let want = reference(&wide(&values), &exact, OPTIONS);
        for device in devices() {
            // On a tape the composed body runs, without it the kernel; a second handle forbids writing in place.
            let on = |device: &Device, dtype, held: bool| -> [Vec<f64>; 3] {
                let start = flat(&values, device, dtype);
                let zeros = || Tensor::<1>::zeros([n], (device, dtype));
                let mut state = (start.clone(), zeros(), zeros());
                for (t, gradient) in gradients.iter().enumerate() {
                    let (w, m, v) = state.clone();
                    let kept = held.then(|| state.clone());
                    drop(state);
                    let options = AdamWOptions { step: t as u64 + 1, ..OPTIONS };
                    state = adamw(w, flat(gradient, device, dtype), m, v, options);
                    drop(kept);
                }
                assert_eq!(host(start), wide(&values), "the values handed in stay");
                [state.0, state.1, state.2].map(host)
            };
            let got = on(&device, DType::F32, false);
            for (name, (got, want)) in ["values", "first", "second"].iter().zip(got.iter().zip(&want)) {
                assert!(error(got, want) < 2e-6, "{name} of {n} on {device:?}: {:e}", error(got, want));
            }
            assert_eq!(on(&device, DType::F32, true), got, "held elsewhere");
            if is_flex(&device) {
                let tape = device.clone().autodiff();
                assert_eq!(on(&tape, DType::F32, false), got, "composed, {n}");
                assert!(error(&on(&device, DType::F64, false)[0], &want[0]) < 1e-12, "f64");
            }
            let wrong = reference(&wide(&values), &exact, AdamWOptions { weight_decay: 0.0, ..OPTIONS });
            assert!(error(&got[0], &wrong[0]) > 1e-3, "control");
        }
    }
}
