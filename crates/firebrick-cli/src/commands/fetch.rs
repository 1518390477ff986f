//! `firebrick fetch`.

use anyhow::Result;
use clap::Args;
use firebrick_models::hub::HubModel;
use serde_json::json;

use crate::args::Usage;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Fetch {
    /// Model: org/name, org/name@revision, or org/name/file.gguf.
    #[arg(value_name = "MODEL")]
    model: HubModel,
    /// Only say where it lies in the cache, as with HF_HUB_OFFLINE=1.
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    offline: bool,
}

impl Fetch {
    pub fn run(&self, terminal: &Terminal) -> Result<()> {
        let cache = models::hub_cache()?;
        let path = match self.model.cached(&cache) {
            Some(path) => path,
            None if self.offline => {
                let what = format!("{} is not in {}", self.model, cache.display());
                return Err(Usage(what).into());
            }
            None => fetch(&self.model, &cache, terminal)?,
        };
        terminal.result(&json!({"path": path}), || path.display().to_string())
    }
}

#[cfg(feature = "hub")]
fn fetch(model: &HubModel, cache: &std::path::Path, terminal: &Terminal) -> Result<std::path::PathBuf> {
    #[allow(clippy::disallowed_methods, reason = "mirrors are named in the environment, for every client")]
    let endpoint = std::env::var("HF_ENDPOINT").ok();
    Ok(model.fetch(cache, endpoint.as_deref(), terminal)?)
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &HubModel, _: &std::path::Path, _: &Terminal) -> Result<std::path::PathBuf> {
    let what = "this build can't fetch; build with `--features hub`, or use";
    Err(Usage(format!("{what} `hf download {}`", model.repo)).into())
}
