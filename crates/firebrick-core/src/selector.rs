//! Selectors: patterns over the sites of a model.
//!
//! ```text
//! selector = pattern { "," pattern } ;
//! pattern  = "*" | "re:" REGEX | place [ "!" ] ;
//! place    = "layers." numbers [ "." parts ] | parts ;
//! numbers  = "*" | range | "{" range { "," range } "}" ;
//! range    = int | int "-" int ;                  (* both ends included *)
//! int      = [ "-" ] digit { digit } ;            (* layers: -1 is the last one *)
//! parts    = segment { "." segment } | [ "mlp." ] "experts" [ "." numbers [ "." segment ] ] ;
//! segment  = name | "*" | "{" name { "," name } "}" ;
//! ```
//!
//! - A pattern matches a site if it matches the site's own name or the name of something that holds it: `layers.3.mlp`
//!   names the feed-forward network and what is in it, `layers.3` the whole layer, `mlp.experts.0` all of one expert.
//! - A trailing `!` takes that back: `layers.3.mlp!` is that one site.
//! - Without `layers.` a pattern matches in every layer, and parts that exist once per model (`embed`, `norm`, `head`).
//! - `attn.*` matches names of two segments: the projections and head norms, not `attn` itself.
//! - `experts` is short for `mlp.experts.*`.
//! - `re:` takes the rest of the text verbatim, commas included, and is searched for in Hugging Face's tensor name.
//! - White space may stand around patterns and inside braces.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::{Part, Site, SiteEntry, SiteSet, SiteTable};

mod cover;
mod parse;

/// Longest text that is read.
pub(crate) const MAX_TEXT: usize = 64 * 1024;
/// Most bytes of a compiled pattern.
const MAX_REGEX: usize = 1 << 20;

/// Compiles a regular expression from a file or a command line, of at most 1 MiB.
///
/// # Errors
/// What is wrong with it, in one line.
pub fn bounded_regex(source: &str) -> Result<Regex, String> {
    RegexBuilder::new(source).size_limit(MAX_REGEX).build().map_err(|e| {
        let text = e.to_string();
        text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string()
    })
}

/// A pattern over sites, such as `layers.4-7.mlp.{up,down}, head`; the grammar stands at the top of `selector.rs`.
///
/// ```text
/// *                          every site
/// layers.3                   layer 3: its block and everything in it
/// layers.{0,-4--1}.attn      attention and what is in it, in the first and the last four layers
/// layers.*.attn.{q,v}        query and value projections of every layer; also written attn.{q,v}
/// mlp.experts.0-3.up         up projections of experts 0 to 3; also written experts.0-3.up
/// layers.3.mlp!              that one site, not what is in it
/// re:\.q_proj\.weight$       sites whose tensor has such a name at Hugging Face
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Selector {
    patterns: Vec<Pattern>,
}

/// A text is not a selector, or a selector matches nothing in a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}\n{}", pointer(text, span))]
#[non_exhaustive]
pub struct SelectorError {
    /// The selector.
    pub text: String,
    /// The bytes of `text` the message is about.
    pub span: Range<usize>,
    /// What is wrong, and what to write instead.
    pub message: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Pattern {
    All,
    Tensor(TensorRegex),
    Place { layers: Option<Numbers>, parts: Option<Parts>, exact: bool },
}

#[derive(Clone, Debug)]
struct TensorRegex(Regex);

impl PartialEq for TensorRegex {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Numbers {
    All,
    Ranges(Vec<(i32, i32)>),
}

#[derive(Clone, Debug, PartialEq)]
enum Parts {
    Segments(Vec<Segment>),
    Experts { experts: Numbers, leaf: Option<Segment> },
}

#[derive(Clone, Debug, PartialEq)]
enum Segment {
    Any,
    Names(Vec<&'static str>),
}

/// The name that holds all experts of a layer; no site has it.
const EXPERTS: &str = "mlp.experts";

impl Selector {
    /// Whether the selector matches `site` in a model of `layers` layers. `re:` patterns need a tensor's name and match
    /// nothing here; see [`Selector::matches_entry`].
    pub fn matches(&self, site: Site, layers: usize) -> bool {
        self.patterns.iter().any(|p| p.matches(site, layers))
    }

    /// Whether the selector matches the site of `entry` in a model of `layers` layers.
    pub fn matches_entry(&self, entry: &SiteEntry, layers: usize) -> bool {
        self.patterns.iter().any(|p| p.matches_entry(entry, layers))
    }

