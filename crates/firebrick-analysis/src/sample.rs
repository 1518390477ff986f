//! Samples of what passes a site, where all of it would be too much to look at.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use firebrick_core::{Base, Brick, Run, Site, SiteSet};

use crate::AnalysisError;

/// At most `count` of the positions `from..length`, the middles of equal parts: the same for every text of that length.
pub(crate) fn spread(from: usize, length: usize, count: usize) -> Vec<usize> {
    let n = length.saturating_sub(from);
    let m = count.min(n);
    (0..m).map(|i| from + (2 * i + 1) * n / (2 * m)).collect()
}

/// The tokens at `positions` of `x: [batch, tokens, d]`, `[batch, positions, d]`.
pub(crate) fn tokens_at(x: &Tensor<3>, positions: &[usize]) -> Tensor<3> {
    let ids: Vec<i32> = positions.iter().map(|p| *p as i32).collect();
    x.clone().select(1, Tensor::from_data(TensorData::new(ids, [positions.len()]), &x.device()))
}

/// The values of a tensor, row-major, on the host.
pub(crate) fn read<const D: usize>(site: Site, x: Tensor<D>) -> Result<Vec<f32>, AnalysisError> {
    x.into_data().try_into_vec_as::<f32>().map_err(|e| AnalysisError::Site { site, what: e.to_string() })
}

/// Keeps the inputs of its sites at evenly spread tokens of each sequence, on the device.
///
/// Memory: `4 * per_sequence * d_in` bytes per sequence and site.
#[derive(Debug, Default)]
pub(crate) struct SampledInputs {
    sites: SiteSet,
    skip: usize,
    per_sequence: usize,
    seen: RefCell<BTreeMap<Site, Vec<Tensor<2>>>>,
}

impl SampledInputs {
    /// At most `per_sequence` tokens of each sequence, none of the first `skip`.
    pub(crate) fn new(sites: &SiteSet, skip: usize, per_sequence: usize) -> Self {
        SampledInputs { sites: sites.clone(), skip, per_sequence, ..Default::default() }
    }

    /// The rows kept at `site`, `[rows, d_in]` in the order of the text; `None` if nothing passed.
    pub(crate) fn rows(&self, site: Site) -> Option<Tensor<2>> {
        self.seen.borrow().get(&site).map(|rows| Tensor::cat(rows.clone(), 0))
    }
}

impl Brick for SampledInputs {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let [batch, tokens, d] = x.dims();
        let positions = spread(self.skip, tokens, self.per_sequence);
        if !positions.is_empty() {
            let rows = tokens_at(&x.clone().without_autodiff(), &positions);
            let rows = rows.reshape([batch * positions.len(), d]);
            self.seen.borrow_mut().entry(site).or_default().push(rows);
        }
        base(x, run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::Part;

    #[test]
    fn positions_are_spread_evenly_and_all_of_few_are_taken() {
        assert_eq!(spread(1, 5, 9), [1, 2, 3, 4]);
        assert_eq!(spread(0, 8, 2), [2, 6]);
        assert_eq!(spread(3, 3, 2), [0usize; 0]);
        for (from, length, count) in [(0, 511, 64), (1, 512, 128), (2, 90, 89), (0, 1000, 999)] {
            let found = spread(from, length, count);
            assert!(found.windows(2).all(|w| w[0] < w[1]) && found.len() == count.min(length - from));
            assert!(found[0] >= from && *found.last().unwrap() < length);
        }
    }

    #[test]
    fn rows_are_those_of_the_text_in_order() {
        let site = Site::layer(0, Part::MlpDown);
        let sites: SiteSet = [site].into_iter().collect();
        let sample = SampledInputs::new(&sites, 1, 2);
        assert!(sample.rows(site).is_none());
        let x = Tensor::<1>::from_data(
            TensorData::from([0.0f32, 1., 2., 3., 4., 10., 11., 12., 13., 14.]),
            &Device::flex(),
        );
        Run::new(&[&sample]).at(site, x.clone().reshape([2, 5, 1]), &mut |x, _| x);
        Run::new(&[&sample]).at(site, x.reshape([2, 5, 1]) + 100.0, &mut |x, _| x);
        let rows = read(site, sample.rows(site).unwrap()).unwrap();
        assert_eq!(rows, [2.0, 4.0, 12.0, 14.0, 102.0, 104.0, 112.0, 114.0]);
    }
}
