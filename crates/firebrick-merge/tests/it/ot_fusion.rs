//! Fusion by optimal transport: copies with another order or number of units come back, in every family.

use burn::tensor::{Device, Int, Tensor};
use firebrick_core::{Part, Run, Seed, Silent, Site};
use firebrick_merge::ot_fusion::{OtAlignment, OtFusion, Residual, Solver};
use firebrick_merge::task_vectors::TaskVector;
use firebrick_models::{Decoder, DecoderConfig, Model, token_tensor};
use firebrick_tensor::linalg::Matrix;
use firebrick_train::{TextData, TrainConfig, domain, fit};

use crate::twin::{cases, families, far, logits, tokens, weights};

fn device() -> Device {
    Device::flex()
}

/// Which unit of the model each unit of a copy is, and what divides the columns of a copied input.
struct Copy {
    stream: Vec<usize>,
    mlp: Vec<usize>,
    kv_heads: Vec<usize>,
    heads: Vec<usize>,
    values: Vec<usize>,
    /// How often each unit of the stream, hidden unit and head is there.
    times: [f64; 3],
}

impl Copy {
    /// A random order of everything, the same in all layers.
    fn shuffled(c: &DecoderConfig, seed: u64) -> Copy {
        let order = |n: usize, name: &str| {
            let keys: Vec<f64> = Seed(seed).normal_f64(name, n, 1.0).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
            order
        };
        let each = c.heads / c.kv_heads;
        let kv_heads = order(c.kv_heads, "groups");
        let heads = kv_heads
            .iter()
            .flat_map(|g| order(each, &format!("heads{g}")).into_iter().map(move |h| g * each + h));
        let dims = |g: &usize| {
            order(c.head_dim, &format!("values{g}")).into_iter().map({
                let g = *g;
                move |d| g * c.head_dim + d
            })
        };
        Copy {
            stream: order(c.d_model, "stream"),
            mlp: order(c.d_ff, "mlp"),
            heads: heads.collect(),
            values: kv_heads.iter().flat_map(dims).collect(),
            kv_heads,
            times: [1.0; 3],
        }
    }

    /// Twice as many groups of heads and hidden units, and units of the stream where `stream`.
    fn doubled(c: &DecoderConfig, stream: bool) -> Copy {
        let twice = |n: usize| (0..2 * n).map(|i| i / 2).collect::<Vec<_>>();
        let (each, width) = (c.heads / c.kv_heads, c.head_dim);
        let spread =
            |n: usize| twice(c.kv_heads).into_iter().flat_map(move |g| (0..n).map(move |x| g * n + x));
        Copy {
            stream: if stream { twice(c.d_model) } else { (0..c.d_model).collect() },
            mlp: twice(c.d_ff),
            kv_heads: twice(c.kv_heads),
            heads: spread(each).collect(),
            values: spread(width).collect(),
            times: [if stream { 2.0 } else { 1.0 }, 2.0, 2.0],
        }
    }

    fn config(&self, c: &DecoderConfig) -> DecoderConfig {
        DecoderConfig {
            d_model: self.stream.len(),
            d_ff: self.mlp.len(),
            heads: self.heads.len(),
            kv_heads: self.kv_heads.len(),
            ..c.clone()
        }
    }

    /// The copy: the same function.
    fn of(&self, model: &TaskVector, c: &DecoderConfig) -> TaskVector {
        let whole = |heads: &[usize]| -> Vec<usize> {
            heads.iter().flat_map(|h| (0..c.head_dim).map(move |d| h * c.head_dim + d)).collect()
        };
        let (q, k) = (whole(&self.heads), whole(&self.kv_heads));
        // Rows of the output projection's input: each head has its group's values.
        let each = c.heads / c.kv_heads;
        let group_of = |h: usize| self.kv_heads.iter().position(|g| *g == self.heads[h] / each).unwrap();
        let mixed: Vec<usize> = (0..self.heads.len())
            .flat_map(|h| {
                let from = group_of(h) * c.head_dim;
                (0..c.head_dim).map(move |d| self.heads[h] * c.head_dim + self.values[from + d] % c.head_dim)
            })
            .collect();
        let [stream, hidden, heads] = self.times;
        let mut copy = TaskVector::default();
        for (site, m) in &model.sites {
            let all: Vec<usize> = (0..m.rows().max(m.cols())).collect();
            let one = &all[..1];
            let (rows, cols, divide): (&[usize], &[usize], f64) = match site.part {
                Part::Embed => (&all[..m.rows()], &self.stream, 1.0),
                Part::Head => (&all[..m.rows()], &self.stream, stream),
                Part::AttnQ => (&q, &self.stream, stream),
                Part::AttnK => (&k, &self.stream, stream),
                Part::AttnV => (&self.values, &self.stream, stream),
                Part::AttnO => (&self.stream, &mixed, heads),
                Part::MlpGate | Part::MlpUp => (&self.mlp, &self.stream, stream),
                Part::MlpDown => (&self.stream, &self.mlp, hidden),
                Part::AttnQBias => (one, &q, 1.0),
                Part::AttnKBias => (one, &k, 1.0),
                Part::AttnVBias => (one, &self.values, 1.0),
                Part::AttnQNorm | Part::AttnKNorm => (one, &all[..m.cols()], 1.0),
                _ => (one, &self.stream, 1.0),
            };
            copy.sites.insert(
                *site,
                Matrix::from_fn(rows.len(), cols.len(), |i, j| m[(rows[i], cols[j])] / divide),
            );
        }
        copy
    }

