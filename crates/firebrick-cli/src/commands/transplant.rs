//! `firebrick transplant`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use firebrick_merge::vocabulary_transplant::{TransplantMethod, TransplantSettings, VocabularyTransplant};
use firebrick_tensor::checkpoint::is_gguf_name;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Transplant {
    /// Model that gets another tokenizer: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Model whose tokenizer it gets, named in the same ways.
    #[arg(value_name = "DONOR")]
    donor: String,
    /// Hugging Face folder to write.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
    /// How the rows of tokens that MODEL has not are made: omp, common_interpolation, subword, mean or zero.
    #[arg(long, default_value = "omp", value_name = "METHOD")]
    method: TransplantMethod,
    /// Most tokens of MODEL that omp and common_interpolation combine for one of DONOR's.
    #[arg(long, default_value_t = TransplantSettings::default().k, value_name = "N")]
    k: usize,
}

impl Transplant {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_output(&self.out, None, global)?;
        if is_gguf_name(&self.out) {
            return Err(Usage(
                "--out: a folder is written; `firebrick convert` makes a GGUF file of it".into(),
            )
            .into());
        }
        if self.k == 0 {
            return Err(Usage("--k 0: a combination needs a token".into()).into());
        }
        let (model, donor) = (models::open(&self.model)?, models::open(&self.donor)?);
        let settings = TransplantSettings { method: self.method, k: self.k };
        let transplant = VocabularyTransplant::new(&model, &donor, settings)?;
        let (shared, filled, method) = (transplant.shared(), transplant.filled(), self.method.name());
        terminal.say(&format!(
            "{shared} tokens of {} are {}'s, {filled} are made ({method})",
            donor.name, model.name
        ));
        if transplant.untrained() > 0 {
            terminal.say(&format!(
                "{} of the shared tokens have rows that were never trained; no row is made of them",
                transplant.untrained()
            ));
        }
        let (width, fits) =
            (donor.config.d_model, [TransplantMethod::Omp, TransplantMethod::CommonInterpolation]);
        if filled > 0 && fits.contains(&self.method) && 8 * self.k > width {
            terminal.say(&format!(
                "--k {} is over an eighth of the donor's width {width}: where rows of {} are barely trained, combinations of so many tokens fit noise; compare with --k {}",
                self.k,
                donor.name,
                (width / 8).max(1)
            ));
        }
        let target = transplant.target(&self.out)?;
        let executor = models::executor(global, terminal);
        if global.dry_run {
            return models::planned(&executor.plan(&transplant, &target)?, terminal);
        }
        models::written(&executor.run(&transplant, &target)?, terminal)
    }
}
