//! Storage types of tensors on disk: sizes, names in each file format, and bit-exact encoders and decoders.
//!
//! Every type is one row of a table: how many elements a block holds, how many bytes it takes, what GGUF and
//! safetensors call it, and (for types that carry real numbers) how a run of blocks becomes `f32` and back.
//! Decoders of packed types are ggml's bit for bit, and so are the encoders of `Q4_0`, `Q4_1`,
//! `Q5_0`, `Q5_1` and `Q8_0`.

mod codec;
mod fit;
mod kquants;

pub use kquants::SuperBlock;

use codec::*;
use kquants::*;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are little-endian and are read in place");

/// Storage type of a tensor on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// 4-bit symmetric blocks of 32: an f16 scale `d`, values `(q - 8) d`. 4.5 bits per value.
    Q4_0,
    /// 4-bit asymmetric blocks of 32: f16 scale `d` and minimum `m`, values `q d + m`. 5 bits per value.
    Q4_1,
    /// 8-bit symmetric blocks of 32: an f16 scale `d`, values `q d`. 8.5 bits per value.
    Q8_0,
    /// 5-bit symmetric blocks of 32: an f16 scale `d`, values `(q - 16) d`. 5.5 bits per value.
    Q5_0,
    /// 5-bit asymmetric blocks of 32: f16 scale `d` and minimum `m`, values `q d + m`. 6 bits per value.
    Q5_1,
    /// 2-bit asymmetric super-blocks of 256: groups of 16 have 4-bit multiples `s`, `t` of f16 `d` and `m`, values
    /// `q s d - t m`. 2.625 bits per value.
    #[serde(rename = "q2_k")]
    Q2K,
    /// 3-bit symmetric super-blocks of 256: groups of 16 have 6-bit multiples `s` of an f16 `d`, values `(q - 4) s d`. 3.4375
    /// bits per value.
    #[serde(rename = "q3_k")]
    Q3K,
    /// 4-bit asymmetric super-blocks of 256: groups of 32 have 6-bit multiples `s`, `t` of f16 `d` and `m`, values
    /// `q s d - t m`. 4.5 bits per value.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 5-bit asymmetric super-blocks of 256, as `Q4K`. 5.5 bits per value.
    #[serde(rename = "q5_k")]
    Q5K,
    /// 6-bit symmetric super-blocks of 256: groups of 16 have 8-bit multiples `s` of an f16 `d`, values `(q - 32) s d`. 6.5625
    /// bits per value.
    #[serde(rename = "q6_k")]
    Q6K,
    /// 4-bit blocks of 32 on 16 uneven levels `v`: an f16 scale `d`, values `v d`. 4.5 bits per value.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// 4-bit super-blocks of 256 on the levels of `Iq4Nl`: groups of 32 have 6-bit multiples of an f16. 4.25 bits per value.
    #[serde(rename = "iq4_xs")]
    Iq4Xs,
    /// IEEE 754 double precision.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// One byte, 0 or 1.
    Bool,
}

/// What went wrong between bytes and numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The type holds integers; reading them as real numbers would lose bits without a word.
    #[error("{0} holds integers, not real numbers")]
    NotReal(DType),
    /// The number of elements is not a whole number of blocks.
    #[error("{elements} elements of {dtype} are not a whole number of blocks of {}", dtype.block_len())]
    PartialBlock {
        /// Storage type.
        dtype: DType,
        /// Number of elements, or the element at which a range starts or ends.
        elements: usize,
    },
    /// Bytes and elements do not belong together.
    #[error("{elements} elements of {dtype} do not take {bytes} bytes")]
    Length {
        /// Storage type.
        dtype: DType,
        /// Number of elements.
        elements: usize,
        /// Number of bytes.
        bytes: usize,
    },
    /// No such storage type.
    #[error("unknown storage type `{0}`; known: {known}", known = DType::names())]
    Unknown(String),
}

