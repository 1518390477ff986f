//! The stages of a specialization, in order. Every stage leaves its result on disk and the next one reads it from there, so
//! that a run in one go and a resumed run compute with the same numbers.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use burn::module::Module;
use burn::tensor::Device;
use firebrick_analysis::{
    Allocation, Plans, Profile, ProfileOptions, RankBudget, bit_plans, profile, rank_plans,
};
use firebrick_core::{Brick, LayerPlan, Seed, Settings as SiteSettings, SiteTable};
use firebrick_distill::{KdConfig, LogitKd, Teacher, distill_lora};
use firebrick_elastic::{DropKind, DropPlan};
use firebrick_models::{Decoder, Export, ExportType, Model, ModelFiles};
use firebrick_moe::{AdapterRouter, fit_adapter_router};
use firebrick_peft::{LoraBank, LoraConfig, fit_lora, hf};
use firebrick_quant::{GptqConfig, Method, Packing, QuantConfig, gguf_weights, gptq_bit_losses, quantize};
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_tensor::stream::Executor;
use firebrick_train::{TextData, TrainConfig, perplexity};
use serde_json::{Value, json};

use super::Settings;
use super::report;
use super::results::{Learned, Merged, Results, Routed, Student, Summary, TriedPlan};
use super::stages::{Begun, SUMMARY, Stages};
use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

/// A domain's text, split.
pub struct Domain {
    pub name: String,
    pub train: TextData,
    pub held: TextData,
}

/// One run.
pub struct Pipeline<'a> {
    pub(super) files: ModelFiles,
    pub(super) domains: Vec<Domain>,
    pub(super) settings: Settings,
    pub(super) out: PathBuf,
    pub(super) stages: Stages,
    /// All that changes the results.
    identity: Value,
    /// Of the model's configuration and weights.
    digest: String,
    global: &'a Global,
    terminal: &'a Terminal,
    /// Records gradients.
    outer: Device,
    /// Does not.
    pub(super) inner: Device,
}

/// Where a run stands.
pub enum Start<'a> {
    /// It begins or goes on.
    Run(Box<Pipeline<'a>>),
    /// It was complete already.
    Complete(Summary),
}

