//! Where attention looks: entropy, sink and distance of every head, and how much the heads differ.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Base, Brick, Run, Site, SiteSet};
use firebrick_models::AttentionTaps;
use firebrick_tensor::ops::AttentionOptions;
use serde::{Deserialize, Serialize};

use crate::AnalysisError;
use crate::sample::{read, spread};
use crate::stats::{Estimate, mean};

/// Scores held at a time.
const CHUNK: usize = 1 << 22;
/// A score that is certain to weigh nothing; finite, so that 0 times it is 0.
const HIDDEN: f32 = -1e30;
/// Columns of what is kept per query and head: entropy, sink, distance.
const COLUMNS: usize = 3;

/// Looks into the attention at its `attn` sites, at evenly spread queries of each sequence.
///
/// It needs a wiring that fills [`AttentionTaps`]. Queries go through in chunks of about 4 million scores, so that nothing of size
/// `[heads, tokens, tokens]` exists; the cost is `queries / tokens` of that of attention without a kernel.
#[derive(Debug, Default)]
pub struct AttentionPattern {
    sites: SiteSet,
    queries: usize,
    skip: usize,
    seen: RefCell<BTreeMap<Site, Vec<Seen>>>,
}

/// What one pass left at a site.
#[derive(Debug)]
struct Seen {
    /// Means over queries, `[batch, heads, 3]`.
    heads: Tensor<3>,
    /// Mean Jensen-Shannon divergence between the heads, `[batch]`, as a share of its largest value.
    disagreement: Tensor<1>,
}

/// How one head attends, on average over queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadPattern {
    /// Entropy of the weights as a share of that of uniform weights over the keys in sight: 0 for one key, 1 for all alike.
    pub entropy: f64,
    /// Weight on the first token of the text.
    pub sink: f64,
    /// Mean distance to the keys, in tokens.
    pub distance: f64,
}

/// How the attention of one layer attends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionProfile {
    /// The attention module.
    pub site: Site,
    /// Mean over heads of [`HeadPattern::entropy`].
    pub entropy: Estimate,
    /// Mean over heads of [`HeadPattern::sink`].
    pub sink: Estimate,
    /// Mean over heads of [`HeadPattern::distance`].
    pub distance: Estimate,
    /// Jensen-Shannon divergence between the heads' weights over the logarithm of their number: 0 if all look alike, 1 if no two share
    /// a key.
    pub disagreement: Estimate,
    /// Each head.
    pub heads: Vec<HeadPattern>,
}

impl AttentionPattern {
    /// Looks at most at `queries` queries of each sequence, none of the first `skip` and never the first, which has no choice.
    pub fn new(sites: &SiteSet, queries: usize, skip: usize) -> Self {
        AttentionPattern { sites: sites.clone(), queries, skip: skip.max(1), ..Default::default() }
    }

    /// What was seen at `site`; `None` if the wiring shows no attention there or the texts were too short.
    ///
    /// # Errors
    /// [`AnalysisError::Site`] if a number is not finite.
    pub fn profile(&self, site: Site) -> Result<Option<AttentionProfile>, AnalysisError> {
        let seen = self.seen.borrow();
        let Some(seen) = seen.get(&site) else { return Ok(None) };
        // Sequences, each with a value per head and column.
        let (mut sequences, mut disagreement) = (Vec::new(), Vec::new());
        let mut count = 0;
        for s in seen {
            count = s.heads.dims()[1];
            let values = read(site, s.heads.clone())?;
            sequences
                .extend(values.chunks(count * COLUMNS).map(|c| c.iter().map(|v| f64::from(*v)).collect()));
            disagreement.extend(read(site, s.disagreement.clone())?.iter().map(|v| f64::from(*v)));
        }
        let sequences: Vec<Vec<f64>> = sequences;
        if sequences.iter().flatten().chain(&disagreement).any(|v| !v.is_finite()) {
            return Err(AnalysisError::Site { site, what: "attention is not finite".into() });
        }
        let over_heads = |column: usize| {
            let one = |s: &Vec<f64>| {
                vec![mean(&s.iter().skip(column).step_by(COLUMNS).copied().collect::<Vec<_>>())]
            };
            Estimate::of(&sequences.iter().map(one).collect::<Vec<_>>())
        };
        let over_sequences = |head: usize, column: usize| {
            mean(&sequences.iter().map(|s| s[head * COLUMNS + column]).collect::<Vec<_>>())
        };
        let heads = (0..count).map(|h| HeadPattern {
            entropy: over_sequences(h, 0),
            sink: over_sequences(h, 1),
            distance: over_sequences(h, 2),
        });
        Ok(Some(AttentionProfile {
            site,
            entropy: over_heads(0),
            sink: over_heads(1),
            distance: over_heads(2),
            disagreement: Estimate::of(&disagreement.iter().map(|v| vec![*v]).collect::<Vec<_>>()),
            heads: heads.collect(),
        }))
    }
}

