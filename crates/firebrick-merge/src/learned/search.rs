//! Search for merge coefficients by any measure of the merged model, without gradients (evolutionary merging, arXiv 2403.13187;
//! Unconstrained Model Merging, arXiv 2410.13699, its homogeneous part).

use std::path::{Path, PathBuf};

use firebrick_core::{Progress, Seed, Task, read_text, write_atomic};
use firebrick_models::Decoder;
use serde::{Deserialize, Serialize};

use super::cma_es::{CmaEs, CmaEsConfig};
use super::composed::{Coefficients, Composed, Granularity};
use crate::MergeError;

/// Most bytes of a state: far above any search.
const MAX_STATE: u64 = 1 << 30;

/// What a merged model costs, lower is better: nats on development text, or minus a score.
pub type Fitness<'a> = dyn FnMut(&Decoder) -> Result<f64, MergeError> + 'a;

/// How points are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// [`CmaEs`].
    #[default]
    CmaEs,
    /// One coefficient after the other in an order drawn for each round, a step up or else down, kept where it costs less; after a
    /// round without gain the step is halved.
    Coordinate,
}

/// Settings of [`search`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchConfig {
    /// Which sites share a coefficient.
    pub granularity: Granularity,
    /// What every coefficient is at first; none for one over the number of task vectors.
    pub start: Option<f64>,
    /// How points are chosen.
    pub method: Method,
    /// The first step, or standard deviation.
    pub sigma: f64,
    /// Merged models to measure at most, those for comparison not counted.
    pub evaluations: usize,
    /// Seed of all draws.
    pub seed: Seed,
    /// What else tells this search from others, such as digests of the models and texts: a state with another one is refused.
    pub identity: Option<String>,
    /// A file with the state of the search, as JSON, written after every generation or step; none to keep nothing.
    #[serde(skip)]
    pub state: Option<PathBuf>,
}

impl Default for SearchConfig {
    fn default() -> Self {
        SearchConfig {
            granularity: Granularity::LayerGroups(4),
            start: None,
            method: Method::CmaEs,
            sigma: 1.0 / 6.0,
            evaluations: 100,
            seed: Seed(0),
            identity: None,
            state: None,
        }
    }
}

/// Coefficients and what they cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// `found`, `start`, `uniform`, `first`, `last` or `random`.
    pub name: String,
    /// By vector and group.
    pub coefficients: Vec<Vec<f64>>,
    /// What was searched for.
    pub cost: f64,
    /// The cost on what was held out, if there is that.
    pub held_out: Option<f64>,
}

/// What a search found, beside what the same coefficients cost when spread otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SearchReport {
    /// Merged models measured by the search.
    pub evaluations: usize,
    /// The lowest cost so far after each of them.
    pub lowest: Vec<f64>,
    /// Names of the groups.
    pub groups: Vec<String>,
    /// The best coefficients, and beside them: those of the start; for each vector its mean coefficient in all groups (`uniform`); twice that in
    /// the first or last half of the groups and 0 in the others (`first`, `last`); its coefficients dealt out to the groups at random
    /// (`random`, of three deals the mean of the costs, and the coefficients of the first).
    pub comparisons: Vec<Comparison>,
}

impl SearchReport {
    /// The best coefficients.
    pub fn found(&self) -> &Comparison {
        &self.comparisons[0]
    }
}

/// Deals whose costs are averaged.
const DEALS: usize = 3;

/// Where a search stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    settings: SearchConfig,
    dimensions: usize,
    lowest: Vec<f64>,
    best: Vec<f64>,
    walk: Walk,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Walk {
    CmaEs(CmaEs),
    Coordinate { step: f64, round: u64, place: usize, up: bool, gained: bool },
}

