//! Search of the weights of a merge, a weight for each model and run of layers, led by what the merged model makes of texts; the result is
//! a merge again, whose YAML says the weights that were found (arXiv 2403.13187; arXiv 2410.13699, its homogeneous part).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use burn::tensor::Device;
use firebrick_core::{Event, Part, Progress, Seed, Silent, Site};
use firebrick_models::Decoder;
use firebrick_models::tokenizer::Tokenizer;
use firebrick_tensor::block::DType;
use firebrick_train::{Average, Document, Rows, TextData, held_out_loss, read_documents};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::config::MergeConfig;
use crate::in_memory::{Weights, Which};
use crate::learned::{
    CmaEs, CmaEsConfig, Composed, Granularity, Groups, Method, SearchConfig, SearchReport, TaskVector,
    search_from,
};
use crate::{Merge, MergeError, MergeMethod, Numerics, PlannedTensor, names};

/// Of a text that is cut in two, this part of its windows is held out.
const HELD_OUT: usize = 5;

/// Methods whose result is linear in the weights, so that one composed model stands for all of them.
const SEARCHED: [MergeMethod; 2] = [MergeMethod::TaskArithmetic, MergeMethod::Linear];

/// A text that merged models are measured on, as rows of equal length.
#[derive(Clone, Debug)]
pub struct SearchText {
    /// What the report calls it.
    pub name: String,
    window: usize,
    rows: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Whole windows.
    Windows(TextData),
    /// Documents of which only a part is to be learned.
    Packed(Rows<'static>),
}

impl SearchText {
    /// At most `windows` windows of `window` tokens of a file ([`read_documents`]), spread over it.
    ///
    /// # Errors
    /// As [`read_documents`]; [`MergeError::Settings`] if the text does not fill a window.
    pub fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        window: usize,
        windows: usize,
    ) -> Result<Self, MergeError> {
        Ok(Self::parts(path, tokenizer, window, windows, false)?.remove(0))
    }

    /// The same of the first four fifths of a file, and beside it as much at most of the rest, to be held out.
    ///
    /// # Errors
    /// As [`SearchText::read`], or if the text does not fill two windows.
    pub fn read_in_two(
        path: &Path,
        tokenizer: &Tokenizer,
        window: usize,
        windows: usize,
    ) -> Result<(Self, Self), MergeError> {
        let mut parts = Self::parts(path, tokenizer, window, windows, true)?;
        let held_out = parts.remove(1);
        Ok((parts.remove(0), held_out))
    }

    fn parts(
        path: &Path,
        tokenizer: &Tokenizer,
        window: usize,
        windows: usize,
        cut: bool,
    ) -> Result<Vec<Self>, MergeError> {
        let documents = read_documents(path, tokenizer)?;
        let name = path.display().to_string();
        let short = |what: &str| {
            let problems = vec![format!("{name}: {what}; give more text or smaller windows")];
            MergeError::Settings { problems }
        };
        let of = |rows| SearchText { name: name.clone(), window, rows };
        if documents.iter().any(Document::is_masked) {
            let parts = if cut { halves(&documents) } else { vec![&documents[..]] };
            let packed = parts.into_iter().map(|part| {
                let tokens: usize = part.iter().map(|d| d.ids.len()).sum();
                let step = tokens.div_ceil(windows * window).max(1);
                let some: Vec<Document> = part.iter().step_by(step).cloned().collect();
                let ends = tokenizer.eos_ids().first().copied();
                let pad = tokenizer.pad_id().or(ends).unwrap_or(0);
                let rows = Rows::pack(&some, window, pad, Average::Token);
                rows.map(|rows| of(Kind::Packed(rows))).map_err(|_| short("nothing to learn in a part of it"))
            });
            return packed.collect();
        }
        let text = TextData::from_encoded(&documents);
        let all: Vec<&[u32]> = text.windows(window).collect();
        if all.len() < 1 + usize::from(cut) {
            let what = if cut {
                "it does not fill two windows, one of them to be held out"
            } else {
                "it does not fill one window"
            };
            return Err(short(what));
        }
        let parts = if cut { halves(&all) } else { vec![&all[..]] };
        let spread = |part: &[&[u32]]| {
            let count = part.len().min(windows);
            let ids = (0..count).flat_map(|i| part[i * part.len() / count].to_vec()).collect();
            of(Kind::Windows(TextData::new(ids, 0)))
        };
        Ok(parts.into_iter().map(spread).collect())
    }

