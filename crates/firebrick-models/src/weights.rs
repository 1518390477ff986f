//! Weights by site, in Hugging Face's layout, whatever file or module they come from.

use burn::tensor::Device;
use firebrick_core::{Part, Site, SiteKind, SiteTable};
use firebrick_tensor::block::{BlockError, DType};
use firebrick_tensor::checkpoint::{Checkpoint, CheckpointError, Format};
use firebrick_tensor::ops::PackedMatrix;

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::ModelError;

/// Something that can give the weight of each site of a model.
pub trait TensorSource {
    /// The weight at `site`, row-major in Hugging Face's layout (`[d_out, d_in]`, `[vocab, d_model]`; `[d]` for norms and
    /// biases).
    ///
    /// # Errors
    /// If the weight is missing or has another shape than `shape`.
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError>;

    /// Whether [`TensorSource::read_site`] would find a weight of `shape`, without reading it.
    ///
    /// # Errors
    /// If the weight is missing, has another shape than `shape`, or holds integers.
    fn check_site(&self, site: Site, shape: &[usize]) -> Result<(), ModelError>;
}

/// The weights of a checkpoint, by site: knows the family's tensor names and what GGUF stores in another form.
#[derive(Clone, Copy)]
pub struct CheckpointWeights<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) config: &'a DecoderConfig,
    pub(crate) sites: &'a SiteTable,
}

impl CheckpointWeights<'_> {
    /// The form in which this checkpoint stores the weight of `site`.
    pub fn form(&self, site: Site) -> GgufForm {
        match self.checkpoint.format() {
            Format::Gguf => GgufForm::of(self.config, self.sites, site),
            _ => GgufForm::Same,
        }
    }

    /// The name of `site`'s weight in this checkpoint, `None` for sites without one.
    pub fn tensor_name(&self, site: Site) -> Option<String> {
        let family = self.config.family();
        match self.checkpoint.format() {
            Format::Gguf => family.gguf_name(site),
            _ => family.hf_name(site),
        }
    }
}

/// How GGUF stores a weight, seen from Hugging Face's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufForm {
    /// As it is.
    Same,
    /// Rows in llama.cpp's order, head by head.
    Interleaved {
        /// Number of heads.
        heads: usize,
    },
    /// With 1 added.
    PlusOne,
}

impl GgufForm {
    /// The form of the weight of `site`.
    pub(crate) fn of(config: &DecoderConfig, sites: &SiteTable, site: Site) -> GgufForm {
        let kind = sites.get(site).map(|e| e.kind);
        match site.part {
            _ if config.norm_plus_one && matches!(kind, Some(SiteKind::Norm { .. })) => GgufForm::PlusOne,
            Part::AttnQ | Part::AttnQBias if config.family().gguf_interleaves_qk => {
                GgufForm::Interleaved { heads: config.heads }
            }
            Part::AttnK | Part::AttnKBias if config.family().gguf_interleaves_qk => {
                GgufForm::Interleaved { heads: config.kv_heads }
            }
            _ => GgufForm::Same,
        }
    }

    /// `values` of `rows` rows, from Hugging Face's layout to this one.
    pub fn make(self, values: Vec<f32>, rows: usize) -> Vec<f32> {
        match self {
            GgufForm::Same => values,
            GgufForm::Interleaved { heads } => interleave_rows(&values, heads, rows, values.len() / rows),
            GgufForm::PlusOne => values.into_iter().map(|v| v + 1.0).collect(),
        }
    }

    /// Where GGUF keeps the row `row` of Hugging Face's layout, of `rows`.
    pub fn stored_row(self, row: usize, rows: usize) -> usize {
        match self {
            GgufForm::Interleaved { heads } => deinterleaved_row(rows, heads)(row),
            GgufForm::Same | GgufForm::PlusOne => row,
        }
    }

    /// The inverse of [`GgufForm::make`], up to rounding.
    pub fn undo(self, values: Vec<f32>, rows: usize) -> Vec<f32> {
        match self {
            GgufForm::Same => values,
            GgufForm::Interleaved { heads } => deinterleave_rows(&values, heads, rows, values.len() / rows),
            GgufForm::PlusOne => values.into_iter().map(|v| v - 1.0).collect(),
        }
    }
}

impl CheckpointWeights<'_> {
    /// The name of `site`'s weight, which is there and has this shape.
    fn find(&self, site: Site, shape: &[usize]) -> Result<String, ModelError> {
        let name = self.tensor_name(site).ok_or_else(|| ModelError::NoWeight { site })?;
        let info = self.checkpoint.get(&name).ok_or_else(|| ModelError::MissingTensor {
            name: name.clone(),
            path: self.checkpoint.path().to_path_buf(),
        })?;
        if info.shape != shape {
            return Err(ModelError::Shape { name, expected: shape.to_vec(), found: info.shape.clone() });
        }
        if !info.dtype.is_real() {
            let (path, source) = (self.checkpoint.path().into(), BlockError::NotReal(info.dtype));
            return Err(CheckpointError::Block { path, tensor: name, source }.into());
        }
        Ok(name)
    }
}

