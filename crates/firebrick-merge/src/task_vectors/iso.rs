//! Isotropic merging (arXiv 2502.04959): one singular value for all directions of the merged task vector.

use firebrick_tensor::linalg::{Matrix, svd};

use super::{TaskVector, TaskVectorError, add, beside, each_matrix, polar, sum};

/// Iso-C: the sum of the tasks with all singular values at their mean; vectors averaged.
///
/// # Errors
/// Tasks that differ in sites or shapes; weights that are not finite.
pub fn iso_c(tasks: &[TaskVector]) -> Result<TaskVector, TaskVectorError> {
    each_matrix(tasks, |here| {
        let mut s = svd(&sum(here))?;
        let mean = s.sigma.iter().sum::<f64>() / s.sigma.len() as f64;
        s.sigma.fill(mean);
        Ok(s.reconstruct())
    })
}

/// Iso-CTS: the share `common` (0.8 is usual) of directions from the sum of the tasks, the others in equal parts from what each
/// task has outside the common left space; then all orthogonal, with one singular value.
///
/// # Errors
/// As [`iso_c`], and a `common` outside `0..=1`.
pub fn iso_cts(tasks: &[TaskVector], common: f64) -> Result<TaskVector, TaskVectorError> {
    if !(0.0..=1.0).contains(&common) {
        let problems = vec![format!("common share {common} should lie in 0..=1")];
        return Err(TaskVectorError::Mismatch { problems });
    }
    each_matrix(tasks, |here| {
        let most = here[0].rows().min(here[0].cols());
        let each = (most - (most as f64 * common) as usize) / here.len();
        // What does not divide evenly goes to the common space, so that all directions are used.
        let shared = svd(&sum(here))?.truncate(most - each * here.len());
        let (mut u, mut v) = (vec![shared.u.clone()], vec![shared.vt.transpose()]);
        let mut sigma = shared.sigma;
        for task in here {
            let mut rest = (*task).clone();
            add(&mut rest, &shared.u.matmul(&shared.u.transpose().matmul(task)?)?, -1.0);
            let s = svd(&rest)?.truncate(each);
            u.push(s.u);
            v.push(s.vt.transpose());
            sigma.extend(s.sigma);
        }
        let (mut u, v): (Matrix, Matrix) = (polar(&beside(&u))?, polar(&beside(&v))?);
        super::scale(&mut u, sigma.iter().sum::<f64>() / sigma.len() as f64);
        Ok(u.matmul(&v.transpose())?)
    })
}
