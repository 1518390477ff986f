//! The models of a merge, and what it gives, as decoders in memory: what is measured before anything is written.

use burn::tensor::Device;
use firebrick_core::{Site, SiteTable};
use firebrick_models::{Decoder, DecoderConfig, ModelError, TensorSource};
use firebrick_tensor::block::DType;

use crate::{Merge, MergeError, PlannedSource, PlannedTensor, Values, folder, merge_tensor};

/// A decoder of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// The model at this place among the sources of every tensor.
    Source(usize),
    /// What the merge writes, rounded as it is stored.
    Result,
}

/// Weights by site.
pub(crate) struct Weights<'m> {
    pub merge: &'m Merge,
    pub sites: &'m SiteTable,
    pub which: Which,
}

impl Weights<'_> {
    fn planned(&self, site: Site) -> Result<&PlannedTensor, ModelError> {
        let name =
            self.sites.get(site).and_then(|e| e.tensor.as_deref()).ok_or(ModelError::NoWeight { site })?;
        let found = self.merge.plan.tensors.iter().find(|t| t.name == name);
        found.ok_or_else(|| ModelError::MissingTensor {
            name: name.into(),
            path: self.merge.config.modules[0].slices[0].sources[0].model.path.clone().into(),
        })
    }
}

impl TensorSource for Weights<'_> {
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.check_site(site, shape)?;
        let tensor = self.planned(site)?;
        let values = match self.which {
            Which::Source(i) => self.merge.values(&tensor.sources[i], &tensor.shape),
            Which::Result => self.merge.merged(tensor),
        };
        values.map_err(|e| ModelError::Backend(e.to_string()))
    }

    fn check_site(&self, site: Site, shape: &[usize]) -> Result<(), ModelError> {
        let tensor = self.planned(site)?;
        match tensor.shape == shape {
            true => Ok(()),
            false => Err(ModelError::Shape {
                name: tensor.name.clone(),
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            }),
        }
    }
}

impl Merge {
    /// Bytes of the weights of one model in memory, in f32.
    pub fn model_bytes(&self) -> u64 {
        4 * self.plan.tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum::<u64>()
    }

    /// What keeps the models from being decoders of one shape with whole layers, merged tensor by tensor; nothing if they are.
    pub(crate) fn whole_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let slices: Vec<_> = self.config.modules.iter().flat_map(|m| &m.slices).collect();
        if slices.len() != 1 || slices[0].sources.iter().any(|s| s.layers.is_some()) {
            problems.push("it merges slices or modules, not whole models".to_string());
        }
        if self.config.tokenizer.is_some() {
            problems.push("a `tokenizer` gives the rows of the vocabulary other places".into());
        }
        problems.extend(self.decoder_config().err().into_iter().flatten());
        problems
    }

    /// Which of the sources of a tensor is what task vectors are measured from: the base, or the first model where there is none.
    pub(crate) fn reference(&self) -> usize {
        let merged = || self.plan.tensors.iter().filter(|t| !t.copied);
        let named = |tensor: &PlannedTensor| {
            let base = self.config.base_model.as_ref()?;
            tensor.sources.iter().position(|s| self.models[s.model].reference == *base)
        };
        merged().find_map(|t| t.base).or_else(|| merged().find_map(named)).unwrap_or(0)
    }

    /// The configuration of what is written.
    fn decoder_config(&self) -> Result<DecoderConfig, Vec<String>> {
        let json = folder::config(self).ok_or_else(|| vec!["the models have no config.json".to_string()])?;
        DecoderConfig::from_hf(&json)
    }

    /// One of the models, or the result, on `device`.
    ///
    /// # Errors
    /// [`MergeError::Settings`] if their family is not known; a tensor that cannot be read or merged.
    pub(crate) fn decoder(&self, which: Which, device: &Device) -> Result<Decoder, MergeError> {
        let config = self.decoder_config().map_err(|problems| MergeError::Settings { problems })?;
        let sites = config.family().site_table(&config);
        Ok(Decoder::load(config, &Weights { merge: self, sites: &sites, which }, device)?)
    }

    /// All elements of an input in Hugging Face's layout, with what an adapter adds to them.
    fn values(&self, source: &PlannedSource, shape: &[usize]) -> Result<Vec<f32>, MergeError> {
        let model = &self.models[source.model];
        let rows = shape.first().copied().unwrap_or(1);
        let mut values = source.form.undo(model.checkpoint.read_f32(&source.stored)?, rows);
        if let Some(update) = model.update(&source.tensor) {
            update.apply(0, &mut values);
        }
        Ok(values)
    }

    /// All elements of a tensor of the output, rounded to the type in which they are stored.
    fn merged(&self, tensor: &PlannedTensor) -> Result<Vec<f32>, MergeError> {
        let fail = |what: String| MergeError::Numerics { tensor: tensor.name.clone(), what };
        let inputs: Vec<Vec<f32>> =
            tensor.sources.iter().map(|s| self.values(s, &tensor.shape)).collect::<Result<_, _>>()?;
        let rounded = |dtype: Option<DType>, values| {
            let values = Values::from(values);
            dtype.map_or(values, |dtype| values.rounded_to(dtype))
        };
        let values: Vec<Values<'_>> = inputs.iter().map(|v| rounded(self.config.dtype, &v[..])).collect();
        let (per_model, global) = self.parameters(tensor).map_err(fail)?;
        let common = self.tensor_merge(tensor, &values, &per_model, &global);
        let merged = merge_tensor(self.config.method, &common).map_err(fail)?;
        let mut stored = Vec::new();
        Ok(rounded(Some(tensor.dtype), &merged).read(0..merged.len(), &mut stored).map_err(fail)?.to_vec())
    }
}