type Decode = fn(&[u8], &mut [f32]);
// Values, weights of their errors, bytes.
type Encode = fn(&[f32], Option<&[f32]>, &mut [u8]);

struct Format {
    dtype: DType,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    ggml: Option<u32>,
    safetensors: Option<&'static str>,
    codec: Option<(Decode, Encode)>,
}

const fn plain(
    dtype: DType,
    name: &'static str,
    block_bytes: usize,
    ggml: Option<u32>,
    safetensors: &'static str,
    codec: Option<(Decode, Encode)>,
) -> Format {
    Format { dtype, name, block_len: 1, block_bytes, ggml, safetensors: Some(safetensors), codec }
}

const fn packed(
    dtype: DType,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    ggml: u32,
    codec: (Decode, Encode),
) -> Format {
    Format { dtype, name, block_len, block_bytes, ggml: Some(ggml), safetensors: None, codec: Some(codec) }
}

// In the order of the enum; `DType::format` indexes it.
static FORMATS: [Format; 25] = [
    plain(DType::F32, "f32", 4, Some(0), "F32", Some((decode_f32, encode_f32))),
    plain(DType::F16, "f16", 2, Some(1), "F16", Some((decode_f16, encode_f16))),
    plain(DType::BF16, "bf16", 2, Some(30), "BF16", Some((decode_bf16, encode_bf16))),
    packed(DType::Q4_0, "q4_0", 32, 18, 2, (decode_q4_0, encode_q4_0)),
    packed(DType::Q4_1, "q4_1", 32, 20, 3, (decode_q4_1, encode_q4_1)),
    packed(DType::Q8_0, "q8_0", 32, 34, 8, (decode_q8_0, encode_q8_0)),
    packed(DType::Q5_0, "q5_0", 32, 22, 6, (decode_q5_0, encode_q5_0)),
    packed(DType::Q5_1, "q5_1", 32, 24, 7, (decode_q5_1, encode_q5_1)),
    packed(DType::Q2K, "q2_k", 256, 84, 10, (decode_q2_k, encode_q2_k)),
    packed(DType::Q3K, "q3_k", 256, 110, 11, (decode_q3_k, encode_q3_k)),
    packed(DType::Q4K, "q4_k", 256, 144, 12, (decode_q4_k, encode_q4_k)),
    packed(DType::Q5K, "q5_k", 256, 176, 13, (decode_q5_k, encode_q5_k)),
    packed(DType::Q6K, "q6_k", 256, 210, 14, (decode_q6_k, encode_q6_k)),
    packed(DType::Iq4Nl, "iq4_nl", 32, 18, 20, (decode_iq4_nl, encode_iq4_nl)),
    packed(DType::Iq4Xs, "iq4_xs", 256, 136, 23, (decode_iq4_xs, encode_iq4_xs)),
    plain(DType::F64, "f64", 8, Some(28), "F64", Some((decode_f64, encode_f64))),
    plain(DType::I8, "i8", 1, Some(24), "I8", None),
    plain(DType::U8, "u8", 1, None, "U8", None),
    plain(DType::I16, "i16", 2, Some(25), "I16", None),
    plain(DType::U16, "u16", 2, None, "U16", None),
    plain(DType::I32, "i32", 4, Some(26), "I32", None),
    plain(DType::U32, "u32", 4, None, "U32", None),
    plain(DType::I64, "i64", 8, Some(27), "I64", None),
    plain(DType::U64, "u64", 8, None, "U64", None),
    plain(DType::Bool, "bool", 1, None, "BOOL", None),
];

