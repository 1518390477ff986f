//! Hugging Face PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, both ways.
//!
//! Format as peft 0.21 writes and reads it. What a configuration says beyond the fields here is in [`AdapterConfig::extra`] after
//! [`load`]. A bank holds factors, ranks, alphas and dropout only: [`save`] writes these and a new configuration around them, so
//! other keys of a loaded one (task type, revision, initialization) do not reach the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{MAX_SETTINGS, Part, Site, SiteTable, read_text, write_atomic};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::PeftError;
use crate::lora::{LoraBank, LoraSettings};

/// Name of the configuration file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensor file in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

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
/// Where only some sites have rank-stabilized scales, alphas of the plain rule that scale alike are written for those.
///
/// # Errors
/// [`PeftError::NotLinear`] for a site that `sites` has no tensor for, and files that cannot be written.
pub fn save(bank: &LoraBank, sites: &SiteTable, base: &str, dir: &Path) -> Result<(), PeftError> {
    std::fs::create_dir_all(dir).map_err(|source| PeftError::Io { path: dir.into(), source })?;
    let mut tensors = Vec::new();
    let mut settings = Vec::new();
    for site in firebrick_core::Brick::sites(bank).iter() {
        let (setting, factors) = bank.get(site).expect("a bank has factors at its own sites");
        let module = module_path(sites, site)?;
        for (letter, factor) in [("A", &factors.a), ("B", &factors.b)] {
            let t = factor.val().without_autodiff().transpose();
            let spec =
                TensorSpec::new(format!("{PREFIX}{module}.lora_{letter}.weight"), DType::F32, t.dims());
            let values: Vec<f32> = t.into_data().try_into_vec_as::<f32>().expect("converted to f32");
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.push((spec, bytes));
        }
        settings.push((site, module, setting));
    }
    tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let config = config_of(bank, sites, base, &settings);
    let mut text = serde_json::to_string_pretty(&sorted(&config)).expect("a map of plain values");
    text.push('\n');
    write_safetensors(dir.join(WEIGHTS_FILE), &Metadata::default(), &tensors)?;
    write_text(&dir.join(CONFIG_FILE), &text)?;
    write_text(&dir.join("README.md"), &card(base, &settings))
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
    bank: &LoraBank,
    sites: &SiteTable,
    base: &str,
    settings: &[(Site, String, LoraSettings)],
) -> Value {
    // One flag holds for the whole file.
    let rslora = settings.iter().all(|(_, _, s)| s.rslora);
    let alpha_of = |s: &LoraSettings| if s.rslora == rslora { s.alpha } else { s.scale() * s.rank as f64 };
    let mut counts = BTreeMap::<(usize, u64), usize>::new();
    for (_, _, s) in settings {
        *counts.entry((s.rank, alpha_of(s).to_bits())).or_default() += 1;
    }
    // The commonest setting is the default, the others are patterns.
    let ((rank, alpha), _) = counts.into_iter().max_by_key(|(_, n)| *n).expect("a bank is not empty");
    let alpha = f64::from_bits(alpha);
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
        "lora_dropout": bank.dropout(),
        "use_rslora": rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "target_modules": target_modules(sites, settings),
        "rank_pattern": odd(&|s| s.rank != rank, &|s| json!(s.rank)),
        "alpha_pattern": odd(&|s| alpha_of(s) != alpha, &|s| number(alpha_of(s))),
        "modules_to_save": null,
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
        names.insert(if ours == all { leaf.to_string() } else { module.clone() });
    }
    names.into_iter().collect()
}

