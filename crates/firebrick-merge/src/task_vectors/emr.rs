//! EMR-Merging (arXiv 2405.17461): one unified task vector, and a mask and a scale for each task.

use super::{TaskVector, TaskVectorError, check_same};

/// What tells one task's model from the unified one.
#[derive(Clone, Debug)]
pub struct EmrTask {
    /// By which the masked vector is scaled.
    pub rescale: f64,
    /// Per site of the unified vector, in order: whether an entry counts.
    pub mask: Vec<Vec<bool>>,
}

/// The unified vector with all tasks' masks and scales.
#[derive(Clone, Debug)]
pub struct Emr {
    /// Elected sign times the largest magnitude that agrees with it.
    pub unified: TaskVector,
    /// One for each task.
    pub tasks: Vec<EmrTask>,
}

impl Emr {
    /// The task vector of task `task`: to be added to the base. `None` if there is no such task.
    pub fn task(&self, task: usize) -> Option<TaskVector> {
        let EmrTask { rescale, mask } = self.tasks.get(task)?;
        let mut vector = self.unified.clone();
        for (m, mask) in vector.sites.values_mut().zip(mask) {
            m.data_mut()
                .iter_mut()
                .zip(mask)
                .for_each(|(x, keep)| *x = if *keep { *x * rescale } else { 0.0 });
        }
        Some(vector)
    }
}

/// Elects, masks and rescales `tasks`; the scale matches the sum over sites of mean magnitudes.
///
/// # Errors
/// No task, or tasks that differ in sites or shapes.
pub fn emr(tasks: &[TaskVector]) -> Result<Emr, TaskVectorError> {
    check_same(&tasks.iter().collect::<Vec<_>>())?;
    let mut unified = tasks[0].clone();
    for (site, m) in &mut unified.sites {
        for (i, x) in m.data_mut().iter_mut().enumerate() {
            let here = || tasks.iter().map(|t| t.sites[site].data()[i]);
            let sign = if here().sum::<f64>() > 0.0 { 1.0 } else { -1.0 };
            *x = sign * here().map(|v| (v * sign).max(0.0)).fold(0.0, f64::max);
        }
    }
    let masked = |task: &TaskVector| {
        let (mut own, mut kept, mut mask) = (0.0, 0.0, Vec::new());
        for (t, u) in task.sites.values().zip(unified.sites.values()) {
            let n = t.data().len().max(1) as f64;
            let keep: Vec<bool> = t.data().iter().zip(u.data()).map(|(t, u)| t * u > 0.0).collect();
            own += t.data().iter().map(|x| x.abs()).sum::<f64>() / n;
            kept += u.data().iter().zip(&keep).filter(|(_, k)| **k).map(|(x, _)| x.abs()).sum::<f64>() / n;
            mask.push(keep);
        }
        EmrTask { rescale: if kept > 0.0 { own / kept } else { 0.0 }, mask }
    };
    let tasks = tasks.iter().map(masked).collect();
    Ok(Emr { unified, tasks })
}
