//! `firebrick merge`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Merge {
    /// mergekit YAML.
    #[arg(value_name = "CONFIG.yml")]
    config: PathBuf,
    /// Folder to write.
    #[arg(value_name = "OUT")]
    output: PathBuf,
}

impl Merge {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let merge = firebrick_merge::Merge::open(&self.config)?;
        let target = merge.target(&self.output)?;
        let executor = models::executor(global, terminal);
        if global.dry_run {
            let plan = executor.plan(&merge, &target)?;
            return terminal.result(&plan, || plan.to_string());
        }
        let report = executor.run(&merge, &target)?;
        models::written(&report, terminal)
    }
}
