//! Task definitions in TOML, read by hand: serde stops at the first problem.

use std::path::PathBuf;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::task::{Metric, TaskKind};

/// A task as its file defines it, before the data is read.
#[derive(Clone, Debug)]
pub(super) struct Definition {
    pub name: String,
    pub version: u64,
    pub kind: TaskKind,
    /// JSONL, relative to the file of the task; built-in tasks have none.
    pub data: Option<PathBuf>,
    pub prompt: String,
    pub choices: Choices,
    /// The field with the answer; pairs have none.
    pub answer: Option<String>,
    pub metrics: Vec<Metric>,
    pub description: String,
    /// Between prompt and choice.
    pub target_delimiter: String,
    pub fewshot: FewShot,
}

/// Where the choices of an item come from.
#[derive(Clone, Debug)]
pub(super) enum Choices {
    /// As they stand, the same for every item.
    Labels(Vec<String>),
    /// One template each.
    Templates(Vec<String>),
    /// The field that lists them.
    Field(String),
}

/// Solved examples before the prompt.
#[derive(Clone, Debug)]
pub(super) struct FewShot {
    pub count: usize,
    pub seed: u64,
    /// JSONL the examples are drawn from; the task's own data if absent.
    pub data: Option<PathBuf>,
    /// Between examples.
    pub delimiter: String,
}

const KEYS: [&str; 11] = [
    "name",
    "version",
    "kind",
    "data",
    "prompt",
    "choices",
    "answer",
    "metrics",
    "description",
    "target_delimiter",
    "fewshot",
];
const FEWSHOT_KEYS: [&str; 4] = ["count", "seed", "data", "delimiter"];

/// Reads a definition, or lists everything that is wrong with it, each with line and column. Without `with_data` the task
/// is built in and names no files.
pub(super) fn definition(text: &str, with_data: bool) -> Result<Definition, Vec<String>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut problems = Problems { text, found: Vec::new() };
    for error in &errors {
        problems.add(error.span().map_or(0, |s| s.start), error.message().to_string());
    }
    if !errors.is_empty() {
        return Err(problems.listed());
    }
    let table = table.get_ref();
    let mut fields = Fields { table, prefix: "", at: 0, problems };
    fields.only(&KEYS);

    let name = fields.required("name", Fields::text).unwrap_or_default();
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        fields.wrong("name", format!("`{name}` is not a name; use letters, digits, - _ and ."));
    }
    let kind = fields.required("kind", Fields::text).and_then(|kind| {
        let known = TaskKind::ALL.into_iter().find(|k| k.name() == kind);
        if known.is_none() {
            let names = TaskKind::ALL.map(TaskKind::name).join(", ");
            fields.wrong("kind", format!("`{kind}` is not one of {names}"));
        }
        known
    });
    let version = fields.number("version").unwrap_or(1);
    let data = match with_data {
        true => fields.required("data", Fields::text).map(PathBuf::from),
        false => None,
    };
    let prompt = fields.required("prompt", Fields::text).unwrap_or_default();
    let description = fields.text("description").unwrap_or_default();
    let target_delimiter = fields.text("target_delimiter").unwrap_or_else(|| " ".into());
    let choices = choices(&mut fields, kind);
    let answer = fields.text("answer");
    match (kind, &answer) {
        (Some(TaskKind::Pair), Some(_)) => {
            fields.wrong("answer", "the first choice of a pair is the right one; leave this out".into());
        }
        (Some(TaskKind::MultipleChoice | TaskKind::Classification), None) => {
            fields.missing("answer", "the field with the right choice, as its text or its index");
        }
        _ => {}
    }
    let metrics = metrics(&mut fields, kind);
    let (fewshot, problems) = fewshot(fields);

    if !problems.found.is_empty() {
        return Err(problems.listed());
    }
    let (Some(kind), Some(choices)) = (kind, choices) else {
        return Err(vec!["the definition is incomplete".into()]);
    };
    Ok(Definition {
        name,
        version,
        kind,
        data,
        prompt,
        choices,
        answer,
        metrics,
        description,
        target_delimiter,
        fewshot,
    })
}

