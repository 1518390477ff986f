//! The streaming executor, run on small checkpoints in every way that could change or lose bytes.

mod resume;

use firebrick_core::{Event, Progress, Seed};
use firebrick_tensor::block::{self, DType};
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, Value, gguf, write_gguf, write_safetensors};
use firebrick_tensor::linalg::Matrix;
use firebrick_tensor::stream::{
    Convert, Executor, Job, OutputSpec, PROVENANCE_FILE, Source, StreamError, Target, Transform,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Enough elements for two parts and a bit.
const LARGE: usize = (4 << 20) + 3 * 8192 + 5;

fn encoded(spec: &TensorSpec, seed: u64) -> Vec<u8> {
    let elements = block::elements(&spec.shape).unwrap();
    let mut bytes = vec![0; spec.dtype.bytes_for(elements).unwrap()];
    if spec.dtype.is_real() {
        let values = Matrix::random_normal(1, elements.min(9000), Seed(seed), &spec.name).to_f32();
        let values: Vec<f32> = values.iter().copied().cycle().take(elements).collect();
        block::encode(spec.dtype, &values, &mut bytes).unwrap();
    } else {
        bytes.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 + 1) as u8);
    }
    bytes
}

fn with_data(specs: Vec<TensorSpec>, seed: u64) -> Vec<(TensorSpec, Vec<u8>)> {
    specs
        .into_iter()
        .map(|spec| {
            let bytes = encoded(&spec, seed);
            (spec, bytes)
        })
        .collect()
}

fn model(path: &Path, seed: u64) -> Checkpoint {
    let mut specs = vec![
        TensorSpec::new("embed.weight", DType::BF16, [300, 70]),
        TensorSpec::new("norm.weight", DType::F32, [70]),
        TensorSpec::new("scale", DType::F16, []),
        TensorSpec::new("empty", DType::F32, [0, 4]),
    ];
    specs.extend((0..6).map(|i| TensorSpec::new(format!("layers.{i}.up"), DType::BF16, [33, 70 + i])));
    write_safetensors(path, &Default::default(), &with_data(specs, seed)).unwrap();
    Checkpoint::open(path).unwrap()
}

fn large(path: &Path, seed: u64) -> Checkpoint {
    let specs = vec![
        TensorSpec::new("a", DType::BF16, [LARGE]),
        TensorSpec::new("b", DType::F32, [5, 20_000]),
        TensorSpec::new("c", DType::F16, [12]),
    ];
    write_safetensors(path, &Default::default(), &with_data(specs, seed)).unwrap();
    Checkpoint::open(path).unwrap()
}

/// Every file of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries
        .filter(|path| path.is_file())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

/// `weight a + (1 - weight) b`, counted, and able to fail, to panic and to wait for a [`Steps`].
struct Blend<'a> {
    sources: [&'a Checkpoint; 2],
    weight: f32,
    computed: AtomicUsize,
    fail: Option<&'static str>,
    panic: bool,
    scratch: u64,
    steps: Option<&'a Steps>,
    /// Jobs inside, the most that ever were, for how many the first ones wait, and until when.
    company: Option<(&'a AtomicUsize, &'a AtomicUsize, usize, Instant)>,
}

impl<'a> Blend<'a> {
    fn new(a: &'a Checkpoint, b: &'a Checkpoint, weight: f32) -> Self {
        let computed = AtomicUsize::new(0);
        let sources = [a, b];
        Blend { sources, weight, computed, fail: None, panic: false, scratch: 0, steps: None, company: None }
    }

    fn computed(&self) -> usize {
        self.computed.load(Ordering::SeqCst)
    }
}

impl Transform for Blend<'_> {
    fn name(&self) -> &str {
        "merge linear"
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let [a, b] = self.sources;
        vec![Source { name: "a".into(), checkpoint: a }, Source { name: "b".into(), checkpoint: b }]
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let both = |name: &str| vec![(0, name.to_owned()), (1, name.to_owned())];
        let tensors = self.sources[0].tensors().iter();
        Ok(tensors
            .map(|t| OutputSpec {
                scratch_bytes: self.scratch,
                ..OutputSpec::elementwise(t.spec(), both(&t.name))
            })
            .collect())
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::json!({ "weight": self.weight })
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let before = self.computed.fetch_add(1, Ordering::SeqCst);
        if let Some((inside, most, company, until)) = self.company {
            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            while most.load(Ordering::SeqCst) < company && Instant::now() < until {
                std::thread::yield_now();
            }
            inside.fetch_sub(1, Ordering::SeqCst);
        }
        if let Some(steps) = self.steps {
            steps.wait_for(before);
        }
        assert!(!self.panic, "a bug in a transformation");
        if self.fail == Some(job.spec().tensor.name.as_str()) {
            return Err(StreamError::transform("out of luck"));
        }
        let w = self.weight;
        job.elementwise(|_, inputs, out| {
            for ((o, a), b) in out.iter_mut().zip(inputs[0]).zip(inputs[1]) {
                *o = w * a + (1.0 - w) * b;
            }
        })
    }
}