    /// The sites of a model this selector matches, at least one for each of its patterns and ranges of layers and experts.
    ///
    /// # Errors
    /// If a pattern matches nothing: says whether its layers or experts are out of range or its part is absent.
    pub fn resolve(&self, table: &SiteTable) -> Result<SiteSet, SelectorError> {
        let mut sites = SiteSet::default();
        let mut text = String::new();
        let mut problem = None;
        let experts = table.entries().iter().filter_map(|e| e.site.expert).max().map_or(0, |last| last + 1);
        for (i, pattern) in self.patterns.iter().enumerate() {
            if i > 0 {
                text.push_str(", ");
            }
            let start = text.len();
            text.push_str(&pattern.to_string());
            let mut matched = false;
            for entry in table.entries().iter().filter(|e| pattern.matches_entry(e, table.layers())) {
                sites.insert(entry.site);
                matched = true;
            }
            if problem.is_none() {
                let why = pattern.range_without_match(table.layers(), experts);
                let why = why.or_else(|| (!matched).then(|| pattern.why_nothing(table)));
                problem = why.map(|why| (start..text.len(), why));
            }
        }
        match problem {
            None => Ok(sites),
            Some((span, message)) => Err(SelectorError { text, span, message }),
        }
    }

    /// A short selector that matches exactly `sites`, each of which is written as a table of sites holds it; `None` if
    /// there are no sites. Thousands of scattered sites can make its text longer than the 64 KiB that are read;
    /// [`LayerPlan::from_sites`](crate::LayerPlan::from_sites) writes several rules then.
    pub fn exactly(sites: &SiteSet) -> Option<Selector> {
        let patterns = cover::patterns(sites);
        (!patterns.is_empty()).then_some(Selector { patterns })
    }
}

impl Pattern {
    fn matches_entry(&self, entry: &SiteEntry, layers: usize) -> bool {
        match self {
            Pattern::Tensor(regex) => entry.tensor.as_deref().is_some_and(|t| regex.0.is_match(t)),
            _ => self.matches(entry.site, layers),
        }
    }

    fn matches(&self, site: Site, layers: usize) -> bool {
        match self {
            Pattern::All => true,
            Pattern::Tensor(_) => false,
            Pattern::Place { layers: wanted, parts, exact } => {
                let layer_fits = match (wanted, site.layer) {
                    (None, _) => true,
                    (Some(_), None) => false,
                    (Some(wanted), Some(layer)) => wanted.contains(layer, layers),
                };
                layer_fits
                    && match parts {
                        None => !exact || (site.part == Part::Block && site.expert.is_none()),
                        Some(parts) => parts.match_site(site, *exact),
                    }
            }
        }
    }

    /// What is wrong with the first range of layers or experts that lies wholly outside a model.
    fn range_without_match(&self, layers: usize, experts: usize) -> Option<String> {
        let Pattern::Place { layers: wanted, parts, .. } = self else { return None };
        if let Some(range) = wanted.as_ref().and_then(|w| w.outside(layers)) {
            return Some(match layers {
                0 => format!("no layer {range}: the model has no layers"),
                n => format!("no layer {range}: the model has layers 0-{}", n - 1),
            });
        }
        match parts {
            Some(Parts::Experts { experts: wanted, .. }) if experts > 0 => {
                let range = wanted.outside(experts)?;
                Some(format!("no expert {range}: the model has experts 0-{}", experts - 1))
            }
            _ => None,
        }
    }

