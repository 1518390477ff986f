//! Held-out losses: early stopping, and the best parameters.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use burn::tensor::Device;
use firebrick_core::{Cancelled, Event, Progress, Run, Silent};
use firebrick_models::Decoder;
use firebrick_train::{
    Average, Batch, Document, HeldOut, Mixture, Rows, TrainConfig, TrainError, TrainReport, dmt, fit_mixture,
    held_out_loss, perplexity,
};

use crate::resume::{StopAfter, files};
use crate::tiny::{VOCAB, bits, decoder, noise, pattern, settings, trainable};

fn train(
    config: &TrainConfig,
    held_out: &mut dyn FnMut(&Decoder) -> Result<f64, TrainError>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Decoder, TrainReport), TrainError> {
    let text = noise(700);
    let mixture = Mixture::text(&text, 16).unwrap();
    let loss = &mut |decoder: &Decoder, batch: &Batch, _| batch.nll(decoder, &mut Run::default());
    fit_mixture(trainable(), config, &mixture, loss, Some(held_out), progress, resume)
}

#[test]
fn a_run_ends_when_patience_does_and_returns_its_best() {
    let losses = [3.0, 2.0, 2.5, 2.0, 1.0, 0.5];
    let config = TrainConfig { eval_every: 2, patience: Some(2), ..settings(11) };
    let run = |config: &TrainConfig| {
        let mut seen = Vec::new();
        let mut held_out = |decoder: &Decoder| {
            seen.push(bits(decoder));
            Ok(losses[seen.len() - 1])
        };
        let (model, report) = train(config, &mut held_out, &Silent, false).unwrap();
        (bits(&model), report, seen)
    };
    let (model, report, seen) = run(&config);
    let at = |step, loss| HeldOut { step, loss };
    assert_eq!(report.held_out, [at(2, 3.0), at(4, 2.0), at(6, 2.5), at(8, 2.0)]);
    assert_eq!((report.steps, report.best_step), (8, Some(4)));
    assert_eq!(model, seen[1]);
    assert_ne!(model, seen[3], "control: the last parameters are others");
    let (model, report, seen) = run(&TrainConfig { patience: Some(3), ..config.clone() });
    assert_eq!((report.steps, report.best_step), (11, Some(11)), "patience 3 lasts to the end");
    assert_eq!(model, seen[5]);
    let (_, report, _) = run(&TrainConfig { eval_every: 0, patience: None, ..config });
    assert_eq!(report.held_out, [at(11, 3.0)], "the last step alone");
}

#[test]
fn an_interrupted_run_keeps_its_best() {
    let text = pattern(64);
    let rows = Rows::windows(&text, 16).unwrap();
    let run = |out: &Path, progress: &dyn Progress, resume: bool| {
        let out = Some(out.to_path_buf());
        let config = TrainConfig { eval_every: 3, out, checkpoint_every: 4, ..settings(14) };
        let mut held_out = |decoder: &Decoder| held_out_loss(decoder, &[], &rows, 2, &Silent);
        train(&config, &mut held_out, progress, resume)
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (model, report) = run(whole.path(), &Silent, false).unwrap();
    for stop in [6, 7] {
        run(parts.path(), &StopAfter::new(stop), true).unwrap_err();
    }
    let (resumed, again) = run(parts.path(), &Silent, true).unwrap();
    assert_eq!(bits(&resumed), bits(&model));
    assert_eq!(again.held_out, report.held_out);
    assert_eq!(report.held_out.len(), 5);
    assert_eq!(files(parts.path()), files(whole.path()));
    assert!(whole.path().join("best.safetensors").is_file());

    // A finished run returns the same again, without its file it can't.
    assert_eq!(bits(&run(parts.path(), &Silent, true).unwrap().0), bits(&model));
    fs::remove_file(parts.path().join("best.safetensors")).unwrap();
    let error = run(parts.path(), &Silent, true).unwrap_err().to_string();
    assert!(error.contains("best.safetensors"), "{error}");
}

#[test]
fn the_held_out_loss_is_the_perplexitys_and_masks_count() {
    let decoder = decoder(&Device::flex());
    let text = noise(107);
    let rows = Rows::windows(&text, 10).unwrap();
    let report = perplexity(&decoder, &[], &text.ids, 0, 10, 4, &Silent).unwrap();
    let loss = held_out_loss(&decoder, &[], &rows, 3, &Silent).unwrap();
    assert!((loss - report.mean_nll).abs() < 1e-6, "{loss} {}", report.mean_nll);

    let document = |learn: std::ops::Range<usize>| Document {
        ids: text.ids[..12].to_vec(),
        learn: (0..12).map(|i| learn.contains(&i)).collect(),
        bytes: 12,
    };
    let of = |documents: &[Document]| {
        let rows = Rows::pack(documents, 30, 0, Average::Token).unwrap();
        held_out_loss(&decoder, &[], &rows, 1, &Silent).unwrap()
    };
    let (head, tail) = (of(&[document(1..5)]), of(&[document(5..12)]));
    let all = of(&[document(1..12)]);
    assert!((all - (4.0 * head + 7.0 * tail) / 11.0).abs() < 1e-6);
    assert!((head - tail).abs() > 1e-4);
    assert!((of(&[document(1..5), document(5..12)]) - all).abs() < 1e-6, "two in one row");

    let unknown = Document { ids: vec![1, VOCAB], learn: vec![true; 2], bytes: 2 };
    let rows = Rows::pack(&[unknown], 4, 0, Average::Token).unwrap();
    let error = held_out_loss(&decoder, &[], &rows, 1, &Silent).unwrap_err();
    assert!(matches!(error, TrainError::UnknownToken { id: VOCAB, .. }), "{error}");
}

#[test]
fn settings_without_what_they_need_are_refused() {
    let text = noise(100);
    let run = |config: TrainConfig, window| {
        let mixture = Mixture::text(&text, window).unwrap();
        let loss = &mut |decoder: &Decoder, batch: &Batch, _| batch.nll(decoder, &mut Run::default());
        fit_mixture(trainable(), &config, &mixture, loss, None, &Silent, false).unwrap_err().to_string()
    };
    let error = run(TrainConfig { patience: Some(1), ..settings(1) }, 10);
    assert!(error.contains("need held-out data") && error.contains("rows of 10"), "{error}");
    assert!(run(TrainConfig { recompute: true, ..settings(1) }, 16).contains("`recompute`"));
    let error = train(&settings(1), &mut |_| Ok(f64::NAN), &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { what: "held-out loss", .. }), "{error}");
    let error = train(&settings(1), &mut |_| Err(Cancelled.into()), &Silent, false).unwrap_err();
    assert!(matches!(error, TrainError::Cancelled(_)), "{error}");
}