/// Cancels after some finished parts, and lets a transformation run in step with what was reported.
struct Steps {
    seen: AtomicUsize,
    stop_after: usize,
}

impl Steps {
    fn new(stop_after: usize) -> Self {
        Steps { seen: AtomicUsize::new(0), stop_after }
    }

    fn wait_for(&self, parts: usize) {
        while self.seen.load(Ordering::SeqCst) < parts {
            std::thread::yield_now();
        }
    }
}

impl Progress for Steps {
    fn on(&self, event: Event<'_>) {
        if matches!(event, Event::Advance { .. }) {
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn cancelled(&self) -> bool {
        self.seen.load(Ordering::SeqCst) >= self.stop_after
    }
}

#[test]
fn copying_safetensors_keeps_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("in.safetensors"), 1);
    let side_files = vec![("config.json".to_owned(), b"{}\n".to_vec())];
    let path = folder.path().join("deep/out");
    let target = Target::Folder { path: path.clone(), stem: "model".into(), side_files };
    let report = Executor::default().run(&Convert::copy("in", &source), &target).unwrap();
    let copy = Checkpoint::open(&path).unwrap();
    assert_eq!(copy.tensors().len(), source.tensors().len());
    for tensor in source.tensors() {
        assert_eq!(copy.tensor(&tensor.name).unwrap().spec(), tensor.spec());
        assert_eq!(copy.bytes(&tensor.name).unwrap(), source.bytes(&tensor.name).unwrap(), "{}", tensor.name);
    }
    // The writer of whole files makes the same file of the same tensors.
    assert_eq!(contents(&path)["model.safetensors"], std::fs::read(source.path()).unwrap());
    assert_eq!(entries(&path), ["README.md", "config.json", "firebrick.json", "model.safetensors"]);
    assert_eq!(entries(&folder.path().join("deep")), ["out"]);
    assert_eq!((report.resumed_parts, report.tensors), (0, 10));
}

#[test]
fn copying_gguf_keeps_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let specs = vec![
        TensorSpec::new("token_embd.weight", DType::Q8_0, [40, 96]),
        TensorSpec::new("output_norm.weight", DType::F32, [96]),
        TensorSpec::new("blk.0.ffn_up.weight", DType::Q4_0, [7, 96]),
        TensorSpec::new("ids", DType::I32, [3]),
    ];
    let mut metadata = gguf::Metadata::new();
    metadata.insert("general.architecture".into(), Value::String("llama".into()));
    metadata.insert("llama.block_count".into(), Value::U32(1));
    let path = folder.path().join("in.gguf");
    write_gguf(&path, &metadata, &with_data(specs, 5)).unwrap();
    let source = Checkpoint::open(&path).unwrap();
    let out = folder.path().join("out.gguf");
    let target = Target::Gguf { path: out.clone(), metadata: source.gguf().unwrap().metadata.clone() };
    Executor::default().run(&Convert::copy("in", &source), &target).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&path).unwrap());
    assert_eq!(entries(folder.path()), ["in.gguf", "out.gguf", "out.gguf.firebrick.json"]);
    // Dequantized on the way: the values are those of the blocks.
    let mut wide = Convert::copy("in", &source);
    wide.outputs.retain(|(spec, _)| spec.dtype.is_real());
    wide.outputs.iter_mut().for_each(|(spec, _)| spec.dtype = DType::F32);
    let target = Target::folder(folder.path().join("wide"));
    let plan = Executor::default().plan(&wide, &target).unwrap();
    assert_eq!(plan.unread, [("in".to_owned(), "ids".to_owned())]);
    Executor::default().run(&wide, &target).unwrap();
    let wide = Checkpoint::open(target.path()).unwrap();
    let name = "blk.0.ffn_up.weight";
    assert_eq!(wide.read_f32(name).unwrap(), source.read_f32(name).unwrap());
}

