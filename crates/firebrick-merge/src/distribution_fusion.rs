//! Distribution fusion: what several models predict, whatever their tokenizers, as one target for a student.
//!
//! The recipe for models of different architectures (Wan et al. 2024, arXiv 2401.10491; Unconstrained Model Merging, arXiv
//! 2410.13699): each teacher reads the same text and keeps its most probable tokens at each step; [`token_alignment`] brings
//! them to the steps and the vocabulary of the student; [`fuse`] takes the teacher that knows the text best, or weighs them by how
//! well they know it; the student learns from labels and fused targets together. Targets stay sparse all the way.
//!
//! [`token_alignment`]: crate::token_alignment

use std::collections::{BTreeMap, HashMap};

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Part, Progress, Run, Site, Task};
use firebrick_models::tokenizer::Tokenizer;
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::ops::{linear_sparse_kl, sparse_kl};

use crate::MergeError;
use crate::logits_fusion::Companion;
use crate::token_alignment::{SparseDistribution, VocabMap, VocabRule, one_to_one};

/// How distributions of several teachers become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FusionRule {
    /// That of the teacher with the least cross-entropy on the text, the first of equals.
    #[default]
    MinCe,
    /// Their mixture, with weights `softmax(exp(-CE))` of the teachers' mean cross-entropies.
    AvgCe,
}

/// Settings of distribution fusion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistributionFusionConfig {
    /// How many tokens of each prediction are kept; their probabilities are scaled to sum to one.
    pub top: usize,
    /// How teachers are fused.
    pub rule: FusionRule,
    /// Where tokens go that the student does not have.
    pub vocab: VocabRule,
    /// Weight of the fused targets in the loss; the rest is cross-entropy on the text.
    pub soft: f64,
}

impl Default for DistributionFusionConfig {
    fn default() -> Self {
        DistributionFusionConfig { top: 10, rule: FusionRule::MinCe, vocab: VocabRule::Nearest, soft: 0.1 }
    }
}

/// What a model predicts along a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    /// For each token of the text from the second on, the distribution it was drawn from, as far as it is kept; sums to one.
    pub steps: Vec<SparseDistribution>,
    /// Negative log-likelihood of those tokens in nats, all together.
    pub nll: f64,
}

/// Logits read back at a time.
const CHUNK: usize = 1 << 22;

/// The `top` most probable tokens (lower ids first among equals) of each step of `ids` behind `context` (a begin token, or
/// nothing), scaled to sum to one.
///
/// # Errors
/// [`MergeError::Fusion`] with all that is wrong: fewer than 2 tokens, more than the model's context, an id it does not know,
/// `top` of 0; [`MergeError::Model`] if the backend fails.
pub fn predictions(
    model: Companion<'_>,
    context: &[u32],
    ids: &[u32],
    top: usize,
) -> Result<Predictions, MergeError> {
    let decoder = model.decoder;
    let (limit, vocab) = (decoder.config().max_tokens, decoder.config().vocab);
    let all = [context, ids].concat();
    let mut problems = Vec::new();
    if ids.len() < 2 {
        problems.push(format!("a text of {} tokens has nothing to predict", ids.len()));
    }
    if all.len() > limit {
        problems.push(format!("a text of {} tokens for a teacher with a context of {limit}", all.len()));
    }
    if let Some(id) = all.iter().find(|id| **id as usize >= vocab) {
        problems.push(format!("the text has token {id}, a teacher knows {vocab}"));
    }
    if top == 0 {
        problems.push("no token of a prediction is kept".into());
    }
    if !problems.is_empty() {
        return Err(MergeError::Fusion { problems });
    }
    let mut run = Run::new(model.bricks);
    let hidden = decoder.hidden(token_tensor(&[&all], &decoder.device()), &mut run);
    let (mut steps, mut nll) = (Vec::with_capacity(ids.len() - 1), 0.0);
    let rows = (CHUNK / vocab).max(1);
    for (i, labels) in ids[1..].chunks(rows).enumerate() {
        let part = hidden.clone().narrow(1, context.len() + i * rows, labels.len());
        let logits = decoder.logits(part, &mut run).into_data().try_into_vec_as::<f32>();
        let logits = logits.map_err(|e| firebrick_models::ModelError::Backend(format!("{e:?}")))?;
        for (row, label) in logits.chunks(vocab).zip(labels) {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |logit: f32| f64::from(logit - largest).exp();
            let sum: f64 = row.iter().map(|l| weight(*l)).sum();
            nll += sum.ln() - f64::from(row[*label as usize] - largest);
            steps.push(most_probable(row, top, &weight));
        }
    }
    if !nll.is_finite() {
        let problems = vec![format!("a teacher gives the text a likelihood of e^-{nll}")];
        return Err(MergeError::Fusion { problems });
    }
    Ok(Predictions { steps, nll })
}

