use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use firebrick_core::{Event, Progress, Silent};
use firebrick_models::Decoder;
use firebrick_train::{LarsForm, Optimizer, Schedule, TextData, TrainConfig, TrainError, TrainReport, fit};

use crate::tiny::{bits, loss, noise, pattern, settings, trainable};

/// Cancels after some steps.
pub struct StopAfter(usize, AtomicUsize);

impl StopAfter {
    pub fn new(steps: usize) -> Self {
        StopAfter(steps, AtomicUsize::new(0))
    }
}

impl Progress for StopAfter {
    fn on(&self, event: Event<'_>) {
        if let Event::Advance { done, .. } = event {
            self.1.store(done as usize, Ordering::Relaxed);
        }
    }
    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed) >= self.0
    }
}

fn train(out: &Path, progress: &dyn Progress, resume: bool) -> Result<(Decoder, TrainReport), TrainError> {
    let config = TrainConfig { out: Some(out.to_path_buf()), accumulate: 2, ..settings(12) };
    fit(trainable(), &config, &noise(700), &mut loss, progress, resume)
}

/// Every file below a folder, by path.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else {
            found.push((name, fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (model, report) = train(whole.path(), &Silent, false).unwrap();

    let stopped = train(parts.path(), &StopAfter::new(5), false).unwrap_err();
    assert!(matches!(stopped, TrainError::Cancelled(_)), "{stopped}");
    assert!(parts.path().join("checkpoint-00000005/state.json").is_file());
    let (resumed, resumed_report) = train(parts.path(), &Silent, true).unwrap();

    assert_eq!(bits(&resumed), bits(&model));
    assert_eq!((resumed_report.steps, resumed_report.tokens), (12, report.tokens));
    assert_eq!(resumed_report.losses, report.losses);
    let names: Vec<_> = files(whole.path()).into_iter().map(|(name, _)| name).collect();
    let folder = "checkpoint-00000012";
    assert_eq!(
        names,
        [
            format!("{folder}/model.safetensors"),
            format!("{folder}/optimizer.safetensors"),
            format!("{folder}/state.json"),
            "log.jsonl".into()
        ]
    );
    assert_eq!(files(parts.path()), files(whole.path()), "log, parameters, moments and state");

    let (done, _) = train(parts.path(), &Silent, true).unwrap();
    assert_eq!(bits(&done), bits(&model), "a finished run has nothing left to do");

    // Control: a run that goes on without its moments ends elsewhere.
    let forgetful = tempfile::tempdir().unwrap();
    train(forgetful.path(), &StopAfter::new(5), false).unwrap_err();
    let path = forgetful.path().join("checkpoint-00000005/state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["updates"] = serde_json::json!({});
    fs::write(&path, state.to_string()).unwrap();
    let (other, other_report) = train(forgetful.path(), &Silent, true).unwrap();
    assert_ne!(bits(&other), bits(&model));
    assert_eq!(other_report.losses[..5], report.losses[..5]);
    assert_ne!(other_report.losses, report.losses);
}

#[test]
fn every_optimizer_resumes_bit_for_bit() {
    let lars = |form, trust| Optimizer::Lars { form, trust, clamp: None };
    let mut ends = Vec::new();
    for optimizer in [
        Optimizer::AdamW,
        Optimizer::Lamb { clamp: None },
        lars(LarsForm::Original, 0.5),
        lars(LarsForm::Paper, 0.5),
    ] {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = |out: &Path, progress: &dyn Progress, resume| {
            let config = TrainConfig { out: Some(out.into()), optimizer, ..settings(6) };
            fit(trainable(), &config, &pattern(700), &mut loss, progress, resume)
        };
        let (model, report) = run(whole.path(), &Silent, false).unwrap();
        assert!(report.losses[5] < report.losses[0], "{optimizer:?}: {:?}", report.losses);
        run(parts.path(), &StopAfter::new(3), false).unwrap_err();
        run(parts.path(), &Silent, true).unwrap();
        assert_eq!(files(parts.path()), files(whole.path()), "{optimizer:?}");
        ends.push(bits(&model));
    }
    let others = |i: usize| ends[i + 1..].iter().all(|end| *end != ends[i]);
    assert!((0..ends.len()).all(others), "control: they are different optimizers");
}

#[test]
fn a_folder_with_a_log_alone_is_occupied() {
    let folder = tempfile::tempdir().unwrap();
    let mut dying = |decoder: &Decoder, tokens, seed| loss(decoder, tokens, seed) * f32::NAN;
    let config = TrainConfig { out: Some(folder.path().to_path_buf()), ..settings(3) };
    fit(trainable(), &config, &noise(700), &mut dying, &Silent, false).unwrap_err();
    fit(trainable(), &config, &noise(700), &mut loss, &StopAfter::new(2), false).unwrap_err();
    fs::remove_dir_all(folder.path().join("checkpoint-00000002")).unwrap();
    let before = files(folder.path());
    let error = fit(trainable(), &config, &noise(700), &mut loss, &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::Occupied { step: 2, .. }), "{error}");
    assert_eq!(files(folder.path()), before);
    fit(trainable(), &config, &noise(700), &mut loss, &Silent, true).unwrap();
}

#[test]
fn a_run_over_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = |identity: Option<&str>| {
        let out = Some(folder.path().to_path_buf());
        let config = TrainConfig { identity: identity.map(String::from), out, ..settings(2) };
        fit(trainable(), &config, &noise(700), &mut loss, &Silent, true).map(drop)
    };
    run(Some("base 1, rank 4")).unwrap();
    run(Some("base 1, rank 4")).unwrap();
    for other in [Some("base 2, rank 4"), None] {
        let error = run(other).unwrap_err().to_string();
        assert!(error.contains("base 1, rank 4"), "{error}");
    }
}

