//! A model with the tokenizer of another one, without training (Goddard and Fernandes Neto 2025, arXiv 2506.06607; what mergekit calls
//! `tokensurgeon`).
//!
//! Rows of tokens that both have are copied from the model. The rows of all others are made from the model's own: orthogonal matching
//! pursuit writes the donor's row of such a token as a combination of the donor's rows of shared tokens, and the same
//! coefficients combine the model's rows of those. Shared tokens with a row that was never trained, in either, are combined with none
//! (mergekit's filter of poorly trained tokens has the same aim). Embedding and head are made each from the donor's; a donor without a
//! head of its own gives its embedding for both.

mod pieces;
mod sparse;
mod untrained;

use std::collections::VecDeque;
use std::path::Path;
use std::str::FromStr;

use firebrick_core::{Part, Site};
use firebrick_models::token_alignment::{VocabMap, VocabRule};
use firebrick_models::{DecoderConfig, GgufForm, ModelFiles};
use firebrick_tensor::block::{self, DType};
use firebrick_tensor::checkpoint::TensorSpec;
use firebrick_tensor::linalg::Matrix;
use firebrick_tensor::stream::{Card, Input, Job, OutputSpec, Source, StreamError, Target, Transform};
use rayon::prelude::*;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

pub use sparse::{Combination, nearest, omp};

use crate::{MergeError, folder};
use pieces::Pieces;
use untrained::untrained;

/// Rows that are fitted together.
const BATCH: usize = 64;

/// How the rows of tokens are made that the model has not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransplantMethod {
    /// The combination of `k` shared tokens that [`omp`] finds in the donor.
    #[default]
    Omp,
    /// The least-squares combination of the `k` shared tokens that are [`nearest`] in the donor by cosine.
    CommonInterpolation,
    /// The mean of the tokens that the model's tokenizer cuts the text of the token into.
    Subword,
    /// The mean of all tokens of the model.
    Mean,
    /// Zeros.
    Zero,
}

impl TransplantMethod {
    /// Every method, by name.
    pub const NAMES: [(&'static str, TransplantMethod); 5] = [
        ("omp", TransplantMethod::Omp),
        ("common_interpolation", TransplantMethod::CommonInterpolation),
        ("subword", TransplantMethod::Subword),
        ("mean", TransplantMethod::Mean),
        ("zero", TransplantMethod::Zero),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }

    fn fits(self) -> bool {
        matches!(self, TransplantMethod::Omp | TransplantMethod::CommonInterpolation)
    }
}

impl FromStr for TransplantMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(name, _)| *name == text);
        found
            .map(|(_, method)| *method)
            .ok_or_else(|| format!("`{text}` is not one of {}", Self::NAMES.map(|(name, _)| name).join(", ")))
    }
}

/// What becomes of the tokens that the model has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransplantSettings {
    /// How their rows are made.
    pub method: TransplantMethod,
    /// Shared tokens in a combination, for the methods that make some; no more count than there are.
    pub k: usize,
}

impl Default for TransplantSettings {
    fn default() -> Self {
        TransplantSettings { method: TransplantMethod::Omp, k: 64 }
    }
}

/// Where a row of the output comes from.
#[derive(Clone, Debug, PartialEq)]
enum Row {
    /// A row of the model.
    Own(u32),
    /// The mean of rows of the model.
    Pieces(Vec<u32>),
    /// A combination; the donor's row has the id of the output's.
    Fit,
    Mean,
    Zero,
}

/// A tensor of the output and where it is stored.
#[derive(Clone, Debug)]
struct Planned {
    spec: TensorSpec,
    stored: String,
    form: GgufForm,
    /// The donor's tensor, where this has a row for each token.
    donor: Option<String>,
}

