//! What a model's tokenizer cuts the tokens of a donor into.

use std::collections::HashMap;

use firebrick_models::ModelError;
use firebrick_models::token_alignment::token_bytes;
use firebrick_models::tokenizer::Tokenizer;

pub(super) struct Pieces<'a> {
    own: &'a Tokenizer,
    own_bytes: Vec<Vec<u8>>,
    by_bytes: HashMap<Vec<u8>, u32>,
    donor_bytes: Vec<Vec<u8>>,
}

impl<'a> Pieces<'a> {
    pub fn new(own: &'a Tokenizer, donor: &Tokenizer) -> Self {
        let own_bytes = token_bytes(own);
        // Of tokens with the same bytes the last: SentencePiece has `<0x41>` before `A`.
        let by_bytes = own_bytes.iter().cloned().zip(0u32..).collect();
        Pieces { own, own_bytes, by_bytes, donor_bytes: token_bytes(donor) }
    }

    /// The model's ids for a token of the donor; none where the model can't spell it.
    pub fn of(&self, id: u32) -> Result<Vec<u32>, ModelError> {
        let bytes = &self.donor_bytes[id as usize];
        match std::str::from_utf8(bytes) {
            Ok(text) => self.cut(text),
            // A part of a character.
            Err(_) => Ok(bytes.iter().filter_map(|b| self.by_bytes.get(&[*b][..]).copied()).collect()),
        }
    }

    /// The ids of a text that need not begin a word, though some tokenizers put a space in front of every text.
    fn cut(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut ids = self.own.encode(text, false)?;
        let whole = |ids: &[u32]| ids.iter().flat_map(|id| self.bytes(*id)).copied().collect::<Vec<u8>>();
        if whole(&ids) == text.as_bytes() {
            return Ok(ids);
        }
        if let Some(rest) = text.strip_prefix(' ') {
            let marked = self.own.encode(rest, false)?;
            return Ok(if whole(&marked) == text.as_bytes() { marked } else { ids });
        }
        if whole(&ids).strip_prefix(b" ") == Some(text.as_bytes())
            && let Some(first) = ids.first().copied()
        {
            match self.bytes(first) {
                b" " => drop(ids.remove(0)),
                marked => {
                    ids[0] =
                        marked.get(1..).and_then(|bare| self.by_bytes.get(bare)).copied().unwrap_or(first)
                }
            }
        }
        Ok(ids)
    }

    fn bytes(&self, id: u32) -> &[u8] {
        self.own_bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }
}
