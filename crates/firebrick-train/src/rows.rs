//! Rows of tokens to train on: windows of a text, or documents packed so that none sees another.

use std::borrow::Cow;
use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Progress, Run, Seed};
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::ops::Segments;
use serde::{Deserialize, Serialize};

use crate::{Document, TextData, TrainError};

/// Over what the loss of packed documents is averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Average {
    /// All tokens to learn count alike.
    #[default]
    Token,
    /// All documents count alike, however long what is to be learned of them.
    Document,
}

/// Rows of `window` tokens each.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows<'a> {
    window: usize,
    ids: Cow<'a, [u32]>,
    packed: Option<Packing>,
}

/// What a row of several documents has besides its tokens.
#[derive(Clone, Debug, PartialEq)]
struct Packing {
    /// Weight of each prediction, those of a row's tokens from the second on, `[rows, window - 1]`.
    weights: Vec<f32>,
    /// For each token, where its document begins in the row, `[rows, window]`.
    starts: Vec<u32>,
    /// Tokens that fill up rows.
    padding: usize,
}

impl<'a> Rows<'a> {
    /// The windows of a text: every token counts, and documents see those before them.
    ///
    /// # Errors
    /// If the text does not fill one window.
    pub fn windows(text: &'a TextData, window: usize) -> Result<Self, TrainError> {
        let rows = text.ids.len().checked_div(window).unwrap_or(0);
        match rows {
            0 => Err(TrainError::TooShort { tokens: text.ids.len(), window }),
            _ => Ok(Rows { window, ids: Cow::Borrowed(&text.ids[..rows * window]), packed: None }),
        }
    }

