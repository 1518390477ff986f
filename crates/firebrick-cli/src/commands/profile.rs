//! `firebrick profile`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::Device;
use clap::Args;
use firebrick_analysis::{
    ExpertProfile, Metric, Profile as Measured, ProfileOptions, RankBudget, Report, Section,
    SimilarityOptions, bit_front, bit_plans, cka, layer_grams, profile_with, rank_plans,
};
use firebrick_core::{Brick, Seed};
use firebrick_models::{Model, ModelFiles};
use firebrick_moe::ExpertTap;
use firebrick_quant::{GptqConfig, gptq_bit_losses};
use serde_json::json;

use crate::args::{Global, Metrics, Quantizer, Usage};
use crate::models::{self, Routed};
use crate::ui::Terminal;

#[derive(Args)]
pub struct Profile {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(long, value_name = "M")]
    model: String,
    /// PEFT adapter folder, in force while everything but fisher and hessian is measured; may be given more than once.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Folder of a router over the adapters, as `specialize` writes it: every token is weighed, and the profile says how much each layer
    /// uses each adapter. The adapters' folders have the names that it knows them by.
    #[arg(long, value_name = "DIR", requires = "adapter")]
    router: Option<PathBuf>,
    /// Calibration text.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 256, value_name = "N")]
    window: usize,
    /// At most this many windows.
    #[arg(long, default_value_t = 16, value_name = "N")]
    windows: usize,
    /// What to measure beside the residual stream, separated by commas: linear, attention, sparsity, similarity, lens (all from one
    /// pass, the default), fisher, hessian; or all, or none. Plans need linear.
    #[arg(long, value_name = "LIST")]
    metrics: Option<Metrics>,
    /// An earlier profile.json to show beside this one.
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
    /// Another model of the same vocabulary, whose layers are compared with this one's.
    #[arg(long, value_name = "M", conflicts_with = "adapter")]
    against: Option<String>,
    /// Mean bits per weight of the plan it suggests.
    #[arg(long, default_value_t = 4.0, value_name = "BITS")]
    mean_bits: f64,
    /// What the bits are planned for; GPTQ runs on every layer at every number of bits, which takes a few times as long.
    #[arg(long, value_enum, default_value = "rtn")]
    quantizer: Quantizer,
    /// Mean rank of the plan it suggests.
    #[arg(long, default_value_t = 8.0, value_name = "RANK")]
    mean_rank: f64,
    /// Folder for profile.json, bits.toml, ranks.toml, report.json and report.html.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Profile {
    pub fn run(&self, global: &Global, terminal: &Terminal) -> Result<()> {
        models::check_folder(&self.out, global)?;
        models::check_windows(self.window, self.windows)?;
        let metrics = self.metrics.as_ref().map_or_else(Metric::one_pass, |m| m.0.clone());
        let linear = metrics.contains(&Metric::Linear);
        if !linear && self.quantizer == Quantizer::Gptq {
            return Err(Usage("--quantizer gptq plans bits, which needs the metric linear".into()).into());
        }
        let plain = [Metric::Fisher, Metric::Hessian].into_iter().find(|m| metrics.contains(m));
        if let Some(metric) = plain.filter(|_| !self.adapter.is_empty()) {
            return Err(Usage(format!("--metrics {metric}: not measured with --adapter")).into());
        }
        if self.quantizer == Quantizer::Gptq && !self.adapter.is_empty() {
            return Err(Usage("--quantizer gptq: not measured with --adapter".into()).into());
        }
        let least = ProfileOptions::default().bits.into_iter().min().map_or(2.0, f64::from);
        if linear && !(self.mean_bits.is_finite() && self.mean_bits >= least) {
            return Err(Usage(format!("--mean-bits {}: at least {least}", self.mean_bits)).into());
        }
        if linear && !(self.mean_rank.is_finite() && self.mean_rank >= 0.0) {
            return Err(Usage(format!("--mean-rank {}: a number of at least 0", self.mean_rank)).into());
        }
        let before = self.before.as_ref().map(|path| {
            Measured::load(path).with_context(|| format!("{}: an earlier profile", path.display()))
        });
        let before = before.transpose()?;
        let files = models::open(&self.model)?;
        let against = self.against.as_deref().map(models::open).transpose()?;
        if let Some(other) = &against
            && other.config.vocab != files.config.vocab
        {
            let [theirs, ours] = [other, &files].map(|f| f.config.vocab);
            bail!("{} has a vocabulary of {theirs}, {} one of {ours}", other.name, files.name);
        }
        let data = models::text(&self.data, &files.tokenizer, self.window)?;
        if global.dry_run {
            let windows = data.spread(self.window, self.windows).len();
            let facts = json!({"tokens": windows * self.window, "linear_layers": files.sites().block_linears().len()});
            return models::preview(&files, &[&self.data], &[&self.out], facts, terminal);
        }
        let device = models::device(global)?;
        let model = files.load(&device)?;
        let options = ProfileOptions {
            model: model.name.clone(),
            metrics,
            window: self.window,
            max_windows: self.windows,
            seed: Seed(global.seed),
            ..ProfileOptions::default()
        };
        let (banks, routed) = match &self.router {
            Some(router) => {
                let Routed { router, names, banks } = models::routed(router, &self.adapter, &model, &device)?;
                (banks, Some((router, names)))
            }
            None => (models::adapters(&self.adapter, &model, &device)?, None),
        };
        let mut bricks = models::bricks(&None, &banks);
        bricks.extend(routed.iter().map(|(router, _)| router as &dyn Brick));
        let tap = ExpertTap::new(&model.decoder.sites().all());
        let tap = tap.skipping(usize::from(options.skip_first_token));
        let mut found = profile_with(&model.decoder, &bricks, &[&tap], &data.ids, &options, terminal)?;
        let usage = tap.read().into_iter();
        found.experts = usage
            .map(|(layer, used)| ExpertProfile::from_weights(layer, used.tokens, &used.weights))
            .collect();
        found.expert_names = routed.map_or(Vec::new(), |(_, names)| names);
        let found = match self.quantizer {
            Quantizer::Rtn => found,
            Quantizer::Gptq => {
                let text = data.spread(self.window, self.windows).concat();
                let settings = GptqConfig { act_order: true, ..GptqConfig::default() };
                gptq_bit_losses(found, &model.decoder, &text, settings, terminal)?
            }
        };
        let text = data.spread(self.window, self.windows).concat();
        let compared = against.map(|other| self.compare(other, &model, &text, &device, terminal));
        let compared = compared.transpose()?;
        let report = Report::new(format!("Profile of {}", model.name))
            .fact("model", &model.name)
            .fact("tokens", found.tokens)
            .sections(found.sections());
        let names = self.adapter.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>();
        let report = if names.is_empty() { report } else { report.fact("adapters", names.join(", ")) };
        let report = compared.into_iter().fold(report, Report::section);
        let report = before.iter().fold(report, |report, b| report.section(found.change_section(b)));
        models::write_folder(&self.out, |folder| {
            found.save(folder.join("profile.json"))?;
            let report = if linear { self.plans(report, folder, &found, &model, global)? } else { report };
            Ok(report.save(folder)?)
        })?;
        let output = json!({"out": self.out, "tokens": found.tokens, "layers": found.layers});
        terminal.result(&output, || format!("wrote {}", self.out.join("report.html").display()))
    }

    /// Plans of bits and ranks from the profile, as files and in the report.
    fn plans(
        &self,
        report: Report,
        folder: &Path,
        found: &Measured,
        model: &Model,
        global: &Global,
    ) -> Result<Report> {
        let (sites, options) = (model.decoder.sites(), &found.options);
        let seeds: Vec<Seed> = (0..3).map(|i| Seed(global.seed).derive(&format!("plan/{i}"))).collect();
        let bits = bit_plans(found, sites, self.mean_bits, &options.bits, &seeds)?;
        let ranks = rank_plans(found, sites, RankBudget::MeanRank(self.mean_rank), &options.ranks, &seeds)?;
        bits.planned.plan.save(folder.join("bits.toml"))?;
        ranks.planned.plan.save(folder.join("ranks.toml"))?;
        let bit_section = bits.section(&format!("Bits, {} on average", self.mean_bits));
        let rank_section = ranks.section(&format!("Ranks, {} on average", self.mean_rank));
        Ok(report
            .section(bit_section.heatmap(bits.beside(found)).scatter(bit_front(found, sites, &options.bits)?))
            .section(rank_section.heatmap(ranks.beside(found))))
    }

    /// The layers of this model beside those of another, on the same tokens.
    fn compare(
        &self,
        other: ModelFiles,
        model: &Model,
        text: &[u32],
        device: &Device,
        terminal: &Terminal,
    ) -> Result<Section> {
        let other = other.load(device)?;
        let options = SimilarityOptions { window: self.window, ..SimilarityOptions::default() };
        let grams = |m: &Model| layer_grams(&m.decoder, text, &options, terminal);
        let found = cka(&grams(model)?, &grams(&other)?)?;
        Ok(Section::new(format!("Beside {}", other.name))
            .text(format!(
                "Centred kernel alignment of the layers: rows are those of {}, columns those of {}; 1 for the same up to \
                 rotation and scale, 0 for unrelated.",
                model.name, other.name
            ))
            .heatmap(found.heatmap("Layers of the two models")))
    }
}
