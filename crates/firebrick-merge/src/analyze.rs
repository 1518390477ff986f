//! What a merge has to reconcile, before a byte is written: size, direction, sign conflicts and shared subspaces of the task
//! vectors, tensor by tensor.

use std::fmt;
use std::ops::Range;

use firebrick_core::{Progress, Seed, Task};
use firebrick_models::GgufForm;
use firebrick_tensor::linalg::{LinalgError, Matrix, randomized_svd};
use rayon::prelude::*;
use serde::Serialize;

use crate::{Drift, Merge, MergeError, PlannedSource, PlannedTensor};

/// Elements read at a time: the largest piece of every model in memory.
const CHUNK: usize = 1 << 16;

/// Leading directions of a task vector whose subspaces are compared.
const DIRECTIONS: usize = 8;
/// Directions whose singular value is a smaller share of the largest say nothing.
const NEGLIGIBLE: f64 = 1e-3;
/// Larger matrices (embeddings) are held whole by nobody: their subspaces are left out.
const LARGEST: usize = 1 << 23;

/// The task vectors of a merge (models minus the reference).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeAnalysis {
    /// What the task vectors are measured from: the base model, or the first model where there is none.
    pub reference: String,
    /// The other models, in the order of every list below.
    pub models: Vec<String>,
    /// All tensors taken as one vector.
    pub whole: TaskVectors,
    /// One entry a tensor, in the order of the checkpoint.
    pub tensors: Vec<(String, TaskVectors)>,
    /// How far the outputs move, where [`Merge::drift`] measured it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drift: Option<Drift>,
}

/// How the task vectors of one tensor relate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskVectors {
    /// Elements.
    pub elements: u64,
    /// Euclidean norm of each task vector.
    pub norms: Vec<f64>,
    /// Each norm as a share of the reference's norm (0 where that is 0).
    pub relative: Vec<f64>,
    /// Cosine of each pair of task vectors: first with second, first with third, ..., second with third, ...; 0 where one is zero.
    pub cosines: Vec<f64>,
    /// Share of the elements where two task vectors point in opposite directions.
    pub sign_conflict: f64,
    /// For each pair, in the order of `cosines`, how much the leading directions of the one task vector (at most 8) lie in the span of
    /// those of the other: the mean squared cosine of the principal angles, of inputs and outputs together. 1 for one subspace, 0 for
    /// orthogonal ones, `8 / n` by chance in `n` dimensions. Empty for vectors and for matrices of more than 8 million elements.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overlaps: Vec<f64>,
}

/// Sums over some elements.
#[derive(Clone, Default)]
struct Sums {
    elements: u64,
    reference: f64,
    squares: Vec<f64>,
    products: Vec<f64>,
    conflicts: u64,
}

impl Sums {
    fn new(models: usize) -> Self {
        let pairs = models * models.saturating_sub(1) / 2;
        Sums { squares: vec![0.0; models], products: vec![0.0; pairs], ..Sums::default() }
    }

    /// `values`: the reference and then each model, all of one length.
    fn over(values: &[Vec<f32>]) -> Self {
        let (reference, models) = values.split_first().expect("there is a reference");
        let mut sums = Sums::new(models.len());
        sums.elements = reference.len() as u64;
        let mut deltas = vec![0.0; models.len()];
        for (i, &base) in reference.iter().enumerate() {
            let (mut up, mut down) = (false, false);
            for (delta, model) in deltas.iter_mut().zip(models) {
                *delta = f64::from(model[i]) - f64::from(base);
                up |= *delta > 0.0;
                down |= *delta < 0.0;
            }
            sums.reference += f64::from(base) * f64::from(base);
            sums.conflicts += u64::from(up && down);
            let mut pair = 0;
            for (a, &x) in deltas.iter().enumerate() {
                sums.squares[a] += x * x;
                for &y in &deltas[a + 1..] {
                    sums.products[pair] += x * y;
                    pair += 1;
                }
            }
        }
        sums
    }

