//! Cases, what was measured of them, and the statistics in between.

use serde::{Deserialize, Serialize};

use crate::Roofline;

/// What holds a case back on an ideal machine, counted for one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Nothing that was counted.
    Unknown,
    /// Floating-point operations, a multiply-add as two.
    Compute(f64),
    /// The same where the products are of bf16 numbers.
    ComputeBf16(f64),
    /// Bytes that have to be read.
    Read(f64),
    /// Bytes that have to be read and written, taken together.
    Copy(f64),
}

/// A case about to be measured.
#[derive(Clone, Debug)]
pub struct Case {
    /// Suite, such as `forward`.
    pub suite: &'static str,
    /// Name inside the suite.
    pub name: String,
    /// Type that is computed in or written.
    pub dtype: &'static str,
    /// Unit of the figures; larger is better unless it is `s`.
    pub unit: &'static str,
    /// Units of work in one call: tokens, megabytes. Not used where the unit is `s`.
    pub amount: f64,
    /// What one call needs at least.
    pub bound: Bound,
}

/// One measured case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Suite, such as `forward`.
    pub suite: String,
    /// Case inside the suite.
    pub case: String,
    /// Device, as `--device` takes it, or `host` for work that knows no device.
    pub device: String,
    /// Type that was computed in or written.
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The peer's median, in the same unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_median: Option<f64>,
    /// `median / peer_median`, or its inverse for seconds: above 1 we are faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// The peer's median absolute deviation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_mad: Option<f64>,
    /// Counted floating-point operations per second, in 1e9, of a compute-bound case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gflops: Option<f64>,
    /// `gflops` as a share of what a matrix product reached in the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_of_peak: Option<f64>,
    /// Counted bytes per second, in 1e9, of a memory-bound case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gbytes_per_s: Option<f64>,
    /// `gbytes_per_s` as a share of what reading, or copying, a large buffer reached in the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_of_bandwidth: Option<f64>,
    /// The most memory the process had resident while the case ran, in bytes, after loading and warming up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// The same of the peer's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_peak_bytes: Option<u64>,
    /// Page faults of the process in a call, their mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<f64>,
    /// The same of the peer's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_faults: Option<f64>,
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

impl Case {
    /// The figures of calls that took `seconds`.
    fn figures(&self, seconds: &[f64]) -> (f64, f64) {
        let figure = |s: &f64| if self.unit == "s" { *s } else { self.amount / s };
        median_mad(&seconds.iter().map(figure).collect::<Vec<_>>())
    }
}

impl Measured {
    /// A case on `device` whose calls took `seconds`, against the limits of the machine where they are known.
    ///
    /// # Panics
    /// If `seconds` is empty.
    pub fn new(case: &Case, device: &str, seconds: &[f64], roofline: Option<&Roofline>) -> Self {
        let (median, mad) = case.figures(seconds);
        let (typical, _) = median_mad(seconds);
        let mut measured = Measured {
            suite: case.suite.into(),
            case: case.name.clone(),
            device: device.into(),
            dtype: case.dtype.into(),
            unit: case.unit.into(),
            median,
            mad,
            repeats: seconds.len(),
            ..Measured::default()
        };
        let rate = |amount: f64, limit: fn(&Roofline) -> f64| {
            let rate = amount / typical / 1e9;
            (Some(rate), roofline.map(|r| rate / limit(r)))
        };
        match case.bound {
            Bound::Unknown => {}
            Bound::Compute(flop) => {
                (measured.gflops, measured.share_of_peak) = rate(flop, |r| r.gflops);
            }
            Bound::ComputeBf16(flop) => {
                (measured.gflops, measured.share_of_peak) = rate(flop, |r| r.gflops_bf16);
            }
            Bound::Read(bytes) => {
                (measured.gbytes_per_s, measured.share_of_bandwidth) = rate(bytes, |r| r.read);
            }
            Bound::Copy(bytes) => {
                (measured.gbytes_per_s, measured.share_of_bandwidth) = rate(bytes, |r| r.copy);
            }
        }
        measured
    }

    /// The same with the peer `name`, whose calls took `seconds`.
    ///
    /// # Panics
    /// If `seconds` is empty.
    pub fn with_peer(mut self, name: &str, case: &Case, seconds: &[f64]) -> Self {
        let (median, mad) = case.figures(seconds);
        self.ratio = Some(self.faster_than(median));
        (self.peer, self.peer_median, self.peer_mad) = (Some(name.into()), Some(median), Some(mad));
        self
    }