#[test]
fn a_run_that_died_goes_on_from_its_last_checkpoint() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    train(whole.path(), &Silent, false).unwrap();

    let mut passes = 0;
    let mut dying = |decoder: &Decoder, tokens, seed| {
        passes += 1;
        loss(decoder, tokens, seed) * if passes > 17 { f32::NAN } else { 1.0 }
    };
    let out = Some(parts.path().to_path_buf());
    let config = TrainConfig { out, accumulate: 2, checkpoint_every: 3, ..settings(12) };
    let error = fit(trainable(), &config, &noise(700), &mut dying, &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 9, .. }), "{error}");
    let log = |folder: &Path| fs::read_to_string(folder.join("log.jsonl")).unwrap();
    assert_eq!(log(parts.path()).lines().count(), 8, "the log is ahead of the checkpoint");
    // What a crash while writing leaves behind.
    fs::create_dir(parts.path().join("checkpoint-00000009.partial")).unwrap();
    fs::write(parts.path().join("checkpoint-00000009.partial/model.safetensors"), b"half").unwrap();

    train(parts.path(), &Silent, true).unwrap();
    assert_eq!(log(parts.path()), log(whole.path()));
    let read = |folder: &Path, file| fs::read(folder.join("checkpoint-00000012").join(file)).unwrap();
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        assert_eq!(read(parts.path(), file), read(whole.path(), file), "{file}");
    }
    assert!(!parts.path().join("checkpoint-00000009.partial").exists());
}

#[test]
fn another_run_is_refused_with_every_difference() {
    let folder = tempfile::tempdir().unwrap();
    let out = Some(folder.path().to_path_buf());
    let config = TrainConfig { out, ..settings(2) };
    fit(trainable(), &config, &noise(700), &mut loss, &Silent, false).unwrap();
    let before = files(folder.path());
    let message = |config: &TrainConfig, data: &TextData, resume| {
        fit(trainable(), config, data, &mut loss, &Silent, resume).unwrap_err().to_string()
    };

    let occupied = message(&config, &noise(700), false);
    assert!(occupied.contains("holds a run up to step 2"), "{occupied}");
    let changed =
        TrainConfig { learning_rate: 0.5, schedule: Schedule::Linear, checkpoint_every: 1, ..config.clone() };
    let refused = message(&changed, &noise(700), true);
    assert!(refused.contains("`learning_rate` was 0.01 in the checkpoint and is 0.5 now"), "{refused}");
    assert!(refused.contains("`schedule`") && !refused.contains("checkpoint_every"), "{refused}");
    let other_text = message(&config, &pattern(700), true);
    assert!(other_text.contains("text is another one"), "{other_text}");

    let by = burn::module::Param::from_tensor(burn::tensor::Tensor::<1>::zeros(
        [3],
        &burn::tensor::Device::flex().autodiff(),
    ));
    let mut other = |by: &burn::module::Param<burn::tensor::Tensor<1>>, _, _| by.val().sum();
    let error = fit(by, &config, &noise(700), &mut other, &Silent, true).unwrap_err().to_string();
    assert!(error.contains("is not in the checkpoint") && error.contains("`embed`"), "{error}");
    assert_eq!(files(folder.path()), before, "a refusal leaves the folder alone");
}

#[test]
fn broken_checkpoints_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig { out: Some(folder.path().to_path_buf()), ..settings(2) };
    fit(trainable(), &config, &noise(700), &mut loss, &Silent, false).unwrap();
    let resume = || fit(trainable(), &config, &noise(700), &mut loss, &Silent, true).map(|_| ());
    resume().unwrap();
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        let path = folder.path().join("checkpoint-00000002").join(file);
        let whole = fs::read(&path).unwrap();
        for cut in [0, 7, whole.len() / 2] {
            fs::write(&path, &whole[..cut]).unwrap();
            let error = resume().unwrap_err().to_string();
            assert!(error.contains("checkpoint-00000002"), "{file} cut at {cut}: {error}");
        }
        fs::write(&path, &whole).unwrap();
    }
    resume().unwrap();
}
