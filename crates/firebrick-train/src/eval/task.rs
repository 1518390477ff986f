//! Tasks that are answered by the likelier of several texts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::glosses;
use super::read::{Choices, Definition, definition};
use super::template::{Templates, deep};
use crate::TrainError;

/// What an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// One of the item's own choices.
    MultipleChoice,
    /// One of the task's labels, the same for all items.
    Classification,
    /// The first of two texts should be likelier than the second; a tie is wrong.
    Pair,
}

/// What is measured over the items. All take the choice with the highest log-likelihood, the first of equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of items where that is the right one.
    Acc,
    /// As [`Metric::Acc`], of log-likelihoods by characters of the choice (what lm-evaluation-harness calls by bytes).
    AccNorm,
    /// As [`Metric::Acc`], of log-likelihoods by bytes of the choice in UTF-8.
    AccBytes,
    /// As [`Metric::Acc`], of log-likelihoods less those of the choice without the prompt, after the token that begins or ends a
    /// text: what the prompt does for it.
    AccMutualInfo,
    /// Mean F1 of the classes, taken as the first of the task's metrics decides.
    MacroF1,
}

impl TaskKind {
    pub(super) const ALL: [TaskKind; 3] =
        [TaskKind::MultipleChoice, TaskKind::Classification, TaskKind::Pair];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::MultipleChoice => "multiple_choice",
            TaskKind::Classification => "classification",
            TaskKind::Pair => "pair",
        }
    }

    /// What is measured unless the task says otherwise.
    pub(super) fn metrics(self) -> Vec<Metric> {
        match self {
            TaskKind::Classification => vec![Metric::Acc, Metric::MacroF1],
            _ => vec![Metric::Acc, Metric::AccNorm],
        }
    }
}

impl Metric {
    pub(super) const ALL: [Metric; 5] =
        [Metric::Acc, Metric::AccNorm, Metric::AccBytes, Metric::AccMutualInfo, Metric::MacroF1];

    /// Its name in files and results.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::AccBytes => "acc_bytes",
            Metric::AccMutualInfo => "acc_mutual_info",
            Metric::MacroF1 => "macro_f1",
        }
    }
}

/// The names of the tasks that are built in, made from the held-out part of the `glosses` domain.
pub const BUILT_IN: [&str; 2] = ["gloss_pair", "gloss_rank"];

/// A task with its items, ready to be put to a model.
///
/// ```
/// use firebrick_train::eval::EvalTask;
/// let task = EvalTask::built_in("gloss_rank").expect("it is built in");
/// let item = &task.items()[0];
/// assert!(item.prompt.ends_with(" name of a") && item.choices[item.answer] == item.doc["rank"]);
/// ```
#[derive(Clone, Debug)]
pub struct EvalTask {
    pub(super) definition: Definition,
    items: Vec<TaskItem>,
    /// What examples are drawn from, if not from the items.
    examples: Option<Vec<TaskItem>>,
}

/// One question.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskItem {
    /// The line of the data it was made from.
    pub doc: Json,
    /// The rendered prompt, without examples.
    pub prompt: String,
    /// What may follow.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub answer: usize,
}

/// How many bad lines of a data file are told of.
const TOLD: usize = 20;