fn most_probable(logits: &[f32], top: usize, weight: &dyn Fn(f32) -> f64) -> SparseDistribution {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top - 1, order);
        ids.truncate(top);
    }
    ids.sort_unstable_by(order);
    let sum: f64 = ids.iter().map(|&id| weight(logits[id as usize])).sum();
    ids.iter().map(|&id| (id, (weight(logits[id as usize]) / sum) as f32)).collect()
}

/// Brings what a teacher predicts along `source`, the text in its tokens, to `target`, the text in the student's tokens.
/// Returns predictions for the student's steps, and at how many of them they are the teacher's.
///
/// A step comes over where it has one partner, [`one_to_one`], and the teacher's token there maps to the student's: a warped
/// pair of different tokens predicts different things. All other steps are certain of the student's token. Likelihood stays
/// that of the teacher on the whole text.
///
/// # Errors
/// [`MergeError::Fusion`] if there are not as many predictions as tokens of `source` after the first, or no token in `target`.
pub fn carry(
    teacher: &Predictions,
    source: &[u32],
    target: &[u32],
    map: &mut VocabMap,
) -> Result<(Predictions, usize), MergeError> {
    let mut problems = Vec::new();
    if teacher.steps.len() + 1 != source.len() {
        problems.push(format!("{} predictions for a text of {} tokens", teacher.steps.len(), source.len()));
    }
    if target.is_empty() {
        problems.push("the student's text has no tokens".into());
    }
    if !problems.is_empty() {
        return Err(MergeError::Fusion { problems });
    }
    let partners = one_to_one(&map.align(source, target), target.len());
    let mut carried = 0;
    let steps = target.iter().zip(partners).skip(1).map(|(&token, partner)| {
        let from = partner.filter(|&i| i > 0 && map.get(source[i]) == Some(token));
        let found = from.and_then(|i| map.distribution(&teacher.steps[i - 1]));
        carried += usize::from(found.is_some());
        found.unwrap_or_else(|| vec![(token, 1.0)])
    });
    let steps = steps.collect();
    Ok((Predictions { steps, nll: teacher.nll }, carried))
}

/// One distribution for each step, of teachers that speak of the same steps in the same vocabulary.
///
/// Cross-entropies are in nats per step, so that teachers whose tokens are longer or shorter compare.
///
/// # Errors
/// [`MergeError::Fusion`] without teachers, or if their steps differ in number or a likelihood is not finite.
pub fn fuse(rule: FusionRule, teachers: &[Predictions]) -> Result<Vec<SparseDistribution>, MergeError> {
    let Some(first) = teachers.first() else {
        return Err(MergeError::Fusion { problems: vec!["there is no teacher".into()] });
    };
    let n = first.steps.len();
    let mut problems = Vec::new();
    for (t, teacher) in teachers.iter().enumerate() {
        if teacher.steps.len() != n {
            problems.push(format!("teacher {t} has {} steps, the first {n}", teacher.steps.len()));
        }
        if !teacher.nll.is_finite() {
            problems.push(format!("teacher {t} has a negative log-likelihood of {}", teacher.nll));
        }
    }
    if !problems.is_empty() {
        return Err(MergeError::Fusion { problems });
    }
    if rule == FusionRule::MinCe {
        let best = teachers.iter().min_by(|a, b| a.nll.total_cmp(&b.nll)).unwrap_or(first);
        return Ok(best.steps.clone());
    }
    // Rewards lie in 0..=1: no softmax of them overflows.
    let weights = teachers.iter().map(|t| (-t.nll / n.max(1) as f64).exp().exp());
    let weights: Vec<f64> = weights.collect();
    let total: f64 = weights.iter().sum();
    let mixed = (0..n).map(|step| {
        let mut sums: BTreeMap<u32, f64> = BTreeMap::new();
        for (teacher, weight) in teachers.iter().zip(&weights) {
            for &(id, probability) in &teacher.steps[step] {
                *sums.entry(id).or_default() += weight / total * f64::from(probability);
            }
        }
        sums.into_iter().map(|(id, p)| (id, p as f32)).collect()
    });
    Ok(mixed.collect())
}

/// A model to learn from, with its own tokenizer.
#[derive(Clone, Copy)]
pub struct FusionTeacher<'a> {
    /// The model.
    pub model: Companion<'a>,
    /// What it reads with.
    pub tokenizer: &'a Tokenizer,
}

/// Fused targets of windows of text, by their tokens, and the loss against them.
#[derive(Clone, Debug)]
pub struct FusedTargets {
    windows: HashMap<Vec<u32>, Vec<SparseDistribution>>,
    soft: f64,
    carried: Vec<f64>,
}

