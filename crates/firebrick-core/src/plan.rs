//! Plans: settings for sites, by selector, in TOML or JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::selector::MAX_TEXT;
use crate::{MAX_SETTINGS, Selector, Site, SiteSet, SiteTable, read_text, write_atomic};

mod read;

/// The version of the format written here.
const VERSION: u32 = 1;

/// Most sites that all rules together may match: far above real plans, and a bound on what a hostile one allocates.
const MAX_MATCHES: usize = 1 << 22;

/// Settings for the sites of a model: rules, of which later ones override earlier ones field by field.
///
/// ```toml
/// version = 1
///
/// [[rules]]
/// select = "layers.*.attn.{q,v}"
/// rank = 8
///
/// [[rules]]
/// select = "layers.-4--1.attn.q"
/// rank = 32
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerPlan {
    /// Version of the format: 1.
    pub version: u32,
    /// The model the plan was made for; only a remark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The rules, later ones override earlier ones.
    pub rules: Vec<Rule>,
}

/// One rule of a plan; in a file the settings stand beside `select`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rule {
    /// The sites it is for.
    pub select: Selector,
    /// What it sets there.
    #[serde(flatten)]
    pub settings: Settings,
}

/// Settings of a site; `None` is not set. Each crate reads the fields it knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Settings {
    /// Rank of a low-rank adapter or factorization, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Numerator of an adapter's scale `alpha / rank`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Probability of zeroing an adapter's input while it trains, in `[0, 1)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Bits of a weight, 1 to 32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
    /// Weights that share a scale, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// Number of experts, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Experts a token goes to, 1 to `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Weight in a merge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of entries that are kept, in `(0, 1]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Learning rate, at least 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Whether the site does not train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frozen: Option<bool>,
    /// Whether the site is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop: Option<bool>,
    /// Settings of other crates, by name; in a file the table `extra`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Value>,
}

/// What a plan means for one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResolvedPlan {
    /// The settings of every site some rule matches.
    pub sites: BTreeMap<Site, Settings>,
    /// Which rule did what.
    pub coverage: Coverage,
}

/// Which rule of a plan did what; [`fmt::Display`] prints a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coverage {
    /// One entry per rule, in order.
    pub rules: Vec<RuleCoverage>,
    /// Sites no rule matches.
    pub unmatched: SiteSet,
}

/// What one rule did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleCoverage {
    /// The rule's selector.
    pub select: Selector,
    /// The sites it matches.
    pub matched: SiteSet,
    /// Those of them where later rules override everything it sets.
    pub shadowed: SiteSet,
}

/// A plan cannot be read, written or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The text is not TOML or JSON.
    #[error("{0}")]
    Syntax(String),
    /// The plan is wrong; every problem is listed.
    #[error("the plan has {} problem(s):{}", problems.len(), lines(problems))]
    Invalid {
        /// What is wrong, and where.
        problems: Vec<String>,
    },
    /// A value has no form in the file format.
    #[error("the plan cannot be written: {0}")]
    Unwritable(String),
    /// The name of the file ends neither in `.toml` nor in `.json`.
    #[error("{}: the name of a plan ends in .toml or .json", .0.display())]
    Extension(PathBuf),
    /// The file cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
    /// The plan in a file is wrong.
    #[error("{}: {error}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: Box<PlanError>,
    },
}

fn lines(problems: &[String]) -> String {
    let indented = |p: &String| format!("\n- {}", p.replace('\n', "\n  "));
    problems.iter().map(indented).collect()
}

impl Settings {
    /// Takes over every field that `later` sets; `extra` name by name.
    pub fn overlay(&mut self, later: &Settings) {
        let Settings {
            rank,
            alpha,
            dropout,
            bits,
            group,
            experts,
            top_k,
            weight,
            density,
            learning_rate,
            frozen,
            drop,
            extra,
        } = later;
        self.rank = rank.or(self.rank);
        self.alpha = alpha.or(self.alpha);
        self.dropout = dropout.or(self.dropout);
        self.bits = bits.or(self.bits);
        self.group = group.or(self.group);
        self.experts = experts.or(self.experts);
        self.top_k = top_k.or(self.top_k);
        self.weight = weight.or(self.weight);
        self.density = density.or(self.density);
        self.learning_rate = learning_rate.or(self.learning_rate);
        self.frozen = frozen.or(self.frozen);
        self.drop = drop.or(self.drop);
        self.extra.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
    }

    /// The names of the fields that are set, `extra.NAME` for those of other crates.
    pub fn names(&self) -> Vec<String> {
        let fields = [
            ("rank", self.rank.is_some()),
            ("alpha", self.alpha.is_some()),
            ("dropout", self.dropout.is_some()),
            ("bits", self.bits.is_some()),
            ("group", self.group.is_some()),
            ("experts", self.experts.is_some()),
            ("top_k", self.top_k.is_some()),
            ("weight", self.weight.is_some()),
            ("density", self.density.is_some()),
            ("learning_rate", self.learning_rate.is_some()),
            ("frozen", self.frozen.is_some()),
            ("drop", self.drop.is_some()),
        ];
        let own = fields.into_iter().filter(|(_, set)| *set).map(|(name, _)| name.to_string());
        own.chain(self.extra.keys().map(|k| format!("extra.{k}"))).collect()
    }

