//! GPU kernels of packed matrices: a unit for each code to unpack, a unit for each sum of a product with few rows.

use burn_backend::{DType, Shape, TensorMetadata, cubecl::dtype_to_storage_type};
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::packed::{PackedLayout, PackedOps, composed, composed_unpack};

/// Rows of `x` from which on the dense product is faster than reading the codes once for each row.
const DIRECT_ROWS: usize = 8;

/// Units of a cube.
const UNITS: u32 = 64;

impl PackedOps for CubeBackend {
    fn unpack(words: CubeTensor, scale: CubeTensor, zero: CubeTensor, layout: PackedLayout) -> CubeTensor {
        if !has_kernel(&words, &[&scale, &zero]) {
            return composed_unpack::<Self>(words, scale, zero, layout);
        }
        let (words, scale, zero) = (into_contiguous(words), into_contiguous(scale), into_contiguous(zero));
        let d_out = words.shape()[1];
        let shape = Shape::new([layout.d_in, d_out]);
        let out =
            empty_device_contiguous_dtype(words.client.clone(), words.device.clone(), shape, scale.dtype);
        let elements = layout.d_in * d_out;
        let dim = CubeDim::new(&words.client, elements);
        unpack_kernel::launch(
            &words.client.clone(),
            calculate_cube_count_elemwise(&words.client, elements, dim),
            dim,
            words.into_buffer_arg(),
            scale.into_buffer_arg(),
            zero.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            elements as u32,
            d_out as u32,
            layout.group as u32,
            layout.bits as u32,
            dtype_to_storage_type(out.dtype),
        );
        out
    }

    fn packed_matmul(
        x: CubeTensor,
        words: CubeTensor,
        scale: CubeTensor,
        zero: CubeTensor,
        layout: PackedLayout,
    ) -> CubeTensor {
        let rows = x.shape()[0];
        if rows >= DIRECT_ROWS || !has_kernel(&words, &[&x, &scale, &zero]) {
            return composed::<Self>(x, words, scale, zero, layout);
        }
        let (x, words) = (into_contiguous(x), into_contiguous(words));
        let (scale, zero) = (into_contiguous(scale), into_contiguous(zero));
        let d_out = words.shape()[1];
        let shape = Shape::new([rows, d_out]);
        let out = empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, x.dtype);
        product_kernel::launch(
            &x.client.clone(),
            CubeCount::Static((d_out as u32).div_ceil(UNITS), rows as u32, 1),
            CubeDim::new_1d(UNITS),
            x.into_buffer_arg(),
            words.into_buffer_arg(),
            scale.into_buffer_arg(),
            zero.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            layout.d_in as u32,
            d_out as u32,
            layout.group as u32,
            layout.bits as u32,
            dtype_to_storage_type(out.dtype),
        );
        out
    }
}

/// Whether the kernels apply: 32-bit words, one floating dtype and something to compute.
fn has_kernel(words: &CubeTensor, floats: &[&CubeTensor]) -> bool {
    words.dtype == DType::I32
        && words.meta.num_elements() > 0
        && floats.iter().all(|t| {
            matches!(t.dtype, DType::F32 | DType::F16 | DType::BF16)
                && t.dtype == floats[0].dtype
                && t.meta.num_elements() > 0
                && t.meta.num_elements() < u32::MAX as usize / 32
        })
}

/// Code of row `i`, column `j`.
#[cube]
fn code(words: &[i32], i: u32, j: u32, d_out: u32, #[comptime] bits: u32) -> f32 {
    let per_word = comptime!(32 / bits);
    let mask = comptime!(((1u32 << bits) - 1) as i32);
    let word = words[((i / per_word) * d_out + j) as usize];
    let shift = i32::cast_from((i % per_word) * bits);
    // The shift copies the sign bit; the mask drops the copies.
    f32::cast_from((word >> shift) & mask)
}

#[cube(launch)]
fn unpack_kernel<F: Float>(
    words: &[i32],
    scale: &[F],
    zero: &[F],
    out: &mut [F],
    elements: u32,
    d_out: u32,
    group: u32,
    #[comptime] bits: u32,
    #[define(F)] _dtype: ElemType,
) {
    let at = u32::cast_from(ABSOLUTE_POS);
    if at < elements {
        let i = at / d_out;
        let j = at % d_out;
        let g = ((i / group) * d_out + j) as usize;
        let value = code(words, i, j, d_out, bits) - f32::cast_from(zero[g]);
        out[at as usize] = F::cast_from(f32::cast_from(scale[g]) * value);
    }
}

#[cube(launch)]
fn product_kernel<F: Float>(
    x: &[F],
    words: &[i32],
    scale: &[F],
    zero: &[F],
    out: &mut [F],
    d_in: u32,
    d_out: u32,
    group: u32,
    #[comptime] bits: u32,
    #[define(F)] _dtype: ElemType,
) {
    let j = CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X;
    let row = CUBE_POS_Y;
    if j < d_out {
        let mut sum = 0.0f32;
        let mut first = 0u32;
        while first < d_in {
            let mut end = first + group;
            if end > d_in {
                end = d_in;
            }
            let g = ((first / group) * d_out + j) as usize;
            let zero = f32::cast_from(zero[g]);
            let mut part = 0.0f32;
            let mut i = first;
            while i < end {
                part +=
                    f32::cast_from(x[(row * d_in + i) as usize]) * (code(words, i, j, d_out, bits) - zero);
                i += 1;
            }
            sum += part * f32::cast_from(scale[g]);
            first = end;
        }
        out[(row * d_out + j) as usize] = F::cast_from(sum);
    }
}
