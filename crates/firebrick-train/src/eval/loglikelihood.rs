//! Log-likelihoods of continuations of a context, with what sequences share computed once.

use burn::module::Module;
use firebrick_core::{Brick, Progress, Run, Task};
use firebrick_models::Decoder;
use firebrick_models::tokenizer::Tokenizer;
use firebrick_tensor::ops::KvCache;

use super::score::{check_ids, nats_at, padded};
use crate::TrainError;

/// A context and the texts that may follow it, as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is given; at least one token.
    pub context: Vec<u32>,
    /// What is scored, each at least one token.
    pub continuations: Vec<Vec<u32>>,
}

/// How sequences go through the model together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Most tokens of a sequence that the model sees; longer ones lose their beginning.
    pub longest: usize,
    /// Most tokens in a batch, filling included, unless a single request has more.
    pub tokens: usize,
}

impl Request {
    /// Encodes a context and its continuations as lm-evaluation-harness does (`_encode_pair`).
    ///
    /// White space at the end of the context goes to the continuations, since tokenizers join it with the word after
    /// it; a continuation is what the tokens of both together have after the number of tokens of the context. An empty context is the token
    /// that begins a text, or the one that ends it where there is none such. `special` adds what the model expects around a text, as the
    /// harness's `add_bos_token`.
    ///
    /// # Errors
    /// If the tokenizer fails, a continuation has no token of its own, or the context is empty and the tokenizer has
    /// neither token.
    pub fn encode<S: AsRef<str>>(
        tokenizer: &Tokenizer,
        context: &str,
        continuations: &[S],
        special: bool,
    ) -> Result<Self, TrainError> {
        let (head, spaces) = context.split_at(python_rstrip(context).len());
        let prefix = || tokenizer.bos_id().or(tokenizer.eos_ids().first().copied());
        let given = match head {
            "" => vec![prefix().ok_or(TrainError::NoContext)?],
            _ => tokenizer.encode(head, special)?,
        };
        let continuation = |text: &S| {
            let text = text.as_ref();
            let mut ids = tokenizer.encode(&[head, spaces, text].concat(), special && !head.is_empty())?;
            match head {
                "" if ids.first() == given.first() => drop(ids.remove(0)),
                "" => {}
                _ => drop(ids.drain(..given.len().min(ids.len()))),
            }
            match ids.is_empty() {
                true => Err(TrainError::NoContinuation { text: text.to_string() }),
                false => Ok(ids),
            }
        };
        let continuations = continuations.iter().map(continuation).collect::<Result<_, _>>()?;
        Ok(Request { context: given, continuations })
    }

    /// Tokens that scoring one continuation after the other takes.
    pub fn tokens(&self) -> usize {
        self.continuations.iter().map(|c| self.context.len() + c.len() - 1).sum()
    }
}

/// `text` without white space at the end, as Python's `str.rstrip` has it: the four separators of ASCII are space too.
fn python_rstrip(text: &str) -> &str {
    text.trim_end_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}

/// The log-likelihood in nats of each continuation of each request, summed over its tokens in `f64`.
///
/// What the continuations of a request share goes through the model once and is kept as keys and values; so is what the
/// contexts of a batch begin with (the examples of a few-shot prompt). Requests of about the same length go together, and
/// continuations that differ in their last token alone are one row. The answers are in the order of the requests and do not
/// depend on the batches but for rounding.
///
/// # Errors
/// If a request has no context or an empty continuation, an id has no embedding, a continuation is longer than the model may see, a
/// brick is trainable (pass `bricks.valid()`), the device fails, or the run is cancelled.
///
/// # Panics
/// If `batching` allows no token.
pub fn loglikelihoods(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    requests: &[Request],
    batching: Batching,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f64>>, TrainError> {
    assert!(batching.longest > 0 && batching.tokens > 0, "a batch has tokens");
    check_ids(
        requests.iter().flat_map(|r| r.context.iter().chain(r.continuations.iter().flatten())),
        decoder,
    )?;
    let mut items = Vec::with_capacity(requests.len());
    for (index, request) in requests.iter().enumerate() {
        items.push(Item::new(index, request, batching.longest)?);
    }
    items.sort_by_key(|i| (i.stem, i.longest, i.index));
    let decoder = decoder.valid();
    let mut scorer = Scorer { decoder: &decoder, bricks, trunk: None };
    let mut task = Task::begin(progress, "score", Some(requests.len() as u64), "items");
    let mut found: Vec<Vec<f64>> = requests.iter().map(|r| vec![0.0; r.continuations.len()]).collect();
    let mut rest = &items[..];
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(batch_size(rest, batching.tokens));
        for (item, sums) in batch.iter().zip(scorer.score(batch)?) {
            found[item.index] = sums;
        }
        task.advance(batch.len() as u64, "")?;
        rest = later;
    }
    Ok(found)
}

