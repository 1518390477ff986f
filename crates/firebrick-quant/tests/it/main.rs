//! Quantized models: packed and dequantized weights compute the same, and GPTQ beats rounding on a trained model.

mod model;
mod packed;