impl EvalTask {
    /// Reads a task from a TOML file and its data from the JSONL files that it names, relative to its own folder.
    ///
    /// # Errors
    /// If a file cannot be read or is not UTF-8, or with everything that is wrong with the definition (each with line and
    /// column), or with the lines that are no items of it.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let fail = |problems| TrainError::Task { name: path.display().to_string(), problems };
        let definition = definition(&read_text(path)?, true).map_err(fail)?;
        let beside = |name: &PathBuf| path.parent().unwrap_or(Path::new("")).join(name);
        let data = beside(definition.data.as_ref().expect("a definition in a file names its data"));
        let docs = read_docs(&data)?;
        let examples = definition.fewshot.data.as_ref().map(beside);
        let examples = examples.map(|path| read_docs(&path).map(|docs| (path, docs))).transpose()?;
        Self::build(definition, (data, docs), examples, path)
    }

    /// A task of [`BUILT_IN`].
    pub fn built_in(name: &str) -> Option<Self> {
        let (text, docs, examples) = glosses::task(name)?;
        let path = Path::new(name);
        let task = definition(text, false).map_err(|p| p.join("; ")).and_then(|definition| {
            Self::build(definition, (name.into(), docs), Some((name.into(), examples)), path)
                .map_err(|e| e.to_string())
        });
        Some(task.unwrap_or_else(|e| panic!("the built-in task {name} is wrong: {e}")))
    }

    fn build(
        definition: Definition,
        data: (PathBuf, Vec<Doc>),
        examples: Option<(PathBuf, Vec<Doc>)>,
        path: &Path,
    ) -> Result<Self, TrainError> {
        let fail = |problems| TrainError::Task { name: path.display().to_string(), problems };
        let (items, examples) = deep(|| {
            let mut sources = vec![definition.prompt.as_str()];
            if let Choices::Templates(templates) = &definition.choices {
                sources.extend(templates.iter().map(String::as_str));
            }
            let named = |i: usize| if i == 0 { "prompt".to_string() } else { format!("choices[{}]", i - 1) };
            let templates = Templates::new(&sources)
                .map_err(|p| p.iter().map(|(i, e)| format!("`{}`: {e}", named(*i))).collect::<Vec<_>>())?;
            let of = |(path, docs)| items(&definition, &templates, path, docs);
            let (items, examples) = (of(data), examples.map(of).transpose());
            match (items, examples) {
                (Ok(items), Ok(examples)) => Ok((items, examples)),
                (items, examples) => {
                    Err([items.err(), examples.err()].into_iter().flatten().flatten().collect())
                }
            }
        })
        .map_err(fail)?;
        Ok(EvalTask { definition, items, examples })
    }

    /// The task's name.
    pub fn name(&self) -> &str {
        &self.definition.name
    }

    /// What an answer is.
    pub fn kind(&self) -> TaskKind {
        self.definition.kind
    }

    /// The classes of a classification, in order; none for other kinds.
    pub fn labels(&self) -> &[String] {
        match &self.definition.choices {
            Choices::Labels(labels) => labels,
            _ => &[],
        }
    }

    /// The questions, in the order of the data.
    pub fn items(&self) -> &[TaskItem] {
        &self.items
    }

    /// The first `limit` questions, or all.
    pub(super) fn first(&self, limit: Option<usize>) -> &[TaskItem] {
        &self.items[..limit.unwrap_or(usize::MAX).min(self.items.len())]
    }

    /// The context of every one of the first `limit` items: description, `shots` solved examples, prompt.
    ///
    /// The examples are the same for all, so that they go through the model once; an item that is among them has another in
    /// its place.
    pub(super) fn contexts(&self, shots: usize, limit: Option<usize>) -> Result<Vec<String>, Vec<String>> {
        let d = &self.definition;
        let (pool, own) = match &self.examples {
            Some(examples) => (examples.as_slice(), false),
            None => (self.items.as_slice(), true),
        };
        let spare = usize::from(own && shots > 0);
        if shots + spare > pool.len() {
            return Err(vec![format!(
                "{shots} examples asked for, there are {}",
                pool.len() - spare.min(pool.len())
            )]);
        }
        let mut random = firebrick_core::Seed(d.fewshot.seed).stream(&format!("fewshot/{}", d.name));
        let drawn = rand::seq::index::sample(&mut random, pool.len(), shots + spare).into_vec();
        let solved = |&i: &usize| {
            let item = &pool[i];
            [&item.prompt, &d.target_delimiter, &item.choices[item.answer], &d.fewshot.delimiter]
                .map(String::as_str)
                .concat()
        };
        let context = |(i, item): (usize, &TaskItem)| {
            let others = drawn.iter().filter(|&&j| !own || j != i).take(shots);
            let examples: String = others.map(solved).collect();
            [&d.description, &examples, &item.prompt].map(String::as_str).concat()
        };
        Ok(self.first(limit).iter().enumerate().map(context).collect())
    }
}

