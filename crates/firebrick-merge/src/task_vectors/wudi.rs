//! WUDI-Merging (arXiv 2503.08099): the vector that interferes least with each task's, by descent without data.

use firebrick_tensor::linalg::Matrix;

use super::{TaskVector, TaskVectorError, add, each_matrix, norm, sum};

/// Minimizes `sum_m |(T - tau_m) tau_m^T|^2 / |tau_m|^2` from the sum of the tasks on, by `steps` (300 is usual) steps of Adam at
/// `learning_rate` (1e-5 for weights of a language model); vectors averaged.
///
/// # Errors
/// Tasks that differ in sites or shapes.
pub fn wudi(tasks: &[TaskVector], steps: usize, learning_rate: f64) -> Result<TaskVector, TaskVectorError> {
    each_matrix(tasks, |here| {
        // The gradient is 2 sum_m (T - tau_m) G_m with G_m = tau_m^T tau_m / |tau_m|^2.
        let mut left = Matrix::zeros(here[0].cols(), here[0].cols());
        let mut right = Matrix::zeros(here[0].rows(), here[0].cols());
        for task in here {
            let mut gram = task.transpose().matmul(task)?;
            super::scale(&mut gram, 1.0 / norm(task).powi(2).max(f64::MIN_POSITIVE));
            add(&mut right, &task.matmul(&gram)?, 1.0);
            add(&mut left, &gram, 1.0);
        }
        let mut merged = sum(here);
        let (mut first, mut second) = (vec![0.0; merged.data().len()], vec![0.0; merged.data().len()]);
        for step in 1..=steps {
            let mut gradient = merged.matmul(&left)?;
            add(&mut gradient, &right, -1.0);
            let (c1, c2) = (1.0 - 0.9f64.powi(step as i32), 1.0 - 0.999f64.powi(step as i32));
            for (i, x) in merged.data_mut().iter_mut().enumerate() {
                let g = 2.0 * gradient.data()[i];
                first[i] = 0.9 * first[i] + 0.1 * g;
                second[i] = 0.999 * second[i] + 0.001 * g * g;
                *x -= learning_rate * first[i] / c1 / ((second[i] / c2).sqrt() + 1e-8);
            }
        }
        Ok(merged)
    })
}