/// Searches coefficients of `composed` at which `fitness` of the merged model is low, and measures the best beside others of
/// equal size, with `held_out` too where it is given: a search fits the text that it is led by.
///
/// With `resume` a search goes on from [`SearchConfig::state`], as if it had not stopped, or starts if there is none; `evaluations` may
/// have grown meanwhile. It is not told if the models or the measure are other ones, unless [`SearchConfig::identity`] says so.
///
/// # Errors
/// [`MergeError::Settings`] with everything that is wrong with the settings, or if the state is there already, or of another search;
/// what `fitness` fails with; cancellation.
pub fn search(
    composed: &Composed,
    config: &SearchConfig,
    fitness: &mut Fitness<'_>,
    held_out: Option<&mut Fitness<'_>>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, SearchReport), MergeError> {
    let start = config.start.unwrap_or(1.0 / composed.vectors().len() as f64);
    let coefficients = composed.coefficients(config.granularity, start, 1, config.seed);
    let start = vec![start; coefficients.count()];
    search_from(composed, &coefficients, start, config, fitness, held_out, progress, resume)
}

/// [`search`] from coefficients that need not be equal: `start`, by vector and group of `coefficients`, which has no partition.
#[allow(clippy::too_many_arguments, reason = "what `search` takes, and where to begin")]
pub(crate) fn search_from(
    composed: &Composed,
    coefficients: &Coefficients,
    start: Vec<f64>,
    config: &SearchConfig,
    fitness: &mut Fitness<'_>,
    mut held_out: Option<&mut Fitness<'_>>,
    progress: &dyn Progress,
    resume: bool,
) -> Result<(Coefficients, SearchReport), MergeError> {
    let groups = coefficients.groups().names().to_vec();
    let mut state = begin(config, start.clone(), resume)?;
    let at = |x: &[f64]| -> Result<Decoder, MergeError> {
        let numbers: Vec<f32> = x.iter().map(|v| *v as f32).collect();
        composed.merge(&coefficients.with(&numbers)?)
    };
    let mut cost = |x: &[f64]| fitness(&at(x)?);

    let mut task = Task::begin(progress, "search", Some(config.evaluations as u64), "models");
    task.advance(state.lowest.len() as u64, "")?;
    let note = |state: &State| format!("cost {:.4}", state.lowest.last().copied().unwrap_or(f64::NAN));
    if state.lowest.is_empty() {
        let first = cost(&state.best.clone())?;
        // JSON has no infinity.
        state.lowest.push(if first.is_finite() { first } else { f64::MAX });
        save(config, &state)?;
        task.advance(1, &note(&state))?;
    }
    while state.lowest.len() < config.evaluations {
        let before = state.lowest.len();
        let points = state.points()?;
        // A generation that would go beyond what is left is not begun.
        if before + points.len() > config.evaluations {
            break;
        }
        let mut costs = Vec::with_capacity(points.len());
        for point in &points {
            costs.push(cost(point)?);
            progress.check()?;
        }
        state.take(&points, &costs)?;
        save(config, &state)?;
        task.advance(points.len() as u64, &note(&state))?;
    }
    drop(task);

    let mut comparisons = Vec::new();
    let mut compare = |name: &str, points: &[Vec<f64>], known: Option<f64>| -> Result<(), MergeError> {
        let (mut own, mut other) = (0.0, 0.0);
        for x in points {
            let merged = at(x)?;
            own += match known {
                Some(cost) => cost,
                None => fitness(&merged)?,
            };
            if let Some(held_out) = held_out.as_deref_mut() {
                other += held_out(&merged)?;
            }
            progress.check()?;
        }
        let count = points.len() as f64;
        comparisons.push(Comparison {
            name: name.into(),
            coefficients: points[0].chunks(groups.len()).map(<[f64]>::to_vec).collect(),
            cost: own / count,
            held_out: held_out.is_some().then_some(other / count),
        });
        Ok(())
    };
    let best = state.best.clone();
    let spread = |place: &dyn Fn(&[f64], usize) -> f64| -> Vec<f64> {
        best.chunks(groups.len()).flat_map(|row| (0..groups.len()).map(move |g| place(row, g))).collect()
    };
    let mean = |row: &[f64]| row.iter().sum::<f64>() / row.len() as f64;
    // As many groups as make up half, the budget of which is all.
    let half = groups.len().div_ceil(2);
    let share = groups.len() as f64 / half as f64;
    let deal = |k: usize| -> Vec<f64> {
        let draws = config.seed.uniform(&format!("search/deal/{k}"), groups.len(), 0.5);
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.sort_by(|a, b| draws[*a].total_cmp(&draws[*b]));
        spread(&|row, g| row[order[g]])
    };
    compare("found", std::slice::from_ref(&best), state.lowest.last().copied())?;
    compare("start", &[start], None)?;
    compare("uniform", &[spread(&|row, _| mean(row))], None)?;
    compare("first", &[spread(&|row, g| if g < half { share * mean(row) } else { 0.0 })], None)?;
    let tail = groups.len() - half;
    compare("last", &[spread(&|row, g| if g >= tail { share * mean(row) } else { 0.0 })], None)?;
    compare("random", &(0..DEALS).map(deal).collect::<Vec<_>>(), None)?;
    let numbers: Vec<f32> = best.iter().map(|v| *v as f32).collect();
    let report = SearchReport { evaluations: state.lowest.len(), lowest: state.lowest, groups, comparisons };
    Ok((coefficients.with(&numbers)?, report))
}

