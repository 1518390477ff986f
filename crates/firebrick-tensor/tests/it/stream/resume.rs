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

    // One tensor of one source changes in place of an equal header: only what reads it is computed again.
    let done = interrupted_over(&a, &b, &target, 8);
    let (offset, mut bytes) =
        (b.tensor("norm.weight").unwrap().offset as usize, std::fs::read(&path_b).unwrap());
    bytes[offset + 3] ^= 1;
    std::fs::write(folder.path().join("new"), &bytes).unwrap();
    std::fs::rename(folder.path().join("new"), &path_b).unwrap();
    let changed = Checkpoint::open(&path_b).unwrap();
    let blend = Blend::new(&a, &changed, 0.25);
    let report = executor.run(&blend, &target).unwrap();
    assert_eq!((report.resumed_parts, blend.computed()), (done - 1, 9 - (done - 1)));
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
