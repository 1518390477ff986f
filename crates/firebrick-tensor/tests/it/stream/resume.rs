//! Runs that were interrupted, changed or damaged.

use super::*;

#[test]
fn an_interrupted_run_goes_on_with_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let a = model(&folder.path().join("a.safetensors"), 1);
    let b = model(&folder.path().join("b.safetensors"), 2);
    let parts = 9;
    let whole = Target::folder(folder.path().join("whole/out"));
    Executor::default().run(&Blend::new(&a, &b, 0.25), &whole).unwrap();
    for (k, threads) in [(0, 1), (1, 1), (3, 1), (8, 1), (4, 3)] {
        let path = folder.path().join(format!("cut-{k}-{threads}"));
        let target = Target::folder(path.join("out"));
        let steps = Steps::new(k);
        let mut first = Blend::new(&a, &b, 0.25);
        first.steps = (threads == 1).then_some(&steps);
        let executor = Executor { threads: Some(threads), progress: &steps, ..Executor::default() };
        let error = executor.run(&first, &target).unwrap_err();
        assert!(matches!(error, StreamError::Cancelled(_)), "{error}");
        assert!(!target.path().exists());
        assert_eq!(path.exists(), k > 0, "nothing finished, nothing left");
        if threads == 1 {
            assert!((k..=k + 1).contains(&first.computed()), "{k}: {}", first.computed());
        }
        let second = Blend::new(&a, &b, 0.25);
        let report = Executor::default().run(&second, &target).unwrap();
        assert_eq!(first.computed() + second.computed(), parts, "each part once");
        assert_eq!((report.resumed_parts, report.computed_parts), (first.computed(), second.computed()));
        assert_eq!(contents(target.path()), contents(whole.path()));
        assert_eq!(entries(&path), ["out"]);
    }
}

/// Leaves a staging folder with `k` finished parts (or one more) of a blend with weight 0.25.
fn interrupted(a: &Checkpoint, b: &Checkpoint, target: &Target, k: usize) -> usize {
    let steps = Steps::new(k);
    let mut blend = Blend::new(a, b, 0.25);
    blend.steps = Some(&steps);
    let executor = Executor { threads: Some(1), progress: &steps, ..Executor::default() };
    assert!(matches!(executor.run(&blend, target), Err(StreamError::Cancelled(_))));
    blend.computed()
}

#[test]
fn other_settings_or_sources_are_computed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (path_a, path_b) = (folder.path().join("a.safetensors"), folder.path().join("b.safetensors"));
    let (a, b) = (model(&path_a, 1), model(&path_b, 2));
    let target = Target::folder(folder.path().join("out"));
    interrupted(&a, &b, &target, 5);
    let other = Blend::new(&a, &b, 0.75);
    let executor = Executor { overwrite: true, ..Executor::default() };
    let report = executor.run(&other, &target).unwrap();
    assert_eq!((report.resumed_parts, other.computed()), (0, 9));
    // Without `resume` an interrupted run is thrown away.
    interrupted_over(&a, &b, &target, 5);
    let same = Blend::new(&a, &b, 0.25);
    let fresh = Executor { resume: false, ..executor };
    assert_eq!(fresh.run(&same, &target).unwrap().resumed_parts, 0);
    let expected = contents(target.path())["model.safetensors"].clone();

    // One tensor of one source changes in place of an equal header, and the file takes the time of the old one.
    interrupted_over(&a, &b, &target, 8);
    let time = std::fs::metadata(&path_b).unwrap().modified().unwrap();
    let (offset, mut bytes) =
        (b.tensor("norm.weight").unwrap().offset as usize, std::fs::read(&path_b).unwrap());
    bytes[offset + 3] ^= 1;
    std::fs::write(folder.path().join("new"), &bytes).unwrap();
    let options = std::fs::OpenOptions::new().append(true).to_owned();
    options.open(folder.path().join("new")).unwrap().set_modified(time).unwrap();
    std::fs::rename(folder.path().join("new"), &path_b).unwrap();
    let changed = Checkpoint::open(&path_b).unwrap();
    let blend = Blend::new(&a, &changed, 0.25);
    let report = executor.run(&blend, &target).unwrap();
    assert_eq!((report.resumed_parts, blend.computed()), (0, 9));
    assert_ne!(contents(target.path())["model.safetensors"], expected);
}