/// A new state, or that of an earlier run.
fn begin(config: &SearchConfig, start: Vec<f64>, resume: bool) -> Result<State, MergeError> {
    let mut problems = Vec::new();
    if config.evaluations == 0 {
        problems.push("`evaluations` is 0".into());
    }
    if !(config.sigma.is_finite() && config.sigma > 0.0) {
        problems.push(format!("`sigma` is {}", config.sigma));
    }
    if !start.iter().all(|v| v.is_finite()) {
        problems.push(format!("`start` is {:?}", config.start));
    }
    if !problems.is_empty() {
        return Err(MergeError::Settings { problems });
    }
    let n = start.len();
    if let Some(path) = config.state.as_deref().filter(|p| p.exists()) {
        if !resume {
            let problems =
                vec![format!("{}: holds a search; resume it, or choose another file", path.display())];
            return Err(MergeError::Settings { problems });
        }
        return resumed(path, config, n);
    }
    let walk = match config.method {
        Method::CmaEs => Walk::CmaEs(CmaEs::new(start.clone(), cma_es(config))?),
        Method::Coordinate => {
            Walk::Coordinate { step: config.sigma, round: 0, place: 0, up: true, gained: false }
        }
    };
    Ok(State { settings: config.clone(), dimensions: n, lowest: Vec::new(), best: start, walk })
}

/// Settings of the walk.
fn cma_es(config: &SearchConfig) -> CmaEsConfig {
    CmaEsConfig { sigma: config.sigma, seed: config.seed, ..CmaEsConfig::default() }
}

fn resumed(path: &Path, config: &SearchConfig, n: usize) -> Result<State, MergeError> {
    let text = read_text(path, MAX_STATE).map_err(|source| MergeError::Io { path: path.into(), source })?;
    let bad = |what: String| MergeError::Settings { problems: vec![format!("{}: {what}", path.display())] };
    let state: State = serde_json::from_str(&text).map_err(|e| bad(format!("no state of a search: {e}")))?;
    let mut same = state.settings.clone();
    (same.evaluations, same.state) = (config.evaluations, config.state.clone());
    let walks = matches!(
        (&state.walk, config.method),
        (Walk::CmaEs(_), Method::CmaEs) | (Walk::Coordinate { .. }, Method::Coordinate)
    );
    let fits = match &state.walk {
        Walk::CmaEs(walk) => walk.fits(n, &cma_es(config)),
        Walk::Coordinate { place, .. } => *place < n,
    };
    if same != *config || state.dimensions != n || state.best.len() != n || !walks || !fits {
        return Err(bad("the state of another search".into()));
    }
    Ok(state)
}

fn save(config: &SearchConfig, state: &State) -> Result<(), MergeError> {
    let Some(path) = &config.state else { return Ok(()) };
    let text = serde_json::to_vec(state).expect("numbers and strings are JSON");
    write_atomic(path, &text).map_err(|source| MergeError::Io { path: path.clone(), source })
}

impl State {
    /// The points to measure next.
    fn points(&self) -> Result<Vec<Vec<f64>>, MergeError> {
        match &self.walk {
            Walk::CmaEs(walk) => walk.ask(),
            Walk::Coordinate { step, round, place, up, .. } => {
                let mut point = self.best.clone();
                let order = self.settings.seed.uniform(&format!("search/round/{round}"), point.len(), 0.5);
                let mut places: Vec<usize> = (0..point.len()).collect();
                places.sort_by(|a, b| order[*a].total_cmp(&order[*b]));
                point[places[*place]] += if *up { *step } else { -step };
                Ok(vec![point])
            }
        }
    }