    /// Whether all plans lead back.
    fn is_found(&self, found: &OtAlignment) -> bool {
        let back =
            |matches: Vec<usize>, order: &[usize]| matches.iter().enumerate().all(|(j, i)| order[*i] == j);
        found.stream.iter().all(|p| back(p.matches(), &self.stream))
            && found.layers.iter().all(|l| {
                back(l.mlp.matches(), &self.mlp)
                    && back(l.kv_heads.matches(), &self.kv_heads)
                    && back(l.heads.matches(), &self.heads)
                    && back(l.values.matches(), &self.values)
            })
    }
}

fn far_weights(a: &TaskVector, b: &TaskVector) -> f64 {
    assert_eq!(a.sites.len(), b.sites.len());
    a.sites.iter().map(|(s, m)| m.max_abs_diff(&b.sites[s])).fold(0.0, f64::max)
}

#[test]
fn a_permuted_copy_is_found_and_its_mean_is_the_model() {
    let soft = Solver::Sinkhorn { regularization: 0.03 };
    for (config, seed) in cases() {
        let model = weights(&config, seed);
        let copy = Copy::shuffled(&config, seed);
        let permuted = copy.of(&model, &config);
        let [anchor, other] = [&model, &permuted].map(|m| m.decoder(config.clone(), &device()).unwrap());
        let ids = tokens(3, 20, seed);
        let expected = logits(&anchor, &ids);
        let size: f32 = expected.clone().abs().max().into_scalar();
        assert!(
            far(logits(&other, &ids), expected.clone()) < 1e-4 * size.max(1.0),
            "the copy is the same function"
        );
        let plain =
            model.plus(&permuted, 1.0).unwrap().times(0.5).decoder(config.clone(), &device()).unwrap();
        assert!(far(logits(&plain, &ids), expected.clone()) > 0.1, "control: the plain mean is not");
        for seen in [None, Some(tokens(8, 40, seed + 50))] {
            for residual in [Residual::Stream, Residual::Mean, Residual::Branch] {
                if residual != Residual::Stream && config.tied_head {
                    continue;
                }
                for units in [Solver::Exact, soft] {
                    let settings = OtFusion { units, heads: units, residual };
                    let found = settings.align(&anchor, &other, seen.clone()).unwrap();
                    let what = format!("{} {settings:?} {}", config.model_type, seen.is_some());
                    assert!(copy.is_found(&found), "{what}");
                    let fused = found.fuse(&model, 0.5).unwrap();
                    let fused = logits(&fused.decoder(config.clone(), &device()).unwrap(), &ids);
                    let gap = far(fused, expected.clone());
                    assert!(gap < 1e-2, "{what}: {gap} of {size}");
                    if units == Solver::Exact {
                        assert!(gap < 1e-4, "{what}: {gap} of {size}");
                        assert!(far_weights(&found.aligned, &model) < 1e-6);
                    }
                }
            }
        }
        // Fine-tunes are no copies: a tenth of noise hides nothing.
        let noisy = permuted.plus(&weights(&config, seed + 100), 0.1).unwrap();
        let noisy = noisy.decoder(config.clone(), &device()).unwrap();
        assert!(copy.is_found(&OtFusion::default().align(&anchor, &noisy, None).unwrap()));
        let identity = OtFusion { residual: Residual::Identity, ..OtFusion::default() };
        let blind = identity.align(&anchor, &other, None).unwrap();
        assert!(!copy.is_found(&blind), "control: the stream is permuted, too");
    }
}

