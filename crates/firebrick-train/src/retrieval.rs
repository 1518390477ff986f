//! How well scores find what belongs together: recall at k, mean reciprocal rank, and Spearman's rank correlation.

use std::cmp::Ordering;

use crate::TrainError;

/// The documents in falling order of `scores`; of equal ones the earlier comes first, NaN comes last.
pub fn rank(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (scores[*a], scores[*b]);
        // What does not compare is NaN, which is sorted by being one.
        a.is_nan().cmp(&b.is_nan()).then(b.partial_cmp(&a).unwrap_or(Ordering::Equal))
    });
    order
}

/// The share of `relevant` among the first `k` of `ranking`, in 0..=1; 0 if nothing is relevant.
pub fn recall_at(ranking: &[usize], relevant: &[usize], k: usize) -> f64 {
    if relevant.is_empty() {
        return 0.0;
    }
    let found = ranking.iter().take(k).filter(|document| relevant.contains(document)).count();
    found as f64 / relevant.len() as f64
}

/// One over the place, from 1, of the first relevant document in `ranking`; 0 if there is none.
pub fn reciprocal_rank(ranking: &[usize], relevant: &[usize]) -> f64 {
    let place = ranking.iter().position(|document| relevant.contains(document));
    place.map_or(0.0, |place| 1.0 / (place + 1) as f64)
}

/// Means over the queries of a retrieval task.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RetrievalReport {
    /// Number of queries.
    pub queries: usize,
    /// `k` and the mean recall at it, in 0..=1.
    pub recall: Vec<(usize, f64)>,
    /// Mean reciprocal rank, in 0..=1.
    pub mrr: f64,
}

/// Ranks the documents of each query by `scores[query][document]` and compares with the `relevant` ones, each named once.
///
/// # Errors
/// Without queries; and lists every query that has another number of documents than the first, no relevant document,
/// or one that is not there or named twice.
pub fn retrieval(
    scores: &[Vec<f32>],
    relevant: &[Vec<usize>],
    ks: &[usize],
) -> Result<RetrievalReport, TrainError> {
    let documents = scores.first().map_or(0, Vec::len);
    let mut problems = Vec::new();
    if scores.is_empty() || scores.len() != relevant.len() {
        problems.push(format!(
            "{} queries with scores, {} with relevant documents",
            scores.len(),
            relevant.len()
        ));
    }
    for (query, (scores, relevant)) in scores.iter().zip(relevant).enumerate() {
        if scores.len() != documents {
            problems.push(format!("query {query} has {} documents, the first {documents}", scores.len()));
        }
        if relevant.is_empty() {
            problems.push(format!("query {query} has no relevant document"));
        }
        for (i, document) in relevant.iter().enumerate() {
            if *document >= documents || relevant[..i].contains(document) {
                problems.push(format!(
                    "query {query}: document {document} of {documents} is not there, or comes twice"
                ));
            }
        }
    }
    if !problems.is_empty() {
        return Err(TrainError::Retrieval { problems });
    }
    let rankings: Vec<Vec<usize>> = scores.iter().map(|s| rank(s)).collect();
    let mean = |of: &dyn Fn(&[usize], &[usize]) -> f64| {
        rankings.iter().zip(relevant).map(|(r, known)| of(r, known)).sum::<f64>() / rankings.len() as f64
    };
    let recall = ks.iter().map(|k| (*k, mean(&|r, known| recall_at(r, known, *k)))).collect();
    Ok(RetrievalReport { queries: rankings.len(), recall, mrr: mean(&reciprocal_rank) })
}

/// Pearson's correlation of two samples, in -1..=1; none if they differ in length, have fewer than two values or a
/// constant, or hold a value that is not finite.
pub fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    if x.len() != y.len() || x.len() < 2 || x.iter().chain(y).any(|v| !v.is_finite()) {
        return None;
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mean_x, mean_y) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(y) {
        let (a, b) = (a - mean_x, b - mean_y);
        (xy, xx, yy) = (xy + a * b, xx + a * a, yy + b * b);
    }
    let scale = xx.sqrt() * yy.sqrt();
    (scale > 0.0 && scale.is_finite()).then(|| (xy / scale).clamp(-1.0, 1.0))
}

/// Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs. None as [`pearson`].
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    if x.iter().chain(y).any(|v| !v.is_finite()) {
        return None;
    }
    pearson(&mean_ranks(x), &mean_ranks(y))
}

