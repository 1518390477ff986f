//! `firebrick merge`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::args::{Global, Usage};
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
    /// Say how the models' task vectors relate (sizes, cosines, sign conflicts by tensor), and write nothing.
    #[arg(long)]
    analyze: bool,
}

impl Merge {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        if self.analyze && global.dry_run {
            return Err(Usage("--dry-run: --analyze writes nothing anyway".into()).into());
        }
        if !self.analyze {
            models::check_output(&self.output, None, global)?;
        }
        let merge = firebrick_merge::Merge::open(&self.config)?;
        if self.analyze {
            let analysis = merge.analyze(terminal)?;
            return terminal.result(&analysis, || analysis.to_string());
        }
        let target = merge.target(&self.output)?;
        let executor = models::executor(global, terminal);
        if global.dry_run {
            return models::planned(&executor.plan(&merge, &target)?, terminal);
        }
        let report = executor.run(&merge, &target)?;
        models::written(&report, terminal)
    }
}
