//! Decoding token by token.

use super::Tokenizer;
use crate::ModelError;

/// Text as its tokens come: each step yields what has become certain, cut at UTF-8 boundaries only. The pieces and the
/// [`finish`](DecodeStream::finish) together are what [`Tokenizer::decode`] makes of all ids at once.
///
/// A decoder may look at the neighbours of a token (a leading space, bytes of one character): ids since the last but
/// one piece are decoded together, as text-generation servers do.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// How many of `ids` have been yielded.
    told: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> DecodeStream<'a> {
        DecodeStream { tokenizer, skip_special, ids: Vec::new(), told: 0 }
    }

    /// Takes the next id; some text when there is any to show.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails or takes back text it has given.
    pub fn step(&mut self, id: u32) -> Result<Option<String>, ModelError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // A replacement character at the end may be the first bytes of a character.
        if text.ends_with('\u{fffd}') {
            return Ok(None);
        }
        let piece = self.rest(&text)?;
        if piece.is_some() {
            self.ids.drain(..self.told);
            self.told = self.ids.len();
        }
        Ok(piece)
    }

    /// What is left when no more ids come: bytes of an unfinished character, as U+FFFD.
    ///
    /// # Errors
    /// As [`DecodeStream::step`].
    pub fn finish(self) -> Result<Option<String>, ModelError> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        self.rest(&text)
    }

    fn rest(&self, text: &str) -> Result<Option<String>, ModelError> {
        let told = self.tokenizer.decode(&self.ids[..self.told], self.skip_special)?;
        match text.strip_prefix(&told) {
            Some("") => Ok(None),
            Some(rest) => Ok(Some(rest.to_string())),
            None => Err(ModelError::Tokenizer(format!(
                "decoding changed `{told}` into `{text}` after it was shown"
            ))),
        }
    }
}
