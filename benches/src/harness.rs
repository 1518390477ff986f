//! The harness that every suite runs on: warm-up, repeats, peers in turns, memory, limits of the machine.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn::tensor::Device;
use firebrick_models::{Export, ExportType, ModelFiles};
use firebrick_tensor::memory::keep_freed;
use firebrick_tensor::ops::{self, Precision};
use firebrick_tensor::stream::Executor;

use crate::suites::Product;
use crate::{Bound, Case, Measured, Peer, Started, median_mad, memory};

/// Fewer pairs than this say little on a machine that does other things too.
const PAIRS: usize = 5;

/// Calls to warm up. A training step that is the second still asks for memory: the first ended with the optimizer's state in its place.
const WARM_UPS: usize = 3;

/// A pause before our turn: threads of the peer's libraries wait for more work by spinning, for some 0.2 s at most.
const PAUSE: Duration = Duration::from_millis(200);

/// What the device reached in this run at the two things that bound everything else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// f32 matrix product, in 1e9 floating-point operations per second.
    pub gflops: f64,
    /// bf16 matrix product, likewise; that of f32 where the device does not tell them apart.
    pub gflops_bf16: f64,
    /// Reading a buffer that no cache holds, in 1e9 bytes per second.
    pub read: f64,
    /// Copying such a buffer, in 1e9 bytes per second, read and written ones counted.
    pub copy: f64,
}

/// How peers are started.
#[derive(Clone, Debug)]
pub struct PeerSettings {
    /// The Python that has them.
    pub python: PathBuf,
    /// The folder of their scripts.
    pub scripts: PathBuf,
}

/// What suites run on.
pub struct Bench<'a> {
    /// Where they compute.
    pub device: Device,
    /// Its name in the results.
    pub name: String,
    /// Models, each with its name in the results.
    pub models: &'a [(&'static str, ModelFiles)],
    /// Measure what has one of these texts in its suite, name and type alone; everything if there are none.
    pub only: Vec<String>,
    /// Measured calls per case; with a peer at least 5.
    pub repeats: usize,
    /// Run peers, started like this.
    pub peers: Option<PeerSettings>,
    /// Folder of models made for measuring, kept from run to run.
    pub cache: PathBuf,
    /// The limits of the device, once they are measured.
    pub roofline: Option<Roofline>,
    /// Measure the limit of what computes once more after each call, as the share of it is worth little on a machine that others use too.
    pub limit_in_turns: bool,
    /// Hears of every case as soon as it is measured.
    pub measured: &'a dyn Fn(&Measured),
    /// Hears of what is left out, and why.
    pub note: &'a dyn Fn(&str),
    /// The cases so far.
    pub results: RefCell<Vec<Measured>>,
}

