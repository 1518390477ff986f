//! Training a byte-level BPE vocabulary (Sennrich et al. 2016, arXiv 1508.07909; bytes as GPT-2 spells them).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

use serde_json::{Map, Value as Json, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

use super::gguf::byte_level_json;
use super::{Kept, Special, Tokenizer, build};
use crate::ModelError;
use crate::chat::CHATML;

/// The special tokens of trained vocabularies, with ids 0, 1 and 2: end of text, and the marks of ChatML.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The name of the pre-tokenizer in GGUF files: single digits, then GPT-2's words.
const PRE: &str = "smollm";

/// Trains a byte-level BPE of exactly `vocab_size` tokens: [`SPECIAL_TOKENS`], the 256 bytes, then merges of the most
/// frequent pair, the lower ids first among equals. Digits stay single and words follow GPT-2's pattern, as in
/// SmolLM2. Special tokens in the texts separate them. The same texts give the same tokenizer.
///
/// The tokenizer ends texts with `<|endoftext|>` and turns with `<|im_end|>`, adds nothing by itself, and has the ChatML
/// template.
///
/// # Errors
/// [`ModelError::Tokenizer`] when `vocab_size` is below 259, or the texts have too few pairs that occur twice.
pub fn train_bpe<'a>(
    texts: impl IntoIterator<Item = &'a str>,
    vocab_size: usize,
) -> Result<Tokenizer, ModelError> {
    let fixed = SPECIAL_TOKENS.len() + 256;
    if vocab_size < fixed {
        return Err(ModelError::Tokenizer(format!(
            "a vocabulary of {vocab_size} can't hold {fixed} special tokens and bytes"
        )));
    }
    let mut tokens: Vec<String> = SPECIAL_TOKENS.map(String::from).to_vec();
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    tokens.extend(alphabet.iter().map(char::to_string));
    let ids: HashMap<char, u32> =
        alphabet.iter().zip(SPECIAL_TOKENS.len() as u32..).map(|(&c, id)| (c, id)).collect();

    let words = count_words(texts)?;
    let words: Vec<Word> = words
        .iter()
        .map(|(word, &count)| Word { ids: word.chars().map(|c| ids[&c]).collect(), count })
        .collect();
    let merges = merge_pairs(words, &mut tokens, vocab_size);
    if tokens.len() < vocab_size {
        let text = format!("the texts have repeated pairs for {} of {vocab_size} tokens only", tokens.len());
        return Err(ModelError::Tokenizer(text));
    }

    let vocab: Map<String, Json> =
        tokens.into_iter().zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let types = vec![3; SPECIAL_TOKENS.len()];
    let inner = build(byte_level_json(PRE, vocab, merges, &types)?, "trained vocabulary")?;
    let special = Special { bos: Some(0), eos: vec![0, 2], pad: Some(0), unk: Some(0), ..Special::default() };
    let kept = Kept { pre: Some(PRE.into()), ..Kept::default() };
    Ok(Tokenizer::assemble(inner, special, Some(CHATML.into()), kept))
}

struct Word {
    ids: Vec<u32>,
    count: u64,
}

/// How often each word (spelled in byte characters) occurs.
fn count_words<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<BTreeMap<String, u64>, ModelError> {
    let fail = |e: &dyn std::fmt::Display| ModelError::Tokenizer(e.to_string());
    let pre: PreTokenizerWrapper =
        serde_json::from_value(super::gguf::pre_tokenizer_json(PRE)?).map_err(|e| fail(&e))?;
    let mut words: BTreeMap<String, u64> = BTreeMap::new();
    for text in texts {
        let mut parts = vec![text];
        for special in SPECIAL_TOKENS {
            parts = parts.into_iter().flat_map(|part| part.split(special)).collect();
        }
        for part in parts {
            let mut pieces = PreTokenizedString::from(part);
            pre.pre_tokenize(&mut pieces).map_err(|e| fail(&e))?;
            for (word, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
                match words.get_mut(word) {
                    Some(count) => *count += 1,
                    None => drop(words.insert(word.to_string(), 1)),
                }
            }
        }
    }
    Ok(words)
}

