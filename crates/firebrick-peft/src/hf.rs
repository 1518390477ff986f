//! Hugging Face PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, both ways.
//!
//! Format as peft 0.21 writes and reads it. What a configuration says beyond the fields here is in [`AdapterConfig::extra`] after
//! [`load`]. A bank holds factors, ranks, alphas and dropout only: [`save`] writes these and a new configuration around them, so
//! other keys of a loaded one (task type, revision, initialization) do not reach the file.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{MAX_SETTINGS, Part, Site, SiteKind, SiteTable, bounded_regex, read_text, write_atomic};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::PeftError;
use crate::lora::{LoraBank, LoraSettings};

/// Name of the configuration file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensor file in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// Hugging Face's name of the head in every family; of one that is tied to the embedding, too.
pub const TIED_HEAD: &str = "lm_head.weight";

/// The fields of `adapter_config.json` that LoRA needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Kind of adapter; only `LORA` can be used.
    pub peft_type: String,
    /// Kind of task, such as `CAUSAL_LM`.
    #[serde(default)]
    pub task_type: Option<String>,
    /// Name or path of the base model, for people and for transformers.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Rank where [`AdapterConfig::rank_pattern`] is silent.
    #[serde(default = "eight")]
    pub r: usize,
    /// Alpha where [`AdapterConfig::alpha_pattern`] is silent.
    #[serde(default = "eight_f")]
    pub lora_alpha: f64,
    /// Dropout on the adapters' input.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Whether the scale is `alpha / sqrt(r)`.
    #[serde(default)]
    pub use_rslora: bool,
    /// Ranks by module path (a regular expression on its end); the first that matches holds, in the order of the file.
    #[serde(default)]
    pub rank_pattern: Map<String, Value>,
    /// Alphas by module path (a regular expression on its end); the first that matches holds, in the order of the file.
    #[serde(default)]
    pub alpha_pattern: Map<String, Value>,
    /// Every other key.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

fn eight() -> usize {
    8
}

fn eight_f() -> f64 {
    8.0
}

/// Writes `bank` as a PEFT adapter folder that `PeftModel.from_pretrained` loads.
///
/// `base` is the name of the base model as transformers should find it. The folder is created; files in it are replaced atomically.
/// Where only some sites have rank-stabilized scales, alphas of the plain rule that scale alike are written for those. The commonest
/// rank and alpha are the file's default, the others are patterns.
///
/// # Errors
/// [`PeftError::NotLinear`] for a site that `sites` has no tensor for, and files that cannot be written.
pub fn save(bank: &LoraBank, sites: &SiteTable, base: &str, dir: &Path) -> Result<(), PeftError> {
    let parts = firebrick_core::Brick::sites(bank).iter().map(|site| {
        let (settings, factors) = bank.get(site).expect("a bank has factors at its own sites");
        let [a, b] = [&factors.a, &factors.b].map(|factor| {
            let data = factor.val().without_autodiff().transpose().into_data();
            data.try_into_vec_as::<f32>().expect("converted to f32")
        });
        SiteFactors { site, settings, a, b }
    });
    let factors: Vec<SiteFactors> = parts.collect();
    // One flag holds for the whole file.
    let rslora = factors.iter().all(|f| f.settings.rslora);
    let mut counts = BTreeMap::<(usize, u64), usize>::new();
    for f in &factors {
        *counts.entry((f.settings.rank, alpha_of(&f.settings, rslora).to_bits())).or_default() += 1;
    }
    let ((rank, alpha), _) = counts.into_iter().max_by_key(|(_, n)| *n).expect("a bank is not empty");
    let default = LoraSettings { rank, alpha: f64::from_bits(alpha), rslora };
    write_files(&factors, &[], default, bank.dropout(), sites, base, dir)
}