/// The transplant of a donor's tokenizer into a model, as a transformation on the streaming executor.
///
/// Tokens are the same if they stand for the same bytes, the space in front of words included, whatever spells them, or have the same
/// role (end, begin, padding, unknown). The output has one row for each id of the donor's tokenizer; if no id changes its
/// token, it keeps all rows of the model. Ids without a token get the mean of the model's rows. All other tensors are copied, those of
/// packed types as f32. The same bytes for any number of threads.
///
/// ```
/// use firebrick_merge::vocabulary_transplant::{TransplantSettings, VocabularyTransplant};
/// use firebrick_models::ModelFiles;
/// use firebrick_tensor::stream::Executor;
/// # let dir = tempfile::tempdir()?;
/// # let out = dir.path().join("out");
/// let (model, donor) = (ModelFiles::embedded()?, ModelFiles::embedded()?);
/// let transplant = VocabularyTransplant::new(&model, &donor, TransplantSettings::default())?;
/// assert_eq!(transplant.filled(), 0, "it is the same tokenizer");
/// Executor::default().run(&transplant, &transplant.target(&out)?)?;
/// assert_eq!(ModelFiles::open(&out)?.config.vocab, model.config.vocab);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct VocabularyTransplant<'a> {
    model: &'a ModelFiles,
    donor: &'a ModelFiles,
    settings: TransplantSettings,
    /// By id of the donor's tokenizer.
    rows: Vec<Row>,
    /// Ids of the model that have a token.
    tokens: Vec<u32>,
    tensors: Vec<Planned>,
    /// Shared tokens with an untrained row, by id of the donor's tokenizer; what they are made of is copied, and no other row is made of
    /// them.
    untrained: Vec<u32>,
}

impl<'a> VocabularyTransplant<'a> {
    /// Finds out which tokens `model` and `donor` share.
    ///
    /// # Errors
    /// [`MergeError::Transplant`] with everything that is wrong: tensors of either that are missing or of a wrong shape, matrices of
    /// tokens that hold what is not a number, a combination of 0 tokens, no token to combine; and if a checkpoint can't be read.
    pub fn new(
        model: &'a ModelFiles,
        donor: &'a ModelFiles,
        settings: TransplantSettings,
    ) -> Result<Self, MergeError> {
        let mut problems = Vec::new();
        for files in [model, donor] {
            problems.extend(files.problems()?.into_iter().map(|p| format!("{}: {p}", files.name)));
        }
        let sound = problems.is_empty();
        if settings.method.fits() && settings.k == 0 {
            problems.push("k is 0, a combination needs a token".into());
        }
        if !sound {
            return Err(MergeError::Transplant { problems });
        }
        let (rows, tokens) = rows(model, donor, settings.method)?;
        let tensors = tensors(model, donor, rows.len());
        let untrained = Vec::new();
        let mut transplant =
            VocabularyTransplant { model, donor, settings, rows, tokens, tensors, untrained };
        if transplant.filled() > 0 {
            transplant.check(&mut problems)?;
            if problems.is_empty() && settings.method.fits() {
                transplant.leave_out_untrained(&mut problems)?;
            }
        }
        match problems.is_empty() {
            true => Ok(transplant),
            false => Err(MergeError::Transplant { problems }),
        }
    }

    /// What keeps rows from being made.
    fn check(&self, problems: &mut Vec<String>) -> Result<(), MergeError> {
        let fits = self.settings.method.fits();
        let mut seen: Vec<(bool, &str)> = Vec::new();
        for planned in &self.tensors {
            let Some(theirs) = &planned.donor else { continue };
            for read in [(false, planned.stored.as_str()), (true, theirs.as_str())] {
                if (read.0 && !fits) || seen.contains(&read) {
                    continue;
                }
                seen.push(read);
                let (files, name) = (if read.0 { self.donor } else { self.model }, read.1);
                let count = files.checkpoint.count_not_finite(name)?;
                if count > 0 {
                    problems.push(format!("{}: `{name}` has {count} values that are not finite", files.name));
                }
            }
        }
        if fits && self.shared() == 0 {
            problems.push(format!("{} and {} share no token", self.model.name, self.donor.name));
        }
        Ok(())
    }

    /// Finds the shared tokens that no row is made of.
    fn leave_out_untrained(&mut self, problems: &mut Vec<String>) -> Result<(), MergeError> {
        let mut seen: Vec<(bool, &str)> = Vec::new();
        let mut left_out = vec![false; self.rows.len()];
        for planned in &self.tensors {
            let Some(theirs) = &planned.donor else { continue };
            for read in [(false, planned.stored.as_str()), (true, theirs.as_str())] {
                if seen.contains(&read) {
                    continue;
                }
                seen.push(read);
                let files = if read.0 { self.donor } else { self.model };
                let untrained = untrained(&files.checkpoint, read.1)?;
                for (donor, own) in shared(&self.rows) {
                    let row = if read.0 { donor } else { own } as usize;
                    left_out[donor as usize] |= untrained.get(row) == Some(&true);
                }
            }
        }
        self.untrained = (0u32..).zip(left_out).filter(|(_, out)| *out).map(|(id, _)| id).collect();
        if self.anchors().is_empty() {
            let (shared, model, donor) = (self.shared(), &self.model.name, &self.donor.name);
            problems.push(format!(
                "of {shared} tokens that {model} and {donor} share none has trained rows in both"
            ));
        }
        Ok(())
    }