/// Merges the most frequent pair until there are `vocab_size` tokens or no pair occurs twice; the pairs in order.
fn merge_pairs(mut words: Vec<Word>, tokens: &mut Vec<String>, vocab_size: usize) -> Vec<Json> {
    let mut known: HashMap<String, u32> = tokens.iter().cloned().zip(0u32..).collect();
    let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
    let mut places: HashMap<(u32, u32), Vec<usize>> = HashMap::new();
    for (index, word) in words.iter().enumerate() {
        for pair in pairs(&word.ids) {
            *counts.entry(pair).or_default() += word.count;
            places.entry(pair).or_default().push(index);
        }
    }
    let mut queue: BinaryHeap<(u64, Reverse<(u32, u32)>)> =
        counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
    let mut merges = Vec::new();
    let mut done: HashSet<(u32, u32)> = HashSet::new();
    while tokens.len() < vocab_size {
        let Some((count, Reverse(pair))) = queue.pop() else { break };
        // Entries are not updated in place: each change pushed the count of its time.
        if counts.get(&pair) != Some(&count) {
            continue;
        }
        if count < 2 {
            break;
        }
        let made = format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]);
        // A pair can come back when its halves arise in another way; its first rank counts.
        if done.insert(pair) {
            merges.push(json!([tokens[pair.0 as usize], tokens[pair.1 as usize]]));
        }
        let id = *known.entry(made.clone()).or_insert_with(|| {
            tokens.push(made);
            tokens.len() as u32 - 1
        });
        let mut changed: Vec<(u32, u32)> = Vec::new();
        let mut indices = places.remove(&pair).unwrap_or_default();
        indices.sort_unstable();
        indices.dedup();
        for index in indices {
            let word = &mut words[index];
            for old in pairs(&word.ids) {
                if let Some(count) = counts.get_mut(&old) {
                    *count -= word.count;
                }
                changed.push(old);
            }
            word.ids = merged(&word.ids, pair, id);
            for new in pairs(&word.ids) {
                *counts.entry(new).or_default() += word.count;
                if new.0 == id || new.1 == id {
                    places.entry(new).or_default().push(index);
                }
                changed.push(new);
            }
        }
        counts.remove(&pair);
        changed.sort_unstable();
        changed.dedup();
        for pair in changed {
            if let Some(&count) = counts.get(&pair).filter(|count| **count > 0) {
                queue.push((count, Reverse(pair)));
            }
        }
    }
    merges
}

fn pairs(ids: &[u32]) -> impl Iterator<Item = (u32, u32)> + '_ {
    ids.windows(2).map(|w| (w[0], w[1]))
}

/// `ids` with every `pair`, from left to right, replaced by `id`.
fn merged(ids: &[u32], pair: (u32, u32), id: u32) -> Vec<u32> {
    let mut out = Vec::with_capacity(ids.len());
    let mut rest = ids;
    while let [first, tail @ ..] = rest {
        if *first == pair.0 && tail.first() == Some(&pair.1) {
            out.push(id);
            rest = &tail[1..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
    use tokenizers::{AddedToken, Trainer};

    use super::*;

    const TEXT: &str = "the cat sat on the mat, the rat sat on the cat; 12 cats and 120 rats don't chat.\n\tthat hat, that mat: \
        the hatter's chatter mattered. Le café était là, là où était le thé. 東京東京";

    #[test]
    fn merges_are_those_of_the_tokenizers_crate() {
        let size = 259 + 30;
        let ours = train_bpe([TEXT], size).unwrap();
        let special: Vec<AddedToken> = SPECIAL_TOKENS.iter().map(|t| AddedToken::from(*t, true)).collect();
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(special)
            .initial_alphabet(
                tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect(),
            )
            .build();
        let words = count_words([TEXT]).unwrap();
        let list: Vec<&str> = words
            .iter()
            .flat_map(|(word, &count)| std::iter::repeat_n(word.as_str(), count as usize))
            .collect();
        trainer.feed(list.into_iter(), |word| Ok(vec![word.to_string()])).unwrap();
        let mut theirs = BPE::default();
        trainer.train(&mut theirs).unwrap();
        let theirs = serde_json::to_value(&theirs).unwrap();
        let ours = serde_json::to_value(&ours.inner).unwrap();
        assert_eq!(ours["model"]["merges"], theirs["merges"]);
        assert_eq!(ours["model"]["vocab"], theirs["vocab"]);
        assert_eq!(ours["model"]["merges"].as_array().unwrap().len(), 30);
    }

    #[test]
    fn repeats_merge_from_the_left() {
        assert_eq!(merged(&[7, 7, 7, 1, 7, 7], (7, 7), 9), [9, 7, 1, 9]);
        let word = |ids: &[u32], count| Word { ids: ids.to_vec(), count };
        let mut tokens: Vec<String> = ["a", "b"].map(String::from).to_vec();
        // aaaa twice: (a, a) six times, then aa aa twice; ab once is too rare.
        let merges = merge_pairs(vec![word(&[0, 0, 0, 0], 2), word(&[0, 1], 1)], &mut tokens, 10);
        assert_eq!(merges, [json!(["a", "a"]), json!(["aa", "aa"])]);
        assert_eq!(tokens, ["a", "b", "aa", "aaaa"]);
    }

    #[test]
    fn sizes_are_exact_or_an_error() {
        assert_eq!(train_bpe([TEXT], 270).unwrap().vocab_size(), 270);
        assert_eq!(train_bpe([], 259).unwrap().vocab_size(), 259);
        assert!(train_bpe([TEXT], 258).is_err());
        assert!(train_bpe([TEXT], 5000).unwrap_err().to_string().contains("repeated pairs"));
    }

    #[test]
    fn special_tokens_separate_texts() {
        let words = count_words(["ab<|endoftext|>cd<|im_start|>x 10"]).unwrap();
        let words: Vec<&str> = words.keys().map(String::as_str).collect();
        assert_eq!(words, ["0", "1", "ab", "cd", "x", "Ġ"]);
    }
}
