//! Second moments of what goes into each linear layer, `X^T X`: GPTQ's Hessian, imatrix's diagonal, RegMean's Gram matrix.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use firebrick_core::{Base, Brick, Part, Run, Site, SiteSet};
use firebrick_tensor::linalg::Matrix;

use crate::AnalysisError;

/// Adds up `X^T X` over all tokens of the inputs of its sites, on the device.
///
/// Layers that read the same input (q, k, v; gate, up) share one sum.
#[derive(Debug, Default)]
pub struct SecondMoments {
    sites: SiteSet,
    sums: RefCell<BTreeMap<Site, Tensor<2>>>,
    skip: usize,
}

/// The site whose input stands for the input of `site`: q for k and v, gate for up, else `site` itself.
pub fn input_site(site: Site) -> Site {
    let part = match site.part {
        Part::AttnK | Part::AttnV => Part::AttnQ,
        Part::MlpUp => Part::MlpGate,
        part => part,
    };
    Site { part, ..site }
}

impl SecondMoments {
    /// Observes the inputs of `sites`.
    pub fn new(sites: &SiteSet) -> Self {
        SecondMoments { sites: sites.iter().map(input_site).collect(), ..Default::default() }
    }

    /// Leaves out the first `tokens` of each sequence: the attention sink there has activations of another order of magnitude.
    pub fn skipping(self, tokens: usize) -> Self {
        SecondMoments { skip: tokens, ..self }
    }

    /// The sum `X^T X: [d_in, d_in]` of `site`'s input so far, on its device.
    pub fn sum(&self, site: Site) -> Option<Tensor<2>> {
        self.sums.borrow().get(&input_site(site)).cloned()
    }

    /// The sum of `site`'s input so far, on the host.
    ///
    /// # Errors
    /// [`AnalysisError::Site`] if nothing passed the site, or the sum cannot be read.
    pub fn matrix(&self, site: Site) -> Result<Matrix, AnalysisError> {
        let fail = |what: String| AnalysisError::Site { site, what };
        let sum = self.sum(site).ok_or_else(|| fail("nothing passed this site".into()))?;
        let n = sum.dims()[0];
        let values = sum.into_data().try_into_vec_as::<f32>().map_err(|e| fail(e.to_string()))?;
        Matrix::from_f32(n, n, &values).map_err(|error| AnalysisError::Linalg { site, error })
    }
}

impl Brick for SecondMoments {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let [batch, tokens, d] = x.dims();
        if tokens <= self.skip {
            return base(x, run);
        }
        let kept = tokens - self.skip;
        let flat = x.clone().without_autodiff().narrow(1, self.skip, kept).reshape([batch * kept, d]);
        let product = flat.clone().transpose().matmul(flat);
        let mut sums = self.sums.borrow_mut();
        let sum = match sums.remove(&site) {
            Some(sum) => sum + product,
            None => product,
        };
        sums.insert(site, sum);
        drop(sums);
        base(x, run)
    }
}
