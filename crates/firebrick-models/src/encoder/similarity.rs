//! How alike two vectors are.

use burn::tensor::Tensor;

use super::normalize;

/// The cosine of the angle between two vectors, in `-1..=1`; 0 if one of them is 0.
///
/// # Panics
/// If they differ in length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "vectors of one length");
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths == 0.0 { 0.0 } else { (dot(a, b) / lengths).clamp(-1.0, 1.0) }
}

/// The cosines `[n, m]` of every row of `a: [n, d]` with every row of `b: [m, d]`.
pub fn cosine_matrix(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    normalize(a).matmul(normalize(b).transpose())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use firebrick_core::Seed;

    use super::*;

    #[test]
    fn angles_by_hand() {
        assert_eq!(cosine(&[3.0, 4.0], &[6.0, 8.0]), 1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, -2.0]), 0.0);
        assert_eq!(cosine(&[1.0, 0.0], &[-2.0, 0.0]), -1.0);
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5f64.sqrt()).abs() < 1e-15);
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 1.0]), 0.0);
    }

    #[test]
    fn the_matrix_holds_the_cosines() {
        let (n, m, d) = (3, 4, 7);
        let (a, b) = (Seed(1).normal("a", n * d, 1.0), Seed(1).normal("b", m * d, 3.0));
        let on = |v: &[f32], rows: usize| {
            Tensor::<2>::from_data(TensorData::new(v.to_vec(), [rows, d]), &Device::flex())
        };
        let found = cosine_matrix(on(&a, n), on(&b, m)).into_data().try_into_vec_as::<f32>().unwrap();
        for (i, value) in found.iter().enumerate() {
            let expected = cosine(&a[i / m * d..][..d], &b[i % m * d..][..d]);
            assert!((f64::from(*value) - expected).abs() < 1e-6);
        }
        let other = cosine(&a[..d], &b[d..2 * d]);
        assert!((f64::from(found[0]) - other).abs() > 1e-3, "control");
    }
}