/// As [`interrupted`], over an output that exists.
fn interrupted_over(a: &Checkpoint, b: &Checkpoint, target: &Target, k: usize) -> usize {
    let before = contents(target.path());
    std::fs::rename(target.path(), target.path().with_extension("aside")).unwrap();
    let computed = interrupted(a, b, target, k);
    std::fs::rename(target.path().with_extension("aside"), target.path()).unwrap();
    assert_eq!(contents(target.path()), before);
    computed
}

#[test]
fn damaged_staging_is_found_and_redone() {
    let folder = tempfile::tempdir().unwrap();
    let a = model(&folder.path().join("a.safetensors"), 1);
    let b = model(&folder.path().join("b.safetensors"), 2);
    let whole = Target::folder(folder.path().join("whole/out"));
    Executor::default().run(&Blend::new(&a, &b, 0.25), &whole).unwrap();
    let expected = contents(whole.path());
    type Damage = fn(&Path, &Path);
    fn change(path: &Path, f: impl Fn(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(path).unwrap();
        f(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }
    // What is damaged, and how many finished parts are lost by it; `None` for all.
    let damages: [(&str, Damage, Option<usize>); 7] = [
        ("nothing", |_, _| {}, Some(0)),
        ("a byte of the first tensor", |_, out| change(out, |b| b[5000] ^= 4), Some(1)),
        ("a torn last line", |journal, _| change(journal, |b| b.truncate(b.len() - 20)), Some(1)),
        ("garbage behind the journal", |journal, _| change(journal, |b| b.extend(b"\xff{\n{}\n")), Some(0)),
        ("no journal", |journal, _| std::fs::remove_file(journal).unwrap(), None),
        ("a short file", |_, out| change(out, |b| b.truncate(b.len() - 1)), None),
        ("the header of the file", |_, out| change(out, |b| b[9] ^= 1), None),
    ];
    for (what, damage, lost) in damages {
        let target = Target::folder(folder.path().join("out"));
        let done = interrupted(&a, &b, &target, 4);
        let staging = folder.path().join(".out.partial");
        damage(&staging.join("journal.jsonl"), &staging.join("out/model.safetensors"));
        let blend = Blend::new(&a, &b, 0.25);
        let report = Executor::default().run(&blend, &target).unwrap();
        assert_eq!(report.resumed_parts, lost.map_or(0, |lost| done - lost), "{what}");
        assert_eq!(contents(target.path()), expected, "{what}");
        assert!(!staging.exists());
        std::fs::remove_dir_all(target.path()).unwrap();
    }
}

#[test]
fn an_old_output_survives_a_crash_between_the_renames() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::folder(folder.path().join("out"));
    Executor::default().run(&Convert::copy("a", &source), &target).unwrap();
    let before = contents(target.path());
    let staging = folder.path().join(".out.partial");
    std::fs::create_dir_all(staging.join("out")).unwrap();
    std::fs::rename(target.path(), staging.join("old")).unwrap();
    let refused = Executor::default().run(&Convert::copy("a", &source), &target);
    assert!(matches!(refused, Err(StreamError::Exists { .. })), "{refused:?}");
    assert_eq!(contents(target.path()), before);
}

#[test]
fn an_old_output_and_something_in_its_place_are_both_kept() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::folder(folder.path().join("out"));
    let staging = folder.path().join(".out.partial");
    for name in ["out", "old"] {
        std::fs::create_dir_all(staging.join(name)).unwrap();
    }
    std::fs::write(staging.join("old/mine"), "").unwrap();
    std::fs::create_dir(target.path()).unwrap();
    let executor = Executor { overwrite: true, ..Executor::default() };
    let refused = executor.run(&Convert::copy("a", &source), &target);
    assert!(
        matches!(&refused, Err(StreamError::Exists { path }) if path.ends_with(".out.partial/old")),
        "{refused:?}"
    );
    assert!(staging.join("old/mine").exists());
}