#[test]
fn threads_and_caps_do_not_change_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) =
        (large(&folder.path().join("a.safetensors"), 3), large(&folder.path().join("b.safetensors"), 4));
    let mut reference = None;
    for (threads, max_memory) in
        [(1, None), (1, Some(1 << 20)), (2, Some(1 << 20)), (4, None), (3, Some(300_000))]
    {
        let blend = Blend::new(&a, &b, 0.3);
        let target = Target::folder(folder.path().join("out"));
        let executor =
            Executor { threads: Some(threads), max_memory, overwrite: true, ..Executor::default() };
        let plan = executor.plan(&blend, &target).unwrap();
        let report = executor.run(&blend, &target).unwrap();
        assert!(report.peak_memory_bytes <= plan.peak_memory_bytes, "{report:?} {plan}");
        assert!(max_memory.is_none_or(|cap| report.peak_memory_bytes <= cap));
        assert_eq!((plan.parts, report.computed_parts), (4, 4));
        let files = contents(target.path());
        assert_eq!(
            &files,
            reference.get_or_insert_with(|| files.clone()),
            "{threads} threads, {max_memory:?}"
        );
    }
    // The values are the blend of the values, rounded once.
    let out = Checkpoint::open(folder.path().join("out")).unwrap();
    for (name, dtype) in [("a", DType::BF16), ("b", DType::F32)] {
        let (x, y) = (a.read_f32(name).unwrap(), b.read_f32(name).unwrap());
        assert_ne!(x, y, "control: two sources that differ");
        let blend: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 0.3 * x + (1.0 - 0.3) * y).collect();
        let mut expected = vec![0; dtype.bytes_for(blend.len()).unwrap()];
        block::encode(dtype, &blend, &mut expected).unwrap();
        assert!(out.bytes(name).unwrap() == expected, "{name}");
    }
}

#[test]
fn the_cap_bounds_what_is_in_flight() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let cap = 5 << 19;
    // Jobs wait for company, so that as many are in flight as the executor lets in.
    let run = |cap: Option<u64>, company: usize, patience: u64| {
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut blend = Blend::new(&source, &source, 0.5);
        blend.scratch = 1 << 20;
        let until = Instant::now() + Duration::from_millis(patience);
        blend.company = Some((&inside, &most, company, until));
        let target = Target::folder(folder.path().join("out"));
        let executor = Executor { threads: Some(8), max_memory: cap, overwrite: true, ..Executor::default() };
        let report = executor.run(&blend, &target)?;
        Ok((report.peak_memory_bytes, most.into_inner()))
    };
    let (all, jobs) = run(None, 4, 20_000).unwrap();
    assert!(all > cap && jobs >= 4, "control: without a cap {jobs} jobs take {all} bytes");
    let (capped, jobs) = run(Some(cap), 3, 500).unwrap();
    assert!((2 << 20..=cap).contains(&capped) && jobs == 2, "{jobs} jobs, {capped} bytes");
    // A tensor that can never fit is told before anything is written.
    std::fs::remove_dir_all(folder.path().join("out")).unwrap();
    let Err(StreamError::Plan { problems, .. }) = run(Some(1 << 20), 1, 0) else { panic!("it does not fit") };
    assert!(problems.iter().any(|p| p.contains("embed.weight")), "{problems:?}");
    assert_eq!(entries(folder.path()), ["a.safetensors"]);
}