impl DType {
    fn format(self) -> &'static Format {
        &FORMATS[self as usize]
    }

    /// Every storage type, in the order of the enum.
    pub fn all() -> impl Iterator<Item = DType> {
        FORMATS.iter().map(|f| f.dtype)
    }

    fn names() -> String {
        FORMATS.iter().filter(|f| f.codec.is_some()).map(|f| f.name).collect::<Vec<_>>().join(", ")
    }

    /// Lower-case name: `f32`, `bf16`, `q4_0`, ...; [`FromStr`] reads it back.
    pub fn name(self) -> &'static str {
        self.format().name
    }

    /// Elements per block; 1 for unpacked types.
    pub fn block_len(self) -> usize {
        self.format().block_len
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.format().block_bytes
    }

    /// Mean bits per element, scales included.
    pub fn bits_per_element(self) -> f64 {
        self.block_bytes() as f64 * 8.0 / self.block_len() as f64
    }

    /// Bytes of `elements` elements; `None` when they are not whole blocks or the size overflows.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        let format = self.format();
        let whole = elements.is_multiple_of(format.block_len);
        (elements / format.block_len).checked_mul(format.block_bytes).filter(|_| whole)
    }

    /// Bytes of a row-major tensor. Blocks run along the last axis and never cross a row, so `None` also
    /// when the last extent is not a whole number of blocks.
    pub fn bytes_for_shape(self, shape: &[usize]) -> Option<usize> {
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(self.block_len()) {
            return None;
        }
        self.bytes_for(elements(shape)?)
    }

    /// A block format with shared scales.
    pub fn is_packed(self) -> bool {
        self.block_len() > 1
    }

    /// [`decode`] and [`encode`] work on it: a float or a packed type.
    pub fn is_real(self) -> bool {
        self.format().codec.is_some()
    }

    /// The `ggml_type` number in GGUF files, where ggml has the type.
    pub fn ggml_id(self) -> Option<u32> {
        self.format().ggml
    }

    /// The type with this `ggml_type` number.
    pub fn from_ggml_id(id: u32) -> Option<DType> {
        FORMATS.iter().find(|f| f.ggml == Some(id)).map(|f| f.dtype)
    }

    /// The `dtype` string in safetensors headers; packed types have none.
    pub fn safetensors_name(self) -> Option<&'static str> {
        self.format().safetensors
    }

    /// The type with this `dtype` string in safetensors headers.
    pub fn from_safetensors_name(name: &str) -> Option<DType> {
        FORMATS.iter().find(|f| f.safetensors == Some(name)).map(|f| f.dtype)
    }
}

/// Number of elements of a shape (1 for a scalar); `None` when it overflows.
pub fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = BlockError;

    fn from_str(s: &str) -> Result<Self, BlockError> {
        let format = FORMATS.iter().find(|f| f.name.eq_ignore_ascii_case(s.trim()));
        format.map(|f| f.dtype).ok_or_else(|| BlockError::Unknown(s.to_owned()))
    }
}

fn codec(dtype: DType, elements: usize, bytes: usize) -> Result<(Decode, Encode), BlockError> {
    let codec = dtype.format().codec.ok_or(BlockError::NotReal(dtype))?;
    match dtype.bytes_for(elements) {
        Some(expected) if expected == bytes => Ok(codec),
        Some(_) => Err(BlockError::Length { dtype, elements, bytes }),
        None => Err(BlockError::PartialBlock { dtype, elements }),
    }
}

/// Decodes a run of whole blocks; `bytes` need no alignment. Any bytes are valid input.
///
/// # Errors
/// When `dtype` holds integers, or `bytes` is not the size of `out.len()` elements.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), BlockError> {
    let (decode, _) = codec(dtype, out.len(), bytes.len())?;
    decode(bytes, out);
    Ok(())
}

