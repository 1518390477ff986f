//! How two models or checkpoints differ: which tensors, in shape and type, and how far their values lie apart.

use std::collections::BTreeMap;

use firebrick_core::{Part, Progress, Site, Task};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Distance, Format, TensorInfo};
use serde::Serialize;

use crate::error::ModelError;
use crate::model::ModelFiles;
use crate::weights::{GgufForm, TensorSource, deinterleaved_row, interleaved_row, weight_shape};

/// The difference between two checkpoints, `a` and `b`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Tensors that only the first has.
    pub only_a: Vec<String>,
    /// Tensors that only the second has.
    pub only_b: Vec<String>,
    /// Tensors that both have, in the order of the first.
    pub tensors: Vec<TensorDiff>,
    /// Over the tensors of each part, in the order data flows; empty where tensors are compared by name.
    pub parts: Vec<SumDiff>,
    /// Over the tensors of each layer; empty where tensors are compared by name.
    pub layers: Vec<SumDiff>,
    /// Sums over all tensors.
    pub total: ValueDiff,
}

/// One tensor that both checkpoints have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Its site, where the checkpoints are models.
    pub site: Option<Site>,
    /// In the first.
    pub a: Stored,
    /// In the second.
    pub b: Stored,
    /// Shape, type and bytes are the same; the values, where the formats store them in another order or form.
    pub identical: bool,
    /// How far the values lie apart; none where the shapes differ or one holds integers.
    pub values: Option<ValueDiff>,
}

/// Several tensors together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SumDiff {
    /// A part, or a layer as selectors name it.
    pub of: String,
    /// Over all of their values.
    #[serde(flatten)]
    pub values: ValueDiff,
}

/// How a tensor is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// Name in the file.
    pub name: String,
    /// Storage type.
    #[serde(rename = "type")]
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

/// How far values lie apart; pairs of which one is not finite are only counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ValueDiff {
    /// Pairs of values.
    pub elements: usize,
    /// Pairs of which one is not finite.
    pub not_finite: usize,
    /// Largest `|a - b|`.
    pub max_abs: f64,
    /// `|a - b| / |a|` in the Frobenius norm; none where `a` is 0 and `b` is not, or no pair is finite.
    pub relative: Option<f64>,
    /// Cosine of the angle between them; none where one is 0.
    pub cosine: Option<f64>,
}

impl From<&Distance> for ValueDiff {
    fn from(d: &Distance) -> Self {
        let (elements, not_finite, max_abs) = (d.elements, d.not_finite, d.max_abs);
        ValueDiff { elements, not_finite, max_abs, relative: d.relative(), cosine: d.cosine() }
    }
}

/// Two tensors to be compared.
struct Pair<'a> {
    site: Option<Site>,
    a: &'a TensorInfo,
    b: &'a TensorInfo,
    form: Form,
}

/// How the values of two tensors lie beside each other.
enum Form {
    /// In the same order.
    Same,
    /// The row of the second that belongs to a row of the first.
    Rows(Box<dyn Fn(usize) -> usize + Sync>),
    /// Vectors that one of the files holds in another form; their values in the same one.
    Values([Vec<f32>; 2]),
}

/// Compares two models site by site, whatever their file formats: what GGUF stores in another order or form is undone.
///
/// Reads both checkpoints once, in pieces: memory does not grow with the models. Sums do not depend on the number of threads.
///
/// # Errors
/// If a tensor can't be read, or `progress` says to stop.
pub fn diff(a: &ModelFiles, b: &ModelFiles, progress: &dyn Progress) -> Result<Diff, ModelError> {
    let mut found = Diff::default();
    let mut pairs = Vec::new();
    // A tied head shares the embedding's tensor and is none of its own.
    let tensor = |files: &ModelFiles, site| {
        files.sites().get(site)?.tensor.as_ref()?;
        files.tensor_name(site).filter(|n| files.checkpoint.get(n).is_some())
    };
    for entry in a.sites().entries() {
        let Some(name) = tensor(a, entry.site) else { continue };
        match tensor(b, entry.site) {
            None => found.only_a.push(name),
            Some(other) => pairs.push(Pair {
                site: Some(entry.site),
                a: a.checkpoint.tensor(&name)?,
                b: b.checkpoint.tensor(&other)?,
                form: form(a, b, entry.site)?,
            }),
        }
    }
    let there = b.sites().entries().iter().filter(|e| tensor(a, e.site).is_none());
    found.only_b.extend(there.filter_map(|e| tensor(b, e.site)));
    compare(&a.checkpoint, &b.checkpoint, pairs, found, progress)
}

