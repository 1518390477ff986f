//! Logit distillation (Hinton et al., arXiv 1503.02531): `(1 - soft) CE + soft T^2 D(teacher, student)`.

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Part, Run, Site};
use firebrick_models::{Decoder, constant_on};
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

/// Settings of a distillation that cannot be meant; every problem is listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("distillation: {}", problems.join("; "))]
pub struct KdError {
    /// One line each, naming the setting.
    pub problems: Vec<String>,
}

/// The loss of one student against one teacher.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogitKd {
    config: KdConfig,
}

impl LogitKd {
    /// A loss with these settings.
    ///
    /// # Errors
    /// If the temperature is not positive and finite, or `soft` is outside 0..=1; every problem is listed.
    pub fn new(config: KdConfig) -> Result<Self, KdError> {
        let KdConfig { temperature, soft, .. } = config;
        let mut problems = Vec::new();
        if !(temperature.is_finite() && temperature > 0.0) {
            problems.push(format!("temperature {temperature} should be positive"));
        }
        if !(0.0..=1.0).contains(&soft) {
            problems.push(format!("soft {soft} should lie in 0..=1"));
        }
        if problems.is_empty() { Ok(LogitKd { config }) } else { Err(KdError { problems }) }
    }

    /// The mean loss `[1]` per predicted token of `tokens: [batch, tokens]` (on the student's device).
    ///
    /// The soft part is scaled by `T^2`, which keeps its gradient comparable when `T` changes; without it the teacher does not run.
    ///
    /// # Panics
    /// If a brick sits at the head of either model, either caps its logits, the vocabularies differ, or a text has fewer than
    /// 2 tokens.
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
        let caps = |d: &Decoder| d.config().final_softcap.is_some();
        assert!(!caps(student) && !caps(teacher.decoder), "distillation needs logits without a cap");
        let [batch, length] = tokens.dims();
        assert!(length > 1, "a text of {length} tokens has nothing to predict");
        let rows = batch * (length - 1);
        let predicting = |hidden: Tensor<3>| {
            let d = hidden.dims()[2];
            hidden.narrow(1, 0, length - 1).reshape([rows, d])
        };
        let learned = predicting(student.hidden(tokens.clone(), run));
        let KdConfig { temperature, soft, reverse } = self.config;
        let hard = |learned| {
            let targets = tokens.clone().narrow(1, 1, length - 1).reshape([rows]);
            linear_cross_entropy(learned, student.head_weight(), targets, student.precision()).mean()
                * (1.0 - soft)
        };
        if soft == 0.0 {
            return hard(learned);
        }
        let (inner, outer) = (teacher.decoder.device(), student.device());
        let known = teacher.decoder.hidden(tokens.clone().to_device(&inner), &mut teacher_run);
        let known = constant_on(predicting(known), &outer);
        let teacher_head = constant_on(teacher.decoder.head_weight(), &outer);
        let divergence = if reverse { Divergence::ReverseKl } else { Divergence::ForwardKl };
        let kl =
            linear_kl(learned.clone(), student.head_weight(), known, teacher_head, temperature, divergence);
        let loss = kl.mean() * (soft * temperature * temperature);
        if soft < 1.0 { loss + hard(learned) } else { loss }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::Seed;
    use firebrick_models::DecoderConfig;
    use firebrick_peft::{LoraBank, LoraConfig};

    /// A decoder whose layers are large enough to matter.
    fn decoder(seed: u64, device: &Device) -> Decoder {
        let config = DecoderConfig { d_model: 48, d_ff: 64, head_dim: 12, ..DecoderConfig::tiny(50) };
        let decoder = Decoder::random(config, Seed(seed), device).unwrap();
        let sites = decoder.sites().block_linears();
        sites.iter().fold(decoder, |decoder, site| {
            let weight = decoder.weight(site).unwrap() * 10.0;
            decoder.with_weight(site, weight)
        })
    }

    fn tokens(device: &Device) -> Tensor<2, Int> {
        let ids: Vec<i32> = (0..24).map(|i| (i * 7 + 3) % 50).collect();
        Tensor::from_data(TensorData::new(ids, [2, 12]), device)
    }

