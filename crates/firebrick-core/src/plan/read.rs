//! Reading plans by hand, because serde stops at the first problem and cannot deny unknown keys beside flattened ones.

use serde_json::{Map, Value};
use toml::de::{DeTable, DeValue};

use super::{LayerPlan, PlanError, Rule, Settings, wrong_version};
use crate::selector::closest;

/// Something wrong at a path: `None` for the plan itself, else a rule; then the key.
pub(super) struct Problem {
    rule: Option<usize>,
    key: String,
    message: String,
}

const PLAN_KEYS: [&str; 3] = ["version", "model", "rules"];
const RULE_KEYS: [&str; 14] = [
    "select",
    "rank",
    "alpha",
    "dropout",
    "bits",
    "group",
    "experts",
    "top_k",
    "weight",
    "density",
    "learning_rate",
    "frozen",
    "drop",
    "extra",
];

/// Joins problems without knowing their lines.
pub(super) fn invalid(problems: Vec<Problem>) -> PlanError {
    PlanError::Invalid { problems: problems.iter().map(Problem::to_string).collect() }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dot = if self.key.is_empty() { "" } else { "." };
        match self.rule {
            Some(i) => write!(f, "rules[{i}]{dot}{}: {}", self.key, self.message),
            None if self.key.is_empty() => f.write_str(&self.message),
            None => write!(f, "{}: {}", self.key, self.message),
        }
    }
}

pub(super) fn from_toml(text: &str) -> Result<LayerPlan, PlanError> {
    let value: Value = toml::from_str(text).map_err(|e| PlanError::Syntax(e.to_string()))?;
    plan(&value).map_err(|problems| {
        let spans = DeTable::parse(text).ok();
        let with_line = |problem: &Problem| {
            let start = spans.as_ref().and_then(|table| start_of(table.get_ref(), problem));
            match start.and_then(|at| text.get(..at)) {
                Some(before) => format!("line {}: {problem}", before.matches('\n').count() + 1),
                None => problem.to_string(),
            }
        };
        PlanError::Invalid { problems: problems.iter().map(with_line).collect() }
    })
}

/// The byte at which the key, or failing that the rule, of a problem begins.
fn start_of(plan: &DeTable<'_>, problem: &Problem) -> Option<usize> {
    let key_start = |table: &DeTable<'_>, key: &str| {
        let found = table.iter().find(|(k, _)| k.get_ref().as_ref() == key);
        found.map(|(k, _)| k.span().start)
    };
    let Some(i) = problem.rule else { return key_start(plan, &problem.key) };
    let (_, rules) = plan.iter().find(|(k, _)| k.get_ref().as_ref() == "rules")?;
    let DeValue::Array(rules) = rules.get_ref() else { return None };
    let rule = rules.get(i)?;
    let DeValue::Table(table) = rule.get_ref() else { return Some(rule.span().start) };
    key_start(table, &problem.key).or(Some(rule.span().start))
}

/// Reads a plan, or lists everything that is wrong with it.
pub(super) fn plan(value: &Value) -> Result<LayerPlan, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut note = |key: &str, message: String| {
        problems.push(Problem { rule: None, key: key.to_string(), message });
    };
    let mut plan = LayerPlan::default();
    let Value::Object(map) = value else {
        note("", format!("a plan is a table of version and rules, not {}", kind(value)));
        return Err(problems);
    };
    for key in map.keys().filter(|k| !PLAN_KEYS.contains(&k.as_str())) {
        note(key, unknown(key, &PLAN_KEYS));
    }
    match map.get("version") {
        None => note("version", "missing; write `version = 1`".into()),
        Some(version) => match version.as_u64().and_then(|v| u32::try_from(v).ok()) {
            None => note("version", format!("expected a whole number, found {}", kind(version))),
            Some(version) => {
                if let Some(message) = wrong_version(version) {
                    note("version", message);
                }
            }
        },
    }
    match map.get("model") {
        None => {}
        Some(Value::String(model)) => plan.model = Some(model.clone()),
        Some(other) => note("model", format!("expected a text, found {}", kind(other))),
    }
    match map.get("rules") {
        None => {}
        Some(Value::Array(rules)) => {
            for (i, value) in rules.iter().enumerate() {
                plan.rules.extend(rule(i, value, &mut problems));
            }
        }
        Some(other) => note("rules", format!("expected a list of rules, found {}", kind(other))),
    }
    if problems.is_empty() { Ok(plan) } else { Err(problems) }
}

fn rule(i: usize, value: &Value, problems: &mut Vec<Problem>) -> Option<Rule> {
    let before = problems.len();
    let mut note = |key: &str, message: String| {
        problems.push(Problem { rule: Some(i), key: key.to_string(), message });
    };
    let Value::Object(map) = value else {
        note("", format!("a rule is a table with `select`, not {}", kind(value)));
        return None;
    };
    for key in map.keys().filter(|k| !RULE_KEYS.contains(&k.as_str())) {
        note(key, format!("{}; settings of other crates stand in `extra`", unknown(key, &RULE_KEYS)));
    }
    let mut select = None;
    match map.get("select") {
        None => note("select", "missing; which sites is the rule for?".into()),
        Some(Value::String(text)) => match text.parse() {
            Ok(selector) => select = Some(selector),
            Err(e) => note("select", format!("{e}")),
        },
        Some(other) => note("select", format!("expected a text, found {}", kind(other))),
    }
    let mut fields = Fields { map, wrong: Vec::new() };
    let settings = Settings {
        rank: fields.count("rank"),
        alpha: fields.number("alpha"),
        dropout: fields.number("dropout"),
        bits: fields.count("bits").map(|b| u32::try_from(b).unwrap_or(u32::MAX)),
        group: fields.count("group"),
        experts: fields.count("experts"),
        top_k: fields.count("top_k"),
        weight: fields.number("weight"),
        density: fields.number("density"),
        learning_rate: fields.number("learning_rate"),
        frozen: fields.flag("frozen"),
        drop: fields.flag("drop"),
        extra: fields.table("extra"),
    };
    let values = settings.problems().into_iter();
    for (key, message) in fields.wrong.into_iter().chain(values) {
        note(key, message);
    }
    let select = select?;
    (problems.len() == before).then_some(Rule { select, settings })
}

struct Fields<'a> {
    map: &'a Map<String, Value>,
    wrong: Vec<(&'static str, String)>,
}

impl Fields<'_> {
    fn take<T>(&mut self, key: &'static str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.map.get(key)?;
        let read = read(value);
        if read.is_none() {
            self.wrong.push((key, format!("expected {want}, found {}", kind(value))));
        }
        read
    }

    fn count(&mut self, key: &'static str) -> Option<usize> {
        self.take(key, "a whole number", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn number(&mut self, key: &'static str) -> Option<f64> {
        self.take(key, "a finite number", Value::as_f64)
    }

    fn flag(&mut self, key: &'static str) -> Option<bool> {
        self.take(key, "true or false", Value::as_bool)
    }

    fn table(&mut self, key: &'static str) -> std::collections::BTreeMap<String, Value> {
        let table = self.take(key, "a table", |v| v.as_object().cloned());
        table.into_iter().flatten().collect()
    }
}

fn unknown(key: &str, known: &[&str]) -> String {
    match closest(key, known.iter().copied()) {
        Some(close) => format!("unknown key; did you mean `{close}`?"),
        None => format!("unknown key; known are {}", known.join(", ")),
    }
}

fn kind(value: &Value) -> String {
    match value {
        // TOML's nan and inf arrive as null.
        Value::Null => "null, nan or inf".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("the text {:?}", s.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a table".into(),
    }
}