    fn rows(&self) -> Result<Rows<'_>, MergeError> {
        Ok(match &self.rows {
            Kind::Windows(text) => Rows::windows(text, self.window)?,
            Kind::Packed(rows) => rows.clone(),
        })
    }

    /// Tokens of its rows.
    pub fn tokens(&self) -> usize {
        match &self.rows {
            Kind::Windows(text) => text.ids.len(),
            Kind::Packed(rows) => rows.count() * rows.window(),
        }
    }

    /// Mean nats of a token, or of one that is to be learned, `batch` rows at a time.
    ///
    /// # Errors
    /// As [`held_out_loss`].
    pub fn nats(&self, decoder: &Decoder, batch: usize) -> Result<f64, MergeError> {
        Ok(held_out_loss(decoder, &[], &self.rows()?, batch, &Silent)?)
    }
}

/// What is searched on, and what is held out.
fn halves<T>(items: &[T]) -> Vec<&[T]> {
    let held = (items.len() / HELD_OUT).max(1).min(items.len());
    let (first, last) = items.split_at(items.len() - held);
    vec![first, last]
}

/// The mean over the texts of the nats per token: each text counts the same, however long. The logarithms of the ratios to the base's
/// perplexities differ from it by a number that no weight changes.
fn mean_nats(texts: &[SearchText], decoder: &Decoder, batch: usize) -> Result<f64, MergeError> {
    let each: Vec<f64> = texts.iter().map(|t| t.nats(decoder, batch)).collect::<Result<_, _>>()?;
    Ok(each.iter().sum::<f64>() / each.len() as f64)
}

/// What models make of one text, in nats per token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextNats {
    /// The text.
    pub name: String,
    /// Whether the search did not see it.
    pub held_out: bool,
    /// Its tokens.
    pub tokens: usize,
    /// The base.
    pub base: f64,
    /// The merge with the weights of the configuration.
    pub start: f64,
    /// The merge with the weights that were found.
    pub found: f64,
}

/// What a search of weights found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightReport {
    /// The method.
    pub method: &'static str,
    /// What task vectors are measured from. In a `linear` merge its weight is 1 minus those of the others.
    pub reference: String,
    /// The models, in the order of all coefficients.
    pub models: Vec<String>,
    /// How points were chosen.
    pub search_method: Method,
    /// Merged models to measure at most.
    pub budget: usize,
    /// Of all draws.
    pub seed: Seed,
    /// What lower costs are.
    pub measure: &'static str,
    /// The texts.
    pub texts: Vec<TextNats>,
    /// The weights that were found, beside others.
    #[serde(flatten)]
    pub search: SearchReport,
}

/// The texts of a search.
#[derive(Clone, Copy, Debug)]
pub struct SearchTexts<'a> {
    /// What it is led by, at least one.
    pub search: &'a [SearchText],
    /// What it does not see.
    pub held_out: &'a [SearchText],
    /// Rows at a time.
    pub batch: usize,
}

impl Merge {
    /// Why the weights of this merge cannot be searched so; nothing if they can.
    pub fn search_problems(&self, config: &SearchConfig) -> Vec<String> {
        let mut problems = self.unsearchable();
        let Granularity::LayerGroups(groups) = config.granularity else {
            problems.push("`granularity` should be that of runs of layers".into());
            return problems;
        };
        let layers = self.plan.layers.first().map_or(1, |(_, layers)| *layers);
        let weights = self.others().len() * groups.clamp(1, layers.max(1));
        let search = CmaEs::new(vec![0.0; weights], CmaEsConfig::default());
        if let (Method::CmaEs, Ok(search)) = (config.method, search)
            && config.evaluations < 1 + search.population()
        {
            problems.push(format!(
                "{} evaluations are fewer than the start and one generation of {} for {weights} weights",
                config.evaluations,
                search.population()
            ));
        }
        problems
    }

