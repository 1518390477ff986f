//! The merge methods of mergekit, one tensor at a time.
//!
//! [`prepare`] takes what passes over the inputs a method needs (norms, order statistics, masks) and gives a [`Prepared`] merge that is
//! element-wise: any range of the output can be computed from the same range of the inputs. So no method holds a whole tensor as f32,
//! nor sorts one. Sums are made in f64 over pieces of fixed size in a fixed order: results do not depend on the number of threads.

mod arcee_fusion;
mod gram;
mod karcher;
mod linear;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod parameters;
mod passthrough;
mod ram;
mod rounding;
mod sce;
mod select;
mod slerp;
mod sparsify;
mod task_vectors;
mod values;

pub use parameters::{GlobalParameters, MergeMethod, ModelParameters, Parameter};
pub(crate) use sparsify::magprune_fits;
pub use values::Values;

use std::ops::Range;

use firebrick_core::Seed;
use firebrick_tensor::block::{self, DType};
use rayon::prelude::*;
use rounding::Rounding;
use values::{pieces, with_piece};

/// In which precision a merge computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numerics {
    /// In f32, sums in f64, with one rounding at the end.
    #[default]
    F32,
    /// As mergekit: every intermediate result rounded to `dtype`.
    Mergekit,
}

/// One tensor to merge, with the parameters that hold for it.
#[derive(Clone, Copy, Debug)]
pub struct TensorMerge<'a> {
    /// The models, in the order of the configuration; all of `shape`.
    pub inputs: &'a [Values<'a>],
    /// Which of them is the base.
    pub base: Option<usize>,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// One per input; those of the base count only where a method treats it as one model among others.
    pub per_model: &'a [ModelParameters],
    /// What does not depend on the model.
    pub global: &'a GlobalParameters,
    /// Of this tensor: the run's seed, [derived](Seed::derive) by the name of the output.
    pub seed: Seed,
    /// In which precision to compute.
    pub numerics: Numerics,
    /// The type in which mergekit would hold the models, for [`Numerics::Mergekit`].
    pub dtype: DType,
    /// What the random methods keep, in place of their draws: one mask per input that is not the base.
    pub masks: Option<&'a [&'a [bool]]>,
}

impl TensorMerge<'_> {
    fn rounding(&self) -> Rounding {
        match self.numerics {
            Numerics::F32 => Rounding::Exact,
            Numerics::Mergekit => Rounding::to(self.dtype),
        }
    }

    fn elements(&self) -> usize {
        block::elements(self.shape).unwrap_or(0)
    }

    /// Elements along the last axis.
    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Positions of the inputs that are not the base.
    fn others(&self) -> Vec<usize> {
        (0..self.inputs.len()).filter(|i| Some(*i) != self.base).collect()
    }

    fn weights(&self, of: &[usize]) -> Vec<f64> {
        of.iter().map(|i| self.per_model[*i].weight).collect()
    }

    fn base(&self) -> Result<usize, String> {
        self.base.ok_or_else(|| "there is no base".into())
    }

    fn check(&self, method: MergeMethod) -> Result<(), String> {
        let mut problems = Vec::new();
        let n = self.elements();
        if self.inputs.is_empty() {
            problems.push("there are no models".to_string());
        }
        for (i, input) in self.inputs.iter().enumerate().filter(|(_, input)| input.len() != n) {
            problems.push(format!("model {i} has {} elements, shape {:?} has {n}", input.len(), self.shape));
        }
        if self.per_model.len() != self.inputs.len() {
            problems.push(format!(
                "{} sets of parameters for {} models",
                self.per_model.len(),
                self.inputs.len()
            ));
        }
        if self.base.is_some_and(|base| base >= self.inputs.len()) {
            problems.push("the base is not among the models".into());
        }
        if method.needs_base() && self.base.is_none() {
            problems.push("there is no base".into());
        }
        if let Some(masks) = self.masks
            && (masks.len() != self.others().len() || masks.iter().any(|mask| mask.len() != n))
        {
            problems.push("there should be a mask of every element for each model but the base".into());
        }
        let (fewest, most) = method.models();
        // The base of nuslerp is beside the two that are interpolated.
        let count = if method == MergeMethod::Nuslerp { self.others().len() } else { self.inputs.len() };
        if count < fewest || count > most {
            problems.push(match (fewest, most) {
                (a, b) if a == b => format!("needs {a} models, there are {count}"),
                (a, usize::MAX) => format!("needs {a} models at least, there are {count}"),
                (a, b) => format!("needs {a} to {b} models, there are {count}"),
            });
        }
        if problems.is_empty() { Ok(()) } else { Err(format!("{}: {}", method.name(), problems.join("; "))) }
    }
}

/// Fills a range of the output: index of the first element, that range of every input, the range.
type Kernel = Box<dyn Fn(usize, &[&[f32]], &mut [f32]) + Send + Sync>;

/// A merge of one tensor that has seen its inputs.
pub struct Prepared(Kernel);

impl Prepared {
    /// Computes the elements from `start` on; `inputs` are those of every model, as long as `out`.
    pub fn apply(&self, start: usize, inputs: &[&[f32]], out: &mut [f32]) {
        (self.0)(start, inputs, out);
    }