    /// Shared tokens that rows are made of, by their ids in the donor and in the model.
    fn anchors(&self) -> Vec<(u32, u32)> {
        shared(&self.rows).filter(|(donor, _)| self.untrained.binary_search(donor).is_err()).collect()
    }

    /// Shared tokens of which no row is made, as theirs were never trained: near 0, or the same as several others. Always 0 for methods
    /// that combine none.
    pub fn untrained(&self) -> usize {
        self.untrained.len()
    }

    /// Tokens of the donor that the model has.
    pub fn shared(&self) -> usize {
        self.rows.iter().filter(|row| matches!(row, Row::Own(_))).count()
    }

    /// Rows that are made.
    pub fn filled(&self) -> usize {
        self.rows.len() - self.shared()
    }

    /// The folder `path`, with the donor's tokenizer and generation settings, and a configuration that names its special tokens.
    ///
    /// # Errors
    /// If the tokenizer can't be written.
    pub fn target(&self, path: &Path) -> Result<Target, MergeError> {
        let config = DecoderConfig { vocab: self.rows.len(), ..self.model.config.clone() };
        let sizes = self.tensors.iter().map(|t| (t.spec.dtype, t.spec.shape.iter().product()));
        let mut config = config.to_hf(folder::dtype_name(sizes).unwrap_or("float32"));
        let tokenizer = &self.donor.tokenizer;
        tokenizer.put_ids(&mut config);
        let mut side_files = vec![("config.json".to_owned(), folder::pretty(&config))];
        side_files.extend(tokenizer.files()?);
        Ok(Target::Folder { path: path.into(), stem: "model".into(), side_files })
    }

    /// Writes the rows of a matrix of tokens.
    fn transplant(&self, job: &mut Job<'_>, planned: &Planned) -> Result<(), StreamError> {
        let (own, width) = (job.input(0)?, planned.spec.shape[1]);
        let theirs = job.input(1)?;
        let whole = match self.rows.contains(&Row::Mean) {
            true => mean(own, &self.tokens, width).map_err(StreamError::transform)?,
            false => Vec::new(),
        };
        let fits = (0u32..).zip(&self.rows).filter(|(_, row)| **row == Row::Fit);
        let fitted: Vec<u32> = fits.map(|(id, _)| id).collect();
        let fitter = match fitted.is_empty() {
            false => Some(Fitter::new(self, own, theirs, width).map_err(StreamError::transform)?),
            true => None,
        };
        let mut batches = fitted.chunks(BATCH);
        let mut ready: VecDeque<Vec<f32>> = VecDeque::new();
        for source in &self.rows {
            let values = match source {
                Row::Own(id) if own.info.dtype == planned.spec.dtype => {
                    // Bit for bit, as nothing has to be decoded.
                    let bytes = own.bytes_of(&(*id as usize * width..(*id as usize + 1) * width));
                    job.write_bytes(bytes.unwrap_or_default())?;
                    continue;
                }
                Row::Own(id) => row(own, *id, width),
                Row::Pieces(ids) => mean(own, ids, width),
                Row::Mean => Ok(whole.clone()),
                Row::Zero => Ok(vec![0.0; width]),
                Row::Fit => {
                    if ready.is_empty()
                        && let (Some(fitter), Some(batch)) = (&fitter, batches.next())
                    {
                        ready = fitter.rows(batch).map_err(StreamError::transform)?.into();
                    }
                    ready.pop_front().ok_or_else(|| "a row that nothing made".to_owned())
                }
            };
            job.write_f32(&values.map_err(StreamError::transform)?)?;
        }
        Ok(())
    }

    /// Most bytes that [`VocabularyTransplant::transplant`] holds, of rows of this many elements in the donor and the output.
    fn scratch(&self, theirs: usize, width: usize) -> u64 {
        let shared = self.shared() - self.untrained();
        let k = self.settings.k.min(shared).min(theirs);
        let fits = if self.rows.contains(&Row::Fit) {
            8 * (shared * (theirs + 3 * BATCH) + BATCH * theirs * (k + 6) + BATCH * k * k)
        } else {
            0
        };
        (fits + (4 * BATCH + 16) * width) as u64
    }
}

