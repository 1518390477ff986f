//! Rounding to the type in which mergekit holds intermediate results.

use firebrick_tensor::block::DType;
use half::{bf16, f16};

/// To what an intermediate result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Exact,
    Bf16,
    F16,
}

impl Rounding {
    /// What holds the values of `dtype`; f32 for all but the two types of 16 bits.
    pub(crate) fn to(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Rounding::Bf16,
            DType::F16 => Rounding::F16,
            _ => Rounding::Exact,
        }
    }

    #[inline(always)]
    pub(crate) fn round(self, v: f32) -> f32 {
        match self {
            Rounding::Exact => v,
            Rounding::Bf16 => bf16::from_f32(v).to_f32(),
            Rounding::F16 => f16::from_f32(v).to_f32(),
        }
    }

    /// Rounds a scalar that was computed in f64.
    pub(crate) fn scalar(self, v: f64) -> f32 {
        self.round(v as f32)
    }
}
