//! The training loop.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor, TensorData, Transaction};
use firebrick_core::{Progress, Seed, Task};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, State, write_file};
use crate::clip::global_norm;
use crate::params::{map_trainable, trainable};
use crate::{AdamW, Batches, Group, Schedule, TextData, TrainError, clip_global_norm, token_tensor};

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
    /// Decay of the first and second moment of AdamW.
    pub betas: [f64; 2],
    /// Added to the root of AdamW's second moment; more than 0.
    pub eps: f64,
    /// Largest global norm of the gradients; none for no clipping.
    pub clip: Option<f64>,
    /// Parameters with a learning rate or weight decay of their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
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
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip: Some(1.0),
            groups: Vec::new(),
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
        for group in &self.groups {
            let values = [Some(group.learning_rate), group.weight_decay];
            let fine = values.into_iter().flatten().all(|v| v.is_finite() && v >= 0.0);
            check(fine, format!("`groups` has {values:?}"));
        }
        problems
    }

    /// The settings that must stay the same for a run to go on as if it had not stopped.
    fn identity(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("numbers and strings are JSON");
        let fields = value.as_object_mut().expect("an object");
        fields.remove("out");
        fields.remove("checkpoint_every");
        value
    }

    fn optimizer(&self) -> AdamW {
        AdamW {
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
            groups: self.groups.clone(),
            ..AdamW::default()
        }
    }
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

/// Trains the parameters of `module` that require a gradient, and returns it with a report.
///
/// `loss` takes the module, token ids `[batch, window]` on the module's device and a seed of this pass, and returns the mean
/// loss `[1]`, auxiliary losses included. Whatever else it needs (a frozen decoder, a teacher) it captures.
///
/// With [`TrainConfig::out`] there is `log.jsonl` in that folder (step, loss, learning rate, norm of the gradients before
/// clipping, tokens so far: no times, so that equal runs have equal files), and a checkpoint, written on
/// cancellation too. With `resume` a run goes on from its checkpoint, bit for bit as if it had not stopped, or
/// starts if there is none.
///
/// # Errors
/// Settings or a text that cannot work, a group that no trainable parameter belongs to, a module with nothing to train, a
/// loss that is not finite, a folder that is occupied or belongs to another run, files that cannot be read or written,
/// cancellation.
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
    let begin = Instant::now();
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    let seed = Seed(config.seed);
    let mut batches = Batches::new(data, config.window, config.batch, seed)?;
    // Row-major from the start, as after a step or a resumption: the layout may change the order of a sum.
    let mut module = map_trainable(module, &mut |_, values| values);
    let parameters = trainable(&module);
    let device = parameters.first().map(|p| p.device.clone()).ok_or(TrainError::NothingToTrain)?;
    let matched = |group: &Group| parameters.iter().any(|p| group.params.matches(&p.id, Some(&p.path)));
    let idle = config.groups.iter().enumerate().filter(|(_, group)| !matched(group));
    let problems: Vec<String> = idle
        .map(|(i, group)| format!("`groups[{i}]` matches no trainable parameter: {:?}", group.params))
        .collect();
    if !problems.is_empty() {
        return Err(TrainError::Config { problems });
    }
    drop(parameters);
    let mut optimizer = config.optimizer();
    let mut state = State {
        step: 0,
        tokens: 0,
        config: config.identity(),
        data: data.digest(),
        identity: config.identity.clone(),
        updates: Default::default(),
        losses: Vec::new(),
    };
    let mut log = None;
    if let Some(out) = &config.out {
        if let Some((folder, saved)) = checkpoint::latest(out)? {
            if !resume {
                return Err(TrainError::Occupied { path: out.clone(), step: saved.step });
            }
            let problems = differences(&saved, &state);
            if !problems.is_empty() {
                return Err(TrainError::Resume { path: folder, problems });
            }
            module = checkpoint::load(&folder, &saved, module, &mut optimizer)?;
            state = saved;
        }
        fs::create_dir_all(out).map_err(|e| TrainError::io(out, e))?;
        log = Some(Log::open(out.join("log.jsonl"), state.step, resume)?);
    }

    let mut saved = state.step;
    let mut task = Task::begin(progress, "train", Some(config.steps as u64), "steps");
    let mut stopped =
        if state.step > 0 { task.advance(state.step as u64, "resumed") } else { progress.check() };
    while state.step < config.steps && stopped.is_ok() {
        let step = state.step + 1;
        let mut accumulator = GradientsAccumulator::new();
        let mut total: Option<Tensor<1>> = None;
        for pass in 0..config.accumulate {
            let batch = state.step * config.accumulate + pass;
            let tokens = token_tensor(&batches.batch(batch), &device);
            let mean = loss(&module, tokens, seed.derive(&format!("step/{batch}")));
            assert_eq!(mean.dims(), [1], "a loss is one number");
            let part = if config.accumulate == 1 { mean } else { mean / config.accumulate as f64 };
            if !part.is_tracked() {
                return Err(TrainError::Untracked { step });
            }
            let gradients = GradientsParams::from_grads(part.backward(), &module);
            accumulator.accumulate(&module, gradients);
            let part = part.inner();
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
        module = optimizer.step(learning_rate, module, gradients);

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
        stopped = task.advance(1, &format!("loss {value:.4}"));
        if let Some(out) = &config.out {
            let due = config.checkpoint_every > 0 && step.is_multiple_of(config.checkpoint_every);
            if due || step == config.steps || stopped.is_err() {
                if let Some(log) = &log {
                    log.sync()?;
                }
                state.updates = optimizer.moments.iter().map(|(p, m)| (p.clone(), m.updates)).collect();
                checkpoint::save(out, &module, &optimizer, &state)?;
                saved = step;
            }
        }
    }
    debug_assert!(config.out.is_none() || saved == state.step);
    if state.step < config.steps {
        stopped?;
    }
    let State { step: steps, tokens, losses, .. } = state;
    Ok((module, TrainReport { steps, tokens, losses, seconds: begin.elapsed().as_secs_f64() }))
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
            ..TrainConfig::default()
        };
        let problems = bad.problems().join("\n");
        for name in ["`batch`", "`window`", "`learning_rate`", "`betas`", "`clip`", "`eps`", "`schedule`"] {
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
