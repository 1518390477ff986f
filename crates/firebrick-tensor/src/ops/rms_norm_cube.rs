//! GPU kernels of [`rms_norm`](super::rms_norm): a cube of units for each row, sums in shared memory, no plane operations.

use burn_backend::{DType, Shape, TensorMetadata, ops::FloatTensorOps};
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};
use cubecl::prelude::*;

use super::cube::{CUBES, has_kernel, room, rows_of, storage, total, units};
use super::rms_norm::{RmsNormOps, composed, composed_backward};

/// Most partial sums of the gradient of gamma.
const PARTS: usize = 64;

impl RmsNormOps for CubeBackend {
    fn rms_norm(x: CubeTensor, gamma: CubeTensor, eps: f64) -> CubeTensor {
        if !has_kernel(&[&x, &gamma]) {
            return composed::<Self>(x, gamma, eps);
        }
        let (x, gamma) = (into_contiguous(x), into_contiguous(gamma));
        let (rows, d) = rows_of(&x);
        let out = room(&x, x.shape());
        let units = units(&x, d);
        forward_kernel::launch(
            &x.client.clone(),
            CubeCount::Static(rows.min(CUBES) as u32, 1, 1),
            CubeDim::new_1d(units),
            x.into_buffer_arg(),
            gamma.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows as u32,
            d as u32,
            eps as f32,
            units,
            storage(&out),
        );
        out
    }

    fn rms_norm_backward(
        x: CubeTensor,
        gamma: CubeTensor,
        grad: CubeTensor,
        eps: f64,
    ) -> (CubeTensor, CubeTensor) {
        if !has_kernel(&[&x, &gamma, &grad]) {
            return composed_backward::<Self>(x, gamma, grad, eps);
        }
        let (x, gamma, grad) = (into_contiguous(x), into_contiguous(gamma), into_contiguous(grad));
        let (rows, d) = rows_of(&x);
        let (client, device, dtype) = (x.client.clone(), x.device.clone(), x.dtype);
        let dx = room(&x, x.shape());
        let buffer =
            |shape: Shape| empty_device_contiguous_dtype(client.clone(), device.clone(), shape, DType::F32);
        let inverse = buffer(Shape::new([rows]));
        let units = units(&x, d);
        backward_kernel::launch(
            &client,
            CubeCount::Static(rows.min(CUBES) as u32, 1, 1),
            CubeDim::new_1d(units),
            x.clone().into_buffer_arg(),
            gamma.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            dx.clone().into_buffer_arg(),
            inverse.clone().into_buffer_arg(),
            rows as u32,
            d as u32,
            eps as f32,
            units,
            storage(&dx),
        );
        let share = rows.div_ceil(PARTS);
        let parts = rows.div_ceil(share);
        let partial = buffer(Shape::new([parts, d]));
        gamma_kernel::launch(
            &client,
            CubeCount::Static(d.div_ceil(units as usize) as u32, parts as u32, 1),
            CubeDim::new_1d(units),
            x.into_buffer_arg(),
            grad.into_buffer_arg(),
            inverse.into_buffer_arg(),
            partial.clone().into_buffer_arg(),
            rows as u32,
            d as u32,
            share as u32,
            storage(&dx),
        );
        let dgamma = Self::float_reshape(Self::float_sum_dim(partial, 0), gamma.shape());
        (dx, Self::float_cast(dgamma, dtype.into()))
    }
}

#[cube(launch)]
fn forward_kernel<F: Float>(
    x: &[F],
    gamma: &[F],
    out: &mut [F],
    rows: u32,
    d: u32,
    eps: f32,
    #[comptime] units: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut sums = Shared::<[f32]>::new_slice(units as usize);
    let d = d as usize;
    let step = units as usize;
    let mut row = CUBE_POS_X;
    while row < rows {
        let first = row as usize * d;
        let mut squares = 0.0f32;
        let mut j = UNIT_POS_X as usize;
        while j < d {
            let v = f32::cast_from(x[first + j]);
            squares += v * v;
            j += step;
        }
        let mean = total(&mut sums, squares) / f32::cast_from(d as u32);
        let r = 1.0f32 / (mean + eps).sqrt();
        let mut j = UNIT_POS_X as usize;
        while j < d {
            out[first + j] = F::cast_from(f32::cast_from(x[first + j]) * r * f32::cast_from(gamma[j]));
            j += step;
        }
        row += CUBE_COUNT_X;
    }
}

#[cube(launch)]
fn backward_kernel<F: Float>(
    x: &[F],
    gamma: &[F],
    grad: &[F],
    dx: &mut [F],
    inverse: &mut [f32],
    rows: u32,
    d: u32,
    eps: f32,
    #[comptime] units: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut sums = Shared::<[f32]>::new_slice(units as usize);
    let length = f32::cast_from(d);
    let d = d as usize;
    let step = units as usize;
    let mut row = CUBE_POS_X;
    while row < rows {
        let first = row as usize * d;
        let mut squares = 0.0f32;
        let mut product = 0.0f32;
        let mut j = UNIT_POS_X as usize;
        while j < d {
            let v = f32::cast_from(x[first + j]);
            squares += v * v;
            product += v * f32::cast_from(grad[first + j]) * f32::cast_from(gamma[j]);
            j += step;
        }
        let mean = total(&mut sums, squares) / length;
        let product = total(&mut sums, product);
        let r = 1.0f32 / (mean + eps).sqrt();
        let along = product * r * r / length;
        let mut j = UNIT_POS_X as usize;
        while j < d {
            let scaled = f32::cast_from(grad[first + j]) * f32::cast_from(gamma[j]);
            dx[first + j] = F::cast_from(r * (scaled - f32::cast_from(x[first + j]) * along));
            j += step;
        }
        if UNIT_POS_X == 0 {
            inverse[row as usize] = r;
        }
        row += CUBE_COUNT_X;
    }
}

/// A column of the gradient of gamma over `share` rows.
#[cube(launch)]
fn gamma_kernel<F: Float>(
    x: &[F],
    grad: &[F],
    inverse: &[f32],
    partial: &mut [f32],
    rows: u32,
    d: u32,
    share: u32,
    #[define(F)] _dtype: ElemType,
) {
    let column = CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X;
    if column < d {
        let mut row = CUBE_POS_Y * share;
        let mut end = row + share;
        if end > rows {
            end = rows;
        }
        let mut sum = 0.0f32;
        while row < end {
            let at = row as usize * d as usize + column as usize;
            sum += f32::cast_from(grad[at]) * f32::cast_from(x[at]) * inverse[row as usize];
            row += 1;
        }
        partial[CUBE_POS_Y as usize * d as usize + column as usize] = sum;
    }
}