impl Transform for VocabularyTransplant<'_> {
    fn name(&self) -> &str {
        "vocabulary transplant"
    }

    fn sources(&self) -> Vec<Source<'_>> {
        [self.model, self.donor].map(|f| Source { name: f.name.clone(), checkpoint: &f.checkpoint }).into()
    }

    fn outputs(&self) -> Result<Vec<OutputSpec>, StreamError> {
        let spec = |planned: &Planned| {
            let mut reads = vec![(0, planned.stored.clone())];
            let spec = planned.spec.clone();
            let elements: usize = spec.shape.iter().product();
            match &planned.donor {
                Some(donor) => {
                    reads.push((1, donor.clone()));
                    let scratch = self.scratch(self.donor.config.d_model, spec.shape[1]);
                    OutputSpec::whole(spec, reads, scratch)
                }
                None if planned.form == GgufForm::Same => OutputSpec::elementwise(spec, reads),
                None => OutputSpec::whole(spec, reads, 8 * elements as u64),
            }
        };
        Ok(self.tensors.iter().map(spec).collect())
    }

    fn settings(&self) -> Json {
        // The tokenizers, in what they do to the rows.
        let mut hash = Sha256::new();
        self.rows.iter().for_each(|row| hash.update(format!("{row:?}\n")));
        self.untrained.iter().for_each(|id| hash.update(format!("{id}\n")));
        let rows: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let TransplantSettings { method, k } = self.settings;
        serde_json::json!({ "method": method.name(), "k": method.fits().then_some(k), "rows": rows })
    }

    fn card(&self) -> Card {
        let method = self.settings.method.name();
        let untrained = match self.untrained() {
            0 => String::new(),
            n => format!(
                " {n} shared tokens have rows that were never trained, and others are not made of them."
            ),
        };
        let text = format!(
            "## Vocabulary transplant\n\n`{}` with the tokenizer of `{}`: {} of {} tokens are the model's own, {} are made (`{method}`).{untrained}\n",
            self.model.name,
            self.donor.name,
            self.shared(),
            self.rows.len(),
            self.filled(),
        );
        Card { tags: vec!["vocabulary-transplant".into()], front_matter: Vec::new(), text }
    }

    fn compute(&self, job: &mut Job<'_>) -> Result<(), StreamError> {
        let planned = &self.tensors[job.index()];
        if planned.donor.is_some() {
            return self.transplant(job, planned);
        }
        if planned.form == GgufForm::Same {
            return job.copy();
        }
        let values = planned.form.undo(job.read_f32(0)?.into_owned(), planned.spec.shape[0]);
        job.write_f32(&values)
    }
}

/// Combines rows of the model as the donor's are combined of others.
struct Fitter<'a> {
    settings: TransplantSettings,
    own: &'a Input<'a>,
    theirs: &'a Input<'a>,
    width: usize,
    /// The donor's rows of the shared tokens that rows are made of.
    atoms: Matrix,
    /// The model's ids of the same tokens.
    ids: Vec<u32>,
}

impl<'a> Fitter<'a> {
    fn new(
        transplant: &VocabularyTransplant<'_>,
        own: &'a Input<'a>,
        theirs: &'a Input<'a>,
        width: usize,
    ) -> Result<Self, String> {
        let (donor, ids): (Vec<u32>, Vec<u32>) = transplant.anchors().into_iter().unzip();
        let atoms = matrix(theirs, &donor, transplant.donor.config.d_model)?;
        Ok(Fitter { settings: transplant.settings, own, theirs, width, atoms, ids })
    }

    /// The rows of these ids of the donor.
    fn rows(&self, donor: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        let targets = matrix(self.theirs, donor, self.atoms.cols())?;
        let found = match self.settings.method {
            TransplantMethod::CommonInterpolation => nearest(&self.atoms, &targets, self.settings.k),
            _ => omp(&self.atoms, &targets, self.settings.k),
        };
        let combine = |combination: &Combination| {
            let mut sum = vec![0f64; self.width];
            for (atom, coefficient) in combination {
                let own = row(self.own, self.ids[*atom], self.width)?;
                sum.iter_mut().zip(own).for_each(|(s, v)| *s += coefficient * f64::from(v));
            }
            Ok(sum.into_iter().map(|s| s as f32).collect())
        };
        found.map_err(|e| e.to_string())?.par_iter().map(combine).collect()
    }
}

/// Tokens that both have, by their ids in the donor and in the model.
fn shared(rows: &[Row]) -> impl Iterator<Item = (u32, u32)> {
    (0u32..).zip(rows).filter_map(|(donor, row)| match row {
        Row::Own(id) => Some((donor, *id)),
        _ => None,
    })
}

