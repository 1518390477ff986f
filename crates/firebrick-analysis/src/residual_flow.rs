//! How much a block or sublayer changes the residual stream.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use firebrick_core::{Base, Brick, Run, Site, SiteSet};

use crate::AnalysisError;

/// Norms below this count as zero.
const TINY: f32 = 1e-12;

/// Measures, token by token, how much its sites turn and lengthen the residual stream.
///
/// The influence of a token is `1 - cos(in, out)` (ShortGPT's block influence, LLM-Drop's sublayer importance: the
/// input is taken before the norm, the output includes the residual). It is computed as half the squared
/// distance of the two directions, which is the same number without the cancellation: exactly 0 when nothing changes.
#[derive(Debug, Default)]
pub struct ResidualFlow {
    sites: SiteSet,
    seen: RefCell<BTreeMap<Site, Vec<Tensor<3>>>>,
}

/// What [`ResidualFlow`] measured at one site: for each sequence one number per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenFlow {
    /// `1 - cos(in, out)`, between 0 and 2.
    pub influence: Vec<Vec<f64>>,
    /// `|out - in| / |in|`.
    pub update: Vec<Vec<f64>>,
}

impl ResidualFlow {
    /// Observes `sites`, each of which takes and returns the residual stream.
    pub fn new(sites: &SiteSet) -> Self {
        ResidualFlow { sites: sites.clone(), ..Default::default() }
    }

    /// Reads what was measured at `site` so far, without the first `skip` tokens of each sequence.
    ///
    /// # Errors
    /// [`AnalysisError::Site`] if nothing passed the site or a number is not finite.
    pub fn read(&self, site: Site, skip: usize) -> Result<TokenFlow, AnalysisError> {
        let fail = |what: &str| AnalysisError::Site { site, what: what.into() };
        let mut flow = TokenFlow::default();
        let seen = self.seen.borrow();
        for pair in seen.get(&site).ok_or_else(|| fail("nothing passed this site"))? {
            let tokens = pair.dims()[2];
            let values: Vec<f32> = pair
                .clone()
                .into_data()
                .try_into_vec_as::<f32>()
                .map_err(|e| AnalysisError::Site { site, what: format!("{e:?}") })?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(fail("the residual stream is not finite"));
            }
            let (influence, update) = values.split_at(values.len() / 2);
            let rows = |half: &[f32]| -> Vec<Vec<f64>> {
                let row = |r: &[f32]| r.iter().skip(skip).map(|v| f64::from(*v)).collect();
                half.chunks(tokens).map(row).collect()
            };
            flow.influence.extend(rows(influence));
            flow.update.extend(rows(update));
        }
        Ok(flow)
    }
}

impl Brick for ResidualFlow {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let y = base(x.clone(), run);
        let (a, b) = (x.without_autodiff(), y.clone().without_autodiff());
        let norm = |t: Tensor<3>| (t.clone() * t).sum_dim(2).sqrt();
        let (a_norm, b_norm) = (norm(a.clone()).clamp_min(TINY), norm(b.clone()).clamp_min(TINY));
        let turn = a.clone() / a_norm.clone() - b.clone() / b_norm;
        let influence = (turn.clone() * turn).sum_dim(2) * 0.5;
        let update = norm(b - a) / a_norm;
        let [batch, tokens, _] = influence.dims();
        let pair = Tensor::cat(vec![influence, update], 0).reshape([2, batch, tokens]);
        self.seen.borrow_mut().entry(site).or_default().push(pair);
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::{Part, Skip};

    fn flow(x: Vec<f32>, f: impl Fn(Tensor<3>) -> Tensor<3>, skip: usize) -> TokenFlow {
        let site = Site::layer(0, Part::Block);
        let sites: SiteSet = [site].into_iter().collect();
        let brick = ResidualFlow::new(&sites);
        let n = x.len() / 4;
        let x = Tensor::<3>::from_data(TensorData::new(x, [2, n, 2]), &Device::flex());
        Run::new(&[&brick]).at(site, x, &mut |x, _| f(x));
        brick.read(site, skip).unwrap()
    }

    #[test]
    fn influence_is_one_minus_the_cosine() {
        let x = vec![1.0, 0.0, 3.0, 4.0, 0.0, 2.0, 1.0, 1.0];
        // Turned by 90 degrees: cosine 0, update sqrt(2).
        let turned =
            flow(x.clone(), |x| Tensor::cat(vec![-x.clone().narrow(2, 1, 1), x.narrow(2, 0, 1)], 2), 0);
        assert!(turned.influence.iter().flatten().all(|v| (v - 1.0).abs() < 1e-6));
        assert!(turned.update.iter().flatten().all(|v| (v - 2f64.sqrt()).abs() < 1e-6));
        // Lengthened only: the cosine is blind to it, the update is not.
        let longer = flow(x.clone(), |x| x * 3.0, 0);
        assert!(longer.influence.iter().flatten().all(|v| *v < 1e-12));
        assert!(longer.update.iter().flatten().all(|v| (v - 2.0).abs() < 1e-6));
        let opposite = flow(x.clone(), |x| -x, 1);
        assert_eq!(opposite.influence.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
        assert!(opposite.influence.iter().flatten().all(|v| (v - 2.0).abs() < 1e-6));
        let same = flow(x, |x| x, 0);
        assert!(same.influence.iter().chain(&same.update).flatten().all(|v| *v == 0.0));
    }

    #[test]
    fn a_skipped_block_has_no_influence() {
        let site = Site::layer(0, Part::Block);
        let sites: SiteSet = [site].into_iter().collect();
        let (flow, skip) = (ResidualFlow::new(&sites), Skip { sites: sites.clone() });
        let x = Tensor::<3>::ones([1, 3, 4], &Device::flex());
        Run::new(&[&skip, &flow]).at(site, x, &mut |x, _| x * 2.0 + 1.0);
        assert_eq!(flow.read(site, 0).unwrap().update, [[0.0; 3]]);
        assert!(ResidualFlow::new(&sites).read(site, 0).is_err());
    }
}
