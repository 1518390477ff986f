//! Models of the Hugging Face Hub: from the cache that its other clients share and, with the feature `hub`, from the network.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::{Cache, Repo, RepoType};

/// A model of the Hub: `org/name`, `org/name@revision`, or one file of it, `org/name/file.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// Organization and name.
    pub repo: String,
    /// A branch, a tag or a commit; `main` if none is given.
    pub revision: String,
    /// The GGUF file that is meant, in repositories that have several.
    pub file: Option<String>,
}

impl FromStr for HubModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = name.split('/').collect();
        let plain = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(known)
        };
        let file = parts.get(2).map(|f| f.to_string());
        let fits = (2..=3).contains(&parts.len()) && parts.iter().all(|p| plain(p));
        let named = file.as_ref().is_none_or(|f| f.ends_with(".gguf"));
        if !(fits && named && revision.split('/').all(plain)) {
            return Err(format!("`{text}` is not org/name, org/name@revision or org/name/file.gguf"));
        }
        Ok(HubModel { repo: parts[..2].join("/"), revision: revision.into(), file })
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

impl HubModel {
    /// Where it lies in `cache` (`~/.cache/huggingface/hub` if nothing else is set), if it does: its folder, or the GGUF file.
    pub fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let repo = Cache::new(cache.into()).repo(self.repo());
        if let Some(file) = &self.file {
            return self.snapshot(cache, file).or_else(|| repo.get(file));
        }
        let config = self.snapshot(cache, "config.json").or_else(|| repo.get("config.json"))?;
        config.parent().map(Path::to_path_buf)
    }

    /// A commit has no branch that points to it, only its folder.
    fn snapshot(&self, cache: &Path, file: &str) -> Option<PathBuf> {
        let path = Cache::new(cache.into()).repo(self.repo()).pointer_path(&self.revision).join(file);
        path.exists().then_some(path)
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, self.revision.clone())
    }
}

#[cfg(feature = "hub")]
mod network {
    use std::path::{Path, PathBuf};

    use firebrick_core::{Progress, Task};
    use hf_hub::Cache;
    use hf_hub::api::sync::{ApiBuilder, ApiRepo};

    use super::HubModel;
    use crate::error::ModelError;

    /// What a model is read from, beside its weights.
    const SIDE_FILES: &[&str] = &[
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    ];

    impl HubModel {
        /// Fetches what is missing of it into `cache`, from the server at `endpoint` or the Hub itself; its folder, or the GGUF file.
        ///
        /// Of the weights the safetensors are taken, and PyTorch's `.bin` files where there are none.
        ///
        /// # Errors
        /// If the Hub can't be reached or has no such model, or `progress` says to stop.
        pub fn fetch(
            &self,
            cache: &Path,
            endpoint: Option<&str>,
            progress: &dyn Progress,
        ) -> Result<PathBuf, ModelError> {
            let fail = |e: hf_hub::api::sync::ApiError| ModelError::Hub(format!("{}: {e}", self.repo));
            let builder = ApiBuilder::from_cache(Cache::new(cache.into())).with_progress(false);
            let builder = match endpoint {
                Some(endpoint) => builder.with_endpoint(endpoint.into()),
                None => builder,
            };
            let api = builder.build().map_err(fail)?.repo(self.repo());
            let names = match &self.file {
                Some(file) => vec![file.clone()],
                None => wanted(&api).map_err(fail)?,
            };
            let mut task = Task::begin(progress, "fetch", Some(names.len() as u64), "files");
            for name in &names {
                api.get(name).map_err(fail)?;
                task.advance(1, name).map_err(|e| ModelError::Hub(e.to_string()))?;
            }
            let missing = || ModelError::Hub(format!("{}: no config.json", self.repo));
            self.cached(cache).ok_or_else(missing)
        }
    }

    fn wanted(api: &ApiRepo) -> Result<Vec<String>, hf_hub::api::sync::ApiError> {
        let names: Vec<String> = api.info()?.siblings.into_iter().map(|s| s.rfilename).collect();
        // What a folder is opened by: others may be a second copy of the weights, or an adapter.
        let weights = |stem: &str, ending: &str| -> Vec<String> {
            let (single, index) = (format!("{stem}{ending}"), format!("{stem}{ending}.index.json"));
            if names.contains(&single) {
                return vec![single];
            }
            let other = |n: &str| n.starts_with("consolidated") || n.starts_with("adapter_");
            let shard = |n: &&String| !n.contains('/') && n.ends_with(ending) && !other(n);
            match names.contains(&index) {
                true => names.iter().filter(shard).cloned().chain([index]).collect(),
                false => Vec::new(),
            }
        };
        let safetensors = weights("model", ".safetensors");
        let weights = if safetensors.is_empty() { weights("pytorch_model", ".bin") } else { safetensors };
        let side = names.iter().filter(|n| SIDE_FILES.contains(&n.as_str())).cloned();
        let mut all: Vec<String> = side.chain(weights).collect();
        // Last: a folder with it counts as complete.
        all.sort_by_key(|name| name == "config.json");
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_known_from_paths() {
        let model = |text: &str| text.parse::<HubModel>();
        let plain = HubModel { repo: "org/name-1.5".into(), revision: "main".into(), file: None };
        assert_eq!(model("org/name-1.5"), Ok(plain.clone()));
        assert_eq!(model("org/name-1.5@v2"), Ok(HubModel { revision: "v2".into(), ..plain.clone() }));
        assert_eq!(model("org/name-1.5/a.gguf"), Ok(HubModel { file: Some("a.gguf".into()), ..plain }));
        for path in [
            "name",
            "./org/name",
            "../name",
            "org/..",
            "/org/name",
            "a/b/c",
            "a/b/c/d.gguf",
            "a/b@../c",
            "a\\b/c",
        ] {
            assert!(model(path).is_err(), "{path}");
        }
    }

    #[test]
    fn the_cache_is_read_by_branch_and_by_commit() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("models--org--name");
        let snapshot = repo.join("snapshots/0123abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "0123abc").unwrap();
        let model: HubModel = "org/name".parse().unwrap();
        assert_eq!(model.cached(dir.path()), None, "control: a snapshot without a configuration");
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        std::fs::write(snapshot.join("m.gguf"), "").unwrap();
        assert_eq!(model.cached(dir.path()), Some(snapshot.clone()));
        let commit: HubModel = "org/name@0123abc".parse().unwrap();
        assert_eq!(commit.cached(dir.path()), Some(snapshot.clone()));
        let file: HubModel = "org/name/m.gguf".parse().unwrap();
        assert_eq!(file.cached(dir.path()), Some(snapshot.join("m.gguf")));
        for other in ["org/other", "org/name@dev", "org/name/n.gguf"] {
            assert_eq!(other.parse::<HubModel>().unwrap().cached(dir.path()), None, "{other}");
        }
    }
}
