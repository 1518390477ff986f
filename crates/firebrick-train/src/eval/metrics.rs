//! Figures over items: means with standard errors, confusion of classes, F1.

use serde::{Deserialize, Serialize};

/// Mean and its standard error, the sample deviation by the root of the number; no error for fewer than two values.
///
/// The mean of no values is 0.
pub fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()))
}

/// Which class was taken for which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion {
    /// The classes, in the task's order.
    pub labels: Vec<String>,
    /// `counts[answer][predicted]`, items.
    pub counts: Vec<Vec<usize>>,
}

/// How one class fares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassScore {
    /// The class.
    pub label: String,
    /// Items whose answer it is.
    pub items: usize,
    /// Share of them that was found (recall); 0 if there are none.
    pub accuracy: f64,
    /// Share of what was taken for it that it is; 0 if nothing was.
    pub precision: f64,
    /// Harmonic mean of the two, 0 if both are.
    pub f1: f64,
}

impl Confusion {
    /// Counts (answer, predicted) pairs, both indices into `labels`.
    ///
    /// # Panics
    /// If an index is out of range.
    pub fn new(labels: &[String], pairs: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut counts = vec![vec![0; labels.len()]; labels.len()];
        for (answer, predicted) in pairs {
            counts[answer][predicted] += 1;
        }
        Confusion { labels: labels.to_vec(), counts }
    }

    /// One entry per class.
    pub fn classes(&self) -> Vec<ClassScore> {
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let class = |(i, label): (usize, &String)| {
            let (hits, items) = (self.counts[i][i], self.counts[i].iter().sum::<usize>());
            let taken = self.counts.iter().map(|row| row[i]).sum::<usize>();
            ClassScore {
                label: label.clone(),
                items,
                accuracy: share(hits, items),
                precision: share(hits, taken),
                f1: share(2 * hits, items + taken),
            }
        };
        self.labels.iter().enumerate().map(class).collect()
    }

    /// Mean F1 over the classes that occur as an answer or as a prediction (scikit-learn's `f1_score(average="macro")`); 0
    /// without items.
    pub fn macro_f1(&self) -> f64 {
        let occurs = |i: usize| self.counts[i].iter().any(|&n| n > 0) || self.counts.iter().any(|r| r[i] > 0);
        let scores: Vec<f64> =
            self.classes().iter().enumerate().filter(|(i, _)| occurs(*i)).map(|(_, c)| c.f1).collect();
        mean_and_error(&scores).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_of_the_mean() {
        let (mean, error) = mean_and_error(&[1.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(mean, 0.6);
        assert!((error.unwrap() - (0.3f64 / 5.0).sqrt()).abs() < 1e-15);
        assert_eq!((mean_and_error(&[2.0]), mean_and_error(&[])), ((2.0, None), (0.0, None)));
    }

    #[test]
    fn classes_by_hand() {
        let labels = ["a", "b", "c", "never"].map(String::from);
        let pairs = [(0, 0), (0, 0), (1, 0), (1, 1), (1, 2), (2, 1)];
        let confusion = Confusion::new(&labels, pairs);
        assert_eq!(
            confusion.counts,
            [vec![2, 0, 0, 0], vec![1, 1, 1, 0], vec![0, 1, 0, 0], vec![0, 0, 0, 0]]
        );
        let classes = confusion.classes();
        let of = |f: fn(&ClassScore) -> f64| classes.iter().map(f).collect::<Vec<_>>();
        assert_eq!(of(|c| c.accuracy), [1.0, 1.0 / 3.0, 0.0, 0.0]);
        assert_eq!(of(|c| c.precision), [2.0 / 3.0, 0.5, 0.0, 0.0]);
        assert_eq!(of(|c| c.f1), [0.8, 0.4, 0.0, 0.0]);
        assert!((confusion.macro_f1() - 0.4).abs() < 1e-15, "`never` does not count");
        assert_eq!(Confusion::new(&labels, []).macro_f1(), 0.0);
    }
}
