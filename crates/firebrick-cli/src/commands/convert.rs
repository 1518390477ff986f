//! `firebrick convert`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_models::{Export, ExportType};

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Convert {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(value_name = "IN")]
    input: String,
    /// A path that ends in .gguf becomes a GGUF file, any other a Hugging Face folder.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Storage type: f32, f16, bf16, q8_0, q4_0, q4_1.
    #[arg(long = "type", default_value = "f32", value_name = "TYPE")]
    dtype: ExportType,
}

impl Convert {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        let files = models::open(&self.input)?;
        let export = Export::files(&files, self.dtype);
        let executor = models::executor(global, terminal);
        if global.dry_run {
            let plan = export.plan(&self.output, &executor)?;
            return terminal.result(&plan, || plan.to_string());
        }
        let report = export.write(&self.output, &executor)?;
        models::written(&report, terminal)
    }
}
