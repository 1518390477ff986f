//! RAM: task vectors averaged where several models change an element by more than `epsilon`, and kept whole where one does.
//!
//! RAM+ scales what one model alone changes by `1 + r min(rho, alpha)`, `rho` its shared over its own elements.

use super::values::count;
use super::{Kernel, TensorMerge};

pub(super) fn ram(tensor: &TensorMerge<'_>, plus: bool) -> Result<Kernel, String> {
    let (base, of, round) = (tensor.base()?, tensor.others(), tensor.rounding());
    let models = of.len();
    let epsilon = tensor.global.epsilon as f32;
    // How much each model changes `i`, and how many do.
    let active = move |i: usize, inputs: &[&[f32]], of: &[usize], deltas: &mut [f32]| {
        let mut count = 0;
        for (delta, m) in deltas.iter_mut().zip(of) {
            *delta = round.round(inputs[*m][i] - inputs[base][i]);
            if delta.abs() > epsilon {
                count += 1;
            } else {
                *delta = 0.0;
            }
        }
        count
    };
    let mut gains = vec![1.0f32; models];
    if plus {
        let counts = count(tensor.inputs, tensor.elements(), 2 * models, |range, views, counts| {
            let mut deltas = vec![0.0; models];
            for i in 0..range.len() {
                let several = active(i, views, &of, &mut deltas) > 1;
                for (m, _) in deltas.iter().enumerate().filter(|(_, delta)| **delta != 0.0) {
                    counts[2 * m + usize::from(several)] += 1;
                }
            }
        })?;
        for (gain, counts) in gains.iter_mut().zip(counts.chunks_exact(2)) {
            let rho = counts[1] as f64 / (counts[0] as f64).max(tensor.global.epsilon);
            *gain = (1.0 + tensor.global.r * rho.max(0.0).min(tensor.global.alpha)) as f32;
        }
    }
    Ok(Box::new(move |_, inputs, out| {
        let r = |v: f32| round.round(v);
        let mut deltas = vec![0.0; of.len()];
        for (i, y) in out.iter_mut().enumerate() {
            let count = active(i, inputs, &of, &mut deltas);
            let b = inputs[base][i];
            if count == 0 {
                *y = b;
                continue;
            }
            // RAM+ has its gains in f32, in which mergekit then stays.
            let gain = |m: usize| if count == 1 { gains[m] } else { 1.0 };
            let mix: f32 = deltas.iter().enumerate().map(|(m, d)| r(d / count as f32) * gain(m)).sum();
            *y = if plus { b + mix } else { r(b + r(mix)) };
        }
    }))
}
