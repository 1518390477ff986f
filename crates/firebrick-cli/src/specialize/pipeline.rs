//! The stages of a specialization, in order. Every stage leaves its result on disk and the next one reads it from there, so
//! that a run in one go and a resumed run compute with the same numbers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::module::Module;
use burn::tensor::Device;
use firebrick_analysis::{
    Allocation, Plans, Profile, ProfileOptions, RankBudget, bit_plans, profile, rank_plans,
};
use firebrick_core::{Brick, LayerPlan, Seed};
use firebrick_distill::{KdConfig, LogitKd, Teacher, distill_lora};
use firebrick_elastic::{DropKind, DropPlan};
use firebrick_models::{Decoder, Export, ExportType, Model, ModelFiles};
use firebrick_moe::{AdapterRouter, fit_adapter_router};
use firebrick_peft::{LoraBank, LoraConfig, fit_lora, hf};
use firebrick_quant::{GptqConfig, Method, QuantConfig, encode, quantize};
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_tensor::stream::Executor;
use firebrick_train::{TextData, TrainConfig, perplexity};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Settings;
use super::report;
use super::stages::Stages;
use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

/// A domain's text, split.
pub struct Domain {
    pub name: String,
    pub train: TextData,
    pub held: TextData,
}

/// Held-out perplexity of one variant on every domain, in the order of the domains; none where it was not measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variant {
    pub name: String,
    pub perplexity: Vec<Option<f64>>,
    /// Bytes of the linear layers' weights inside the blocks.
    pub bytes: Option<u64>,
}

/// One bit plan, tried out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TriedPlan {
    pub name: String,
    pub mean_bits: f64,
    /// Mean over the domains of the nats per token.
    pub mean_nll: f64,
    pub perplexity: Vec<f64>,
}

/// How one adapter learned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Learned {
    pub first_loss: f64,
    pub final_loss: f64,
    pub losses: Vec<f64>,
    pub parameters: usize,
}

/// The router, after training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Routed {
    pub accuracy: f64,
}

/// The merged model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Merged {
    /// Weight of every task vector.
    pub weight: f64,
    /// Weight and mean nats per token of every candidate.
    pub tried: Vec<(f64, f64)>,
}

/// The student, after distillation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Student {
    pub dropped: Vec<String>,
    pub losses: Vec<f64>,
}

/// Everything the report shows.
pub struct Results {
    pub model: String,
    pub domains: Vec<String>,
    pub profile: Profile,
    pub ranks: Plans,
    pub bits: Plans,
    pub learned: Vec<Learned>,
    pub merged: Merged,
    pub routed: Routed,
    pub tried: Vec<TriedPlan>,
    pub student: Student,
    pub variants: Vec<Variant>,
}

/// What a finished run prints.
#[derive(Serialize)]
pub struct Summary {
    pub out: PathBuf,
    pub domains: Vec<String>,
    pub variants: Vec<Variant>,
    pub bit_plans: Vec<TriedPlan>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:24}", "held-out perplexity")?;
        for domain in &self.domains {
            write!(f, " {domain:>11.11}")?;
        }
        writeln!(f)?;
        for variant in &self.variants {
            write!(f, "{:24}", variant.name)?;
            for value in &variant.perplexity {
                match value {
                    Some(v) => write!(f, " {v:>11.3}")?,
                    None => write!(f, " {:>11}", "")?,
                }
            }
            writeln!(f)?;
        }
        write!(f, "report: {}", self.out.join("report.html").display())
    }
}

/// One run.
pub struct Pipeline<'a> {
    files: ModelFiles,
    domains: Vec<Domain>,
    settings: Settings,
    out: PathBuf,
    stages: Stages,
    terminal: &'a Terminal,
    /// Records gradients.
    outer: Device,
    /// Does not.
    inner: Device,
}

