//! The inputs of a merge, read piece by piece, and passes over them.

use std::ops::Range;

use firebrick_tensor::block::{self, DType};
use rayon::prelude::*;

use super::rounding::Rounding;

/// Elements of a piece: those of four inputs fit the second-level cache. Results depend on it, so it is fixed.
pub(crate) const PIECE: usize = 1 << 14;

/// The elements of one input, row-major: f32 values in memory, or stored ones that are decoded as they are read.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    stored: Stored<'a>,
    elements: usize,
    load: Rounding,
}

#[derive(Clone, Copy, Debug)]
enum Stored<'a> {
    F32(&'a [f32]),
    Encoded(DType, &'a [u8]),
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        let elements = values.len();
        Values { stored: Stored::F32(values), elements, load: Rounding::Exact }
    }
}

impl<'a> Values<'a> {
    /// `elements` stored as `dtype`, as a checkpoint holds them.
    ///
    /// # Errors
    /// If they are integers, or not as many bytes.
    pub fn encoded(dtype: DType, bytes: &'a [u8], elements: usize) -> Result<Self, String> {
        if !dtype.is_real() {
            return Err(format!("{dtype} cannot be merged"));
        }
        if dtype.bytes_for(elements) != Some(bytes.len()) {
            return Err(format!("{} bytes are not {elements} elements of {dtype}", bytes.len()));
        }
        let stored = match bytemuck::try_cast_slice(bytes) {
            Ok(values) if dtype == DType::F32 => Stored::F32(values),
            _ => Stored::Encoded(dtype, bytes),
        };
        Ok(Values { stored, elements, load: Rounding::Exact })
    }

    /// Rounded to `dtype` when read, as a model that is loaded in that type.
    pub fn rounded_to(self, dtype: DType) -> Self {
        let same = matches!(self.stored, Stored::Encoded(stored, _) if stored == dtype);
        Values { load: if same { Rounding::Exact } else { Rounding::to(dtype) }, ..self }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// The elements `range`: in place where they are f32 already, else decoded into `buffer`.
    pub(crate) fn read<'b>(
        &'b self,
        range: Range<usize>,
        buffer: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], String> {
        if let (Stored::F32(values), Rounding::Exact) = (self.stored, self.load) {
            return Ok(&values[range]);
        }
        buffer.resize(range.len(), 0.0);
        self.decode(range, buffer)?;
        if self.load != Rounding::Exact {
            buffer.iter_mut().for_each(|v| *v = self.load.round(*v));
        }
        Ok(buffer)
    }

    fn decode(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        match self.stored {
            Stored::F32(values) => out.copy_from_slice(&values[range]),
            Stored::Encoded(dtype, bytes) => {
                let whole = || format!("{dtype} holds blocks that cannot be cut at element {}", range.end);
                let start = dtype.bytes_for(range.start).ok_or_else(whole)?;
                let end = dtype.bytes_for(range.end).ok_or_else(whole)?;
                block::decode(dtype, &bytes[start..end], out).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    /// All elements in memory.
    pub(crate) fn to_vec(self) -> Result<Vec<f32>, String> {
        let mut buffer = Vec::new();
        Ok(self.read(0..self.elements, &mut buffer)?.to_vec())
    }
}

/// Whole multiples of `unit` elements, about [`PIECE`] each.
pub(crate) fn pieces(n: usize, unit: usize) -> Vec<Range<usize>> {
    let unit = unit.max(1);
    let step = (PIECE / unit).max(1) * unit;
    (0..n).step_by(step).map(|start| start..n.min(start + step)).collect()
}

/// Reads one piece of every input.
pub(crate) fn with_piece<T>(
    inputs: &[Values<'_>],
    range: &Range<usize>,
    buffers: &mut Vec<Vec<f32>>,
    f: impl FnOnce(&[&[f32]]) -> T,
) -> Result<T, String> {
    buffers.resize(inputs.len(), Vec::new());
    let views = inputs.iter().zip(buffers.iter_mut()).map(|(x, buffer)| x.read(range.clone(), buffer));
    Ok(f(&views.collect::<Result<Vec<_>, _>>()?))
}

/// `f(range, inputs)` of every piece, in parallel, in their order.
pub(crate) fn map<T: Send>(
    inputs: &[Values<'_>],
    n: usize,
    unit: usize,
    f: impl Fn(&Range<usize>, &[&[f32]]) -> T + Sync,
) -> Result<Vec<T>, String> {
    let pieces = pieces(n, unit);
    let one = |buffers: &mut Vec<Vec<f32>>, range: &Range<usize>| {
        with_piece(inputs, range, buffers, |views| f(range, views))
    };
    // What fits one piece is not worth waking another thread.
    if pieces.len() <= 1 {
        return pieces.iter().map(|range| one(&mut Vec::new(), range)).collect();
    }
    pieces.par_iter().map_init(Vec::new, one).collect()
}

/// Counts over all pieces, `counters` of them: `f` adds those of one piece. Integers, so that no order matters.
pub(crate) fn count(
    inputs: &[Values<'_>],
    n: usize,
    counters: usize,
    f: impl Fn(&Range<usize>, &[&[f32]], &mut [u32]) + Sync,
) -> Result<Vec<u64>, String> {
    // A share is large against the table of its counts, and 32 bits hold them.
    let shares = pieces(n, 64 * PIECE);
    let one = |share: &Range<usize>| {
        let (mut counts, mut buffers) = (vec![0u32; counters], Vec::new());
        for start in share.clone().step_by(PIECE) {
            let range = start..share.end.min(start + PIECE);
            with_piece(inputs, &range, &mut buffers, |views| f(&range, views, &mut counts))?;
        }
        Ok(counts.into_iter().map(u64::from).collect())
    };
    if shares.len() <= 1 {
        return shares.first().map_or_else(|| Ok(vec![0; counters]), one);
    }
    shares.par_iter().map(one).try_reduce(
        || vec![0; counters],
        |mut a, b: Vec<u64>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            Ok(a)
        },
    )
}

/// `sum |a_i|` in f64, in eight lanes.
#[inline(always)]
pub(crate) fn sum_of_magnitudes(a: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (a8, rest) = a.as_chunks::<8>();
    for x in a8 {
        for i in 0..8 {
            lanes[i] += f64::from(x[i].abs());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x.abs());
    }
    lanes.iter().sum()
}

/// `sum a_i b_i` in f64, in eight lanes that a compiler keeps in registers.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 =
        a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            lanes[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}