/// The place of each value in rising order, from 1; equal values get the mean of their places.
fn mean_ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    while first < order.len() {
        let same = order[first..].iter().take_while(|i| values[**i] == values[order[first]]).count();
        for i in &order[first..first + same] {
            ranks[*i] = first as f64 + (same + 1) as f64 / 2.0;
        }
        first += same;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rankings_by_hand() {
        assert_eq!(rank(&[0.1, 0.9, f32::NAN, 0.5, 0.9, f32::NEG_INFINITY]), [1, 4, 3, 0, 5, 2]);
        assert_eq!(rank(&[-0.0, 0.0, -0.0]), [0, 1, 2], "zeros are equal");
        let ranking = [4, 2, 0, 1, 3];
        assert_eq!(recall_at(&ranking, &[2, 3], 1), 0.0);
        assert_eq!(recall_at(&ranking, &[2, 3], 2), 0.5);
        assert_eq!(recall_at(&ranking, &[2, 3], 5), 1.0);
        assert_eq!(recall_at(&ranking, &[2, 3], 99), 1.0);
        assert_eq!(reciprocal_rank(&ranking, &[0, 3]), 1.0 / 3.0);
        assert_eq!(reciprocal_rank(&ranking, &[4]), 1.0);
        assert_eq!((reciprocal_rank(&ranking, &[9]), recall_at(&ranking, &[], 3)), (0.0, 0.0));
    }

    #[test]
    fn reports_by_hand() {
        // The relevant documents come at places 1; 3; and 1 and 4.
        let scores = vec![vec![0.9, 0.1, 0.2, 0.3], vec![0.9, 0.8, 0.7, 0.1], vec![0.4, 0.1, 0.2, 0.3]];
        let relevant = vec![vec![0], vec![2], vec![0, 1]];
        let report = retrieval(&scores, &relevant, &[1, 3, 4]).unwrap();
        assert_eq!(report.recall, [(1, 0.5), (3, 2.5 / 3.0), (4, 1.0)]);
        assert!((report.mrr - (1.0 + 1.0 / 3.0 + 1.0) / 3.0).abs() < 1e-15);
        let reversed: Vec<Vec<f32>> = scores.iter().map(|s| s.iter().map(|v| -v).collect()).collect();
        assert!(retrieval(&reversed, &relevant, &[1]).unwrap().mrr < report.mrr, "control");
    }

    #[test]
    fn every_problem_is_listed() {
        let scores = vec![vec![0.1, 0.2], vec![0.1], vec![0.3, 0.4]];
        let error = retrieval(&scores, &[vec![2], vec![0], vec![]], &[1]).unwrap_err().to_string();
        for query in ["query 0", "query 1", "query 2"] {
            assert!(error.contains(query), "{query} in {error}");
        }
        assert!(retrieval(&[], &[], &[1]).is_err());
        assert!(retrieval(&scores[..1], &[vec![1, 1]], &[1]).is_err(), "twice");
        assert!(retrieval(&scores[..1], &[vec![1]], &[1]).is_ok(), "control");
    }

    #[test]
    fn correlations_equal_scipys() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/correlation.json")).unwrap();
        let floats = |v: &serde_json::Value| -> Vec<f64> {
            v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let cases = golden["cases"].as_array().unwrap();
        for case in cases {
            let (x, y) = (floats(&case["x"]), floats(&case["y"]));
            let (s, p) = (case["spearman"].as_f64().unwrap(), case["pearson"].as_f64().unwrap());
            assert!((spearman(&x, &y).unwrap() - s).abs() < 1e-12);
            assert!((pearson(&x, &y).unwrap() - p).abs() < 1e-12);
            let turned: Vec<f64> = y.iter().map(|v| -v).collect();
            assert!((spearman(&x, &turned).unwrap() + s).abs() < 1e-12);
        }
        let apart = cases
            .iter()
            .any(|c| (c["spearman"].as_f64().unwrap() - c["pearson"].as_f64().unwrap()).abs() > 0.1);
        assert!(apart, "control: the two are told apart");
    }

    #[test]
    fn spearman_by_hand() {
        // Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: covariance 3, squares 4.5 and 5.
        let found = spearman(&[1.0, 2.0, 2.0, 9.0], &[1.0, 2.0, 4.0, 3.0]).unwrap();
        assert!((found - 3.0 / (4.5f64 * 5.0).sqrt()).abs() < 1e-15);
        let rising = spearman(&[1.0, 2.0, 3.0], &[1.0, 8.0, 9.0]).unwrap();
        assert!((rising - 1.0).abs() < 1e-15, "any rising function");
        for (x, y) in [
            (&[1.0, 1.0][..], &[1.0, 2.0][..]),
            (&[1.0][..], &[1.0][..]),
            (&[1.0, f64::NAN][..], &[1.0, 2.0][..]),
        ] {
            assert_eq!(spearman(x, y), None);
        }
        assert_eq!(spearman(&[1.0, 2.0], &[1.0, 2.0, 3.0]), None);
    }
}
