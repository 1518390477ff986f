//! Values of parameters: one for all tensors, or one that depends on the tensor.

use firebrick_core::Selector;

use crate::yaml::{Node, Place, Problems, Yaml};

/// The value of a parameter. Switches are 0 and 1.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// The same everywhere.
    Scalar(f64),
    /// Piecewise linear over the layers of a slice, from the first to the last.
    Gradient(Vec<f64>),
    /// The first entry whose filter takes the tensor.
    Filters(Vec<(Filter, Value)>),
}

/// Which tensors a value is for.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// All.
    Any,
    /// Those with this text in their name.
    Contains(String),
    /// Those at sites that a selector takes, which mergekit does not know.
    Select(Selector),
}

impl Value {
    /// The value for the tensor `name`, at `depth` (0 at the first layer of a slice, 1 at the last); `None` if no filter takes it.
    /// `selected` says whether a selector takes the tensor.
    pub fn at(&self, name: &str, depth: f64, selected: &dyn Fn(&Selector) -> bool) -> Option<f64> {
        match self {
            Value::Scalar(v) => Some(*v),
            Value::Gradient(points) => {
                let position = depth * points.len().checked_sub(1)? as f64;
                let low = position as usize;
                let high = (low + 1).min(points.len() - 1);
                let share = position - low as f64;
                Some((1.0 - share) * points.get(low)? + share * points[high])
            }
            Value::Filters(entries) => {
                let takes = |filter: &Filter| match filter {
                    Filter::Any => true,
                    Filter::Contains(text) => name.contains(text.as_str()),
                    Filter::Select(selector) => selected(selector),
                };
                entries.iter().find(|(filter, _)| takes(filter))?.1.at(name, depth, selected)
            }
        }
    }

    /// Every number in it.
    pub fn numbers(&self) -> Vec<f64> {
        match self {
            Value::Scalar(v) => vec![*v],
            Value::Gradient(points) => points.clone(),
            Value::Filters(entries) => entries.iter().flat_map(|(_, value)| value.numbers()).collect(),
        }
    }

    /// Every selector in it.
    pub(crate) fn selectors(&self) -> Vec<&Selector> {
        let Value::Filters(entries) = self else { return Vec::new() };
        entries
            .iter()
            .flat_map(|(filter, value)| {
                let selector = if let Filter::Select(selector) = filter { Some(selector) } else { None };
                selector.into_iter().chain(value.selectors())
            })
            .collect()
    }

    /// Reads a value; `what` names it.
    pub(crate) fn read(node: &Node, what: &str, problems: &mut Problems) -> Option<Value> {
        if let Some(v) = node.number() {
            return Some(Value::Scalar(v));
        }
        match &node.value {
            Yaml::List(items) if items.is_empty() => {
                problems.add(node.place, format!("{what} is an empty list"));
                None
            }
            Yaml::List(items) if items.iter().all(|i| i.number().is_some()) => {
                Some(Value::Gradient(items.iter().filter_map(Node::number).collect()))
            }
            Yaml::List(items) => {
                let entries: Vec<_> = items.iter().map(|i| Self::read_filter(i, what, problems)).collect();
                entries.into_iter().collect::<Option<Vec<_>>>().map(Value::Filters)
            }
            // mergekit reads this and fails later; the meaning is plain.
            Yaml::Map(_) => Self::read_filter(node, what, problems).map(|entry| Value::Filters(vec![entry])),
            _ => {
                problems.add(
                    node.place,
                    format!("{what} should be a number, a list of numbers, or a list of {{filter, value}}, found {node}"),
                );
                None
            }
        }
    }

