//! Two tasks made from the built-in `glosses` domain: items from its held-out part, examples from the other.

use std::collections::HashSet;

use firebrick_core::Seed;
use rand::Rng;
use serde_json::{Map, Value as Json};

use super::task::Doc;
use crate::domains::domain;

const PAIR: &str = r#"
name = "gloss_pair"
kind = "pair"
prompt = "{{ words }} (noun):"
choices = ["{{ gloss }}", "{{ other }}"]
metrics = ["acc_mutual_info", "acc", "acc_norm"]
"#;

const RANK: &str = r#"
name = "gloss_rank"
kind = "classification"
prompt = "{{ name }}: {{ gloss }}. In biology, {{ name }} is the name of a"
choices = ["species", "genus", "family"]
answer = "rank"
metrics = ["acc_mutual_info", "acc", "macro_f1"]
"#;

/// The definition of a task, its items and its examples.
pub(super) fn task(name: &str) -> Option<(&'static str, Vec<Doc>, Vec<Doc>)> {
    let glosses = domain("glosses").expect("a built-in domain");
    let parts = [glosses.held_out_documents(), glosses.train_documents()].map(|part| entries(&part));
    let (text, [items, examples]) = match name {
        "gloss_pair" => (PAIR, parts.map(|part| pairs(&part))),
        "gloss_rank" => {
            let genera = genera(&parts.concat());
            (RANK, parts.map(|part| ranks(&part, &genera)))
        }
        _ => return None,
    };
    Some((text, docs(items), docs(examples)))
}

/// A line of the domain: the words of a synset, and what they mean.
#[derive(Clone, Copy)]
struct Entry {
    words: &'static str,
    gloss: &'static str,
}

fn entries(documents: &[&'static str]) -> Vec<Entry> {
    let lines = documents.iter().flat_map(|d| d.lines());
    lines.filter_map(|l| l.split_once(" (noun): ").map(|(words, gloss)| Entry { words, gloss })).collect()
}

/// Every gloss beside that of another entry of the same part: of some drawn at random the one nearest in length, since a
/// longer text is less likely whatever it says.
fn pairs(entries: &[Entry]) -> Vec<Vec<(&'static str, String)>> {
    let mut random = Seed(0).stream("tasks/gloss_pair");
    let mut pair = |entry: &Entry| {
        let drawn: Vec<&Entry> =
            (0..DRAWN).map(|_| &entries[random.random_range(0..entries.len())]).collect();
        let others = drawn.into_iter().filter(|e| e.gloss != entry.gloss);
        let other = others.min_by_key(|e| e.gloss.len().abs_diff(entry.gloss.len()))?;
        let fields = [("words", entry.words), ("gloss", entry.gloss), ("other", other.gloss)];
        Some(fields.map(|(k, v)| (k, v.into())).into())
    };
    entries.iter().filter_map(&mut pair).collect()
}

/// Entries that the other gloss of a pair is chosen from.
const DRAWN: usize = 8;

/// The names that the domain calls a genus.
fn genera(entries: &[Entry]) -> HashSet<&'static str> {
    entries.iter().flat_map(|e| e.words.split(", ")).filter_map(|w| w.strip_prefix("genus ")).collect()
}

/// The entries that name a genus or a family, or a species by its genus and a second word.
fn ranks(entries: &[Entry], genera: &HashSet<&str>) -> Vec<Vec<(&'static str, String)>> {
    let rank = |entry: &Entry| {
        let words = || entry.words.split(", ");
        let of = |rank: &str| words().find_map(|w| w.strip_prefix(rank)?.strip_prefix(' '));
        let species = || words().find(|w| w.split_once(' ').is_some_and(|(genus, _)| genera.contains(genus)));
        let (name, rank) = of("family")
            .map(|name| (name, "family"))
            .or_else(|| of("genus").map(|name| (name, "genus")))
            .or_else(|| species().map(|name| (name, "species")))?;
        Some([("name", name), ("gloss", entry.gloss), ("rank", rank)].map(|(k, v)| (k, v.into())).into())
    };
    entries.iter().filter_map(rank).collect()
}

fn docs(items: Vec<Vec<(&'static str, String)>>) -> Vec<Doc> {
    let doc = |(i, fields): (usize, Vec<(&'static str, String)>)| {
        let bytes = fields.iter().map(|(_, v)| v.len()).sum();
        let fields: Map<String, Json> = fields.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        Doc { line: i + 1, bytes, fields }
    };
    items.into_iter().enumerate().map(doc).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{BUILT_IN, EvalTask, TaskKind};

    #[test]
    fn the_tasks_are_there_and_stay_the_same() {
        for name in BUILT_IN {
            let task = EvalTask::built_in(name).unwrap();
            assert_eq!(task.name(), name);
            assert_eq!(task.items(), EvalTask::built_in(name).unwrap().items());
        }
        assert!(EvalTask::built_in("gloss").is_none());
        let (pair, rank) =
            (EvalTask::built_in(BUILT_IN[0]).unwrap(), EvalTask::built_in(BUILT_IN[1]).unwrap());
        assert_eq!((pair.kind(), rank.kind()), (TaskKind::Pair, TaskKind::Classification));
        assert_eq!((pair.items().len(), rank.items().len()), (295, 129));
        let count = |label: &str| rank.items().iter().filter(|i| i.doc["rank"] == label).count();
        assert_eq!(["species", "genus", "family"].map(count), [64, 54, 11]);
        let first = &pair.items()[0];
        assert_eq!((first.prompt.as_str(), first.answer), ("Phyllocladus, genus Phyllocladus (noun):", 0));
        assert_eq!(first.choices[0], "celery pine");
    }

    #[test]
    fn items_come_from_the_held_out_part_and_examples_do_not() {
        let held = domain("glosses").unwrap().held_out_text();
        for name in BUILT_IN {
            let (_, items, examples) = task(name).unwrap();
            let line = |doc: &Doc| {
                let text = |key: &str| doc.fields[key].as_str().unwrap().to_string();
                (text("gloss"), held.contains(&format!("(noun): {}", text("gloss"))))
            };
            assert!(items.iter().all(|d| line(d).1), "{name}");
            let leaked = examples.iter().filter(|d| line(d).1).count();
            assert!(leaked * 20 < examples.len(), "{name}: {leaked} glosses stand in both parts");
        }
    }

    #[test]
    fn an_item_does_not_show_its_answer() {
        let (_, items, _) = task("gloss_rank").unwrap();
        for doc in items {
            let name = doc.fields["name"].as_str().unwrap();
            assert!(!name.starts_with("genus ") && !name.starts_with("family "), "{name}");
        }
        let (_, items, _) = task("gloss_pair").unwrap();
        assert!(items.iter().all(|d| d.fields["gloss"] != d.fields["other"]));
    }
}
