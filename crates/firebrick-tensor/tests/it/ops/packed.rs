use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{PackedInputs, PackedMatrix, packed_matmul};

use super::support::{Case, below, devices, error, flat, host, is_flex, normal};

struct Matrix {
    bits: u8,
    group: usize,
    d_in: usize,
    d_out: usize,
    codes: Vec<u8>,
    scale: Vec<f32>,
    zero: Vec<f32>,
}

impl Matrix {
    fn new(bits: u8, group: usize, d_in: usize, d_out: usize) -> Self {
        let codes = below("codes", d_in * d_out, 1 << bits).into_iter().map(|c| c as u8).collect();
        let n = d_in.div_ceil(group) * d_out;
        let scale = normal("scale", n).into_iter().map(|s| 0.1 + s.abs()).collect();
        let zero = normal("zero", n).into_iter().map(|z| z + f32::from(1u8 << (bits - 1))).collect();
        Self { bits, group, d_in, d_out, codes, scale, zero }
    }

    fn pack(&self, device: &Device, dtype: DType) -> PackedMatrix {
        let shape = [self.d_in.div_ceil(self.group), self.d_out];
        let (scale, zero) = (flat(&self.scale, device, dtype), flat(&self.zero, device, dtype));
        let (scale, zero) = (scale.reshape(shape), zero.reshape(shape));
        PackedMatrix::pack(&self.codes, self.d_in, self.d_out, self.bits, self.group, scale, zero)
    }

    fn dense(&self, group: usize) -> Vec<f64> {
        let value = |at: usize| {
            let g = at / self.d_out / group * self.d_out + at % self.d_out;
            f64::from(self.scale[g]) * (f64::from(self.codes[at]) - f64::from(self.zero[g]))
        };
        (0..self.codes.len()).map(value).collect()
    }

    fn product(&self, x: &[f64], dense: &[f64]) -> Vec<f64> {
        let entry = |at: usize| {
            let (row, j) = (at / self.d_out, at % self.d_out);
            (0..self.d_in).map(|i| x[row * self.d_in + i] * dense[i * self.d_out + j]).sum()
        };
        (0..x.len() / self.d_in * self.d_out).map(entry).collect()
    }
}

const SHAPES: [(u8, usize, usize, usize); 8] = [
    (1, 32, 33, 3),
    (2, 16, 64, 5),
    (3, 32, 64, 7),
    (3, 64, 97, 33),
    (4, 1, 9, 2),
    (4, 128, 130, 300),
    (5, 7, 31, 4),
    (8, 64, 65, 17),
];

#[test]
fn unpacks_what_was_packed() {
    for (bits, group, d_in, d_out) in SHAPES {
        let matrix = Matrix::new(bits, group, d_in, d_out);
        for device in devices() {
            let packed = matrix.pack(&device, DType::F32);
            let got = host(packed.unpack().reshape([d_in * d_out]));
            let e = error(&got, &matrix.dense(group));
            assert!(e < 3e-7, "{bits} bits, group {group}: off by {e:e} on {device:?}");
            // With a scale of one and a zero of zero the codes themselves come back, exactly.
            let groups = [d_in.div_ceil(group), d_out];
            let plain = PackedMatrix {
                scale: Tensor::ones(groups, &device),
                zero: Tensor::zeros(groups, &device),
                ..packed.clone()
            };
            let codes: Vec<f64> = matrix.codes.iter().map(|&c| c.into()).collect();
            assert_eq!(host(plain.unpack().reshape([d_in * d_out])), codes);
            // Control: one bit of one code shows there and nowhere else.
            let (at, mut flipped) = (d_in * d_out / 2, matrix.codes.clone());
            flipped[at] ^= 1 << (bits - 1);
            let other = PackedMatrix::pack(
                &flipped,
                d_in,
                d_out,
                bits,
                group,
                plain.scale.clone(),
                plain.zero.clone(),
            );
            let other = host(other.unpack().reshape([d_in * d_out]));
            let differ: Vec<usize> = (0..codes.len()).filter(|&i| other[i] != codes[i]).collect();
            assert_eq!(differ, [at]);
            let words = d_in.div_ceil(32 / bits as usize) * d_out;
            assert_eq!(packed.bytes(), 4 * (words + 2 * groups[0] * groups[1]));
            // The composed body, which f64 scales take on the CPU.
            if is_flex(&device) {
                let wide = matrix.pack(&device, DType::F64).unpack();
                assert!(error(&host(wide.reshape([d_in * d_out])), &matrix.dense(group)) < 1e-12);
            }
        }
    }
}

#[test]
fn products_agree_with_the_reference() {
    for (bits, group, d_in, d_out) in SHAPES {
        let matrix = Matrix::new(bits, group, d_in, d_out);
        let dense = matrix.dense(group);
        for rows in [1, 3, 7, 8, 20] {
            let case = Case {
                name: format!("packed_matmul {rows} x [{d_in}, {d_out}], {bits} bits in groups of {group}"),
                inputs: vec![normal("x", rows * d_in)],
                op: &|t| {
                    let [x] = t.try_into().expect("one input");
                    let weight = matrix.pack(&x.device(), x.dtype());
                    packed_matmul(x.reshape([rows, d_in]), &weight, PackedInputs::Exact).reshape([rows * d_out])
                },
                reference: &|t| matrix.product(&t[0], &dense),
            };
            // Only the CPU has another path for few rows.
            for device in devices().into_iter().filter(|d| is_flex(d) || matches!(rows, 3 | 20)) {
                case.check(&device, 5e-6, (rows < 8).then_some(1e-9));
                if group > 1 && d_in > group {
                    let other = matrix.dense(group + 1);
                    case.refutes(&device, &|t| matrix.product(&t[0], &other));
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "needs more than 3 bits")]
fn a_code_that_does_not_fit_is_refused() {
    let device = Device::flex();
    let ones = || Tensor::ones([1, 1], &device);
    PackedMatrix::pack(&[8], 1, 1, 3, 32, ones(), ones());
}