#[test]
fn outputs_are_only_replaced_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let path = folder.path().join("out");
    let target = Target::folder(&path);
    std::fs::create_dir(&path).unwrap();
    let run = |overwrite: bool, weight: f32| {
        let blend = Blend::new(&source, &source, weight);
        let result = Executor { overwrite, ..Executor::default() }.run(&blend, &target);
        (result, blend.computed())
    };
    // An empty folder is no output.
    assert!(run(false, 0.5).0.is_ok());
    let before = contents(&path);
    let (refused, computed) = run(false, 0.6);
    assert!(matches!(refused, Err(StreamError::Exists { .. })) && computed == 0);
    let plan = Executor::default().plan(&Blend::new(&source, &source, 0.6), &target).unwrap();
    assert!(plan.problems.iter().any(|p| p.ends_with("exists already")), "{plan}");
    assert!(run(true, 0.6).0.is_ok());
    assert_ne!(contents(&path)[PROVENANCE_FILE], before[PROVENANCE_FILE]);
    // A file of somebody else's keeps the folder from being replaced.
    std::fs::write(path.join("notes.txt"), "mine").unwrap();
    let (refused, computed) = run(true, 0.5);
    let Err(StreamError::WouldDelete { files, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!((files, computed), (vec!["notes.txt".to_owned()], 0));
    assert_eq!(entries(folder.path()), ["a.safetensors", "out"]);

    let gguf = Target::Gguf { path: folder.path().join("out.gguf"), metadata: Default::default() };
    let copy = Convert::copy("a", &source);
    assert!(Executor::default().run(&copy, &gguf).is_ok());
    assert!(matches!(Executor::default().run(&copy, &gguf), Err(StreamError::Exists { .. })));
    assert!(Executor { overwrite: true, ..Executor::default() }.run(&copy, &gguf).is_ok());
}

#[test]
fn failures_name_the_tensor_and_leave_only_what_can_be_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::folder(folder.path().join("out"));
    let executor = Executor { threads: Some(1), ..Executor::default() };
    // The order of the output is that of the file: f32 first.
    let mut blend = Blend::new(&source, &source, 0.5);
    blend.fail = Some("norm.weight");
    let error = executor.run(&blend, &target).unwrap_err().to_string();
    assert_eq!(error, "tensor `norm.weight`: out of luck");
    assert_eq!(entries(folder.path()), ["a.safetensors"]);
    let mut blend = Blend::new(&source, &source, 0.5);
    blend.fail = Some("layers.3.up");
    let error = Executor { threads: Some(3), ..executor }.run(&blend, &target).unwrap_err();
    assert!(error.to_string().contains("layers.3.up"), "{error}");
    assert_eq!(entries(folder.path()), [".out.partial", "a.safetensors"]);
    let fixed = Blend::new(&source, &source, 0.5);
    let report = executor.run(&fixed, &target).unwrap();
    assert!(report.resumed_parts > 0 && entries(folder.path()) == ["a.safetensors", "out"]);
}

#[test]
fn a_panic_ends_the_run_instead_of_hanging_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let mut blend = Blend::new(&source, &source, 0.5);
    blend.panic = true;
    let target = Target::folder(folder.path().join("out"));
    let executor = Executor { threads: Some(3), max_memory: Some(1 << 20), ..Executor::default() };
    let run = std::panic::AssertUnwindSafe(|| executor.run(&blend, &target).is_ok());
    assert!(std::panic::catch_unwind(run).is_err());
    assert!(!target.path().exists());
}

/// Does with a job what the test says.
struct Odd<'a, F: Fn(&mut Job<'_>) -> Result<(), StreamError> + Sync> {
    source: &'a Checkpoint,
    spec: OutputSpec,
    compute: F,
}

impl<F: Fn(&mut Job<'_>) -> Result<(), StreamError> + Sync> Transform for Odd<'_, F> {
    fn name(&self) -> &str {
        "odd"
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { name: "/data/somebody/a".into(), checkpoint: self.source }]
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        Ok(vec![self.spec.clone()])
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        (self.compute)(job)
    }
}

#[test]
fn wrong_use_of_a_job_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let norm = || vec![(0, "norm.weight".to_owned())];
    let run = |shape: usize,
               reads: Vec<(usize, String)>,
               compute: fn(&mut Job<'_>) -> Result<(), StreamError>| {
        let spec = OutputSpec::whole(TensorSpec::new("x", DType::BF16, [shape]), reads, 0);
        let target = Target::folder(folder.path().join("out"));
        let error = Executor::default().run(&Odd { source: &source, spec, compute }, &target).unwrap_err();
        assert_eq!(entries(folder.path()), ["a.safetensors"]);
        error.to_string()
    };
    assert!(run(70, norm(), |_| Ok(())).contains("0 bytes were written, 140 are due"));
    assert!(run(70, norm(), |job| job.write_f32(&[0.0; 71])).contains("142 bytes"));
    assert!(run(70, norm(), |job| job.write_bytes(&[0; 139])).contains("139 bytes"));
    assert!(run(71, norm(), |job| job.copy()).contains("`norm.weight` has 70 elements"));
    assert!(run(70, norm(), |job| job.read_f32(1).map(|_| ())).contains("input 1 was not declared"));
    assert!(run(70, vec![(0, "nothing".into())], |_| Ok(())).contains("`x` reads `nothing`"));
    assert!(run(70, vec![(3, "norm.weight".into())], |_| Ok(())).contains("source 3"));
}

