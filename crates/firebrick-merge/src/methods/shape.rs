//! What becomes of models whose tensors differ in shape.

use super::MergeMethod;

/// How the inputs of a tensor are brought to one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rectified {
    /// The common shape: that of the output.
    pub shape: Vec<usize>,
    /// Whether each input takes part. Task-vector methods leave out a model whose tensor has another shape than the base's.
    pub used: Vec<bool>,
}

/// The common shape of a tensor, by mergekit's rules: the embeddings (`is_embed`) of vocabularies that differ are cut to the leading
/// rows and columns that all have, or that the base has for task-vector methods; see [`Values::leading`](super::Values::leading).
///
/// # Errors
/// If shapes differ that the method cannot merge.
pub fn rectify(
    method: MergeMethod,
    is_embed: bool,
    base: Option<usize>,
    shapes: &[&[usize]],
) -> Result<Rectified, String> {
    use MergeMethod::{ArceeFusion, Karcher, Linear, ModelStock, Multislerp, Nearswap, Nuslerp, Passthrough};
    use MergeMethod::{Ram, RamplusTl, Sce, Slerp};
    let Some(first) = shapes.get(base.unwrap_or(0)) else { return Err("there are no models".into()) };
    if shapes.iter().all(|shape| shape == first) {
        return Ok(Rectified { shape: first.to_vec(), used: vec![true; shapes.len()] });
    }
    let matrices = shapes.iter().all(|shape| shape.len() == 2);
    match method {
        Linear | Slerp | Nuslerp | Karcher | ModelStock | ArceeFusion if is_embed && matrices => {
            let least = |axis: usize| shapes.iter().map(|shape| shape[axis]).min().unwrap_or(0);
            Ok(Rectified { shape: vec![least(0), least(1)], used: vec![true; shapes.len()] })
        }
        Linear | Slerp | Nuslerp | Karcher | ModelStock | ArceeFusion | Passthrough | Multislerp | Sce
        | Ram | RamplusTl | Nearswap => Err(format!("{} cannot merge shapes {shapes:?}", method.name())),
        _ => {
            let fits = |shape: &&[usize]| {
                shape == first || is_embed && matrices && shape[0] >= first[0] && shape[1] >= first[1]
            };
            Ok(Rectified { shape: first.to_vec(), used: shapes.iter().map(fits).collect() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Values;

    #[test]
    fn embeddings_are_cut_and_other_shapes_left_out_or_refused() {
        let shapes: [&[usize]; 3] = [&[10, 4], &[12, 3], &[11, 4]];
        let cut = rectify(MergeMethod::Linear, true, None, &shapes).unwrap();
        assert_eq!(cut, Rectified { shape: vec![10, 3], used: vec![true; 3] });
        assert!(rectify(MergeMethod::Linear, false, None, &shapes).unwrap_err().contains("[12, 3]"));
        assert!(rectify(MergeMethod::Sce, true, Some(0), &shapes).is_err());
        let task = rectify(MergeMethod::Ties, true, Some(0), &shapes).unwrap();
        assert_eq!(task, Rectified { shape: vec![10, 4], used: vec![true, false, true] });
        let other = rectify(MergeMethod::Ties, false, Some(0), &shapes).unwrap();
        assert_eq!(other.used, [true, false, false]);
        assert!(rectify(MergeMethod::Linear, true, None, &[]).is_err());
    }

    #[test]
    fn leading_values_are_those_of_the_matrix() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let cut = Values::from(&values[..]).leading(4, 2, 3).unwrap();
        assert_eq!(cut.to_vec().unwrap(), [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]);
        let mut buffer = Vec::new();
        assert_eq!(cut.read(2..5, &mut buffer).unwrap(), [2.0, 4.0, 5.0]);
        assert_eq!(Values::from(&values[..]).leading(4, 2, 4).unwrap().to_vec().unwrap(), values[..8]);
        assert!(Values::from(&values[..]).leading(4, 4, 2).is_err(), "it has three rows");
        assert!(Values::from(&values[..]).leading(4, 2, 5).is_err());
    }
}
