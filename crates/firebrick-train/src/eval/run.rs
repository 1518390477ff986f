//! Puts a task to a model.

use firebrick_core::{Brick, Progress};
use firebrick_models::Decoder;
use firebrick_models::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use super::{
    Batching, Confusion, EvalTask, Metric, Request, TaskItem, TaskKind, loglikelihoods, mean_and_error,
};
use crate::TrainError;

/// How a task is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSettings {
    /// Solved examples before each prompt; the task's own number if none.
    pub shots: Option<usize>,
    /// Only the first items.
    pub limit: Option<usize>,
    /// Whether contexts get what the model expects around a text, see [`Request::encode`].
    pub special: bool,
    /// How sequences go through the model together.
    pub batching: Batching,
}

/// What a model made of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskResult {
    /// The task's name.
    pub name: String,
    /// Version of its definition.
    pub version: u64,
    /// What an answer is.
    pub kind: TaskKind,
    /// Solved examples before each prompt.
    pub shots: usize,
    /// Items of the task; `samples` are those that were asked.
    pub items: usize,
    /// The task's metrics, in its order.
    pub scores: Vec<Score>,
    /// Which class was taken for which, as the first of the task's metrics decides; for classifications.
    pub confusion: Option<Confusion>,
    /// Every item that was asked.
    pub samples: Vec<Sample>,
    /// The definition, in the harness's words.
    pub(super) config: Json,
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// What it is.
    pub metric: Metric,
    /// Its value, in `[0, 1]`.
    pub value: f64,
    /// Standard error over items; none for F1 and for fewer than two items.
    pub standard_error: Option<f64>,
}

/// An item as it was asked, and how likely the model finds each choice; as JSON, a line of the harness's `--log_samples`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Number of the item, from 0.
    pub doc_id: usize,
    /// The line of the data.
    pub doc: Json,
    /// Which choice is right.
    pub target: usize,
    /// Context and continuation of each choice.
    pub arguments: Vec<(String, String)>,
    /// Log-likelihood of each continuation, in nats.
    pub filtered_resps: Vec<f64>,
    /// Log-likelihood of each choice without the context, if a metric asks for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unconditional: Vec<f64>,
    /// Characters and bytes of each choice.
    #[serde(skip)]
    lengths: Vec<(usize, usize)>,
}

impl Sample {
    /// The choice that `metric` takes.
    pub fn predicted(&self, metric: Metric, kind: TaskKind) -> usize {
        let value = |i: usize| match metric {
            Metric::Acc | Metric::MacroF1 => self.filtered_resps[i],
            Metric::AccNorm => self.filtered_resps[i] / self.lengths[i].0 as f64,
            Metric::AccBytes => self.filtered_resps[i] / self.lengths[i].1 as f64,
            Metric::AccMutualInfo => self.filtered_resps[i] - self.unconditional.get(i).unwrap_or(&0.0),
        };
        let better = |best: usize, i: usize| {
            // The right text of a pair stands first: equals must not favour it.
            let ahead = value(i) > value(best) || (kind == TaskKind::Pair && value(i) == value(best));
            if ahead { i } else { best }
        };
        (1..self.filtered_resps.len()).fold(0, better)
    }
}

/// Runs `task` on `decoder` with `bricks`.
///
/// # Errors
/// If the task has fewer examples than asked for, an item cannot be encoded ([`Request::encode`]; every item is listed) or a
/// log-likelihood is not a number, and as [`loglikelihoods`].
pub fn run_task(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    tokenizer: &Tokenizer,
    task: &EvalTask,
    settings: &TaskSettings,
    progress: &dyn Progress,
) -> Result<TaskResult, TrainError> {
    let fail = |problems| TrainError::Task { name: task.name().into(), problems };
    let shots = settings.shots.unwrap_or(task.definition.fewshot.count);
    let contexts = task.contexts(shots, settings.limit).map_err(fail)?;
    let mut samples = Vec::with_capacity(contexts.len());
    let (mut requests, mut problems) = (Vec::with_capacity(contexts.len()), Vec::new());
    for (i, (item, context)) in task.first(settings.limit).iter().zip(contexts).enumerate() {
        let texts: Vec<String> =
            item.choices.iter().map(|c| format!("{}{c}", task.definition.target_delimiter)).collect();
        match Request::encode(tokenizer, &context, &texts, settings.special) {
            Ok(request) => requests.push(request),
            Err(e) => problems.push(format!("item {i}: {e}")),
        }
        samples.push(sample(i, item, &context, texts));
    }
    if !problems.is_empty() {
        let more = problems.split_off(problems.len().min(20)).len();
        problems.extend((more > 0).then(|| format!("and {more} more items")));
        return Err(fail(problems));
    }
    let ask = |requests: &[Request]| {
        let found = loglikelihoods(decoder, bricks, requests, settings.batching, progress)?;
        match found.iter().position(|values| values.iter().any(|v| v.is_nan())) {
            Some(i) => Err(fail(vec![format!("item {i}: a log-likelihood is not a number")])),
            None => Ok(found),
        }
    };
    for (sample, values) in samples.iter_mut().zip(ask(&requests)?) {
        sample.filtered_resps = values;
    }
    if task.definition.metrics.contains(&Metric::AccMutualInfo) {
        let alone = |item: &TaskItem| Request::encode(tokenizer, "", &item.choices, settings.special);
        let requests = task.first(settings.limit).iter().map(alone).collect::<Result<Vec<_>, _>>()?;
        for (sample, values) in samples.iter_mut().zip(ask(&requests)?) {
            sample.unconditional = values;
        }
    }
    Ok(result(task, shots, samples))
}