/// Writes factors, and weights that stand in place of the base's, as a PEFT adapter folder.
///
/// As [`save`], but the largest rank, with its alpha, is the file's default. The factors of an embedding are written as PEFT's
/// `lora_embedding_A` and `lora_embedding_B`; the modules of `whole` are its `modules_to_save`.
///
/// # Errors
/// [`PeftError::Nothing`] without factors, else as [`save`].
pub fn write(
    factors: &[SiteFactors],
    whole: &[WholeWeight<'_>],
    sites: &SiteTable,
    base: &str,
    dir: &Path,
) -> Result<(), PeftError> {
    let rslora = factors.iter().all(|f| f.settings.rslora);
    let largest =
        factors.iter().map(|f| f.settings).rev().max_by_key(|s| s.rank).ok_or(PeftError::Nothing)?;
    let default = LoraSettings { alpha: alpha_of(&largest, rslora), rslora, ..largest };
    write_files(factors, whole, default, 0.0, sites, base, dir)
}

fn write_files(
    factors: &[SiteFactors],
    whole: &[WholeWeight<'_>],
    default: LoraSettings,
    dropout: f64,
    sites: &SiteTable,
    base: &str,
    dir: &Path,
) -> Result<(), PeftError> {
    std::fs::create_dir_all(dir).map_err(|source| PeftError::Io { path: dir.into(), source })?;
    let mut tensors: Vec<(TensorSpec, Cow<'_, [u8]>)> = Vec::new();
    let mut settings = Vec::new();
    for f in factors {
        let (rank, module) = (f.settings.rank, module_path(sites, f.site)?);
        let (a, b) = ([rank, f.a.len() / rank], [f.b.len() / rank, rank]);
        let files = match is_embedding(sites, f.site) {
            // PEFT's update is the transpose of `B A`.
            true => [
                ("lora_embedding_A", [rank, b[0]], transposed(&f.b, b)),
                ("lora_embedding_B", [a[1], rank], transposed(&f.a, a)),
            ],
            false => [("lora_A.weight", a, f.a.clone()), ("lora_B.weight", b, f.b.clone())],
        };
        for (letter, shape, values) in files {
            let spec = TensorSpec::new(format!("{PREFIX}{module}.{letter}"), DType::F32, shape);
            tensors.push((spec, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()));
        }
        settings.push((f.site, module, f.settings));
    }
    for w in whole {
        let spec = TensorSpec::new(format!("{PREFIX}{}", w.tensor), w.dtype, w.shape.clone());
        tensors.push((spec, Cow::Borrowed(&w.bytes)));
    }
    tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let config = config_of(default, dropout, sites, base, &settings, whole);
    let mut text = serde_json::to_string_pretty(&sorted(&config)).expect("a map of plain values");
    text.push('\n');
    write_safetensors(dir.join(WEIGHTS_FILE), &Metadata::default(), &tensors)?;
    write_text(&dir.join(CONFIG_FILE), &text)?;
    write_text(&dir.join("README.md"), &card(base, &settings, whole))
}

/// `[columns, rows]` of values of this shape, row by row.
fn transposed(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns).flat_map(|j| (0..rows).map(move |i| values[i * columns + j])).collect()
}

fn is_embedding(sites: &SiteTable, site: Site) -> bool {
    matches!(sites.get(site).map(|e| e.kind), Some(SiteKind::Embedding { .. }))
}

/// The alpha of a site in a file whose `use_rslora` is this.
fn alpha_of(s: &LoraSettings, rslora: bool) -> f64 {
    if s.rslora == rslora { s.alpha } else { s.scale() * s.rank as f64 }
}

fn write_text(path: &Path, text: &str) -> Result<(), PeftError> {
    write_atomic(path, text.as_bytes()).map_err(|source| PeftError::Io { path: path.into(), source })
}

/// The module path of `site`, such as `model.layers.3.self_attn.q_proj`.
fn module_path(sites: &SiteTable, site: Site) -> Result<String, PeftError> {
    let tensor = sites.get(site).and_then(|e| e.tensor.as_deref());
    Ok(tensor.and_then(|t| t.strip_suffix(".weight")).ok_or(PeftError::NotLinear { site })?.to_string())
}

fn config_of(
    default: LoraSettings,
    dropout: f64,
    sites: &SiteTable,
    base: &str,
    settings: &[(Site, String, LoraSettings)],
    whole: &[WholeWeight<'_>],
) -> Value {
    let LoraSettings { rank, alpha, rslora } = default;
    let alpha_of = |s: &LoraSettings| alpha_of(s, rslora);
    let modules: BTreeSet<&str> = whole.iter().map(WholeWeight::module).collect();
    let odd = |differs: &dyn Fn(&LoraSettings) -> bool, value: &dyn Fn(&LoraSettings) -> Value| {
        let rows = settings.iter().filter(|(_, _, s)| differs(s));
        rows.map(|(_, module, s)| (module.clone(), value(s))).collect::<Map<_, _>>()
    };
    // An encoder has no head, and PEFT wants to know.
    let head = sites.get(Site::global(Part::Head)).is_some();
    json!({
        "peft_type": "LORA",
        "task_type": if head { "CAUSAL_LM" } else { "FEATURE_EXTRACTION" },
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "target_modules": target_modules(sites, settings),
        "rank_pattern": odd(&|s| s.rank != rank, &|s| json!(s.rank)),
        "alpha_pattern": odd(&|s| alpha_of(s) != alpha, &|s| number(alpha_of(s))),
        "modules_to_save": if modules.is_empty() { Value::Null } else { json!(modules) },
        "layers_to_transform": null,
        "layers_pattern": null,
        "revision": null,
    })
}

/// A whole number as one, so that Python reads an int where it wrote one.
fn number(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 1e15 { json!(v as i64) } else { json!(v) }
}

/// Last names (`q_proj`) where every layer's module of that name is adapted, full paths otherwise.
fn target_modules(sites: &SiteTable, settings: &[(Site, String, LoraSettings)]) -> Vec<String> {
    let mut names = BTreeSet::new();
    for (site, module, _) in settings {
        let all = sites.block_linears().of_part(site.part).len();
        let ours = settings.iter().filter(|(s, _, _)| s.part == site.part).count();
        let leaf = module.rsplit('.').next().unwrap_or(module);
        // Some families call several parts by one name.
        let shared = sites.entries().iter().filter(|e| e.site.part != site.part).any(|e| {
            let module = e.tensor.as_deref().and_then(|t| t.strip_suffix(".weight"));
            module.is_some_and(|m| m.rsplit('.').next() == Some(leaf))
        });
        names.insert(if ours == all && !shared { leaf.to_string() } else { module.clone() });
    }
    names.into_iter().collect()
}

fn sorted(value: &Value) -> BTreeMap<String, Value> {
    value.as_object().expect("an object").iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn card(base: &str, settings: &[(Site, String, LoraSettings)], whole: &[WholeWeight<'_>]) -> String {
    let mut text = format!(
        "---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- lora\n- firebrick\n---\n\n# LoRA adapter\n\n\
         Made with firebrick for `{base}`.\n\n| site | rank | alpha |\n|---|---|---|\n"
    );
    for (site, _, s) in settings {
        text.push_str(&format!("| `{site}` | {} | {} |\n", s.rank, s.alpha));
    }
    if !whole.is_empty() {
        text.push_str("\nSaved whole:\n\n");
        whole.iter().for_each(|w| text.push_str(&format!("- `{}`\n", w.tensor)));
    }
    text
}

/// The update of one linear layer, or of an embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteFactors {
    /// The layer.
    pub site: Site,
    /// Rank and strength.
    pub settings: LoraSettings,
    /// `A: [rank, d_in]`; `[rank, d_model]` for an embedding.
    pub a: Vec<f32>,
    /// `B: [d_out, rank]`; the update of a weight `[d_out, d_in]` is `settings.scale() * B A`. `[vocab, rank]` for an embedding,
    /// whose weight is `[vocab, d_model]`.
    pub b: Vec<f32>,
}

/// A weight that stands in place of the base's: one of the tensors of PEFT's `modules_to_save`.
#[derive(Clone, Debug, PartialEq)]
pub struct WholeWeight<'a> {
    /// Hugging Face's name, such as `model.norm.weight`.
    pub tensor: String,
    /// Storage type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The values as `dtype` stores them.
    pub bytes: Cow<'a, [u8]>,
}

impl WholeWeight<'_> {
    /// The module that holds it.
    fn module(&self) -> &str {
        self.tensor.rsplit_once('.').map_or(&self.tensor, |(module, _)| module)
    }
}

/// What an adapter folder holds.
#[derive(Clone, Debug)]
pub struct AdapterFiles {
    /// The configuration.
    pub config: AdapterConfig,
    /// Updates, in the order of their sites.
    pub factors: Vec<SiteFactors>,
    /// Weights in place of the base's.
    pub whole: Vec<WholeWeight<'static>>,
}

/// Loads a PEFT LoRA folder as a bank over a model with these sites.
///
/// # Errors
/// As [`read`].
pub fn load(dir: &Path, sites: &SiteTable, device: &Device) -> Result<(LoraBank, AdapterConfig), PeftError> {
    let (factors, config) = read(dir, sites)?;
    let parts = factors.into_iter().map(|f| {
        let (rank, d_in, d_out) = (f.settings.rank, f.a.len() / f.settings.rank, f.b.len() / f.settings.rank);
        let matrix =
            |v: Vec<f32>, shape| Tensor::<2>::from_data(TensorData::new(v, shape), device).transpose();
        (f.site, f.settings, matrix(f.a, [rank, d_in]), matrix(f.b, [d_out, rank]))
    });
    match LoraBank::from_parts(parts.collect(), config.lora_dropout) {
        Ok(bank) => Ok((bank, config)),
        Err(PeftError::Parts { problems }) => {
            Err(PeftError::Invalid { path: dir.join(CONFIG_FILE), problems })
        }
        Err(e) => Err(e),
    }
}

/// Reads a PEFT LoRA folder for a model with these sites, as far as a brick can use it: updates of linear layers alone.
///
/// # Errors
/// As [`read_all`]; embeddings with an update and modules saved whole are refused, too.
pub fn read(dir: &Path, sites: &SiteTable) -> Result<(Vec<SiteFactors>, AdapterConfig), PeftError> {
    let AdapterFiles { config, factors, whole } = read_all(dir, sites)?;
    let embeddings = factors.iter().filter(|f| is_embedding(sites, f.site));
    let mut problems: Vec<String> = embeddings
        .map(|f| {
            format!(
                "`{}` is an embedding; such an adapter can be merged, not used beside the weights",
                f.site
            )
        })
        .collect();
    if !whole.is_empty() {
        let names: Vec<&str> = whole.iter().map(|w| w.tensor.as_str()).collect();
        problems.push(format!(
            "`modules_to_save` ({}): such an adapter can be merged, not used beside the weights",
            names.join(", ")
        ));
    }
    match problems.is_empty() {
        true => Ok((factors, config)),
        false => Err(PeftError::Invalid { path: dir.join(CONFIG_FILE), problems }),
    }
}

/// Reads a PEFT LoRA folder for a model with these sites, with updates of the embedding and modules that are saved whole.
///
/// # Errors
/// Lists everything that does not fit: tensors without a site, factors and weights whose shapes disagree with the model or with
/// the ranks in the configuration, kinds of adapter that are not plain LoRA.
pub fn read_all(dir: &Path, sites: &SiteTable) -> Result<AdapterFiles, PeftError> {
    let path = dir.join(CONFIG_FILE);
    let invalid = |problems: Vec<String>| PeftError::Invalid { path: path.clone(), problems };
    let text =
        read_text(&path, MAX_SETTINGS).map_err(|source| PeftError::Io { path: path.clone(), source })?;
    let config: AdapterConfig = serde_json::from_str(&text).map_err(|e| invalid(vec![e.to_string()]))?;
    let problems = unsupported(&config);
    if !problems.is_empty() {
        return Err(invalid(problems));
    }
    let checkpoint = Checkpoint::open(dir.join(WEIGHTS_FILE))?;
    let mut pairs = BTreeMap::<Site, [Option<(Vec<f32>, [usize; 2])>; 2]>::new();
    let mut problems = Vec::new();
    let saved = saved_modules(&config);
    let mut whole: Vec<WholeWeight<'static>> = Vec::new();
    for info in checkpoint.tensors() {
        match (parse_name(&info.name, sites), saved_tensor(&info.name, &saved, sites)) {
            (Some((site, which)), _) if info.shape.len() == 2 => {
                let (values, shape) = (checkpoint.read_f32(&info.name)?, [info.shape[0], info.shape[1]]);
                // An embedding's factors are stored transposed, and the other way round.
                let factor = match is_embedding(sites, site) {
                    true => (1 - which, (transposed(&values, shape), [shape[1], shape[0]])),
                    false => (which, (values, shape)),
                };
                pairs.entry(site).or_default()[factor.0] = Some(factor.1);
            }
            (None, Some(tensor)) => {
                let expected = saved_shape(tensor, sites).unwrap_or_default();
                if !info.dtype.is_real() {
                    problems.push(format!("`{tensor}` holds {}, which are no weights", info.dtype));
                } else if expected != info.shape {
                    problems.push(format!("`{tensor}` is {:?}, the model has {expected:?}", info.shape));
                } else {
                    let (dtype, shape) = (info.dtype, info.shape.clone());
                    let bytes = Cow::Owned(checkpoint.bytes(&info.name)?.to_vec());
                    whole.push(WholeWeight { tensor: tensor.into(), dtype, shape, bytes });
                }
            }
            _ => problems.push(format!(
                "tensor `{}` {:?} is not a LoRA factor of a linear layer of this model",
                info.name, info.shape
            )),
        }
    }
    let is_there = |name: &String| whole.iter().any(|w| w.module().ends_with(name.as_str()));
    problems.extend(saved.iter().filter(|name| !is_there(name)).map(|name| {
        format!("`modules_to_save` names `{name}`, of which {WEIGHTS_FILE} beside it has no weight")
    }));
    if checkpoint.tensors().is_empty() {
        problems.push(format!("{WEIGHTS_FILE} beside it has no tensors"));
    }
    let count = |v: &Value| v.as_u64().and_then(|r| usize::try_from(r).ok());
    let modules = pairs.keys().map(|site| module_path(sites, *site)).collect::<Result<Vec<_>, _>>()?;
    let rank_pattern = patterns(&config.rank_pattern, &modules, count, &mut problems);
    let alpha_pattern = patterns(&config.alpha_pattern, &modules, Value::as_f64, &mut problems);
    let mut parts = Vec::new();
    for ((site, pair), module) in pairs.into_iter().zip(&modules) {
        let [Some((a, [r, a_in])), Some((b, [b_out, b_r]))] = pair else {
            problems.push(format!("`{site}` has only one of lora_A and lora_B"));
            continue;
        };
        let (d_in, d_out) = widths(sites, site).expect("parse_name gives sites with widths");
        if (a_in, b_out, b_r) != (d_in, d_out, r) {
            problems.push(format!(
                "`{site}`: lora_A {:?} and lora_B {:?} do not fit a layer of [{d_out}, {d_in}]",
                [r, a_in],
                [b_out, b_r]
            ));
            continue;
        }
        let rank = rank_pattern.get(module.as_str()).copied().unwrap_or(config.r);
        if rank != r {
            problems.push(format!("`{site}`: the configuration says rank {rank}, the tensors have {r}"));
        }
        let alpha = alpha_pattern.get(module.as_str()).copied().unwrap_or(config.lora_alpha);
        let settings = LoraSettings { rank: r, alpha, rslora: config.use_rslora };
        if r == 0 {
            problems.push(format!("`{site}` has rank 0"));
        }
        parts.push(SiteFactors { site, settings, a, b });
    }
    match problems.is_empty() {
        true => Ok(AdapterFiles { config, factors: parts, whole }),
        false => Err(invalid(problems)),
    }
}

/// Names in the configuration's `modules_to_save`.
fn saved_modules(config: &AdapterConfig) -> Vec<String> {
    let list = config.extra.get("modules_to_save").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|v| v.as_str().map(String::from)).collect()
}

/// The model's name of a tensor of a module that is saved whole. PEFT's rule: a name holds for every path that ends in it.
fn saved_tensor<'n>(name: &'n str, saved: &[String], sites: &SiteTable) -> Option<&'n str> {
    let tensor = name.strip_prefix(PREFIX)?;
    let (module, _) = tensor.rsplit_once('.')?;
    saved_shape(tensor, sites)?;
    saved.iter().any(|s| module.ends_with(s.as_str())).then_some(tensor)
}

