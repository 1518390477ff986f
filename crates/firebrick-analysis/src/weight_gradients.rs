//! Gradients of a loss with respect to the weights of linear layers, without a weight that records gradients.

use std::cell::RefCell;

use burn::tensor::{Int, Tensor};
use firebrick_core::{Base, Brick, Run, Site, SiteSet};
use firebrick_models::Decoder;

/// Adds a zero to the output of each site, whose gradient is the gradient of that output.
pub(crate) struct Probes {
    sites: SiteSet,
    inputs: bool,
    seen: RefCell<Vec<Probe>>,
}

/// What passed one site.
pub(crate) struct Probe {
    pub(crate) site: Site,
    /// `[batch, tokens, d_in]`, where inputs are kept.
    pub(crate) input: Option<Tensor<3>>,
    /// `[batch, tokens, d_out]`.
    pub(crate) zero: Tensor<3>,
}

impl Probes {
    /// At `sites`; `inputs` are kept or not.
    pub(crate) fn new(sites: &SiteSet, inputs: bool) -> Self {
        Probes { sites: sites.clone(), inputs, seen: RefCell::default() }
    }

    /// What passed, in the order it did.
    pub(crate) fn into_seen(self) -> Vec<Probe> {
        self.seen.into_inner()
    }
}

impl Brick for Probes {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let input = self.inputs.then(|| x.clone().without_autodiff());
        let y = base(x, run).autodiff();
        // One number seen everywhere: as a tensor of its own it would take as much memory as the output.
        let zero = Tensor::<3>::zeros([1, 1, 1], &y.device()).without_autodiff().expand(y.dims());
        let zero = zero.autodiff().require_grad();
        self.seen.borrow_mut().push(Probe { site, input, zero: zero.clone() });
        y + zero
    }
}

/// For each of `sites` that `tokens: [batch, tokens]` pass, the gradient `[d_out, d_in]` of `loss` with respect to its weight;
/// `loss` is a scalar of the hidden states `[batch, tokens, d_model]` after the last norm.
pub(crate) fn weight_gradients(
    decoder: &Decoder,
    tokens: Tensor<2, Int>,
    sites: &SiteSet,
    loss: &dyn Fn(Tensor<3>) -> Tensor<1>,
) -> Vec<(Site, Tensor<2>)> {
    let probes = Probes::new(sites, true);
    let gradients = loss(decoder.hidden(tokens, &mut Run::new(&[&probes]))).backward();
    let gradient = |probe: Probe| {
        let (g, input) = (probe.zero.grad(&gradients)?, probe.input?);
        let ([batch, length, d_out], d_in) = (g.dims(), input.dims()[2]);
        let rows = batch * length;
        Some((probe.site, g.reshape([rows, d_out]).transpose().matmul(input.reshape([rows, d_in]))))
    };
    probes.into_seen().into_iter().filter_map(gradient).collect()
}
