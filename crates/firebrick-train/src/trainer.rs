//! The training loop.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use burn::module::{Module, ParamGroup};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor, TensorData, Transaction};
use firebrick_core::{Event, Progress, Seed, Task, resident_bytes};
use firebrick_tensor::ops;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, State, write_file};
use crate::clip::global_norm;
use crate::optimizer::{self, Memory, Rule};
use crate::params::{map_trainable, trainable};
use crate::{
    AdamW, Batch, Group, Lamb, Lars, LarsForm, Mixture, Schedule, TextData, TrainError, clip_global_norm,
};

/// Which optimizer steps the parameters; the rest of its settings are those of [`TrainConfig`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Optimizer {
    /// [`AdamW`].
    #[default]
    AdamW,
    /// [`Lamb`].
    Lamb {
        /// Ends of the size that a step is scaled to.
        #[serde(default)]
        clamp: Option<[f64; 2]>,
    },
    /// [`Lars`]; its momentum is the first of the betas.
    Lars {
        /// Which formula.
        #[serde(default)]
        form: LarsForm,
        /// Step over parameter, in the original form.
        #[serde(default = "trust")]
        trust: f64,
        /// Ends of the size that a step is scaled to, in the paper's form.
        #[serde(default)]
        clamp: Option<[f64; 2]>,
    },
}

fn trust() -> f64 {
    Lars::default().trust
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Settings of a training run; the defaults suit LoRA.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows per forward pass.
    pub batch: usize,
    /// Tokens per window.
    pub window: usize,
    /// Forward and backward passes per step, whose gradients are averaged.
    pub accumulate: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from 0.
    pub warmup: usize,
    /// Fraction of a parameter taken off per step, times the learning rate.
    pub weight_decay: f64,
    /// Which optimizer.
    #[serde(skip_serializing_if = "is_default")]
    pub optimizer: Optimizer,
    /// Decay of the first and second moment of the optimizer.
    pub betas: [f64; 2],
    /// Added to the root of the second moment, or to the norms of LARS; more than 0.
    pub eps: f64,
    /// Largest global norm of the gradients; none for no clipping.
    pub clip: Option<f64>,
    /// Parameters with a learning rate or weight decay of their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// Parameters that LAMB and LARS neither scale nor decay, commonly norms and biases.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<ParamGroup>,
    /// Whether the backward pass computes each block again instead of keeping its activations, where the loss knows how:
    /// less memory for a second forward pass.
    #[serde(skip_serializing_if = "is_default")]
    pub recompute: bool,
    /// Every how many steps the loss on held-out data is taken, beside the last; 0 for that alone.
    #[serde(skip_serializing_if = "is_default")]
    pub eval_every: usize,
    /// The run ends early after so many held-out losses in a row that are no lower than the lowest before; none for never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
    /// Seed of the order of windows and of whatever the loss draws.
    pub seed: u64,
    /// Every how many steps a line goes into the log, beside the first and the last; 0 for those alone.
    pub log_every: usize,
    /// Every how many steps a checkpoint is written; 0 for one at the end only.
    pub checkpoint_every: usize,
    /// Folder of the log and the checkpoint; none to keep nothing.
    pub out: Option<PathBuf>,
    /// What the loss depends on besides the trained module and the text, in the caller's words (a digest of the frozen
    /// model, the settings of an adapter): a run is resumed only where it is the same. Not a setting of a file.
    #[serde(skip)]
    pub identity: Option<String>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            steps: 200,
            batch: 4,
            window: 256,
            accumulate: 1,
            learning_rate: 2e-4,
            schedule: Schedule::Cosine { floor: 0.1 },
            warmup: 10,
            weight_decay: 0.01,
            optimizer: Optimizer::AdamW,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip: Some(1.0),
            groups: Vec::new(),
            exclude: Vec::new(),
            recompute: false,
            eval_every: 0,
            patience: None,
            seed: 0,
            log_every: 10,
            checkpoint_every: 0,
            out: None,
            identity: None,
        }
    }
}

