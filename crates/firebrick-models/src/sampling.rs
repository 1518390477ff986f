//! Choosing the next token from logits: greedy, temperature, top-k, nucleus, min-p and repetition penalty.

use std::cmp::Ordering;

use firebrick_core::Seed;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// How the next token is chosen. The filters apply in the order of the fields, as in Hugging Face's generation.
///
/// The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides positive and multiplies negative logits of tokens that occurred already (Keskar et al. 2019,
    /// arXiv 1909.05858, as Hugging Face applies it: once per distinct token); 1 is off.
    pub repetition_penalty: f64,
    /// Divides the logits; 0 takes the most probable token (the lowest id of equals) and draws nothing.
    pub temperature: f64,
    /// Keeps exactly this many of the most probable tokens, lower ids first among equals; 0 is off.
    pub top_k: usize,
    /// Keeps the smallest set of most probable tokens whose mass reaches this value (Holtzman et al. 2020,
    /// arXiv 1904.09751), so the token that crosses it is kept; 1 is off.
    pub top_p: f64,
    /// Drops tokens less probable than this share of the most probable one (arXiv 2407.01082); 0 is off.
    pub min_p: f64,
    /// The seed of the draws.
    pub seed: Seed,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            repetition_penalty: 1.0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: Seed(0),
        }
    }
}

/// The stream that a sampler draws from.
const STREAM: &str = "models/sampling";

/// Draws tokens by [`Sampling`] settings; one value per token from the stream `models/sampling` of the seed.
///
/// Give every sequence of a batch a sampler of its own, with a seed from [`Seed::derive`], so that its tokens do not
/// depend on its neighbours.
///
/// ```
/// use firebrick_models::sampling::{Sampler, Sampling};
/// let mut sampler = Sampler::new(Sampling::default())?;
/// assert_eq!(sampler.sample(&[0.5, 2.0, -1.0], &[])?, 1);
/// # Ok::<(), firebrick_models::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its stream.
    ///
    /// # Errors
    /// [`ModelError::Sampling`] with every setting that is out of range.
    pub fn new(settings: Sampling) -> Result<Sampler, ModelError> {
        let s = &settings;
        let checks = [
            (
                s.temperature >= 0.0 && s.temperature.is_finite(),
                format!("temperature {} is not >= 0", s.temperature),
            ),
            (s.top_p > 0.0 && s.top_p <= 1.0, format!("top_p {} is not in (0, 1]", s.top_p)),
            ((0.0..=1.0).contains(&s.min_p), format!("min_p {} is not in [0, 1]", s.min_p)),
            (
                s.repetition_penalty > 0.0 && s.repetition_penalty.is_finite(),
                format!("repetition_penalty {} is not > 0", s.repetition_penalty),
            ),
        ];
        let problems: Vec<String> = checks.into_iter().filter(|(ok, _)| !ok).map(|(_, text)| text).collect();
        if !problems.is_empty() {
            return Err(ModelError::Sampling(problems.join("; ")));
        }
        Ok(Sampler { settings, rng: settings.seed.stream(STREAM) })
    }

    /// The settings this sampler was made with.
    pub fn settings(&self) -> &Sampling {
        &self.settings
    }

    /// The next token for `logits` (`[vocabulary]`, one row); `history` are the tokens so far (prompt included),
    /// which only the repetition penalty reads. A logit of minus infinity is a token that can't be drawn.
    ///
    /// # Errors
    /// [`ModelError::Sampling`] when a logit is NaN or plus infinity, or when no token can be drawn.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, ModelError> {
        let scores = self.scores(logits, history)?;
        if self.settings.temperature == 0.0 {
            return Ok(argmax(&scores));
        }
        let candidates = self.candidates(&scores);
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.rng.random::<f64>() * total;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(id);
            }
        }
        // Rounding can leave a crumb: it belongs to the last token of nonzero probability.
        Ok(candidates.iter().rev().find(|c| c.1 > 0.0).map_or_else(|| argmax(&scores), |c| c.0))
    }

    /// The probability of every token that [`Sampler::sample`] may return for `logits`: `(id, probability)` in order of
    /// id, summing to one. Under temperature 0 this is one token.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn probabilities(&self, logits: &[f32], history: &[u32]) -> Result<Vec<(u32, f64)>, ModelError> {
        let scores = self.scores(logits, history)?;
        if self.settings.temperature == 0.0 {
            return Ok(vec![(argmax(&scores), 1.0)]);
        }
        let mut candidates = self.candidates(&scores);
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        for candidate in &mut candidates {
            candidate.1 /= total;
        }
        candidates.sort_unstable_by_key(|c| c.0);
        Ok(candidates)
    }

    /// Checked logits in f64, after the repetition penalty.
    fn scores(&self, logits: &[f32], history: &[u32]) -> Result<Vec<f64>, ModelError> {
        if let Some(i) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            let bad = logits.iter().filter(|l| l.is_nan() || **l == f32::INFINITY).count();
            let text = format!(
                "{bad} of {} logits are not numbers; the first is {} at token {i}",
                logits.len(),
                logits[i]
            );
            return Err(ModelError::Sampling(text));
        }
        if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
            return Err(ModelError::Sampling(format!("none of {} tokens has a finite logit", logits.len())));
        }
        let mut scores: Vec<f64> = logits.iter().map(|&l| f64::from(l) + 0.0).collect(); // -0 becomes +0, its equal
        let penalty = self.settings.repetition_penalty;
        if penalty != 1.0 {
            let mut seen = history.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(score) = scores.get_mut(id as usize) {
                    let moved = if *score < 0.0 { *score * penalty } else { *score / penalty };
                    *score = if score.is_finite() { moved.clamp(f64::MIN, f64::MAX) } else { moved };
                }
            }
        }
        Ok(scores)
    }

    /// The tokens that survive the filters, with weights `exp((score - max) / temperature)`.
    fn candidates(&self, scores: &[f64]) -> Vec<(u32, f64)> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weight = |score: f64| ((score - max) / temperature).exp();
        let mut kept: Vec<(u32, f64)> = scores.iter().enumerate().map(|(id, &s)| (id as u32, s)).collect();
        if top_k > 0 && top_k < kept.len() {
            kept.select_nth_unstable_by(top_k - 1, descending);
            kept.truncate(top_k);
            kept.sort_unstable_by(descending);
        }
        if top_p < 1.0 {
            let mass = top_p * kept.iter().map(|c| weight(c.1)).sum::<f64>();
            nucleus(&mut kept, mass, weight);
        }
        for candidate in &mut kept {
            candidate.1 = weight(candidate.1);
        }
        // The most probable token weighs 1.
        kept.retain(|c| c.1 >= min_p);
        kept
    }
}

