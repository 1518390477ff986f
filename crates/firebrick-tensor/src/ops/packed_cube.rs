//! GPU kernels of [`packed_matmul`](super::packed_matmul()): few rows read codes where they lie; more meet the dense matrix.

use burn_backend::{DType, Shape, TensorMetadata};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::cube::{fits, is_float, room, storage};
use super::packed::{PANEL, PackedInputs, PackedLayout, PackedOps, composed, composed_unpack, rounded};

/// Outputs of a cube, and units that share their inputs.
const OUTPUTS: u32 = 32;
const SHARE: u32 = 8;

/// Rows from which decoding the matrix once is less work than decoding it for each of them.
const ROWS: usize = 8;

impl PackedOps for CubeBackend {
    fn unpack(words: CubeTensor, scale: CubeTensor, zero: CubeTensor, layout: PackedLayout) -> CubeTensor {
        if !has_kernel(&words, &scale, &zero) {
            return composed_unpack::<Self>(words, scale, zero, layout);
        }
        let [words, scale, zero] = [words, scale, zero].map(into_contiguous);
        let out = room(&zero, Shape::new([layout.d_in, layout.d_out]));
        let (client, values) = (words.client.clone(), layout.d_in * layout.d_out);
        let dim = CubeDim::new(&client, values);
        let (scale_type, zero_type, shared) = (storage(&scale), storage(&zero), zero.shape()[1] == 1);
        unpack_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, values, dim),
            dim,
            words.into_buffer_arg(),
            scale.into_buffer_arg(),
            zero.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            layout.d_in as u32,
            layout.d_out as u32,
            layout.group as u32,
            layout.bits as u32,
            shared,
            scale_type,
            zero_type,
        );
        out
    }

    fn packed_matmul(
        x: CubeTensor,
        words: CubeTensor,
        scale: CubeTensor,
        zero: CubeTensor,
        layout: PackedLayout,
        inputs: PackedInputs,
    ) -> CubeTensor {
        let units = x.client.properties().hardware.max_units_per_cube;
        let few = x.shape()[0] < ROWS && is_float(&x) && fits(&x) && units >= OUTPUTS * SHARE;
        if !few || !has_kernel(&words, &scale, &zero) {
            return composed::<Self>(x, words, scale, zero, layout, inputs);
        }
        let x = if inputs == PackedInputs::EightBits { rounded::<Self>(x) } else { x };
        let x = into_contiguous(x);
        let [words, scale, zero] = [words, scale, zero].map(into_contiguous);
        let (rows, d_out) = (x.shape()[0], layout.d_out);
        let out = room(&x, Shape::new([rows, d_out]));
        let (scale_type, zero_type, shared) = (storage(&scale), storage(&zero), zero.shape()[1] == 1);
        product_kernel::launch(
            &x.client.clone(),
            CubeCount::Static((d_out as u32).div_ceil(OUTPUTS), rows as u32, 1),
            CubeDim::new_2d(OUTPUTS, SHARE),
            x.into_buffer_arg(),
            words.into_buffer_arg(),
            scale.into_buffer_arg(),
            zero.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            layout.d_in as u32,
            d_out as u32,
            layout.group as u32,
            layout.bits as u32,
            shared,
            storage(&out),
            scale_type,
            zero_type,
        );
        out
    }
}

fn has_kernel(words: &CubeTensor, scale: &CubeTensor, zero: &CubeTensor) -> bool {
    words.dtype == DType::I32
        && [scale, zero].iter().all(|t| is_float(t))
        && [words, scale, zero].iter().all(|t| fits(t))
        // The dense matrix has up to 32 codes for each word.
        && words.meta.num_elements() < u32::MAX as usize / 32
}

/// Where that is which an output has for `each` of its `d_in` inputs, `input` among them.
#[cube]
fn in_panel(input: u32, each: u32, d_in: u32, output: u32) -> usize {
    let panel = comptime!(PANEL as u32);
    let rows = d_in.div_ceil(each);
    ((output / panel * rows + input / each) * panel + output % panel) as usize
}

#[cube(launch)]
fn unpack_kernel<S: Float, Z: Float>(
    words: &[i32],
    scale: &[S],
    zero: &[Z],
    out: &mut [Z],
    d_in: u32,
    d_out: u32,
    group: u32,
    #[comptime] bits: u32,
    #[comptime] shared: bool,
    #[define(S)] _scale_type: ElemType,
    #[define(Z)] _zero_type: ElemType,
) {
    let (input, output) = (ABSOLUTE_POS as u32 / d_out, ABSOLUTE_POS as u32 % d_out);
    if input < d_in {
        let per_word = comptime!(32 / bits);
        let word = words[in_panel(input, per_word, d_in, output)];
        let code = word >> (input % per_word * bits) as i32 & comptime!((1i32 << bits) - 1);
        let in_group = in_panel(input, group, d_in, output);
        let mut at = in_group;
        if comptime!(shared) {
            at = in_panel(0, 1, 1, output);
        }
        let weight = f32::cast_from(scale[in_group]) * (f32::cast_from(code) - f32::cast_from(zero[at]));
        out[ABSOLUTE_POS] = Z::cast_from(weight);
    }
}

#[cube(launch)]
fn product_kernel<F: Float, S: Float, Z: Float>(
    x: &[F],
    words: &[i32],
    scale: &[S],
    zero: &[Z],
    out: &mut [F],
    d_in: u32,
    d_out: u32,
    group: u32,
    #[comptime] bits: u32,
    #[comptime] shared: bool,
    #[define(F)] _dtype: ElemType,
    #[define(S)] _scale_type: ElemType,
    #[define(Z)] _zero_type: ElemType,
) {
    let mut sums = Shared::<[f32]>::new_slice(comptime!((OUTPUTS * SHARE) as usize));
    let output = CUBE_POS_X * OUTPUTS + UNIT_POS_X;
    let row = CUBE_POS_Y as usize * d_in as usize;
    let per_word = comptime!(32 / bits);
    let mut sum = 0.0f32;
    if output < d_out {
        let mut word = UNIT_POS_Y;
        while word * per_word < d_in {
            let codes = words[in_panel(word * per_word, per_word, d_in, output)];
            #[unroll]
            for k in 0..per_word {
                let input = word * per_word + k;
                if input < d_in {
                    let code = codes >> (k * bits) as i32 & comptime!((1i32 << bits) - 1);
                    let in_group = in_panel(input, group, d_in, output);
                    let mut at = in_group;
                    if comptime!(shared) {
                        at = in_panel(0, 1, 1, output);
                    }
                    let code = f32::cast_from(code) - f32::cast_from(zero[at]);
                    sum += f32::cast_from(x[row + input as usize]) * f32::cast_from(scale[in_group]) * code;
                }
            }
            word += SHARE;
        }
    }
    sums[(UNIT_POS_Y * OUTPUTS + UNIT_POS_X) as usize] = sum;
    sync_cube();
    if UNIT_POS_Y == 0 && output < d_out {
        let mut all = 0.0f32;
        for part in 0..SHARE {
            all += sums[(part * OUTPUTS + UNIT_POS_X) as usize];
        }
        out[CUBE_POS_Y as usize * d_out as usize + output as usize] = F::cast_from(all);
    }
}