impl TrainConfig {
    /// The learning rate of `step`, counted from 0.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        self.learning_rate * self.schedule.factor(step, self.warmup, self.steps)
    }

    /// What is wrong with these settings; empty if nothing is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, what: String| {
            if !ok {
                problems.push(what);
            }
        };
        check(self.batch > 0, "`batch` is 0".into());
        check(self.accumulate > 0, "`accumulate` is 0".into());
        let pass = self.batch.saturating_mul(self.window);
        check(pass <= 1 << 31, format!("`batch` is {}; a pass has at most 2^31 tokens", self.batch));
        let rows = self.batch.saturating_mul(self.accumulate);
        let what = format!("`accumulate` is {}; a step has at most 2^24 rows", self.accumulate);
        check(rows <= 1 << 24, what);
        check(self.window > 1, format!("`window` is {}; predicting a token takes at least 2", self.window));
        for (name, value) in [("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)] {
            check(value.is_finite() && value >= 0.0, format!("`{name}` is {value}"));
        }
        // Computed in f32: a root of 0 must not divide 0.
        let eps = self.eps as f32;
        check(eps.is_finite() && eps > 0.0, format!("`eps` is {}; it should be more than 0", self.eps));
        for beta in self.betas {
            check((0.0..1.0).contains(&beta), format!("`betas` has {beta}, which is not in 0..1"));
        }
        if let Some(clip) = self.clip {
            check(clip > 0.0, format!("`clip` is {clip}; leave it out for no clipping"));
        }
        if let Schedule::Cosine { floor } = self.schedule {
            check((0.0..=1.0).contains(&floor), format!("`schedule` has a floor of {floor}"));
        }
        let (clamp, trust) = match self.optimizer {
            Optimizer::AdamW => (None, 1.0),
            Optimizer::Lamb { clamp } => (clamp, 1.0),
            Optimizer::Lars { clamp, trust, .. } => (clamp, trust),
        };
        let sizes = clamp.is_none_or(|[low, high]| 0.0 <= low && low <= high && high > 0.0);
        check(sizes, format!("`optimizer` has a clamp of {clamp:?}"));
        check(trust.is_finite() && trust > 0.0, format!("`optimizer` has a trust of {trust}"));
        let scales = self.optimizer != Optimizer::AdamW;
        check(scales || self.exclude.is_empty(), "`exclude` is for LAMB and LARS; use `groups`".into());
        check(self.patience != Some(0), "`patience` is 0; leave it out to go on to the last step".into());
        for group in &self.groups {
            let values = [Some(group.learning_rate), group.weight_decay];
            let fine = values.into_iter().flatten().all(|v| v.is_finite() && v >= 0.0);
            check(fine, format!("`groups` has {values:?}"));
        }
        problems
    }

    /// Fails with everything that is wrong.
    fn check(&self) -> Result<(), TrainError> {
        match self.problems() {
            problems if problems.is_empty() => Ok(()),
            problems => Err(TrainError::Config { problems }),
        }
    }

    /// The settings that must stay the same for a run to go on as if it had not stopped.
    fn identity(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("numbers and strings are JSON");
        let fields = value.as_object_mut().expect("an object");
        fields.remove("out");
        fields.remove("checkpoint_every");
        value
    }

    /// The optimizer of these settings.
    fn rule(&self) -> Box<dyn Rule> {
        let TrainConfig { betas, eps, weight_decay, .. } = *self;
        let (groups, exclude) = (self.groups.clone(), self.exclude.clone());
        match self.optimizer {
            Optimizer::AdamW => Box::new(AdamW { betas, eps, weight_decay, groups, ..AdamW::default() }),
            Optimizer::Lamb { clamp } => {
                Box::new(Lamb { betas, eps, weight_decay, clamp, exclude, groups, ..Lamb::default() })
            }
            Optimizer::Lars { form, trust, clamp } => {
                let momentum = betas[0];
                let plain = Lars { form, momentum, weight_decay, trust, eps, ..Lars::default() };
                Box::new(Lars { clamp, exclude, groups, ..plain })
            }
        }
    }

    /// Whether the held-out loss is taken after `step` steps.
    fn evaluates(&self, step: usize) -> bool {
        step == self.steps || (self.eval_every > 0 && step > 0 && step.is_multiple_of(self.eval_every))
    }
}

/// A loss on held-out data.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// After how many steps.
    pub step: usize,
    /// The loss.
    pub loss: f64,
}

/// The lowest of `evals`, the first of equal ones.
fn best(evals: &[HeldOut]) -> Option<HeldOut> {
    evals.iter().copied().reduce(|best, eval| if eval.loss < best.loss { eval } else { best })
}