    fn take(&mut self, points: &[Vec<f64>], costs: &[f64]) -> Result<(), MergeError> {
        let mut gain = false;
        for (point, cost) in points.iter().zip(costs) {
            let lowest = *self.lowest.last().expect("the start was measured");
            if *cost < lowest {
                (self.best, gain) = (point.clone(), true);
            }
            self.lowest.push(if *cost < lowest { *cost } else { lowest });
        }
        match &mut self.walk {
            Walk::CmaEs(walk) => walk.tell(points, costs)?,
            Walk::Coordinate { step, round, place, up, gained } => {
                *gained |= gain;
                if *up && !gain {
                    *up = false;
                    return Ok(());
                }
                (*up, *place) = (true, *place + 1);
                if *place == self.dimensions {
                    *step *= if *gained { 1.0 } else { 0.5 };
                    (*round, *place, *gained) = (*round + 1, 0, false);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learned::testing::Family;
    use firebrick_core::{Cancelled, Event, Silent};
    use firebrick_models::ModelError;

    #[test]
    fn a_search_beats_one_weight_for_all_and_equal_spreads() {
        for seed in 0..3 {
            let family = Family::new(seed);
            let composed = family.composed();
            let one = |i: u32| {
                let c = composed.coefficients(Granularity::Task, 0.05 * f64::from(i), 1, Seed(0));
                composed.merge(&c).unwrap()
            };
            let cost = |i: &u32| family.dev_nats(&one(*i));
            let best = (0..=20).min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
            let grid = family.gap_closed(&one(best));
            for (method, evaluations) in [(Method::CmaEs, 300), (Method::Coordinate, 100)] {
                let config = SearchConfig {
                    granularity: Granularity::Layer,
                    method,
                    evaluations,
                    seed: Seed(seed),
                    ..SearchConfig::default()
                };
                let fitness = &mut |d: &Decoder| Ok(family.dev_nats(d));
                let (c, report) = search(&composed, &config, fitness, None, &Silent, false).unwrap();
                let closed = family.gap_closed(&composed.merge(&c).unwrap());
                assert!(closed > grid + 0.03, "seed {seed}, {method:?}, held out: {closed} {grid}");
                for other in &report.comparisons[1..] {
                    assert!(report.found().cost < other.cost, "seed {seed}, {method:?}: {other:?}");
                }
                let again = family.dev_nats(&composed.merge(&c).unwrap());
                assert_eq!(again, report.found().cost);
                assert!(report.lowest.is_sorted_by(|a, b| a >= b) && report.lowest.len() <= evaluations);
            }
        }
    }

    /// Stops after so many advances.
    struct Stop(std::sync::atomic::AtomicUsize, usize);

    impl Progress for Stop {
        fn on(&self, event: Event<'_>) {
            if matches!(event, Event::Advance { .. }) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }

        fn cancelled(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::Relaxed) >= self.1
        }
    }

    #[test]
    fn a_search_goes_on_from_its_state_and_only_from_its_own() {
        let family = Family::new(4);
        let composed = family.composed();
        let fitness = |d: &Decoder| Ok(family.dev_nats(d));
        let folder = tempfile::tempdir().unwrap();
        for method in [Method::CmaEs, Method::Coordinate] {
            let path = folder.path().join(format!("{method:?}.json"));
            let config = |evaluations, state: Option<&Path>| SearchConfig {
                granularity: Granularity::LayerGroups(2),
                method,
                evaluations,
                seed: Seed(3),
                state: state.map(Path::to_path_buf),
                ..SearchConfig::default()
            };
            let go = |config: &SearchConfig, progress: &dyn Progress, resume| {
                search(&composed, config, &mut { fitness }, None, progress, resume)
            };
            let (whole, report) = go(&config(41, None), &Silent, false).unwrap();
            let stop = Stop(Default::default(), 4);
            let error = go(&config(41, Some(&path)), &stop, false).unwrap_err();
            assert!(matches!(error, MergeError::Cancelled(Cancelled)), "{error}");
            let error = go(&config(41, Some(&path)), &Silent, false).unwrap_err();
            assert!(error.to_string().contains("resume it"), "{error}");
            let (resumed, same) = go(&config(41, Some(&path)), &Silent, true).unwrap();
            assert_eq!((resumed.read().unwrap(), &same), (whole.read().unwrap(), &report));
            let other = SearchConfig { seed: Seed(4), ..config(41, Some(&path)) };
            assert!(go(&other, &Silent, true).unwrap_err().to_string().contains("another search"));
            // A larger budget is the same search.
            let (_, longer) = go(&config(61, Some(&path)), &Silent, true).unwrap();
            assert_eq!(longer.lowest[..report.lowest.len()], report.lowest[..]);
            assert!(longer.evaluations > report.evaluations);
            if method == Method::CmaEs {
                let text = std::fs::read_to_string(&path).unwrap();
                let hostile = text.replace("\"population\":null", "\"population\":10000000000000");
                assert_ne!(hostile, text);
                std::fs::write(&path, hostile).unwrap();
                let error = go(&config(61, Some(&path)), &Silent, true).unwrap_err();
                assert!(error.to_string().contains("another search"), "{error}");
                std::fs::write(&path, text).unwrap();
            }
            for text in [
                "",
                "{}",
                "[1, 2]",
                &std::fs::read_to_string(&path).unwrap().replace("\"dimensions\":6", "\"dimensions\":7"),
            ] {
                std::fs::write(&path, text).unwrap();
                let error = go(&config(41, Some(&path)), &Silent, true).unwrap_err();
                assert!(error.to_string().contains("state"), "{error}");
            }
        }
        let bad = SearchConfig {
            evaluations: 0,
            sigma: f64::NAN,
            start: Some(f64::INFINITY),
            ..SearchConfig::default()
        };
        let error = search(&composed, &bad, &mut { fitness }, None, &Silent, false).unwrap_err().to_string();
        assert!(["`evaluations`", "`sigma`", "`start`"].iter().all(|p| error.contains(p)), "{error}");
        let failing = &mut |_: &Decoder| Err(ModelError::Backend("no".into()).into());
        assert!(search(&composed, &SearchConfig::default(), failing, None, &Silent, false).is_err());
    }

    #[test]
    fn comparisons_spend_what_was_found_otherwise() {
        let family = Family::new(4);
        let composed = family.composed();
        let config =
            SearchConfig { granularity: Granularity::Layer, evaluations: 30, ..SearchConfig::default() };
        let fitness = &mut |d: &Decoder| Ok(family.dev_nats(d));
        let held_out = &mut |_: &Decoder| Ok(2.0);
        let (c, report) = search(&composed, &config, fitness, Some(held_out), &Silent, false).unwrap();
        let names: Vec<&str> = report.comparisons.iter().map(|c| &*c.name).collect();
        assert_eq!(names, ["found", "start", "uniform", "first", "last", "random"]);
        assert!(report.comparisons.iter().all(|c| c.held_out == Some(2.0)));
        assert_eq!(report.groups, ["embed", "layers.0", "layers.1", "end"]);
        let found = report.found().coefficients.clone();
        let read = c.read().unwrap();
        assert!(found.iter().flatten().zip(read.iter().flatten()).all(|(a, b)| *a as f32 == *b));
        for comparison in report.comparisons.iter().filter(|c| c.name != "start") {
            for (own, row) in found.iter().zip(&comparison.coefficients) {
                let (a, b) = (own.iter().sum::<f64>(), row.iter().sum::<f64>());
                assert!((a - b).abs() < 1e-12, "{}: {a} {b}", comparison.name);
            }
        }
        assert!(
            report.comparisons[3].coefficients.iter().all(|row| row[2..] == [0.0, 0.0] && row[0] == row[1])
        );
        assert!(
            report.comparisons[4].coefficients.iter().all(|row| row[..2] == [0.0, 0.0] && row[3] == row[2])
        );
        let mut sorted = [found[0].clone(), report.comparisons[5].coefficients[0].clone()];
        sorted.iter_mut().for_each(|row| row.sort_by(f64::total_cmp));
        assert_eq!(sorted[0], sorted[1], "the same numbers, dealt out");
    }
}