    /// Computes the elements `range` and hands them over in order; many of them on all threads.
    ///
    /// # Errors
    /// If an input cannot be decoded, through `fail`, or what `write` gives.
    pub(crate) fn run<E>(
        &self,
        inputs: &[Values<'_>],
        range: Range<usize>,
        mut write: impl FnMut(&[f32]) -> Result<(), E>,
        fail: impl Fn(String) -> E,
    ) -> Result<(), E> {
        /// Pieces that one thread computes alone: what an executor hands out as a part.
        const ALONE: usize = 256;
        /// Pieces computed between two writes; a few MB of results.
        const TOGETHER: usize = 32;
        let pieces: Vec<Range<usize>> = pieces(range.len(), 1)
            .into_iter()
            .map(|piece| range.start + piece.start..range.start + piece.end)
            .collect();
        let one = |buffers: &mut Vec<Vec<f32>>, (range, out): (&Range<usize>, &mut Vec<f32>)| {
            out.clear();
            out.resize(range.len(), 0.0);
            with_piece(inputs, range, buffers, |views| self.apply(range.start, views, out))
        };
        if pieces.len() <= ALONE {
            let (mut buffers, mut out) = (Vec::new(), Vec::new());
            for piece in &pieces {
                one(&mut buffers, (piece, &mut out)).map_err(&fail)?;
                write(&out)?;
            }
            return Ok(());
        }
        let mut results = vec![Vec::new(); TOGETHER];
        for batch in pieces.chunks(TOGETHER) {
            let work = batch.par_iter().zip(results.par_iter_mut());
            work.map_init(Vec::new, one).collect::<Result<(), String>>().map_err(&fail)?;
            results[..batch.len()].iter().try_for_each(|out| write(out))?;
        }
        Ok(())
    }
}

/// Takes the passes that `method` needs over the inputs of a tensor.
///
/// # Errors
/// If the inputs and parameters do not fit the method; every reason is given.
pub fn prepare(method: MergeMethod, tensor: &TensorMerge<'_>) -> Result<Prepared, String> {
    tensor.check(method)?;
    let kernel = match method {
        MergeMethod::Linear => linear::linear(tensor),
        MergeMethod::Slerp => slerp::slerp(tensor)?,
        MergeMethod::Nuslerp => nuslerp::nuslerp(tensor)?,
        MergeMethod::Passthrough => passthrough::passthrough(tensor),
        MergeMethod::ModelStock => model_stock::model_stock(tensor)?,
        MergeMethod::ArceeFusion => arcee_fusion::arcee_fusion(tensor)?,
        MergeMethod::Karcher => karcher::karcher(tensor)?,
        MergeMethod::Multislerp => multislerp::multislerp(tensor)?,
        MergeMethod::Sce => sce::sce(tensor)?,
        MergeMethod::Ram | MergeMethod::RamplusTl => ram::ram(tensor, method == MergeMethod::RamplusTl)?,
        MergeMethod::Nearswap => nearswap::nearswap(tensor)?,
        MergeMethod::TaskArithmetic
        | MergeMethod::Ties
        | MergeMethod::DareTies
        | MergeMethod::DareLinear
        | MergeMethod::Breadcrumbs
        | MergeMethod::BreadcrumbsTies
        | MergeMethod::Della
        | MergeMethod::DellaLinear => task_vectors::task_vectors(tensor, method)?,
    };
    Ok(Prepared(kernel))
}

/// Merges one tensor in memory.
///
/// # Errors
/// As [`prepare`].
///
/// ```
/// use firebrick_core::Seed;
/// use firebrick_merge::{GlobalParameters, MergeMethod, ModelParameters, Numerics, TensorMerge, Values, merge_tensor};
/// use firebrick_tensor::block::DType;
/// let (a, b) = ([1.0f32, 0.0], [0.0f32, 1.0]);
/// let method: MergeMethod = "slerp".parse()?;
/// let global = GlobalParameters::new(method, |name| (name == "t").then_some(0.5))?;
/// let middle = merge_tensor(method, &TensorMerge {
///     inputs: &[Values::from(&a[..]), Values::from(&b[..])],
///     base: Some(0),
///     shape: &[2],
///     per_model: &[ModelParameters::default(); 2],
///     global: &global,
///     seed: Seed(0),
///     numerics: Numerics::F32,
///     dtype: DType::F32,
///     masks: None,
/// })?;
/// assert!((middle[0] - 0.5f32.sqrt()).abs() < 1e-6 && middle[0] == middle[1]);
/// # Ok::<(), String>(())
/// ```
pub fn merge_tensor(method: MergeMethod, tensor: &TensorMerge<'_>) -> Result<Vec<f32>, String> {
    let mut out = Vec::with_capacity(tensor.elements());
    let append = |values: &[f32]| {
        out.extend_from_slice(values);
        Ok(())
    };
    prepare(method, tensor)?.run(tensor.inputs, 0..tensor.elements(), append, |error| error)?;
    Ok(out)
}