/// A row of a matrix with `width` columns.
fn row(input: &Input<'_>, id: u32, width: usize) -> Result<Vec<f32>, String> {
    let start = id as usize * width;
    let (dtype, name) = (input.info.dtype, &input.info.name);
    let bytes = input.bytes_of(&(start..start + width));
    let bytes = bytes.ok_or_else(|| format!("`{name}`: rows are not whole blocks of {dtype}"))?;
    let mut values = vec![0.0; width];
    block::decode(dtype, bytes, &mut values).map_err(|e| format!("`{name}`: {e}"))?;
    Ok(values)
}

fn matrix(input: &Input<'_>, ids: &[u32], width: usize) -> Result<Matrix, String> {
    let mut data = Vec::with_capacity(ids.len() * width);
    for id in ids {
        data.extend(row(input, *id, width)?.into_iter().map(f64::from));
    }
    Matrix::new(ids.len(), width, data).map_err(|e| e.to_string())
}

/// The mean of rows.
fn mean(input: &Input<'_>, ids: &[u32], width: usize) -> Result<Vec<f32>, String> {
    let mut sum = vec![0f64; width];
    for id in ids {
        sum.iter_mut().zip(row(input, *id, width)?).for_each(|(s, v)| *s += f64::from(v));
    }
    Ok(sum.into_iter().map(|s| (s / ids.len().max(1) as f64) as f32).collect())
}

/// The tensors of the output.
fn tensors(model: &ModelFiles, donor: &ModelFiles, rows: usize) -> Vec<Planned> {
    let (weights, theirs) = (model.weights(), donor.weights());
    let of = |part| theirs.tensor_name(Site::global(part));
    let head = if donor.config.tied_head { Part::Embed } else { Part::Head };
    let planned = |site: Site, name: &str| {
        let stored = weights.tensor_name(site)?;
        let info = model.checkpoint.get(&stored)?;
        let dtype = if info.dtype.is_packed() { DType::F32 } else { info.dtype };
        let mut spec = TensorSpec::new(name, dtype, info.shape.clone());
        let donor = match site.part {
            Part::Embed => of(Part::Embed),
            Part::Head => of(head),
            _ => None,
        };
        if donor.is_some() {
            spec.shape[0] = rows;
        }
        Some(Planned { spec, stored, form: weights.form(site), donor })
    };
    let entries = model.sites().entries().iter();
    entries.filter_map(|e| planned(e.site, e.tensor.as_ref()?)).collect()
}

/// The rows of the output, and the ids of the model that have a token.
fn rows(
    model: &ModelFiles,
    donor: &ModelFiles,
    method: TransplantMethod,
) -> Result<(Vec<Row>, Vec<u32>), MergeError> {
    let (own, theirs) = (&model.tokenizer, &donor.tokenizer);
    let mut map = VocabMap::new(theirs, own, VocabRule::Exact);
    let shared: Vec<Option<u32>> = (0..theirs.vocab_size() as u32).map(|id| map.get(id)).collect();
    let tokens = (0..own.vocab_size() as u32).filter(|id| own.token(*id).is_some()).collect();
    let stays = |(id, shared): (u32, &Option<u32>)| {
        *shared == Some(id) || own.token(id).or(theirs.token(id)).is_none()
    };
    if theirs.vocab_size() == own.vocab_size() && (0u32..).zip(&shared).all(stays) {
        return Ok(((0..model.config.vocab as u32).map(Row::Own).collect(), tokens));
    }
    let pieces = (method == TransplantMethod::Subword).then(|| Pieces::new(own, theirs));
    let made = |id: u32| -> Result<Row, MergeError> {
        if theirs.token(id).is_none() {
            return Ok(Row::Mean);
        }
        Ok(match (method, &pieces) {
            (_, Some(pieces)) => {
                Some(pieces.of(id)?).filter(|ids| !ids.is_empty()).map_or(Row::Mean, Row::Pieces)
            }
            (TransplantMethod::Zero, _) => Row::Zero,
            (TransplantMethod::Omp | TransplantMethod::CommonInterpolation, _) => Row::Fit,
            _ => Row::Mean,
        })
    };
    let rows =
        (0u32..).zip(shared).map(|(id, shared)| shared.map_or_else(|| made(id), |id| Ok(Row::Own(id))));
    Ok((rows.collect::<Result<_, _>>()?, tokens))
}
