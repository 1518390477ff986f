//! Mixtures of several sources, with proportions that may change from stage to stage of a run.

use std::collections::BTreeSet;

use firebrick_core::Seed;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::rows::Row;
use crate::{Rows, TextData, TrainError};

/// A stretch of a run, and what it draws from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Steps in proportion to the lengths of the other stages. Absent in all stages they are in proportion to the rows
    /// that a stage draws from, so that all stages pass over theirs equally often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<f64>,
    /// `T` in `n^(1/T)`, the weight of a source of `n` rows that has none of its own: 1 is in proportion to the rows, a high one
    /// nearly equal parts (Arivazhagan et al. 2019, arXiv 1907.05019).
    #[serde(default = "one")]
    pub temperature: f64,
    /// The sources.
    pub draws: Vec<Draw>,
}

/// How a stage draws from a source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    /// Name of the source.
    pub source: String,
    /// Draws in proportion to the weights of the other sources; in a stage all have one or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// The share of its rows that are drawn at all, chosen by the seed; those of a smaller share are among those of a larger.
    #[serde(default = "one")]
    pub share: f64,
}

fn one() -> f64 {
    1.0
}

impl Draw {
    /// All rows of `source`.
    pub fn all(source: impl Into<String>) -> Self {
        Draw { source: source.into(), weight: None, share: 1.0 }
    }
}

impl Stage {
    /// All rows of `sources`, in proportion.
    pub fn all<S: AsRef<str>>(sources: &[S]) -> Self {
        let draws = sources.iter().map(|s| Draw::all(s.as_ref())).collect();
        Stage { length: None, temperature: 1.0, draws }
    }
}

/// Multi-task tuning: everything at once.
pub fn multi_task<S: AsRef<str>>(sources: &[S]) -> Vec<Stage> {
    vec![Stage::all(sources)]
}

/// One group after the other. `[[code], [math], [general]]` is sequential tuning, `[[code, math], [general]]` mixed
/// sequential tuning.
pub fn sequential<S: AsRef<str>>(groups: &[Vec<S>]) -> Vec<Stage> {
    groups.iter().filter(|group| !group.is_empty()).map(|group| Stage::all(group)).collect()
}

/// Dual-stage mixed fine-tuning (Dong et al. 2023, arXiv 2310.05492): first all of `special`, then all of `general` with the
/// share `k` of each of `special`. The paper takes 1/256; 0 is mixed sequential tuning.
pub fn dmt<S: AsRef<str>>(special: &[S], general: &[S], k: f64) -> Vec<Stage> {
    let mut second = Stage::all(general);
    if k > 0.0 {
        second.draws.extend(special.iter().map(|s| Draw { share: k, ..Draw::all(s.as_ref()) }));
    }
    [Stage::all(special), second].into_iter().filter(|stage| !stage.draws.is_empty()).collect()
}

