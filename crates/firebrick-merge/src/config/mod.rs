//! mergekit's YAML: models, slices or modules, a method, and parameters as numbers, gradients over layers or lists of filters.
//!
//! Keys that nothing reads are errors with a suggestion: a misplaced `weight:` would otherwise change the result silently.

mod read;
mod value;

use std::fmt;
use std::ops::Range;

use firebrick_tensor::block::DType;

pub(crate) use read::knows_a_base;
pub use value::{Filter, Parameters, Value};

use crate::methods::{MergeMethod, Numerics};
use crate::yaml::{Place, Problems};

/// A model as a configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelRef {
    /// Folder or file, or the name of another document.
    pub path: String,
    /// Folder of an adapter to be merged into it.
    pub lora: Option<String>,
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        self.lora.iter().try_for_each(|lora| write!(f, "+{lora}"))
    }
}

/// A model in a slice.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceSource {
    /// The model.
    pub model: ModelRef,
    /// Its layers that take part; all of them where whole models are merged.
    pub layers: Option<Range<usize>>,
    /// Parameters for this model alone.
    pub parameters: Parameters,
    pub(crate) place: Place,
}

/// A run of layers of the output, and what it is merged from.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The models, in order; the same one may be there more than once.
    pub sources: Vec<SliceSource>,
    /// The base in this slice, where it is another one.
    pub base_model: Option<ModelRef>,
    /// Parameters of this slice.
    pub parameters: Parameters,
    pub(crate) place: Place,
}

/// A part of a model that has layers of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// What the names of its layers begin with (`model.layers`), or the start of that; `None` if there is one only.
    pub name: Option<String>,
    /// Its slices: one over all layers where whole models are merged.
    pub slices: Vec<Slice>,
    /// Parameters of this module.
    pub parameters: Parameters,
    pub(crate) place: Place,
}

/// A merge, as mergekit's YAML describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeConfig {
    /// What other documents call the result.
    pub name: Option<String>,
    /// The method.
    pub method: MergeMethod,
    /// What is merged: one module, unless a model has several.
    pub modules: Vec<Module>,
    /// The model that the others were made from.
    pub base_model: Option<ModelRef>,
    /// Parameters of the whole merge.
    pub parameters: Parameters,
    /// Type that inputs are rounded to before the merge; their own if absent.
    pub dtype: Option<DType>,
    /// Type of the output; `dtype` if absent.
    pub out_dtype: Option<DType>,
    /// The vocabulary of the output; absent, all models must have the same.
    pub tokenizer: Option<TokenizerConfig>,
    /// `auto`, a name that mergekit knows, or the template itself.
    pub chat_template: Option<String>,
    /// In which precision to compute.
    pub numerics: Numerics,
    /// Do as mergekit where it errs.
    pub compat: bool,
    /// Of the random methods.
    pub seed: u64,
    pub(crate) place: Place,
    pub(crate) places: Places,
}

/// Where keys stand whose values are checked against the models; nowhere for what is not given.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Places {
    pub base_model: Place,
    pub chat_template: Place,
    pub name: Place,
}

/// Which tokens the output has.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerConfig {
    /// Where the vocabulary comes from.
    pub source: TokenizerSource,
    /// Tokens whose rows come from elsewhere, and tokens to add.
    pub tokens: Vec<TokenRule>,
    /// Rows are filled up to a multiple of this with the mean row.
    pub pad_to_multiple_of: Option<usize>,
    pub(crate) place: Place,
}

/// Where a vocabulary comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerSource {
    /// All tokens of all models, those of the base first.
    Union,
    /// The base, or the first model where there is none.
    Base,
    /// This model.
    Model(ModelRef),
}

/// What is said about one token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRule {
    /// The token.
    pub token: String,
    /// Where the rows of models without it come from; by the usual rule if absent.
    pub source: Option<TokenSource>,
    /// Whether models that have the token take these rows too.
    pub force: bool,
    pub(crate) place: Place,
}

/// Where the row of a token comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenSource {
    /// The same token in this model.
    Model(ModelRef),
    /// Another token of this model.
    Token(ModelRef, String),
    /// A row of this model's embedding.
    Row(ModelRef, usize),
    /// Zeros.
    Zero,
}