/// Cuts `kept` to the most probable tokens whose weights first reach `mass`, most probable first.
fn nucleus(kept: &mut Vec<(u32, f64)>, mass: f64, weight: impl Fn(f64) -> f64) {
    // The nucleus is mostly a few tokens of many: sort only a growing head of the list.
    let mut head = 64;
    loop {
        head = head.min(kept.len());
        if head < kept.len() {
            kept.select_nth_unstable_by(head - 1, descending);
        }
        kept[..head].sort_unstable_by(descending);
        let mut sum = 0.0;
        let reached = kept[..head].iter().position(|c| {
            sum += weight(c.1);
            sum >= mass
        });
        match reached {
            Some(last) => return kept.truncate(last + 1),
            None if head == kept.len() => return,
            None => head *= 8,
        }
    }
}

/// Highest score first, lower id first among equals: a total order, as scores are never NaN.
fn descending(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The lowest id of the highest score.
fn argmax(scores: &[f64]) -> u32 {
    let mut best = 0;
    for (id, &score) in scores.iter().enumerate() {
        if score > scores[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pick(settings: Sampling, logits: &[f32]) -> u32 {
        Sampler::new(settings).unwrap().sample(logits, &[]).unwrap()
    }

    fn hot(seed: u64) -> Sampling {
        Sampling { temperature: 1.0, seed: Seed(seed), ..Sampling::default() }
    }

    /// Probabilities by full sorting, straight from the definitions.
    fn reference(s: &Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut all: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(i, &l)| (i as u32, ((f64::from(l) - f64::from(max)) / s.temperature).exp()))
            .collect();
        let normalize = |list: &mut Vec<(u32, f64)>| {
            let total: f64 = list.iter().map(|c| c.1).sum();
            list.iter_mut().for_each(|c| c.1 /= total);
        };
        all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        if s.top_k > 0 {
            all.truncate(s.top_k);
        }
        normalize(&mut all);
        if s.top_p < 1.0 {
            let mut before = 0.0;
            all.retain(|c| {
                let keep = before < s.top_p;
                before += c.1;
                keep
            });
        }
        normalize(&mut all);
        let top = all[0].1;
        all.retain(|c| c.1 >= s.min_p * top);
        normalize(&mut all);
        all.sort_by_key(|c| c.0);
        all
    }

    proptest! {
        #[test]
        fn narrow_filters_are_greedy(logits in prop::collection::vec(-8i8..8, 1..300), seed: u64) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let greedy = pick(Sampling::default(), &logits);
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(greedy as usize, logits.iter().position(|l| *l == best).unwrap());
            prop_assert_eq!(pick(Sampling { top_k: 1, ..hot(seed) }, &logits), greedy);
            prop_assert_eq!(pick(Sampling { top_p: 1e-9, ..hot(seed) }, &logits), greedy);
            prop_assert_eq!(logits[pick(Sampling { min_p: 1.0, ..hot(seed) }, &logits) as usize], best);
            prop_assert_eq!(logits[pick(Sampling { temperature: 1e-6, ..hot(seed) }, &logits) as usize], best);
        }

        #[test]
        fn filters_match_the_sorted_reference(
            logits in prop::collection::vec(-4.0f32..4.0, 1..400), temperature in 0.2f64..3.0, top_k in 0usize..400,
            top_p in 0.05f64..1.0, min_p in 0.0f64..0.5,
        ) {
            let settings = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
            let got = Sampler::new(settings).unwrap().probabilities(&logits, &[]).unwrap();
            let want = reference(&settings, &logits);
            prop_assert_eq!(got.iter().map(|c| c.0).collect::<Vec<_>>(), want.iter().map(|c| c.0).collect::<Vec<_>>());
            for (g, w) in got.iter().zip(&want) {
                prop_assert!((g.1 - w.1).abs() < 1e-12, "{:?} {:?}", g, w);
            }
        }

        #[test]
        fn any_bits_give_a_token_or_an_error(bits in prop::collection::vec(any::<u32>(), 0..40), settings in 0usize..4) {
            let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let settings = [
                Sampling::default(),
                hot(1),
                Sampling { top_k: 3, top_p: 0.5, ..hot(2) },
                Sampling { repetition_penalty: 1e300, temperature: 1e-300, ..hot(3) },
            ][settings];
            let broken = logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY);
            let fine = !broken && logits.iter().any(|l| *l > f32::NEG_INFINITY);
            match Sampler::new(settings).unwrap().sample(&logits, &[0, 1, 7, 999]) {
                Ok(id) => prop_assert!(fine && logits[id as usize] > f32::NEG_INFINITY, "{}", id),
                Err(error) => prop_assert!(!fine, "{}", error),
            }
        }
    }

    #[test]
    fn frequencies_match_the_softmax() {
        let logits = [0.3f32, -1.2, 2.0, 0.0, 1.1, f32::NEG_INFINITY];
        for settings in [hot(5), Sampling { temperature: 0.7, top_p: 0.9, ..hot(6) }] {
            let mut sampler = Sampler::new(settings).unwrap();
            let expected = sampler.probabilities(&logits, &[]).unwrap();
            let draws = 20_000;
            let mut counts = [0u32; 6];
            for _ in 0..draws {
                counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
            }
            assert_eq!(
                counts
                    .iter()
                    .enumerate()
                    .filter(|(i, n)| **n > 0 && !expected.iter().any(|e| e.0 as usize == *i))
                    .count(),
                0
            );
            let deviations = |p: &dyn Fn(usize) -> f64| -> f64 {
                expected
                    .iter()
                    .map(|&(id, _)| {
                        let p = p(id as usize);
                        let sigma = (p * (1.0 - p) * f64::from(draws)).sqrt();
                        (f64::from(counts[id as usize]) - p * f64::from(draws)).abs() / sigma
                    })
                    .fold(0.0, f64::max)
            };
            let p = |id: usize| expected.iter().find(|e| e.0 as usize == id).unwrap().1;
            assert!(deviations(&p) < 4.0, "{}", deviations(&p));
            // The test can fail: a distribution that is off by a tenth is far outside.
            assert!(deviations(&|id| 0.9 * p(id) + 0.1 / expected.len() as f64) > 4.0);
        }
    }

    #[test]
    fn the_stream_repeats_and_seeds_differ() {
        let logits = vec![0.0f32; 1000];
        let run = |seed| {
            let mut sampler = Sampler::new(hot(seed)).unwrap();
            (0..20).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn the_repetition_penalty_counts_a_token_once() {
        let settings = Sampling { repetition_penalty: 2.0, temperature: 1.0, ..Sampling::default() };
        let sampler = Sampler::new(settings).unwrap();
        assert_eq!(sampler.scores(&[1.0, -1.0, 3.0], &[0, 0, 1, 77]).unwrap(), [0.5, -2.0, 3.0]);
        let mut greedy = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::default() }).unwrap();
        assert_eq!(greedy.sample(&[1.0, 1.5], &[1]).unwrap(), 0);
        assert_eq!(greedy.sample(&[1.0, 1.5], &[]).unwrap(), 1);
    }

    #[test]
    fn the_token_that_crosses_top_p_is_kept() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let kept = |top_p| {
            Sampler::new(Sampling { top_p, ..hot(0) }).unwrap().probabilities(&logits, &[]).unwrap().len()
        };
        assert_eq!([kept(0.4), kept(0.6), kept(0.79), kept(0.9), kept(1.0)], [1, 2, 2, 3, 3]);
    }

    #[test]
    fn bad_logits_and_settings_are_errors() {
        let mut sampler = Sampler::new(hot(0)).unwrap();
        for logits in [&[][..], &[f32::NAN, 1.0], &[1.0, f32::INFINITY], &[f32::NEG_INFINITY; 3]] {
            assert!(matches!(sampler.sample(logits, &[]), Err(ModelError::Sampling(_))), "{logits:?}");
        }
        let bad = Sampling {
            temperature: -1.0,
            top_p: 0.0,
            min_p: f64::NAN,
            repetition_penalty: 0.0,
            ..Sampling::default()
        };
        let text = Sampler::new(bad).unwrap_err().to_string();
        for name in ["temperature", "top_p", "min_p", "repetition_penalty"] {
            assert!(text.contains(name), "{text}");
        }
    }
}