/// Whether the last `patience` of `evals` are all no lower than the lowest before them.
fn exhausted(evals: &[HeldOut], patience: Option<usize>) -> bool {
    let since = |best: HeldOut| evals.iter().filter(|e| e.step > best.step).count();
    patience.is_some_and(|patience| best(evals).is_some_and(|best| since(best) >= patience))
}

/// What came of a training run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Optimizer steps done, those before a resumption included.
    pub steps: usize,
    /// Tokens passed through the model, likewise.
    pub tokens: u64,
    /// The loss of every step, likewise.
    pub losses: Vec<f64>,
    /// Wall-clock seconds of this call.
    pub seconds: f64,
    /// The losses on held-out data, if there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<HeldOut>,
    /// The step whose parameters were returned, if there are held-out losses: that of the lowest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_step: Option<usize>,
}

impl TrainReport {
    /// The loss of the first step.
    pub fn first_loss(&self) -> Option<f64> {
        self.losses.first().copied()
    }

    /// The mean loss of the last 10 % of the steps, at least one.
    pub fn final_loss(&self) -> Option<f64> {
        let tail = &self.losses[self.losses.len() - self.losses.len().div_ceil(10)..];
        (!tail.is_empty()).then(|| tail.iter().sum::<f64>() / tail.len() as f64)
    }
}