fn choices(fields: &mut Fields<'_, '_>, kind: Option<TaskKind>) -> Option<Choices> {
    let Some(value) = fields.value("choices") else {
        fields.missing("choices", "what may follow the prompt");
        return None;
    };
    if let (Some(field), Some(TaskKind::MultipleChoice) | None) = (value.get_ref().as_str(), kind) {
        return Some(Choices::Field(field.to_string()));
    }
    let list = fields.texts("choices")?;
    match kind? {
        TaskKind::Pair if list.len() != 2 => {
            let message = format!("a pair has two choices, the right one first; here are {}", list.len());
            fields.wrong("choices", message);
        }
        _ if list.len() < 2 => fields.wrong("choices", "at least two are needed to choose".into()),
        _ => {}
    }
    let twice = list.iter().enumerate().find(|(i, c)| list[..*i].contains(c));
    if let Some((_, twice)) = twice {
        fields.wrong("choices", format!("`{twice}` is there twice"));
    }
    if let Some(i) = list.iter().position(String::is_empty) {
        fields.wrong("choices", format!("choice {i} is empty"));
    }
    Some(match kind? {
        TaskKind::Classification => Choices::Labels(list),
        _ => Choices::Templates(list),
    })
}

fn metrics(fields: &mut Fields<'_, '_>, kind: Option<TaskKind>) -> Vec<Metric> {
    if fields.value("metrics").is_none() {
        return kind.map_or(Vec::new(), TaskKind::metrics);
    }
    let names = fields.texts("metrics").unwrap_or_default();
    let mut metrics = Vec::new();
    for name in &names {
        match Metric::ALL.into_iter().find(|m| m.name() == name) {
            None => {
                let known = Metric::ALL.map(Metric::name).join(", ");
                fields.wrong("metrics", format!("`{name}` is not one of {known}"));
            }
            Some(Metric::MacroF1) if kind.is_some_and(|k| k != TaskKind::Classification) => {
                fields.wrong("metrics", "macro_f1 is of classes: the kind must be classification".into());
            }
            Some(metric) if metrics.contains(&metric) => {
                fields.wrong("metrics", format!("`{name}` is there twice"));
            }
            Some(metric) => metrics.push(metric),
        }
    }
    metrics
}

fn fewshot<'a>(mut fields: Fields<'a, '_>) -> (FewShot, Problems<'a>) {
    let mut fewshot = FewShot { count: 0, seed: 0, data: None, delimiter: "\n\n".into() };
    let Some(value) = fields.value("fewshot") else { return (fewshot, fields.problems) };
    let Some(table) = value.get_ref().as_table() else {
        fields.wrong("fewshot", "expected a table of count, seed, data and delimiter".into());
        return (fewshot, fields.problems);
    };
    let mut fields = Fields { table, prefix: "fewshot.", at: value.span().start, problems: fields.problems };
    fields.only(&FEWSHOT_KEYS);
    let count = fields.number("count").unwrap_or(0);
    if count > MAX_SHOTS {
        fields.wrong("count", format!("{count} examples, {MAX_SHOTS} allowed"));
    }
    fewshot.count = count.min(MAX_SHOTS) as usize;
    fewshot.seed = fields.number("seed").unwrap_or(0);
    fewshot.data = fields.text("data").map(PathBuf::from);
    fewshot.delimiter = fields.text("delimiter").unwrap_or(fewshot.delimiter);
    (fewshot, fields.problems)
}

/// Examples before a prompt, at most.
pub(super) const MAX_SHOTS: u64 = 1000;

/// What is wrong, and at which byte.
struct Problems<'a> {
    text: &'a str,
    found: Vec<(usize, String)>,
}

impl Problems<'_> {
    fn add(&mut self, at: usize, message: String) {
        self.found.push((at, message));
    }

    fn listed(mut self) -> Vec<String> {
        self.found.sort_by_key(|(at, _)| *at);
        let line = |(at, message): &(usize, String)| {
            let before = self.text.get(..*at).unwrap_or_default();
            let start = before.rfind('\n').map_or(0, |n| n + 1);
            let (line, column) = (before.matches('\n').count() + 1, before[start..].chars().count() + 1);
            format!("{line}:{column}: {message}")
        };
        self.found.iter().map(line).collect()
    }
}

/// A table whose fields are taken one by one.
struct Fields<'a, 't> {
    table: &'t DeTable<'a>,
    /// Before the names of its keys.
    prefix: &'static str,
    /// The byte at which it begins.
    at: usize,
    problems: Problems<'a>,
}

