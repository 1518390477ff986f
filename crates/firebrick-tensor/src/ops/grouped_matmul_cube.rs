//! GPU kernel of [`grouped_matmul`](super::grouped_matmul()): the products of all segments in one launch, in tiles of 64 by 64.

use burn::tensor::TensorData;
use burn_backend::{Shape, TensorMetadata, ops::IntTensorOps};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::cube::{CUBES, has_kernel, room, storage};
use super::grouped_matmul::{GroupedMatmulOps, composed, composed_weight, segments};

/// Rows and columns of a tile of results.
const TILE: u32 = 64;

/// What is summed between two loads.
const DEPTH: u32 = 16;

/// Units along a side of a cube, and rows and columns of each.
const SIDE: u32 = 16;
const OWN: u32 = TILE / SIDE;

/// Numbers of a product in the table: where its matrices begin, its rows, and its depth.
const FIELDS: u32 = 5;

impl GroupedMatmulOps for CubeBackend {
    fn grouped_matmul(x: CubeTensor, weight: CubeTensor, offsets: Vec<usize>) -> CubeTensor {
        let (rows, d_in, d_out) = (x.shape()[0], x.shape()[1], weight.shape()[2]);
        if !applies(&[&x, &weight], rows * d_out) {
            return composed::<Self>(x, weight, &offsets);
        }
        let (a, b) = (x.meta.strides(), weight.meta.strides());
        let (strides, matrix) = ([a[0], a[1], b[1], b[2]], b[0]);
        let mut table = Vec::new();
        for (e, segment) in segments(&offsets).enumerate() {
            for first in segment.clone().step_by(TILE as usize) {
                let count = (segment.end - first).min(TILE as usize);
                table.push([first * strides[0], e * matrix, first * d_out, count, d_in]);
            }
        }
        let out = room(&x, Shape::new([rows, d_out]));
        match launch(&x, &weight, &out, &table, strides) {
            true => out,
            false => composed::<Self>(x, weight, &offsets),
        }
    }

    fn grouped_matmul_weight(x: CubeTensor, grad: CubeTensor, offsets: Vec<usize>) -> CubeTensor {
        let (d_in, d_out, experts) = (x.shape()[1], grad.shape()[1], offsets.len() - 1);
        if !applies(&[&x, &grad], experts * d_in * d_out) {
            return composed_weight::<Self>(x, grad, &offsets);
        }
        let (a, b) = (x.meta.strides(), grad.meta.strides());
        let strides = [a[1], a[0], b[0], b[1]];
        let product = |(e, segment): (usize, std::ops::Range<usize>)| {
            [segment.start * a[0], segment.start * b[0], e * d_in * d_out, d_in, segment.len()]
        };
        let table: Vec<_> = segments(&offsets).enumerate().map(product).collect();
        let out = room(&x, Shape::new([experts, d_in, d_out]));
        match launch(&x, &grad, &out, &table, strides) {
            true => out,
            false => composed_weight::<Self>(x, grad, &offsets),
        }
    }
}

/// Whether the kernel applies: a floating type, a cube of its size, and numbers of a table that 32 bits with a sign count.
fn applies(tensors: &[&CubeTensor], results: usize) -> bool {
    const MOST: usize = i32::MAX as usize;
    let units = tensors[0].client.properties().hardware.max_units_per_cube;
    let sizes = tensors.iter().map(|t| t.meta.num_elements()).chain([results]);
    has_kernel(tensors) && units >= SIDE * SIDE && sizes.into_iter().all(|n| n > 0 && n < MOST)
}

