//! GPU kernel of [`rope`](super::rope()): each unit turns a pair of values, read where they lie.

use burn_backend::TensorMetadata;
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::cube::{has_kernel, room, storage};
use super::rope::{RopeOps, composed};

impl RopeOps for CubeBackend {
    fn rope(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, inverse: bool) -> CubeTensor {
        if !has_kernel(&[&x, &cos, &sin]) {
            return composed::<Self>(x, cos, sin, inverse);
        }
        let (cos, sin) = (into_contiguous(cos), into_contiguous(sin));
        let out = room(&x, x.shape());
        let (client, pairs) = (x.client.clone(), x.shape().num_elements() / 2);
        let dim = CubeDim::new(&client, pairs);
        kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, pairs, dim),
            dim,
            x.into_tensor_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            out.clone().into_tensor_arg(),
            pairs as u32,
            if inverse { -1.0 } else { 1.0 },
            storage(&out),
        );
        out
    }
}

#[cube(launch)]
fn kernel<F: Float>(
    x: &Tensor<F>,
    cos: &[F],
    sin: &[F],
    out: &mut Tensor<F>,
    pairs: u32,
    sign: f32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < pairs as usize {
        let (heads, tokens, half) = (x.shape(1), x.shape(2), x.shape(3) / 2);
        let j = ABSOLUTE_POS % half;
        let row = ABSOLUTE_POS / half;
        let token = row % tokens;
        let head = row / tokens % heads;
        let batch = row / tokens / heads;
        let from = batch * x.stride(0) + head * x.stride(1) + token * x.stride(2) + j * x.stride(3);
        let a = f32::cast_from(x[from]);
        let b = f32::cast_from(x[from + half * x.stride(3)]);
        let c = f32::cast_from(cos[token * half + j]);
        let s = f32::cast_from(sin[token * half + j]) * sign;
        let to = row * 2 * half + j;
        out[to] = F::cast_from(a * c - b * s);
        out[to + half] = F::cast_from(b * c + a * s);
    }
}
