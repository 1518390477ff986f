//! Calibration profiles, layer diagnostics, budget allocation and reports.
#![forbid(unsafe_code)]

mod second_moments;

pub use second_moments::{SecondMoments, input_site};
