//! From YAML with places to [`MergeConfig`], with every problem on the way.

use std::ops::Range;

use firebrick_tensor::block::DType;

use super::{
    MergeConfig, ModelRef, Module, Parameters, Places, Slice, SliceSource, TokenRule, TokenSource,
    TokenizerConfig, TokenizerSource, Value,
};
use crate::methods::{MergeMethod, Numerics};
use crate::yaml::{Node, Place, Problems, Yaml, suggestion};

const TOP: &[&str] = &[
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "numerics",
    "compat",
    "seed",
    "name",
];

/// Most that a weight or factor can be: sums of products with weights stay finite in f32.
const LARGEST: f64 = 1e30;

/// Most steps of an iteration.
const MOST_STEPS: f64 = 1e6;

/// Accepted everywhere: how mergekit stores masks, without effect on the result.
const INT8_MASK: &str = "int8_mask";

pub(super) fn documents(text: &str) -> Result<Vec<MergeConfig>, Vec<String>> {
    let nodes = Node::documents(text).map_err(|e| vec![e])?;
    let mut problems = Problems::default();
    let mut configs = Vec::new();
    for node in nodes.iter().filter(|n| n.value != Yaml::Null) {
        node.check(&mut problems);
        configs.extend(Reader { problems: &mut problems, method: None }.config(node));
    }
    if nodes.iter().all(|n| n.value == Yaml::Null) {
        problems.add(Place::default(), "the text is empty");
    }
    let named = |i: usize| nodes.get(i).and_then(|n| n.get("name")).and_then(Node::text);
    for (i, node) in nodes.iter().enumerate() {
        let Some(name) = named(i) else { continue };
        if (0..i).any(|j| named(j) == Some(name)) {
            problems.add(
                node.get("name").map_or(node.place, |n| n.place),
                format!("two documents are named `{name}`"),
            );
        }
    }
    if problems.is_empty() { Ok(configs) } else { Err(problems.into_lines()) }
}

/// Which parameters may stand where.
#[derive(Clone, Copy, PartialEq)]
enum Level {
    /// Beside a model.
    Source,
    /// Anywhere above.
    Above,
}

struct Reader<'p> {
    problems: &'p mut Problems,
    /// Known if it could be read.
    method: Option<MergeMethod>,
}

