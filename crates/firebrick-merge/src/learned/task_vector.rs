//! Task vectors in memory, by site.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use firebrick_core::{Site, SiteKind, SiteSet};
use firebrick_models::{Decoder, ModelError, TensorSource};

use crate::MergeError;

/// Fine-tuned weights minus those of the base, at some sites, each in Hugging Face's layout: `[d_out, d_in]`, `[vocab, d_model]`,
/// `[1, d]` for norms and biases.
#[derive(Clone, Debug, Default)]
pub struct TaskVector {
    /// The differences, on the device of the base.
    pub deltas: BTreeMap<Site, Tensor<2>>,
}

impl TaskVector {
    /// What `tuned` adds to `base` at those of `sites` that have a weight.
    ///
    /// # Errors
    /// [`MergeError::Settings`] with every weight that `tuned` lacks or has in another shape, or if no site has a weight; what
    /// reading fails with.
    pub fn between(base: &Decoder, tuned: &dyn TensorSource, sites: &SiteSet) -> Result<Self, MergeError> {
        let base = burn::module::Module::valid(base);
        let weights: Vec<(Site, Tensor<2>, Vec<usize>)> = sites
            .iter()
            .filter_map(|site| {
                let weight = base.weight(site)?;
                let kind = base.sites().get(site)?.kind;
                let [rows, cols] = weight.dims();
                let vector = matches!(kind, SiteKind::Norm { .. } | SiteKind::Bias { .. });
                Some((site, weight, if vector { vec![cols] } else { vec![rows, cols] }))
            })
            .collect();
        let check = |(site, _, shape): &(Site, Tensor<2>, Vec<usize>)| tuned.check_site(*site, shape).err();
        let mut problems: Vec<String> = weights.iter().filter_map(check).map(|e| e.to_string()).collect();
        if weights.is_empty() {
            problems.push("none of the sites has a weight".into());
        }
        if !problems.is_empty() {
            return Err(MergeError::Settings { problems });
        }
        let mut deltas = BTreeMap::new();
        for (site, weight, shape) in weights {
            let values = TensorData::new(tuned.read_site(site, &shape)?, weight.dims());
            deltas.insert(site, Tensor::from_data(values, &weight.device()) - weight);
        }
        Ok(TaskVector { deltas })
    }

    /// Keeps the `density` of all entries, over all sites together, that are largest by magnitude, and makes the others 0
    /// (the trimming of TIES, arXiv 2306.01708; entries as large as the smallest kept one stay too).
    ///
    /// # Errors
    /// [`MergeError::Settings`] if `density` is not in 0..=1; a read-back that fails.
    pub fn trimmed(self, density: f64) -> Result<Self, MergeError> {
        if !(0.0..=1.0).contains(&density) {
            return Err(MergeError::Settings { problems: vec![format!("`density` is {density}")] });
        }
        let mut sizes = Vec::new();
        for delta in self.deltas.values() {
            sizes.extend(host(delta.clone().abs())?);
        }
        let keep = (density * sizes.len() as f64).round() as usize;
        let at_least = match keep {
            0 => f32::INFINITY,
            _ => {
                let last = sizes.len() - keep;
                *sizes.select_nth_unstable_by(last, f32::total_cmp).1
            }
        };
        let trim = |delta: Tensor<2>| {
            let small = delta.clone().abs().lower_elem(at_least);
            delta.mask_fill(small, 0.0)
        };
        Ok(TaskVector { deltas: self.deltas.into_iter().map(|(site, d)| (site, trim(d))).collect() })
    }

    /// The same vector times `masks`, element by element; sites without a mask stay as they are.
    pub fn masked(&self, masks: &BTreeMap<Site, Tensor<2>>) -> Self {
        let masked = |(site, delta): (&Site, &Tensor<2>)| match masks.get(site) {
            Some(mask) => (*site, delta.clone() * mask.clone()),
            None => (*site, delta.clone()),
        };
        TaskVector { deltas: self.deltas.iter().map(masked).collect() }
    }
}

/// Makes every entry 0 whose sign is not that of the sum over the vectors (the election of TIES; a sum of 0 counts as positive). After
/// [`TaskVector::trimmed`] these are the vectors of AdaMerging++.
pub fn elect(vectors: Vec<TaskVector>) -> Vec<TaskVector> {
    let mut sums: BTreeMap<Site, Tensor<2>> = BTreeMap::new();
    for (site, delta) in vectors.iter().flat_map(|v| &v.deltas) {
        let sum = match sums.remove(site) {
            Some(sum) => sum + delta.clone(),
            None => delta.clone(),
        };
        sums.insert(*site, sum);
    }
    let agree = |(site, delta): (Site, Tensor<2>)| {
        let negative = sums[&site].clone().lower_elem(0.0);
        let against = delta.clone().lower_elem(0.0).not_equal(negative);
        (site, delta.mask_fill(against, 0.0))
    };
    vectors.into_iter().map(|v| TaskVector { deltas: v.deltas.into_iter().map(agree).collect() }).collect()
}

/// The elements of `tensor` in row-major order.
pub(crate) fn host(tensor: Tensor<2>) -> Result<Vec<f32>, MergeError> {
    let data = tensor.try_into_data().map_err(|e| ModelError::Backend(format!("{e:?}")))?;
    data.try_into_vec_as::<f32>().map_err(|e| ModelError::Backend(format!("{e:?}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::Part;

    fn vector(parts: [&[f32]; 2]) -> TaskVector {
        let tensor = |values: &[f32]| {
            Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &Device::flex())
        };
        let sites = [Site::layer(0, Part::AttnQ), Site::layer(1, Part::MlpUp)];
        TaskVector { deltas: sites.into_iter().zip(parts.map(tensor)).collect() }
    }

    fn values(vector: &TaskVector) -> Vec<Vec<f32>> {
        vector.deltas.values().map(|d| host(d.clone()).unwrap()).collect()
    }

    #[test]
    fn trimming_keeps_the_largest_of_the_whole_vector() {
        let v = vector([&[0.1, -0.9, 0.2], &[0.3, -0.05]]);
        let kept = values(&v.clone().trimmed(0.4).unwrap());
        assert_eq!(kept, [vec![0.0, -0.9, 0.0], vec![0.3, 0.0]], "not two of five of each site");
        assert_eq!(values(&v.clone().trimmed(1.0).unwrap()), values(&v));
        assert!(values(&v.clone().trimmed(0.0).unwrap()).concat().iter().all(|x| *x == 0.0));
        for bad in [-0.1, 1.1, f64::NAN] {
            assert!(v.clone().trimmed(bad).unwrap_err().to_string().contains("`density`"));
        }
    }

    #[test]
    fn election_drops_what_disagrees_with_the_sum() {
        let (a, b) = (vector([&[1.0, -1.0, 0.5], &[2.0, 0.0]]), vector([&[-2.0, -1.0, 0.5], &[-2.0, 3.0]]));
        let elected = elect(vec![a, b]);
        assert_eq!(values(&elected[0]), [vec![0.0, -1.0, 0.5], vec![2.0, 0.0]], "a sum of 0 is positive");
        assert_eq!(values(&elected[1]), [vec![-2.0, -1.0, 0.5], vec![0.0, 3.0]]);
    }

    #[test]
    fn masks_multiply_where_there_are_any() {
        let v = vector([&[1.0, 2.0], &[3.0]]);
        let mask = vector([&[0.0, 2.0], &[0.0]]).deltas.into_iter().take(1).collect();
        assert_eq!(values(&v.masked(&mask)), [vec![0.0, 4.0], vec![3.0]]);
    }
}
