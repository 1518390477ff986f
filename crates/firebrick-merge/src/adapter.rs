//! Adapters of models that are merged: `model+adapter`.

use std::collections::HashMap;
use std::path::Path;

use firebrick_core::{Part, Site, SiteTable, read_file};
use firebrick_peft::hf;
use firebrick_tensor::block;
use indexmap::IndexMap;
use sha2::{Digest, Sha256};

use crate::input::Stored;

/// Most bytes of an adapter's file.
const MAX_FILE: u64 = 64 << 30;

/// An adapter in memory.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// Of its configuration and its tensors.
    pub sha256: String,
    updates: HashMap<String, Update>,
}

/// What an adapter does to a weight.
#[derive(Debug)]
pub(crate) enum Update {
    /// Adds to a weight `[d_out, d_in]`.
    LowRank(LowRank),
    /// Stands in its place.
    Whole(Vec<f32>),
}

/// `scale * B A`.
#[derive(Debug)]
pub(crate) struct LowRank {
    d_in: usize,
    rank: usize,
    scale: f64,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Adapter {
    /// Reads a PEFT folder for a model with these sites.
    pub fn open(folder: &Path, sites: &SiteTable) -> Result<Self, String> {
        let files = hf::read_all(folder, sites).map_err(|e| e.to_string())?;
        let mut hash = Sha256::new();
        for file in [hf::CONFIG_FILE, hf::WEIGHTS_FILE] {
            let path = folder.join(file);
            hash.update(read_file(&path, MAX_FILE).map_err(|e| format!("{}: {e}", path.display()))?);
        }
        let low_rank = |f: hf::SiteFactors| {
            let tensor = sites.get(f.site).and_then(|e| e.tensor.clone());
            let (rank, scale) = (f.settings.rank, f.settings.scale());
            let update = LowRank { d_in: f.a.len() / rank, rank, scale, a: f.a, b: f.b };
            (tensor.unwrap_or_default(), Update::LowRank(update))
        };
        let mut updates: HashMap<String, Update> = files.factors.into_iter().map(low_rank).collect();
        for w in files.whole {
            let mut values = vec![0.0; w.shape.iter().product()];
            let decoded = block::decode(w.dtype, &w.bytes, &mut values);
            decoded.map_err(|e| format!("{}: `{}`: {e}", folder.display(), w.tensor))?;
            updates.insert(w.tensor, Update::Whole(values));
        }
        untie(&mut updates, sites).map_err(|what| format!("{}: {what}", folder.display()))?;
        let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(Adapter { sha256, updates })
    }

    /// Whether `tensors` has what is changed, in the shapes of the configuration that the adapter was opened for.
    pub fn check(&self, tensors: &IndexMap<String, Stored>) -> Result<(), String> {
        let wrong = |(name, update): (&String, &Update)| {
            let Some(Stored { shape, .. }) = tensors.get(name) else {
                return Some(format!("the checkpoint lacks `{name}`, which the adapter changes"));
            };
            let fits = match (update, &shape[..]) {
                (Update::LowRank(u), [rows, columns]) => *columns == u.d_in && rows * u.rank == u.b.len(),
                (Update::LowRank(_), _) => false,
                (Update::Whole(values), shape) => block::elements(shape) == Some(values.len()),
            };
            let what = || format!("`{name}` is {shape:?} in the checkpoint, which does not fit the adapter");
            (!fits).then(what)
        };
        let mut problems: Vec<String> = self.updates.iter().filter_map(wrong).collect();
        problems.sort_unstable();
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }

    /// What is done to a tensor, by Hugging Face's name.
    pub fn update(&self, tensor: &str) -> Option<&Update> {
        self.updates.get(tensor)
    }
}

/// A head that the model ties to its embedding has no weight of its own: a copy of the embedding goes, another head can't be merged.
fn untie(updates: &mut HashMap<String, Update>, sites: &SiteTable) -> Result<(), String> {
    let tensor = |part| sites.get(Site::global(part)).and_then(|e| e.tensor.as_deref());
    if tensor(Part::Head).is_some() || !updates.contains_key(hf::TIED_HEAD) {
        return Ok(());
    }
    let embedding = tensor(Part::Embed).and_then(|name| updates.get(name));
    match (updates.get(hf::TIED_HEAD), embedding) {
        (Some(Update::Whole(head)), Some(Update::Whole(embedding))) if head == embedding => {
            updates.remove(hf::TIED_HEAD);
            Ok(())
        }
        _ => Err(format!("`{}` is not the embedding, to which this model ties its head", hf::TIED_HEAD)),
    }
}

impl Update {
    /// Changes elements of the weight from `start` on.
    pub fn apply(&self, start: usize, out: &mut [f32]) {
        match self {
            Update::LowRank(update) => update.add(start, out),
            Update::Whole(values) => out.copy_from_slice(&values[start..start + out.len()]),
        }
    }
}

impl LowRank {
    /// Adds to elements of the weight from `start` on, each sum in f64.
    fn add(&self, start: usize, out: &mut [f32]) {
        let mut sums = vec![0f64; self.d_in];
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let (row, column) = (at / self.d_in, at % self.d_in);
            let (part, behind) = rest.split_at_mut((self.d_in - column).min(rest.len()));
            let sums = &mut sums[..part.len()];
            sums.fill(0.0);
            for (k, b) in self.b[row * self.rank..][..self.rank].iter().enumerate() {
                let a = &self.a[k * self.d_in + column..];
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += f64::from(*b) * f64::from(*a));
            }
            for (v, sum) in part.iter_mut().zip(sums) {
                *v = (f64::from(*v) + self.scale * *sum) as f32;
            }
            at += part.len();
            rest = behind;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_is_the_same_whole_and_in_pieces() {
        let (d_out, d_in, rank) = (5, 7, 2);
        let values = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
        let update =
            LowRank { d_in, rank, scale: 0.5, a: values(rank * d_in, 0.7), b: values(d_out * rank, 1.3) };
        let base = values(d_out * d_in, 0.1);
        let mut whole = base.clone();
        update.add(0, &mut whole);
        for (i, v) in whole.iter().enumerate() {
            let (row, column) = (i / d_in, i % d_in);
            let sum: f64 = (0..rank)
                .map(|k| f64::from(update.b[row * rank + k]) * f64::from(update.a[k * d_in + column]))
                .sum();
            assert_eq!(*v, (f64::from(base[i]) + 0.5 * sum) as f32);
        }
        for cut in [1, 6, 7, 20] {
            let mut pieces = base.clone();
            update.add(0, &mut pieces[..cut]);
            update.add(cut, &mut pieces[cut..]);
            assert_eq!(pieces, whole);
            assert_ne!(pieces, base, "control");
        }
    }
}