impl FusedTargets {
    /// Has every teacher read every one of `windows` (tokens of `student`), and fuses what they predict. The student as it is
    /// may be among the teachers, as the target model is in the paper. A character that a window cuts in two reads as U+FFFD.
    ///
    /// # Errors
    /// [`MergeError::Fusion`] with all that is wrong with the settings, or what is with a window; else as [`predictions`];
    /// [`MergeError::Cancelled`] if `progress` says so.
    pub fn new<'w>(
        student: &Tokenizer,
        teachers: &[FusionTeacher<'_>],
        windows: impl IntoIterator<Item = &'w [u32]>,
        config: &DistributionFusionConfig,
        progress: &dyn Progress,
    ) -> Result<Self, MergeError> {
        let mut problems = Vec::new();
        if !(0.0..=1.0).contains(&config.soft) {
            problems.push(format!("soft {} should lie in 0..=1", config.soft));
        }
        if config.top == 0 {
            problems.push("no token of a prediction is kept".into());
        }
        if teachers.is_empty() {
            problems.push("there is no teacher".into());
        }
        if !problems.is_empty() {
            return Err(MergeError::Fusion { problems });
        }
        let mut maps: Vec<VocabMap> =
            teachers.iter().map(|t| VocabMap::new(t.tokenizer, student, config.vocab)).collect();
        let (mut fused, mut steps, mut carried) = (HashMap::new(), 0, vec![0; teachers.len()]);
        let mut task = Task::begin(progress, "fuse", None, "windows");
        for window in windows {
            let text = student.decode(window, false)?;
            let mut brought = Vec::new();
            for ((teacher, map), carried) in teachers.iter().zip(&mut maps).zip(&mut carried) {
                let ids = teacher.tokenizer.encode(&text, false)?;
                let begin = teacher.tokenizer.bos_id().filter(|_| teacher.tokenizer.adds_bos());
                let known = predictions(teacher.model, begin.as_slice(), &ids, config.top)?;
                let (known, over) = carry(&known, &ids, window, map)?;
                *carried += over;
                brought.push(known);
            }
            steps += window.len() - 1;
            fused.insert(window.to_vec(), fuse(config.rule, &brought)?);
            task.advance(1, "")?;
        }
        let carried = carried.iter().map(|n| *n as f64 / (steps as f64).max(1.0)).collect();
        Ok(FusedTargets { windows: fused, soft: config.soft, carried })
    }

    /// For each teacher the share of steps where its prediction came over.
    pub fn carried(&self) -> &[f64] {
        &self.carried
    }

    /// The targets of a window, one for each token from the second on.
    pub fn window(&self, window: &[u32]) -> Option<&[SparseDistribution]> {
        self.windows.get(window).map(Vec::as_slice)
    }

    /// The mean loss `[1]` per predicted token of `tokens: [batch, tokens]` (on the student's device):
    /// `(1 - soft) CE(labels) + soft KL(fused || student)`. A loss for [`fit`](firebrick_train::fit) on the same windows.
    ///
    /// Reads the tokens back, to find their targets.
    ///
    /// # Panics
    /// If a row is none of the windows.
    pub fn loss(&self, student: &Decoder, run: &mut Run<'_>, tokens: Tensor<2, Int>) -> Tensor<1> {
        let [batch, length] = tokens.dims();
        let ids: Vec<u32> = tokens.clone().into_data().iter::<i64>().map(|id| id as u32).collect();
        let targets: Vec<&SparseDistribution> = ids
            .chunks(length)
            .flat_map(|row| self.window(row).expect("every row is a window with fused targets"))
            .collect();
        let hidden = student.hidden(tokens.clone(), run).narrow(1, 0, length - 1);
        let rows = batch * (length - 1);
        let labels = tokens.narrow(1, 1, length - 1).reshape([rows]);
        let mut loss = student.cross_entropy(hidden.clone(), labels, run).mean() * (1.0 - self.soft);
        if self.soft > 0.0 {
            let (named, probabilities) = sparse_tensors(&targets, &student.device());
            let bare = run.is_bare(Site::global(Part::Head)) && student.config().final_softcap.is_none();
            let kl = if bare {
                let d = hidden.dims()[2];
                linear_sparse_kl(hidden.reshape([rows, d]), student.head_weight(), named, probabilities)
            } else {
                let logits = student.logits(hidden, run);
                let vocab = logits.dims()[2];
                sparse_kl(logits.reshape([rows, vocab]), named, probabilities)
            };
            loss = loss + kl.mean() * self.soft;
        }
        loss
    }
}

/// Ids and probabilities, `[targets, k]` with the `k` of the longest; shorter ones are filled up with probabilities of 0.
fn sparse_tensors(targets: &[&SparseDistribution], device: &Device) -> (Tensor<2, Int>, Tensor<2>) {
    let k = targets.iter().map(|t| t.len()).max().unwrap_or(0).max(1);
    let (mut ids, mut probabilities) = (Vec::new(), Vec::new());
    for target in targets {
        let filled = || target.iter().copied().chain(std::iter::repeat((0, 0.0))).take(k);
        ids.extend(filled().map(|(id, _)| id as i32));
        probabilities.extend(filled().map(|(_, p)| p));
    }
    let shape = [targets.len(), k];
    let ids = Tensor::from_data(TensorData::new(ids, shape), device);
    (ids, Tensor::from_data(TensorData::new(probabilities, shape), device))
}