#[test]
fn rows_are_never_cut_and_every_element_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (rows, cols) = (70, 70_001);
    let spec = TensorSpec::new("w", DType::BF16, [rows, cols]);
    let path = folder.path().join("a.safetensors");
    write_safetensors(&path, &Default::default(), &with_data(vec![spec.clone()], 9)).unwrap();
    let source = Checkpoint::open(&path).unwrap();
    let parts = AtomicUsize::new(0);
    let whole_rows = AtomicBool::new(true);
    // Each row is divided by its largest absolute value, so a row in two chunks would show.
    let normalize = Odd {
        source: &source,
        spec: OutputSpec { split: Some(cols), ..OutputSpec::whole(spec, vec![(0, "w".into())], 0) },
        compute: |job: &mut Job<'_>| {
            parts.fetch_add(1, Ordering::SeqCst);
            let (mut seen, end) = (job.range().start, job.range().end);
            job.elementwise(|start, inputs, out| {
                whole_rows.fetch_and(start == seen && inputs[0].len() % cols == 0, Ordering::SeqCst);
                seen = start + inputs[0].len();
                for (row, out) in inputs[0].chunks(cols).zip(out.chunks_mut(cols)) {
                    let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    out.iter_mut().zip(row).for_each(|(o, x)| *o = x / largest);
                }
            })?;
            assert_eq!(seen, end);
            Ok(())
        },
    };
    let target = Target::folder(folder.path().join("out"));
    Executor::default().run(&normalize, &target).unwrap();
    assert!(parts.load(Ordering::SeqCst) == 2 && whole_rows.load(Ordering::SeqCst));
    let (x, y) =
        (source.read_f32("w").unwrap(), Checkpoint::open(target.path()).unwrap().read_f32("w").unwrap());
    for (x, y) in x.chunks(cols).zip(y.chunks(cols)) {
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert_eq!(y.iter().fold(0.0f32, |m, x| m.max(x.abs())), 1.0);
        assert!(x.iter().zip(y).all(|(x, y)| (x / largest - y).abs() <= y.abs() / 256.0));
    }
    // Of an absolute path only the last part is kept.
    let text = String::from_utf8(contents(target.path())[PROVENANCE_FILE].clone()).unwrap();
    assert!(text.contains(r#""name": "a""#) && !text.contains("somebody"), "{text}");
}

#[test]
fn shards_carry_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::folder(folder.path().join("out"));
    let executor = Executor { shard_bytes: 10_000, ..Executor::default() };
    let plan = executor.plan(&Convert::copy("a", &source), &target).unwrap();
    executor.run(&Convert::copy("a", &source), &target).unwrap();
    let files = contents(target.path());
    assert_eq!(plan.files.len(), 5);
    assert_eq!(plan.files[0], "model-00001-of-00005.safetensors");
    assert!(plan.files.iter().all(|name| files.contains_key(name)));
    let index: serde_json::Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
    let total: usize = source.tensors().iter().map(|t| t.len).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let copy = Checkpoint::open(target.path()).unwrap();
    for tensor in source.tensors() {
        assert_eq!(copy.bytes(&tensor.name).unwrap(), source.bytes(&tensor.name).unwrap());
    }
    // Shards are read as one checkpoint, and copied back to the file they came from.
    let joined = Target::folder(folder.path().join("joined"));
    let mut order = Convert::copy("a", &copy);
    order.outputs = source.tensors().iter().map(|t| (t.spec(), t.name.clone())).collect();
    Executor::default().run(&order, &joined).unwrap();
    assert_eq!(contents(joined.path())["model.safetensors"], std::fs::read(source.path()).unwrap());
}