impl Brick for AttentionPattern {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        run.insert(AttentionTaps::default());
        let y = base(x, run);
        for (_, q, k, options) in run.take::<AttentionTaps>().unwrap_or_default().seen {
            if let Some(seen) =
                look(q.without_autodiff(), k.without_autodiff(), &options, self.queries, self.skip)
            {
                self.seen.borrow_mut().entry(site).or_default().push(seen);
            }
        }
        y
    }
}

/// The pattern of `q: [batch, heads, t, head_dim]` over `k: [batch, kv_heads, s, head_dim]`.
fn look(q: Tensor<4>, k: Tensor<4>, options: &AttentionOptions, queries: usize, skip: usize) -> Option<Seen> {
    let ([batch, heads, t, dim], [_, kv_heads, s, _]) = (q.dims(), k.dims());
    let positions = spread(skip, t, queries);
    if positions.is_empty() {
        return None;
    }
    let step = (CHUNK / (batch * heads * s).max(1)).clamp(1, positions.len());
    let device = q.device();
    let k = k.swap_dims(2, 3);
    // What a sum of weights over keys picks: the first key, and each key's position.
    let picks: Vec<f32> = (0..s).flat_map(|j| [f32::from(u8::from(j == 0)), j as f32]).collect();
    let picks = Tensor::<2>::from_data(TensorData::new(picks, [s, 2]), &device);
    let mut sums: Option<(Tensor<3>, Tensor<1>)> = None;
    for chunk in positions.chunks(step) {
        let n = chunk.len();
        let ids: Vec<i32> = chunk.iter().map(|p| *p as i32).collect();
        let rows = q.clone().select(2, Tensor::from_data(TensorData::new(ids, [n]), &device));
        let rows = (rows * options.scale).reshape([batch, kv_heads, heads / kv_heads * n, dim]);
        let scores = rows.matmul(k.clone()).reshape([batch, heads, n, s]);
        let scores = match options.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        };
        let sight = Sight::new(chunk, t, s, options, &device);
        let scores = scores + sight.bias;
        let weights = softmax(scores.clone(), 3);
        // -sum a ln a, with ln a_j = s_j - ln Z and ln Z = max s - ln max a: no logarithm of each weight.
        let log_sum = scores.clone().max_dim(3) - weights.clone().max_dim(3).log();
        let entropy = log_sum - (weights.clone() * scores).sum_dim(3);
        let shared = weights.clone().mean_dim(1);
        let shared = -(shared.clone() * shared.clamp_min(1e-30).log()).sum_dim(3);
        let apart = shared - entropy.clone().mean_dim(1);
        let most = (heads.max(2) as f64).ln();
        let apart = apart.sum_dim(2).reshape([batch]) / most;
        let picked =
            weights.reshape([batch * heads * n, s]).matmul(picks.clone()).reshape([batch, heads, n, 2]);
        let distance = sight.position - picked.clone().narrow(3, 1, 1);
        let all = Tensor::cat(vec![entropy * sight.share, picked.narrow(3, 0, 1), distance], 3);
        let all = all.sum_dim(2).reshape([batch, heads, COLUMNS]);
        sums = Some(match sums {
            Some((a, b)) => (a + all, b + apart),
            None => (all, apart),
        });
    }
    let n = positions.len() as f64;
    sums.map(|(all, apart)| Seen { heads: all / n, disagreement: apart / n })
}

