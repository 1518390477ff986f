//! Second moments of what goes into each linear layer, `X^T X`: GPTQ's Hessian, imatrix's diagonal, RegMean's Gram matrix.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use firebrick_core::{Base, Brick, Part, Run, Site, SiteSet};
use firebrick_tensor::linalg::Matrix;

use crate::AnalysisError;
use crate::sample::{read, spread, tokens_at};

/// Columns of a panel: products above the diagonal panels are those below, and not computed.
const PANEL: usize = 256;

/// Adds up `X^T X` over all tokens of the inputs of its sites, on the device.
///
/// Layers that read the same input (q, k, v; gate, up) share one sum.
#[derive(Debug, Default)]
pub struct SecondMoments {
    sites: SiteSet,
    /// Panel `b` holds the rows of its columns, up to its last column.
    sums: RefCell<BTreeMap<Site, Vec<Tensor<2>>>>,
    skip: usize,
    most: Option<usize>,
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

    /// Takes at most `tokens` tokens of each sequence, evenly spread: a mean over a sample costs less and is as good.
    pub fn at_most(self, tokens: usize) -> Self {
        SecondMoments { most: Some(tokens), ..self }
    }

    /// The sum `X^T X: [d_in, d_in]` of `site`'s input so far, on its device.
    pub fn sum(&self, site: Site) -> Option<Tensor<2>> {
        self.sums.borrow().get(&input_site(site)).map(|panels| whole(panels))
    }

    /// Whether anything passed `site`.
    pub fn has(&self, site: Site) -> bool {
        self.sums.borrow().contains_key(&input_site(site))
    }

    /// The diagonal of the sum of `site`'s input so far, on the host: the sum of the squares of each input.
    ///
    /// # Errors
    /// As [`SecondMoments::matrix`].
    pub fn squares(&self, site: Site) -> Result<Vec<f64>, AnalysisError> {
        let sums = self.sums.borrow();
        let panels = sums
            .get(&input_site(site))
            .ok_or_else(|| AnalysisError::Site { site, what: "nothing passed this site".into() })?;
        let diagonal = panels.iter().map(|panel| {
            let [width, end] = panel.dims();
            let ids: Vec<i32> = (0..width).map(|i| (i * (width + 1)) as i32).collect();
            let ids = Tensor::from_data(TensorData::new(ids, [width]), &panel.device());
            panel.clone().narrow(1, end - width, width).reshape([width * width]).select(0, ids)
        });
        let diagonal: Tensor<1> = Tensor::cat(diagonal.collect(), 0);
        Ok(read(site, diagonal)?.into_iter().map(f64::from).collect())
    }

    /// The sum of `site`'s input so far, on the host.
    ///
    /// # Errors
    /// [`AnalysisError::Site`] if nothing passed the site, or the sum cannot be read.
    pub fn matrix(&self, site: Site) -> Result<Matrix, AnalysisError> {
        let what = "nothing passed this site";
        let sum = self.sum(site).ok_or_else(|| AnalysisError::Site { site, what: what.into() })?;
        let n = sum.dims()[0];
        let values = read(site, sum)?;
        Matrix::from_f32(n, n, &values).map_err(|error| AnalysisError::Linalg { site, error })
    }
}

/// The symmetric matrix whose lower panels these are.
fn whole(panels: &[Tensor<2>]) -> Tensor<2> {
    let row = |b: usize| {
        let [width, end] = panels[b].dims();
        let right = panels[b + 1..].iter().map(|p| p.clone().narrow(1, end - width, width).transpose());
        Tensor::cat(std::iter::once(panels[b].clone()).chain(right).collect(), 1)
    };
    Tensor::cat((0..panels.len()).map(row).collect(), 0)
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
        let all = tokens - self.skip;
        let seen = x.clone().without_autodiff();
        let (kept, seen) = match self.most {
            Some(most) if most < all => (most, tokens_at(&seen, &spread(self.skip, tokens, most))),
            _ => (all, seen.narrow(1, self.skip, all)),
        };
        let flat = seen.reshape([batch * kept, d]);
        let mut sums = self.sums.borrow_mut();
        let panels = sums.entry(site).or_default();
        for (i, start) in (0..d).step_by(PANEL).enumerate() {
            let width = PANEL.min(d - start);
            let rows = flat.clone().narrow(1, start, width).transpose();
            let product = rows.matmul(flat.clone().narrow(1, 0, start + width));
            match panels.get_mut(i) {
                Some(sum) => *sum = sum.clone() + product,
                None => panels.push(product),
            }
        }
        drop(sums);
        base(x, run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use firebrick_core::Seed;

    #[test]
    fn panels_add_up_to_the_whole_product() {
        let site = Site::layer(0, Part::MlpDown);
        for d in [3, PANEL, PANEL + 1, 2 * PANEL + 88] {
            let moments = SecondMoments::new(&[site].into_iter().collect());
            assert!(!moments.has(site));
            let mut rows = Vec::new();
            for pass in 0..2 {
                let values = Seed(pass).normal("x", 2 * 5 * d, 1.0);
                let x = Tensor::<3>::from_data(TensorData::new(values.clone(), [2, 5, d]), &Device::flex());
                Run::new(&[&moments]).at(site, x, &mut |x, _| x);
                rows.extend(values);
            }
            let found = moments.matrix(site).unwrap();
            let plain = |i: usize, j: usize| -> f64 {
                rows.chunks(d).map(|r| f64::from(r[i]) * f64::from(r[j])).sum()
            };
            for (i, j) in [(0, 0), (0, d - 1), (d - 1, 0), (d / 2, d / 3), (d - 1, d - 1), (1, d / 2)] {
                assert!((found[(i, j)] - plain(i, j)).abs() < 1e-4, "{d} {i} {j}");
            }
            let squares = moments.squares(site).unwrap();
            assert!((0..d).all(|i| squares[i] == found[(i, i)]));
        }
    }

    #[test]
    fn a_sample_takes_spread_tokens() {
        let site = Site::layer(0, Part::AttnQ);
        let x = Tensor::<1, burn::tensor::Int>::arange(0..20, &Device::flex()).float().reshape([2, 10, 1]);
        let sum = |most: usize| {
            let moments = SecondMoments::new(&[site].into_iter().collect()).skipping(1).at_most(most);
            Run::new(&[&moments]).at(site, x.clone(), &mut |x, _| x);
            moments.matrix(site).unwrap()[(0, 0)]
        };
        let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        assert_eq!(sum(3), squares(&[2., 5., 8., 12., 15., 18.]));
        let all: Vec<f64> = (1..20).filter(|v| *v != 10).map(f64::from).collect();
        assert_eq!((sum(9), sum(99)), (squares(&all), squares(&all)));
    }
}