fn sample(doc_id: usize, item: &TaskItem, context: &str, texts: Vec<String>) -> Sample {
    Sample {
        doc_id,
        doc: item.doc.clone(),
        target: item.answer,
        arguments: texts.into_iter().map(|text| (context.to_string(), text)).collect(),
        filtered_resps: Vec::new(),
        unconditional: Vec::new(),
        lengths: item.choices.iter().map(|c| (c.chars().count(), c.len())).collect(),
    }
}

fn result(task: &EvalTask, shots: usize, samples: Vec<Sample>) -> TaskResult {
    let kind = task.kind();
    let confusion = (kind == TaskKind::Classification).then(|| {
        let by = task.definition.metrics.first().copied().unwrap_or(Metric::Acc);
        Confusion::new(task.labels(), samples.iter().map(|s| (s.target, s.predicted(by, kind))))
    });
    let score = |&metric: &Metric| {
        let (value, standard_error) = match (metric, &confusion) {
            (Metric::MacroF1, Some(confusion)) => (confusion.macro_f1(), None),
            _ => {
                let right = |s: &Sample| f64::from(u8::from(s.predicted(metric, kind) == s.target));
                mean_and_error(&samples.iter().map(right).collect::<Vec<_>>())
            }
        };
        Score { metric, value, standard_error }
    };
    let d = &task.definition;
    let metrics: Vec<Json> = d
        .metrics
        .iter()
        .map(|m| json!({"metric": m.name(), "aggregation": "mean", "higher_is_better": true}))
        .collect();
    let config = json!({
        "task": d.name,
        "output_type": "multiple_choice",
        "kind": kind.name(),
        "description": d.description,
        "doc_to_text": d.prompt,
        "target_delimiter": d.target_delimiter,
        "fewshot_delimiter": d.fewshot.delimiter,
        "num_fewshot": shots,
        "metric_list": metrics,
        "metadata": {"version": d.version},
    });
    TaskResult {
        name: d.name.clone(),
        version: d.version,
        kind,
        shots,
        items: task.items().len(),
        scores: d.metrics.iter().map(score).collect(),
        confusion,
        samples,
        config,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(filtered_resps: &[f64], choices: &[&str]) -> Sample {
        let choices = choices.iter().map(|c| c.to_string()).collect();
        let item = TaskItem { doc: Json::Null, prompt: String::new(), choices, answer: 0 };
        Sample { filtered_resps: filtered_resps.to_vec(), ..sample(0, &item, "", Vec::new()) }
    }

    #[test]
    fn predictions_follow_their_metric() {
        let s = asked(&[-3.0, -4.0, -4.4], &["ab", "abcd", "éé"]);
        let of = |metric| s.predicted(metric, TaskKind::MultipleChoice);
        assert_eq!((of(Metric::Acc), of(Metric::AccNorm), of(Metric::AccBytes)), (0, 1, 1));
        let s = asked(&[-3.0, -4.4, -4.0], &["ab", "abcd", "éé"]);
        let of = |metric| s.predicted(metric, TaskKind::MultipleChoice);
        // By characters -1.5, -1.1, -2; by bytes -1.5, -1.1, -1.
        assert_eq!((of(Metric::Acc), of(Metric::AccNorm), of(Metric::AccBytes)), (0, 1, 2));
    }

    #[test]
    fn mutual_information_takes_off_what_a_choice_is_likely_anyway() {
        let s = Sample { unconditional: vec![-1.0, -9.0], ..asked(&[-3.0, -4.0], &["a", "b"]) };
        assert_eq!(s.predicted(Metric::AccMutualInfo, TaskKind::MultipleChoice), 1);
        assert_eq!(s.predicted(Metric::Acc, TaskKind::MultipleChoice), 0);
    }

    #[test]
    fn equals_are_the_first_and_never_right_in_a_pair() {
        let s = asked(&[-2.0, -2.0], &["a", "b"]);
        assert_eq!(s.predicted(Metric::Acc, TaskKind::MultipleChoice), 0);
        assert_eq!(s.predicted(Metric::Acc, TaskKind::Pair), 1);
        assert_eq!(asked(&[-1.0, -2.0], &["a", "b"]).predicted(Metric::Acc, TaskKind::Pair), 0);
    }
}
