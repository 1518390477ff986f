//! The brick that computes with packed weights instead of the wiring's own.

use std::any::Any;
use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use firebrick_core::{Base, Brick, Run, Site, SiteSet};
use firebrick_tensor::ops::{PackedInputs, PackedMatrix, PackedWeight, packed_matmul};

use crate::{QuantError, QuantizedMatrix};

/// Linear layers with packed weights; never calls the layer below, whose weight need not exist.
///
/// An adapter bank above it is QLoRA (arXiv 2305.14314): gradients pass through, the packed weights stay.
#[derive(Module, Debug)]
pub struct PackedLinear {
    weights: Vec<PackedWeight>,
    #[module(skip)]
    sites: SiteSet,
    #[module(skip)]
    index: BTreeMap<Site, usize>,
}

impl PackedLinear {
    /// Packs the quantized weight of each site onto `device`.
    ///
    /// # Errors
    /// As [`QuantizedMatrix::pack`].
    pub fn new<'a>(
        weights: impl IntoIterator<Item = (Site, &'a QuantizedMatrix)>,
        device: &Device,
    ) -> Result<Self, QuantError> {
        let packed = weights.into_iter().map(|(site, weight)| Ok((site, weight.pack(device)?)));
        Ok(Self::from_packed(packed.collect::<Result<BTreeMap<_, _>, QuantError>>()?))
    }

    /// The packed weight of each site, such as those that [`ModelFiles::load_packed`](firebrick_models::ModelFiles::load_packed) leaves as
    /// they lie in a GGUF file.
    pub fn from_packed(weights: BTreeMap<Site, PackedMatrix>) -> Self {
        let index: BTreeMap<Site, usize> = weights.keys().enumerate().map(|(i, site)| (*site, i)).collect();
        let sites = index.keys().copied().collect();
        let exact = |matrix| PackedWeight { matrix, inputs: PackedInputs::Exact };
        PackedLinear { weights: weights.into_values().map(exact).collect(), sites, index }
    }

    /// The same layers, with their inputs taken as `inputs` says.
    pub fn with_inputs(mut self, inputs: PackedInputs) -> Self {
        self.weights.iter_mut().for_each(|weight| weight.inputs = inputs);
        self
    }

    /// The packed weight at `site`.
    pub fn get(&self, site: Site) -> Option<&PackedMatrix> {
        self.packed(site).map(|weight| &weight.matrix)
    }

    fn packed(&self, site: Site) -> Option<&PackedWeight> {
        self.index.get(&site).map(|i| &self.weights[*i])
    }

    /// Bytes of all packed weights with their scales and zero points.
    pub fn bytes(&self) -> usize {
        self.weights.iter().map(|weight| weight.matrix.bytes()).sum()
    }
}

impl Brick for PackedLinear {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, _base: &mut Base<'_>, _run: &mut Run<'_>) -> Tensor<3> {
        let PackedWeight { matrix, inputs } = self.packed(site).expect("called at its own sites");
        let [batch, tokens, d_in] = x.dims();
        let y = packed_matmul(x.reshape([batch * tokens, d_in]), matrix, *inputs);
        y.reshape([batch, tokens, matrix.d_out])
    }

    fn weight(&self, site: Site) -> Option<&dyn Any> {
        self.packed(site).map(|weight| weight as &dyn Any)
    }
}