    fn add(&mut self, other: &Sums) {
        self.elements += other.elements;
        self.reference += other.reference;
        self.conflicts += other.conflicts;
        self.squares.iter_mut().zip(&other.squares).for_each(|(a, b)| *a += b);
        self.products.iter_mut().zip(&other.products).for_each(|(a, b)| *a += b);
    }

    fn finish(&self) -> TaskVectors {
        let norms: Vec<f64> = self.squares.iter().map(|s| s.sqrt()).collect();
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        let pairs = (0..norms.len()).flat_map(|a| (a + 1..norms.len()).map(move |b| (a, b)));
        TaskVectors {
            elements: self.elements,
            relative: norms.iter().map(|n| ratio(*n, self.reference.sqrt())).collect(),
            cosines: pairs.zip(&self.products).map(|((a, b), p)| ratio(*p, norms[a] * norms[b])).collect(),
            sign_conflict: ratio(self.conflicts as f64, self.elements as f64),
            overlaps: Vec::new(),
            norms,
        }
    }
}

impl Merge {
    /// The models of the first tensor.
    fn analyzed(&self) -> impl Iterator<Item = usize> + '_ {
        self.plan.tensors.first().into_iter().flat_map(|t| &t.sources).map(|s| s.model)
    }

    /// Measures the task vectors of all models, in one pass over their files and in f64; nothing is written.
    ///
    /// Needs `4 (models + 1)` bytes for each of 65536 elements on every thread, and 12 bytes for each element of the largest matrix
    /// of up to 8 million elements, however large the models are.
    ///
    /// # Errors
    /// A merge that is not one of whole models, a tensor that cannot be read, and cancellation through `progress`.
    pub fn analyze(&self, progress: &dyn Progress) -> Result<MergeAnalysis, MergeError> {
        let alike = |t: &PlannedTensor| {
            t.sources.iter().map(|s| s.model).eq(self.analyzed())
                && t.sources.iter().all(|s| s.form == t.sources[0].form)
                && !(t.sources[0].form != GgufForm::Same
                    && t.sources.iter().any(|s| self.models[s.model].update(&s.tensor).is_some()))
        };
        let strange = self.plan.tensors.iter().find(|t| t.vocabulary || !(t.copied || alike(t)));
        if let Some(t) = strange {
            let problems = vec![format!(
                "`{}` is made from other models or rows than the rest; whole models can be analyzed",
                t.name
            )];
            return Err(MergeError::Mismatch {
                path: self.config.modules[0].slices[0].sources[0].model.path.clone().into(),
                problems,
            });
        }
        let planned: Vec<&PlannedTensor> = self.plan.tensors.iter().filter(|t| !t.copied).collect();
        let base = self.reference();
        let of: Vec<usize> = self.analyzed().collect();
        let reference = of.get(base).copied().unwrap_or(0);
        let others: Vec<usize> = (0..of.len()).filter(|i| *i != base).collect();
        let order: Vec<usize> = std::iter::once(base).chain(others.iter().copied()).collect();
        let mut task = Task::begin(progress, "analyze", Some(planned.len() as u64), "tensors");
        let mut whole = Sums::new(others.len());
        let mut tensors = Vec::with_capacity(planned.len());
        for tensor in planned {
            let n = tensor.shape.iter().product();
            let chunk = |range: Range<usize>| -> Result<Sums, MergeError> {
                let read = |i: &usize| self.elements(&tensor.sources[*i], range.clone());
                Ok(Sums::over(&order.iter().map(read).collect::<Result<Vec<_>, MergeError>>()?))
            };
            let starts: Vec<usize> = (0..n).step_by(CHUNK).collect();
            let parts: Vec<Sums> = starts
                .par_iter()
                .map(|start| chunk(*start..n.min(start + CHUNK)))
                .collect::<Result<_, _>>()?;
            // Added up in order, so that the number of threads does not show.
            let mut sums = Sums::new(others.len());
            parts.iter().for_each(|part| sums.add(part));
            whole.add(&sums);
            let mut found = sums.finish();
            if let [rows, cols] = tensor.shape[..]
                && n <= LARGEST
                && rows.min(cols) > 2 * DIRECTIONS
            {
                found.overlaps = self.overlaps(tensor, [rows, cols], &order)?;
            }
            tensors.push((tensor.name.clone(), found));
            task.advance(1, "")?;
        }
        let name = |i: &usize| self.models[of[*i]].reference.to_string();
        Ok(MergeAnalysis {
            reference: self.models[reference].reference.to_string(),
            models: others.iter().map(name).collect(),
            whole: whole.finish(),
            tensors,
            drift: None,
        })
    }
}

