//! LiNeS (arXiv 2410.17146): task vectors scaled up linearly with depth, so that shallow layers stay general.

use super::TaskVector;

/// Layer `l` of `layers` times `first + (last - first) l / (layers - 1)`; what lies in no layer stays as it is. Of a single layer the
/// factor is `last`.
pub fn lines(mut task: TaskVector, layers: usize, first: f64, last: f64) -> TaskVector {
    for (site, m) in &mut task.sites {
        if let Some(layer) = site.layer {
            let depth = if layers > 1 { layer as f64 / (layers - 1) as f64 } else { 1.0 };
            super::scale(m, first + (last - first) * depth);
        }
    }
    task
}