impl<'a> Pipeline<'a> {
    pub fn begin(
        files: ModelFiles,
        domains: Vec<Domain>,
        settings: Settings,
        out: &Path,
        global: &'a Global,
        terminal: &'a Terminal,
    ) -> Result<Start<'a>> {
        let inner = models::device(global)?;
        let digest = files.digest()?;
        let texts: Vec<_> = domains.iter().map(|d| (&d.name, d.train.digest(), d.held.digest())).collect();
        let identity = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": files.name,
            "digest": digest,
            "device": format!("{inner:?}"),
            "texts": texts,
            "settings": settings,
        });
        let stages = match Stages::begin(out, &identity, global)? {
            Begun::Open(stages) => stages,
            Begun::Complete(summary) => {
                let summary = serde_json::from_value(summary)
                    .with_context(|| out.join(SUMMARY).display().to_string())?;
                return Ok(Start::Complete(summary));
            }
        };
        let outer = inner.clone().autodiff();
        Ok(Start::Run(Box::new(Pipeline {
            files,
            domains,
            settings,
            out: out.into(),
            stages,
            identity,
            digest,
            global,
            terminal,
            outer,
            inner,
        })))
    }

    pub fn run(self) -> Result<Summary> {
        let name = self.files.name.clone();
        let decoder = self.load(&self.outer)?;
        let profile = self.profile(&decoder)?;
        let (ranks, bits) = self.plan(&profile)?;
        let learned = self.adapt(&decoder, &ranks.planned.plan)?;
        let banks = self.banks()?;
        let merged = self.merge(&decoder, &banks)?;
        let routed = self.route(&decoder)?;
        let tried = self.quantize(&bits)?;
        let student = self.distill(&profile)?;
        let variants = self.evaluate(&decoder, &banks)?;
        let domains: Vec<String> = self.domains.iter().map(|d| d.name.clone()).collect();
        let results = Results {
            model: name,
            domains: domains.clone(),
            profile,
            ranks,
            bits,
            learned,
            merged,
            routed,
            tried: tried.clone(),
            student,
            variants: variants.clone(),
        };
        report::build(&results, &self.settings).save(&self.out)?;
        let summary = Summary { out: None, run: self.identity, domains, variants, bit_plans: tried };
        self.stages.finish(&self.out, &summary)?;
        Ok(summary)
    }

    pub(super) fn say(&self, text: &str) {
        self.terminal.say(text);
    }

    fn seed(&self, name: &str) -> Seed {
        Seed(self.settings.seed).derive(name)
    }

    fn load(&self, device: &Device) -> Result<Decoder> {
        Ok(Decoder::load(self.files.config.clone(), &self.files.weights(), device)?)
    }

    /// A model this run has written.
    pub(super) fn written(&self, name: &str, device: &Device) -> Result<Model> {
        Ok(Model::open(&self.out.join(name), device)?)
    }

    fn executor(&self) -> Executor<'_> {
        // A stage that is done again replaces what an interrupted one left.
        Executor { overwrite: true, resume: false, ..models::executor(self.global, self.terminal) }
    }

    fn train_config(&self, steps: usize, name: &str) -> TrainConfig {
        let s = &self.settings;
        TrainConfig {
            steps,
            batch: s.batch,
            window: s.window,
            learning_rate: s.learning_rate,
            warmup: steps.div_ceil(10),
            seed: self.seed(name).0,
            checkpoint_every: 20,
            log_every: 1,
            out: Some(self.stages.scratch(name)),
            identity: Some(format!("{name} on {}, rank {}", self.digest, s.rank)),
            ..TrainConfig::default()
        }
    }

    /// A mixture of all domains' training text, window by window in turn.
    fn mixture(&self) -> TextData {
        let texts: Vec<TextData> = self.domains.iter().map(|d| d.train.clone()).collect();
        TextData::interleave(&texts, self.settings.window)
    }

    /// About `windows` windows of training text, as many of each domain, spread over it.
    fn calibration(&self, windows: usize) -> TextData {
        let window = self.settings.window;
        let each = windows.div_ceil(self.domains.len());
        let spread = |d: &Domain| TextData::new(d.train.spread(window, each).concat(), 0);
        let texts: Vec<TextData> = self.domains.iter().map(spread).collect();
        TextData::interleave(&texts, window)
    }

    /// Mean nats per token on `ids`, at most `limit` of them.
    pub(super) fn nll(
        &self,
        decoder: &Decoder,
        bricks: &[&dyn Brick],
        ids: &[u32],
        limit: usize,
    ) -> Result<f64> {
        let ids = &ids[..ids.len().min(limit.max(self.settings.window))];
        let batch = if self.settings.thorough { 8 } else { 2 };
        let nll = perplexity(decoder, bricks, ids, 0, self.settings.window, batch, self.terminal)?.mean_nll;
        ensure!(nll.is_finite(), "the mean loss is {nll}");
        Ok(nll)
    }

    pub(super) fn held_out(&self, decoder: &Decoder, bricks: &[&dyn Brick]) -> Result<Vec<f64>> {
        let limit = self.settings.eval_tokens;
        self.domains.iter().map(|d| self.nll(decoder, bricks, &d.held.ids, limit)).collect()
    }

    fn profile(&self, decoder: &Decoder) -> Result<Profile> {
        self.stages.once("profile", || {
            self.say("profile: one calibration pass");
            let options = ProfileOptions {
                model: self.files.name.clone(),
                window: self.settings.window,
                seed: self.seed("profile"),
                bits: self.bit_choices().into(),
                kind: self.grid_kind(),
                ..ProfileOptions::default()
            };
            let decoder = decoder.valid();
            let found = profile(&decoder, &self.mixture().ids, &options, self.terminal)?;
            // GPTQ leaves some layers half of the error of rounding to nearest and others a hundredth: plan for what it does.
            let text = self.calibration(12).ids;
            let found = gptq_bit_losses(found, &decoder, &text, self.gptq(), self.terminal)?;
            found.save(self.out.join("profile.json"))?;
            Ok(())
        })?;
        Ok(Profile::load(self.out.join("profile.json"))?)
    }

    fn plan(&self, profile: &Profile) -> Result<(Plans, Plans)> {
        let sites = self.files.sites();
        let seeds: Vec<Seed> = (0..3).map(|i| self.seed(&format!("plan/{i}"))).collect();
        let rank_choices = [2, 4, 8, 16, 32];
        let ranks = RankBudget::MeanRank(self.settings.rank as f64);
        let ranks = rank_plans(profile, sites, ranks, &rank_choices, &seeds)?;
        let bits = bit_plans(profile, sites, self.settings.bits, self.bit_choices(), &seeds)?;
        ranks.planned.plan.save(self.out.join("ranks.toml"))?;
        bits.planned.plan.save(self.out.join("bits.toml"))?;
        Ok((ranks, bits))
    }

    fn lora(&self) -> LoraConfig {
        LoraConfig { rank: self.settings.rank, alpha: 2.0 * self.settings.rank as f64, ..Default::default() }
    }

    fn adapter_dir(&self, domain: &str) -> PathBuf {
        self.out.join("adapters").join(domain)
    }

    fn adapt(&self, decoder: &Decoder, ranks: &LayerPlan) -> Result<Vec<Learned>> {
        let plan = ranks.resolve(self.files.sites())?;
        let one = |domain: &Domain| {
            let stage = format!("adapter-{}", domain.name);
            self.stages.once(&stage, || {
                self.say(&format!("adapt: {}", domain.name));
                let bank = self.lora().init_plan(decoder.sites(), &plan, self.seed("lora"), &self.outer)?;
                let parameters = bank.num_params();
                let config = self.train_config(self.settings.steps, &stage);
                let (bank, report) =
                    fit_lora(decoder, &[], bank, &config, &domain.train, self.terminal, true)?;
                let dir = self.adapter_dir(&domain.name);
                hf::save(&bank, decoder.sites(), &self.files.name, &dir)?;
                models::copy_log(&self.stages.scratch(&stage).join("log.jsonl"), &dir.join("log.jsonl"))?;
                let (first, last) = (report.first_loss(), report.final_loss());
                Ok(Learned {
                    first_loss: first.context("no step was taken")?,
                    final_loss: last.context("no step was taken")?,
                    losses: report.losses,
                    parameters,
                })
            })
        };
        self.domains.iter().map(one).collect()
    }

    /// The trained adapters, each with its slot in a mixture.
    fn banks(&self) -> Result<Vec<LoraBank>> {
        let one = |(slot, domain): (usize, &Domain)| {
            let (bank, _) = hf::load(&self.adapter_dir(&domain.name), self.files.sites(), &self.inner)?;
            Ok(bank.with_slot(slot))
        };
        self.domains.iter().enumerate().map(one).collect()
    }

    /// Task arithmetic over the adapters, with the weight that predicts a slice of the training texts best.
    fn merge(&self, decoder: &Decoder, banks: &[LoraBank]) -> Result<Merged> {
        self.stages.once("merge", || {
            self.say("merge: task arithmetic over the adapters");
            let merged = |weight: f64| -> Result<Decoder> {
                banks.iter().try_fold(decoder.valid(), |d, bank| Ok(bank.merge(d, weight)?))
            };
            let slice = self.settings.eval_tokens / 4;
            let mut tried = Vec::new();
            for weight in [0.2, 0.3, 0.4, 0.6, 1.0] {
                let decoder = merged(weight)?;
                let nll: Vec<f64> = self
                    .domains
                    .iter()
                    .map(|d| self.nll(&decoder, &[], &d.train.ids, slice))
                    .collect::<Result<_>>()?;
                tried.push((weight, nll.iter().sum::<f64>() / nll.len() as f64));
            }
            let best = tried.iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("several weights were tried");
            let weight = best.0;
            Export::decoder(&self.files.name, &merged(weight)?, &self.files.tokenizer, ExportType::F32)
                .with_settings(json!({"method": "task_arithmetic", "weight": weight, "tried": tried}))
                .write(&self.out.join("merged"), &self.executor())?;
            Ok(Merged { weight, tried })
        })
    }

    fn route(&self, decoder: &Decoder) -> Result<Routed> {
        self.stages.once("route", || {
            self.say("route: a causal router over the adapters");
            let texts: Vec<TextData> = self.domains.iter().map(|d| d.train.clone()).collect();
            let held: Vec<TextData> = self.domains.iter().map(|d| d.held.clone()).collect();
            let d_model = self.files.config.d_model;
            let router = AdapterRouter::new(d_model, texts.len(), None, self.seed("router"), &self.outer);
            let (router, accuracy) = fit_adapter_router(
                &decoder.valid(),
                router,
                &texts,
                &held,
                400,
                texts.len() * 2,
                self.settings.window,
                5e-2,
                self.seed("router"),
                self.terminal,
            )?;
            let names: Vec<String> = self.domains.iter().map(|d| d.name.clone()).collect();
            router.save(&self.out.join("router"), &names)?;
            Ok(Routed { accuracy })
        })
    }

    fn gptq(&self) -> GptqConfig {
        GptqConfig { act_order: true, ..GptqConfig::default() }
    }

    /// GGUF's blocks with an offset hold at most 4 bits, its 8-bit blocks have none.
    fn grid_kind(&self) -> GridKind {
        if self.settings.bits <= 4.0 { GridKind::Asym } else { GridKind::SymHalf }
    }

    fn bit_choices(&self) -> &'static [u8] {
        if self.settings.bits <= 4.0 { &[2, 3, 4] } else { &[2, 3, 4, 8] }
    }

    fn quant_config(&self, plan: &LayerPlan) -> Result<QuantConfig> {
        Ok(QuantConfig {
            method: Method::Gptq(self.gptq()),
            grid: Grid { bits: 3, group: 64, kind: self.grid_kind(), clip: true },
            plan: Some(plan.resolve(self.files.sites())?),
            true_sequential: false,
            window: self.settings.window,
        })
    }

    /// GPTQ of the merged model with the planned bits, into a GGUF; and the same with the baselines' plans, for comparison.
    fn quantize(&self, bits: &Plans) -> Result<Vec<TriedPlan>> {
        let text = self.calibration(24).ids;
        let all = bits.all();
        let chosen = if self.settings.thorough { &all[..] } else { &all[..2] };
        let one = |(name, plan): &(String, &Allocation)| {
            self.stages.once(&format!("quantize-{}", name.replace(' ', "-")), || {
                self.say(&format!("quantize: {name} bits"));
                let merged = self.written("merged", &self.inner)?;
                let config = self.quant_config(&plan.plan)?;
                let quantized = quantize(merged.decoder, &text, &config, self.terminal)?;
                let (encoded, _) = gguf_weights(&quantized.matrices, Packing::Exact);
                let file_bytes = models::stored_bytes(&quantized.matrices, &encoded);
                if *name == all[0].0 {
                    Export::decoder(&self.files.name, &quantized.decoder, &merged.tokenizer, ExportType::F16)
                        .with_encoded(encoded)
                        .with_settings(json!({"method": "gptq", "mean_bits": self.settings.bits}))
                        .write(&self.out.join("model.gguf"), &self.executor())?;
                }
                let weights: usize = quantized.matrices.values().map(|m| m.codes.len()).sum();
                let code_bits: usize =
                    quantized.matrices.values().map(|m| m.codes.len() * usize::from(m.grid.bits)).sum();
                let nll = self.held_out(&quantized.decoder, &[])?;
                Ok(TriedPlan {
                    name: name.clone(),
                    mean_bits: code_bits as f64 / weights as f64,
                    file_bytes,
                    mean_nll: nll.iter().sum::<f64>() / nll.len() as f64,
                    perplexity: nll.iter().map(|v| v.exp()).collect(),
                })
            })
        };
        chosen.iter().map(one).collect()
    }

    /// Twice the adapters' rank, as far as a layer has as many, at the same scale.
    fn student_ranks(&self, sites: &SiteTable) -> LayerPlan {
        let linears = sites.block_linears();
        LayerPlan::from_sites(linears.iter().filter_map(|site| {
            let (d_in, d_out) = sites.linear(site)?;
            let rank = (2 * self.settings.rank).min(d_in).min(d_out);
            let alpha = Some(2.0 * rank as f64);
            Some((site, SiteSettings { rank: Some(rank), alpha, ..SiteSettings::default() }))
        }))
    }

    /// A student without the least influential blocks, taught by the merged model.
    fn distill(&self, profile: &Profile) -> Result<Student> {
        self.stages.once("distill", || {
            self.say("distill: a student with fewer blocks");
            let teacher = self.written("merged", &self.inner)?;
            let scores = profile.influence();
            let plan = DropPlan::lowest(&scores, DropKind::Block, self.settings.drop_blocks, true)?;
            let student = plan.cut(self.written("merged", &self.outer)?.decoder)?;
            let ranks = self.student_ranks(student.sites()).resolve(student.sites())?;
            let bank = self.lora().init_plan(student.sites(), &ranks, self.seed("student"), &self.outer)?;
            let config = self.train_config(self.settings.student_steps, "distill-run");
            let kd = LogitKd::new(KdConfig { temperature: 1.0, soft: 0.9, reverse: false })?;
            let teaching = Teacher { decoder: &teacher.decoder, bricks: &[] };
            let (bank, report) =
                distill_lora(kd, &teaching, &student, bank, &config, &self.mixture(), self.terminal, true)?;
            let student = bank.valid().merge(student.valid(), 1.0)?;
            Export::decoder(&self.files.name, &student, &teacher.tokenizer, ExportType::F32)
                .with_settings(json!({"teacher": "merged", "dropped": plan}))
                .write(&self.out.join("student"), &self.executor())?;
            let dropped = plan.sites.iter().map(|s| s.to_string()).collect();
            Ok(Student { dropped, losses: report.losses })
        })
    }
}
