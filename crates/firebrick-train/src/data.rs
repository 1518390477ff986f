//! Text as token ids, cut into windows and drawn in a repeatable order.

use std::path::Path;

use firebrick_core::Seed;
use firebrick_models::tokenizer::Tokenizer;
use rand::seq::SliceRandom;

use crate::{Document, TrainError, read_documents};

/// Token ids of one or more documents, each ended by the tokenizer's end-of-sequence token if it has one.
///
/// A window may span documents (packing without masking, as in GPT-3 pretraining).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextData {
    /// The ids of all documents, in order.
    pub ids: Vec<u32>,
    /// How many bytes of text the ids stand for; 0 if unknown.
    pub bytes: usize,
    /// Where each document ends: in `ids`, and in bytes of text.
    ends: Vec<(usize, usize)>,
}

impl TextData {
    /// One document, already encoded; `bytes` of text, or 0 if unknown.
    pub fn new(ids: Vec<u32>, bytes: usize) -> Self {
        let ends = vec![(ids.len(), bytes)];
        TextData { ids, bytes, ends }
    }

    /// Encodes each document with what the model expects around a text (a begin token, say), and ends it with the
    /// end-of-sequence token.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn from_documents<'a>(
        documents: impl IntoIterator<Item = &'a str>,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TrainError> {
        let end = tokenizer.eos_ids().first().copied();
        Self::encoded(documents, end, &mut |text| Ok(tokenizer.encode(text, true)?))
    }

    /// Encodes `text` as one document.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn from_text(text: &str, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        Self::from_documents([text], tokenizer)
    }

    /// The documents of a file, see [`read_documents`]; what of them is to be learned does not count here.
    ///
    /// # Errors
    /// As [`read_documents`].
    pub fn from_file(path: &Path, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        Ok(Self::from_encoded(&read_documents(path, tokenizer)?))
    }

    /// Documents one after the other, whatever of them is to be learned.
    pub fn from_encoded(documents: &[Document]) -> Self {
        let mut data = TextData::default();
        for document in documents {
            data.ids.extend_from_slice(&document.ids);
            data.bytes += document.bytes;
            data.ends.push((data.ids.len(), data.bytes));
        }
        data
    }

    fn encoded<'a>(
        documents: impl IntoIterator<Item = &'a str>,
        end: Option<u32>,
        encode: &mut dyn FnMut(&str) -> Result<Vec<u32>, TrainError>,
    ) -> Result<Self, TrainError> {
        let mut data = TextData::default();
        for document in documents {
            let ids = encode(document)?;
            let missing = end.filter(|end| ids.last() != Some(end));
            data.ids.extend(ids.into_iter().chain(missing));
            data.bytes += document.len();
            data.ends.push((data.ids.len(), data.bytes));
        }
        Ok(data)
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Non-overlapping windows of `window` tokens; an incomplete last one is left out.
    ///
    /// # Panics
    /// If `window` is 0.
    pub fn windows(&self, window: usize) -> std::slice::ChunksExact<'_, u32> {
        self.ids.chunks_exact(window)
    }

    /// At most `n` of [`TextData::windows`], spread evenly from the first on; a text that does not fill one window is the
    /// only piece.
    ///
    /// # Panics
    /// If `window` is 0.
    pub fn spread(&self, window: usize, n: usize) -> Vec<&[u32]> {
        let mut windows = self.windows(window);
        let all = windows.len();
        if all == 0 {
            return vec![&self.ids; n.min(1)];
        }
        let n = n.min(all);
        let at = |i: usize| i * all / n;
        (0..n)
            .filter_map(|i| windows.nth(at(i) - i.checked_sub(1).map_or(0, |before| at(before) + 1)))
            .collect()
    }

    /// The windows of `texts` in turn, one of each at a time, until one of them has no more; one document, of unknown
    /// bytes.
    ///
    /// # Panics
    /// If `window` is 0.
    pub fn interleave(texts: &[TextData], window: usize) -> TextData {
        let rounds = texts.iter().map(|t| t.ids.len() / window).min().unwrap_or(0);
        let at = |i: usize| i * window..(i + 1) * window;
        let ids = (0..rounds).flat_map(|i| texts.iter().flat_map(move |t| &t.ids[at(i)])).copied().collect();
        TextData::new(ids, 0)
    }

    /// Splits off about the fraction `held_out` of the tokens at the end, as `(train, held_out)`: at the end of a
    /// document if there are several, else at the end of a window (then the bytes are shared out by tokens).
    ///
    /// # Errors
    /// If either part would not fill one window.
    pub fn split(&self, held_out: f64, window: usize) -> Result<(TextData, TextData), TrainError> {
        let target = (self.ids.len() as f64 * (1.0 - held_out.clamp(0.0, 1.0))).round() as usize;
        let (at, bytes, documents) = match &self.ends[..] {
            [first @ .., _] if !first.is_empty() => {
                let nearest = (0..first.len()).min_by_key(|&i| first[i].0.abs_diff(target));
                let i = nearest.expect("not empty");
                (first[i].0, first[i].1, i + 1)
            }
            _ => {
                let at = target - target % window.max(1);
                let share = at as f64 / self.ids.len().max(1) as f64;
                (at, (self.bytes as f64 * share).round() as usize, 0)
            }
        };
        let (head, tail) = self.ids.split_at(at);
        if let Some(short) = [head, tail].into_iter().find(|part| part.len() < window) {
            return Err(TrainError::TooShort { tokens: short.len(), window });
        }
        let part = |ids: &[u32], bytes, ends: Vec<(usize, usize)>| {
            let ends = if ends.is_empty() { vec![(ids.len(), bytes)] } else { ends };
            TextData { ids: ids.to_vec(), bytes, ends }
        };
        let tail_ends = self.ends[documents..].iter().map(|(i, b)| (i - at, b - bytes)).collect();
        Ok((part(head, bytes, self.ends[..documents].to_vec()), part(tail, self.bytes - bytes, tail_ends)))
    }

    /// A digest of the ids, to tell whether a checkpoint was made from this text.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for id in &self.ids {
            hasher.update(&id.to_le_bytes());
        }
        hasher.finalize().to_hex()[..32].to_string()
    }
}