/// The sequences of a request.
struct Item {
    /// Which request.
    index: usize,
    /// The ids of each sequence, and where its continuation begins (at 1 or later).
    rows: Vec<(Vec<u32>, usize)>,
    /// Leading tokens that all rows share and that predict nothing that is scored.
    stem: usize,
    /// Tokens that the longest row feeds to the model.
    longest: usize,
}

impl Item {
    fn new(index: usize, request: &Request, longest: usize) -> Result<Self, TrainError> {
        let row = |continuation: &Vec<u32>| {
            if continuation.len() > longest {
                return Err(TrainError::TooLong { tokens: continuation.len(), longest });
            }
            if request.context.is_empty() || continuation.is_empty() {
                return Err(TrainError::EmptyRequest { index });
            }
            let whole = request.context.len() + continuation.len();
            // The last token is not fed.
            let cut = whole.saturating_sub(longest + 1);
            let ids: Vec<u32> = request.context.iter().chain(continuation).skip(cut).copied().collect();
            Ok((ids, request.context.len() - cut))
        };
        let rows = request.continuations.iter().map(row).collect::<Result<Vec<_>, _>>()?;
        let stem = rows.iter().map(|(ids, first)| common(&rows[0].0, ids).min(first - 1)).min();
        let longest = rows.iter().map(|(ids, _)| ids.len() - 1).max();
        Ok(Item { index, rows, stem: stem.unwrap_or(0), longest: longest.unwrap_or(0) })
    }
}

/// How many leading tokens two sequences share.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How many of the first `items`, which are sorted by stem, go through the model together.
fn batch_size(items: &[Item], tokens: usize) -> usize {
    let shortest = items[0].stem;
    let (mut rows, mut longest) = (0, 0);
    for (i, item) in items.iter().enumerate() {
        rows += item.rows.len();
        longest = longest.max(item.longest);
        // What a stem has beyond the shortest is computed for each of its rows.
        let far = item.stem > shortest + shortest / 4 + 4;
        if i > 0 && (rows * longest > tokens || far) {
            return i;
        }
    }
    items.len()
}

/// Beginnings shorter than this are not worth a pass of their own.
const TRUNK: usize = 16;

struct Scorer<'a> {
    decoder: &'a Decoder,
    bricks: &'a [&'a dyn Brick],
    /// What an earlier batch began with: ids, and keys and values of one sequence.
    trunk: Option<(Vec<u32>, KvCache)>,
}

/// A row of the last pass: the tokens after the stem, of a request in the batch.
struct Leaf<'a> {
    item: usize,
    fed: &'a [u32],
}