    fn read_filter(node: &Node, what: &str, problems: &mut Problems) -> Option<(Filter, Value)> {
        if let Some(v) = node.number() {
            // A bare number at the end of a list of filters is its default.
            return Some((Filter::Any, Value::Scalar(v)));
        }
        if !matches!(node.value, Yaml::Map(_)) {
            problems.add(node.place, format!("{what}: {{filter, value}} is expected here, found {node}"));
            return None;
        }
        problems.map(node, &["filter", "select", "value"], what);
        let filter = match (node.get("filter"), node.get("select")) {
            (None, None) => Some(Filter::Any),
            (Some(_), Some(select)) => {
                problems.add(select.place, format!("{what} has both `filter` and `select`"));
                None
            }
            (Some(filter), None) => match filter.text() {
                Some("*") => Some(Filter::Any),
                Some(text) => Some(Filter::Contains(text.to_owned())),
                None => {
                    problems.add(filter.place, format!("{what}: `filter` should be a text, found {filter}"));
                    None
                }
            },
            (None, Some(select)) => match select.text().map(str::parse::<Selector>) {
                Some(Ok(selector)) => Some(Filter::Select(selector)),
                Some(Err(error)) => {
                    problems.add(select.place, format!("{what}: {error}"));
                    None
                }
                None => {
                    problems
                        .add(select.place, format!("{what}: `select` should be a selector, found {select}"));
                    None
                }
            },
        };
        let value = match node.get("value") {
            Some(value) if matches!(value.value, Yaml::Map(_)) => {
                problems.add(
                    value.place,
                    format!("{what}: `value` should be a number or a list of numbers, found {value}"),
                );
                None
            }
            Some(value) => Self::read(value, what, problems),
            None => {
                problems.add(node.place, format!("{what}: `value` is missing beside the filter"));
                None
            }
        };
        Some((filter?, value?))
    }
}

/// Values by name, with the places of their keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters(pub(crate) Vec<(String, Value, Place)>);

impl Parameters {
    /// The value of `name`, if it is given here.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(n, ..)| n == name).map(|(_, value, _)| value)
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value, _)| (name.as_str(), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Value, Vec<String>> {
        let mut problems = Problems::default();
        let value = Value::read(&Node::documents(text).unwrap()[0], "`x`", &mut problems);
        if problems.is_empty() { Ok(value.unwrap()) } else { Err(problems.into_lines()) }
    }

    #[test]
    fn gradients_are_piecewise_linear() {
        let gradient = read("[0, 1, 0]").unwrap();
        for (depth, expected) in [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 0.0)] {
            assert_eq!(gradient.at("x", depth, &|_| false), Some(expected));
        }
        assert_eq!(read("[0.3]").unwrap().at("x", 1.0, &|_| false), Some(0.3));
        assert_eq!(read("[false, true]").unwrap().at("x", 1.0, &|_| false), Some(1.0));
        assert_eq!(read("yes").unwrap(), Value::Scalar(1.0), "YAML 1.1, as in mergekit");
    }

    #[test]
    fn the_first_filter_that_takes_a_tensor_holds() {
        let text = "- {filter: mlp, value: [1, 3]}\n- {filter: mlp.up, value: 9}\n- {select: 'layers.*.attn', value: 5}\n- 7\n";
        let value = read(text).unwrap();
        let at = |name: &str, selected: bool| value.at(name, 0.5, &|_| selected);
        assert_eq!(
            (at("layers.1.mlp.up", false), at("y", true), at("y", false)),
            (Some(2.0), Some(5.0), Some(7.0))
        );
        let partial = read("{filter: attn, value: 1}").unwrap();
        assert_eq!(partial.at("layers.1.mlp.up", 0.5, &|_| false), None);
        assert_eq!(value.selectors().len(), 1);
        assert_eq!(value.numbers(), [1.0, 3.0, 9.0, 5.0, 7.0]);
    }

    #[test]
    fn whatever_else_is_refused_with_its_place() {
        for (text, part) in [
            ("[]", "empty list"),
            ("text", "should be a number"),
            ("- {filter: 5, value: 1}", "line 1, column 12: `x`: `filter` should be a text, found 5"),
            ("- {filter: a}", "`value` is missing"),
            ("- {filter: a, select: 'mlp', value: 1}", "both"),
            ("- {select: 'layers.x', value: 1}", "layers.x"),
            ("- {filter: a, valeu: 1}", "did you mean `value`?"),
            ("- {filter: a, value: {filter: b, value: 1}}", "`value` should be a number"),
            ("- text\n- 1", "found `text`"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.iter().any(|p| p.contains(part)), "{part} in {found:?}");
        }
    }
}