    /// How many times as fast this is as `other`, a figure in the same unit.
    pub fn faster_than(&self, other: f64) -> f64 {
        if self.unit == "s" { other / self.median } else { self.median / other }
    }

    /// What makes two measurements ones of the same work: suite, case, device and type.
    pub fn key(&self) -> [&str; 4] {
        [&self.suite, &self.case, &self.device, &self.dtype]
    }

    /// The key as one line of text.
    pub fn label(&self) -> String {
        let mut label = format!("{} {}", self.suite, self.case);
        for (word, usual) in [(&self.device, "flex"), (&self.dtype, "f32")] {
            if word != usual && word != "host" && !self.case.ends_with(word.as_str()) {
                label = format!("{label} {word}");
            }
        }
        label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(unit: &'static str, bound: Bound) -> Case {
        Case { suite: "s", name: "c".into(), dtype: "f32", unit, amount: 100.0, bound }
    }

    #[test]
    fn medians_and_deviations_of_known_values() {
        assert_eq!(median_mad(&[3.0, 1.0, 2.0]), (2.0, 1.0));
        assert_eq!(median_mad(&[4.0, 1.0, 2.0, 3.0]), (2.5, 1.0));
        assert_eq!(median_mad(&[7.0]), (7.0, 0.0));
        let (median, mad) = median_mad(&[1.0, 1.1, 0.9, 1.0, 1000.0]);
        assert!(median == 1.0 && mad <= 0.11, "one outlier moves neither: {median} {mad}");
        let mean = [1.0, 1.1, 0.9, 1.0, 1000.0].iter().sum::<f64>() / 5.0;
        assert!(mean > 200.0, "control: a mean is moved");
    }

    #[test]
    fn ratios_are_above_one_where_we_are_faster() {
        let tokens = case("tok/s", Bound::Unknown);
        let rate = Measured::new(&tokens, "flex", &[0.5, 1.0, 2.0], None);
        assert_eq!((rate.median, rate.mad, rate.repeats), (100.0, 50.0, 3));
        let rate = rate.with_peer("p", &tokens, &[2.0]);
        assert_eq!((rate.ratio, rate.peer_median), (Some(2.0), Some(50.0)));
        let seconds = case("s", Bound::Unknown);
        let timed = Measured::new(&seconds, "flex", &[2.0], None);
        assert_eq!(timed.clone().with_peer("p", &seconds, &[4.0]).ratio, Some(2.0));
        assert_eq!(timed.with_peer("p", &seconds, &[1.0]).ratio, Some(0.5), "control: slower");
    }

    #[test]
    fn shares_are_of_the_limit_that_bounds_the_case() {
        let roofline = Roofline { gflops: 100.0, gflops_bf16: 100.0, read: 20.0, copy: 10.0 };
        let of = |bound| Measured::new(&case("tok/s", bound), "flex", &[0.5], Some(&roofline));
        let compute = of(Bound::Compute(25e9));
        assert_eq!((compute.gflops, compute.share_of_peak), (Some(50.0), Some(0.5)));
        assert_eq!((compute.gbytes_per_s, compute.share_of_bandwidth), (None, None));
        let read = of(Bound::Read(5e9));
        assert_eq!((read.gbytes_per_s, read.share_of_bandwidth, read.gflops), (Some(10.0), Some(0.5), None));
        assert_eq!(of(Bound::Copy(5e9)).share_of_bandwidth, Some(1.0));
        let alone = Measured::new(&case("s", Bound::Compute(1e9)), "flex", &[0.5], None);
        assert_eq!((alone.gflops, alone.share_of_peak), (Some(2.0), None), "no limit, no share");
    }

    #[test]
    fn json_has_the_keys_that_others_read() {
        let seconds = case("s", Bound::Unknown);
        let alone = Measured::new(&seconds, "flex", &[2.0], None);
        let keys = |m: &Measured| -> Vec<String> {
            serde_json::to_value(m).unwrap().as_object().unwrap().keys().cloned().collect()
        };
        let always = ["suite", "case", "device", "dtype", "unit", "median", "mad", "repeats"];
        assert_eq!(keys(&alone), always);
        let paired = alone.with_peer("p", &seconds, &[4.0]);
        assert_eq!(keys(&paired)[8..], ["peer", "peer_median", "ratio", "peer_mad"]);
        let text = serde_json::to_string(&paired).unwrap();
        assert_eq!(serde_json::from_str::<Measured>(&text).unwrap(), paired);
    }
}