/// The shape of the weight with this Hugging Face name; the embedding's for a head that is tied to it.
fn saved_shape(tensor: &str, sites: &SiteTable) -> Option<Vec<usize>> {
    let embedding = Site::global(Part::Embed);
    let tied = tensor == TIED_HEAD && sites.get(Site::global(Part::Head)).is_some_and(|e| e.tensor.is_none());
    let site = if tied { embedding } else { sites.by_tensor(tensor)? };
    sites.get(site)?.kind.weight_shape()
}

/// `(d_in, d_out)` of the update `[d_out, d_in]` at a site.
fn widths(sites: &SiteTable, site: Site) -> Option<(usize, usize)> {
    let [d_out, d_in] = sites.get(site)?.kind.weight_shape()?.try_into().ok()?;
    Some((d_in, d_out))
}

/// What in this configuration is beyond plain LoRA.
fn unsupported(config: &AdapterConfig) -> Vec<String> {
    let mut problems = Vec::new();
    if config.peft_type != "LORA" {
        problems.push(format!("peft_type `{}` is not supported (only `LORA`)", config.peft_type));
    }
    for key in ["use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"] {
        if config.extra.get(key) == Some(&Value::Bool(true)) {
            problems.push(format!("`{key}: true` is not supported"));
        }
    }
    if let Some(Value::String(bias)) = config.extra.get("bias").filter(|b| *b != "none") {
        problems.push(format!("`bias: {bias}` is not supported"));
    }
    // Other initializations (PiSSA, OLoRA, LoftQ, CorDA) move part of the base's weights into the adapter.
    if let Some(Value::String(name)) = config.extra.get("init_lora_weights")
        && !["gaussian", "eva", "orthogonal"].contains(&name.as_str())
    {
        problems
            .push(format!("`init_lora_weights: {name}` may change the base model, which is not supported"));
    }
    for key in
        ["layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"]
    {
        let empty = |v: &Value| {
            v.is_null() || v.as_array().is_some_and(Vec::is_empty) || v.as_object().is_some_and(Map::is_empty)
        };
        let empty = config.extra.get(key).is_none_or(empty);
        if !empty {
            problems.push(format!("`{key}` is not supported"));
        }
    }
    problems
}

