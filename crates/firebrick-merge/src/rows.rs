//! Inputs that are not read as they are stored: rows in another order, with something added, or from several models.

use std::ops::Range;

use firebrick_models::GgufForm;
use firebrick_tensor::block;
use firebrick_tensor::stream::Input;

use crate::adapter::Update;
use crate::vocabulary::Row;

/// An input, row by row.
pub(crate) struct Rows<'a> {
    /// Elements of a row; 1 for vectors.
    columns: usize,
    kind: Kind<'a>,
    update: Option<&'a Update>,
}

enum Kind<'a> {
    Stored { input: &'a Input<'a>, form: GgufForm, rows: usize },
    Vocabulary { inputs: Vec<(usize, &'a Input<'a>)>, rows: &'a [Row], pad: Vec<f32> },
}

impl<'a> Rows<'a> {
    /// An input in the form in which GGUF keeps it, and what an adapter adds to it.
    pub fn stored(input: &'a Input<'a>, form: GgufForm, update: Option<&'a Update>) -> Self {
        let (rows, columns) = extents(&input.info.shape);
        Rows { columns, kind: Kind::Stored { input, form, rows }, update }
    }

    /// The rows of a vocabulary; `inputs` are the embeddings by model.
    ///
    /// # Errors
    /// If a row cannot be decoded.
    pub fn vocabulary(
        inputs: Vec<(usize, &'a Input<'a>)>,
        rows: &'a [Row],
        shape: &[usize],
    ) -> Result<Self, String> {
        let (_, columns) = extents(shape);
        let mut this =
            Rows { columns, kind: Kind::Vocabulary { inputs, rows, pad: Vec::new() }, update: None };
        let tokens = rows.iter().position(|row| *row == Row::Pad).unwrap_or(rows.len());
        if tokens < rows.len() {
            let mut sums = vec![0f64; columns];
            let mut row = vec![0f32; columns];
            for i in 0..tokens {
                this.read(i..i + 1, &mut row)?;
                sums.iter_mut().zip(&row).for_each(|(sum, v)| *sum += f64::from(*v));
            }
            let mean = sums.iter().map(|sum| (sum / tokens.max(1) as f64) as f32).collect();
            if let Kind::Vocabulary { pad, .. } = &mut this.kind {
                *pad = mean;
            }
        }
        Ok(this)
    }

    /// Fills `out` with the elements of `rows`.
    ///
    /// # Errors
    /// If a row cannot be decoded.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        let start = rows.start * self.columns;
        self.read_base(rows, out)?;
        if let Some(update) = self.update {
            update.apply(start, out);
        }
        Ok(())
    }

    fn read_base(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        match &self.kind {
            Kind::Stored { input, form: form @ (GgufForm::Same | GgufForm::PlusOne), .. } => {
                decode(input, rows.start * self.columns, out)?;
                if *form == GgufForm::PlusOne {
                    out.iter_mut().for_each(|v| *v -= 1.0);
                }
                Ok(())
            }
            Kind::Stored { input, form, rows: all } => rows
                .zip(out.chunks_mut(self.columns))
                .try_for_each(|(row, out)| decode(input, form.stored_row(row, *all) * self.columns, out)),
            Kind::Vocabulary { rows: table, .. } => {
                rows.zip(out.chunks_mut(self.columns)).try_for_each(|(row, out)| self.token(&table[row], out))
            }
        }
    }

    fn token(&self, row: &Row, out: &mut [f32]) -> Result<(), String> {
        let Kind::Vocabulary { inputs, pad, .. } = &self.kind else { return Ok(()) };
        let one = |model: usize, row: usize, out: &mut [f32]| {
            let (_, input) = inputs.iter().find(|(m, _)| *m == model).ok_or("a model that is not read")?;
            let (_, columns) = extents(&input.info.shape);
            if columns != self.columns {
                let name = &input.info.name;
                return Err(format!(
                    "`{name}` has rows of {columns} elements, the output of {}",
                    self.columns
                ));
            }
            decode(input, row * self.columns, out)
        };
        match row {
            Row::Zero => out.fill(0.0),
            Row::Pad => out.copy_from_slice(pad),
            Row::One(model, row) => one(*model, *row, out)?,
            Row::Mean(rows) => {
                let mut sums = vec![0f64; self.columns];
                for (model, row) in rows {
                    one(*model, *row, out)?;
                    sums.iter_mut().zip(&*out).for_each(|(sum, v)| *sum += f64::from(*v));
                }
                out.iter_mut().zip(sums).for_each(|(v, sum)| *v = (sum / rows.len() as f64) as f32);
            }
        }
        Ok(())
    }
}

/// Rows and elements of a row.
fn extents(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [n] => (*n, 1),
        [rows, rest @ ..] => (*rows, rest.iter().product()),
    }
}

fn decode(input: &Input<'_>, start: usize, out: &mut [f32]) -> Result<(), String> {
    let dtype = input.info.dtype;
    let bytes = input.bytes_of(&(start..start + out.len()));
    let bytes =
        bytes.ok_or_else(|| format!("`{}`: rows are not whole blocks of {dtype}", input.info.name))?;
    block::decode(dtype, bytes, out).map_err(|e| format!("`{}`: {e}", input.info.name))
}