    /// Values no method can use, as (field, what is wrong).
    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let counts =
            [("rank", self.rank), ("group", self.group), ("experts", self.experts), ("top_k", self.top_k)];
        for (name, value) in counts {
            if value == Some(0) {
                problems.push((name, format!("{name} 0; it is at least 1")));
            }
        }
        if let Some(bits) = self.bits.filter(|b| !(1..=32).contains(b)) {
            problems.push(("bits", format!("bits {bits}; a weight has 1 to 32")));
        }
        if let (Some(top_k), Some(experts)) = (self.top_k, self.experts)
            && top_k > experts
        {
            problems.push(("top_k", format!("top_k {top_k} of {experts} experts")));
        }
        let mut check = |name, value: Option<f64>, good: fn(f64) -> bool, range: &str| {
            if let Some(value) = value.filter(|v| !good(*v)) {
                problems.push((name, format!("{name} {value}; it is {range}")));
            }
        };
        check("alpha", self.alpha, f64::is_finite, "a finite number");
        check("dropout", self.dropout, |v| (0.0..1.0).contains(&v), "at least 0 and below 1");
        check("weight", self.weight, f64::is_finite, "a finite number");
        check("density", self.density, |v| v > 0.0 && v <= 1.0, "above 0 and at most 1");
        check("learning_rate", self.learning_rate, |v| v >= 0.0 && v.is_finite(), "finite and at least 0");
        problems
    }
}

impl Default for LayerPlan {
    fn default() -> Self {
        LayerPlan { version: VERSION, model: None, rules: Vec::new() }
    }
}

impl LayerPlan {
    /// Writes an allocation as a plan: one rule for each distinct settings (several where one selector would be too long
    /// to be read back), the first site's rule first. Resolved on the model the sites come from it gives back exactly
    /// these settings.
    pub fn from_sites(sites: impl IntoIterator<Item = (Site, Settings)>) -> Self {
        let sites: BTreeMap<Site, Settings> = sites.into_iter().collect();
        let mut place: BTreeMap<String, usize> = BTreeMap::new();
        let mut groups: Vec<(Settings, SiteSet)> = Vec::new();
        for (site, settings) in sites {
            // Debug prints floats so that they round-trip, and unlike Settings it has an order.
            let i = *place.entry(format!("{settings:?}")).or_insert(groups.len());
            if i == groups.len() {
                groups.push((settings, SiteSet::default()));
            }
            groups[i].1.insert(site);
        }
        let mut rules = Vec::new();
        for (settings, sites) in &groups {
            add_rules(settings, sites, &mut rules);
        }
        LayerPlan { rules, ..LayerPlan::default() }
    }

    /// Reads TOML.
    ///
    /// # Errors
    /// [`PlanError::Syntax`], or [`PlanError::Invalid`] with every problem that shows without a model, each with its line.
    pub fn from_toml(text: &str) -> Result<Self, PlanError> {
        read::from_toml(text)
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// As [`LayerPlan::from_toml`], with paths such as `rules[2].rank` in place of lines.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let value: Value = serde_json::from_str(text).map_err(|e| PlanError::Syntax(e.to_string()))?;
        read::plan(&value).map_err(read::invalid)
    }

    /// Writes TOML.
    ///
    /// # Errors
    /// [`PlanError::Unwritable`] if `extra` holds a null, which TOML lacks.
    pub fn to_toml(&self) -> Result<String, PlanError> {
        toml::to_string(self).map_err(|e| PlanError::Unwritable(e.to_string()))
    }

    /// Writes JSON, indented.
    ///
    /// # Errors
    /// [`PlanError::Unwritable`]; an infinite number or NaN is written as null, which does not read back.
    pub fn to_json(&self) -> Result<String, PlanError> {
        serde_json::to_string_pretty(self).map_err(|e| PlanError::Unwritable(e.to_string()))
    }