impl Merge {
    /// Elements of an input, with what an adapter adds to them.
    fn elements(&self, source: &PlannedSource, range: Range<usize>) -> Result<Vec<f32>, MergeError> {
        let model = &self.models[source.model];
        let (start, mut values) = (range.start, vec![0.0; range.len()]);
        model.checkpoint.read_f32_into(&source.stored, range, &mut values)?;
        if let Some(update) = model.update(&source.tensor) {
            update.apply(start, &mut values);
        }
        Ok(values)
    }

    /// How much the leading subspaces of each pair of task vectors overlap. `order`: the reference and then the models.
    fn overlaps(
        &self,
        tensor: &PlannedTensor,
        [rows, cols]: [usize; 2],
        order: &[usize],
    ) -> Result<Vec<f64>, MergeError> {
        let name = tensor.name.as_str();
        let fail = |e: LinalgError| MergeError::Numerics { tensor: name.into(), what: e.to_string() };
        let read = |i: usize| self.elements(&tensor.sources[i], 0..rows * cols);
        let reference = read(order[0])?;
        let mut leading = Vec::new();
        for &i in &order[1..] {
            let delta: Vec<f64> =
                read(i)?.iter().zip(&reference).map(|(x, b)| f64::from(*x) - f64::from(*b)).collect();
            let delta = Matrix::new(rows, cols, delta).map_err(fail)?;
            let found =
                randomized_svd(&delta, DIRECTIONS, DIRECTIONS, 2, Seed(0).derive(name)).map_err(fail)?;
            let least = NEGLIGIBLE * found.sigma[0];
            let count = found.sigma.iter().filter(|s| **s > least).count();
            leading.push(found.truncate(count));
        }
        let mut overlaps = Vec::new();
        for (a, first) in leading.iter().enumerate() {
            for second in &leading[a + 1..] {
                let outputs = shared(&first.u.transpose(), &second.u.transpose()).map_err(fail)?;
                overlaps.push((outputs + shared(&first.vt, &second.vt).map_err(fail)?) / 2.0);
            }
        }
        Ok(overlaps)
    }
}

/// Mean squared cosine of the principal angles between the spans of the orthonormal rows of `a` and `b`; 0 if one has none.
fn shared(a: &Matrix, b: &Matrix) -> Result<f64, LinalgError> {
    let cosines = a.matmul(&b.transpose())?;
    let angles = a.rows().min(b.rows()).max(1);
    Ok(cosines.data().iter().map(|c| c * c).sum::<f64>() / angles as f64)
}