#[test]
fn what_comes_to_exist_while_a_run_computes_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let path = folder.path().join("out");
    let spec = source.tensor("norm.weight").unwrap().spec();
    let run = |side_file: &str, overwrite: bool, meanwhile: Option<&str>| {
        let odd = Odd {
            source: &source,
            spec: OutputSpec::elementwise(spec.clone(), vec![(0, "norm.weight".into())]),
            compute: |job: &mut Job<'_>| {
                if let Some(name) = meanwhile {
                    std::fs::create_dir_all(&path).unwrap();
                    std::fs::write(path.join(name), "mine").unwrap();
                }
                job.copy()
            },
        };
        let side_files = vec![(side_file.to_owned(), Vec::new())];
        let target = Target::Folder { path: path.clone(), stem: "model".into(), side_files };
        Executor { overwrite, ..Executor::default() }.run(&odd, &target)
    };
    let refused = run("first.json", false, Some("notes.txt"));
    assert!(matches!(refused, Err(StreamError::Exists { .. })), "{refused:?}");
    assert_eq!(entries(&path), ["notes.txt"]);
    assert_eq!(entries(folder.path()), [".out.partial", "a.safetensors", "out"]);
    // What was computed is kept, and nothing of the first run's other files.
    std::fs::remove_dir_all(&path).unwrap();
    assert!(folder.path().join(".out.partial/out/first.json").exists());
    let report = run("second.json", false, None).unwrap();
    assert_eq!((report.resumed_parts, report.computed_parts), (1, 0));
    assert_eq!(entries(&path), ["README.md", "firebrick.json", "model.safetensors", "second.json"]);
    let refused = run("second.json", true, Some("notes.txt"));
    assert!(matches!(refused, Err(StreamError::WouldDelete { .. })), "{refused:?}");
    assert!(path.join("notes.txt").exists() && path.join("second.json").exists());
}

#[test]
fn a_gguf_file_and_its_provenance_appear_together() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::Gguf { path: folder.path().join("out.gguf"), metadata: Default::default() };
    let provenance = folder.path().join("out.gguf.firebrick.json");
    let run = || Executor::default().run(&Convert::copy("a", &source), &target);
    std::fs::write(&provenance, "mine").unwrap();
    let refused = run();
    assert!(matches!(&refused, Err(StreamError::Exists { path }) if *path == provenance), "{refused:?}");
    std::fs::remove_file(&provenance).unwrap();
    run().unwrap();
    // As if the run had died between the two renames; a run that only began over has an empty journal.
    let expected = std::fs::read(&provenance).unwrap();
    let staging = folder.path().join(".out.gguf.partial");
    for (journal, finished) in [("", false), ("a line\n", true)] {
        std::fs::create_dir_all(staging.join("out")).unwrap();
        std::fs::write(staging.join("journal.jsonl"), journal).unwrap();
        std::fs::rename(&provenance, staging.join("out/out.gguf.firebrick.json")).unwrap();
        assert!(matches!(run(), Err(StreamError::Exists { .. })));
        assert_eq!((provenance.exists(), staging.exists()), (finished, !finished));
        if !finished {
            std::fs::rename(staging.join("out/out.gguf.firebrick.json"), &provenance).unwrap();
        }
    }
    assert_eq!(std::fs::read(&provenance).unwrap(), expected);
    assert_eq!(entries(folder.path()), ["a.safetensors", "out.gguf", "out.gguf.firebrick.json"]);
}