impl Reader<'_> {
    fn config(&mut self, node: &Node) -> Option<MergeConfig> {
        self.problems.map(node, TOP, "the configuration");
        if !matches!(node.value, Yaml::Map(_)) {
            return None;
        }
        self.method = self.merge_method(node);
        let base_model = node.get("base_model").and_then(|n| self.model(n, "`base_model`"));
        let parameters = self.parameters(node, Level::Above, "`parameters`");
        let place = |key: &str| node.get(key).map_or(node.place, |n| n.place);
        let places = Places {
            base_model: place("base_model"),
            chat_template: place("chat_template"),
            name: place("name"),
        };
        let modules = self.body(node, base_model.as_ref().map(|base| (base, places.base_model)));
        let (dtype, out_dtype) = (self.dtype(node, "dtype"), self.dtype(node, "out_dtype"));
        let numerics = match node.get("numerics").map(|n| (n, n.text().unwrap_or_default())) {
            None | Some((_, "f32")) => Numerics::F32,
            Some((_, "mergekit")) => Numerics::Mergekit,
            Some((n, _)) => {
                self.problems.add(n.place, format!("`numerics` should be f32 or mergekit, found {n}"));
                Numerics::F32
            }
        };
        let compat = self.switch(node, "compat", "`compat`");
        let seed = node.get("seed").map_or(0, |n| match n.count() {
            Some(seed) => seed as u64,
            None => {
                self.problems.add(n.place, format!("`seed` should be a whole number below 10^9, found {n}"));
                0
            }
        });
        let tokenizer = self.tokenizer(node);
        let chat_template = self.text(node, "chat_template");
        let name = self.text(node, "name");
        let config = MergeConfig {
            name,
            method: self.method?,
            modules: modules?,
            base_model,
            parameters,
            dtype,
            out_dtype,
            tokenizer,
            chat_template,
            numerics,
            compat,
            seed,
            place: node.place,
            places,
        };
        self.fits(&config);
        Some(config)
    }

    /// A switch, off where it is not given.
    fn switch(&mut self, node: &Node, key: &str, what: &str) -> bool {
        let Some(found) = node.get(key) else { return false };
        match found.number() {
            Some(v) if v == 0.0 || v == 1.0 => v == 1.0,
            _ => {
                self.problems.add(found.place, format!("{what} should be true or false, found {found}"));
                false
            }
        }
    }

    fn text(&mut self, node: &Node, key: &str) -> Option<String> {
        let found = node.get(key)?;
        if found.text().is_none_or(str::is_empty) {
            self.problems.add(found.place, format!("`{key}` should be a text, found {found}"));
        }
        found.text().map(String::from)
    }

    fn merge_method(&mut self, node: &Node) -> Option<MergeMethod> {
        let Some(found) = node.get("merge_method") else {
            self.problems.add(node.place, "`merge_method` is missing");
            return None;
        };
        let Some(name) = found.text() else {
            self.problems.add(found.place, format!("`merge_method` should be a name, found {found}"));
            return None;
        };
        let method = name.parse().ok();
        if method.is_none() {
            let names: Vec<&str> = MergeMethod::all().map(MergeMethod::name).collect();
            let hint = suggestion(name, names.iter().copied());
            self.problems.add(found.place, format!("there is no merge_method `{name}`; {hint}"));
        }
        method
    }

    fn dtype(&mut self, node: &Node, key: &str) -> Option<DType> {
        let found = node.get(key)?;
        let dtype = match found.text().unwrap_or_default().trim_start_matches("torch.") {
            "float32" | "f32" => Some(DType::F32),
            "float16" | "f16" => Some(DType::F16),
            "bfloat16" | "bf16" => Some(DType::BF16),
            _ => None,
        };
        if dtype.is_none() {
            let text = format!("`{key}` should be float32, float16 or bfloat16, found {found}");
            self.problems.add(found.place, text);
        }
        dtype
    }

    /// `models`, `slices` or `modules`.
    fn body(&mut self, node: &Node, base: Option<(&ModelRef, Place)>) -> Option<Vec<Module>> {
        let keys: Vec<&str> =
            ["models", "slices", "modules"].into_iter().filter(|k| node.get(k).is_some()).collect();
        match keys[..] {
            ["modules"] => {
                let found = node.get("modules")?;
                let Yaml::Map(entries) = &found.value else {
                    self.problems
                        .add(found.place, format!("`modules` should be a map of modules, found {found}"));
                    return None;
                };
                if entries.is_empty() {
                    self.problems.add(found.place, "`modules` is empty");
                }
                let mut modules = Vec::new();
                for (key, module) in entries {
                    let what = format!("module `{}`", key.text);
                    self.problems.map(module, &["models", "slices", "parameters"], &what);
                    if !matches!(module.value, Yaml::Map(_)) {
                        continue;
                    }
                    let parameters = self.parameters(module, Level::Above, &format!("parameters of {what}"));
                    let name = Some(key.text.clone()).filter(|name| name != "default");
                    if let Some(slices) = self.slices(module, base, &what) {
                        modules.push(Module { name, slices, parameters, place: key.place });
                    }
                }
                (modules.len() == entries.len()).then_some(modules)
            }
            ["models"] | ["slices"] => {
                let slices = self.slices(node, base, "the configuration")?;
                Some(vec![Module {
                    name: None,
                    slices,
                    parameters: Parameters::default(),
                    place: node.place,
                }])
            }
            _ => {
                let found = if keys.is_empty() { "none of them".into() } else { keys.join(" and ") };
                let text = format!("one of `models`, `slices` and `modules` is needed, found {found}");
                self.problems.add(node.place, text);
                None
            }
        }
    }

    fn list<'n>(&mut self, node: &'n Node, key: &str, what: &str) -> Option<&'n [Node]> {
        let found = node.get(key);
        match found.map(|n| &n.value) {
            Some(Yaml::List(items)) if !items.is_empty() => Some(items),
            None => {
                self.problems.add(node.place, format!("`{key}` is missing in {what}"));
                None
            }
            _ => {
                let place = found.map_or(node.place, |n| n.place);
                let text = match found {
                    Some(n) if matches!(n.value, Yaml::List(_)) => format!("`{key}` of {what} is empty"),
                    Some(n) => format!("`{key}` of {what} should be a list, found {n}"),
                    None => String::new(),
                };
                self.problems.add(place, text);
                None
            }
        }
    }

    /// The slices of a module: the listed ones, or one of whole models, to which the base is added as mergekit does.
    fn slices(&mut self, node: &Node, base: Option<(&ModelRef, Place)>, what: &str) -> Option<Vec<Slice>> {
        match (node.get("models"), node.get("slices")) {
            (Some(models), None) => {
                let items = self.list(node, "models", what)?;
                let read: Vec<_> = items.iter().map(|item| self.source(item, false)).collect();
                let mut sources = read.into_iter().collect::<Option<Vec<_>>>()?;
                if let Some((base, place)) = base
                    && sources.iter().all(|s| s.model != *base)
                {
                    let parameters = Parameters::default();
                    sources.push(SliceSource { model: base.clone(), layers: None, parameters, place });
                }
                Some(vec![Slice {
                    sources,
                    base_model: None,
                    parameters: Parameters::default(),
                    place: models.place,
                }])
            }
            (None, Some(_)) => {
                let items = self.list(node, "slices", what)?;
                let read: Vec<_> = items.iter().map(|item| self.slice(item)).collect();
                let slices = read.into_iter().collect::<Option<Vec<_>>>()?;
                let total: usize =
                    slices.iter().filter_map(|s| s.sources[0].layers.as_ref().map(Range::len)).sum();
                if total == 0 {
                    self.problems.add(node.place, format!("the slices of {what} have no layers"));
                }
                Some(slices)
            }
            (Some(_), Some(slices)) => {
                self.problems.add(slices.place, format!("{what} has both `models` and `slices`"));
                None
            }
            (None, None) => {
                self.problems.add(node.place, format!("{what} needs `models` or `slices`"));
                None
            }
        }
    }

    fn slice(&mut self, node: &Node) -> Option<Slice> {
        let known = ["sources", "base_model", "parameters", "residual_weight"];
        self.problems.map(node, &known, "a slice");
        if !matches!(node.value, Yaml::Map(_)) {
            return None;
        }
        let base_model = node.get("base_model").and_then(|n| self.model(n, "`base_model` of a slice"));
        let parameters = self.parameters(node, Level::Above, "parameters of a slice");
        let items = self.list(node, "sources", "a slice")?;
        let read: Vec<_> = items.iter().map(|item| self.source(item, true)).collect();
        let sources = read.into_iter().collect::<Option<Vec<_>>>()?;
        let length = |s: &SliceSource| s.layers.as_ref().map_or(0, Range::len);
        for other in sources.iter().filter(|s| length(s) != length(&sources[0])) {
            let text = format!(
                "`{}` gives {} layers to this slice, `{}` gives {}",
                other.model,
                length(other),
                sources[0].model,
                length(&sources[0])
            );
            self.problems.add(other.place, text);
        }
        Some(Slice { sources, base_model, parameters, place: node.place })
    }

    /// A model of a slice, or of `models` where there are no `layers`.
    fn source(&mut self, node: &Node, layers: bool) -> Option<SliceSource> {
        let what = if layers { "a source of a slice" } else { "an entry of `models`" };
        let known: &[&str] =
            if layers { &["model", "layer_range", "parameters"] } else { &["model", "parameters"] };
        self.problems.map(node, known, what);
        if !matches!(node.value, Yaml::Map(_)) {
            return None;
        }
        let parameters = self.parameters(node, Level::Source, "parameters of a model");
        let range = match node.get("layer_range") {
            Some(range) if layers => self.layer_range(range),
            None if layers => {
                self.problems.add(node.place, "`layer_range` is missing in a source of a slice");
                None
            }
            _ => None,
        };
        let Some(model) = node.get("model") else {
            self.problems.add(node.place, format!("`model` is missing in {what}"));
            return None;
        };
        let model = self.model(model, "`model`")?;
        if layers && range.is_none() {
            return None;
        }
        Some(SliceSource { model, layers: range, parameters, place: node.place })
    }

    fn layer_range(&mut self, node: &Node) -> Option<Range<usize>> {
        let bounds = match &node.value {
            Yaml::List(items) if items.len() == 2 => items[0].count().zip(items[1].count()),
            _ => None,
        };
        match bounds {
            Some((from, to)) if from <= to => Some(from..to),
            Some((from, to)) => {
                self.problems
                    .add(node.place, format!("`layer_range` ends at {to}, before it starts at {from}"));
                None
            }
            None => {
                let text = "`layer_range` should be two layer numbers, the first and the one after the last";
                self.problems.add(node.place, format!("{text}, found {node}"));
                None
            }
        }
    }

    /// A path, `path+adapter`, or a map `{model: {path}, lora: {path}}`.
    fn model(&mut self, node: &Node, what: &str) -> Option<ModelRef> {
        if let Some(text) = node.text() {
            let (path, lora) = match text.split_once('+') {
                Some((path, lora)) => (path, Some(lora)),
                None => (text, None),
            };
            if path.is_empty() || lora.is_some_and(str::is_empty) {
                self.problems.add(node.place, format!("{what}: `{text}` names no model"));
                return None;
            }
            return Some(ModelRef { path: path.into(), lora: lora.map(String::from) });
        }
        if !matches!(node.value, Yaml::Map(_)) {
            self.problems.add(node.place, format!("{what} should be a path, found {node}"));
            return None;
        }
        self.problems.map(node, &["model", "lora", "override_architecture"], what);
        if let Some(found) = node.get("override_architecture") {
            let text = "`override_architecture` is not supported: tensors are told by their names";
            self.problems.add(found.place, text);
        }
        let mut path = |key: &str| {
            let found = node.get(key)?;
            if let Some(text) = found.text() {
                return Some(text.to_owned());
            }
            self.problems.map(found, &["path", "revision"], &format!("`{key}`"));
            if let Some(revision) = found.get("revision") {
                let text = "`revision` is one of the Hub; models are read from folders and files";
                self.problems.add(revision.place, text);
            }
            let path = found.get("path").and_then(Node::text);
            if path.is_none() {
                self.problems.add(found.place, format!("`path` is missing in `{key}`"));
            }
            path.map(String::from)
        };
        let (model, lora) = (path("model"), path("lora"));
        if node.get("model").is_none() {
            self.problems.add(node.place, format!("{what}: `model` is missing"));
        }
        Some(ModelRef { path: model?, lora })
    }

    fn parameters(&mut self, node: &Node, level: Level, what: &str) -> Parameters {
        let Some(found) = node.get("parameters") else { return Parameters::default() };
        let Yaml::Map(entries) = &found.value else {
            self.problems.add(found.place, format!("{what} should be a map, found {found}"));
            return Parameters::default();
        };
        let mut read = Vec::new();
        for (key, node) in entries {
            let name = key.text.as_str();
            if let Some(problem) = self.method.and_then(|method| misplaced(method, name, level, what)) {
                self.problems.add(key.place, problem);
                continue;
            }
            if node.value == Yaml::Null {
                continue;
            }
            let Some(value) = Value::read(node, &format!("`{name}`"), self.problems) else { continue };
            if let Some(range) = out_of_range(name, &value.numbers()) {
                self.problems.add(node.place, format!("`{name}` should {range}"));
            }
            read.push((name.to_owned(), value, key.place));
        }
        Parameters(read)
    }

    fn tokenizer(&mut self, node: &Node) -> Option<TokenizerConfig> {
        let source = |reader: &mut Self, node: &Node, what: &str| match node.text() {
            Some("union") => Some(TokenizerSource::Union),
            Some("base") => Some(TokenizerSource::Base),
            Some(text) => {
                // As older versions of mergekit wrote it.
                let path =
                    Node { value: Yaml::Text(text.trim_start_matches("model:").into()), ..node.clone() };
                reader.model(&path, what).map(TokenizerSource::Model)
            }
            None => reader.model(node, what).map(TokenizerSource::Model),
        };
        let found = match (node.get("tokenizer_source"), node.get("tokenizer")) {
            (None, None) => return None,
            (Some(_), Some(tokenizer)) => {
                self.problems.add(tokenizer.place, "both `tokenizer_source` and `tokenizer` are given");
                return None;
            }
            (Some(found), None) => {
                let source = source(self, found, "`tokenizer_source`")?;
                let place = found.place;
                return Some(TokenizerConfig { source, tokens: Vec::new(), pad_to_multiple_of: None, place });
            }
            (None, Some(found)) => found,
        };
        self.problems.map(found, &["source", "tokens", "pad_to_multiple_of"], "`tokenizer`");
        if !matches!(found.value, Yaml::Map(_)) {
            return None;
        }
        let source = match found.get("source") {
            Some(n) => source(self, n, "`source` of the tokenizer")?,
            None => TokenizerSource::Union,
        };
        let pad_to_multiple_of = found.get("pad_to_multiple_of").and_then(|n| {
            let count = n.count().filter(|c| (1..=1 << 20).contains(c));
            if count.is_none() {
                let text = format!("`pad_to_multiple_of` should be a whole number from 1 to 2^20, found {n}");
                self.problems.add(n.place, text);
            }
            count
        });
        let mut tokens = Vec::new();
        if let Some(list) = found.get("tokens") {
            let Yaml::Map(entries) = &list.value else {
                self.problems.add(list.place, format!("`tokens` should be a map of tokens, found {list}"));
                return None;
            };
            for (key, rule) in entries {
                tokens.extend(self.token_rule(&key.text, key.place, rule));
            }
        }
        Some(TokenizerConfig { source, tokens, pad_to_multiple_of, place: found.place })
    }

    fn token_rule(&mut self, token: &str, place: Place, node: &Node) -> Option<TokenRule> {
        let what = format!("token `{token}`");
        self.problems.map(node, &["source", "force"], &what);
        if token.is_empty() {
            self.problems.add(place, "a token is an empty text");
        }
        let force = self.switch(node, "force", &format!("`force` of {what}"));
        let rule = |source| Some(TokenRule { token: token.to_owned(), source, force, place });
        let Some(found) = node.get("source") else {
            if force {
                self.problems.add(place, format!("{what} is forced to a `source` that is missing"));
            }
            return rule(None);
        };
        let Some(kind) = found.get("kind") else {
            return rule(Some(TokenSource::Model(self.model(found, &format!("`source` of {what}"))?)));
        };
        match kind.text() {
            Some("zero") => {
                self.problems.map(found, &["kind"], &format!("`source` of {what}"));
                rule(Some(TokenSource::Zero))
            }
            Some("model_token") => {
                let known = ["kind", "model", "token", "token_id"];
                self.problems.map(found, &known, &format!("`source` of {what}"));
                let Some(model) = found.get("model") else {
                    self.problems.add(found.place, format!("`model` is missing in the source of {what}"));
                    return None;
                };
                let model = self.model(model, "`model`")?;
                match (found.get("token"), found.get("token_id")) {
                    (Some(t), None) if t.text().is_some() => {
                        rule(Some(TokenSource::Token(model, t.text().unwrap_or_default().to_owned())))
                    }
                    (None, Some(id)) if id.count().is_some() => {
                        rule(Some(TokenSource::Row(model, id.count().unwrap_or_default())))
                    }
                    (None, Some(id)) => {
                        let text = format!("`token_id` of {what} should be a whole number, found {id}");
                        self.problems.add(id.place, text);
                        None
                    }
                    (Some(t), None) => {
                        self.problems.add(t.place, format!("`token` of {what} should be a text, found {t}"));
                        None
                    }
                    _ => {
                        let text = format!("the source of {what} needs a `token` or a `token_id`");
                        self.problems.add(found.place, text);
                        None
                    }
                }
            }
            _ => {
                let text = format!("`kind` of {what} should be zero or model_token, found {kind}");
                self.problems.add(kind.place, text);
                None
            }
        }
    }

    /// Whether the models and parameters are what the method needs.
    fn fits(&mut self, config: &MergeConfig) {
        let method = config.method;
        let name = method.name();
        if method.needs_base() && config.base_model.is_none() {
            let given = |s: &Slice| s.base_model.is_some();
            if !config.modules.iter().all(|m| m.slices.iter().all(given)) {
                self.problems.add(config.place, format!("{name} needs `base_model`"));
            }
        }
        for module in &config.modules {
            for slice in &module.slices {
                let base = config.base_of(slice).filter(|_| knows_a_base(method));
                let is_base = |s: &SliceSource| base == Some(&s.model);
                if let Some(base) = base.filter(|_| !slice.sources.iter().any(is_base)) {
                    let text = format!("the base `{base}` is no source of this slice, as {name} needs it");
                    self.problems.add(slice.place, text);
                }
                let others = slice.sources.iter().filter(|s| !is_base(s)).count();
                let count = if method == MergeMethod::Nuslerp { others } else { slice.sources.len() };
                let (fewest, most) = method.models();
                if count < fewest || count > most {
                    let needs = match (fewest, most) {
                        (a, b) if a == b => format!("{a}"),
                        (a, usize::MAX) => format!("{a} or more"),
                        (a, b) => format!("{a} to {b}"),
                    };
                    let text = format!("{name} merges {needs} models, there are {count}");
                    self.problems.add(slice.place, text);
                }
                let above = [&slice.parameters, &module.parameters, &config.parameters];
                for p in method.parameters().iter().filter(|p| p.default.is_none()) {
                    if above.iter().any(|a| a.get(p.name).is_some()) {
                        continue;
                    }
                    if !p.per_model {
                        self.problems.add(config.place, format!("{name} needs the parameter `{}`", p.name));
                        continue;
                    }
                    let without = |s: &&SliceSource| !is_base(s) && s.parameters.get(p.name).is_none();
                    for source in slice.sources.iter().filter(without) {
                        let text = format!("model `{}` has no `{}`", source.model, p.name);
                        self.problems.add(source.place, text);
                    }
                }
            }
        }
    }
}