impl<'a> Pipeline<'a> {
    pub fn begin(
        files: ModelFiles,
        domains: Vec<Domain>,
        settings: Settings,
        out: &Path,
        global: &Global,
        terminal: &'a Terminal,
    ) -> Result<Self> {
        let texts: Vec<_> = domains.iter().map(|d| (&d.name, d.train.digest(), d.held.digest())).collect();
        let weights: u64 = files.checkpoint.tensors().iter().map(|t| t.len as u64).sum();
        let identity = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": files.name,
            "config": files.config,
            "weight_bytes": weights,
            "texts": texts,
            "settings": settings,
        });
        let inner = models::device(global)?;
        let stages = Stages::begin(out, &identity, global)?;
        let outer = inner.clone().autodiff();
        Ok(Pipeline { files, domains, settings, out: out.into(), stages, terminal, outer, inner })
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
        self.stages.finish()?;
        Ok(Summary { out: self.out, domains, variants, bit_plans: tried })
    }

    fn say(&self, text: &str) {
        self.terminal.say(text);
    }

    fn seed(&self, name: &str) -> Seed {
        Seed(self.settings.seed).derive(name)
    }

    fn load(&self, device: &Device) -> Result<Decoder> {
        Ok(Decoder::load(self.files.config.clone(), &self.files.weights(), device)?)
    }

    /// A model this run has written.
    fn written(&self, name: &str, device: &Device) -> Result<Model> {
        Ok(Model::open(&self.out.join(name), device)?)
    }

    fn executor(&self) -> Executor<'_> {
        // A stage that is done again replaces what an interrupted one left.
        Executor { overwrite: true, resume: false, ..Executor::default() }
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
            ..TrainConfig::default()
        }
    }

    /// A mixture of all domains' training text, window by window in turn.
    fn mixture(&self) -> TextData {
        let mut windows: Vec<_> =
            self.domains.iter().map(|d| d.train.windows(self.settings.window)).collect();
        let mut ids = Vec::new();
        while let Some(round) = windows.iter_mut().map(Iterator::next).collect::<Option<Vec<_>>>() {
            round.into_iter().for_each(|w| ids.extend_from_slice(w));
        }
        TextData::new(ids, 0)
    }

    /// Mean nats per token on `ids`, at most `limit` of them.
    fn nll(&self, decoder: &Decoder, bricks: &[&dyn Brick], ids: &[u32], limit: usize) -> Result<f64> {
        let ids = &ids[..ids.len().min(limit.max(self.settings.window))];
        let batch = if self.settings.thorough { 8 } else { 2 };
        Ok(perplexity(decoder, bricks, ids, 0, self.settings.window, batch, self.terminal)?.mean_nll)
    }

    fn held_out(&self, decoder: &Decoder, bricks: &[&dyn Brick]) -> Result<Vec<f64>> {
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
                ..ProfileOptions::default()
            };
            let found = profile(&decoder.valid(), &self.mixture().ids, &options, self.terminal)?;
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
        let bits = bit_plans(profile, sites, self.settings.bits, &[2, 3, 4, 8], &seeds)?;
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
                std::fs::rename(self.stages.scratch(&stage).join("log.jsonl"), dir.join("log.jsonl"))?;
                Ok(Learned {
                    first_loss: report.first_loss().unwrap_or(f64::NAN),
                    final_loss: report.final_loss().unwrap_or(f64::NAN),
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
            let d_model = self.files.config.d_model;
            let router = AdapterRouter::new(d_model, texts.len(), None, self.seed("router"), &self.outer);
            let (router, accuracy) = fit_adapter_router(
                &decoder.valid(),
                router,
                &texts,
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

    fn quant_config(&self, plan: &LayerPlan) -> Result<QuantConfig> {
        Ok(QuantConfig {
            method: Method::Gptq(GptqConfig { act_order: true, ..Default::default() }),
            grid: Grid { bits: 3, group: 64, kind: GridKind::SymHalf, clip: false },
            plan: Some(plan.resolve(self.files.sites())?),
            true_sequential: false,
            window: self.settings.window,
        })
    }

    /// GPTQ of the merged model with the planned bits, into a GGUF; and the same with the baselines' plans, for comparison.
    fn quantize(&self, bits: &Plans) -> Result<Vec<TriedPlan>> {
        let mixture = self.mixture();
        let windows = if self.settings.thorough { 24 } else { 12 };
        let text = &mixture.ids[..mixture.ids.len().min(windows * self.settings.window)];
        let all = bits.all();
        let chosen = if self.settings.thorough { &all[..] } else { &all[..2] };
        let one = |(name, plan): &(String, &Allocation)| {
            self.stages.once(&format!("quantize-{}", name.replace(' ', "-")), || {
                self.say(&format!("quantize: {name} bits"));
                let merged = self.written("merged", &self.inner)?;
                let config = self.quant_config(&plan.plan)?;
                let quantized = quantize(merged.decoder, text, &config, self.terminal)?;
                if *name == all[0].0 {
                    Export::decoder(&self.files.name, &quantized.decoder, &merged.tokenizer, ExportType::F16)
                        .with_encoded(encode(&quantized.matrices))
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
                    mean_nll: nll.iter().sum::<f64>() / nll.len() as f64,
                    perplexity: nll.iter().map(|v| v.exp()).collect(),
                })
            })
        };
        chosen.iter().map(one).collect()
    }

    /// A student without the least influential blocks, taught by the merged model.
    fn distill(&self, profile: &Profile) -> Result<Student> {
        self.stages.once("distill", || {
            self.say("distill: a student with fewer blocks");
            let teacher = self.written("merged", &self.inner)?;
            let scores = profile.influence();
            let plan = DropPlan::lowest(&scores, DropKind::Block, self.settings.drop_blocks, true)?;
            let student = plan.cut(self.written("merged", &self.outer)?.decoder)?;
            let lora = LoraConfig {
                rank: 2 * self.settings.rank,
                alpha: 4.0 * self.settings.rank as f64,
                ..self.lora()
            };
            let targets = student.sites().block_linears();
            let bank = lora.init(student.sites(), &targets, self.seed("student"), &self.outer)?;
            let config = self.train_config(self.settings.student_steps, "distill-run");
            let kd = LogitKd::new(KdConfig { temperature: 1.0, soft: 0.9, reverse: false });
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

    fn evaluate(&self, decoder: &Decoder, banks: &[LoraBank]) -> Result<Vec<Variant>> {
        let base = decoder.valid();
        let shape = |layers: usize| {
            let linears = self.files.sites().block_linears();
            let weights: usize = linears
                .iter()
                .filter(|s| s.layer.is_some_and(|l| l < layers))
                .filter_map(|s| self.files.sites().linear(s))
                .map(|(a, b)| a * b)
                .sum();
            weights as u64
        };
        let layers = self.files.config.layers;
        let variant = |name: &str, bytes: Option<u64>, nll: Vec<Option<f64>>| Variant {
            name: name.into(),
            perplexity: nll.into_iter().map(|v| v.map(f64::exp)).collect(),
            bytes,
        };
        let everywhere = |nll: Vec<f64>| nll.into_iter().map(Some).collect::<Vec<_>>();
        let measure = |name: &str, bytes: Option<u64>, decoder: &Decoder, bricks: &[&dyn Brick]| {
            self.stages.once(&format!("evaluate-{}", name.replace(' ', "-")), || {
                self.say(&format!("evaluate: {name}"));
                Ok(variant(name, bytes, everywhere(self.held_out(decoder, bricks)?)))
            })
        };
        let mut variants = vec![measure("base", Some(4 * shape(layers)), &base, &[])?];
        let specialists = self.stages.once("evaluate-specialists", || {
            self.say("evaluate: every adapter");
            let mut rows = Vec::new();
            for (i, (bank, domain)) in banks.iter().zip(&self.domains).enumerate() {
                // On its own the bank answers to no router.
                let bricks: [&dyn Brick; 1] = [bank];
                let one = |(j, d): (usize, &Domain)| {
                    let measured = i == j || self.settings.thorough;
                    measured
                        .then(|| self.nll(&base, &bricks, &d.held.ids, self.settings.eval_tokens))
                        .transpose()
                };
                let nll: Vec<Option<f64>> =
                    self.domains.iter().enumerate().map(one).collect::<Result<_>>()?;
                rows.push(variant(&format!("adapter {}", domain.name), None, nll));
            }
            Ok(rows)
        })?;
        variants.extend(specialists);
        let router = AdapterRouter::load(&self.out.join("router"), &self.inner)?;
        let mut mixture: Vec<&dyn Brick> = banks.iter().map(|b| b as &dyn Brick).collect();
        mixture.push(&router);
        variants.push(measure("routed adapters", None, &base, &mixture)?);
        let merged = self.written("merged", &self.inner)?;
        variants.push(measure("merged", Some(4 * shape(layers)), &merged.decoder, &[])?);
        let gguf = self.written("model.gguf", &self.inner)?;
        let packed: BTreeMap<_, _> = ModelFiles::open(&self.out.join("model.gguf"))?
            .checkpoint
            .tensors()
            .iter()
            .map(|t| (t.name.clone(), t.len))
            .collect();
        let bytes = packed.iter().filter(|(n, _)| n.starts_with("blk.")).map(|(_, len)| *len as u64).sum();
        variants.push(measure("quantized (GGUF)", Some(bytes), &gguf.decoder, &[])?);
        let student = self.written("student", &self.inner)?;
        let kept = student.decoder.config().layers;
        variants.push(measure("student", Some(4 * shape(kept)), &student.decoder, &[])?);
        Ok(variants)
    }
}
