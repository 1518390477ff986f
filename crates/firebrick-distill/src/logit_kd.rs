//! Logit distillation (Hinton et al., arXiv 1503.02531): `(1 - soft) CE + soft T^2 D(teacher, student)`.

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Part, Run, Site};
use firebrick_models::Decoder;
use firebrick_tensor::ops::{Divergence, linear_cross_entropy, linear_kl};
use serde::{Deserialize, Serialize};

/// Settings of logit distillation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KdConfig {
    /// Temperature `T` of both softmaxes.
    pub temperature: f64,
    /// Weight of the soft targets; the rest is cross-entropy on the text.
    pub soft: f64,
    /// Match the teacher the other way round, `KL(student, teacher)`: mode seeking instead of mode covering.
    pub reverse: bool,
}

impl Default for KdConfig {
    fn default() -> Self {
        KdConfig { temperature: 2.0, soft: 0.9, reverse: false }
    }
}

/// A frozen model to learn from, with the bricks that make it what it is.
///
/// Keep it on a device without gradients: what it computes never needs one.
pub struct Teacher<'a> {
    /// The wiring.
    pub decoder: &'a Decoder,
    /// Its bricks, the last one on top; none may sit at the head.
    pub bricks: &'a [&'a dyn Brick],
}

/// The loss of one student against one teacher.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogitKd {
    config: KdConfig,
}

impl LogitKd {
    /// A loss with these settings.
    ///
    /// # Panics
    /// If the temperature is not positive or `soft` is outside 0..=1.
    pub fn new(config: KdConfig) -> Self {
        assert!(config.temperature > 0.0, "temperature {} should be positive", config.temperature);
        assert!((0.0..=1.0).contains(&config.soft), "soft {} should lie in 0..=1", config.soft);
        LogitKd { config }
    }

    /// The mean loss `[1]` per predicted token of `tokens: [batch, tokens]` (on the student's device).
    ///
    /// The soft part is scaled by `T^2`, which keeps its gradient comparable when `T` changes.
    ///
    /// # Panics
    /// If a brick sits at the head of either model, or the vocabularies differ.
    pub fn loss(
        &self,
        student: &Decoder,
        run: &mut Run<'_>,
        teacher: &Teacher<'_>,
        tokens: Tensor<2, Int>,
    ) -> Tensor<1> {
        let head = Site::global(Part::Head);
        let mut teacher_run = Run::new(teacher.bricks);
        assert!(run.is_bare(head) && teacher_run.is_bare(head), "distillation needs bare heads");
        let [batch, length] = tokens.dims();
        let rows = batch * (length - 1);
        let predicting = |hidden: Tensor<3>| {
            let d = hidden.dims()[2];
            hidden.narrow(1, 0, length - 1).reshape([rows, d])
        };
        let inner = teacher.decoder.device();
        let outer = student.device();
        let known = teacher.decoder.hidden(tokens.clone().to_device(&inner), &mut teacher_run);
        let known = on_device_of(predicting(known), &outer);
        let learned = predicting(student.hidden(tokens.clone(), run));
        let KdConfig { temperature, soft, reverse } = self.config;
        let divergence = if reverse { Divergence::ReverseKl } else { Divergence::ForwardKl };
        let teacher_head = on_device_of(teacher.decoder.head_weight(), &outer);
        let kl =
            linear_kl(learned.clone(), student.head_weight(), known, teacher_head, temperature, divergence);
        let mut loss = kl.mean() * (soft * temperature * temperature);
        if soft < 1.0 {
            let targets = tokens.narrow(1, 1, length - 1).reshape([rows]);
            let nll = linear_cross_entropy(learned, student.head_weight(), targets);
            loss = loss + nll.mean() * (1.0 - soft);
        }
        loss
    }
}

/// The same values as a constant on `device`.
fn on_device_of(t: Tensor<2>, device: &burn::tensor::Device) -> Tensor<2> {
    let t = t.without_autodiff();
    if device.is_autodiff() { t.autodiff() } else { t }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::Seed;
    use firebrick_models::DecoderConfig;

    fn decoder(seed: u64, device: &Device) -> Decoder {
        let config = DecoderConfig::tiny(50);
        Decoder::random(config, Seed(seed), device).unwrap()
    }

    fn tokens(device: &Device) -> Tensor<2, Int> {
        let ids: Vec<i32> = (0..24).map(|i| (i * 7 + 3) % 50).collect();
        Tensor::from_data(TensorData::new(ids, [2, 12]), device)
    }

    fn loss(student: &Decoder, teacher: &Decoder, config: KdConfig) -> f32 {
        let teacher = Teacher { decoder: teacher, bricks: &[] };
        let tokens = tokens(&student.device());
        LogitKd::new(config).loss(student, &mut Run::default(), &teacher, tokens).into_scalar()
    }

    #[test]
    fn a_model_has_nothing_to_learn_from_itself() {
        let device = Device::flex();
        let (one, other) = (decoder(1, &device), decoder(2, &device));
        for reverse in [false, true] {
            for temperature in [1.0, 2.0] {
                let config = KdConfig { temperature, soft: 1.0, reverse };
                assert!(loss(&one, &one, config).abs() < 1e-6);
                assert!(loss(&one, &other, config) > 1e-6, "control: another model differs");
            }
        }
    }

    #[test]
    fn equals_the_definition() {
        let device = Device::flex();
        let (student, teacher) = (decoder(1, &device), decoder(2, &device));
        let logits = |d: &Decoder| -> Vec<f64> {
            let all = d.forward(tokens(&device), &mut Run::default()).narrow(1, 0, 11);
            all.into_data().try_into_vec_as::<f64>().unwrap()
        };
        let (z_s, z_t) = (logits(&student), logits(&teacher));
        let log_softmax = |z: &[f64], t: f64| -> Vec<f64> {
            let lse = z.iter().map(|v| (v / t).exp()).sum::<f64>().ln();
            z.iter().map(|v| v / t - lse).collect()
        };
        for (reverse, t) in [(false, 2.0), (true, 1.5)] {
            let mean = z_s
                .chunks(50)
                .zip(z_t.chunks(50))
                .map(|(s, q)| {
                    let (s, q) = (log_softmax(s, t), log_softmax(q, t));
                    let (a, b) = if reverse { (s, q) } else { (q, s) };
                    a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum::<f64>()
                })
                .sum::<f64>()
                / 22.0;
            let found = f64::from(loss(&student, &teacher, KdConfig { temperature: t, soft: 1.0, reverse }));
            assert!((found - t * t * mean).abs() < 1e-5 * (1.0 + mean), "{found} against {}", t * t * mean);
            let other = KdConfig { temperature: t, soft: 1.0, reverse: !reverse };
            assert!(
                (found - f64::from(loss(&student, &teacher, other))).abs() > 1e-9,
                "control: direction matters"
            );
        }
    }
}