impl CheckpointWeights<'_> {
    /// The weight of the linear layer at `site` as the codes and scales of its GGUF blocks, on `device`: `[d_in, d_out]`. That of a
    /// tied head is the embedding. `None` for sites that have none, and for types other than those of [`PackedMatrix::from_blocks`].
    ///
    /// # Errors
    /// As [`TensorSource::check_site`].
    pub fn packed(&self, site: Site, device: &Device) -> Result<Option<PackedMatrix>, ModelError> {
        let Some((d_in, d_out)) = self.sites.linear(site) else { return Ok(None) };
        let tied = site.part == Part::Head && self.config.tied_head;
        let stored = if tied { Site::global(Part::Embed) } else { site };
        let name = self.find(stored, &[d_out, d_in])?;
        let (form, bytes) = (self.form(stored), self.checkpoint.bytes(&name)?);
        let dtype = self.checkpoint.tensor(&name)?.dtype;
        let row = |row| form.stored_row(row, d_out);
        PackedMatrix::from_blocks(dtype, bytes, [d_in, d_out], row, device).map_err(|source| {
            CheckpointError::Block { path: self.checkpoint.path().into(), tensor: name, source }.into()
        })
    }
}

impl CheckpointWeights<'_> {
    /// Whether this checkpoint stores the weight at `site` in bf16, in the form of Hugging Face or with its rows in another order.
    pub fn is_bf16(&self, site: Site) -> bool {
        let stored = self.tensor_name(site).and_then(|name| self.checkpoint.get(&name));
        stored.is_some_and(|tensor| tensor.dtype == DType::BF16)
    }
}

impl TensorSource for CheckpointWeights<'_> {
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let name = self.find(site, shape)?;
        Ok(self.form(site).undo(self.checkpoint.read_f32(&name)?, shape[0]))
    }

    fn check_site(&self, site: Site, shape: &[usize]) -> Result<(), ModelError> {
        self.find(site, shape).map(drop)
    }
}

impl TensorSource for Decoder {
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.check_site(site, shape)?;
        let weight = self.weight(site).ok_or(ModelError::NoWeight { site })?;
        let data = weight.without_autodiff().into_data();
        data.try_into_vec_as::<f32>().map_err(|e| ModelError::Backend(format!("{e:?}")))
    }

    fn check_site(&self, site: Site, shape: &[usize]) -> Result<(), ModelError> {
        let weight = self.weight(site).ok_or(ModelError::NoWeight { site })?;
        let dims = weight.dims();
        let expected = if let [d] = shape { [1, *d] } else { [shape[0], shape[1]] };
        if dims != expected {
            return Err(ModelError::Shape {
                name: site.to_string(),
                expected: shape.to_vec(),
                found: dims.into(),
            });
        }
        Ok(())
    }
}

/// The shape of `site`'s weight in Hugging Face's layout, if it has one of its own.
pub(crate) fn weight_shape(sites: &SiteTable, site: Site) -> Option<Vec<usize>> {
    let entry = sites.get(site)?;
    entry.tensor.as_ref()?;
    entry.kind.weight_shape()
}

/// Rows from llama.cpp's order (rotary pairs side by side) to Hugging Face's (halves), per head.
fn deinterleave_rows(values: &[f32], heads: usize, rows: usize, cols: usize) -> Vec<f32> {
    permute_rows(values, cols, rows, deinterleaved_row(rows, heads))
}

/// Rows from Hugging Face's order (halves) to llama.cpp's (rotary pairs side by side), per head.
pub(crate) fn interleave_rows(values: &[f32], heads: usize, rows: usize, cols: usize) -> Vec<f32> {
    permute_rows(values, cols, rows, interleaved_row(rows, heads))
}

/// For a row in Hugging Face's order, the same row in llama.cpp's.
pub(crate) fn deinterleaved_row(rows: usize, heads: usize) -> impl Fn(usize) -> usize {
    let dim = rows / heads;
    move |row| row / dim * dim + row % dim % (dim / 2) * 2 + row % dim / (dim / 2)
}

/// For a row in llama.cpp's order, the same row in Hugging Face's.
pub(crate) fn interleaved_row(rows: usize, heads: usize) -> impl Fn(usize) -> usize {
    let dim = rows / heads;
    move |row| row / dim * dim + row % 2 * (dim / 2) + row % dim / 2
}

/// Row `r` of the result is row `source(r)` of `values`.
pub(crate) fn permute_rows<T: Copy>(
    values: &[T],
    cols: usize,
    rows: usize,
    source: impl Fn(usize) -> usize,
) -> Vec<T> {
    (0..rows).flat_map(|row| &values[source(row) * cols..(source(row) + 1) * cols]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_orders_are_inverse_and_differ() {
        let (heads, rows, cols) = (3, 24, 2);
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        let there = interleave_rows(&values, heads, rows, cols);
        assert_ne!(there, values);
        assert_eq!(deinterleave_rows(&there, heads, rows, cols), values);
        // Head 0 has rows 0..8: halves (0..4, 4..8) become pairs 0, 4, 1, 5, ...
        let order: Vec<f32> = there.chunks(cols).take(4).map(|r| r[0] / cols as f32).collect();
        assert_eq!(order, [0.0, 4.0, 1.0, 5.0]);
        let form = GgufForm::Interleaved { heads };
        let row = |r: usize| &there[form.stored_row(r, rows) * cols..][..cols];
        assert_eq!((0..rows).flat_map(row).copied().collect::<Vec<_>>(), values);
    }
}