/// Encodes a run of whole blocks: `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1` and `Q8_0` as ggml's reference quantizers do, the K and IQ4 types
/// with the least squared error that a search over scales finds.
///
/// Values out of the range of an f16 (value or scale) become infinite, as in ggml; what is not finite stays
/// not finite in the float types and is undefined (but never a panic) in the packed ones.
///
/// # Errors
/// When `dtype` holds integers, or `out` is not the size of `values.len()` elements.
pub fn encode(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<(), BlockError> {
    let (_, encode) = codec(dtype, values.len(), out.len())?;
    encode(values, None, out);
    Ok(())
}

/// Encodes whole rows, where a squared error in column `j` counts `importance[j]` times: the mean square of what the column is
/// multiplied with, as an importance matrix holds it.
///
/// The float types and `Q8_0` come out as from [`encode`]. Only ratios of importances matter; one that is not a positive number
/// counts as almost nothing, and if all are, they count the same.
///
/// # Errors
/// As [`encode`], and when `importance` is not as long as a row, that is: is not whole blocks, or does not divide `values`.
pub fn encode_weighted(
    dtype: DType,
    values: &[f32],
    importance: &[f32],
    out: &mut [u8],
) -> Result<(), BlockError> {
    let (_, encode) = codec(dtype, values.len(), out.len())?;
    let columns = importance.len();
    let row_bytes = dtype.bytes_for(columns).filter(|n| *n > 0 && values.len().is_multiple_of(columns));
    let row_bytes = row_bytes.ok_or(BlockError::PartialBlock { dtype, elements: columns })?;
    let usable = |v: &f32| if v.is_finite() && *v > 0.0 { f64::from(*v) } else { 0.0 };
    let mean = importance.iter().map(usable).sum::<f64>() / columns as f64;
    // Never 0: a group of columns without weight would have no best scale.
    let weight = |v: &f32| if mean > 0.0 { (usable(v) / mean).max(1e-6) as f32 } else { 1.0 };
    let weights: Vec<f32> = importance.iter().map(weight).collect();
    for (row, out) in values.chunks_exact(columns).zip(out.chunks_exact_mut(row_bytes)) {
        encode(row, Some(&weights), out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_names_are_unique() {
        for (i, dtype) in DType::all().enumerate() {
            assert_eq!(dtype as usize, i, "{dtype}");
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
            if let Some(id) = dtype.ggml_id() {
                assert_eq!(DType::from_ggml_id(id), Some(dtype));
            }
            if let Some(name) = dtype.safetensors_name() {
                assert_eq!(DType::from_safetensors_name(name), Some(dtype));
            }
        }
        assert_eq!("Q8_0".parse(), Ok(DType::Q8_0));
        let error = "q9".parse::<DType>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown storage type `q9`; known: f32, f16, bf16, q4_0, q4_1, q8_0, q5_0, q5_1, \
             q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, f64"
        );
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::Q4_0.bytes_for(64), Some(36));
        assert_eq!(DType::Q4_0.bytes_for(65), None);
        assert_eq!(DType::F64.bytes_for(usize::MAX), None);
        assert_eq!(DType::Q8_0.bytes_for_shape(&[2, 32]), Some(68));
        // 64 elements, but a block would run from one row into the next.
        assert_eq!(DType::Q8_0.bytes_for_shape(&[4, 16]), None);
        assert_eq!(DType::F32.bytes_for_shape(&[]), Some(4));
        assert_eq!(DType::F32.bytes_for_shape(&[0, 7]), Some(0));
        assert_eq!(DType::F32.bytes_for_shape(&[usize::MAX, 2]), None);
        assert_eq!(DType::Q4_1.bits_per_element(), 5.0);
        assert_eq!(DType::Q2K.bytes_for_shape(&[3, 512]), Some(3 * 2 * 84));
        assert_eq!(DType::Q6K.bytes_for_shape(&[256, 128]), None);

        let (mut bytes, mut values) = ([0; 34], [0.0; 32]);
        let short = decode(DType::Q8_0, &bytes[..33], &mut values).unwrap_err();
        assert_eq!(short, BlockError::Length { dtype: DType::Q8_0, elements: 32, bytes: 33 });
        let partial = encode(DType::Q8_0, &values[..31], &mut bytes).unwrap_err();
        assert_eq!(partial, BlockError::PartialBlock { dtype: DType::Q8_0, elements: 31 });
        let integers = decode(DType::I32, &bytes[..4], &mut values[..1]).unwrap_err();
        assert_eq!(integers, BlockError::NotReal(DType::I32));
    }
}