/// Whether `method` sets the base apart; for others it is one of the models, and needs parameters like them.
pub(crate) fn knows_a_base(method: MergeMethod) -> bool {
    !matches!(method, MergeMethod::Linear | MergeMethod::Passthrough | MergeMethod::Karcher)
}

/// What the values of a parameter should be, where some are not; what is not finite has been reported.
fn out_of_range(name: &str, values: &[f64]) -> Option<String> {
    let all = |fits: &dyn Fn(f64) -> bool| values.iter().filter(|v| v.is_finite()).all(|v| fits(*v));
    let (fit, range) = match name {
        "density" | "gamma" | "epsilon" | "select_topk" => {
            (all(&|v| (0.0..=1.0).contains(&v)), "lie between 0 and 1".to_owned())
        }
        "normalize" | "rescale" | "nuslerp_flatten" | "nuslerp_row_wise" | "filter_wise"
        | "normalize_weights" | INT8_MASK => (all(&|v| v == 0.0 || v == 1.0), "be true or false".to_owned()),
        "max_iter" => (
            all(&|v| v.fract() == 0.0 && (0.0..=MOST_STEPS).contains(&v)),
            format!("be a whole number from 0 to {MOST_STEPS}"),
        ),
        "eps" => (all(&|v| v > 0.0 && v <= LARGEST), format!("lie above 0 and not above {LARGEST:e}")),
        "tol" | "alpha" => (all(&|v| (0.0..=LARGEST).contains(&v)), format!("lie between 0 and {LARGEST:e}")),
        _ => (all(&|v| v.abs() <= LARGEST), format!("lie between -{LARGEST:e} and {LARGEST:e}")),
    };
    (!fit).then_some(range)
}

/// What is wrong with a parameter of this name in this place.
fn misplaced(method: MergeMethod, name: &str, level: Level, what: &str) -> Option<String> {
    if name == INT8_MASK {
        return None;
    }
    let Some(known) = method.parameters().iter().find(|p| p.name == name) else {
        let others: Vec<&str> = MergeMethod::all()
            .filter(|m| m.parameters().iter().any(|p| p.name == name))
            .map(MergeMethod::name)
            .collect();
        let hint = match others.is_empty() {
            true => suggestion(name, method.parameters().iter().map(|p| p.name)),
            false => format!("it is one of {}", others.join(", ")),
        };
        return Some(format!("{} has no parameter `{name}` ({what}); {hint}", method.name()));
    };
    (level == Level::Source && !known.per_model).then(|| {
        format!("`{name}` holds for all models at once and has no effect beside one of them ({what})")
    })
}
