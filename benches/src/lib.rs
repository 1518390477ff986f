//! Shared device harness for the benchmarks: warm-up, repeats, median and median absolute deviation, one JSON object a line.
#![forbid(unsafe_code)]

use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

/// One measured case.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Suite, such as `forward`.
    pub suite: String,
    /// Case inside the suite.
    pub case: String,
    /// Device, as `--device` takes it.
    pub device: String,
    /// Type that was computed in.
    pub dtype: String,
    /// Unit of the figures; larger is better unless it is `s`.
    pub unit: String,
    /// Median over the repeats.
    pub median: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
    /// How many repeats were measured.
    pub repeats: usize,
    /// Who else did the same work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The peer's median, in the same unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_median: Option<f64>,
    /// `median / peer_median`, or its inverse for seconds: above 1 we are faster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// Median and median absolute deviation.
///
/// # Panics
/// If `values` is empty.
pub fn median_mad(values: &[f64]) -> (f64, f64) {
    let middle = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    };
    let median = middle(&mut values.to_vec());
    let mad = middle(&mut values.iter().map(|v| (v - median).abs()).collect());
    (median, mad)
}

/// Seconds of each of `repeats` calls of `work`, after one call to warm up; the device is idle before and after each.
pub fn time(device: &Device, repeats: usize, mut work: impl FnMut()) -> Vec<f64> {
    let sync = || device.sync().unwrap_or_else(|e| panic!("the device failed: {e}"));
    work();
    sync();
    (0..repeats)
        .map(|_| {
            let begin = Instant::now();
            work();
            sync();
            begin.elapsed().as_secs_f64()
        })
        .collect()
}

impl Measured {
    /// A case from seconds per call, in units per second (`amount` units a call), or in seconds if `unit` is `s`.
    pub fn new(suite: &str, case: &str, device: &str, unit: &str, amount: f64, seconds: &[f64]) -> Self {
        let values: Vec<f64> =
            if unit == "s" { seconds.to_vec() } else { seconds.iter().map(|s| amount / s).collect() };
        let (median, mad) = median_mad(&values);
        Measured {
            suite: suite.into(),
            case: case.into(),
            device: device.into(),
            dtype: "f32".into(),
            unit: unit.into(),
            median,
            mad,
            repeats: seconds.len(),
            peer: None,
            peer_median: None,
            ratio: None,
        }
    }

    /// The same with what a peer reached.
    pub fn with_peer(mut self, peer: &str, peer_median: f64) -> Self {
        let ratio = self.median / peer_median;
        self.ratio = Some(if self.unit == "s" { 1.0 / ratio } else { ratio });
        self.peer = Some(peer.into());
        self.peer_median = Some(peer_median);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median_mad(&[3.0, 1.0, 2.0]), (2.0, 1.0));
        assert_eq!(median_mad(&[4.0, 1.0, 2.0, 3.0]), (2.5, 1.0));
        let rate = Measured::new("s", "c", "flex", "tok/s", 100.0, &[0.5, 1.0, 2.0]);
        assert_eq!((rate.median, rate.mad), (100.0, 50.0));
        assert_eq!(rate.with_peer("p", 50.0).ratio, Some(2.0));
        let seconds = Measured::new("s", "c", "flex", "s", 1.0, &[2.0]);
        assert_eq!(seconds.with_peer("p", 4.0).ratio, Some(2.0));
    }
}
