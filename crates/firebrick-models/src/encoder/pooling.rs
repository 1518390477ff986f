//! From one vector a token to one vector a text, as sentence-transformers does (arXiv 1908.10084).

use std::path::{Component, Path};
use std::str::FromStr;

use burn::tensor::Tensor;
use firebrick_core::{MAX_SETTINGS, read_file};
use serde_json::{Value, json};

use super::Padding;
use crate::error::ModelError;

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over the tokens.
    #[default]
    Mean,
    /// The vector of the first token.
    Cls,
    /// The largest value over the tokens, each dimension for itself.
    Max,
}

impl Pooling {
    /// Every pooling.
    pub const ALL: [Pooling; 3] = [Pooling::Mean, Pooling::Cls, Pooling::Max];

    /// The name on command lines: `mean`, `cls` or `max`.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Cls => "cls",
            Pooling::Max => "max",
        }
    }

    /// The key of sentence-transformers' `1_Pooling/config.json`.
    fn key(self) -> &'static str {
        match self {
            Pooling::Mean => "pooling_mode_mean_tokens",
            Pooling::Cls => "pooling_mode_cls_token",
            Pooling::Max => "pooling_mode_max_tokens",
        }
    }
}

impl FromStr for Pooling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Pooling::ALL.into_iter().find(|p| p.name() == text);
        found.ok_or_else(|| format!("`{text}` is not one of mean, cls, max"))
    }
}

/// One vector a text, `[batch, d_model]`, of `hidden: [batch, tokens, d_model]`; what lies behind a text does not count.
///
/// # Panics
/// If there are no tokens, or the padding is that of another batch.
pub fn pool(hidden: Tensor<3>, padding: Option<&Padding>, pooling: Pooling) -> Tensor<2> {
    let [batch, tokens, d] = hidden.dims();
    assert!(tokens > 0, "texts without tokens");
    if let Some(padding) = padding {
        padding.check(batch, tokens);
    }
    let mask = padding.map(|p| p.mask(tokens, &hidden.device()));
    let pooled = match (pooling, mask) {
        (Pooling::Cls, _) => hidden.narrow(1, 0, 1),
        (Pooling::Mean, None) => hidden.mean_dim(1),
        (Pooling::Mean, Some(mask)) => (hidden * mask.clone()).sum_dim(1) / mask.sum_dim(1),
        (Pooling::Max, None) => hidden.max_dim(1),
        (Pooling::Max, Some(mask)) => {
            let outside = mask.lower_elem(0.5).expand([batch, tokens, d]);
            hidden.mask_fill(outside, f64::NEG_INFINITY).max_dim(1)
        }
    };
    pooled.reshape([batch, d])
}

/// The rows of `x: [rows, d]` at length 1; a row of zeros stays one.
pub fn normalize(x: Tensor<2>) -> Tensor<2> {
    // Bounded before the root, whose gradient at 0 is infinite.
    let length = x.clone().powi_scalar(2).sum_dim(1).clamp_min(1e-24).sqrt();
    x / length
}

/// What sentence-transformers keeps beside an encoder: `modules.json`, the pooling, the longest text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentenceConfig {
    /// How tokens become a text.
    pub pooling: Pooling,
    /// Whether vectors are brought to length 1.
    pub normalize: bool,
    /// Tokens of a text beyond which it is cut off, special tokens included; none if only the positions limit it.
    pub max_tokens: Option<usize>,
}

const MODULES: &str = "modules.json";
const LIMIT: &str = "sentence_bert_config.json";
const POOLING: &str = "1_Pooling";
const NORMALIZE: &str = "2_Normalize";

impl Default for SentenceConfig {
    /// What sentence-transformers makes of a plain encoder: the mean, not normalized.
    fn default() -> Self {
        SentenceConfig { pooling: Pooling::Mean, normalize: false, max_tokens: None }
    }
}