impl fmt::Display for MergeAnalysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "task vectors from {}:", self.reference)?;
        for (i, model) in self.models.iter().enumerate() {
            writeln!(
                f,
                "  {model}: norm {:.4}, {:.3} % of the reference's",
                self.whole.norms[i],
                100.0 * self.whole.relative[i]
            )?;
        }
        let mut pair = 0;
        for (a, first) in self.models.iter().enumerate() {
            for second in &self.models[a + 1..] {
                writeln!(f, "  cosine of {first} and {second}: {:.4}", self.whole.cosines[pair])?;
                pair += 1;
            }
        }
        writeln!(f, "  opposite signs in {:.2} % of the elements", 100.0 * self.whole.sign_conflict)?;
        if let Some(drift) = &self.drift {
            write!(f, "{drift}")?;
        }
        let mut worst: Vec<&(String, TaskVectors)> = self.tensors.iter().collect();
        worst.sort_by(|a, b| b.1.sign_conflict.total_cmp(&a.1.sign_conflict));
        writeln!(f, "most conflicts:")?;
        for (name, t) in worst.into_iter().take(10) {
            writeln!(f, "  {:6.2} %  {name}", 100.0 * t.sign_conflict)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_tensor::block::DType;
    use firebrick_tensor::checkpoint::{Metadata, TensorSpec, write_safetensors};

    #[test]
    fn sums_follow_their_definitions() {
        let base = vec![1.0, -2.0, 0.0, 2.0];
        let a = vec![2.0, -2.0, 1.0, 2.0];
        let b = vec![0.0, -2.0, 2.0, 5.0];
        let same = Sums::over(&[base.clone(), a.clone(), a.clone()]).finish();
        assert!((same.cosines[0] - 1.0).abs() < 1e-15 && same.sign_conflict == 0.0, "{same:?}");
        let found = Sums::over(&[base.clone(), a.clone(), b.clone()]).finish();
        assert_eq!(found.elements, 4);
        assert!(
            (found.norms[0] - 2f64.sqrt()).abs() < 1e-15 && (found.norms[1] - 14f64.sqrt()).abs() < 1e-15
        );
        assert!((found.relative[0] - 2f64.sqrt() / 3.0).abs() < 1e-15);
        // (1, 0, 1, 0) and (-1, 0, 2, 3): product 1, opposite at the first element only.
        assert!((found.cosines[0] - 1.0 / 28f64.sqrt()).abs() < 1e-15);
        assert_eq!(found.sign_conflict, 0.25);
        let mut parts = Sums::new(2);
        for i in 0..4 {
            parts.add(&Sums::over(&[vec![base[i]], vec![a[i]], vec![b[i]]]));
        }
        assert_eq!(parts.finish(), found, "in pieces or whole");
        let unmoved = Sums::over(&[base.clone(), base.clone(), a]).finish();
        assert_eq!((unmoved.norms[0], unmoved.cosines[0]), (0.0, 0.0));
    }
    #[test]
    fn overlap_is_that_of_the_planted_subspaces() {
        let dir = tempfile::tempdir().unwrap();
        let (rows, cols) = (40, 60);
        let write = |name: &str, value: &dyn Fn(usize, usize) -> f32| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let bytes: Vec<u8> =
                (0..rows * cols).flat_map(|i| value(i / cols, i % cols).to_le_bytes()).collect();
            let spec = TensorSpec::new("layers.0.w.weight", DType::F32, [rows, cols]);
            write_safetensors(folder.join("model.safetensors"), &Metadata::default(), &[(spec, bytes)])
                .unwrap();
            folder.display().to_string()
        };
        let base = write("base", &|_, _| 1.0);
        // Three directions each: rows and columns 0..3, rows 0..3 and columns 10..13, rows 10..13 and columns 10..13.
        let planted = |r: usize, c: usize| {
            move |i: usize, j: usize| {
                1.0 + f32::from(u8::from(i >= r && i < r + 3 && i - r == j.wrapping_sub(c)))
            }
        };
        let a = write("a", &planted(0, 0));
        let b = write("b", &planted(0, 10));
        let c = write("c", &planted(10, 10));
        let yaml = format!(
            "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {a}\n- model: {b}\n- model: {c}\n- model: {base}\nparameters: {{weight: 1}}\n"
        );
        std::fs::write(dir.path().join("m.yml"), yaml).unwrap();
        let found = Merge::open(&dir.path().join("m.yml")).unwrap().analyze(&firebrick_core::Silent).unwrap();
        let overlaps = &found.tensors[0].1.overlaps;
        // a with b shares outputs, b with c inputs, a with c nothing.
        for (found, expected) in overlaps.iter().zip([0.5, 0.0, 0.5]) {
            assert!((found - expected).abs() < 1e-9, "{overlaps:?}");
        }
        assert_eq!(overlaps.len(), 3);
    }
}