/// Draws batches of windows: every epoch passes all windows once in an order of its own.
///
/// The order of an epoch is a function of the seed and its number, and batch `k` of the seed and `k`, so that a
/// resumed run needs to know only where it was.
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    data: &'a TextData,
    window: usize,
    batch: usize,
    seed: Seed,
    /// The epoch drawn last, and its order.
    order: Option<(usize, Vec<u32>)>,
}

impl<'a> Batches<'a> {
    /// Batches of `batch` windows of `window` tokens.
    ///
    /// # Errors
    /// If `data` does not fill one window.
    ///
    /// # Panics
    /// If `window` or `batch` is 0.
    pub fn new(data: &'a TextData, window: usize, batch: usize, seed: Seed) -> Result<Self, TrainError> {
        assert!(window > 0 && batch > 0, "a batch has windows and a window has tokens");
        match data.windows(window).len() {
            0 => Err(TrainError::TooShort { tokens: data.ids.len(), window }),
            _ => Ok(Batches { data, window, batch, seed, order: None }),
        }
    }

    /// The order in which `epoch` passes the windows, as indices into [`TextData::windows`].
    pub fn order(&mut self, epoch: usize) -> &[u32] {
        if self.order.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let mut order: Vec<u32> = (0..self.data.windows(self.window).len() as u32).collect();
            order.shuffle(&mut self.seed.stream(&format!("sampler/epoch.{epoch}")));
            self.order = Some((epoch, order));
        }
        &self.order.as_ref().expect("just drawn").1
    }

    /// The windows of batch `k`, counted from 0 over all epochs; a batch at the end of an epoch goes on in the next.
    pub fn batch(&mut self, k: usize) -> Vec<&'a [u32]> {
        let data = self.data;
        let windows = data.windows(self.window).len();
        (k * self.batch..(k + 1) * self.batch)
            .map(|at| {
                let index = self.order(at / windows)[at % windows] as usize;
                &data.ids[index * self.window..][..self.window]
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_models::tokenizer::train_bpe;

    fn bytes(documents: &[&str]) -> TextData {
        let mut encode = |text: &str| Ok(text.bytes().map(u32::from).collect());
        TextData::encoded(documents.iter().copied(), Some(999), &mut encode).unwrap()
    }

    #[test]
    fn documents_are_ended_and_counted() {
        let data = bytes(&["abc", "", "de"]);
        assert_eq!(data.ids, [97, 98, 99, 999, 999, 100, 101, 999]);
        assert_eq!((data.bytes, data.documents()), (5, 3));
        assert_eq!(data.windows(3).collect::<Vec<_>>(), [[97, 98, 99], [999, 999, 100]]);
        assert_ne!(data.digest(), bytes(&["abc", "de"]).digest());
    }

    #[test]
    fn a_tokenizer_encodes_documents_and_files() {
        let tokenizer = train_bpe(["one two, one two"], 259).unwrap();
        let end = tokenizer.eos_ids()[0];
        let data = TextData::from_documents(["one", "two"], &tokenizer).unwrap();
        assert_eq!((data.ids.len(), data.bytes, data.documents()), (8, 6, 2));
        assert_eq!((data.ids[3], data.ids[7]), (end, end));
        assert_eq!(tokenizer.decode(&data.ids, true).unwrap(), "onetwo");
        let text = TextData::from_text("one<|endoftext|>", &tokenizer).unwrap();
        assert_eq!(text.ids, data.ids[..4], "an end that is there already is not doubled");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one").unwrap();
        assert_eq!(TextData::from_file(file.path(), &tokenizer).unwrap().ids, data.ids[..4]);
    }

    #[test]
    fn a_split_cuts_at_the_nearest_document() {
        let data = bytes(&["aaaa", "bbbb", "cccc", "dd"]);
        let (train, held) = data.split(0.4, 2).unwrap();
        assert_eq!((train.ids.len(), held.ids.len()), (10, 8));
        assert_eq!((train.bytes, held.bytes), (8, 6));
        assert_eq!([train.ids, held.ids].concat(), data.ids);
        assert!(matches!(data.split(0.1, 4), Err(TrainError::TooShort { tokens: 3, window: 4 })));
    }

    #[test]
    fn a_split_of_one_document_cuts_at_a_window() {
        let data = TextData::new((0..100).collect(), 200);
        let (train, held) = data.split(0.25, 10).unwrap();
        assert_eq!((train.ids.len(), train.bytes, held.ids.len(), held.bytes), (70, 140, 30, 60));
        assert_eq!(held.ids[0], 70);
        assert!(matches!(data.split(0.0, 10), Err(TrainError::TooShort { tokens: 0, .. })));
        assert!(matches!(TextData::default().split(0.5, 1), Err(TrainError::TooShort { .. })));
    }

    #[test]
    fn windows_are_spread_over_the_text() {
        let data = TextData::new((0..23).collect(), 0);
        let first = |n| data.spread(2, n).iter().map(|w| w[0]).collect::<Vec<_>>();
        assert_eq!(first(4), [0, 4, 10, 16]);
        assert_eq!(first(1), [0]);
        assert_eq!(first(99), (0..11).map(|i| 2 * i).collect::<Vec<_>>());
        assert!(first(0).is_empty() && data.spread(2, 99).iter().all(|w| w.len() == 2));
        assert_eq!(data.spread(24, 3), [&data.ids[..]]);
    }

    #[test]
    fn texts_take_turns() {
        let (a, b) = (TextData::new((0..7).collect(), 7), TextData::new((10..15).collect(), 5));
        assert_eq!(TextData::interleave(&[a.clone(), b], 2).ids, [0, 1, 10, 11, 2, 3, 12, 13]);
        assert_eq!(TextData::interleave(&[a], 3).ids, [0, 1, 2, 3, 4, 5]);
        assert!(TextData::interleave(&[], 3).ids.is_empty());
    }

    #[test]
    fn every_epoch_passes_every_window_once_in_its_own_order() {
        let data = TextData::new((0..77).collect(), 0);
        let mut batches = Batches::new(&data, 7, 3, Seed(4)).unwrap();
        let (first, second) = (batches.order(0).to_vec(), batches.order(1).to_vec());
        assert_ne!(first, second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..11).collect::<Vec<u32>>());
        }
        let drawn: Vec<u32> = (0..11).flat_map(|k| batches.batch(k)).map(|w| w[0] / 7).collect();
        let mut counts = [0; 11];
        drawn.iter().for_each(|&w| counts[w as usize] += 1);
        assert_eq!(counts, [3; 11], "11 batches of 3 are 3 epochs of 11");
    }

    #[test]
    fn a_batch_depends_on_seed_and_number_alone() {
        let data = TextData::new((0..200).collect(), 0);
        let batches = |seed| Batches::new(&data, 10, 4, Seed(seed)).unwrap();
        let mut forward = batches(1);
        let all: Vec<_> = (0..12).map(|k| forward.batch(k)).collect();
        for k in [11, 3, 7, 0] {
            assert_eq!(batches(1).batch(k), all[k]);
        }
        assert_ne!(batches(2).batch(0), all[0]);
    }

    #[test]
    fn too_little_text_is_an_error() {
        let data = TextData::new(vec![1, 2, 3], 3);
        let error = Batches::new(&data, 4, 1, Seed(0)).unwrap_err();
        assert_eq!(error.to_string(), "3 tokens do not fill one window of 4");
    }
}