/// Compares two checkpoints tensor by tensor, by name.
///
/// # Errors
/// As [`diff`].
pub fn diff_checkpoints(a: &Checkpoint, b: &Checkpoint, progress: &dyn Progress) -> Result<Diff, ModelError> {
    let missing = |from: &Checkpoint, other: &Checkpoint| -> Vec<String> {
        from.tensors().iter().map(|t| &t.name).filter(|n| other.get(n).is_none()).cloned().collect()
    };
    let found = Diff { only_a: missing(a, b), only_b: missing(b, a), ..Diff::default() };
    let both = a.tensors().iter().filter_map(|t| Some((t, b.get(&t.name)?)));
    let pairs = both.map(|(a, b)| Pair { site: None, a, b, form: Form::Same }).collect();
    compare(a, b, pairs, found, progress)
}

/// How the weights of `site` lie beside each other.
fn form(a: &ModelFiles, b: &ModelFiles, site: Site) -> Result<Form, ModelError> {
    let (from, to) = (a.checkpoint.format(), b.checkpoint.format());
    let gguf = if from == Format::Gguf { a } else { b };
    let stored = GgufForm::of(&gguf.config, gguf.sites(), site);
    if from == to || stored == GgufForm::Same {
        return Ok(Form::Same);
    }
    // The form depends on the heads, which a tensor of another shape does not have.
    let shape = weight_shape(gguf.sites(), site).ok_or(ModelError::NoWeight { site })?;
    gguf.weights().check_site(site, &shape)?;
    // Tensors of different shapes are not compared.
    let other = if from == Format::Gguf { b } else { a };
    if other.weights().check_site(site, &shape).is_err() {
        return Ok(Form::Same);
    }
    Ok(match (stored, to) {
        (GgufForm::Interleaved { heads }, Format::Gguf) if shape.len() > 1 => {
            Form::Rows(Box::new(deinterleaved_row(shape[0], heads)))
        }
        (GgufForm::Interleaved { heads }, _) if shape.len() > 1 => {
            Form::Rows(Box::new(interleaved_row(shape[0], heads)))
        }
        _ => Form::Values([a.weights().read_site(site, &shape)?, b.weights().read_site(site, &shape)?]),
    })
}

fn compare(
    a: &Checkpoint,
    b: &Checkpoint,
    pairs: Vec<Pair<'_>>,
    mut found: Diff,
    progress: &dyn Progress,
) -> Result<Diff, ModelError> {
    let (mut parts, mut layers) = (BTreeMap::<Part, Distance>::new(), BTreeMap::<usize, Distance>::new());
    let mut total = Distance::default();
    let bytes = pairs.iter().map(|p| (p.a.len + p.b.len) as u64).sum();
    let mut task = Task::begin(progress, "diff", Some(bytes), "bytes");
    for Pair { site, a: t, b: u, form } in pairs {
        let comparable = t.shape == u.shape && t.dtype.is_real() && u.dtype.is_real();
        let values = match &form {
            _ if !comparable => None,
            Form::Same => Some(a.distance(&t.name, b, &u.name, None)?),
            Form::Rows(row_of) => Some(a.distance(&t.name, b, &u.name, Some(row_of))?),
            Form::Values([x, y]) => Some(Distance::of(x, y)),
        };
        if let Some(distance) = &values {
            total.add(distance);
            if let Some(site) = site {
                parts.entry(site.part).or_default().add(distance);
            }
            if let Some(layer) = site.and_then(|s| s.layer) {
                layers.entry(layer).or_default().add(distance);
            }
        }
        let same = match (&form, &values) {
            (Form::Same, _) => a.bytes(&t.name)? == b.bytes(&u.name)?,
            (_, Some(distance)) => distance.difference == 0.0 && distance.not_finite == 0,
            (_, None) => false,
        };
        found.tensors.push(TensorDiff {
            site,
            a: stored(t),
            b: stored(u),
            identical: t.shape == u.shape && t.dtype == u.dtype && same,
            values: values.as_ref().map(ValueDiff::from),
        });
        task.advance((t.len + u.len) as u64, &t.name).map_err(|e| ModelError::Stream(e.into()))?;
    }
    let sum = |of: String, d: &Distance| SumDiff { of, values: d.into() };
    found.parts = parts.iter().map(|(part, d)| sum(part.to_string(), d)).collect();
    found.layers = layers.iter().map(|(layer, d)| sum(format!("layers.{layer}"), d)).collect();
    found.total = (&total).into();
    Ok(found)
}

fn stored(t: &TensorInfo) -> Stored {
    Stored { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() }
}
