//! Results in the form of lm-evaluation-harness.

use serde_json::{Map, Value as Json, json};

use super::{Metric, TaskResult};

/// The results of tasks as lm-evaluation-harness 0.4 writes them: `results` by task with `METRIC,none` and
/// `METRIC_stderr,none`, `configs`, `versions`, `n-shot`, `higher_is_better` and `n-samples`, and `config` as given.
///
/// Classifications have two entries of their own beside these: `classes` and `confusion`, by task.
pub fn results(tasks: &[TaskResult], config: Json) -> Json {
    let by_task = |of: &dyn Fn(&TaskResult) -> Option<Json>| -> Json {
        Json::Object(tasks.iter().filter_map(|t| Some((t.name.clone(), of(t)?))).collect())
    };
    let scores = |t: &TaskResult| {
        let mut scores: Map<String, Json> = [("alias".to_string(), json!(t.name))].into_iter().collect();
        for score in &t.scores {
            let name = score.metric.name();
            scores.insert(format!("{name},none"), json!(score.value));
            scores.insert(
                format!("{name}_stderr,none"),
                score.standard_error.map_or(json!("N/A"), |e| json!(e)),
            );
        }
        Some(Json::Object(scores))
    };
    let better = |t: &TaskResult| {
        let metric = |m: Metric| (m.name().to_string(), json!(true));
        Some(Json::Object(t.scores.iter().map(|s| metric(s.metric)).collect()))
    };
    let mut found = json!({
        "results": by_task(&scores),
        "group_subtasks": by_task(&|_| Some(json!([]))),
        "configs": by_task(&|t| Some(t.config.clone())),
        "versions": by_task(&|t| Some(json!(t.version))),
        "n-shot": by_task(&|t| Some(json!(t.shots))),
        "higher_is_better": by_task(&better),
        "n-samples": by_task(&|t| Some(json!({"original": t.items, "effective": t.samples.len()}))),
        "config": config,
    });
    if tasks.iter().any(|t| t.confusion.is_some()) {
        found["classes"] = by_task(&|t| t.confusion.as_ref().map(|c| json!(c.classes())));
        found["confusion"] = by_task(&|t| t.confusion.as_ref().map(|c| json!(c)));
    }
    found
}