#[test]
fn copies_of_another_width_come_back_both_ways() {
    for (config, seed) in cases() {
        let model = weights(&config, seed);
        let ids = tokens(2, 12, seed);
        for stream in [false, true] {
            if stream && config.tied_head {
                continue;
            }
            let copy = Copy::doubled(&config, stream);
            let wide_config = copy.config(&config);
            let wide = copy.of(&model, &config);
            let [narrow, broad] = [(&model, &config), (&wide, &wide_config)]
                .map(|(m, c)| m.decoder(c.clone(), &device()).unwrap());
            let expected = logits(&narrow, &ids);
            assert!(far(logits(&broad, &ids), expected.clone()) < 1e-4, "the wide copy is the same function");
            let settings = OtFusion::default();
            let found = settings.align(&narrow, &broad, None).unwrap();
            assert!(far_weights(&found.aligned, &model) < 1e-5, "{}", far_weights(&found.aligned, &model));
            // One normalization for both sides of a weight, as for equal widths, is off by a factor of 2.
            let down = Site::layer(0, Part::MlpDown);
            let mlp = &found.layers[0].mlp;
            let single = found.stream[1]
                .outgoing()
                .transpose()
                .matmul(&wide.sites[&down].matmul(&mlp.outgoing()).unwrap());
            let half = Matrix::from_fn(config.d_model, config.d_ff, |i, j| model.sites[&down][(i, j)] / 2.0);
            assert!(single.unwrap().max_abs_diff(&half) < 1e-5, "control");
            // The other way, the narrow model is carried onto the wide one and stays the same function.
            let widened = settings.align(&broad, &narrow, None).unwrap().fuse(&wide, 0.5).unwrap();
            let widened = logits(&widened.decoder(wide_config, &device()).unwrap(), &ids);
            assert!(far(widened, expected) < 1e-4);
        }
    }
}

#[test]
fn soft_plans_are_doubly_stochastic_and_harden() {
    let config = families()[1].clone();
    for seed in 0..3 {
        let [a, b] =
            [0, 1].map(|m| weights(&config, 10 * seed + m).decoder(config.clone(), &device()).unwrap());
        let align =
            |units| OtFusion { units, heads: units, residual: Residual::Mean }.align(&a, &b, None).unwrap();
        let mut before = f64::INFINITY;
        let hard = align(Solver::Exact);
        for regularization in [0.3, 0.08, 0.02] {
            let soft = align(Solver::Sinkhorn { regularization });
            let plans = soft.layers.iter().flat_map(|l| [&l.heads, &l.kv_heads, &l.values, &l.mlp]);
            for plan in plans.chain(&soft.stream) {
                let (n, m) = (plan.mass.rows(), plan.mass.cols());
                for i in 0..n {
                    assert!(((0..m).map(|j| plan.incoming()[(i, j)]).sum::<f64>() - 1.0).abs() < 1e-4);
                }
                for j in 0..m {
                    assert!(((0..n).map(|i| plan.outgoing()[(i, j)]).sum::<f64>() - 1.0).abs() < 1e-4);
                }
            }
            let apart = far_weights_mass(&soft, &hard);
            assert!(apart < before, "{regularization}: {apart} after {before}");
            before = apart;
        }
    }
}

/// The mass of the stream's first plan that lies elsewhere than in the hard one.
fn far_weights_mass(a: &OtAlignment, b: &OtAlignment) -> f64 {
    a.stream[0].mass.data().iter().zip(b.stream[0].mass.data()).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0
}

#[test]
fn models_that_cannot_be_carried_are_refused() {
    let tiny = DecoderConfig::tiny(24);
    let decoder = |c: &DecoderConfig| weights(c, 0).decoder(c.clone(), &device()).unwrap();
    let anchor = decoder(&tiny);
    let other = DecoderConfig { layers: 3, rope_theta: 500.0, d_model: 24, d_ff: 48, ..tiny.clone() };
    let error =
        OtFusion { residual: Residual::Mean, ..OtFusion::default() }.align(&anchor, &decoder(&other), None);
    let error = error.unwrap_err().to_string();
    for what in ["`layers` is 3 and 2", "`rope_theta`", "24 and 16 wide", "one plan of the stream"] {
        assert!(error.contains(what), "{error}");
    }
    assert_eq!(error.matches(';').count(), 3, "{error}");
    let wrong = OtFusion { units: Solver::Sinkhorn { regularization: 0.0 }, ..OtFusion::default() };
    assert!(wrong.align(&anchor, &anchor, None).unwrap_err().to_string().contains("above 0"));
}

