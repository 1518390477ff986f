//! YAML as a tree in which everything has a line and a column, and the list of what is wrong in it.

use std::collections::HashMap;
use std::fmt;

use firebrick_core::closest;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, NonFiniteFloatPolicy, Spanned};

/// A place in a text, both counted from 1; 0 where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub line: u64,
    pub column: u64,
}

impl From<Location> for Place {
    fn from(location: Location) -> Self {
        Place { line: location.line(), column: location.column() }
    }
}

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub place: Place,
    pub value: Yaml,
}

/// A key and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    pub place: Place,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Yaml {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

impl Node {
    /// The documents of a text, empty ones left out.
    pub fn documents(text: &str) -> Result<Vec<Node>, String> {
        // What has a place is a problem among others, see `check`: the parser would end at the first.
        let options = serde_saphyr::options! {
            duplicate_keys: DuplicateKeyPolicy::PassThrough,
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        };
        serde_saphyr::from_multiple_with_options(text, options).map_err(|e| {
            // The parser's message goes on with an excerpt of the text.
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            line.replacen(" column ", ", column ", 1)
        })
    }

    /// Reports what means nothing anywhere: keys that are there twice, numbers that are not finite.
    pub fn check(&self, problems: &mut Problems) {
        match &self.value {
            Yaml::Number(n) if !n.is_finite() => {
                problems.add(self.place, format!("{n} is not a finite number"))
            }
            Yaml::List(items) => items.iter().for_each(|item| item.check(problems)),
            Yaml::Map(entries) => {
                let mut lines: HashMap<&str, u64> = HashMap::new();
                for (key, node) in entries {
                    if let Some(line) = lines.get(key.text.as_str()) {
                        problems.add(
                            key.place,
                            format!("duplicate key `{}`, given on line {line} already", key.text),
                        );
                    }
                    lines.entry(&key.text).or_insert(key.place.line);
                    node.check(problems);
                }
            }
            _ => {}
        }
    }

    /// The value under `key`; `None` for null, and where this is no map.
    pub fn get(&self, key: &str) -> Option<&Node> {
        let Yaml::Map(entries) = &self.value else { return None };
        entries.iter().find(|(k, _)| k.text == key).map(|(_, v)| v).filter(|v| v.value != Yaml::Null)
    }

    pub fn text(&self) -> Option<&str> {
        if let Yaml::Text(text) = &self.value { Some(text) } else { None }
    }

    /// A number, or a switch as 0 or 1. YAML 1.1, which mergekit reads, has more words for switches.
    pub fn number(&self) -> Option<f64> {
        match &self.value {
            Yaml::Number(n) => Some(*n),
            Yaml::Bool(b) => Some(f64::from(u8::from(*b))),
            Yaml::Text(t) if ["yes", "on"].contains(&t.to_lowercase().as_str()) => Some(1.0),
            Yaml::Text(t) if ["no", "off"].contains(&t.to_lowercase().as_str()) => Some(0.0),
            _ => None,
        }
    }

