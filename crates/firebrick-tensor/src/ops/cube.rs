//! What GPU kernels share.

use burn_backend::{DType, Shape, TensorMetadata, cubecl::dtype_to_storage_type};
use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::prelude::*;

/// Most units of a cube; a power of two, like every smaller count.
pub(super) const UNITS: u32 = 256;

/// Most cubes in a dimension that every backend takes; what is left goes to the same cubes again.
pub(super) const CUBES: usize = 65_535;

/// Whether a kernel applies to tensors of one floating dtype.
pub(super) fn has_kernel(tensors: &[&CubeTensor]) -> bool {
    tensors.iter().all(|t| t.dtype == tensors[0].dtype && is_float(t) && fits(t))
}

/// Whether kernels read and write this type.
pub(super) fn is_float(x: &CubeTensor) -> bool {
    matches!(x.dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Whether there is something to compute, that 32 bits count.
pub(super) fn fits(x: &CubeTensor) -> bool {
    (1..u32::MAX as usize).contains(&x.meta.num_elements())
}

/// Rows and their length.
pub(super) fn rows_of(x: &CubeTensor) -> (usize, usize) {
    let shape = x.shape();
    let d = shape[shape.num_dims() - 1];
    (shape.num_elements() / d, d)
}

/// Room for a tensor on the device of `x`, in its dtype.
pub(super) fn room(x: &CubeTensor, shape: Shape) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, x.dtype)
}

/// Units for a row: a power of two that the device takes, no more than the row has use for.
pub(super) fn units(x: &CubeTensor, d: usize) -> u32 {
    let most = x.client.properties().hardware.max_units_per_cube.min(UNITS);
    let most = 1 << most.max(1).ilog2();
    (d as u32).next_power_of_two().clamp(1, most)
}

/// The type of its values in a kernel.
pub(super) fn storage(x: &CubeTensor) -> ElemType {
    dtype_to_storage_type(x.dtype)
}

/// Sum of `value` over the units of the cube, the same for all of them.
#[cube]
pub(super) fn total(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let unit = UNIT_POS_X as usize;
    shared[unit] = value;
    sync_cube();
    let mut width = CUBE_DIM_X as usize / 2;
    while width > 0 {
        if unit < width {
            let other = shared[unit + width];
            shared[unit] += other;
        }
        sync_cube();
        width /= 2;
    }
    let sum = shared[0];
    // Nobody may write the next value before everybody has read this one.
    sync_cube();
    sum
}

/// The largest `value` of the units of the cube, the same for all of them.
#[cube]
pub(super) fn largest(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let unit = UNIT_POS_X as usize;
    shared[unit] = value;
    sync_cube();
    let mut width = CUBE_DIM_X as usize / 2;
    while width > 0 {
        if unit < width {
            let other = shared[unit + width];
            if other > shared[unit] {
                shared[unit] = other;
            }
        }
        sync_cube();
        width /= 2;
    }
    let most = shared[0];
    sync_cube();
    most
}