#[test]
fn the_embedded_model_survives_its_permuted_copy() {
    let model = Model::embedded(&device()).unwrap();
    let config = model.decoder.config().clone();
    let reference = TaskVector::of(&model.decoder).unwrap();
    let copy = Copy::shuffled(&config, 0);
    let permuted = copy.of(&reference, &config);
    let other = permuted.decoder(config.clone(), &device()).unwrap();
    let text = domain("prose").unwrap().held_out_text();
    let data = TextData::from_text(&text, &model.tokenizer).unwrap();
    let ids = token_tensor(&data.spread(64, 4), &device());
    let seen = token_tensor(&data.spread(32, 8), &device());
    let perplexity = |m: &TaskVector| -> f32 {
        let d = m.decoder(config.clone(), &device()).unwrap();
        d.nll(ids.clone(), &mut Run::default()).mean().exp().into_scalar()
    };
    let plain = perplexity(&reference.plus(&permuted, 1.0).unwrap().times(0.5));
    let start = perplexity(&reference);
    for seen in [None, Some(seen)] {
        let found = OtFusion::default().align(&model.decoder, &other, seen).unwrap();
        assert!(copy.is_found(&found));
        let fused = found.fuse(&reference, 0.5).unwrap();
        let gap = far(
            logits(&fused.decoder(config.clone(), &device()).unwrap(), &ids),
            logits(&model.decoder, &ids),
        );
        assert!(gap < 1e-4, "{gap}");
    }
    assert!(plain > 10.0 * start, "control: {plain} by the plain mean, {start} before");
}

/// Two small decoders that learned the same from different beginnings, on three seeds. Each token follows from the one before it, but
/// for 1 in 20.
#[test]
fn models_of_different_seeds_fuse_where_their_mean_fails() {
    let config = DecoderConfig {
        layers: 1,
        d_model: 32,
        d_ff: 256,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        tied_head: false,
        ..DecoderConfig::tiny(16)
    };
    let text = |seed: u64| {
        let mut ids = vec![1u32];
        for noise in Seed(seed).uniform("noise", 4000, 0.5) {
            let last = ids[ids.len() - 1];
            let next = (last * last + 3 * last + 5) % 16;
            ids.push(if noise > 0.45 { ((noise - 0.45) * 319.0) as u32 } else { next });
        }
        TextData::new(ids, 1)
    };
    let [held, seen] = [99, 98].map(|seed| token_tensor(&text(seed).spread(32, 16), &device()));
    let nll = |weights: &TaskVector| -> f32 {
        let decoder = weights.decoder(config.clone(), &device()).unwrap();
        decoder.nll(held.clone(), &mut Run::default()).mean().into_scalar()
    };
    for seed in 0..3 {
        let fresh =
            |m, device: &Device| Decoder::random(config.clone(), Seed(10 * seed + m), device).unwrap();
        let [a, b] = [0, 1].map(|m| {
            let steps =
                TrainConfig { steps: 150, batch: 8, window: 32, learning_rate: 1e-2, ..Default::default() };
            let settings = TrainConfig { seed: 10 * seed + m, ..steps };
            let loss = &mut |d: &Decoder, ids: Tensor<2, Int>, _| d.nll(ids, &mut Run::default()).mean();
            let start = fresh(m, &Device::flex().autodiff()).trainable();
            TaskVector::of(&fit(start, &settings, &text(10 * seed + m), loss, &Silent, false).unwrap().0)
                .unwrap()
        });
        let anchor = a.decoder(config.clone(), &device()).unwrap();
        let fuse = |other: &Decoder, seen| {
            nll(&OtFusion::default().align(&anchor, other, seen).unwrap().fuse(&a, 0.5).unwrap())
        };
        let other = b.decoder(config.clone(), &device()).unwrap();
        let plain = nll(&a.plus(&b, 1.0).unwrap().times(0.5));
        let (by_weights, by_activations) = (fuse(&other, None), fuse(&other, Some(seen.clone())));
        let blank = fuse(&fresh(2, &device()), None);
        let (one, two) = (nll(&a), nll(&b));
        let says = format!(
            "seed {seed}: nats {one:.3} and {two:.3}, mean {plain:.3}, by transport {by_weights:.3} (weights) \
             {by_activations:.3} (activations), with an untrained model {blank:.3}"
        );
        for fused in [by_weights, by_activations] {
            assert!(fused < plain - 0.05 && fused < one.max(two) + 0.01, "{says}");
        }
        assert!(blank > plain, "control, what is gained comes from the other model: {says}");
    }
}