    /// What about the merge keeps its weights from being searched.
    fn unsearchable(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !SEARCHED.contains(&self.config.method) {
            let known = SEARCHED.map(MergeMethod::name).join(" and ");
            problems.push(format!(
                "the weights of `merge_method: {}` cannot be searched, those of {known} can",
                self.config.method.name()
            ));
        }
        problems.extend(self.whole_problems());
        if self.plan.layers.len() != 1 {
            problems.push(format!("its models have {} lists of layers, not one", self.plan.layers.len()));
        }
        if self.others().is_empty() {
            problems.push("there is no model beside the base".into());
        }
        problems
    }

    /// Bytes that [`Merge::search_weights`] holds: the base, the task vectors and one merged model in f32, beside a batch.
    pub fn search_bytes(&self) -> u64 {
        (self.others().len() as u64 + 2) * self.model_bytes()
    }

    /// The places of all models but the reference among the sources.
    fn others(&self) -> Vec<usize> {
        let sources = self.plan.tensors.first().map_or(0, |t| t.sources.len());
        (0..sources).filter(|i| *i != self.reference()).collect()
    }

    /// What multiplies the task vector of source `i` in `tensor`.
    fn coefficient(&self, tensor: &PlannedTensor, i: usize) -> f64 {
        let weight = |i: usize| tensor.sources[i].parameters.get("weight").copied().unwrap_or(0.0);
        let global = |name: &str, default: f64| tensor.global.get(name).copied().unwrap_or(default);
        let linear = self.config.method == MergeMethod::Linear;
        // Linear weights stand for their shares, whether they are normalized or not.
        let total: f64 =
            (0..tensor.sources.len()).filter(|i| linear || tensor.base != Some(*i)).map(weight).sum();
        let divided = linear || global("normalize", 0.0) != 0.0;
        let lambda = if linear { 1.0 } else { global("lambda", 1.0) };
        lambda * weight(i) / if divided && total.abs() >= 1e-8 { total } else { 1.0 }
    }

    /// The weights of the configuration by model and group, means over the tensors of the group.
    fn planned_weights(&self, groups: &Groups, site: &dyn Fn(&str) -> Option<Site>) -> Vec<Vec<f64>> {
        let mut means = vec![vec![0.0; groups.names().len()]; self.others().len()];
        let mut counts = vec![0.0; groups.names().len()];
        for tensor in self.plan.tensors.iter().filter(|t| !t.copied) {
            let Some(group) = site(&tensor.name).and_then(|s| groups.of(s)) else { continue };
            counts[group] += 1.0;
            for (row, i) in means.iter_mut().zip(self.others()) {
                // Exact where all are equal.
                row[group] += (self.coefficient(tensor, i) - row[group]) / counts[group];
            }
        }
        means
    }