#[test]
fn progress_tells_loss_speed_and_held_out_losses() {
    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);
    impl Progress for Notes {
        fn on(&self, event: Event<'_>) {
            match event {
                Event::Advance { note, .. } | Event::Note(note) => self.0.lock().unwrap().push(note.into()),
                _ => {}
            }
        }
    }
    let notes = Notes::default();
    train(&settings(2), &mut |_| Ok(1.5), &notes, false).unwrap();
    let notes = notes.0.into_inner().unwrap();
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[0].starts_with("loss ") && notes[0].contains(" tokens/s"), "{notes:?}");
    assert_eq!(cfg!(target_os = "linux"), notes[0].contains(" MiB"), "{notes:?}");
    assert_eq!(notes[2], "step 2: held-out loss 1.5000, the lowest so far");
}

#[test]
fn two_stages_of_packed_documents_train_and_resume() {
    let documents = |text: &[u32]| -> Vec<Document> {
        let cut = text.chunks(7).map(|ids| (ids.to_vec(), vec![true; ids.len()]));
        cut.map(|(ids, learn)| Document { bytes: ids.len(), ids, learn }).collect()
    };
    let pack = |ids: &[u32]| Rows::pack(&documents(ids), 16, 0, Average::Token).unwrap();
    let sources =
        || vec![("code".into(), pack(&pattern(300).ids)), ("general".into(), pack(&noise(300).ids))];
    let mixture = Mixture::new(sources(), dmt(&["code"], &["general"], 0.25)).unwrap();
    let run = |out: &Path, progress: &dyn Progress, resume: bool| {
        let out = Some(out.to_path_buf());
        let config = TrainConfig { out, accumulate: 2, batch: 2, ..settings(12) };
        let loss = &mut |decoder: &Decoder, batch: &Batch, _| batch.nll(decoder, &mut Run::default());
        fit_mixture(trainable(), &config, &mixture, loss, None, progress, resume)
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_, report) = run(whole.path(), &Silent, false).unwrap();
    // The pattern is learned in the first stage; in the second there is noise to guess.
    assert!(
        report.losses[4] < report.losses[0] && report.losses[11] > report.losses[4],
        "{:?}",
        report.losses
    );
    run(parts.path(), &StopAfter::new(7), false).unwrap_err();
    run(parts.path(), &Silent, true).unwrap();
    assert_eq!(files(parts.path()), files(whole.path()));

    let other = Mixture::new(sources(), dmt(&["code"], &["general"], 0.5)).unwrap();
    let config = TrainConfig { out: Some(parts.path().into()), accumulate: 2, batch: 2, ..settings(12) };
    let loss = &mut |decoder: &Decoder, batch: &Batch, _| batch.nll(decoder, &mut Run::default());
    let error = fit_mixture(trainable(), &config, &other, loss, None, &Silent, true).unwrap_err();
    assert!(error.to_string().contains("text is another one"), "{error}");
}