    /// Packs documents into rows: the longest first, each into the fullest row that it fits into (best fit decreasing).
    ///
    /// Positions begin anew with each document, and none sees another ([`Segments`]). Documents longer than a row are cut
    /// into pieces that know nothing of each other; pieces with nothing to learn are left out. `pad` is the token that fills
    /// up rows, which nothing sees and nothing learns.
    ///
    /// # Errors
    /// If no document has anything to learn.
    ///
    /// # Panics
    /// If `window` is 0.
    pub fn pack(
        documents: &[Document],
        window: usize,
        pad: u32,
        average: Average,
    ) -> Result<Rows<'static>, TrainError> {
        let mut pieces: Vec<(&[u32], &[bool], f32)> = Vec::new();
        // The first token of a piece is never predicted.
        let learned = |learn: &[bool]| learn.iter().skip(1).filter(|&&l| l).count();
        for document in documents {
            let parts = document.ids.chunks(window).zip(document.learn.chunks(window));
            let useful: Vec<_> = parts.filter(|(_, learn)| learned(learn) > 0).collect();
            let weight = match average {
                Average::Token => 1.0,
                Average::Document => {
                    let all: usize = useful.iter().map(|(_, learn)| learned(learn)).sum();
                    1.0 / all.max(1) as f32
                }
            };
            pieces.extend(useful.into_iter().map(|(ids, learn)| (ids, learn, weight)));
        }
        // Stable: among equals the first comes first.
        pieces.sort_by_key(|(ids, ..)| std::cmp::Reverse(ids.len()));
        let mut rows: Vec<Vec<usize>> = Vec::new();
        // Rows by the room that is left in them.
        let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (i, (ids, ..)) in pieces.iter().enumerate() {
            let fullest = open.range(ids.len()..).next().map(|(&room, _)| room);
            let (room, row) = match fullest {
                Some(room) => {
                    let same = open.get_mut(&room).expect("just found");
                    let row = same.pop().expect("no entry is empty");
                    if same.is_empty() {
                        open.remove(&room);
                    }
                    (room, row)
                }
                None => {
                    rows.push(Vec::new());
                    (window, rows.len() - 1)
                }
            };
            rows[row].push(i);
            if room > ids.len() {
                open.entry(room - ids.len()).or_default().push(row);
            }
        }
        if rows.is_empty() {
            return Err(TrainError::NothingToLearn);
        }
        let n = rows.len();
        let (mut ids, mut starts) = (Vec::with_capacity(n * window), Vec::with_capacity(n * window));
        let mut weights = Vec::with_capacity(n * (window - 1));
        let mut padding = 0;
        for row in rows {
            let mut all = Vec::with_capacity(window);
            for i in row {
                let (tokens, learn, weight) = pieces[i];
                let begin = ids.len() % window;
                ids.extend_from_slice(tokens);
                starts.resize(ids.len(), begin as u32);
                let counts = learn.iter().enumerate().map(|(i, &l)| if l && i > 0 { weight } else { 0.0 });
                all.extend(counts);
            }
            let room = window - all.len();
            padding += room;
            starts.resize(starts.len() + room, all.len() as u32);
            ids.resize(ids.len() + room, pad);
            all.resize(window, 0.0);
            weights.extend_from_slice(&all[1..]);
        }
        let packed = Some(Packing { weights, starts, padding });
        Ok(Rows { window, ids: Cow::Owned(ids), packed })
    }

    /// `count` rows, each drawn from all of them by the stream `name` of `seed`.
    pub fn draw(&self, count: usize, seed: Seed, name: &str) -> Vec<usize> {
        let all = self.count();
        let row = |u: &f32| (((u + 0.5) * all as f32) as usize).min(all - 1);
        seed.uniform(name, count, 0.5).iter().map(row).collect()
    }

    /// Tokens in a row.
    pub fn window(&self) -> usize {
        self.window
    }

    /// How many rows there are, at least one.
    pub fn count(&self) -> usize {
        self.ids.len() / self.window
    }

    /// The largest token id.
    pub fn largest_id(&self) -> u32 {
        self.ids.iter().copied().max().unwrap_or(0)
    }

    /// The share of tokens that only fill up rows.
    pub fn padding(&self) -> f64 {
        self.packed.as_ref().map_or(0.0, |p| p.padding as f64 / self.ids.len() as f64)
    }

    /// A pass over some of the rows, by number.
    ///
    /// # Panics
    /// If there are none, or one is not there.
    pub fn batch(&self, rows: &[usize], device: &Device) -> Batch {
        let rows: Vec<Row<'_>> = rows.iter().map(|&i| self.row(i)).collect();
        Batch::new(&rows, rows.iter().map(Row::weight).sum(), device)
    }

    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> Row<'_> {
        let w = self.window;
        let packed = self.packed.as_ref();
        Row {
            ids: &self.ids[i * w..][..w],
            packed: packed.map(|p| (&p.weights[i * (w - 1)..][..w - 1], &p.starts[i * w..][..w])),
        }
    }

    /// A digest of everything that the loss depends on.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.hash(&mut hasher);
        hasher.finalize().to_hex()[..32].to_string()
    }

    /// Adds everything that the loss depends on.
    pub(crate) fn hash(&self, hasher: &mut blake3::Hasher) {
        let mut add = |value: u32| {
            hasher.update(&value.to_le_bytes());
        };
        self.ids.iter().for_each(|&id| add(id));
        if let Some(packed) = &self.packed {
            packed.weights.iter().for_each(|w| add(w.to_bits()));
            packed.starts.iter().for_each(|&s| add(s));
        }
    }
}

/// A row of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Row<'a> {
    pub ids: &'a [u32],
    /// Weights of its predictions, and the beginnings of its documents.
    pub packed: Option<(&'a [f32], &'a [u32])>,
}

impl Row<'_> {
    /// The sum of the weights of its predictions.
    pub fn weight(&self) -> f64 {
        let all = self.ids.len() as f64 - 1.0;
        self.packed.map_or(all, |(weights, _)| weights.iter().map(|&w| f64::from(w)).sum())
    }
}

/// What one pass is computed on.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids `[rows, window]`.
    pub tokens: Tensor<2, Int>,
    /// What the prediction of each token from the second on counts in the loss, `[rows, window - 1]`; if absent the loss is
    /// the mean. Over the passes of a step they add up to the number of passes.
    pub weights: Option<Tensor<2>>,
    /// Where the documents of the rows begin; if absent a row is one text.
    pub segments: Option<Segments>,
}

