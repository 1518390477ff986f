//! GPU kernels of [`cross_entropy`](super::cross_entropy()): a cube of units for each row, which is read once.

use burn_backend::{DType, Shape, TensorMetadata};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::cross_entropy::{CrossEntropyOps, composed, composed_backward};
use super::cube::{CUBES, fits, has_kernel, largest, room, rows_of, storage, total, units};

impl CrossEntropyOps for CubeBackend {
    fn cross_entropy(logits: CubeTensor, targets: CubeTensor) -> (CubeTensor, CubeTensor) {
        if !has_kernel(&[&logits]) || targets.dtype != DType::I32 {
            return composed::<Self>(logits, targets);
        }
        let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
        let (rows, vocab) = rows_of(&logits);
        let [loss, log_sum] = [0, 1].map(|_| room(&logits, Shape::new([rows])));
        let units = units(&logits, vocab);
        forward_kernel::launch(
            &logits.client.clone(),
            CubeCount::Static(rows.min(CUBES) as u32, 1, 1),
            CubeDim::new_1d(units),
            logits.into_buffer_arg(),
            targets.into_buffer_arg(),
            loss.clone().into_buffer_arg(),
            log_sum.clone().into_buffer_arg(),
            rows as u32,
            vocab as u32,
            units,
            storage(&loss),
        );
        (loss, log_sum)
    }

    fn cross_entropy_backward(
        logits: CubeTensor,
        targets: CubeTensor,
        log_sum: CubeTensor,
        grad: CubeTensor,
    ) -> CubeTensor {
        if !has_kernel(&[&logits, &log_sum, &grad]) || targets.dtype != DType::I32 || !fits(&targets) {
            return composed_backward::<Self>(logits, targets, log_sum, grad);
        }
        let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
        let (log_sum, grad) = (into_contiguous(log_sum), into_contiguous(grad));
        let (_, vocab) = rows_of(&logits);
        let out = room(&logits, logits.shape());
        let (client, values) = (logits.client.clone(), logits.shape().num_elements());
        let dim = CubeDim::new(&client, values);
        backward_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, values, dim),
            dim,
            logits.into_buffer_arg(),
            targets.into_buffer_arg(),
            log_sum.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            values as u32,
            vocab as u32,
            storage(&out),
        );
        out
    }
}

#[cube(launch)]
fn forward_kernel<F: Float>(
    logits: &[F],
    targets: &[i32],
    loss: &mut [F],
    log_sum: &mut [F],
    rows: u32,
    vocab: u32,
    #[comptime] units: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(units as usize);
    let vocab = vocab as usize;
    let mut row = CUBE_POS_X;
    while row < rows {
        let first = row as usize * vocab;
        // The largest so far, and the sum of exponentials below it. Not infinite, which not every GPU has.
        let mut most = f32::min_value();
        let mut sum = 0.0f32;
        let mut j = UNIT_POS_X as usize;
        while j < vocab {
            let v = f32::cast_from(logits[first + j]);
            if v > most {
                sum = sum * (most - v).exp() + 1.0f32;
                most = v;
            } else {
                sum += (v - most).exp();
            }
            j += units as usize;
        }
        let all = largest(&mut shared, most);
        let sum = total(&mut shared, sum * (most - all).exp());
        if UNIT_POS_X == 0 {
            let of_row = sum.ln() + all;
            let target = targets[row as usize] as usize;
            loss[row as usize] = F::cast_from(of_row - f32::cast_from(logits[first + target]));
            log_sum[row as usize] = F::cast_from(of_row);
        }
        row += CUBE_COUNT_X;
    }
}

#[cube(launch)]
fn backward_kernel<F: Float>(
    logits: &[F],
    targets: &[i32],
    log_sum: &[F],
    grad: &[F],
    out: &mut [F],
    values: u32,
    vocab: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < values as usize {
        let row = ABSOLUTE_POS / vocab as usize;
        let column = ABSOLUTE_POS % vocab as usize;
        let mut p = (f32::cast_from(logits[ABSOLUTE_POS]) - f32::cast_from(log_sum[row])).exp();
        if column == targets[row] as usize {
            p -= 1.0f32;
        }
        out[ABSOLUTE_POS] = F::cast_from(p * f32::cast_from(grad[row]));
    }
}