fn sorted(value: &Value) -> BTreeMap<String, Value> {
    value.as_object().expect("an object").iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn card(base: &str, settings: &[(Site, String, LoraSettings)]) -> String {
    let mut text = format!(
        "---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- lora\n- firebrick\n---\n\n# LoRA adapter\n\n\
         Made with firebrick for `{base}`.\n\n| site | rank | alpha |\n|---|---|---|\n"
    );
    for (site, _, s) in settings {
        text.push_str(&format!("| `{site}` | {} | {} |\n", s.rank, s.alpha));
    }
    text
}

/// The update of one linear layer, as an adapter's file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteFactors {
    /// The layer.
    pub site: Site,
    /// Rank and strength.
    pub settings: LoraSettings,
    /// `A: [rank, d_in]`.
    pub a: Vec<f32>,
    /// `B: [d_out, rank]`; the update of a weight `[d_out, d_in]` is `settings.scale() * B A`.
    pub b: Vec<f32>,
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

/// Reads a PEFT LoRA folder for a model with these sites.
///
/// # Errors
/// Lists everything that does not fit: tensors without a site, factors whose shapes disagree with the model or with the
/// ranks in the configuration, kinds of adapter that are not plain LoRA.
pub fn read(dir: &Path, sites: &SiteTable) -> Result<(Vec<SiteFactors>, AdapterConfig), PeftError> {
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
    for info in checkpoint.tensors() {
        match parse_name(&info.name, sites) {
            Some((site, which)) if info.shape.len() == 2 => {
                let values = checkpoint.read_f32(&info.name)?;
                pairs.entry(site).or_default()[which] = Some((values, [info.shape[0], info.shape[1]]));
            }
            _ => problems.push(format!(
                "tensor `{}` {:?} is not a LoRA factor of a linear layer of this model",
                info.name, info.shape
            )),
        }
    }
    if checkpoint.tensors().is_empty() {
        problems.push(format!("{WEIGHTS_FILE} beside it has no tensors"));
    }
    let whole = |v: &Value| v.as_u64().and_then(|r| usize::try_from(r).ok());
    let rank_pattern = patterns(&config.rank_pattern, whole, &mut problems);
    let alpha_pattern = patterns(&config.alpha_pattern, Value::as_f64, &mut problems);
    let mut parts = Vec::new();
    for (site, pair) in pairs {
        let [Some((a, [r, a_in])), Some((b, [b_out, b_r]))] = pair else {
            problems.push(format!("`{site}` has only one of lora_A and lora_B"));
            continue;
        };
        let (d_in, d_out) = sites.linear(site).expect("parse_name gives linear sites");
        if (a_in, b_out, b_r) != (d_in, d_out, r) {
            problems.push(format!(
                "`{site}`: lora_A {:?} and lora_B {:?} do not fit a layer of [{d_out}, {d_in}]",
                [r, a_in],
                [b_out, b_r]
            ));
            continue;
        }
        let module = module_path(sites, site)?;
        let rank = lookup(&rank_pattern, &module).unwrap_or(config.r);
        if rank != r {
            problems.push(format!("`{site}`: the configuration says rank {rank}, the tensors have {r}"));
        }
        let alpha = lookup(&alpha_pattern, &module).unwrap_or(config.lora_alpha);
        let settings = LoraSettings { rank: r, alpha, rslora: config.use_rslora };
        if r == 0 {
            problems.push(format!("`{site}` has rank 0"));
        }
        parts.push(SiteFactors { site, settings, a, b });
    }
    if problems.is_empty() { Ok((parts, config)) } else { Err(invalid(problems)) }
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
    for key in [
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
    ] {
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
    let module = name.strip_prefix(PREFIX)?;
    let (module, which) = match module.strip_suffix(".lora_A.weight") {
        Some(module) => (module, 0),
        None => (module.strip_suffix(".lora_B.weight")?, 1),
    };
    let site = sites.by_tensor(&format!("{module}.weight"))?;
    sites.linear(site).map(|_| (site, which))
}

/// PEFT's rule: a pattern holds for a module path whose end it matches, `(.*\.)?(pattern)$`; the first one wins.
fn patterns<T>(
    map: &Map<String, Value>,
    read: impl Fn(&Value) -> Option<T>,
    problems: &mut Vec<String>,
) -> Vec<(Regex, T)> {
    let mut out = Vec::new();
    for (key, value) in map {
        match (Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")), read(value)) {
            (Ok(regex), Some(value)) => out.push((regex, value)),
            (Err(e), _) => {
                let text = e.to_string();
                let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
                problems.push(format!("pattern `{key}`: not a regular expression: {why}"));
            }
            (_, None) => problems.push(format!("pattern `{key}`: {value} is no rank or alpha")),
        }
    }
    out
}

fn lookup<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
}