    /// Reads a `.toml` or `.json` file.
    ///
    /// # Errors
    /// As [`LayerPlan::from_toml`], with the file's name.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, PlanError> {
        let path = path.as_ref();
        let format = Format::of(path)?;
        let text =
            read_text(path, MAX_SETTINGS).map_err(|error| PlanError::Io { path: path.into(), error })?;
        let plan = match format {
            Format::Toml => LayerPlan::from_toml(&text),
            Format::Json => LayerPlan::from_json(&text),
        };
        plan.map_err(|error| PlanError::In { path: path.into(), error: Box::new(error) })
    }

    /// Writes a `.toml` or `.json` file: under another name first, so that an interrupted run leaves the old file.
    ///
    /// # Errors
    /// [`PlanError::Extension`], [`PlanError::Unwritable`] or [`PlanError::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), PlanError> {
        let path = path.as_ref();
        let text = match Format::of(path)? {
            Format::Toml => self.to_toml()?,
            Format::Json => self.to_json()?,
        };
        write_atomic(path, text.as_bytes()).map_err(|error| PlanError::Io { path: path.into(), error })
    }

    /// The settings of each site of a model, and which rule did what.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] with every problem: a rule that matches nothing, a value no method can use (also
    /// one that only two rules together make), another version.
    pub fn resolve(&self, table: &SiteTable) -> Result<ResolvedPlan, PlanError> {
        let mut problems = Vec::new();
        problems.extend(wrong_version(self.version));
        let (mut rules, mut matches) = (Vec::new(), 0);
        for (i, rule) in self.rules.iter().enumerate() {
            problems
                .extend(rule.settings.problems().into_iter().map(|(_, why)| format!("rules[{i}]: {why}")));
            let matched = rule.select.resolve(table).unwrap_or_else(|e| {
                problems.push(format!("rules[{i}].select: {e}"));
                SiteSet::default()
            });
            matches += matched.len();
            if matches > MAX_MATCHES {
                problems
                    .push(format!("rules[{i}]: the rules up to here match more than {MAX_MATCHES} sites"));
                break;
            }
            rules.push(RuleCoverage { select: rule.select.clone(), matched, shadowed: SiteSet::default() });
        }
        let mut sites: BTreeMap<Site, Settings> = BTreeMap::new();
        for (rule, coverage) in self.rules.iter().zip(&rules) {
            for site in coverage.matched.iter() {
                sites.entry(site).or_default().overlay(&rule.settings);
            }
        }
        if problems.is_empty() {
            let wrong = |(site, settings): (&Site, &Settings)| {
                let list = settings.problems().into_iter();
                list.map(|(_, why)| format!("{site}: {why}")).collect::<Vec<_>>()
            };
            problems.extend(sites.iter().flat_map(wrong));
        }
        if !problems.is_empty() {
            return Err(PlanError::Invalid { problems });
        }
        let mut set_later: BTreeMap<Site, BTreeSet<String>> = BTreeMap::new();
        for (rule, coverage) in self.rules.iter().zip(&mut rules).rev() {
            let names = rule.settings.names();
            for site in coverage.matched.iter() {
                let later = set_later.entry(site).or_default();
                if !names.is_empty() && names.iter().all(|n| later.contains(n)) {
                    coverage.shadowed.insert(site);
                }
                later.extend(names.iter().cloned());
            }
        }
        let unmatched = table.all().filter(|s| !sites.contains_key(&s));
        Ok(ResolvedPlan { sites, coverage: Coverage { rules, unmatched } })
    }
}

/// Adds a rule for exactly `sites`, or one for each half of them if its selector is too long to be read.
fn add_rules(settings: &Settings, sites: &SiteSet, rules: &mut Vec<Rule>) {
    let Some(select) = Selector::exactly(sites) else { return };
    if sites.len() < 2 || select.to_string().len() <= MAX_TEXT {
        rules.push(Rule { select, settings: settings.clone() });
        return;
    }
    let half = sites.len() / 2;
    add_rules(settings, &sites.iter().take(half).collect(), rules);
    add_rules(settings, &sites.iter().skip(half).collect(), rules);
}

fn wrong_version(version: u32) -> Option<String> {
    (version != VERSION).then(|| format!("version {version}; this release reads version {VERSION}"))
}

impl<'de> Deserialize<'de> for LayerPlan {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        read::plan(&value).map_err(|problems| serde::de::Error::custom(read::invalid(problems)))
    }
}

impl ResolvedPlan {
    /// The settings of a site, or `None` if no rule matches it.
    pub fn get(&self, site: Site) -> Option<&Settings> {
        self.sites.get(&site)
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WIDEST: usize = 60;
        const NAMED: usize = 6;
        let short = |rule: &RuleCoverage| {
            let text = rule.select.to_string();
            match text.chars().count() > WIDEST {
                true => text.chars().take(WIDEST - 3).chain("...".chars()).collect(),
                false => text,
            }
        };
        let selectors: Vec<String> = self.rules.iter().map(short).collect();
        let width = selectors.iter().map(|s| s.chars().count()).chain([8]).max().unwrap_or(8);
        writeln!(f, "rule  {:<width$}  matched  shadowed", "selector")?;
        for (i, (rule, select)) in self.rules.iter().zip(&selectors).enumerate() {
            writeln!(f, "{i:>4}  {select:<width$}  {:>7}  {:>8}", rule.matched.len(), rule.shadowed.len())?;
        }
        write!(f, "      {:<width$}  {:>7}", "no rule", self.unmatched.len())?;
        if !self.unmatched.is_empty() {
            let names: Vec<String> = self.unmatched.iter().take(NAMED).map(|s| s.to_string()).collect();
            let more = if self.unmatched.len() > NAMED { ", ..." } else { "" };
            write!(f, "  {}{more}", names.join(", "))?;
        }
        writeln!(f)
    }
}

enum Format {
    Toml,
    Json,
}

impl Format {
    fn of(path: &Path) -> Result<Format, PlanError> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => Ok(Format::Toml),
            Some("json") => Ok(Format::Json),
            _ => Err(PlanError::Extension(path.into())),
        }
    }
}
