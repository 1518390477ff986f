//! How the learning rate changes over a run.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate over a run, after a linear warm-up from 0.
///
/// The factors are those of transformers' schedulers of the same names: the first step of a warm-up has factor 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Stays at 1.
    Constant,
    /// Falls in a straight line to 0 one step after the last.
    Linear,
    /// Falls along half a cosine to `floor` one step after the last (SGDR, arXiv 1608.03983).
    Cosine {
        /// The factor it falls to, in `0..=1`.
        #[serde(default)]
        floor: f64,
    },
}

impl Schedule {
    /// The factor on the learning rate at `step` (counted from 0) of `total` steps, the first `warmup` of them warm-up.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let done = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        let done = done.min(1.0);
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine { floor } => {
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_equal_those_of_transformers() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/schedule.json")).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let schedule = match case["schedule"].as_str().unwrap() {
                "constant" => Schedule::Constant,
                "linear" => Schedule::Linear,
                _ => Schedule::Cosine { floor: case["floor"].as_f64().unwrap() },
            };
            let (warmup, total) = (case["warmup"].as_u64().unwrap(), case["total"].as_u64().unwrap());
            for (step, want) in case["factors"].as_array().unwrap().iter().enumerate() {
                let got = schedule.factor(step, warmup as usize, total as usize);
                assert!(
                    (got - want.as_f64().unwrap()).abs() < 1e-12,
                    "{schedule:?} step {step}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn the_ends_are_exact_and_nothing_lies_beyond_them() {
        assert_eq!(Schedule::Linear.factor(10, 0, 10), 0.0);
        assert_eq!(Schedule::Linear.factor(1000, 0, 10), 0.0);
        assert_eq!(Schedule::Cosine { floor: 0.25 }.factor(99, 3, 10), 0.25);
        assert_eq!(Schedule::Constant.factor(0, 0, 0), 1.0);
        assert_eq!(Schedule::Linear.factor(5, 5, 5), 1.0, "a run that is all warm-up ends at 1");
    }

    #[test]
    fn settings_read_as_written() {
        let text = |s: Schedule| serde_json::to_string(&s).unwrap();
        assert_eq!(text(Schedule::Constant), "\"constant\"");
        assert_eq!(text(Schedule::Cosine { floor: 0.5 }), r#"{"cosine":{"floor":0.5}}"#);
        let parsed: Schedule = serde_json::from_str(r#"{"cosine":{}}"#).unwrap();
        assert_eq!(parsed, Schedule::Cosine { floor: 0.0 });
        let error =
            serde_json::from_str::<Schedule>(r#"{"cosine":{"ceiling":0.5}}"#).unwrap_err().to_string();
        assert!(error.contains("`ceiling`"), "{error}");
    }
}