/// What the queries of a chunk can see.
struct Sight {
    /// `[1, 1, n, s]`: 0 for a key in sight, [`HIDDEN`] for the others.
    bias: Tensor<4>,
    /// `[1, 1, n, 1]`: one over the logarithm of the number of keys in sight; 0 for one key.
    share: Tensor<4>,
    /// `[1, 1, n, 1]`: where the query stands among the keys.
    position: Tensor<4>,
}

impl Sight {
    fn new(chunk: &[usize], t: usize, s: usize, options: &AttentionOptions, device: &Device) -> Self {
        let n = chunk.len();
        let mut bias = vec![0.0f32; n * s];
        let (mut share, mut position) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for (query, row) in chunk.iter().zip(bias.chunks_mut(s)) {
            let at = s - t + query;
            let sees = |j: usize| {
                (!options.causal || j <= at) && options.window.is_none_or(|window| j.abs_diff(at) < window)
            };
            let mut in_sight = 0usize;
            for (j, value) in row.iter_mut().enumerate() {
                if sees(j) { in_sight += 1 } else { *value = HIDDEN }
            }
            share.push(if in_sight > 1 { (1.0 / (in_sight as f64).ln()) as f32 } else { 0.0 });
            position.push(at as f32);
        }
        let tensor = |values: Vec<f32>, width: usize| {
            Tensor::<4>::from_data(TensorData::new(values, [1, 1, n, width]), device)
        };
        Sight { bias: tensor(bias, s), share: tensor(share, 1), position: tensor(position, 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::{Part, Seed};

    fn options() -> AttentionOptions {
        AttentionOptions { scale: 0.5, causal: true, window: None, softcap: None }
    }

    fn tensor(values: Vec<f32>, shape: [usize; 4]) -> Tensor<4> {
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn profile(q: Tensor<4>, k: Tensor<4>, options: &AttentionOptions, queries: usize) -> AttentionProfile {
        let site = Site::layer(3, Part::Attn);
        let pattern = AttentionPattern::new(&[site].into_iter().collect(), queries, 0);
        let x = Tensor::<3>::zeros([1, 1, 1], &Device::flex());
        Run::new(&[&pattern]).at(site, x, &mut |x, run: &mut Run<'_>| {
            let taps = run.get_mut::<AttentionTaps>().expect("a brick asks for what attention sees");
            taps.seen.push((site, q.clone(), k.clone(), options.clone()));
            x
        });
        pattern.profile(site).unwrap().expect("something was seen")
    }

    #[test]
    fn uniform_attention_has_entropy_1_and_one_key_has_0() {
        let (t, zeros) = (40, vec![0.0; 2 * 4 * 40 * 8]);
        let flat = profile(tensor(zeros.clone(), [2, 4, t, 8]), tensor(zeros, [2, 4, t, 8]), &options(), t);
        assert!((flat.entropy.mean - 1.0).abs() < 1e-5, "{flat:?}");
        assert!(flat.disagreement.mean.abs() < 1e-5);
        let sink: f64 = (1..t).map(|i| 1.0 / (i + 1) as f64).sum::<f64>() / (t - 1) as f64;
        let distance: f64 = (1..t).map(|i| i as f64 / 2.0).sum::<f64>() / (t - 1) as f64;
        assert!((flat.sink.mean - sink).abs() < 1e-6 && (flat.distance.mean - distance).abs() < 1e-4);
        // Every query meets the first key only.
        let ones = vec![1.0; 2 * 4 * t * 8];
        let first: Vec<f32> = (0..2 * 4 * t * 8).map(|i| if i / 8 % t == 0 { 60.0 } else { 0.0 }).collect();
        let sharp = profile(tensor(ones, [2, 4, t, 8]), tensor(first, [2, 4, t, 8]), &options(), t);
        assert!(sharp.entropy.mean.abs() < 1e-5 && (sharp.sink.mean - 1.0).abs() < 1e-6, "{sharp:?}");
        assert!((sharp.distance.mean - 20.0).abs() < 1e-4);
    }

    /// Entropy share, sink, distance and divergence between heads, as their definitions say, in f64.
    fn plain(q: &[f32], k: &[f32], shape: [usize; 5], o: &AttentionOptions) -> (Vec<[f64; 3]>, f64) {
        let [batch, heads, kv, t, d] = shape;
        let mut by_head = vec![[0.0; 3]; heads];
        let mut divergence = 0.0;
        for b in 0..batch {
            for i in 1..t {
                let mut together = vec![0.0; t];
                let mut entropies = 0.0;
                for h in 0..heads {
                    let g = h / (heads / kv);
                    let sees = |j: usize| j <= i && o.window.is_none_or(|w| i - j < w);
                    let score = |j: usize| {
                        let at = |x: &[f32], head: usize, n: usize, r: usize, c: usize| {
                            f64::from(x[((b * n + head) * t + r) * d + c])
                        };
                        let s: f64 = (0..d).map(|c| at(q, h, heads, i, c) * at(k, g, kv, j, c)).sum();
                        o.softcap.map_or(s * o.scale, |cap| cap * (s * o.scale / cap).tanh())
                    };
                    let raw: Vec<f64> = (0..t).map(|j| if sees(j) { score(j).exp() } else { 0.0 }).collect();
                    let z: f64 = raw.iter().sum();
                    let a: Vec<f64> = raw.iter().map(|v| v / z).collect();
                    let entropy =
                        |a: &[f64]| -a.iter().filter(|v| **v > 0.0).map(|v| v * v.ln()).sum::<f64>();
                    let seen = (0..t).filter(|j| sees(*j)).count() as f64;
                    by_head[h][0] += if seen > 1.0 { entropy(&a) / seen.ln() } else { 0.0 };
                    by_head[h][1] += a[0];
                    by_head[h][2] +=
                        a.iter().enumerate().map(|(j, v)| v * (i as f64 - j as f64)).sum::<f64>();
                    entropies += entropy(&a) / heads as f64;
                    together.iter_mut().zip(&a).for_each(|(s, v)| *s += v / heads as f64);
                    if h + 1 == heads {
                        divergence += (entropy(&together) - entropies) / (heads as f64).ln();
                    }
                }
            }
        }
        let n = (batch * (t - 1)) as f64;
        (by_head.into_iter().map(|h| h.map(|v| v / n)).collect(), divergence / n)
    }

    #[test]
    fn patterns_are_those_of_plain_loops() {
        let [batch, heads, kv, t, d] = [2, 4, 2, 30, 8];
        let q = Seed(1).normal("q", batch * heads * t * d, 1.5);
        let k = Seed(1).normal("k", batch * kv * t * d, 1.5);
        let cases = [
            options(),
            AttentionOptions { window: Some(7), ..options() },
            AttentionOptions { softcap: Some(2.0), ..options() },
        ];
        let mut entropies = Vec::new();
        for o in cases {
            let (by_head, divergence) = plain(&q, &k, [batch, heads, kv, t, d], &o);
            let (q, k) = (tensor(q.clone(), [batch, heads, t, d]), tensor(k.clone(), [batch, kv, t, d]));
            let found = profile(q.clone(), k.clone(), &o, t);
            for (h, expected) in found.heads.iter().zip(&by_head) {
                let pairs = [
                    (h.entropy, expected[0]),
                    (h.sink, expected[1]),
                    (h.distance / 30.0, expected[2] / 30.0),
                ];
                assert!(pairs.iter().all(|(a, b)| (a - b).abs() < 1e-5), "{o:?} {h:?} {expected:?}");
            }
            assert!((found.disagreement.mean - divergence).abs() < 1e-5);
            entropies.push(found.entropy.mean);
            // Fewer queries are an estimate, not the same number.
            let some = profile(q, k, &o, 10).entropy.mean;
            assert!(some != found.entropy.mean && (some - found.entropy.mean).abs() < 0.1);
        }
        assert!(entropies[0] != entropies[1] && entropies[2] > entropies[0] + 0.01, "control: {entropies:?}");
    }
}