impl<'a, 't> Fields<'a, 't> {
    fn only(&mut self, known: &[&str]) {
        for (key, _) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if !known.contains(&name) {
                let message = format!("unknown key `{}{name}`; known are {}", self.prefix, known.join(", "));
                self.problems.add(key.span().start, message);
            }
        }
    }

    fn value(&self, key: &str) -> Option<&'t Spanned<DeValue<'a>>> {
        self.table.iter().find(|(k, _)| k.get_ref().as_ref() == key).map(|(_, v)| v)
    }

    fn wrong(&mut self, key: &str, message: String) {
        let at = self.value(key).map_or(self.at, |v| v.span().start);
        self.problems.add(at, format!("`{}{key}`: {message}", self.prefix));
    }

    fn missing(&mut self, key: &str, what: &str) {
        self.problems.add(self.at, format!("`{}{key}` is missing: {what}", self.prefix));
    }

    fn required<T>(&mut self, key: &str, take: fn(&mut Self, &str) -> Option<T>) -> Option<T> {
        if self.value(key).is_none() {
            self.missing(key, "every task needs it");
        }
        take(self, key)
    }

    fn text(&mut self, key: &str) -> Option<String> {
        let value = self.value(key)?.get_ref();
        if value.as_str().is_none() {
            self.wrong(key, format!("expected a text, found {}", value.type_str()));
        }
        value.as_str().map(String::from)
    }

    fn number(&mut self, key: &str) -> Option<u64> {
        let value = self.value(key)?.get_ref();
        let number = value.as_integer().and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        if number.is_none() {
            self.wrong(key, format!("expected a whole number from 0, found {}", value.type_str()));
        }
        number
    }

    fn texts(&mut self, key: &str) -> Option<Vec<String>> {
        let value = self.value(key)?.get_ref();
        let list: Option<Vec<String>> = value
            .as_array()
            .and_then(|list| list.iter().map(|v| v.get_ref().as_str().map(String::from)).collect());
        if list.is_none() {
            self.wrong(key, format!("expected a list of texts, found {}", value.type_str()));
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "rank"
kind = "classification"
data = "items.jsonl"
prompt = "{{ gloss }}\nRank:"
choices = ["genus", "family"]
answer = "rank"
metrics = ["acc", "macro_f1"]

[fewshot]
count = 2
seed = 7
"#;

    #[test]
    fn a_definition_is_read_with_its_defaults() {
        let d = definition(GOOD, true).unwrap();
        assert_eq!((d.name.as_str(), d.version, d.kind), ("rank", 1, TaskKind::Classification));
        assert_eq!(d.metrics, [Metric::Acc, Metric::MacroF1]);
        assert_eq!((d.fewshot.count, d.fewshot.seed, d.fewshot.delimiter.as_str()), (2, 7, "\n\n"));
        assert_eq!((d.target_delimiter.as_str(), d.description.as_str()), (" ", ""));
        assert!(matches!(d.choices, Choices::Labels(l) if l == ["genus", "family"]));
        let field = GOOD
            .replace("classification", "multiple_choice")
            .replace("[\"genus\", \"family\"]", "\"options\"")
            .replace(", \"macro_f1\"", "");
        assert!(matches!(definition(&field, true).unwrap().choices, Choices::Field(f) if f == "options"));
    }

    #[test]
    fn every_problem_is_listed_with_its_place() {
        let bad = r#"name = "a b"
kind = "choice"
data = 3
  promt = "x"
choices = ["one"]
metrics = ["acc", "speed"]
fewshot = { count = -1, sed = 2 }
"#;
        let problems = definition(bad, true).unwrap_err();
        let has = |place: &str, part: &str| {
            assert!(
                problems.iter().any(|p| p.starts_with(place) && p.contains(part)),
                "{place} {part}: {problems:#?}"
            );
        };
        has("1:1: ", "`prompt` is missing");
        has("1:8: ", "`a b` is not a name");
        has("2:8: ", "multiple_choice, classification, pair");
        has("3:8: ", "expected a text, found integer");
        has("4:3: ", "unknown key `promt`");
        has("6:11: ", "`speed` is not one of");
        has("7:21: ", "whole number");
        has("7:25: ", "unknown key `fewshot.sed`");
        assert_eq!(problems.len(), 8, "{problems:#?}");
    }

    #[test]
    fn syntax_errors_have_places_too() {
        let problems = definition("name = \nkind = 'x\n", true).unwrap_err();
        assert!(problems.len() >= 2 && problems[0].starts_with("1:"), "{problems:?}");
    }

    #[test]
    fn kinds_want_what_is_theirs() {
        let pair = GOOD.replace("classification", "pair");
        let problems = definition(&pair, true).unwrap_err();
        assert_eq!(problems.len(), 2, "an answer, and a metric of classes: {problems:?}");
        let none = GOOD.replace("answer = \"rank\"\n", "");
        assert!(definition(&none, true).unwrap_err()[0].contains("`answer` is missing"));
        let twice = GOOD.replace("\"family\"", "\"genus\"");
        assert!(
            definition(&twice, true).unwrap_err()[0].starts_with("6:11: `choices`: `genus` is there twice")
        );
    }
}