    /// Searches a weight for each model and run of layers of [`SearchConfig::granularity`], from the weights of the configuration, and
    /// gives the merge with what was found. The embedding has the weight of the first layers, what comes after the layers that of the
    /// last.
    ///
    /// The cost is the mean over the texts of the nats per token of the model composed in f32. The weights of a `linear` merge add up
    /// to 1: those of all models but the reference are searched, within 0 and 1 or not.
    ///
    /// # Errors
    /// [`MergeError::Settings`] with [`Merge::search_problems`]; as [`crate::learned::search`] and [`SearchText::nats`].
    pub fn search_weights(
        &self,
        texts: SearchTexts<'_>,
        config: &SearchConfig,
        device: &Device,
        progress: &dyn Progress,
        resume: bool,
    ) -> Result<(Merge, WeightReport), MergeError> {
        let problems = self.search_problems(config);
        if !problems.is_empty() {
            return Err(MergeError::Settings { problems });
        }
        let base = self.decoder(Which::Source(self.reference()), device)?;
        let (sites, all) = (base.sites(), base.sites().all());
        let vector = |i: usize| {
            let weights = Weights { merge: self, sites, which: Which::Source(i) };
            TaskVector::between(&base, &weights, &all)
        };
        let vectors = self.others().into_iter().map(vector).collect::<Result<_, _>>()?;
        let composed = Composed::new(&base, vectors)?;
        let coefficients = composed.coefficients(config.granularity, 0.0, 1, config.seed);
        let groups = coefficients.groups();
        let sites = composed.base().sites();
        let site = |name: &str| sites.by_tensor(name);
        let start = self.planned_weights(groups, &site);
        let identity = Some(self.identity(&texts, &start)?);
        let config = SearchConfig { identity, ..config.clone() };
        let batch = texts.batch;
        let fitness = &mut |decoder: &Decoder| mean_nats(texts.search, decoder, batch);
        let mut unseen = |decoder: &Decoder| mean_nats(texts.held_out, decoder, batch);
        let held_out: Option<&mut crate::learned::Fitness<'_>> =
            if texts.held_out.is_empty() { None } else { Some(&mut unseen) };
        let (found, search) = search_from(
            &composed,
            &coefficients,
            start.concat(),
            &config,
            fitness,
            held_out,
            progress,
            resume,
        )?;
        let lowest = search.comparisons.iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
        if let Some(other) = lowest.filter(|other| other.cost < search.found().cost) {
            let text = format!(
                "`{}` costs {:.4}, less than the {:.4} of what was found: the budget is small",
                other.name,
                other.cost,
                search.found().cost
            );
            progress.on(Event::Warn(&text));
        }
        let numbers: Vec<f32> = start.concat().iter().map(|v| *v as f32).collect();
        let (start, best) = (composed.merge(&coefficients.with(&numbers)?)?, composed.merge(&found)?);
        let mut measured = Vec::new();
        let all = texts.search.iter().map(|t| (t, false)).chain(texts.held_out.iter().map(|t| (t, true)));
        for (text, held_out) in all {
            progress.check()?;
            measured.push(TextNats {
                name: text.name.clone(),
                held_out,
                tokens: text.tokens(),
                base: text.nats(composed.base(), batch)?,
                start: text.nats(&start, batch)?,
                found: text.nats(&best, batch)?,
            });
        }
        let merge = self.with_weights(groups, &site, &search.found().coefficients)?;
        let sources = &self.plan.tensors[0].sources;
        let name = |i: usize| self.models[sources[i].model].reference.to_string();
        let report = WeightReport {
            method: self.config.method.name(),
            reference: name(self.reference()),
            models: self.others().into_iter().map(name).collect(),
            search_method: config.method,
            budget: config.evaluations,
            seed: config.seed,
            measure: "mean over the texts of nats per token",
            texts: measured,
            search,
        };
        Ok((merge, report))
    }

