//! What logits fusion is for: small experts in place of tuning the large model. Languages whose next-token probabilities are known,
//! so that losses are exact distances from the truth.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Run, Seed, Silent};
use firebrick_merge::logits_fusion::{FusionWeight, LogitsFusionConfig, fuse_logits};
use firebrick_models::{Decoder, DecoderConfig, token_tensor};
use firebrick_train::{TextData, TrainConfig, fit};
use rand::Rng;

const VOCAB: usize = 40;
const WINDOW: usize = 24;
/// Directions that the logits of a language vary in.
const LATENT: usize = 20;

/// The next token depends on the last two: logits `(before[a] + last[b]) next[v]`.
struct Language {
    before: Vec<f64>,
    last: Vec<f64>,
    next: Vec<f64>,
}

impl Language {
    fn new(seed: u64) -> Language {
        let matrix = |name: &str, scale: f64| Seed(seed).normal_f64(name, VOCAB * LATENT, scale).collect();
        Language { before: matrix("before", 0.5), last: matrix("last", 0.7), next: matrix("next", 0.7) }
    }

    /// A domain: some of the next tokens mean something else.
    fn domain(&self, seed: u64, strength: f64) -> Language {
        let mut next = self.next.clone();
        let shift = Seed(seed).normal_f64("shift", VOCAB * LATENT, 0.7 * strength);
        next.iter_mut().zip(shift).for_each(|(n, s)| *n += s);
        Language { before: self.before.clone(), last: self.last.clone(), next }
    }

    fn log_p(&self, a: u32, b: u32) -> Vec<f64> {
        let row = |m: &[f64], t: u32| m[t as usize * LATENT..][..LATENT].to_vec();
        let (x, y) = (row(&self.before, a), row(&self.last, b));
        let logit = |v: usize| (0..LATENT).map(|i| (x[i] + y[i]) * self.next[v * LATENT + i]).sum::<f64>();
        let logits: Vec<f64> = (0..VOCAB).map(logit).collect();
        let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        logits.iter().map(|l| l - sum).collect()
    }

    fn text(&self, seed: u64, tokens: usize) -> TextData {
        let mut rng = Seed(seed).stream("text");
        let mut ids = vec![0u32, 1];
        while ids.len() < tokens {
            let log_p = self.log_p(ids[ids.len() - 2], ids[ids.len() - 1]);
            let mut left: f64 = rng.random();
            let token = log_p.iter().position(|l| {
                left -= l.exp();
                left < 0.0
            });
            ids.push(token.unwrap_or(VOCAB - 1) as u32);
        }
        TextData::new(ids, 0)
    }
}

fn config(d: usize, layers: usize) -> DecoderConfig {
    let tiny = DecoderConfig::tiny(VOCAB);
    DecoderConfig { d_model: d, d_ff: 3 * d, layers, heads: 2, kv_heads: 2, head_dim: d / 2, ..tiny }
}

fn trained(decoder: Decoder, data: &TextData, steps: usize, rate: f64, seed: u64) -> Decoder {
    let settings = TrainConfig {
        steps,
        batch: 16,
        window: WINDOW,
        learning_rate: rate,
        weight_decay: 0.0,
        seed,
        ..TrainConfig::default()
    };
    let loss = &mut |d: &Decoder, tokens: Tensor<2, Int>, _: Seed| d.nll(tokens, &mut Run::default()).mean();
    let decoder = decoder.train().trainable();
    fit(decoder, &settings, data, loss, &Silent, false).unwrap().0.valid()
}

fn logits(decoder: &Decoder, windows: &[&[u32]]) -> Vec<Vec<f32>> {
    let all = decoder.forward(token_tensor(windows, &Device::flex()), &mut Run::default());
    let flat: Vec<f32> = all.into_data().try_into_vec_as::<f32>().unwrap();
    flat.chunks(VOCAB).map(<[f32]>::to_vec).collect()
}

/// Mean `KL(truth || model)` over the steps that have two tokens before them.
fn distance(language: &Language, logits: &[Vec<f32>], windows: &[&[u32]]) -> f64 {
    let mut sum = 0.0;
    for (i, row) in logits.iter().enumerate() {
        let (window, t) = (windows[i / WINDOW], i % WINDOW);
        if t == 0 {
            continue;
        }
        let truth = language.log_p(window[t - 1], window[t]);
        let total = row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        sum += truth.iter().zip(row).map(|(p, l)| p.exp() * (p - f64::from(*l) + total)).sum::<f64>();
    }
    sum / (windows.len() * (WINDOW - 1)) as f64
}

/// The share of the large model's own gap, base to tuned, that fusion closes.
struct Closed {
    matched: f64,
    /// At fixed weights of 0.5, 0.75, 1 and 1.25.
    fixed: [f64; 4],
    /// With expert and base exchanged.
    backwards: f64,
}

fn closed(seed: u64, strength: f64) -> Closed {
    let device = Device::flex().autodiff();
    let language = Language::new(seed);
    let general = language.text(seed, 20_000);
    let fresh = |d, layers| Decoder::random(config(d, layers), Seed(seed), &device).unwrap();
    let small = trained(fresh(12, 1), &general, 300, 1e-2, seed);
    let large = trained(fresh(48, 2), &general, 400, 4e-3, seed);
    let domain = language.domain(seed + 10, strength);
    let own = domain.text(seed + 1, 20_000);
    let expert = trained(small.clone(), &own, 150, 1e-2, seed);
    let whole = trained(large.clone(), &own, 150, 4e-3, seed);
    let held = domain.text(seed + 2, 60 * WINDOW);
    let windows: Vec<&[u32]> = held.windows(WINDOW).collect();
    let of = |d: &Decoder| logits(d, &windows);
    let (m, b, e) = (of(&large), of(&small), of(&expert));
    let far = |rows: &[Vec<f32>]| distance(&domain, rows, &windows);
    let (start, end) = (far(&m), far(&of(&whole)));
    let fused = |weight: FusionWeight, b: &[Vec<f32>], e: &[Vec<f32>]| {
        let config = LogitsFusionConfig { weight, ..LogitsFusionConfig::default() };
        let mut rows = m.clone();
        for (row, (b, e)) in rows.iter_mut().zip(b.iter().zip(e)) {
            fuse_logits(row, b, &[e], &config).unwrap();
        }
        (start - far(&rows)) / (start - end)
    };
    let kl = || LogitsFusionConfig::default().weight;
    eprintln!("seed {seed}: small {:.3}, expert {:.3}, large {start:.3}, tuned {end:.3}", far(&b), far(&e));
    Closed {
        matched: fused(kl(), &b, &e),
        fixed: [0.5, 0.75, 1.0, 1.25].map(|a| fused(FusionWeight::Fixed(vec![a]), &b, &e)),
        backwards: fused(kl(), &e, &b),
    }
}

#[test]
fn a_small_expert_closes_half_of_the_gap_of_the_large_model() {
    let found: Vec<Closed> = (0..3).map(|seed| closed(seed, 0.6)).collect();
    let mean = |f: &dyn Fn(&Closed) -> f64| found.iter().map(f).sum::<f64>() / 3.0;
    let matched = mean(&|c| c.matched);
    let fixed: Vec<f64> = (0..4).map(|i| mean(&|c| c.fixed[i])).collect();
    eprintln!("closed: matched {matched:.3}, fixed {fixed:.3?}, backwards {:.3}", mean(&|c| c.backwards));
    assert!(matched > 0.5, "{matched}");
    assert!(found.iter().all(|c| c.matched > 0.4), "at every seed");
    assert!(found.iter().all(|c| c.backwards < 0.0), "control: away from the expert it only grows");
}