impl Scorer<'_> {
    /// The log-likelihoods of the rows of each item of a batch.
    fn score(&mut self, batch: &[Item]) -> Result<Vec<Vec<f64>>, TrainError> {
        let several = batch.iter().any(|i| i.rows.len() > 1);
        let stems: Vec<&[u32]> =
            batch.iter().map(|i| i.rows.first().map_or(&[][..], |r| &r.0[..batch[0].stem])).collect();
        let shared = stems.iter().map(|s| common(stems[0], s)).min().unwrap_or(0);
        let mut held = self.trunk(&stems[0][..shared]);
        // Rows of their own gain nothing from a pass before the last.
        let stem = if several { batch[0].stem } else { held.as_ref().map_or(0, |(n, _)| *n) };
        let mut of_item: Vec<usize> = vec![0; batch.len()];
        let begun = held.as_ref().map_or(0, |(n, _)| *n);
        if begun < stem {
            let cache = match held {
                Some((_, cache)) => cache.select(&of_item, stem),
                None => self.decoder.kv_cache(batch.len(), stem),
            };
            let fed: Vec<&[u32]> = stems.iter().map(|s| &s[begun..]).collect();
            held = Some((stem, self.feed(&fed, cache)));
            of_item = (0..batch.len()).collect();
        }

        let (leaves, places) = leaves(batch, stem);
        let mut run = Run::new(self.bricks);
        if let Some((_, cache)) = held {
            let rows: Vec<usize> = leaves.iter().map(|l| of_item[l.item]).collect();
            let longest = leaves.iter().map(|l| l.fed.len()).max().unwrap_or(0);
            run.insert(cache.select(&rows, stem + longest));
        }
        let fed: Vec<&[u32]> = leaves.iter().map(|l| l.fed).collect();
        let hidden = self.decoder.hidden(padded(&fed, &self.decoder.device()), &mut run);
        let (mut at, mut targets) = (Vec::new(), Vec::new());
        let rows = || batch.iter().flat_map(|i| &i.rows);
        for ((ids, first), &leaf) in rows().zip(&places) {
            at.extend((*first..ids.len()).map(|j| (leaf, j - 1 - stem)));
            targets.extend_from_slice(&ids[*first..]);
        }
        let mut nats = nats_at(self.decoder, hidden, &at, &targets, &mut run)?.into_iter();
        let mut sum = |(ids, first): &(Vec<u32>, usize)| -nats.by_ref().take(ids.len() - first).sum::<f64>();
        Ok(batch.iter().map(|i| i.rows.iter().map(&mut sum).collect()).collect())
    }

    /// Keys and values of what a batch begins with, and of how many tokens: of those that the batch before began with too, if
    /// they are at least half.
    fn trunk(&mut self, shared: &[u32]) -> Option<(usize, KvCache)> {
        if shared.len() < TRUNK {
            return None;
        }
        let held = self.trunk.as_ref().map_or(0, |(ids, _)| common(ids, shared));
        if 2 * held < shared.len() {
            let cache = self.feed(&[shared], self.decoder.kv_cache(1, shared.len()));
            self.trunk = Some((shared.to_vec(), cache));
        }
        let (ids, mut cache) = self.trunk.clone()?;
        let held = common(&ids, shared);
        cache.truncate(held);
        Some((held, cache))
    }

    /// Feeds tokens after those that `cache` holds.
    fn feed(&self, rows: &[&[u32]], cache: KvCache) -> KvCache {
        let mut run = Run::new(self.bricks);
        run.insert(cache);
        self.decoder.hidden(padded(rows, &self.decoder.device()), &mut run);
        run.take().expect("nothing takes the cache out of a run")
    }
}