/// Trains the parameters of `module` that require a gradient on the windows of a text, and returns it with a report.
///
/// `loss` takes the module, token ids `[batch, window]` on the module's device and a seed of this pass, and returns the mean
/// loss `[1]`, auxiliary losses included. Whatever else it needs (a frozen decoder, a teacher) it captures.
///
/// # Errors
/// As [`fit_mixture`]; also if the text does not fill one window.
///
/// # Panics
/// If `loss` returns other than one number.
pub fn fit<M: Module>(
    module: M,
    config: &TrainConfig,
    data: &TextData,
    loss: &mut dyn FnMut(&M, Tensor<2, Int>, Seed) -> Tensor<1>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(M, TrainReport), TrainError> {
    config.check()?;
    let mixture = Mixture::text(data, config.window)?;
    let loss = &mut |module: &M, batch: &Batch, seed: Seed| loss(module, batch.tokens.clone(), seed);
    fit_mixture(module, config, &mixture, loss, None, progress, resume)
}

/// The loss of a pass: takes the module, what to compute on, and a seed of this pass; returns one number.
pub type Loss<'a, M> = dyn FnMut(&M, &Batch, Seed) -> Tensor<1> + 'a;

/// The loss of a module on held-out data.
pub type HeldOutLoss<'a, M> = dyn FnMut(&M) -> Result<f64, TrainError> + 'a;

/// Trains the parameters of `module` that require a gradient on a mixture of sources, and returns it with a report.
///
/// `loss` returns the mean loss `[1]` of a batch ([`Batch::mean`]), auxiliary losses included. With `held_out` the run may end
/// early ([`TrainConfig::patience`]), and the parameters returned are those whose held-out loss was lowest.
///
/// With [`TrainConfig::out`] there is `log.jsonl` in that folder (step, loss, learning rate, norm of the gradients before
/// clipping, tokens so far: no times, so that equal runs have equal files), and a checkpoint, written on
/// cancellation too; with `held_out` the best parameters so far in `best.safetensors`. With `resume` a run goes on from its
/// checkpoint, bit for bit as if it had not stopped, or starts if there is none.
///
/// # Errors
/// Settings or data that cannot work, a group that no trainable parameter belongs to, a module with nothing to train, a
/// loss that is not finite, a folder that is occupied or belongs to another run, files that cannot be read or written,
/// cancellation.
///
/// # Panics
/// If `loss` returns other than one number.
pub fn fit_mixture<M: Module>(
    module: M,
    config: &TrainConfig,
    data: &Mixture<'_>,
    loss: &mut Loss<'_, M>,
    held_out: Option<&mut HeldOutLoss<'_, M>>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(M, TrainReport), TrainError> {
    if config.recompute {
        let problems = vec!["`recompute`: this loss can't be taken block by block".into()];
        return Err(TrainError::Config { problems });
    }
    let pass = &mut |module: &M, batch: &Batch, seed: Seed, passes: usize| {
        let mean = loss(module, batch, seed);
        assert_eq!(mean.dims(), [1], "a loss is one number");
        let part = if passes == 1 { mean } else { mean / passes as f64 };
        if !part.is_tracked() {
            return None;
        }
        let gradients = GradientsParams::from_grads(part.backward(), module);
        Some((part.inner(), gradients))
    };
    fit_passes(module, config, data, pass, held_out, progress, resume)
}

/// A pass of a step: takes the module, what to compute on, a seed of this pass and the number of passes in a step; returns the
/// loss divided by that number, outside autodiff, and its gradients, or nothing if it depends on no parameter.
pub type Pass<'a, M> = dyn FnMut(&M, &Batch, Seed, usize) -> Option<(Tensor<1>, GradientsParams)> + 'a;

/// [`fit_mixture`] for a loss that takes its gradients itself, such as [`crate::recompute`].
///
/// # Errors
/// As [`fit_mixture`].
pub fn fit_passes<M: Module>(
    module: M,
    config: &TrainConfig,
    data: &Mixture<'_>,
    pass: &mut Pass<'_, M>,
    mut held_out: Option<&mut HeldOutLoss<'_, M>>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(M, TrainReport), TrainError> {
    let begin = Instant::now();
    config.check()?;
    let mut problems = Vec::new();
    let wide = |(_, rows): &&(String, crate::Rows<'_>)| rows.window() != config.window;
    if let Some((_, rows)) = data.sources().iter().find(wide) {
        problems.push(format!("`window` is {}, the data has rows of {}", config.window, rows.window()));
    }
    if held_out.is_none() && (config.patience.is_some() || config.eval_every > 0) {
        problems.push("`eval_every` and `patience` need held-out data".into());
    }
    let seed = Seed(config.seed);
    let mut sampler = data.sampler(seed, config.steps, config.batch * config.accumulate);
    // Row-major from the start, as after a step or a resumption: the layout may change the order of a sum.
    let mut module = map_trainable(module, &mut |_, values| values);
    let parameters = trainable(&module);
    let device = parameters.first().map(|p| p.device.clone()).ok_or(TrainError::NothingToTrain)?;
    let groups = config.groups.iter().map(|g| ("groups", &g.params)).enumerate();
    let exclude = config.exclude.iter().map(|g| ("exclude", g)).enumerate();
    for (i, (name, group)) in groups.chain(exclude) {
        if !parameters.iter().any(|p| group.matches(&p.id, Some(&p.path))) {
            problems.push(format!("`{name}[{i}]` matches no trainable parameter: {group:?}"));
        }
    }
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    drop(parameters);
    let rule = config.rule();
    let mut memory = Memory::new();
    let mut state = State {
        step: 0,
        tokens: 0,
        config: config.identity(),
        data: data.digest().to_string(),
        identity: config.identity.clone(),
        updates: Default::default(),
        losses: Vec::new(),
        held_out: Vec::new(),
    };
    let mut log = None;
    let mut kept: Option<M> = None;
    if let Some(out) = &config.out {
        if let Some((folder, saved)) = checkpoint::latest(out)? {
            if !resume {
                return Err(TrainError::Occupied { path: out.clone(), step: saved.step });
            }
            let problems = differences(&saved, &state);
            if !problems.is_empty() {
                return Err(TrainError::Resume { path: folder, problems });
            }
            if !saved.held_out.is_empty() {
                kept = Some(checkpoint::load_best(out, module.clone())?);
            }
            (module, memory) = checkpoint::load(&folder, &saved, module, rule.has_second())?;
            state = saved;
        }
        fs::create_dir_all(out).map_err(|e| TrainError::io(out, e))?;
        log = Some(Log::open(out.join("log.jsonl"), state.step, resume)?);
    }
    let evaluates = held_out.is_some();
    // Takes the held-out loss where it is due and not known yet, and keeps the best parameters.
    let mut evaluate = |module: &M, state: &mut State| -> Result<(), TrainError> {
        let Some(held_out) = held_out.as_deref_mut() else { return Ok(()) };
        let known = state.held_out.last().is_some_and(|last| last.step == state.step);
        if known || !config.evaluates(state.step) {
            return Ok(());
        }
        let (step, loss) = (state.step, held_out(module)?);
        if !loss.is_finite() {
            return Err(TrainError::NotFinite { step, what: "held-out loss", value: loss });
        }
        let lowest = best(&state.held_out).is_none_or(|best| loss < best.loss);
        state.held_out.push(HeldOut { step, loss });
        if lowest {
            kept = Some(module.clone());
            if let Some(out) = &config.out {
                checkpoint::save_best(out, module)?;
            }
        }
        let how = if lowest { ", the lowest so far" } else { "" };
        progress.on(Event::Note(&format!("step {step}: held-out loss {loss:.4}{how}")));
        Ok(())
    };

    let mut saved = state.step;
    let mut task = Task::begin(progress, "train", Some(config.steps as u64), "steps");
    let mut stopped =
        if state.step > 0 { task.advance(state.step as u64, "resumed") } else { progress.check() };
    if stopped.is_ok() {
        evaluate(&module, &mut state)?;
    }
    let (mut seconds, before) = (0.0, state.tokens);
    while state.step < config.steps && stopped.is_ok() && !exhausted(&state.held_out, config.patience) {
        let clock = Instant::now();
        let step = state.step + 1;
        let rows: Vec<_> = sampler.step(state.step).into_iter().map(|at| data.row(at)).collect();
        let weight: f64 = rows.iter().map(|row| row.weight()).sum();
        let mut accumulator = GradientsAccumulator::new();
        let mut total: Option<Tensor<1>> = None;
        for (i, rows) in rows.chunks(config.batch).enumerate() {
            let number = state.step * config.accumulate + i;
            let batch = Batch::new(rows, weight / config.accumulate as f64, &device);
            let seed = seed.derive(&format!("step/{number}"));
            let passed = ops::awake(&device, || pass(&module, &batch, seed, config.accumulate));
            let Some((part, gradients)) = passed else { return Err(TrainError::Untracked { step }) };
            accumulator.accumulate(&module, gradients);
            total = Some(match total {
                Some(sum) => sum + part,
                None => part,
            });
        }
        let gradients = accumulator.grads();
        let (gradients, norm) = match config.clip {
            Some(max_norm) => clip_global_norm(&module, gradients, max_norm),
            None => {
                let norm = global_norm(&module, &gradients);
                (gradients, norm)
            }
        };
        let (Some(total), Some(norm)) = (total, norm) else { return Err(TrainError::Untracked { step }) };
        let learning_rate = config.learning_rate_at(state.step);
        module =
            ops::awake(&device, || optimizer::step(&*rule, &mut memory, learning_rate, module, gradients));

        let [value, norm] = read_back(total, norm)?;
        for (what, value) in [("loss", value), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(TrainError::NotFinite { step, what, value });
            }
        }
        state.step = step;
        state.tokens += (config.accumulate * config.batch * config.window) as u64;
        state.losses.push(value);
        if let Some(log) = log.as_mut().filter(|_| is_logged(step, config)) {
            log.write(&Line { step, loss: value, learning_rate, grad_norm: norm, tokens: state.tokens })?;
        }
        seconds += clock.elapsed().as_secs_f64();
        stopped = task.advance(1, &pace(value, (state.tokens - before) as f64 / seconds));
        if stopped.is_ok() {
            match evaluate(&module, &mut state) {
                Err(TrainError::Cancelled(cancelled)) => stopped = Err(cancelled),
                evaluated => evaluated?,
            }
        }
        if let Some(out) = &config.out {
            let due = config.checkpoint_every > 0 && step.is_multiple_of(config.checkpoint_every);
            let last = step == config.steps || exhausted(&state.held_out, config.patience);
            if due || last || stopped.is_err() {
                if let Some(log) = &log {
                    log.sync()?;
                }
                state.updates = memory.iter().map(|(p, m)| (p.clone(), m.updates)).collect();
                checkpoint::save(out, &module, &memory, &state)?;
                saved = step;
            }
        }
    }
    debug_assert!(config.out.is_none() || saved == state.step);
    let evaluated = !evaluates || state.held_out.last().is_some_and(|last| last.step == state.step);
    let ended = state.step >= config.steps && evaluated;
    if !ended && !exhausted(&state.held_out, config.patience) {
        stopped?;
    }
    let best_step = best(&state.held_out).map(|best| best.step);
    let State { step: steps, tokens, losses, held_out, .. } = state;
    let seconds = begin.elapsed().as_secs_f64();
    let report = TrainReport { steps, tokens, losses, seconds, held_out, best_step };
    Ok((kept.unwrap_or(module), report))
}

/// What is told of a step: its loss, tokens per second, and the memory of the process where the system tells it.
fn pace(loss: f64, speed: f64) -> String {
    let memory = resident_bytes().map_or(String::new(), |bytes| format!(", {} MiB", bytes >> 20));
    format!("loss {loss:.4}, {speed:.0} tokens/s{memory}")
}

fn is_logged(step: usize, config: &TrainConfig) -> bool {
    step == 1 || step == config.steps || (config.log_every > 0 && step.is_multiple_of(config.log_every))
}

/// The two numbers, in one read-back.
fn read_back(loss: Tensor<1>, norm: Tensor<1>) -> Result<[f64; 2], TrainError> {
    let read = Transaction::default().register(loss).register(norm).try_execute();
    let read = read.map_err(|e| TrainError::Device(e.to_string()))?;
    let number = |data: &TensorData| data.iter::<f64>().next().unwrap_or(f64::NAN);
    Ok([number(&read[0]), number(&read[1])])
}

/// What differs between a checkpoint and the run that wants to go on from it.
fn differences(saved: &State, now: &State) -> Vec<String> {
    let empty = serde_json::Map::new();
    let (before, after) =
        (saved.config.as_object().unwrap_or(&empty), now.config.as_object().unwrap_or(&empty));
    let mut fields: Vec<&String> = before.keys().chain(after.keys()).collect();
    fields.sort();
    fields.dedup();
    let show = |value: Option<&serde_json::Value>| value.map_or("absent".into(), |v| v.to_string());
    let mut problems: Vec<String> = fields
        .into_iter()
        .filter(|&f| before.get(f) != after.get(f))
        .map(|f| {
            format!("`{f}` was {} in the checkpoint and is {} now", show(before.get(f)), show(after.get(f)))
        })
        .collect();
    if saved.data != now.data {
        problems.push("the training text is another one".into());
    }
    if saved.identity != now.identity {
        let show = |identity: &Option<String>| identity.clone().unwrap_or_else(|| "unknown".into());
        problems.push(format!(
            "what is trained over was `{}` in the checkpoint and is `{}` now",
            show(&saved.identity),
            show(&now.identity)
        ));
    }
    problems
}

#[derive(Serialize, Deserialize)]
struct Line {
    step: usize,
    loss: f64,
    learning_rate: f64,
    grad_norm: f64,
    tokens: u64,
}

struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log at `path` and drops what it has beyond `step`; another run's log is left alone.
    fn open(path: PathBuf, step: usize, resume: bool) -> Result<Self, TrainError> {
        let old = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            old => old.map_err(|e| TrainError::io(&path, e))?,
        };
        let lines = || {
            let lines = old.split_inclusive(|&b| b == b'\n');
            lines.map_while(|line| Some((serde_json::from_slice::<Line>(line).ok()?.step, line)))
        };
        if !resume && !old.is_empty() {
            let step = lines().last().map_or(0, |(step, _)| step);
            return Err(TrainError::Occupied { path, step });
        }
        let kept: Vec<u8> =
            lines().take_while(|(at, _)| *at <= step).flat_map(|(_, line)| line).copied().collect();
        write_file(&path, &kept)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| TrainError::io(&path, e))?;
        Ok(Log { path, file })
    }

    fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        let mut text = serde_json::to_vec(line).expect("numbers are JSON");
        text.push(b'\n');
        self.file.write_all(&text).map_err(|e| TrainError::io(&self.path, e))
    }

    /// Returns when the lines have reached the disk: a checkpoint counts on those of its steps.
    fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(|e| TrainError::io(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked_all_at_once() {
        assert!(TrainConfig::default().problems().is_empty());
        let bad = TrainConfig {
            batch: 0,
            window: 1,
            learning_rate: f64::NAN,
            betas: [0.9, 1.0],
            clip: Some(0.0),
            eps: 1e-60,
            schedule: Schedule::Cosine { floor: 2.0 },
            exclude: vec![ParamGroup::all()],
            patience: Some(0),
            ..TrainConfig::default()
        };
        let problems = bad.problems().join("\n");
        let names = ["`batch`", "`window`", "`learning_rate`", "`betas`", "`clip`", "`eps`", "`schedule`"];
        for name in names.into_iter().chain(["`exclude`", "`patience`"]) {
            assert!(problems.contains(name), "{name} in {problems}");
        }
    }

    #[test]
    fn settings_read_with_defaults_and_refuse_unknown_names() {
        let config: TrainConfig =
            serde_json::from_str(r#"{"steps": 7, "schedule": "linear", "clip": null}"#).unwrap();
        assert_eq!((config.steps, config.schedule, config.clip), (7, Schedule::Linear, None));
        assert_eq!(config.batch, TrainConfig::default().batch);
        for (text, name) in [(r#"{"step": 7}"#, "`step`"), (r#"{"identity": "x"}"#, "`identity`")] {
            let error = serde_json::from_str::<TrainConfig>(text).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn optimizers_read_as_written_and_are_checked() {
        let read = |text: &str| serde_json::from_str::<TrainConfig>(text).unwrap();
        assert_eq!(read(r#"{"optimizer": "adamw"}"#).optimizer, Optimizer::AdamW);
        assert_eq!(read(r#"{"optimizer": {"lamb": {}}}"#).optimizer, Optimizer::Lamb { clamp: None });
        let lars = Optimizer::Lars { form: LarsForm::Paper, trust: 1e-3, clamp: Some([0.0, 10.0]) };
        assert_eq!(read(r#"{"optimizer": {"lars": {"form": "paper", "clamp": [0, 10]}}}"#).optimizer, lars);
        let text = serde_json::to_string(&TrainConfig { optimizer: lars, ..TrainConfig::default() }).unwrap();
        assert_eq!(read(&text).optimizer, lars);
        let plain = serde_json::to_string(&TrainConfig::default()).unwrap();
        assert!(!plain.contains("optimizer") && !plain.contains("eval"), "older checkpoints resume: {plain}");
        for bad in [
            Optimizer::Lamb { clamp: Some([2.0, 1.0]) },
            Optimizer::Lars { form: LarsForm::Original, trust: 0.0, clamp: None },
        ] {
            let problems = TrainConfig { optimizer: bad, ..TrainConfig::default() }.problems();
            assert!(problems.len() == 1 && problems[0].contains("`optimizer`"), "{problems:?}");
        }
    }

    #[test]
    fn patience_counts_from_the_lowest_loss() {
        let evals = |losses: &[f64]| -> Vec<HeldOut> {
            losses.iter().enumerate().map(|(i, &loss)| HeldOut { step: 10 * (i + 1), loss }).collect()
        };
        let falling = evals(&[3.0, 2.0, 1.0]);
        assert!(!exhausted(&falling, Some(1)) && !exhausted(&[], Some(1)));
        let rising = evals(&[3.0, 2.0, 2.0, 2.5]);
        assert_eq!(best(&rising).map(|b| b.step), Some(20), "equal is no lower");
        assert!(exhausted(&rising, Some(2)) && !exhausted(&rising, Some(3)) && !exhausted(&rising, None));
    }

    #[test]
    fn the_report_averages_the_tail() {
        let report =
            |n: usize| TrainReport { losses: (0..n).map(|i| i as f64).collect(), ..Default::default() };
        assert_eq!(report(0).final_loss(), None);
        assert_eq!(report(1).final_loss(), Some(0.0));
        assert_eq!(report(20).final_loss(), Some(18.5));
        assert_eq!(report(20).first_loss(), Some(0.0));
    }

    #[test]
    fn a_log_is_cut_at_the_step_and_at_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let line = |step| Line { step, loss: 0.1, learning_rate: 0.2, grad_norm: 0.3, tokens: 4 };
        let mut log = Log::open(path.clone(), 0, false).unwrap();
        (1..=4).for_each(|step| log.write(&line(step)).unwrap());
        let whole = fs::read(&path).unwrap();
        let occupied = Log::open(path.clone(), 0, false).map(drop).unwrap_err();
        assert!(matches!(occupied, TrainError::Occupied { step: 4, .. }), "{occupied}");
        assert_eq!(fs::read(&path).unwrap(), whole, "another run's log is left alone");
        let kept = |step| {
            drop(Log::open(path.clone(), step, true).unwrap());
            fs::read_to_string(&path).unwrap().lines().count()
        };
        assert_eq!(kept(3), 3);
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(kept(9), 3);
        assert_eq!(kept(0), 0);
    }
}