impl Batch {
    /// A pass over `rows` of which all predictions together weigh `total`.
    pub(crate) fn new(rows: &[Row<'_>], total: f64, device: &Device) -> Self {
        let ids: Vec<&[u32]> = rows.iter().map(|row| row.ids).collect();
        let tokens = token_tensor(&ids, device);
        let plain = rows.iter().all(|row| row.packed.is_none());
        // Other passes of the step may be packed: then these rows count by their own weight.
        if plain && rows.iter().map(Row::weight).sum::<f64>() == total {
            return Batch { tokens, weights: None, segments: None };
        }
        let [n, window] = [rows.len(), ids[0].len()];
        let (mut weights, mut starts) = (Vec::with_capacity(n * window), Vec::with_capacity(n * window));
        for row in rows {
            match row.packed {
                Some((w, s)) => {
                    weights.extend(w.iter().map(|&w| (f64::from(w) / total) as f32));
                    starts.extend_from_slice(s);
                }
                None => {
                    weights.resize(weights.len() + window - 1, (1.0 / total) as f32);
                    starts.resize(starts.len() + window, 0);
                }
            }
        }
        let weights = Tensor::from_data(TensorData::new(weights, [n, window - 1]), device);
        Batch { tokens, weights: Some(weights), segments: (!plain).then(|| Segments::new(n, starts)) }
    }

    /// The mean loss `[1]` of the tokens to learn, from the loss `[rows, window - 1]` of each token from the second on.
    pub fn mean(&self, each: Tensor<2>) -> Tensor<1> {
        match &self.weights {
            Some(weights) => (each * weights.clone()).sum(),
            None => each.mean(),
        }
    }

    /// The mean negative log-likelihood `[1]` in nats of the tokens to learn, without auxiliary losses.
    pub fn nll(&self, decoder: &Decoder, run: &mut Run<'_>) -> Tensor<1> {
        self.mean(self.each(decoder, run))
    }

    /// The negative log-likelihood `[rows, window - 1]` in nats of each token from the second on, whether it counts or not.
    pub fn each(&self, decoder: &Decoder, run: &mut Run<'_>) -> Tensor<2> {
        self.enter(run);
        decoder.nll(self.tokens.clone(), run)
    }

    /// Tells a run which documents its rows hold.
    pub(crate) fn enter(&self, run: &mut Run<'_>) {
        if let Some(segments) = &self.segments {
            run.insert(segments.clone());
        }
    }
}

/// The mean negative log-likelihood in nats of what is to be learned of `rows`, `batch` rows at a time.
///
/// # Errors
/// If a token has no embedding, a brick is trainable (pass `bricks.valid()`), the device fails, or the run is cancelled.
///
/// # Panics
/// If `batch` is 0.
pub fn held_out_loss(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    rows: &Rows<'_>,
    batch: usize,
    progress: &dyn Progress,
) -> Result<f64, TrainError> {
    let (largest, vocab) = (rows.largest_id(), decoder.config().vocab);
    if largest as usize >= vocab {
        return Err(TrainError::UnknownToken { id: largest, vocab });
    }
    let decoder = decoder.valid();
    let device = decoder.device();
    let all: Vec<Row<'_>> = (0..rows.count()).map(|i| rows.row(i)).collect();
    let (mut nats, mut weight) = (0.0, 0.0);
    for rows in all.chunks(batch) {
        progress.check()?;
        let pass = Batch::new(rows, 1.0, &device);
        let each = pass.each(&decoder, &mut Run::new(bricks));
        if each.is_tracked() {
            return Err(TrainError::Tracked);
        }
        let each = match pass.weights {
            Some(weights) => each * weights,
            None => each,
        };
        let data = each.try_into_data().map_err(|e| TrainError::Device(e.to_string()))?;
        nats += data.iter::<f64>().sum::<f64>();
        weight += rows.iter().map(Row::weight).sum::<f64>();
    }
    Ok(nats / weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(length: usize, first: u32, learned: std::ops::Range<usize>) -> Document {
        let ids = (first..).take(length).collect();
        Document { ids, learn: (0..length).map(|i| learned.contains(&i)).collect(), bytes: length }
    }

    #[test]
    fn every_token_to_learn_is_in_one_row_with_its_past() {
        let lengths = [5, 17, 3, 9, 1, 8, 2, 12, 4, 30];
        let documents: Vec<Document> = (0u32..)
            .zip(lengths)
            .map(|(i, length)| document(length, 100 * i, if i == 3 { 0..1 } else { 1..length }))
            .collect();
        let rows = Rows::pack(&documents, 16, 9999, Average::Token).unwrap();
        let mut seen = Vec::new();
        for i in 0..rows.count() {
            let Row { ids, packed: Some((weights, starts)) } = rows.row(i) else { panic!("packed") };
            assert_eq!((ids.len(), weights.len(), starts.len()), (16, 15, 16));
            for at in 1..16 {
                let start = starts[at] as usize;
                if weights[at - 1] > 0.0 {
                    seen.push(ids[at]);
                    // What is seen is one piece of one document.
                    assert!((start..at).all(|j| ids[j] + (at - j) as u32 == ids[at]));
                    assert!(start < at);
                } else {
                    assert!(start == at || ids[at] == 9999);
                }
            }
        }
        seen.sort_unstable();
        // Not the first of a piece (pieces of 16 begin at 0 and 16), and nothing of number 3, which has nothing to learn.
        let of = |d: &Document| -> Vec<u32> {
            (1..d.ids.len()).filter(|i| i % 16 != 0).map(|i| d.ids[i]).collect()
        };
        let want: Vec<u32> =
            documents.iter().enumerate().filter(|(i, _)| *i != 3).flat_map(|(_, d)| of(d)).collect();
        assert_eq!(seen, want);
        // 16 + 16 + (14 + 2) + (12 + 4) + (8 + 5 + 3): full to the last token.
        assert_eq!((rows.count(), rows.padding()), (5, 0.0));
    }

    #[test]
    fn padding_is_alone_and_documents_can_count_alike() {
        let documents = [document(4, 10, 1..4), document(3, 20, 2..3)];
        let rows = Rows::pack(&documents, 8, 7, Average::Document).unwrap();
        let Row { ids, packed: Some((weights, starts)) } = rows.row(0) else { panic!("packed") };
        assert_eq!(ids, [10, 11, 12, 13, 20, 21, 22, 7]);
        assert_eq!(starts, [0, 0, 0, 0, 4, 4, 4, 7]);
        let third = 1.0 / 3.0;
        assert_eq!(weights, [third, third, third, 0.0, 0.0, 1.0, 0.0]);
        assert!((rows.row(0).weight() - 2.0).abs() < 1e-6);
        assert_eq!(rows.padding(), 0.125);
        let rows = Rows::pack(&documents, 8, 7, Average::Token).unwrap();
        assert_eq!(rows.row(0).packed.unwrap().0, [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn a_document_that_was_cut_counts_as_one() {
        // Of 6 tokens to learn, the first of the second piece is never predicted.
        let rows =
            Rows::pack(&[document(8, 10, 2..8), document(3, 30, 1..3)], 4, 7, Average::Document).unwrap();
        let total: f64 = (0..rows.count()).map(|i| rows.row(i).weight()).sum();
        assert!((total - 2.0).abs() < 1e-6, "{total}");
    }

    #[test]
    fn windows_beside_packed_rows_count_by_their_tokens() {
        let ids: Vec<u32> = (0..16).collect();
        let rows = [Row { ids: &ids, packed: None }];
        let device = Device::flex();
        assert!(Batch::new(&rows, 15.0, &device).weights.is_none(), "alone they are a mean");
        let beside = Batch::new(&rows, 12.5, &device);
        assert!(beside.segments.is_none());
        let each = Tensor::<2>::ones([1, 15], &device);
        assert!((beside.mean(each).into_scalar::<f32>() - 15.0 / 12.5).abs() < 1e-6);
    }

    #[test]
    fn nothing_to_learn_is_an_error() {
        let nothing = [document(5, 0, 0..1), document(1, 0, 0..1), Document::default()];
        let error = Rows::pack(&nothing, 4, 0, Average::Token).unwrap_err();
        assert!(matches!(error, TrainError::NothingToLearn), "{error}");
        Rows::pack(&[document(5, 0, 1..2)], 4, 0, Average::Token).unwrap();
        let text = TextData::new(vec![1; 3], 3);
        assert!(matches!(Rows::windows(&text, 4), Err(TrainError::TooShort { .. })));
    }

    #[test]
    fn the_weights_of_a_pass_are_shares() {
        let documents = [document(4, 10, 1..4), document(6, 20, 2..3)];
        let rows = Rows::pack(&documents, 6, 7, Average::Token).unwrap();
        let batch = rows.batch(&[0, 1], &Device::flex());
        let each = Tensor::<2>::ones([2, 5], &Device::flex());
        assert!((batch.mean(each.clone()).into_scalar::<f32>() - 1.0).abs() < 1e-6);
        let plain = Batch { weights: None, ..batch };
        assert_eq!(plain.mean(each).into_scalar::<f32>(), 1.0);
    }
}
