//! TSV-Merge (arXiv 2412.00081): the top singular triplets of each task, made orthogonal to each other's.

use firebrick_tensor::linalg::{Matrix, svd};

use super::{TaskVector, TaskVectorError, beside, each_matrix, polar};

/// The merged task vector: `floor(k / tasks)` triplets a task (at least one) of `k = min(d_out, d_in)`, vectors averaged.
///
/// # Errors
/// Tasks that differ in sites or shapes; weights that are not finite.
pub fn tsv(tasks: &[TaskVector]) -> Result<TaskVector, TaskVectorError> {
    each_matrix(tasks, |here| {
        let most = here[0].rows().min(here[0].cols());
        let keep = (most / here.len()).max(1);
        let (mut u, mut v, mut sigma) = (Vec::new(), Vec::new(), Vec::new());
        for task in here {
            let s = svd(task)?.truncate(keep);
            u.push(s.u);
            v.push(s.vt.transpose());
            sigma.extend(s.sigma);
        }
        let (u, v) = (polar(&beside(&u))?, polar(&beside(&v))?);
        let scaled = Matrix::from_fn(u.rows(), u.cols(), |i, j| u[(i, j)] * sigma[j]);
        Ok(scaled.matmul(&v.transpose())?)
    })
}