    fn why_nothing(&self, table: &SiteTable) -> String {
        if table.entries().is_empty() {
            return "the model has no sites".into();
        }
        if let Pattern::Tensor(regex) = self {
            let example = table.entries().iter().find_map(|e| e.tensor.as_deref()).unwrap_or("none");
            return format!("no tensor's name matches `{}`; a name is `{example}`", regex.0.as_str());
        }
        let mut names: Vec<String> = Vec::new();
        for entry in table.entries() {
            let any_expert = |e| format!("{EXPERTS}.{e}");
            let name = match entry.site.expert {
                None => entry.site.local_name(),
                Some(e) => entry.site.local_name().replacen(&any_expert(e), &format!("{EXPERTS}.*"), 1),
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        format!("nothing in the model matches; its parts are {}", names.join(", "))
    }
}

impl Numbers {
    /// The first range without any of the numbers `0..count`.
    fn outside(&self, count: usize) -> Option<Numbers> {
        let Numbers::Ranges(ranges) = self else { return None };
        let empty = |&&(from, to): &&(i32, i32)| {
            let (from, to) = (from_end(from, count), from_end(to, count));
            from.max(0) > to.min(count as i64 - 1)
        };
        ranges.iter().find(empty).map(|range| Numbers::Ranges(vec![*range]))
    }

    fn contains(&self, number: usize, count: usize) -> bool {
        match self {
            Numbers::All => true,
            Numbers::Ranges(ranges) => ranges
                .iter()
                .any(|&(from, to)| (from_end(from, count)..=from_end(to, count)).contains(&(number as i64))),
        }
    }
}

/// A number that counts from the end if it is negative.
fn from_end(number: i32, count: usize) -> i64 {
    let number = i64::from(number);
    if number < 0 { number + count as i64 } else { number }
}

impl Parts {
    fn match_site(&self, site: Site, exact: bool) -> bool {
        match self {
            Parts::Experts { experts, leaf } => {
                let Some(expert) = site.expert else { return false };
                experts.contains(expert, 0)
                    && match leaf {
                        None => !exact || site.part == Part::Mlp,
                        Some(leaf) => {
                            site.part.name().split_once('.').is_some_and(|(_, name)| leaf.matches(name))
                        }
                    }
            }
            Parts::Segments(segments) => {
                if exact {
                    return site.expert.is_none() && fits(site.part.name(), segments);
                }
                if site.expert.is_some() && fits(EXPERTS, segments) {
                    return true;
                }
                let start = if site.expert.is_some() { Part::Mlp } else { site.part };
                std::iter::successors(Some(start), |p| p.parent()).any(|p| fits(p.name(), segments))
            }
        }
    }
}

fn fits(name: &str, segments: &[Segment]) -> bool {
    let mut words = name.split('.');
    segments.iter().all(|s| words.next().is_some_and(|w| s.matches(w))) && words.next().is_none()
}

impl Segment {
    fn matches(&self, word: &str) -> bool {
        match self {
            Segment::Any => true,
            Segment::Names(names) => names.contains(&word),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, pattern) in self.patterns.iter().enumerate() {
            write!(f, "{}{pattern}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::All => f.write_str("*"),
            Pattern::Tensor(regex) => write!(f, "re:{}", regex.0.as_str()),
            Pattern::Place { layers, parts, exact } => {
                if let Some(layers) = layers {
                    write!(f, "layers.{layers}")?;
                }
                match (layers, parts) {
                    (_, None) => {}
                    (None, Some(parts)) => write!(f, "{parts}")?,
                    (Some(_), Some(parts)) => write!(f, ".{parts}")?,
                }
                f.write_str(if *exact { "!" } else { "" })
            }
        }
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Numbers::All => f.write_str("*"),
            Numbers::Ranges(ranges) => {
                let one = |(from, to): &(i32, i32)| match from == to {
                    true => from.to_string(),
                    false => format!("{from}-{to}"),
                };
                braces(f, &ranges.iter().map(one).collect::<Vec<_>>())
            }
        }
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Parts::Experts { experts, leaf } => {
                write!(f, "{EXPERTS}.{experts}")?;
                leaf.iter().try_for_each(|leaf| write!(f, ".{leaf}"))
            }
            Parts::Segments(segments) => {
                let words: Vec<String> = segments.iter().map(Segment::to_string).collect();
                f.write_str(&words.join("."))
            }
        }
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Segment::Any => f.write_str("*"),
            Segment::Names(names) => braces(f, names),
        }
    }
}

fn braces<S: AsRef<str>>(f: &mut fmt::Formatter<'_>, items: &[S]) -> fmt::Result {
    let items: Vec<&str> = items.iter().map(AsRef::as_ref).collect();
    match items.as_slice() {
        [one] => f.write_str(one),
        many => write!(f, "{{{}}}", many.join(",")),
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        if text.len() > MAX_TEXT {
            let message = format!("a selector of {} bytes; at most {MAX_TEXT} are read", text.len());
            return Err(SelectorError { text: String::new(), span: 0..0, message });
        }
        parse::selector(text)
    }
}

impl Serialize for Selector {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The line of `text` around `span`, with carets below it.
fn pointer(text: &str, span: &Range<usize>) -> String {
    const AROUND: usize = 50;
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let start = span.start.min(text.len());
    let (before, rest) = text.split_at_checked(start).unwrap_or((text, ""));
    let (inside, after) = rest.split_at_checked(span.end.saturating_sub(start)).unwrap_or((rest, ""));
    let skipped = before.chars().count().saturating_sub(AROUND);
    let cut = if skipped > 0 { "..." } else { "" };
    let before: String = before.chars().skip(skipped).map(printable).collect();
    let inside: String = inside.chars().take(AROUND).map(printable).collect();
    let after: String = after.chars().take(AROUND).map(printable).collect();
    let indent = " ".repeat(cut.len() + before.chars().count());
    let carets = "^".repeat(inside.chars().count().max(1));
    format!("  {cut}{before}{inside}{after}\n  {indent}{carets}")
}

/// The candidate closest to `word`, if it is close enough to be what was meant.
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    let limit = (word.chars().count() + 1) / 3;
    let scored = candidates.into_iter().map(|c| (edit_distance(word, c), c));
    scored.filter(|(d, _)| *d <= limit).min_by_key(|(d, _)| *d).map(|(_, c)| c)
}

/// Levenshtein's distance: insertions, deletions and replacements of characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
