//! Storage types of tensors on disk: sizes, names in each file format, and bit-exact encoders and decoders.
//!
//! Every type is one row of a table: how many elements a block holds, how many bytes it takes, what GGUF and
//! safetensors call it, and (for types that carry real numbers) how a run of blocks becomes `f32` and back.
//! The packed types follow ggml's reference quantizers bit for bit.

use half::f16;
use half::slice::HalfFloatSliceExt;
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
type Encode = fn(&[f32], &mut [u8]);

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
    block_bytes: usize,
    ggml: u32,
    codec: (Decode, Encode),
) -> Format {
    Format {
        dtype,
        name,
        block_len: 32,
        block_bytes,
        ggml: Some(ggml),
        safetensors: None,
        codec: Some(codec),
    }
}

// In the order of the enum; `DType::format` indexes it.
static FORMATS: [Format; 16] = [
    plain(DType::F32, "f32", 4, Some(0), "F32", Some((decode_f32, encode_f32))),
    plain(DType::F16, "f16", 2, Some(1), "F16", Some((decode_f16, encode_f16))),
    plain(DType::BF16, "bf16", 2, Some(30), "BF16", Some((decode_bf16, encode_bf16))),
    packed(DType::Q4_0, "q4_0", 18, 2, (decode_q4_0, encode_q4_0)),
    packed(DType::Q4_1, "q4_1", 20, 3, (decode_q4_1, encode_q4_1)),
    packed(DType::Q8_0, "q8_0", 34, 8, (decode_q8_0, encode_q8_0)),
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

    /// An unpacked real type: `f32`, `f16`, `bf16` or `f64`.
    pub fn is_float(self) -> bool {
        self.format().codec.is_some() && !self.is_packed()
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

/// Encodes a run of whole blocks as ggml's reference quantizers do.
///
/// Values out of the range of an f16 (value or scale) become infinite, as in ggml; what is not finite stays
/// not finite in the float types and is undefined (but never a panic) in the packed ones.
///
/// # Errors
/// When `dtype` holds integers, or `out` is not the size of `values.len()` elements.
pub fn encode(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<(), BlockError> {
    let (_, encode) = codec(dtype, values.len(), out.len())?;
    encode(values, out);
    Ok(())
}

fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes);
}

fn encode_f32(values: &[f32], out: &mut [u8]) {
    out.copy_from_slice(bytemuck::cast_slice(values));
}

fn decode_f64(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<8>().0.iter().zip(out) {
        *o = f64::from_le_bytes(*b) as f32;
    }
}

fn encode_f64(values: &[f32], out: &mut [u8]) {
    for (v, o) in values.iter().zip(out.as_chunks_mut::<8>().0) {
        *o = f64::from(*v).to_le_bytes();
    }
}

// A mapped file may start a tensor at an odd byte, so halves pass through an aligned buffer that stays in L1.
const HALVES: usize = 512;

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut buffer = [f16::ZERO; HALVES];
    for (b, o) in bytes.chunks(2 * HALVES).zip(out.chunks_mut(HALVES)) {
        let halves = &mut buffer[..o.len()];
        bytemuck::cast_slice_mut::<f16, u8>(halves).copy_from_slice(b);
        halves.convert_to_f32_slice(o);
    }
}

fn encode_f16(values: &[f32], out: &mut [u8]) {
    let mut buffer = [f16::ZERO; HALVES];
    for (v, o) in values.chunks(HALVES).zip(out.chunks_mut(2 * HALVES)) {
        let halves = &mut buffer[..v.len()];
        halves.convert_from_f32_slice(v);
        o.copy_from_slice(bytemuck::cast_slice(halves));
    }
}

// Written out because `half` has only a checked scalar loop for bf16 slices.
fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (v, o) in values.iter().zip(out.as_chunks_mut::<2>().0) {
        let bits = v.to_bits();
        let nearest_even = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        let half = if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { nearest_even };
        *o = (half as u16).to_le_bytes();
    }
}