    fn loss(student: &Decoder, teacher: &Decoder, config: KdConfig) -> f64 {
        let teacher = Teacher { decoder: teacher, bricks: &[] };
        let tokens = tokens(&student.device());
        let kd = LogitKd::new(config).unwrap();
        f64::from(kd.loss(student, &mut Run::default(), &teacher, tokens).into_scalar::<f32>())
    }

    #[test]
    fn a_model_has_nothing_to_learn_from_itself() {
        let device = Device::flex();
        let (one, other) = (decoder(1, &device), decoder(2, &device));
        for reverse in [false, true] {
            for temperature in [1.0, 2.0] {
                let config = KdConfig { temperature, soft: 1.0, reverse };
                assert!(loss(&one, &one, config).abs() < 1e-5);
                assert!(loss(&one, &other, config) > 1e-2, "control: another model differs");
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
        // Temperatures at which small logits make sharp predictions.
        for (reverse, t) in [(false, 0.2), (true, 0.15)] {
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
            let config = KdConfig { temperature: t, soft: 1.0, reverse };
            let (found, expected) = (loss(&student, &teacher, config), t * t * mean);
            let tolerance = 1e-4 * expected;
            assert!((found - expected).abs() < tolerance, "{found} against {expected}");
            for other in
                [KdConfig { reverse: !reverse, ..config }, KdConfig { temperature: 2.0 * t, ..config }]
            {
                let other = loss(&student, &teacher, other);
                assert!((found - other).abs() > 10.0 * tolerance, "control: {found} against {other}");
            }
        }
    }

    #[test]
    fn the_rest_is_cross_entropy_on_the_text() {
        let device = Device::flex();
        let (student, teacher) = (decoder(1, &device), decoder(2, &device));
        let nll = student.nll(tokens(&device), &mut Run::default()).mean().into_scalar::<f32>();
        let of = |soft| loss(&student, &teacher, KdConfig { soft, ..KdConfig::default() });
        let (hard, whole) = (of(0.0), of(1.0));
        assert!((hard - f64::from(nll)).abs() < 1e-5 * hard, "{hard} against {nll}");
        assert!((hard - whole).abs() > 1e-2 * hard, "control: the soft part is another number, {whole}");
        for soft in [0.25, 0.9] {
            let expected = (1.0 - soft) * hard + soft * whole;
            assert!((of(soft) - expected).abs() < 1e-5 * expected, "{soft}: {} against {expected}", of(soft));
        }
        // Without a soft part the teacher does not even run: this one would panic.
        let other = Decoder::random(DecoderConfig::tiny(9), Seed(1), &device).unwrap();
        assert_eq!(loss(&student, &other, KdConfig { soft: 0.0, ..KdConfig::default() }), hard);
    }

    #[test]
    fn no_gradient_reaches_the_teacher() {
        let device = Device::flex().autodiff();
        let (student, teacher) = (decoder(1, &device), decoder(2, &device));
        let bank = |seed| -> LoraBank {
            let targets = student.sites().block_linears();
            LoraConfig::default().init(student.sites(), &targets, Seed(seed), &device).unwrap()
        };
        let (theirs, ours) = (bank(3), bank(4));
        let bricks: [&dyn Brick; 1] = [&theirs];
        let teacher = Teacher { decoder: &teacher, bricks: &bricks };
        let own: [&dyn Brick; 1] = [&ours];
        let kd = LogitKd::new(KdConfig::default()).unwrap();
        let loss = kd.loss(&student, &mut Run::new(&own), &teacher, tokens(&device));
        let gradients = loss.backward();
        let gradient = |bank: &LoraBank| {
            let site = Site::layer(1, Part::MlpDown);
            bank.get(site).unwrap().1.b.val().grad(&gradients)
        };
        assert!(gradient(&theirs).is_none());
        let ours = gradient(&ours).expect("control: the student has one");
        assert!(ours.abs().max().into_scalar::<f32>() > 1e-4, "control: and it is not zero");
    }

    #[test]
    fn wrong_settings_are_all_listed() {
        let of = |temperature, soft| LogitKd::new(KdConfig { temperature, soft, reverse: false });
        assert!(of(1.0, 0.0).is_ok() && of(0.1, 1.0).is_ok());
        assert_eq!(of(0.0, 1.1).unwrap_err().problems.len(), 2);
        assert!(of(f64::INFINITY, 0.5).is_err() && of(1.0, f64::NAN).is_err());
    }
}