#[test]
fn provenance_names_sources_and_hashes() {
    use sha2::{Digest, Sha256};
    let folder = tempfile::tempdir().unwrap();
    let a = model(&folder.path().join("a.safetensors"), 1);
    let b = model(&folder.path().join("b.safetensors"), 2);
    let side_files = vec![("tokenizer.json".to_owned(), b"[]".to_vec())];
    let run = |name: &str, sha256: bool| {
        let path = folder.path().join(name);
        let target = Target::Folder { path, stem: "adapter_model".into(), side_files: side_files.clone() };
        Executor { sha256, ..Executor::default() }.run(&Blend::new(&a, &b, 0.5), &target).unwrap();
        contents(target.path())
    };
    let files = run("one", true);
    assert_eq!(files, run("two", true), "no time, no path");
    let json: serde_json::Value = serde_json::from_slice(&files[PROVENANCE_FILE]).unwrap();
    let hex = |bytes: &[u8]| format!("{:x}", Sha256::digest(bytes));
    assert_eq!(json["transform"], "merge linear");
    assert_eq!(json["settings"]["weight"], 0.5);
    assert_eq!(json["tensors"], 10);
    assert_eq!(json["sources"][1]["files"][0]["name"], "b.safetensors");
    assert_eq!(json["sources"][1]["files"][0]["sha256"], hex(&std::fs::read(b.path()).unwrap()));
    let outputs = json["outputs"].as_array().unwrap();
    assert_eq!(outputs.len(), files.len() - 1);
    for file in outputs {
        let bytes = &files[file["name"].as_str().unwrap()];
        assert_eq!(
            (file["bytes"].as_u64().unwrap(), file["sha256"].as_str().unwrap()),
            (bytes.len() as u64, &*hex(bytes))
        );
    }
    let card = String::from_utf8(files["README.md"].clone()).unwrap();
    assert!(card.starts_with("---\ntags:\n- firebrick\n- \"merge\"\n---\n"), "{card}");
    assert!(
        card.contains(&format!("| b | b.safetensors | {} |", std::fs::metadata(b.path()).unwrap().len()))
    );
    let text: String = files.values().map(|f| String::from_utf8_lossy(f)).collect();
    assert!(!text.contains(folder.path().to_str().unwrap()));
    // Without hashing only the hashes are missing.
    let plain = run("three", false);
    assert_eq!(plain["adapter_model.safetensors"], files["adapter_model.safetensors"]);
    assert!(!String::from_utf8_lossy(&plain[PROVENANCE_FILE]).contains("sha256"));
}

#[test]
fn a_plan_lists_every_problem_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let mut copy = Convert::copy("a", &source);
    copy.outputs = vec![
        (TensorSpec::new("x", DType::Q8_0, [32]), "norm.weight".into()),
        (TensorSpec::new("y", DType::F32, [70]), "missing".into()),
        (TensorSpec::new("z", DType::F32, [70]), "norm.weight".into()),
        (TensorSpec::new("z", DType::F32, [70]), "norm.weight".into()),
    ];
    let side_files = vec![("../evil".to_owned(), Vec::new()), ("firebrick.json".to_owned(), Vec::new())];
    let target = Target::Folder { path: folder.path().join("out"), stem: "model".into(), side_files };
    let plan = Executor::default().plan(&copy, &target).unwrap();
    for word in ["`x`", "`missing`", "two tensors are named `z`", "../evil", "firebrick.json"] {
        assert_eq!(plan.problems.iter().filter(|p| p.contains(word)).count(), 1, "{word}: {plan}");
    }
    assert_eq!(plan.problems.len(), 5, "{plan}");
    assert_eq!(plan.unread.len(), 9);
    let Err(StreamError::Plan { problems, .. }) = Executor::default().run(&copy, &target) else { panic!() };
    assert_eq!(problems, plan.problems);
    assert_eq!(entries(folder.path()), ["a.safetensors"]);
    let text =
        Executor::default().plan(&Convert::copy("a", &source), &Target::folder("out")).unwrap().to_string();
    assert!(text.starts_with("convert: 10 tensors in 1 file, 9 parts on "), "{text}");
}

#[test]
fn two_runs_do_not_share_a_target() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(&folder.path().join("a.safetensors"), 1);
    let target = Target::folder(folder.path().join("out"));
    let inner = AtomicBool::new(false);
    let spec = OutputSpec::elementwise(
        source.tensor("norm.weight").unwrap().spec(),
        vec![(0, "norm.weight".into())],
    );
    let outer = Odd {
        source: &source,
        spec,
        compute: |job: &mut Job<'_>| {
            let second = Executor::default().run(&Convert::copy("a", &source), &target);
            inner.store(matches!(second, Err(StreamError::Busy { .. })), Ordering::SeqCst);
            job.copy()
        },
    };
    Executor::default().run(&outer, &target).unwrap();
    assert!(inner.load(Ordering::SeqCst));
}
