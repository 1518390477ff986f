//! Merges in stages: documents of one YAML file that take the results of others as models (mergekit-multi).

use std::path::{Component, Path};

use firebrick_core::{MAX_SETTINGS, read_text};

use crate::config::MergeConfig;
use crate::input::InputModel;
use crate::yaml::Problems;
use crate::{Merge, MergeError};

/// The documents of a file, in an order in which each comes after those whose results it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Stages {
    configs: Vec<MergeConfig>,
    text: String,
}

impl Stages {
    /// Reads a YAML file of one document or more. All but one have a name, by which others take their results; the one whose result
    /// nobody takes is the merge proper and comes last.
    ///
    /// # Errors
    /// Lists every problem of the documents with line and column; names that go round in a circle; results that nobody takes.
    pub fn open(path: &Path) -> Result<Self, MergeError> {
        let text =
            read_text(path, MAX_SETTINGS).map_err(|source| MergeError::Io { path: path.into(), source })?;
        Self::parse(text).map_err(|problems| MergeError::Config { path: path.into(), problems })
    }

    /// As [`Stages::open`], from text.
    ///
    /// # Errors
    /// Every problem, one line each.
    pub fn parse(text: String) -> Result<Self, Vec<String>> {
        let mut rest = MergeConfig::parse_all(&text)?;
        let mut problems = Problems::default();
        for config in &rest {
            let name = config.name.as_deref().unwrap_or("plain");
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
            {
                problems
                    .add(config.places.name, format!("`name: {name}` should be the plain name of a folder"));
            }
        }
        let names: Vec<String> = rest.iter().filter_map(|c| c.name.clone()).collect();
        let taken = |name: &str| rest.iter().any(|c| c.models().iter().any(|m| m.path == name));
        let last: Vec<&MergeConfig> = rest.iter().filter(|c| !c.name.as_deref().is_some_and(taken)).collect();
        if let [_, others @ ..] = &last[..] {
            for other in others {
                problems.add(
                    other.place,
                    "a second document whose result no other takes; one is the merge proper",
                );
            }
        }
        let mut configs: Vec<MergeConfig> = Vec::new();
        loop {
            let done = |name: &String| configs.iter().any(|c| c.name.as_ref() == Some(name));
            let ready =
                |c: &MergeConfig| c.models().iter().all(|m| !names.contains(&m.path) || done(&m.path));
            let Some(next) = rest.iter().position(ready) else { break };
            configs.push(rest.remove(next));
        }
        for config in rest {
            let name = config.name.unwrap_or_default();
            problems.add(
                config.place,
                format!("document `{name}` needs its own result, or waits for one that does"),
            );
        }
        if problems.is_empty() { Ok(Stages { configs, text }) } else { Err(problems.into_lines()) }
    }

    /// The documents, in order; the last one is the merge proper.
    pub fn configs(&self) -> &[MergeConfig] {
        &self.configs
    }

    /// Opens every model that is no result of another document, so that one that is missing does not turn up after hours.
    ///
    /// # Errors
    /// Lists every model that cannot be opened, with line and column.
    pub fn check_models(&self, path: &Path) -> Result<(), MergeError> {
        let mut problems = Problems::default();
        let result = |model: &str| self.configs.iter().any(|c| c.name.as_deref() == Some(model));
        for config in &self.configs {
            for model in config.models().into_iter().filter(|m| !result(&m.path)) {
                if let Err(error) = InputModel::open(model) {
                    problems.add(config.place_of(model), error);
                }
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(MergeError::Mismatch { path: path.into(), problems: problems.into_lines() }),
        }
    }

    /// Opens the merge of one document; the results of others are folders of their names in `results`.
    ///
    /// # Errors
    /// As [`Merge::new`].
    pub fn merge(&self, stage: usize, path: &Path, results: &Path) -> Result<Merge, MergeError> {
        let mut config = self.configs[stage].clone();
        let result = |model: &str| self.configs.iter().any(|c| c.name.as_deref() == Some(model));
        config.each_model(&|model| {
            if result(&model.path) {
                model.path = results.join(&model.path).to_string_lossy().into_owned();
            }
        });
        Merge::new(config, self.text.clone(), path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(name: &str, model: &str) -> String {
        let name = if name.is_empty() { String::new() } else { format!("name: {name}\n") };
        format!("{name}merge_method: linear\nmodels: [{{model: {model}}}]\nparameters: {{weight: 1}}\n")
    }

    #[test]
    fn documents_come_after_what_they_take() {
        let text =
            [document("", "second"), document("second", "first"), document("first", "folder")].join("---\n");
        let stages = Stages::parse(text).unwrap();
        let names: Vec<_> = stages.configs().iter().map(|c| c.name.as_deref().unwrap_or("last")).collect();
        assert_eq!(names, ["first", "second", "last"]);
        assert_eq!(Stages::parse(document("", "folder")).unwrap().configs().len(), 1);
        assert_eq!(Stages::parse(document("only", "folder")).unwrap().configs().len(), 1);
    }

    #[test]
    fn circles_and_results_that_nobody_takes_are_listed() {
        let circle = [document("a", "b"), document("b", "a"), document("", "a")].join("---\n");
        let problems = Stages::parse(circle).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].contains("`a` needs its own result"), "{problems:?}");
        let two = [document("a", "folder"), document("", "folder")].join("---\n");
        let problems = Stages::parse(two).unwrap_err();
        assert!(problems.len() == 1 && problems[0].contains("no other takes"), "{problems:?}");
        assert!(Stages::parse(document("a", "a")).is_err());
        for name in ["../a", "a/b", "/a", "..", "a/"] {
            let problems = Stages::parse(document(name, "folder")).unwrap_err();
            assert!(problems[0].contains("plain name"), "{name}: {problems:?}");
        }
    }
}