impl TokenSource {
    /// The model whose row it is.
    pub(crate) fn model(&self) -> Option<&ModelRef> {
        match self {
            TokenSource::Model(m) | TokenSource::Token(m, _) | TokenSource::Row(m, _) => Some(m),
            TokenSource::Zero => None,
        }
    }
}

impl MergeConfig {
    /// Reads YAML text of one document.
    ///
    /// # Errors
    /// Every problem of the text, one line each, in the order of the text and with line and column.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let mut documents = Self::parse_all(text)?;
        let mut problems = Problems::default();
        let others = documents.iter().skip(1);
        others.for_each(|other| problems.add(other.place, "another document; one is expected here"));
        if problems.is_empty() { Ok(documents.remove(0)) } else { Err(problems.into_lines()) }
    }

    /// Reads the documents of a YAML text, which can take the results of others as models by their `name`.
    ///
    /// # Errors
    /// As [`MergeConfig::parse`]; besides, names that are there twice.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, Vec<String>> {
        read::documents(text)
    }

    /// Every model that is merged, each once, in order of appearance, and then those that are named as base or by the tokenizer only.
    pub fn models(&self) -> Vec<&ModelRef> {
        let slices = || self.modules.iter().flat_map(|m| &m.slices);
        let sources = slices().flat_map(|s| s.sources.iter().map(|s| &s.model));
        let tokens = self.tokenizer.iter().flat_map(|t| {
            let named = if let TokenizerSource::Model(model) = &t.source { Some(model) } else { None };
            let rules = t.tokens.iter().filter_map(|rule| rule.source.as_ref()?.model());
            named.into_iter().chain(rules)
        });
        let all = sources
            .chain(slices().filter_map(|s| s.base_model.as_ref()))
            .chain(&self.base_model)
            .chain(tokens);
        let mut models: Vec<&ModelRef> = Vec::new();
        for model in all {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }

    /// Changes every model that is named.
    pub(crate) fn each_model(&mut self, change: &dyn Fn(&mut ModelRef)) {
        let slices = self.modules.iter_mut().flat_map(|m| &mut m.slices);
        for slice in slices {
            slice.sources.iter_mut().for_each(|s| change(&mut s.model));
            slice.base_model.iter_mut().for_each(change);
        }
        self.base_model.iter_mut().for_each(change);
        let Some(tokenizer) = &mut self.tokenizer else { return };
        if let TokenizerSource::Model(model) = &mut tokenizer.source {
            change(model);
        }
        for rule in &mut tokenizer.tokens {
            match &mut rule.source {
                Some(TokenSource::Model(m) | TokenSource::Token(m, _) | TokenSource::Row(m, _)) => change(m),
                Some(TokenSource::Zero) | None => {}
            }
        }
    }

    /// Where a model is named: as one that is merged, as a base, or by the tokenizer.
    pub(crate) fn place_of(&self, model: &ModelRef) -> Place {
        let slices = || self.modules.iter().flat_map(|m| &m.slices);
        let sources = slices().flat_map(|s| &s.sources).map(|s| (Some(&s.model), s.place));
        let bases = slices().map(|s| (s.base_model.as_ref(), s.place));
        let base = (self.base_model.as_ref(), self.places.base_model);
        let tokens = self.tokenizer.iter().flat_map(|t| {
            let named = if let TokenizerSource::Model(model) = &t.source { Some(model) } else { None };
            let rules =
                t.tokens.iter().map(|rule| (rule.source.as_ref().and_then(TokenSource::model), rule.place));
            std::iter::once((named, t.place)).chain(rules)
        });
        let mut all = sources.chain(bases).chain([base]).chain(tokens);
        all.find(|(named, _)| *named == Some(model)).map_or(self.place, |(_, place)| place)
    }

    /// The base of `slice`.
    pub(crate) fn base_of<'a>(&'a self, slice: &'a Slice) -> Option<&'a ModelRef> {
        slice.base_model.as_ref().or(self.base_model.as_ref())
    }
}