/// An item of a file: its line, its bytes and its fields.
#[derive(Clone, Debug)]
pub(super) struct Doc {
    pub line: usize,
    pub bytes: usize,
    pub fields: Map<String, Json>,
}

fn read_text(path: &Path) -> Result<String, TrainError> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::io(path, e))?;
    String::from_utf8(bytes)
        .map_err(|e| TrainError::NotUtf8 { path: path.to_path_buf(), offset: e.utf8_error().valid_up_to() })
}

/// The objects of a JSONL file; blank lines are skipped.
fn read_docs(path: &Path) -> Result<Vec<Doc>, TrainError> {
    let text = read_text(path)?;
    let mut docs = Vec::new();
    let mut problems = Problems::default();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match serde_json::from_str(line) {
            Ok(Json::Object(fields)) => docs.push(Doc { line: i + 1, bytes: line.len(), fields }),
            Ok(_) => problems.add(path, i + 1, "not an object"),
            Err(e) => problems.add(path, i + 1, &e.to_string()),
        }
    }
    if docs.is_empty() && problems.lines == 0 {
        return Err(TrainError::EmptyFile { path: path.to_path_buf() });
    }
    problems.check().map_err(|problems| TrainError::Task { name: path.display().to_string(), problems })?;
    Ok(docs)
}

/// Bad lines; only the first are kept.
#[derive(Default)]
struct Problems {
    lines: usize,
    told: Vec<String>,
}

impl Problems {
    fn add(&mut self, path: &Path, line: usize, what: &str) {
        self.lines += 1;
        if self.told.len() < TOLD {
            self.told.push(format!("{}:{line}: {what}", path.display()));
        }
    }

    fn check(mut self) -> Result<(), Vec<String>> {
        if self.lines > self.told.len() {
            self.told.push(format!("and {} more lines", self.lines - self.told.len()));
        }
        if self.told.is_empty() { Ok(()) } else { Err(self.told) }
    }
}

fn items(
    definition: &Definition,
    templates: &Templates,
    path: PathBuf,
    docs: Vec<Doc>,
) -> Result<Vec<TaskItem>, Vec<String>> {
    let mut items = Vec::with_capacity(docs.len());
    let mut problems = Problems::default();
    for doc in docs {
        match item(definition, templates, &doc) {
            Ok((prompt, choices, answer)) => {
                items.push(TaskItem { doc: Json::Object(doc.fields), prompt, choices, answer });
            }
            Err(what) => problems.add(&path, doc.line, &what),
        }
    }
    problems.check()?;
    Ok(items)
}

/// Prompt, choices and the right one.
fn item(
    definition: &Definition,
    templates: &Templates,
    doc: &Doc,
) -> Result<(String, Vec<String>, usize), String> {
    let mut texts = templates.render(&doc.fields, doc.bytes)?;
    let prompt = texts.remove(0);
    let choices = match &definition.choices {
        Choices::Labels(labels) => labels.clone(),
        Choices::Templates(_) => texts,
        Choices::Field(field) => {
            let list = doc.fields.get(field).and_then(Json::as_array);
            let texts = list.and_then(|list| list.iter().map(|c| c.as_str().map(String::from)).collect());
            texts.ok_or_else(|| format!("no list of texts under `{field}`"))?
        }
    };
    if choices.len() < 2 {
        return Err(format!("{} choice, at least two are needed", choices.len()));
    }
    if choices.iter().any(String::is_empty) {
        return Err("a choice is empty".into());
    }
    if definition.kind == TaskKind::Pair && choices[0] == choices[1] {
        return Err("the two texts of the pair are the same".into());
    }
    let Some(field) = &definition.answer else { return Ok((prompt, choices, 0)) };
    let answer = match doc.fields.get(field) {
        None => return Err(format!("no field `{field}`")),
        Some(Json::String(text)) => choices.iter().position(|c| c == text),
        Some(value) => value.as_u64().and_then(|i| usize::try_from(i).ok()).filter(|i| *i < choices.len()),
    };
    let answer = answer.ok_or_else(|| {
        format!(
            "`{field}` is {}, neither a choice nor the index of one (of {})",
            doc.fields[field],
            choices.len()
        )
    })?;
    Ok((prompt, choices, answer))
}