    /// A number that is whole and not negative.
    pub fn count(&self) -> Option<usize> {
        match self.value {
            Yaml::Number(n) if n.fract() == 0.0 && (0.0..1e9).contains(&n) => Some(n as usize),
            _ => None,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Yaml::Null => f.write_str("null"),
            Yaml::Bool(b) => write!(f, "{b}"),
            Yaml::Number(n) => write!(f, "{n}"),
            Yaml::Text(t) => write!(f, "`{t}`"),
            Yaml::List(items) => write!(f, "a list of {}", items.len()),
            Yaml::Map(entries) => {
                let keys: Vec<&str> = entries.iter().take(4).map(|(k, _)| k.text.as_str()).collect();
                write!(f, "a map of {}", keys.join(", "))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Yaml>::deserialize(deserializer)?;
        Ok(Node { place: referenced.into(), value })
    }
}

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Yaml;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E: Error>(self) -> Result<Yaml, E> {
                Ok(Yaml::Null)
            }

            fn visit_none<E: Error>(self) -> Result<Yaml, E> {
                Ok(Yaml::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Yaml, D::Error> {
                deserializer.deserialize_any(Any)
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<Yaml, E> {
                Ok(Yaml::Bool(v))
            }

            fn visit_i64<E: Error>(self, v: i64) -> Result<Yaml, E> {
                Ok(Yaml::Number(v as f64))
            }

            fn visit_u64<E: Error>(self, v: u64) -> Result<Yaml, E> {
                Ok(Yaml::Number(v as f64))
            }

            fn visit_f64<E: Error>(self, v: f64) -> Result<Yaml, E> {
                Ok(Yaml::Number(v))
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<Yaml, E> {
                Ok(Yaml::Text(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Yaml, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Yaml::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Yaml, A::Error> {
                let mut entries = Vec::new();
                while let Some(Spanned { value, referenced, .. }) = map.next_key::<Spanned<String>>()? {
                    entries.push((Key { place: referenced.into(), text: value }, map.next_value()?));
                }
                Ok(Yaml::Map(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// What is wrong with a text, in the order of the text.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<(Place, String)>);

impl Problems {
    pub fn add(&mut self, place: Place, text: impl Into<String>) {
        self.0.push((place, text.into()));
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One line each: `line 3, column 5: ...`.
    pub fn into_lines(mut self) -> Vec<String> {
        self.0.sort();
        self.0.dedup();
        let line = |(place, text): (Place, String)| match place.line {
            0 => text,
            _ => format!("line {}, column {}: {text}", place.line, place.column),
        };
        self.0.into_iter().map(line).collect()
    }

    /// The entries of a map with only these keys; reports everything else.
    pub fn map<'a>(&mut self, node: &'a Node, known: &[&str], what: &str) -> &'a [(Key, Node)] {
        let Yaml::Map(entries) = &node.value else {
            self.add(node.place, format!("{what} should be a map, found {node}"));
            return &[];
        };
        for (key, _) in entries.iter().filter(|(k, _)| !known.contains(&k.text.as_str())) {
            let hint = suggestion(&key.text, known.iter().copied());
            self.add(key.place, format!("unknown key `{}` in {what}; {hint}", key.text));
        }
        entries
    }
}

/// What was meant by `word`, or everything that it could have been.
pub(crate) fn suggestion<'a>(word: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let plain = |text: &str| {
        let text: String = text.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
        text.trim_end_matches('s').to_owned()
    };
    let alike = |k: &&str| {
        plain(k) == plain(word)
            || word.len() > 2 && (k.starts_with(word) || word.starts_with(*k) && k.len() > 2)
    };
    match known.clone().find(alike).or_else(|| closest(word, known.clone())) {
        Some(k) => format!("did you mean `{k}`?"),
        None if known.clone().next().is_none() => "there are none".into(),
        None => format!("known: {}", known.collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_a_place() {
        let text = "a: 1\nlist:\n- x: true\n  y: [0.5, text]\n---\nb: null\n";
        let documents = Node::documents(text).unwrap();
        assert_eq!(documents.len(), 2);
        let Yaml::List(items) = &documents[0].get("list").unwrap().value else { panic!("a list") };
        let Yaml::Map(entries) = &items[0].value else { panic!("a map") };
        assert_eq!((entries[1].0.text.as_str(), entries[1].0.place), ("y", Place { line: 4, column: 3 }));
        let Yaml::List(values) = &entries[1].1.value else { panic!("a list") };
        assert_eq!((values[1].text(), values[1].place), (Some("text"), Place { line: 4, column: 12 }));
        assert_eq!(entries[0].1.number(), Some(1.0));
        let Yaml::Map(second) = &documents[1].value else { panic!("a map") };
        assert_eq!((second[0].0.place.line, &second[0].1.value), (6, &Yaml::Null));
        assert_eq!(documents[1].get("b"), None);
        assert!(Node::documents("a: [").unwrap_err().starts_with("line "));
        let mut problems = Problems::default();
        let twice = Node::documents("a: .inf\nb: {c: 1, c: [.nan]}\na: 1e999\n").unwrap();
        twice[0].check(&mut problems);
        let expected = [
            "line 1, column 4: inf is not a finite number",
            "line 2, column 11: duplicate key `c`, given on line 2 already",
            "line 2, column 15: NaN is not a finite number",
            "line 3, column 1: duplicate key `a`, given on line 1 already",
            "line 3, column 4: inf is not a finite number",
        ];
        assert_eq!(problems.into_lines(), expected);
    }

    #[test]
    fn suggestions_are_near_or_complete() {
        let known = ["weight", "density", "t", "normalize"];
        for (word, meant) in
            [("weights", "weight"), ("wieght", "weight"), ("Normalise", "normalize"), ("dens", "density")]
        {
            assert_eq!(suggestion(word, known.into_iter()), format!("did you mean `{meant}`?"), "{word}");
        }
        assert!(suggestion("lambda", known.into_iter()).starts_with("known: weight, "));
    }
}
