use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::block::{DType as Block, decode, encode};
use firebrick_tensor::ops::{PackedInputs, PackedMatrix, packed_matmul};

use super::support::{
    Case, below, devices, devices_and, error, flat, host, is_flex, normal, of_products, wide,
};

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

const SHAPES: [(u8, usize, usize, usize); 13] = [
    (1, 32, 33, 3),
    (2, 16, 64, 5),
    (3, 32, 64, 7),
    (3, 64, 97, 33),
    (4, 1, 9, 2),
    (4, 128, 130, 300),
    (5, 7, 31, 4),
    (8, 64, 65, 17),
    // What kernels take in blocks of 32 inputs, 16 outputs, tiles of 256 inputs.
    (4, 32, 1, 1),
    (8, 32, 97, 67),
    (4, 32, 32, 16),
    (4, 64, 131, 37),
    (8, 96, 289, 131),
];

#[test]
fn unpacks_what_was_packed() {
    for (i, (bits, group, d_in, d_out)) in SHAPES.into_iter().enumerate() {
        let matrix = Matrix::new(bits, group, d_in, d_out);
        // The last of these has whole panels alone.
        for device in devices_and(i % 2 == 1 && i < 8 || i == 10) {
            let packed = matrix.pack(&device, DType::F32);
            let got = host(packed.unpack().reshape([d_in * d_out]));
            let e = error(&got, &matrix.dense(group));
            assert!(e < 3e-7, "{bits} bits, group {group}: off by {e:e} on {device:?}");
            // With a scale of one and a zero of zero the codes themselves come back, exactly.
            let groups = [d_in.div_ceil(group), d_out];
            let plain = |codes: &[u8]| {
                let (scale, zero) = (Tensor::ones(groups, &device), Tensor::zeros(groups, &device));
                let packed = PackedMatrix::pack(codes, d_in, d_out, bits, group, scale, zero);
                host(packed.unpack().reshape([d_in * d_out]))
            };
            let codes: Vec<f64> = matrix.codes.iter().map(|&c| c.into()).collect();
            assert_eq!(plain(&matrix.codes), codes);
            // Control: one bit of one code shows there and nowhere else.
            let (at, mut flipped) = (d_in * d_out / 2, matrix.codes.clone());
            flipped[at] ^= 1 << (bits - 1);
            let other = plain(&flipped);
            let differ: Vec<usize> = (0..codes.len()).filter(|&i| other[i] != codes[i]).collect();
            assert_eq!(differ, [at]);
            // Of whole panels.
            let words = d_in.div_ceil(32 / bits as usize);
            assert_eq!(packed.bytes(), 4 * (words + 2 * groups[0]) * d_out.next_multiple_of(16));
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
    for (i, (bits, group, d_in, d_out)) in SHAPES.into_iter().enumerate() {
        let matrix = Matrix::new(bits, group, d_in, d_out);
        let dense = matrix.dense(group);
        for rows in [1, 3, 7, 8, 20] {
            let case = Case {
                name: format!("packed_matmul {rows} x [{d_in}, {d_out}], {bits} bits in groups of {group}"),
                inputs: vec![normal("x", rows * d_in)],
                op: &|t| {
                    let [x] = t.try_into().expect("one input");
                    let weight = matrix.pack(&x.device(), x.dtype());
                    packed_matmul(x.reshape([rows, d_in]), &weight, PackedInputs::Exact)
                        .reshape([rows * d_out])
                },
                reference: &|t| matrix.product(&t[0], &dense),
            };
            // Only the CPU has another path for few rows.
            for device in devices_and(rows == 3 && i % 2 == 1 && i < 8) {
                case.check(&device, of_products(&device, 5e-6), (rows < 8).then_some(1e-9));
                if group > 1 && d_in > group {
                    let other = matrix.dense(group + 1);
                    case.refutes(&device, &|t| matrix.product(&t[0], &other));
                }
            }
        }
    }
}

#[test]
fn scales_may_be_halves_and_groups_may_share_zero_points() {
    for device in devices().into_iter().filter(|d| d.supports_dtype(DType::F16)) {
        for (bits, group, d_in, d_out) in [(4, 32, 97, 37), (8, 64, 256, 33), (3, 16, 50, 5)] {
            let mut matrix = Matrix::new(bits, group, d_in, d_out);
            matrix.scale.iter_mut().for_each(|s| *s = half::f16::from_f32(*s).to_f32());
            let groups = d_in.div_ceil(group);
            let shared = matrix.zero[..d_out].to_vec();
            let scale = flat(&matrix.scale, &device, DType::F16).reshape([groups, d_out]);
            let zero = flat(&shared, &device, DType::F32).reshape([1, d_out]);
            let packed = PackedMatrix::pack(&matrix.codes, d_in, d_out, bits, group, scale, zero);
            let words = d_in.div_ceil(32 / bits as usize);
            assert_eq!(packed.bytes(), (4 * words + 2 * groups + 4) * d_out.next_multiple_of(16));
            let other = matrix.dense(group);
            matrix.zero = shared.repeat(groups);
            let dense = matrix.dense(group);
            assert!(error(&host(packed.unpack().reshape([d_in * d_out])), &dense) < 3e-7);
            assert!(error(&other, &dense) > 1e-3, "control: zero points of their own are others");
            for rows in [1, 5, 20] {
                let x = normal("x", rows * d_in);
                let want = matrix.product(&wide(&x), &dense);
                let x = flat(&x, &device, DType::F32).reshape([rows, d_in]);
                let got = packed_matmul(x, &packed, PackedInputs::Exact);
                let e = error(&host(got.reshape([rows * d_out])), &want);
                let bound = of_products(&device, 5e-6);
                assert!(e < bound, "{bits} bits, {rows} rows: off by {e:e} on {device:?}");
            }
        }
    }
}

/// `x` in blocks of 32, each to multiples of a 127th of its largest.
fn rounded(x: &[f64], d_in: usize) -> Vec<f64> {
    let blocks = x.chunks(d_in).flat_map(|row| row.chunks(32));
    let round = |block: &[f64]| {
        let unit = block.iter().fold(0.0f64, |m, v| m.max(v.abs())) / 127.0;
        block.iter().map(|v| (v / unit).round_ties_even() * unit).collect::<Vec<_>>()
    };
    blocks.flat_map(round).collect()
}

#[test]
fn inputs_of_eight_bits_agree_with_the_same_arithmetic_in_f64() {
    for (i, (bits, group, d_in, d_out)) in SHAPES.into_iter().enumerate() {
        let matrix = Matrix::new(bits, group, d_in, d_out);
        let dense = matrix.dense(group);
        // A GPU has one path for all shapes.
        let gpus = |rows| rows == 3 && (i == 3 || i == 7);
        for (rows, device) in [1, 3, 20]
            .into_iter()
            .flat_map(|rows| devices_and(gpus(rows)).into_iter().map(move |d| (rows, d)))
        {
            let x = normal("x", rows * d_in);
            let want = matrix.product(&rounded(&wide(&x), d_in), &dense);
            let of = |dtype, inputs| {
                let x = flat(&x, &device, dtype).reshape([rows, d_in]);
                host(packed_matmul(x, &matrix.pack(&device, dtype), inputs).reshape([rows * d_out]))
            };
            let e = error(&of(DType::F32, PackedInputs::EightBits), &want);
            let bound = of_products(&device, 1e-5);
            assert!(e < bound, "{bits} bits, group {group}, [{d_in}, {d_out}]: off by {e:e} on {device:?}");
            // The composed body, which f64 takes on the CPU.
            if is_flex(&device) {
                assert!(error(&of(DType::F64, PackedInputs::EightBits), &want) < 1e-9);
            }
            // Control: exact inputs give something else, but where there is one input alone.
            let lost = error(&of(DType::F32, PackedInputs::Exact), &want);
            assert!(d_in == 1 || (1e-4..0.05).contains(&lost), "[{d_in}, {d_out}]: {lost:e}");
        }
    }
}

#[test]
fn gradients_pass_inputs_of_eight_bits_as_if_nothing_were_rounded() {
    let device = Device::flex().autodiff();
    let matrix = Matrix::new(4, 32, 97, 37).pack(&device, DType::F32);
    let gradient = |inputs| {
        let x = flat(&normal("x", 3 * 97), &device, DType::F32).require_grad();
        let weights = flat(&normal("weights", 3 * 37), &device, DType::F32).reshape([3, 37]);
        let y = packed_matmul(x.clone().reshape([3, 97]), &matrix, inputs);
        host(x.grad(&(y * weights).sum().backward()).expect("a gradient"))
    };
    assert_eq!(gradient(PackedInputs::EightBits), gradient(PackedInputs::Exact));
}

#[test]
fn blocks_of_files_become_packed_matrices() {
    let (d_in, d_out) = (96, 37);
    let mut weight = normal("weight", d_in * d_out);
    // A block of equal values has a scale of zero.
    weight[..32].fill(0.75);
    weight[32..64].fill(0.0);
    let turned = |o: usize| (o + 5) % d_out;
    for (dtype, bytes, tolerance) in [
        (Block::Q4_0, 18 * 3 * d_out, 0.0),
        (Block::Q8_0, 34 * 3 * d_out, 0.0),
        (Block::Q4_1, 20 * 3 * d_out, 3e-7),
    ] {
        // At an odd address, as files have it.
        let mut file = vec![0u8; 1 + bytes];
        encode(dtype, &weight, &mut file[1..]).unwrap();
        let mut values = vec![0.0; weight.len()];
        decode(dtype, &file[1..], &mut values).unwrap();
        for device in devices() {
            let of = |dtype, bytes, shape| PackedMatrix::from_blocks(dtype, bytes, shape, turned, &device);
            let packed = of(dtype, &file[1..], [d_in, d_out]).unwrap().expect("a type that is packed");
            let dense = host(packed.unpack().reshape([d_in * d_out]));
            let at = |i: usize, o: usize| f64::from(values[turned(o) * d_in + i]);
            let want: Vec<f64> = (0..d_in * d_out).map(|n| at(n / d_out, n % d_out)).collect();
            let e = error(&dense, &want);
            assert!(e <= tolerance, "{dtype}: off by {e:e} on {device:?}");
            // Row 0 of the file is the output that `turned` takes there.
            let e = (dense[d_out - 5] - 0.75).abs();
            assert!(e < 5e-3, "{dtype}: {e}");
            let x = normal("x", 2 * d_in);
            let product = |at: usize| {
                let (row, o) = (at / d_out, at % d_out);
                (0..d_in).map(|i| f64::from(x[row * d_in + i]) * want[i * d_out + o]).sum()
            };
            let want: Vec<f64> = (0..2 * d_out).map(product).collect();
            let y =
                packed_matmul(flat(&x, &device, DType::F32).reshape([2, d_in]), &packed, PackedInputs::Exact);
            assert!(error(&host(y.reshape([2 * d_out])), &want) < 1e-5);
            if is_flex(&device) {
                let zeros = if dtype == Block::Q4_1 { 3 } else { 1 };
                let codes = d_in * packed.bits as usize / 8;
                assert_eq!(packed.bytes(), (codes + 2 * 3 + 4 * zeros) * d_out.next_multiple_of(16));
            }
            assert!(of(dtype, &file[2..], [d_in, d_out]).is_err(), "a byte is missing");
            assert!(of(dtype, &file[1..], [d_in * 2, usize::MAX]).is_err());
            assert!(of(dtype, &file[1..], [48, 2 * d_out]).is_err(), "blocks would cross rows");
            assert!(of(Block::F16, &file[1..], [d_in, d_out]).unwrap().is_none());
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