/// Computes the products of a table: rows of `a` times `b`, whose strides are those of rows and depth, of depth and columns. Whether there
/// are few enough of them.
fn launch(
    a: &CubeTensor,
    b: &CubeTensor,
    out: &CubeTensor,
    table: &[[usize; FIELDS as usize]],
    strides: [usize; 4],
) -> bool {
    let columns = out.shape()[out.shape().num_dims() - 1];
    let most = |field: usize| table.iter().map(|product| product[field]).max().unwrap_or(0);
    let tiles = |n: usize| n.div_ceil(TILE as usize);
    let counts = [tiles(columns), tiles(most(3)), table.len()];
    if counts.iter().any(|count| !(1..=CUBES).contains(count)) {
        return false;
    }
    let [x, y, z] = counts.map(|count| count as u32);
    let numbers: Vec<i32> = table.iter().flatten().map(|n| *n as i32).collect();
    let size = numbers.len();
    let table = CubeBackend::int_from_data(TensorData::new(numbers, [size]), &a.device);
    let [a_row, a_depth, b_depth, b_column] = strides.map(|stride| stride as u32);
    kernel::launch(
        &a.client,
        CubeCount::Static(x, y, z),
        CubeDim::new_2d(SIDE, SIDE),
        a.clone().into_buffer_arg(),
        b.clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        table.into_buffer_arg(),
        a_row,
        a_depth,
        b_depth,
        b_column,
        columns as u32,
        most(4) as u32,
        storage(out),
    );
    true
}

#[cube(launch)]
fn kernel<F: Float>(
    a: &[F],
    b: &[F],
    out: &mut [F],
    table: &[i32],
    a_row: u32,
    a_depth: u32,
    b_depth: u32,
    b_column: u32,
    columns: u32,
    deepest: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut a_tile = Shared::<[f32]>::new_slice(comptime!((TILE * DEPTH) as usize));
    let mut b_tile = Shared::<[f32]>::new_slice(comptime!((TILE * DEPTH) as usize));
    let product = (CUBE_POS_Z * FIELDS) as usize;
    let a_first = table[product] as u32;
    let b_first = table[product + 1] as u32;
    let out_first = table[product + 2] as u32;
    let rows = table[product + 3] as u32;
    let depth = table[product + 4] as u32;
    let row = CUBE_POS_Y * TILE;
    let column = CUBE_POS_X * TILE;
    let unit = UNIT_POS_Y * SIDE + UNIT_POS_X;
    let mut sums = Array::<f32>::new(comptime!((OWN * OWN) as usize));
    #[unroll]
    for i in 0..OWN * OWN {
        sums[i as usize] = 0.0f32;
    }
    // Every cube goes as deep as the deepest: units meet at the barriers.
    let mut from = 0u32;
    while from < deepest {
        #[unroll]
        for i in 0..TILE * DEPTH / (SIDE * SIDE) {
            let at = unit + i * SIDE * SIDE;
            let along = at % TILE;
            let k = from + at / TILE;
            let mut value = 0.0f32;
            if row + along < rows && k < depth {
                value = f32::cast_from(a[(a_first + (row + along) * a_row + k * a_depth) as usize]);
            }
            a_tile[at as usize] = value;
            let mut value = 0.0f32;
            if column + along < columns && k < depth {
                value = f32::cast_from(b[(b_first + k * b_depth + (column + along) * b_column) as usize]);
            }
            b_tile[at as usize] = value;
        }
        sync_cube();
        for k in 0..DEPTH {
            #[unroll]
            for i in 0..OWN {
                let left = a_tile[(k * TILE + UNIT_POS_Y * OWN + i) as usize];
                #[unroll]
                for j in 0..OWN {
                    let right = b_tile[(k * TILE + UNIT_POS_X * OWN + j) as usize];
                    sums[(i * OWN + j) as usize] += left * right;
                }
            }
        }
        sync_cube();
        from += DEPTH;
    }
    #[unroll]
    for i in 0..OWN {
        let row = row + UNIT_POS_Y * OWN + i;
        #[unroll]
        for j in 0..OWN {
            let column = column + UNIT_POS_X * OWN + j;
            if row < rows && column < columns {
                out[(out_first + row * columns + column) as usize] =
                    F::cast_from(sums[(i * OWN + j) as usize]);
            }
        }
    }
}
