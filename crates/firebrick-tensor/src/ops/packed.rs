//! Low-bit packed weight matrices and their product.

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};

/// A weight matrix as low-bit codes with a scale and a zero point for each group of input rows.
///
/// `w[i][o] = scale[i / group][o] * (code[i][o] - zero[i / group][o])`. Codes sit in 32-bit words along `d_in`, least
/// significant bits first; a word holds `32 / bits` whole codes (ten at 3 bits), none crosses a word.
#[derive(Module, Debug)]
pub struct PackedMatrix {
    /// Bits of a code, 1 to 8.
    pub bits: u8,
    /// Input rows that share a scale and a zero point.
    pub group: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
    /// `[ceil(d_in / (32 / bits)), d_out]`, bit patterns as i32.
    pub words: Tensor<2, Int>,
    /// `[ceil(d_in / group), d_out]`.
    pub scale: Tensor<2>,
    /// `[ceil(d_in / group), d_out]` in units of codes; may be fractional.
    pub zero: Tensor<2>,
}

impl PackedMatrix {
    /// Packs `codes` (`[d_in, d_out]`, row-major) on the device of `scale`.
    ///
    /// - scale, zero: `[ceil(d_in / group), d_out]`
    ///
    /// # Panics
    /// If `bits` is not 1 to 8, `group` is 0, a shape disagrees or a code does not fit in `bits`.
    pub fn pack(
        codes: &[u8],
        d_in: usize,
        d_out: usize,
        bits: u8,
        group: usize,
        scale: Tensor<2>,
        zero: Tensor<2>,
    ) -> Self {
        assert!((1..=8).contains(&bits), "PackedMatrix: {bits} bits, expected 1 to 8");
        assert!(group > 0, "PackedMatrix: group must not be 0");
        assert_eq!(codes.len(), d_in * d_out, "PackedMatrix: codes for [{d_in}, {d_out}]");
        let groups = d_in.div_ceil(group);
        assert_eq!(scale.dims(), [groups, d_out], "PackedMatrix: shape of scale");
        assert_eq!(zero.dims(), [groups, d_out], "PackedMatrix: shape of zero");
        let per_word = 32 / bits as usize;
        let rows = d_in.div_ceil(per_word);
        let mut words = vec![0u32; rows * d_out];
        for i in 0..d_in {
            let shift = (i % per_word) * bits as usize;
            let word_row = &mut words[i / per_word * d_out..][..d_out];
            for (word, &code) in word_row.iter_mut().zip(&codes[i * d_out..]) {
                assert!(u32::from(code) >> bits == 0, "PackedMatrix: code {code} needs more than {bits} bits");
                *word |= u32::from(code) << shift;
            }
        }
        let words: Vec<i32> = words.into_iter().map(|w| w as i32).collect();
        let words = Tensor::from_data(TensorData::new(words, [rows, d_out]), &scale.device());
        Self { bits, group, d_in, d_out, words, scale, zero }
    }

    /// The dense matrix `[d_in, d_out]`.
    pub fn unpack(&self) -> Tensor<2> {
        let (bits, per_word) = (i64::from(self.bits), 32 / i64::from(self.bits));
        let mask = (1i64 << bits) - 1;
        let rows = self.words.dims()[0];
        let slots = (0..per_word)
            .map(|i| self.words.clone().bitwise_right_shift_scalar(i * bits).bitwise_and_scalar(mask).float())
            .collect();
        let codes = Tensor::stack::<3>(slots, 1).reshape([rows * per_word as usize, self.d_out]);
        let codes = codes.narrow(0, 0, self.d_in);
        (codes - self.spread(&self.zero)) * self.spread(&self.scale)
    }

    /// Repeats each row `group` times: `[groups, d_out]` to `[d_in, d_out]`.
    fn spread(&self, x: &Tensor<2>) -> Tensor<2> {
        let [groups, d_out] = x.dims();
        let x = x.clone().reshape([groups, 1, d_out]).expand([groups, self.group, d_out]);
        x.reshape([groups * self.group, d_out]).narrow(0, 0, self.d_in)
    }

    /// Bytes held: words, scales and zero points.
    pub fn bytes(&self) -> usize {
        let values = |t: &Tensor<2>| t.shape().num_elements() * t.dtype().size();
        self.words.shape().num_elements() * 4 + values(&self.scale) + values(&self.zero)
    }
}

/// `x` times a packed matrix; gradients reach `x` only.
///
/// - x: `[rows, d_in]`
/// - result: `[rows, d_out]`
pub fn packed_matmul(x: Tensor<2>, weight: &PackedMatrix) -> Tensor<2> {
    x.matmul(weight.unpack())
}