impl Bench<'_> {
    /// Seconds of one call of `work`; the device is idle before and after.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let sync = || self.device.sync().map_err(|e| anyhow::anyhow!("the device failed: {e}"));
        sync()?;
        let begin = Instant::now();
        work()?;
        sync()?;
        Ok(begin.elapsed().as_secs_f64())
    }

    /// [`Bench::timed`] with all threads awake, as passes of a model and steps of training keep them.
    ///
    /// # Errors
    /// Those of [`Bench::timed`].
    pub fn timed_awake(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.timed(|| ops::awake(&self.device, work))
    }

    /// Whether `case` is one of those to measure, see [`Bench::only`].
    pub fn asks_for(&self, case: &Case) -> bool {
        let name = format!("{} {} {}", case.suite, case.name, case.dtype);
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }

    /// Measures `case` beside a peer, if it is asked for, and adds it to the results: [`Bench::take`].
    ///
    /// # Errors
    /// Those of `peer` and `turn`.
    pub fn measure(
        &self,
        case: &Case,
        peer: impl FnOnce() -> Result<Option<Peer>>,
        turn: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<()> {
        if self.asks_for(case) {
            self.add(self.take(case, peer()?, turn)?);
        }
        Ok(())
    }

    /// Measures `case`: some calls of `turn`, which returns its seconds, to warm up (one of work that knows no device), then the
    /// repeats, each after a turn of the peer, and before the limit's where those are asked for. A peer that fails is dropped with a note.
    ///
    /// # Errors
    /// Those of `turn`.
    pub fn take(
        &self,
        case: &Case,
        mut peer: Option<Peer>,
        turn: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<Measured> {
        // What the case before kept is not this one's; work on the host moves weights through a bounded amount of memory.
        keep_freed(false);
        let host = self.name == "host";
        keep_freed(!host);
        for _ in 0..if host { 1 } else { WARM_UPS } {
            turn()?;
        }
        let limit = self.limit(case);
        let (mut peak, mut faults, mut limits) = (None, Some(0), Vec::new());
        let since = |before: Option<u64>, now: Option<u64>| Some(now? - before?);
        let peer_faults = peer.as_ref().and_then(Peer::faults);
        let repeats = if peer.is_some() { self.repeats.max(PAIRS) } else { self.repeats.max(1) };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            if let Some(running) = &mut peer {
                match running.turn() {
                    Ok(seconds) => theirs.push(seconds),
                    Err(e) => {
                        (self.note)(&format!("{} {}: {}: {e:#}", case.suite, case.name, running.name));
                        peer = None;
                    }
                }
                std::thread::sleep(PAUSE);
            }
            memory::reset("self");
            let before = memory::faults("self");
            ours.push(turn()?);
            let new = since(before, memory::faults("self"));
            faults = faults.zip(new).map(|(sum, new)| sum + new);
            peak = peak.max(memory::peak("self"));
            if let Some(limit) = &limit {
                limits.push(limit.turn(self)?);
            }
        }
        let mut roofline = self.roofline;
        if let (Some(limit), Some(roofline)) = (limit, &mut roofline) {
            let rate = limit.flop() / median_mad(&limits).0 / 1e9;
            (roofline.gflops, roofline.gflops_bf16) = (rate, rate);
        }
        let mut measured = Measured::new(case, &self.name, &ours, roofline.as_ref());
        measured.peak_bytes = peak;
        let each = |sum: Option<u64>| Some(sum? as f64 / repeats as f64);
        measured.faults = each(faults);
        if let Some(peer) = &peer {
            measured = measured.with_peer(&peer.name, case, &theirs);
            measured.peer_peak_bytes = peer.peak();
            measured.peer_faults = each(since(peer_faults, peer.faults()));
        }
        Ok(measured)
    }

    /// The limit that takes turns with `case`, if one does.
    fn limit(&self, case: &Case) -> Option<Product> {
        let precision = match case.bound {
            Bound::Compute(_) => Precision::F32,
            Bound::ComputeBf16(_) => Precision::Bf16,
            _ => return None,
        };
        (self.limit_in_turns && self.roofline.is_some()).then(|| Product::new(self, precision))
    }

    /// Adds a case to the results.
    pub fn add(&self, measured: Measured) {
        (self.measured)(&measured);
        self.results.borrow_mut().push(measured);
    }

    /// Starts the peer `script` with `arguments` and the number of threads; none where peers are not asked for, or this one
    /// is missing or fails, with a note.
    ///
    /// # Errors
    /// If the folder of its log cannot be made.
    pub fn peer(&self, script: &str, arguments: &[&Path]) -> Result<Option<Peer>> {
        let Some(PeerSettings { python, scripts }) = &self.peers else { return Ok(None) };
        std::fs::create_dir_all(&self.cache).with_context(|| self.cache.display().to_string())?;
        let mut command = Command::new(python);
        command.arg(scripts.join(script)).args(arguments).arg(rayon::current_num_threads().to_string());
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let why = match Peer::start(command, &self.cache.join(format!("{script}.log"))) {
            Ok(Started::Ready(peer)) => return Ok(Some(peer)),
            Ok(Started::Missing(why)) => format!("not installed: {why}"),
            Err(e) => format!("{e:#}"),
        };
        (self.note)(&format!("without the peer {script}: {why}"));
        Ok(None)
    }

    /// Starts the peer `script` on `files` as a Hugging Face folder in f32, with further `arguments`.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn model_peer(&self, script: &str, files: &ModelFiles, arguments: &[&str]) -> Result<Option<Peer>> {
        if self.peers.is_none() {
            return Ok(None);
        }
        let folder = self.exported(files, ExportType::F32, "")?;
        let arguments = arguments.iter().map(Path::new);
        self.peer(script, &[folder.as_path()].into_iter().chain(arguments).collect::<Vec<_>>())
    }

    /// The precisions that can be asked for on this device; a processor that is faster in f32 computes in that, a peer does not.
    pub fn precisions(&self) -> Vec<Precision> {
        let bf16 = self.device == Device::flex();
        if bf16 { vec![Precision::F32, Precision::Bf16] } else { vec![Precision::F32] }
    }

    /// The model written in type `dtype` to the cache, unless it is there: as a folder, or as a file with the `ending`
    /// `.gguf`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn exported(&self, files: &ModelFiles, dtype: ExportType, ending: &str) -> Result<PathBuf> {
        let digest = files.digest()?;
        let name = format!("{}-{}-{}{ending}", files.name, dtype.dtype(), &digest[..12]);
        let path = self.cache.join(name);
        if !path.exists() {
            std::fs::create_dir_all(&self.cache).with_context(|| self.cache.display().to_string())?;
            let executor = Executor { overwrite: true, sha256: false, ..Executor::default() };
            Export::files(files, dtype).write(&path, &executor)?;
        }
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench<'a>(measured: &'a dyn Fn(&Measured), note: &'a dyn Fn(&str)) -> Bench<'a> {
        Bench {
            device: Device::flex(),
            name: "flex".into(),
            models: &[],
            only: Vec::new(),
            repeats: 3,
            peers: None,
            cache: PathBuf::new(),
            roofline: None,
            limit_in_turns: false,
            measured,
            note,
            results: RefCell::default(),
        }
    }

    fn none() -> Result<Option<Peer>> {
        Ok(None)
    }

    fn case() -> Case {
        let bound = Bound::Unknown;
        Case { suite: "s", name: "c".into(), dtype: "f32", unit: "s", amount: 1.0, bound }
    }

    #[test]
    fn the_first_calls_are_not_counted_and_results_are_kept() {
        let seen = RefCell::new(Vec::new());
        let measured = |m: &Measured| seen.borrow_mut().push(m.case.clone());
        let bench = bench(&measured, &|_| {});
        let mut seconds = [100.0; WARM_UPS].into_iter().chain([1.0, 2.0, 3.0]);
        bench.measure(&case(), none, &mut || Ok(seconds.next().unwrap())).unwrap();
        let results = bench.results.take();
        let [measured] = results.as_slice() else { panic!("{results:?}") };
        assert_eq!((measured.median, measured.mad, measured.repeats), (2.0, 1.0, 3));
        assert_eq!(seen.borrow().as_slice(), ["c"]);
        assert!(bench.measure(&case(), none, &mut || anyhow::bail!("it failed")).is_err());
        assert!(bench.timed(|| anyhow::bail!("it failed")).is_err());
        assert!(bench.timed(|| Ok(())).unwrap() >= 0.0);
        assert!(bench.peer("none.py", &[]).unwrap().is_none(), "peers are not asked for");
    }

    #[test]
    fn cases_that_nobody_asked_for_are_left_out_with_their_peers() {
        let only = vec!["s c".to_string(), "bf16".to_string()];
        let bench = Bench { only, ..bench(&|_| {}, &|_| {}) };
        let measure = |case: Case| {
            let peers = std::cell::Cell::new(0);
            let started = || {
                peers.set(peers.get() + 1);
                Ok(None)
            };
            bench.measure(&case, started, &mut || Ok(1.0)).unwrap();
            (bench.results.take().len(), peers.get())
        };
        assert_eq!(measure(case()), (1, 1), "by its suite and name");
        assert_eq!(measure(Case { name: "d".into(), dtype: "bf16", ..case() }), (1, 1), "by its type");
        assert_eq!(measure(Case { name: "d".into(), ..case() }), (0, 0));
    }

    #[test]
    fn the_limit_takes_turns_with_what_computes() {
        let roofline = Roofline { gflops: 1e-6, gflops_bf16: 1e-6, read: 1.0, copy: 1.0 };
        let share = |bound, limit_in_turns| {
            let bench = Bench { roofline: Some(roofline), limit_in_turns, ..bench(&|_| {}, &|_| {}) };
            let measured = bench.take(&Case { bound, ..case() }, None, &mut || Ok(1.0)).unwrap();
            (measured.share_of_peak, measured.share_of_bandwidth)
        };
        assert_eq!(share(Bound::Compute(1e3), false), (Some(1.0), None), "of the limit that is known");
        let (of_peak, _) = share(Bound::Compute(1e3), true);
        assert!(of_peak.is_some_and(|share| share < 1e-3), "{of_peak:?} of a product of this machine");
        assert_eq!(share(Bound::Read(1e9), true), (None, Some(1.0)));
    }

    #[test]
    #[cfg(unix)]
    fn a_peer_takes_turns_until_it_fails() {
        let folder = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), format!("echo '{{\"peer\":\"p\"}}'\n{text}\n")).unwrap();
        };
        script("works", "while read go; do echo '{\"seconds\":4}'; done");
        script("fails", "read go; echo '{\"seconds\":4}'; read go; exit 1");
        let notes = RefCell::new(Vec::new());
        let note = |note: &str| notes.borrow_mut().push(note.to_string());
        let peers = PeerSettings { python: "sh".into(), scripts: folder.path().into() };
        let bench = Bench { peers: Some(peers), cache: folder.path().join("cache"), ..bench(&|_| {}, &note) };
        let measured = |script| {
            let peer = bench.peer(script, &[]).unwrap();
            bench.take(&case(), peer, &mut || Ok(2.0)).unwrap()
        };
        let paired = measured("works");
        assert_eq!((paired.repeats, paired.ratio, paired.peer.as_deref()), (PAIRS, Some(2.0), Some("p")));
        let alone = measured("fails");
        assert_eq!((alone.median, alone.ratio, notes.borrow().len()), (2.0, None, 1));
        let alone = measured("missing");
        assert_eq!((alone.ratio, notes.borrow().len()), (None, 2));
    }
}