/// Site, and 0 for `A` or 1 for `B`, of a tensor name.
fn parse_name(name: &str, sites: &SiteTable) -> Option<(Site, usize)> {
    let name = name.strip_prefix(PREFIX)?;
    let ends = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"];
    let (end, module) = ends.iter().enumerate().find_map(|(i, end)| Some((i, name.strip_suffix(end)?)))?;
    let site = sites.by_tensor(&format!("{module}weight"))?;
    let fits = is_embedding(sites, site) == (end > 1) && widths(sites, site).is_some();
    (fits && module.ends_with('.')).then_some((site, end % 2))
}

/// The value of each of `modules`, by PEFT's rule: a pattern holds for a module path whose end it matches, `(.*\.)?(pattern)$`; the
/// first one wins.
fn patterns<'m, T: Copy>(
    map: &Map<String, Value>,
    modules: &'m [String],
    read: impl Fn(&Value) -> Option<T>,
    problems: &mut Vec<String>,
) -> BTreeMap<&'m str, T> {
    let mut found = BTreeMap::new();
    for (key, value) in map {
        // One at a time: compiled they are far longer than in the file.
        match (bounded_regex(&format!(r"^(?:.*\.)?(?:{key})$")), read(value)) {
            (Ok(regex), Some(value)) => {
                for module in modules.iter().filter(|module| regex.is_match(module)) {
                    found.entry(module.as_str()).or_insert(value);
                }
            }
            (Err(why), _) => problems.push(format!("pattern `{key}`: not a regular expression: {why}")),
            (_, None) => problems.push(format!("pattern `{key}`: {value} is no rank or alpha")),
        }
    }
    found
}