fn scale(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

// Largest |x| ignoring NaN; as integers the bits of non-negative floats order alike and vectorize.
fn absolute_max(x: &[f32; 32]) -> f32 {
    let mut max = 0u32;
    for v in x {
        let bits = v.to_bits() & 0x7fff_ffff;
        max = max.max(if bits > 0x7f80_0000 { 0 } else { bits });
    }
    f32::from_bits(max)
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn decode_q4_0(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = scale(b[0], b[1]);
        for j in 0..16 {
            o[j] = (i32::from(b[2 + j] & 15) - 8) as f32 * d;
            o[j + 16] = (i32::from(b[2 + j] >> 4) - 8) as f32 * d;
        }
    }
}

fn encode_q4_0(values: &[f32], out: &mut [u8]) {
    for (x, o) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<18>().0) {
        let max = absolute_max(x);
        // The first value of that size gives the sign, so the largest value is the code 0 exactly.
        let signed = if max == 0.0 { 0.0 } else { x.iter().copied().find(|v| v.abs() == max).unwrap_or(0.0) };
        let d = signed / -8.0;
        let id = inverse(d);
        [o[0], o[1]] = f16::from_f32(d).to_le_bytes();
        for j in 0..16 {
            let low = ((x[j] * id + 8.5) as u8).min(15);
            let high = ((x[j + 16] * id + 8.5) as u8).min(15);
            o[2 + j] = low | (high << 4);
        }
    }
}

fn decode_q4_1(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let (d, m) = (scale(b[0], b[1]), scale(b[2], b[3]));
        for j in 0..16 {
            o[j] = f32::from(b[4 + j] & 15) * d + m;
            o[j + 16] = f32::from(b[4 + j] >> 4) * d + m;
        }
    }
}

fn encode_q4_1(values: &[f32], out: &mut [u8]) {
    for (x, o) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<20>().0) {
        let (min, max) = extremes(x);
        let d = (max - min) / 15.0;
        let id = inverse(d);
        [o[0], o[1]] = f16::from_f32(d).to_le_bytes();
        [o[2], o[3]] = f16::from_f32(min).to_le_bytes();
        for j in 0..16 {
            let low = (((x[j] - min) * id + 0.5) as u8).min(15);
            let high = (((x[j + 16] - min) * id + 0.5) as u8).min(15);
            o[4 + j] = low | (high << 4);
        }
    }
}

// Smallest and largest value ignoring NaN, in lanes so that it vectorizes.
fn extremes(x: &[f32; 32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::MAX; 8], [f32::MIN; 8]);
    for lane in x.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = if lane[i] < low[i] { lane[i] } else { low[i] };
            high[i] = if lane[i] > high[i] { lane[i] } else { high[i] };
        }
    }
    let min = low.into_iter().fold(f32::MAX, |m, v| if v < m { v } else { m });
    let max = high.into_iter().fold(f32::MIN, |m, v| if v > m { v } else { m });
    // A scan from left to right keeps the sign of the first zero, which reaches the file as the minimum.
    let first = |m: f32| if m == 0.0 { x.iter().copied().find(|&v| v == 0.0).unwrap_or(m) } else { m };
    (first(min), first(max))
}

fn decode_q8_0(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = scale(b[0], b[1]);
        for j in 0..32 {
            o[j] = f32::from(b[2 + j] as i8) * d;
        }
    }
}