/// The three runs that tell whether general instructions help a specialist (Shi et al. 2023, arXiv 2310.15326), with their
/// names: the specialist's data alone, both together, and the general data first. Given [`Mixture::steps`] of equal passes they
/// see the specialist's data equally often.
pub fn specialist_or_generalist(special: &str, general: &str) -> [(&'static str, Vec<Stage>); 3] {
    [
        ("specialist", multi_task(&[special])),
        ("together", multi_task(&[special, general])),
        ("general first", sequential(&[vec![general], vec![special]])),
    ]
}

/// Rows of several sources, and the stages in which they are drawn.
#[derive(Clone, Debug)]
pub struct Mixture<'a> {
    sources: Vec<(String, Rows<'a>)>,
    stages: Vec<Stage>,
    digest: String,
}

impl<'a> Mixture<'a> {
    /// A mixture of named sources.
    ///
    /// # Errors
    /// [`TrainError::Config`] with everything that is wrong with the stages, or if sources differ in the tokens of a row or have
    /// no names of their own.
    pub fn new(sources: Vec<(String, Rows<'a>)>, stages: Vec<Stage>) -> Result<Self, TrainError> {
        let problems = problems(&sources, &stages);
        if !problems.is_empty() {
            return Err(TrainError::Config { problems });
        }
        let mut hasher = blake3::Hasher::new();
        for (name, rows) in &sources {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
            hasher.update(&(rows.count() as u64).to_le_bytes());
            rows.hash(&mut hasher);
        }
        hasher.update(&serde_json::to_vec(&stages).expect("numbers and strings are JSON"));
        let digest = hasher.finalize().to_hex()[..32].to_string();
        Ok(Mixture { sources, stages, digest })
    }

    /// A single source: every epoch passes all rows once.
    pub fn of(rows: Rows<'a>) -> Self {
        let stages = multi_task(&[""]);
        Self::new(vec![(String::new(), rows)], stages).expect("one source and all of it")
    }

    /// The windows of a text.
    ///
    /// # Errors
    /// If the text does not fill one window.
    pub fn text(text: &'a TextData, window: usize) -> Result<Self, TrainError> {
        let digest = text.digest();
        Ok(Mixture { digest, ..Self::of(Rows::windows(text, window)?) })
    }

    /// The sources, by name.
    pub fn sources(&self) -> &[(String, Rows<'a>)] {
        &self.sources
    }

    /// The stages.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The steps of `rows` rows that it takes to pass over the rows of every stage `passes` times, at least one.
    pub fn steps(&self, passes: f64, rows: usize) -> usize {
        let all: usize = self.stages.iter().map(|stage| self.rows_of(stage)).sum();
        ((all as f64 * passes / rows.max(1) as f64).ceil() as usize).max(1)
    }

    /// Tells whether a checkpoint was made from this mixture.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    pub(crate) fn row(&self, (source, row): (usize, usize)) -> Row<'_> {
        self.sources[source].1.row(row)
    }

    fn index(&self, name: &str) -> usize {
        self.sources.iter().position(|(n, _)| n == name).expect("names were checked")
    }

    /// How many rows of its source a draw uses.
    fn rows(&self, draw: &Draw) -> usize {
        let all = self.sources[self.index(&draw.source)].1.count();
        ((all as f64 * draw.share).ceil() as usize).clamp(1, all)
    }

    fn rows_of(&self, stage: &Stage) -> usize {
        stage.draws.iter().map(|draw| self.rows(draw)).sum()
    }

    /// Draws the rows of a run of `steps` steps of `rows` rows each.
    ///
    /// # Panics
    /// If `rows` is 0.
    pub fn sampler(&self, seed: Seed, steps: usize, rows: usize) -> Sampler<'_> {
        assert!(rows > 0, "a step has rows");
        let lengths: Vec<f64> =
            self.stages.iter().map(|s| s.length.unwrap_or(self.rows_of(s) as f64)).collect();
        let whole: f64 = lengths.iter().sum();
        let mut before = 0.0;
        let begins = lengths.iter().map(|length| {
            let begin = (steps as f64 * before / whole).round() as usize;
            before += length;
            begin
        });
        let begins = begins.collect();
        Sampler { mixture: self, seed, rows, begins, walk: Walk::default(), orders: Vec::new() }
    }
}

fn problems(sources: &[(String, Rows<'_>)], stages: &[Stage]) -> Vec<String> {
    let mut problems = Vec::new();
    let names: BTreeSet<&str> = sources.iter().map(|(name, _)| name.as_str()).collect();
    if names.len() < sources.len() {
        problems.push("two sources have the same name".into());
    }
    if let Some((name, rows)) = sources.iter().find(|(_, rows)| rows.window() != sources[0].1.window()) {
        let first = sources[0].1.window();
        problems.push(format!("rows of `{name}` have {} tokens, those of the first {first}", rows.window()));
    }
    if stages.is_empty() {
        problems.push("there is no stage".into());
    }
    let some = |given: usize, of: usize| given > 0 && given < of;
    if some(stages.iter().filter(|s| s.length.is_some()).count(), stages.len()) {
        problems.push("either all stages have a `length` or none".into());
    }
    let positive = |value: f64| value.is_finite() && value > 0.0;
    for (i, stage) in stages.iter().enumerate() {
        let mut check = |ok: bool, what: String| {
            if !ok {
                problems.push(format!("stage {i}: {what}"));
            }
        };
        check(!stage.draws.is_empty(), "draws from nothing".into());
        check(stage.length.is_none_or(positive), format!("`length` is {:?}", stage.length));
        // A source of 2^32 rows still has a finite weight.
        let warm = stage.temperature.is_finite() && stage.temperature >= 0.05;
        check(warm, format!("`temperature` is {}", stage.temperature));
        let weighted = stage.draws.iter().filter(|d| d.weight.is_some()).count();
        check(!some(weighted, stage.draws.len()), "either all sources have a `weight` or none".into());
        let drawn: BTreeSet<&str> = stage.draws.iter().map(|d| d.source.as_str()).collect();
        check(drawn.len() == stage.draws.len(), "draws twice from one source".into());
        for Draw { source, weight, share } in &stage.draws {
            check(names.contains(source.as_str()), format!("there is no source `{source}`"));
            check(weight.is_none_or(positive), format!("`weight` of `{source}` is {weight:?}"));
            check(*share > 0.0 && *share <= 1.0, format!("`share` of `{source}` is {share}"));
        }
    }
    problems
}

/// Draws rows: those of a step are a function of the mixture, the seed, the length of the run and the step.
///
/// Sources take turns so that their counts follow the weights as closely as whole numbers can (the order of Sainte-Laguë's
/// divisors); from each, every epoch passes all rows once in an order of its own.
#[derive(Clone, Debug)]
pub struct Sampler<'a> {
    mixture: &'a Mixture<'a>,
    seed: Seed,
    rows: usize,
    /// The first step of each stage.
    begins: Vec<usize>,
    walk: Walk,
    /// For each source the order drawn last, with its stage and epoch.
    orders: Vec<Option<(usize, usize, Vec<u32>)>>,
}

/// How far the turns of a stage have come.
#[derive(Clone, Debug, Default)]
struct Walk {
    stage: usize,
    draws: usize,
    /// Draws from each source of the stage.
    counts: Vec<usize>,
}

impl Sampler<'_> {
    /// The rows of `step`, counted from 0, each as the numbers of its source and of the row in it.
    pub fn step(&mut self, step: usize) -> Vec<(usize, usize)> {
        // Stages too short for a step begin where the next one does.
        let stage = self.begins.iter().rposition(|&begin| begin <= step).unwrap_or(0);
        let first = (step - self.begins[stage]) * self.rows;
        if self.walk.stage != stage || self.walk.draws > first || self.walk.counts.is_empty() {
            let counts = vec![0; self.mixture.stages[stage].draws.len()];
            self.walk = Walk { stage, draws: 0, counts };
        }
        let weights = self.weights(stage);
        while self.walk.draws < first {
            self.turn(&weights);
        }
        (0..self.rows)
            .map(|_| {
                let (draw, count) = self.turn(&weights);
                self.drawn(stage, draw, count)
            })
            .collect()
    }

    fn weights(&self, stage: usize) -> Vec<f64> {
        let stage = &self.mixture.stages[stage];
        let rows = |draw| (self.mixture.rows(draw) as f64).powf(1.0 / stage.temperature);
        stage.draws.iter().map(|draw| draw.weight.unwrap_or_else(|| rows(draw))).collect()
    }

    /// Whose turn it is, and how often it was before.
    fn turn(&mut self, weights: &[f64]) -> (usize, usize) {
        let counts = &mut self.walk.counts;
        let due = |i: usize| (counts[i] as f64 + 0.5) / weights[i];
        let next = (1..weights.len()).fold(0, |best, i| if due(i) < due(best) { i } else { best });
        counts[next] += 1;
        self.walk.draws += 1;
        (next, counts[next] - 1)
    }

    /// Draw number `count` of `draw` in `stage`.
    fn drawn(&mut self, stage: usize, draw: usize, count: usize) -> (usize, usize) {
        let draw = &self.mixture.stages[stage].draws[draw];
        let (source, used) = (self.mixture.index(&draw.source), self.mixture.rows(draw));
        let epoch = count / used;
        self.orders.resize(self.mixture.sources.len(), None);
        let known = self.orders[source].as_ref().is_some_and(|(s, e, _)| (*s, *e) == (stage, epoch));
        if !known {
            let (name, rows) = &self.mixture.sources[source];
            let mut order: Vec<u32> = (0..rows.count() as u32).collect();
            let name = if name.is_empty() { String::new() } else { format!("/{name}") };
            if used < order.len() {
                order.shuffle(&mut self.seed.stream(&format!("mixture{name}")));
                order.truncate(used);
            }
            let stage_name = if stage == 0 { String::new() } else { format!("/stage.{stage}") };
            order.shuffle(&mut self.seed.stream(&format!("sampler{stage_name}{name}/epoch.{epoch}")));
            self.orders[source] = Some((stage, epoch, order));
        }
        let (_, _, order) = self.orders[source].as_ref().expect("just drawn");
        (source, order[count % used] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Average, Batches, Document};

    /// Sources of these numbers of rows of 4 tokens.
    fn mixture(rows: &[(&str, usize)], stages: Vec<Stage>) -> Result<Mixture<'static>, TrainError> {
        let document = |i: u32| Document { ids: vec![i; 4], learn: vec![true; 4], bytes: 4 };
        let pack = |n: usize| {
            let documents: Vec<Document> = (0..n as u32).map(document).collect();
            Rows::pack(&documents, 4, 0, Average::Token).unwrap()
        };
        Mixture::new(rows.iter().map(|(name, n)| (name.to_string(), pack(*n))).collect(), stages)
    }

    fn draws(mixture: &Mixture, seed: u64, steps: usize, rows: usize) -> Vec<(usize, usize)> {
        let mut sampler = mixture.sampler(Seed(seed), steps, rows);
        (0..steps).flat_map(|step| sampler.step(step)).collect()
    }

    fn counts(draws: &[(usize, usize)], sources: usize) -> Vec<usize> {
        (0..sources).map(|i| draws.iter().filter(|(s, _)| *s == i).count()).collect()
    }

    #[test]
    fn counts_follow_the_weights_at_every_moment() {
        let sizes = [("a", 30), ("b", 7), ("c", 113)];
        let weights = [0.2, 0.5, 0.3];
        let mut stage = Stage::all(&["a", "b", "c"]);
        stage.draws.iter_mut().zip(weights).for_each(|(d, w)| d.weight = Some(w));
        let drawn = draws(&mixture(&sizes, vec![stage]).unwrap(), 1, 100, 10);
        for n in 1..=drawn.len() {
            for (count, weight) in counts(&drawn[..n], 3).into_iter().zip(weights) {
                assert!((count as f64 - weight * n as f64).abs() <= 1.0, "{n}: {count} of {weight}");
            }
        }
        assert_eq!(counts(&drawn, 3), [200, 500, 300]);
        // Without weights: as the rows are; at a temperature, n^(1/T).
        let drawn = draws(&mixture(&sizes, multi_task(&["a", "b", "c"])).unwrap(), 1, 15, 10);
        assert_eq!(counts(&drawn, 3), [30, 7, 113], "one pass over everything");
        let flat = Stage { temperature: 1e9, ..Stage::all(&["a", "b", "c"]) };
        assert_eq!(counts(&draws(&mixture(&sizes, vec![flat]).unwrap(), 1, 15, 10), 3), [50, 50, 50]);
        let root = Stage { temperature: 2.0, ..Stage::all(&["x", "y"]) };
        let drawn = draws(&mixture(&[("x", 4), ("y", 64)], vec![root]).unwrap(), 1, 10, 10);
        assert_eq!(counts(&drawn, 2), [20, 80], "roots are 2 and 8");
    }

    #[test]
    fn no_row_comes_again_before_all_have_come() {
        let mixture = mixture(&[("a", 30), ("b", 7)], multi_task(&["a", "b"])).unwrap();
        let drawn = draws(&mixture, 3, 37, 4);
        for (source, rows) in [(0, 30), (1, 7)] {
            let of: Vec<usize> = drawn.iter().filter(|(s, _)| *s == source).map(|(_, r)| *r).collect();
            for epoch in of.chunks(rows) {
                let distinct: BTreeSet<_> = epoch.iter().collect();
                assert_eq!(distinct.len(), epoch.len());
            }
            assert_ne!(of[..rows], of[rows..2 * rows], "every epoch has an order of its own");
        }
        assert_ne!(drawn, draws(&mixture, 4, 37, 4), "the seed matters");
    }

    #[test]
    fn a_step_depends_on_its_number_alone() {
        let stages = dmt(&["a", "b"], &["c"], 0.25);
        let mixture = mixture(&[("a", 30), ("b", 7), ("c", 50)], stages).unwrap();
        let mut forward = mixture.sampler(Seed(1), 40, 5);
        let all: Vec<_> = (0..40).map(|step| forward.step(step)).collect();
        for step in [39, 3, 17, 16, 0] {
            assert_eq!(mixture.sampler(Seed(1), 40, 5).step(step), all[step]);
            assert_eq!(forward.step(step), all[step]);
        }
    }

    #[test]
    fn a_single_text_is_drawn_as_its_batches() {
        let text = TextData::new((0..203).collect(), 0);
        let mixture = Mixture::text(&text, 10).unwrap();
        let mut batches = Batches::new(&text, 10, 3, Seed(5)).unwrap();
        let mut sampler = mixture.sampler(Seed(5), 30, 3);
        for step in 0..30 {
            let rows = sampler.step(step);
            let ids: Vec<&[u32]> = rows.iter().map(|&at| mixture.row(at).ids).collect();
            assert_eq!(ids, batches.batch(step));
        }
        assert_eq!(mixture.digest(), text.digest());
    }

    #[test]
    fn dual_stage_tuning_and_its_ends() {
        let sizes = [("code", 64), ("math", 32), ("general", 100)];
        let of = |stages| mixture(&sizes, stages).unwrap();
        let (special, general) = (["code", "math"], ["general"]);
        let dual = of(dmt(&special, &general, 1.0 / 16.0));
        // 96 rows, then 100 + 4 + 2.
        assert_eq!(dual.steps(2.0, 2), 202);
        let drawn = draws(&dual, 1, 202, 2);
        assert_eq!(counts(&drawn[..192], 3), [128, 64, 0]);
        assert_eq!(counts(&drawn[192..], 3), [8, 4, 200]);
        let again: BTreeSet<_> = drawn[192..].iter().filter(|(s, _)| *s == 0).collect();
        assert_eq!(again.len(), 4, "the share is drawn without replacement, and stays the same");

        let mixed = of(sequential(&[special.to_vec(), general.to_vec()]));
        assert_eq!(draws(&of(dmt(&special, &general, 0.0)), 1, 98, 2), draws(&mixed, 1, 98, 2));
        // All of everything, and nothing before it, is multi-task tuning but for the order of the sources.
        let mut second = dmt(&special, &general, 1.0);
        second.remove(0);
        let by_name = |stages: Vec<Stage>| of(stages);
        let all = draws(&by_name(multi_task(&["general", "code", "math"])), 1, 98, 2);
        assert_eq!(draws(&of(second), 1, 98, 2), all);
        assert_ne!(draws(&mixed, 1, 98, 2), all, "control");
    }

    #[test]
    fn the_arms_see_the_specialists_data_equally_often() {
        for (name, stages) in specialist_or_generalist("sort", "others") {
            let mixture = mixture(&[("sort", 24), ("others", 96)], stages).unwrap();
            let drawn = draws(&mixture, 1, mixture.steps(3.0, 8), 8);
            assert_eq!(counts(&drawn, 2), [72, if name == "specialist" { 0 } else { 288 }], "{name}");
        }
    }

    #[test]
    fn lengths_divide_the_steps() {
        let stage = |source: &str, length| Stage { length: Some(length), ..Stage::all(&[source]) };
        let stages = vec![stage("a", 1.0), stage("b", 1e-9), stage("a", 3.0)];
        let drawn = draws(&mixture(&[("a", 10), ("b", 10)], stages).unwrap(), 1, 8, 5);
        assert_eq!(counts(&drawn, 2), [40, 0]);
        let (first, second): (Vec<_>, Vec<_>) = (drawn[..10].to_vec(), drawn[10..20].to_vec());
        assert_ne!(first, second, "a stage begins with an order of its own");
    }

    #[test]
    fn everything_wrong_is_told() {
        let draw = |source: &str, weight, share| Draw { source: source.into(), weight, share };
        let stages = vec![
            Stage { length: Some(-1.0), temperature: 0.0, draws: vec![draw("x", Some(1.0), 1.0)] },
            Stage { length: None, temperature: 1.0, draws: vec![] },
            Stage {
                length: None,
                temperature: 1.0,
                draws: vec![draw("a", Some(f64::NAN), 0.0), draw("a", None, 1.5)],
            },
        ];
        let error = mixture(&[("a", 2), ("a", 3)], stages).unwrap_err().to_string();
        let told = [
            "same name",
            "`length` or none",
            "stage 0: `length` is Some(-1.0)",
            "stage 0: `temperature` is 0",
            "stage 0: there is no source `x`",
            "stage 1: draws from nothing",
            "stage 2: either all sources have a `weight`",
            "stage 2: draws twice",
            "stage 2: `weight` of `a` is Some(NaN)",
            "stage 2: `share` of `a` is 0",
            "stage 2: `share` of `a` is 1.5",
        ];
        for what in told {
            assert!(error.contains(what), "{what}: {error}");
        }
        // 5000^100 is no number.
        let cold = vec![Stage { temperature: 0.01, ..Stage::all(&["a"]) }];
        assert!(mixture(&[("a", 5000)], cold).unwrap_err().to_string().contains("`temperature` is 0.01"));
        assert!(mixture(&[("a", 2)], vec![]).unwrap_err().to_string().contains("no stage"));
    }

    #[test]
    fn stages_are_plain_data() {
        let stages: Vec<Stage> =
            serde_json::from_str(r#"[{"draws": [{"source": "code", "share": 0.5}]}]"#).unwrap();
        let draws = vec![Draw { share: 0.5, ..Draw::all("code") }];
        assert_eq!(stages, [Stage { length: None, temperature: 1.0, draws }]);
        let text = serde_json::to_string(&stages).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Stage>>(&text).unwrap(), stages);
        assert!(serde_json::from_str::<Stage>(r#"{"draws": [], "lenght": 1}"#).is_err());
    }
}