impl SentenceConfig {
    /// Reads `modules.json`, the pooling it names and `sentence_bert_config.json` in a model's folder; the default where
    /// they are not.
    ///
    /// # Errors
    /// If a file cannot be read or says something that is not supported; every problem of a file is listed.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let mut config = SentenceConfig::default();
        if let Some(limits) = read(&folder.join(LIMIT))? {
            let limit = limits.get("max_seq_length").filter(|v| !v.is_null());
            let tokens = limit.map(|v| v.as_u64().filter(|n| *n > 0).ok_or(v)).transpose();
            let tokens = tokens.map_err(|v| {
                let problem = format!("`max_seq_length` should be a positive whole number, found {v}");
                ModelError::Invalid { path: folder.join(LIMIT), problems: vec![problem] }
            })?;
            config.max_tokens = tokens.map(|n| n as usize);
        }
        let path = folder.join(MODULES);
        let pooling = match read(&path)? {
            None => POOLING.to_string(),
            Some(modules) => {
                let fail = |problems| ModelError::Invalid { path: path.clone(), problems };
                let (pooling, normalize) = of_modules(&modules).map_err(fail)?;
                config.normalize = normalize;
                match pooling {
                    Some(pooling) => pooling,
                    None => return Ok(config),
                }
            }
        };
        let path = folder.join(pooling).join("config.json");
        if let Some(value) = read(&path)? {
            let fail = |problems| ModelError::Invalid { path: path.clone(), problems };
            config.pooling = of_pooling(&value).map_err(fail)?;
        }
        Ok(config)
    }

    /// Names and contents of the files that say this to sentence-transformers; `d_model` is the width of the vectors.
    pub fn files(&self, d_model: usize) -> Vec<(String, Vec<u8>)> {
        let module = |(i, (path, kind)): (usize, (&str, &str))| json!({"idx": i, "name": i.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
        let mut modules = vec![("", "Transformer"), (POOLING, "Pooling")];
        if self.normalize {
            modules.push((NORMALIZE, "Normalize"));
        }
        let modules: Vec<Value> = modules.into_iter().enumerate().map(module).collect();
        let mut pooling = json!({"word_embedding_dimension": d_model});
        for mode in Pooling::ALL {
            pooling[mode.key()] = (mode == self.pooling).into();
        }
        let pretty = |value: &Value| {
            let text = serde_json::to_string_pretty(value).expect("plain values");
            (text + "\n").into_bytes()
        };
        let mut files = vec![
            (MODULES.to_string(), pretty(&modules.into())),
            (format!("{POOLING}/config.json"), pretty(&pooling)),
        ];
        if let Some(tokens) = self.max_tokens {
            files.push((LIMIT.into(), pretty(&json!({"max_seq_length": tokens, "do_lower_case": false}))));
        }
        files
    }
}

/// The folder of the pooling, if there is one, and whether vectors are normalized.
fn of_modules(modules: &Value) -> Result<(Option<String>, bool), Vec<String>> {
    let Some(list) = modules.as_array() else { return Err(vec!["not a JSON array".into()]) };
    let (mut pooling, mut normalize, mut problems) = (None, false, Vec::new());
    for module in list {
        let kind = module["type"].as_str().unwrap_or("nothing");
        match kind.rsplit('.').next().unwrap_or(kind) {
            "Transformer" if module["path"].as_str().is_none_or(str::is_empty) => {}
            "Pooling" => match module["path"].as_str() {
                Some(path) if is_folder_name(path) => pooling = Some(path.to_string()),
                _ => problems.push(format!("pooling in {}, which is not a folder's name", module["path"])),
            },
            "Normalize" => normalize = true,
            _ => problems.push(format!("module `{kind}` in {} is not supported", module["path"])),
        }
    }
    if problems.is_empty() { Ok((pooling, normalize)) } else { Err(problems) }
}

/// Whether this names a folder beside the file, not one elsewhere.
fn is_folder_name(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn of_pooling(value: &Value) -> Result<Pooling, Vec<String>> {
    let Some(map) = value.as_object() else { return Err(vec!["not a JSON object".into()]) };
    // Newer files name the mode, older ones have a flag for each.
    if let Some(mode) = map.get("pooling_mode").filter(|v| !v.is_null()) {
        let mode = mode.as_str().unwrap_or("something else");
        return mode.parse().map_err(|e: String| vec![format!("`pooling_mode`: {e}")]);
    }
    let on = map.iter().filter(|(k, v)| k.starts_with("pooling_mode_") && v.as_bool() == Some(true));
    let on: Vec<&str> = on.map(|(k, _)| k.as_str()).collect();
    let found = |key: &str| Pooling::ALL.into_iter().find(|p| p.key() == key);
    match on[..] {
        [] => Ok(Pooling::default()),
        [key] => found(key).ok_or_else(|| vec![format!("`{key}` is not supported")]),
        _ => Err(vec![format!("several poolings at once are not supported: {}", on.join(", "))]),
    }
}

fn read(path: &Path) -> Result<Option<Value>, ModelError> {
    let bytes = match read_file(path, MAX_SETTINGS) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ModelError::io(path, e)),
    };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| ModelError::Invalid { path: path.into(), problems: vec![e.to_string()] })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn poolings_by_hand() {
        let values = vec![1.0, -4.0, 3.0, -2.0, 100.0, 100.0, 5.0, -6.0, 7.0, 8.0, -9.0, -1.0f32];
        let hidden = Tensor::<3>::from_data(TensorData::new(values, [2, 3, 2]), &Device::flex());
        let padding = Padding::new(vec![2, 3]);
        let host = |t: Tensor<2>| t.into_data().try_into_vec_as::<f32>().unwrap();
        let of = |padding, pooling| host(pool(hidden.clone(), padding, pooling));
        assert_eq!(of(Some(&padding), Pooling::Mean), [2.0, -3.0, 1.0, 1.0 / 3.0]);
        assert_eq!(of(Some(&padding), Pooling::Max), [3.0, -2.0, 7.0, 8.0]);
        assert_eq!(of(Some(&padding), Pooling::Cls), [1.0, -4.0, 5.0, -6.0]);
        assert_eq!(of(None, Pooling::Max)[..2], [100.0, 100.0], "control: the padding matters");
        let rows = Tensor::<2>::from_floats([[3.0, 4.0], [0.0, 0.0]], &Device::flex());
        assert_eq!(host(normalize(rows)), [0.6, 0.8, 0.0, 0.0]);
    }

    fn folder(files: &[(&str, Value)]) -> Result<SentenceConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value.to_string()).unwrap();
        }
        SentenceConfig::from_folder(dir.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn files_give_the_settings_back() {
        for (pooling, normalize, max_tokens) in
            [(Pooling::Mean, true, Some(256)), (Pooling::Cls, false, None), (Pooling::Max, true, Some(1))]
        {
            let config = SentenceConfig { pooling, normalize, max_tokens };
            let files = config.files(16);
            let files: Vec<(&str, Value)> =
                files.iter().map(|(n, b)| (n.as_str(), serde_json::from_slice(b).unwrap())).collect();
            assert_eq!(folder(&files).unwrap(), config);
        }
        assert_eq!(folder(&[]).unwrap(), SentenceConfig::default());
        let newer = folder(&[("1_Pooling/config.json", json!({"pooling_mode": "cls"}))]).unwrap();
        assert_eq!(newer.pooling, Pooling::Cls);
    }

    #[test]
    fn what_is_not_supported_is_said() {
        let module = |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
        let dense =
            json!([module("Transformer", ""), module("Dense", "3_Dense"), module("Pooling", "../up")]);
        let error = folder(&[("modules.json", dense)]).unwrap_err();
        assert!(error.contains("Dense") && error.contains("../up"), "{error}");
        for mode in [
            json!({"pooling_mode_lasttoken": true}),
            json!({"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}),
            json!({"pooling_mode": "lasttoken"}),
            json!([]),
        ] {
            assert!(folder(&[("1_Pooling/config.json", mode.clone())]).is_err(), "{mode}");
        }
        for limit in [json!("many"), json!(0), json!(-1)] {
            let error = folder(&[("sentence_bert_config.json", json!({"max_seq_length": limit}))]);
            assert!(error.unwrap_err().contains("max_seq_length"));
        }
        assert!(folder(&[("modules.json", json!({}))]).is_err());
    }
}