    /// A digest of the models, the texts and where the search begins.
    fn identity(&self, texts: &SearchTexts<'_>, start: &[Vec<f64>]) -> Result<String, MergeError> {
        let mut hash = Sha256::new();
        hash.update(format!("{} {} {start:?}", self.config.method.name(), self.reference()));
        for tensor in self.plan.tensors.iter().filter(|t| !t.copied) {
            hash.update(&tensor.name);
            for source in &tensor.sources {
                hash.update(self.models[source.model].checkpoint.bytes(&source.stored)?);
            }
        }
        for adapter in self.models.iter().filter_map(|m| m.adapter.as_ref()) {
            hash.update(&adapter.sha256);
        }
        for text in texts.search {
            hash.update(text.rows()?.digest());
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The same merge with other weights, by model and group of whole layers: mergekit's YAML of it, opened.
    ///
    /// # Errors
    /// [`MergeError::Settings`] if a group splits a layer; as [`Merge::new`].
    fn with_weights(
        &self,
        groups: &Groups,
        site: &dyn Fn(&str) -> Option<Site>,
        weights: &[Vec<f64>],
    ) -> Result<Merge, MergeError> {
        let text = self.yaml(groups, site, weights)?;
        let path = Path::new("merge.yaml");
        let config = MergeConfig::parse(&text)
            .map_err(|problems| MergeError::Config { path: path.into(), problems })?;
        Merge::new(config, text, path)
    }

    fn yaml(
        &self,
        groups: &Groups,
        site: &dyn Fn(&str) -> Option<Site>,
        weights: &[Vec<f64>],
    ) -> Result<String, MergeError> {
        let mut layers: BTreeMap<usize, (String, usize)> = BTreeMap::new();
        let (mut before, mut after) = (Vec::new(), None);
        let mut problems = Vec::new();
        let planned = || self.plan.tensors.iter().filter(|t| !t.copied);
        for tensor in planned() {
            let place = site(&tensor.name);
            let group = place.and_then(|s| groups.of(s));
            match (names::layer_name(&tensor.name), group) {
                (Some(name), Some(group)) => {
                    let known = layers
                        .entry(name.layer)
                        .or_insert((format!("{}.{}.", name.prefix, name.layer), group));
                    if known.1 != group {
                        problems.push(format!("layer {} is in two groups", name.layer));
                    }
                }
                (None, Some(group)) if place.is_some_and(|s| s.part != Part::Embed) => after = Some(group),
                _ => {}
            }
        }
        let ends = (layers.values().next().map(|l| l.1), layers.values().last().map(|l| l.1));
        let (Some(first), Some(last)) = ends else {
            problems.push("there are no layers".into());
            return Err(MergeError::Settings { problems });
        };
        let embed = groups.of(Site::global(Part::Embed)).unwrap_or(first);
        for tensor in planned().filter(|t| names::layer_name(&t.name).is_none()) {
            if names::is_before_layers(&tensor.name) {
                before.push((tensor.name.clone(), embed));
            }
        }
        if !problems.is_empty() {
            return Err(MergeError::Settings { problems });
        }
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let mut yaml = format!("merge_method: {}\n", self.config.method.name());
        if let Some(base) = &self.config.base_model {
            let _ = writeln!(yaml, "base_model: {}", quoted(&base.to_string()));
        }
        yaml += "models:\n";
        let linear = self.config.method == MergeMethod::Linear;
        let others = self.others();
        let sources = &self.plan.tensors[0].sources;
        for (i, source) in sources.iter().enumerate() {
            let row: Vec<f64> = match others.iter().position(|o| *o == i) {
                Some(row) => weights[row].clone(),
                // What is left for the reference.
                None if linear => {
                    (0..weights[0].len()).map(|g| 1.0 - weights.iter().map(|w| w[g]).sum::<f64>()).collect()
                }
                None => continue,
            };
            let _ = writeln!(yaml, "- model: {}\n  parameters:\n    weight:", quoted(&source.name));
            for (filter, group) in before.iter().chain(layers.values()) {
                let _ = writeln!(yaml, "    - {{filter: {}, value: {}}}", quoted(filter), row[*group]);
            }
            let _ = writeln!(yaml, "    - value: {}", row[after.unwrap_or(last)]);
        }
        yaml += "parameters: {normalize: false}\n";
        for (key, dtype) in [("dtype", self.config.dtype), ("out_dtype", self.config.out_dtype)] {
            let name = match dtype {
                Some(DType::F16) => "float16",
                Some(DType::BF16) => "bfloat16",
                Some(_) => "float32",
                None => continue,
            };
            let _ = writeln!(yaml, "{key}: {name}");
        }
        if let Some(template) = &self.config.chat_template {
            let _ = writeln!(yaml, "chat_template: {}", quoted(template));
        }
        if self.config.numerics == Numerics::Mergekit {
            yaml += "numerics: mergekit\n";
        }
        Ok(yaml)
    }

    /// The configuration's text, which goes to the output.
    pub fn text(&self) -> &str {
        &self.text
    }
}
