//! Texts in, vectors out.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, Progress, Run, Task};

use super::{Encoder, EncoderFiles, Padding, Pooling, SentenceConfig, normalize, pool};
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use crate::tokens::token_tensor;

/// An encoder on a device, ready to run.
#[derive(Debug)]
pub struct EncoderModel {
    /// What to call it in reports and file names.
    pub name: String,
    /// The wiring with its weights, as constants.
    pub encoder: Encoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// How a text becomes a vector.
    pub sentence: SentenceConfig,
}

/// How much [`EncoderModel::embed`] does at a time, and what it does otherwise than the model says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedOptions {
    /// Texts in a batch, at most.
    pub batch: usize,
    /// Another pooling than the model's.
    pub pooling: Option<Pooling>,
    /// Whether vectors are brought to length 1, if not as the model says.
    pub normalize: Option<bool>,
}

impl Default for EmbedOptions {
    fn default() -> Self {
        EmbedOptions { batch: 32, pooling: None, normalize: None }
    }
}

impl EncoderModel {
    /// Opens and loads a Hugging Face folder.
    ///
    /// # Errors
    /// As [`EncoderFiles::open`] and [`Encoder::load`].
    pub fn open(path: &Path, device: &Device) -> Result<Self, ModelError> {
        EncoderFiles::open(path)?.load(device)
    }

    /// The longest text in tokens, special tokens included.
    pub fn max_tokens(&self) -> usize {
        let positions = self.encoder.config().max_tokens;
        self.sentence.max_tokens.map_or(positions, |n| n.min(positions))
    }

    /// The ids of `text` with what the model expects around it, cut off where it is longer than [`EncoderModel::max_tokens`]: as
    /// many tokens of the text as fit, and the special ones.
    ///
    /// # Errors
    /// If the tokenizer fails, or gives no ids for a text.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let fail = |what: &str| ModelError::Tokenizer(what.into());
        let (limit, ids) = (self.max_tokens(), self.tokenizer.encode(text, true)?);
        if ids.is_empty() {
            return Err(fail("a text without tokens"));
        }
        if ids.len() <= limit {
            return Ok(ids);
        }
        let bare = self.tokenizer.encode(text, false)?;
        let special = ids.len().checked_sub(bare.len()).filter(|n| *n <= limit);
        let special = special.ok_or_else(|| fail("more special tokens than the model has positions"))?;
        let begin = (0..=special).find(|begin| ids[*begin..].starts_with(&bare));
        let begin = begin.ok_or_else(|| fail("a text's tokens change with the special ones around it"))?;
        let mut kept = ids[..begin + limit - special].to_vec();
        kept.extend(&ids[begin + bare.len()..]);
        Ok(kept)
    }

    /// One vector of `d_model` values a text, in the order of `texts`, through `bricks`.
    ///
    /// Texts are sorted by length and batched with their neighbours, so that little is filled up; what is filled up changes
    /// no vector but for rounding.
    ///
    /// # Errors
    /// If a text cannot be tokenized, the backend fails, or `progress` cancels.
    pub fn embed(
        &self,
        texts: &[&str],
        bricks: &[&dyn Brick],
        options: &EmbedOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let ids = texts.iter().map(|text| self.tokens(text)).collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|i| ids[*i].len());
        let mut vectors = vec![Vec::new(); texts.len()];
        let mut task = Task::begin(progress, "embed", Some(texts.len() as u64), "texts");
        for batch in order.chunks(options.batch.max(1)) {
            let batch_ids: Vec<&[u32]> = batch.iter().map(|i| ids[*i].as_slice()).collect();
            let found = self.embed_ids(&batch_ids, bricks, options);
            let d = found.dims()[1];
            let values = found.into_data().try_into_vec_as::<f32>();
            let values = values.map_err(|e| ModelError::Backend(format!("{e:?}")))?;
            for (i, vector) in batch.iter().zip(values.chunks(d)) {
                vectors[*i] = vector.to_vec();
            }
            task.advance(batch.len() as u64, "").map_err(|e| ModelError::Stream(e.into()))?;
        }
        Ok(vectors)
    }

    /// One vector a text, `[texts, d_model]`, of texts that are ids already: one pass, on the tape if the device has one.
    ///
    /// # Panics
    /// If there is no text, one is empty, or one is longer than the model has positions.
    pub fn embed_ids(&self, texts: &[&[u32]], bricks: &[&dyn Brick], options: &EmbedOptions) -> Tensor<2> {
        let lengths: Vec<usize> = texts.iter().map(|ids| ids.len()).collect();
        let longest = *lengths.iter().max().expect("a text");
        let pad = self.tokenizer.pad_id().unwrap_or(0);
        let filled = |ids: &&[u32]| [*ids, vec![pad; longest - ids.len()].as_slice()].concat();
        let rows: Vec<Vec<u32>> = texts.iter().map(filled).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let padding = Padding::new(lengths);
        let mut run = Run::new(bricks);
        // Without padding there is nothing to leave out.
        if padding.lengths().iter().any(|n| *n < longest) {
            run.insert(padding);
        }
        let hidden = self.encoder.hidden(token_tensor(&rows, &self.encoder.device()), &mut run);
        let pooling = options.pooling.unwrap_or(self.sentence.pooling);
        let pooled = pool(hidden, run.get::<Padding>(), pooling);
        if options.normalize.unwrap_or(self.sentence.normalize) { normalize(pooled) } else { pooled }
    }
}