/// The rows to feed after the stems, and which of them holds each row of the batch.
fn leaves(batch: &[Item], stem: usize) -> (Vec<Leaf<'_>>, Vec<usize>) {
    let (mut leaves, mut places): (Vec<Leaf<'_>>, Vec<usize>) = (Vec::new(), Vec::new());
    for (item, rows) in batch.iter().enumerate() {
        let begin = leaves.len();
        let fed: Vec<&[u32]> = rows.rows.iter().map(|(ids, _)| &ids[stem..ids.len() - 1]).collect();
        let mut longest_first: Vec<usize> = (0..fed.len()).collect();
        longest_first.sort_by_key(|&i| std::cmp::Reverse(fed[i].len()));
        let mut place = vec![0; fed.len()];
        for i in longest_first {
            let held = leaves[begin..].iter().position(|l| l.fed.starts_with(fed[i]));
            place[i] = begin + held.unwrap_or(leaves.len() - begin);
            if held.is_none() {
                leaves.push(Leaf { item, fed: fed[i] });
            }
        }
        places.extend(place);
    }
    (leaves, places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_models::ModelFiles;
    use firebrick_models::tokenizer::train_bpe;

    fn item(context: &[u32], continuations: &[&[u32]], longest: usize) -> Item {
        let continuations = continuations.iter().map(|c| c.to_vec()).collect();
        Item::new(0, &Request { context: context.to_vec(), continuations }, longest).unwrap()
    }

    #[test]
    fn white_space_moves_to_the_continuation() {
        let tokenizer = ModelFiles::embedded().unwrap().tokenizer;
        let encode = |context: &str, text: &str| {
            let r = Request::encode(&tokenizer, context, &[text], false).unwrap();
            (r.context, r.continuations[0].clone())
        };
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        let (context, continuation) = encode("In the beginning was the", " word");
        assert_eq!((&context, &continuation), (&ids("In the beginning was the"), &ids(" word")));
        assert_eq!(encode("In the beginning was the ", "word"), (context.clone(), continuation.clone()));
        // The control: cut naively, the space is a token of the context and the word another token.
        assert_ne!(
            [ids("In the beginning was the "), ids("word")].concat(),
            [context, continuation].concat()
        );
        let end = tokenizer.bos_id().unwrap_or(tokenizer.eos_ids()[0]);
        assert_eq!(encode("", "word"), (vec![end], ids("word")));
        assert_eq!(encode(" \n", "word"), (vec![end], ids(" \nword")));
    }

    #[test]
    fn a_continuation_without_a_token_of_its_own_is_refused() {
        let tokenizer = train_bpe(["abab abab abab"], 260).unwrap();
        assert_eq!(tokenizer.encode("ab", false).unwrap().len(), 1, "the tokenizer joins the two");
        let error = Request::encode(&tokenizer, "a", &["b"], false).unwrap_err();
        assert!(matches!(&error, TrainError::NoContinuation { text } if text == "b"), "{error}");
        assert!(Request::encode(&tokenizer, "x", &["b"], false).is_ok());
        assert!(Request::encode(&tokenizer, "", &[""], false).is_err());
    }

    #[test]
    fn python_counts_four_separators_as_space() {
        assert_eq!(python_rstrip("a\u{1f} \u{85}\u{a0}\n"), "a");
        assert_eq!(python_rstrip("a\u{200b}"), "a\u{200b}");
    }

    #[test]
    fn stems_leave_the_token_that_predicts() {
        let i = item(&[1, 2, 3, 4], &[&[5], &[5, 6], &[7]], 99);
        assert_eq!((i.stem, i.longest), (3, 5));
        let (leaves, places) = leaves(std::slice::from_ref(&i), i.stem);
        // [4] is the beginning of [4, 5]: one row holds all three.
        assert_eq!((leaves.len(), leaves[0].fed, &places[..]), (1, &[4, 5][..], &[0, 0, 0][..]));
        let i = item(&[1, 2], &[&[5, 6], &[7, 8], &[5, 9]], 99);
        let (leaves, places) = super::leaves(std::slice::from_ref(&i), i.stem);
        assert_eq!((leaves.len(), &places[..]), (2, &[0, 1, 0][..]));
    }

    #[test]
    fn long_sequences_lose_their_beginning() {
        let i = item(&[1, 2, 3, 4], &[&[5], &[6, 7, 8]], 4);
        assert_eq!(i.rows, [(vec![1, 2, 3, 4, 5], 4), (vec![3, 4, 6, 7, 8], 2)]);
        assert_eq!((i.stem, i.longest), (0, 4), "cut differently they share nothing");
        let long = Request { context: vec![1], continuations: vec![vec![2; 5]] };
        assert!(matches!(Item::new(0, &long, 4), Err(TrainError::TooLong { tokens: 5, longest: 4 })));
    }

    #[test]
    fn batches_hold_what_they_may() {
        let items: Vec<Item> =
            [9, 10, 11, 30].map(|n| item(&vec![1; n], &[&[2], &[3]], 99)).into_iter().collect();
        assert_eq!(batch_size(&items, 1000), 3, "the last stem is too long beside the first");
        assert_eq!(batch_size(&items, 2 * 2 * 10), 2);
        assert_eq!(batch_size(&items, 1), 1, "one goes in any case");
    }
}