fn encode_q8_0(values: &[f32], out: &mut [u8]) {
    for (x, o) in values.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let d = absolute_max(x) / 127.0;
        let id = inverse(d);
        [o[0], o[1]] = f16::from_f32(d).to_le_bytes();
        for j in 0..32 {
            let v = x[j] * id;
            // Half away from zero: adding the float below 1/2 and truncating is exact and vectorizes.
            o[2 + j] = (v + 0.499_999_97_f32.copysign(v)) as i8 as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;
    use proptest::prelude::*;
    use rand::Rng;
    use rand_distr::StandardNormal;

    const PACKED: [DType; 3] = [DType::Q4_0, DType::Q4_1, DType::Q8_0];

    fn encoded(dtype: DType, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap()];
        encode(dtype, values, &mut bytes).unwrap();
        bytes
    }

    fn decoded(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
        decode(dtype, bytes, &mut values).unwrap();
        values
    }

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
        assert_eq!(error, "unknown storage type `q9`; known: f32, f16, bf16, q4_0, q4_1, q8_0, f64");
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

        let (mut bytes, mut values) = ([0; 34], [0.0; 32]);
        let short = decode(DType::Q8_0, &bytes[..33], &mut values).unwrap_err();
        assert_eq!(short, BlockError::Length { dtype: DType::Q8_0, elements: 32, bytes: 33 });
        let partial = encode(DType::Q8_0, &values[..31], &mut bytes).unwrap_err();
        assert_eq!(partial, BlockError::PartialBlock { dtype: DType::Q8_0, elements: 31 });
        let integers = decode(DType::I32, &bytes[..4], &mut values[..1]).unwrap_err();
        assert_eq!(integers, BlockError::NotReal(DType::I32));
    }

    // The reference quantizers as they are written down, one value after the other.
    fn plain(dtype: DType, x: &[f32]) -> Vec<u8> {
        let half = |v: f32| f16::from_f32(v).to_le_bytes();
        let id = |d: f32| if d != 0.0 { 1.0 / d } else { 0.0 };
        let nibbles = |q: Vec<u8>| (0..16).map(|j| q[j] | (q[j + 16] << 4)).collect::<Vec<_>>();
        match dtype {
            DType::Q4_0 => {
                let (mut amax, mut max) = (0.0, 0.0);
                for &v in x {
                    if v.abs() > amax {
                        (amax, max) = (v.abs(), v);
                    }
                }
                let d = max / -8.0;
                let q = x.iter().map(|v| ((v * id(d) + 8.5).trunc() as i8).min(15) as u8).collect();
                [&half(d)[..], &nibbles(q)].concat()
            }
            DType::Q4_1 => {
                let (mut min, mut max) = (f32::MAX, f32::MIN);
                for &v in x {
                    if v < min {
                        min = v;
                    }
                    if v > max {
                        max = v;
                    }
                }
                let d = (max - min) / 15.0;
                let q = x.iter().map(|v| (((v - min) * id(d) + 0.5).trunc() as i8).min(15) as u8).collect();
                [&half(d)[..], &half(min), &nibbles(q)].concat()
            }
            DType::Q8_0 => {
                let d = x.iter().fold(0.0, |m: f32, v| m.max(v.abs())) / 127.0;
                let q: Vec<u8> = x.iter().map(|v| (v * id(d)).round() as i8 as u8).collect();
                [&half(d)[..], &q].concat()
            }
            _ => unreachable!("packed types only"),
        }
    }

    // Magnitudes that keep 1/d finite; below that ggml's own result is undefined.
    fn value() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -4.0f32..4.0,
            1 => prop::sample::select(vec![0.0f32, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 127.0, -127.0]),
            1 => (-30i32..16, any::<bool>()).prop_map(|(e, s)| (e as f32).exp2() * if s { -1.0 } else { 1.0 }),
        ]
    }

    proptest! {
        #[test]
        fn encoders_equal_the_plain_reference(x in prop::collection::vec(value(), 32)) {
            for dtype in PACKED {
                prop_assert_eq!(encoded(dtype, &x), plain(dtype, &x), "{}", dtype);
            }
        }

        #[test]
        fn no_bits_panic(bits in prop::collection::vec(any::<u32>(), 64), bytes in prop::collection::vec(any::<u8>(), 680)) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            for dtype in DType::all().filter(|d| d.is_real()) {
                let size = encoded(dtype, &x).len();
                prop_assert_eq!(decoded(dtype, &bytes[..size]).len(), 64);
            }
        }

        // `enc(dec(b)) == b` for blocks an encoder can produce: the extreme codes are present and the scale is normal.
        #[test]
        fn encoding_undoes_decoding(
            mut codes in prop::collection::vec(any::<u8>(), 32),
            d in 0.001f32..8.0,
            negative in any::<bool>(),
            m in -30.0f32..30.0,
            extremes in (0usize..32, 1usize..32),
        ) {
            let (low, high) = (extremes.0, (extremes.0 + extremes.1) % 32);
            let half = |v: f32| f16::from_f32(v).to_le_bytes();
            let nibbles = |q: &[u8]| (0..16).map(|j| (q[j] & 15) | (q[j + 16] << 4)).collect::<Vec<_>>();
            let signed = if negative { -d } else { d };

            codes[low] = 127u8;
            let q8: Vec<u8> = codes.iter().map(|&q| if q == 128 { 129 } else { q }).collect();
            let block = [&half(d)[..], &q8].concat();
            prop_assert_eq!(encoded(DType::Q8_0, &decoded(DType::Q8_0, &block)), block);

            codes[low] = 0;
            let block = [&half(signed)[..], &nibbles(&codes)].concat();
            prop_assert_eq!(encoded(DType::Q4_0, &decoded(DType::Q4_0, &block)), block);

            codes[high] = 15;
            let block = [&half(d)[..], &half(m * d), &nibbles(&codes)].concat();
            prop_assert_eq!(encoded(DType::Q4_1, &decoded(DType::Q4_1, &block)), block);
        }
    }

    #[test]
    fn encoding_does_not_undo_decoding_of_a_block_without_its_largest_code() {
        let mut block = [1u8; 34];
        [block[0], block[1]] = f16::ONE.to_le_bytes();
        assert_ne!(encoded(DType::Q8_0, &decoded(DType::Q8_0, &block)), block);
    }

    #[test]
    fn halves_convert_like_the_half_crate_at_any_alignment() {
        let mut rng = Seed(1).stream("halves");
        let mut x: Vec<f32> = (0..3000).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 65504.0, 65520.0, 1e-8, 3e-5, f32::MAX]);
        // Exact ties and the neighbours of ties.
        x.extend((0..64).flat_map(|i| {
            [0x3f80_8000, 0x3f80_7fff, 0x3f80_8001].map(|b: u32| f32::from_bits(b + (i << 15)))
        }));
        let (f, b) = (encoded(DType::F16, &x), encoded(DType::BF16, &x));
        let back = |dtype, bytes: &[u8]| {
            let mut shifted = vec![0u8];
            shifted.extend_from_slice(bytes);
            let mut out = vec![0.0; x.len()];
            decode(dtype, &shifted[1..], &mut out).unwrap();
            out
        };
        let (from_f, from_b) = (back(DType::F16, &f), back(DType::BF16, &b));
        for (i, &v) in x.iter().enumerate() {
            let (hf, hb) = (f16::from_f32(v), half::bf16::from_f32(v));
            assert_eq!(f[2 * i..2 * i + 2], hf.to_le_bytes(), "{v}");
            assert_eq!(b[2 * i..2 * i + 2], hb.to_le_bytes(), "{v}");
            assert_eq!((from_f[i], from_b[i]), (hf.to_f32(), hb.to_f32()), "{v}");
        }
        let nan = decoded(DType::BF16, &encoded(DType::BF16, &[f32::from_bits(0x7f80_0001)]));
        assert!(nan[0].is_nan());
    }

    // Relative mean squared errors of the formats on standard normal weights, computed independently in numpy.
    #[test]
    fn errors_on_normal_weights_are_the_known_ones() {
        let mut rng = Seed(0).stream("weights");
        let x: Vec<f32> = (0..1024 * 768).map(|_| rng.sample(StandardNormal)).collect();
        let power: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        for (dtype, expected) in [(DType::Q4_0, 0.00738), (DType::Q4_1, 0.00611), (DType::Q8_0, 2.87e-5)] {
            let y = decoded(dtype, &encoded(dtype, &x));
            let error: f64 = x.iter().zip(&y).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let relative = error / power;
            assert!((relative / expected - 1.0).abs() < 0.02, "{dtype}: {relative}, expected {expected}");
        }
    }
}
