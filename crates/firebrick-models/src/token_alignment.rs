//! Which tokens of two tokenizers stand for each other: along one text, and between the vocabularies.
//!
//! Knowledge fusion (Wan et al. 2024, arXiv 2401.10491) needs both to carry next-token distributions from one model to another:
//! dynamic time warping finds which steps of a text belong together, and a map from vocabulary to vocabulary, by equal text or
//! by the least edit distance, says where their probabilities go. Tokens are compared as the bytes that they stand for,
//! whatever spells them (`Ġ` of byte-level vocabularies, `▁` and `<0x0A>` of SentencePiece's).

use std::collections::{BTreeMap, HashMap};

use crate::tokenizer::Tokenizer;

/// A distribution over few tokens: ids, none twice, with probabilities.
pub type SparseDistribution = Vec<(u32, f32)>;

/// Which token of the target stands for one of the source that has no equal there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VocabRule {
    /// None, and the mark at the beginning of words has to be the same, too.
    Exact,
    /// None: its probability is dropped, and the rest scaled up.
    Equal,
    /// The one with the least edit distance in bytes, without the mark at the beginning of words; of equals one with the same
    /// mark, then the lowest id.
    #[default]
    Nearest,
}

/// Finds for tokens of a source vocabulary those of a target vocabulary, one by one, and keeps what it found.
///
/// A token's partner is the one spelled the same (where both vocabularies spell bytes alike), else the one with the same role
/// (end, begin, padding, unknown; of several the first), else the one of the same text, else of the same text without the mark at the beginning of
/// words, else as [`VocabRule`] says.
///
/// ```
/// use firebrick_models::ModelFiles;
/// use firebrick_models::token_alignment::{VocabMap, VocabRule, one_to_one};
/// use firebrick_models::tokenizer::train_bpe;
/// let source = ModelFiles::embedded()?.tokenizer;
/// let target = train_bpe(["the cat saw the other cat, the cat saw that"], 265)?;
/// let mut map = VocabMap::new(&source, &target, VocabRule::Nearest);
///
/// let (from, to) = (source.encode("the cat", false)?, target.encode("the cat", false)?);
/// let steps = one_to_one(&map.align(&from, &to), to.len());
/// assert_eq!(steps.len(), to.len());
/// assert_eq!(map.get(source.id("c").unwrap()), target.id("c"));
/// # Ok::<(), firebrick_models::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct VocabMap {
    rule: VocabRule,
    source: Texts,
    target: Texts,
    /// Tokens of the source whose partner is not a matter of text.
    known: HashMap<u32, u32>,
    equal: HashMap<Vec<u8>, u32>,
    /// Without the mark.
    bare: HashMap<Vec<u8>, u32>,
    /// Ids of the target by length without the mark.
    lengths: BTreeMap<usize, Vec<u32>>,
    found: HashMap<u32, Option<u32>>,
}

impl VocabMap {
    /// A map from `source` to `target`.
    pub fn new(source: &Tokenizer, target: &Tokenizer, rule: VocabRule) -> Self {
        let (from, to) = (Texts::of(source), Texts::of(target));
        let mut known = HashMap::new();
        // Of a token with several roles the later ones here count.
        let roles = |t: &Tokenizer| [t.unk_id(), t.pad_id(), t.bos_id()];
        known
            .extend(roles(source).into_iter().zip(roles(target)).filter_map(|(from, to)| Some((from?, to?))));
        let ends = target.eos_ids();
        let ends = source.eos_ids().iter().enumerate().map(|(i, &id)| (id, ends.get(i).or(ends.first())));
        known.extend(ends.filter_map(|(from, to)| Some((from, *to?))));
        if from.byte_level == to.byte_level {
            let same = |id: u32| Some((id, target.id(&source.token(id)?)?));
            known.extend((0..from.texts.len() as u32).filter_map(same));
        }
        let apart: Vec<u32> = roles(target).into_iter().flatten().chain(ends_of(target)).collect();
        let (mut equal, mut bare, mut lengths) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        // Single bytes last: the letter itself comes before its spelling as a byte.
        let (bytes, whole): (Vec<u32>, Vec<u32>) = (0..to.texts.len() as u32).partition(|&id| to.is_byte(id));
        for id in whole.into_iter().chain(bytes) {
            let text = to.text(id);
            if text.is_empty() || apart.contains(&id) {
                continue;
            }
            equal.entry(text.to_vec()).or_insert(id);
            bare.entry(strip(text).to_vec()).or_insert(id);
            lengths.entry(strip(text).len()).or_insert_with(Vec::new).push(id);
        }
        VocabMap { rule, source: from, target: to, known, equal, bare, lengths, found: HashMap::new() }
    }

    /// The partner of a source's token; none if the rule gives it none, or there is no such token.
    ///
    /// The first look at a token without an equal compares it with a good part of the target's vocabulary: about a
    /// millisecond for 50 thousand tokens.
    pub fn get(&mut self, id: u32) -> Option<u32> {
        if let Some(found) = self.found.get(&id) {
            return *found;
        }
        let found = self.find(id);
        self.found.insert(id, found);
        found
    }

    fn find(&self, id: u32) -> Option<u32> {
        if let Some(known) = self.known.get(&id) {
            return Some(*known);
        }
        let text = self.source.texts.get(id as usize).filter(|text| !text.is_empty())?;
        let bare = strip(text);
        let exact = self.equal.get(text).copied();
        let same = exact.or_else(|| self.bare.get(bare).copied());
        match self.rule {
            VocabRule::Exact => exact,
            VocabRule::Equal => same,
            VocabRule::Nearest => same.or_else(|| self.nearest(text, bare)),
        }
    }

    fn nearest(&self, text: &[u8], bare: &[u8]) -> Option<u32> {
        let marked = |text: &[u8]| text.starts_with(b" ");
        let mut rows = Vec::new();
        // Distance, whether the mark differs, id.
        let mut best: Option<(usize, bool, u32)> = None;
        let longest = self.lengths.last_key_value().map_or(0, |(length, _)| *length);
        for apart in 0..=longest.max(bare.len()) {
            if best.is_some_and(|(distance, ..)| distance < apart) {
                break;
            }
            let shorter = bare.len().checked_sub(apart);
            for length in shorter.into_iter().chain((apart > 0).then_some(bare.len() + apart)) {
                for &id in self.lengths.get(&length).into_iter().flatten() {
                    let other = self.target.text(id);
                    let limit = best.map_or(usize::MAX, |(distance, ..)| distance);
                    let Some(distance) = edit_distance(bare, strip(other), limit, &mut rows) else {
                        continue;
                    };
                    let candidate = (distance, marked(text) != marked(other), id);
                    best = Some(best.map_or(candidate, |best| best.min(candidate)));
                }
            }
        }
        best.map(|(.., id)| id)
    }

    /// The distribution over the target's tokens: of probabilities that meet on one token the largest counts, as nearest
    /// neighbours of little probability would gather on it; then they sum to one again. None if no token has a partner.
    pub fn distribution(&mut self, source: &[(u32, f32)]) -> Option<SparseDistribution> {
        let mut largest: BTreeMap<u32, f32> = BTreeMap::new();
        for &(id, probability) in source {
            if let Some(id) = self.get(id) {
                let held = largest.entry(id).or_default();
                *held = held.max(probability);
            }
        }
        let sum: f32 = largest.values().sum();
        let scaled = largest.into_iter().map(|(id, p)| (id, p / sum)).collect();
        (sum > 0.0 && sum.is_finite()).then_some(scaled)
    }

    /// The steps of one text that belong together, as the source and the target cut it: pairs of positions in `source` and
    /// `target`, from `(0, 0)` to the last of both, each at most one step further than the one before in either. See
    /// [`align`], which it calls with the tokens' bytes without the marks at the beginning of words. Ids without a token
    /// have no bytes.
    pub fn align(&self, source: &[u32], target: &[u32]) -> Vec<(usize, usize)> {
        let bare = |texts: &'_ Texts, ids: &[u32]| -> Vec<Vec<u8>> {
            ids.iter().map(|&id| strip(texts.text(id)).to_vec()).collect()
        };
        align(&bare(&self.source, source), &bare(&self.target, target))
    }
}

fn ends_of(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    tokenizer.eos_ids().iter().copied()
}

/// The pairs of steps along the cheapest way through two lists of tokens (dynamic time warping), where a pair costs the edit
/// distance of its tokens in bytes: from `(0, 0)` to the last of both, each at most one further than the one before in either.
/// Of ways that cost the same it prefers, from the end, a step in both, then in `source`, then in `target`. Empty if a list is.
///
/// Takes time and memory in proportion to the product of the lengths: a byte and about 50 ns for each pair.
pub fn align(source: &[Vec<u8>], target: &[Vec<u8>]) -> Vec<(usize, usize)> {
    let (n, m) = (source.len(), target.len());
    if n == 0 || m == 0 {
        return Vec::new();
    }
    let mut rows = Vec::new();
    // Where the cheapest way to a pair comes from: 0 both, 1 the source's last step, 2 the target's.
    let mut from = vec![0u8; n * m];
    let mut above: Vec<usize> = Vec::new();
    for (i, a) in source.iter().enumerate() {
        let mut row = Vec::with_capacity(m);
        for (j, b) in target.iter().enumerate() {
            let cost = edit_distance(a, b, usize::MAX, &mut rows).expect("no limit");
            let both = if i > 0 && j > 0 { above[j - 1] } else { usize::MAX };
            let up = if i > 0 { above[j] } else { usize::MAX };
            let left = if j > 0 { row[j - 1] } else { usize::MAX };
            let least = both.min(up).min(left);
            from[i * m + j] = if both == least { 0 } else { 1 + u8::from(up != least) };
            row.push(if least == usize::MAX { cost } else { least + cost });
        }
        above = row;
    }
    let (mut i, mut j) = (n - 1, m - 1);
    let mut path = vec![(i, j)];
    while (i, j) != (0, 0) {
        match from[i * m + j] {
            0 => (i, j) = (i - 1, j - 1),
            1 => i -= 1,
            _ => j -= 1,
        }
        path.push((i, j));
    }
    path.reverse();
    path
}

/// For each of `targets` steps the source's step that belongs to it and to no other, if there is just one and it is so.
pub fn one_to_one(path: &[(usize, usize)], targets: usize) -> Vec<Option<usize>> {
    let sources = path.last().map_or(0, |(i, _)| i + 1);
    let (mut of_source, mut of_target) = (vec![0; sources], vec![0; targets]);
    for &(i, j) in path {
        of_source[i] += 1;
        of_target[j] += 1;
    }
    let mut found = vec![None; targets];
    for &(i, j) in path {
        if of_source[i] == 1 && of_target[j] == 1 {
            found[j] = Some(i);
        }
    }
    found
}

/// Levenshtein's distance in bytes, if it is at most `limit`; `rows` is scratch space.
fn edit_distance(a: &[u8], b: &[u8], limit: usize, rows: &mut Vec<usize>) -> Option<usize> {
    if a == b {
        return Some(0);
    }
    rows.clear();
    rows.extend(0..=b.len());
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = rows[0];
        rows[0] = i + 1;
        let mut least = rows[0];
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = rows[j + 1];
            rows[j + 1] = changed.min(diagonal + 1).min(rows[j] + 1);
            least = least.min(rows[j + 1]);
        }
        if least > limit {
            return None;
        }
    }
    Some(rows[b.len()]).filter(|distance| *distance <= limit)
}

/// The bytes that each token stands for, by id; none where there is no token.
pub fn token_bytes(tokenizer: &Tokenizer) -> Vec<Vec<u8>> {
    Texts::of(tokenizer).texts
}

/// Without the mark at the beginning of a word, unless nothing would be left.
fn strip(text: &[u8]) -> &[u8] {
    match text {
        [b' ', rest @ ..] if !rest.is_empty() => rest,
        _ => text,
    }
}

/// The bytes that the tokens of a vocabulary stand for; none where there is no token.
#[derive(Clone, Debug)]
struct Texts {
    texts: Vec<Vec<u8>>,
    byte_level: bool,
    /// Which are spelled as bytes (`<0x41>`).
    bytes: Vec<bool>,
}

impl Texts {
    fn of(tokenizer: &Tokenizer) -> Texts {
        let byte_level = tokenizer.id("Ġ").is_some() && tokenizer.id("▁").is_none();
        let tokens: Vec<Option<String>> =
            (0..tokenizer.vocab_size() as u32).map(|id| tokenizer.token(id)).collect();
        let is_byte = |token: &Option<String>| !byte_level && token.as_deref().and_then(byte).is_some();
        let text = |token: &Option<String>| match token {
            None => Vec::new(),
            Some(token) if byte_level => byte_level_bytes(token),
            Some(token) => byte(token).map_or_else(|| token.replace('▁', " ").into_bytes(), |b| vec![b]),
        };
        let bytes = tokens.iter().map(is_byte).collect();
        Texts { texts: tokens.iter().map(text).collect(), byte_level, bytes }
    }

    fn text(&self, id: u32) -> &[u8] {
        self.texts.get(id as usize).map_or(&[], Vec::as_slice)
    }

    fn is_byte(&self, id: u32) -> bool {
        self.bytes[id as usize]
    }
}

/// The byte that SentencePiece spells `<0x41>`.
fn byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 2)
}

/// Undoes GPT-2's spelling: printable characters of Latin-1 are their own byte, those from U+0100 on stand for the others in
/// order. What is no such spelling (a special token may hold any character) stays as it is.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u8> = (0..=255).filter(|&b| !printable(b)).collect();
    let byte = |c: char| match u32::from(c) {
        code @ 0..=255 => Some(code as u8).filter(|&b| printable(b)),
        code => others.get(code as usize - 256).copied(),
    };
    token.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelFiles;
    use crate::tokenizer::train_bpe;

    const TEXT: &str =
        "The brown fox, the lazy dog and 37 naïve foxes: they jumped — and jumped again.\n\tThe end.";

    fn small() -> Tokenizer {
        train_bpe([TEXT, "the dog and the fox and the jump"], 275).unwrap()
    }

    fn bytes(words: &[&str]) -> Vec<Vec<u8>> {
        words.iter().map(|w| w.as_bytes().to_vec()).collect()
    }

    #[test]
    fn tokens_are_the_bytes_of_the_text() {
        for tokenizer in [small(), ModelFiles::embedded().unwrap().tokenizer] {
            let texts = Texts::of(&tokenizer);
            let ids = tokenizer.encode(TEXT, false).unwrap();
            let whole: Vec<u8> = ids.iter().flat_map(|&id| texts.text(id).to_vec()).collect();
            assert_eq!(String::from_utf8_lossy(&whole), TEXT);
            let wrong: Vec<u8> =
                ids.iter().flat_map(|&id| tokenizer.token(id).unwrap().into_bytes()).collect();
            assert_ne!(whole, wrong, "control: the vocabulary spells them otherwise");
        }
        assert_eq!((byte("<0x0A>"), byte("<0xA>"), byte("<s>")), (Some(10), None, None));
    }

    #[test]
    fn edit_distances_are_those_of_the_definition() {
        fn plain(a: &[u8], b: &[u8]) -> usize {
            match (a, b) {
                ([], rest) | (rest, []) => rest.len(),
                ([x, a2 @ ..], [y, b2 @ ..]) => {
                    (plain(a2, b2) + usize::from(x != y)).min(plain(a2, b) + 1).min(plain(a, b2) + 1)
                }
            }
        }
        let words = ["", "a", "ab", "ba", "kitten", "sitting", "sit", "banana"].map(str::as_bytes);
        let mut rows = Vec::new();
        for a in words {
            for b in words {
                let distance = plain(a, b);
                assert_eq!(edit_distance(a, b, usize::MAX, &mut rows), Some(distance), "{a:?} {b:?}");
                assert_eq!(edit_distance(a, b, distance, &mut rows), Some(distance));
                if distance > 0 {
                    assert_eq!(edit_distance(a, b, distance - 1, &mut rows), None);
                }
            }
        }
    }

    /// The cheapest way by trying all of them.
    fn cheapest(a: &[Vec<u8>], b: &[Vec<u8>], i: usize, j: usize) -> usize {
        let cost = edit_distance(&a[i], &b[j], usize::MAX, &mut Vec::new()).unwrap();
        let before = [(1, 1), (1, 0), (0, 1)].into_iter().filter(|(di, dj)| *di <= i && *dj <= j);
        cost + before.map(|(di, dj)| cheapest(a, b, i - di, j - dj)).min().unwrap_or(0)
    }

    #[test]
    fn the_way_is_the_cheapest_and_ties_are_broken_in_order() {
        let lists = [
            bytes(&["the", "brown", "fox", "es"]),
            bytes(&["th", "e", "brown", "foxes"]),
            bytes(&["foxes", "the", "brown"]),
            bytes(&["x"]),
        ];
        for a in &lists {
            for b in &lists {
                let path = align(a, b);
                let cost =
                    |&(i, j): &(usize, usize)| edit_distance(&a[i], &b[j], 99, &mut Vec::new()).unwrap();
                let total: usize = path.iter().map(cost).sum();
                assert_eq!(total, cheapest(a, b, a.len() - 1, b.len() - 1), "{path:?}");
                assert_eq!((path[0], path[path.len() - 1]), ((0, 0), (a.len() - 1, b.len() - 1)));
                for pair in path.windows(2) {
                    let (di, dj) = (pair[1].0 - pair[0].0, pair[1].1 - pair[0].1);
                    assert!(di <= 1 && dj <= 1 && di + dj > 0, "{path:?}");
                }
            }
        }
        // All cost the same: both first, then what is left over of the source at the beginning.
        assert_eq!(align(&bytes(&["a", "a", "a"]), &bytes(&["a", "a"])), [(0, 0), (1, 0), (2, 1)]);
        assert_eq!(align(&bytes(&["a", "a"]), &bytes(&["a", "a", "a"])), [(0, 0), (0, 1), (1, 2)]);
        assert!(align(&[], &bytes(&["a"])).is_empty());
    }

    #[test]
    fn only_steps_with_one_partner_belong_together() {
        let path = align(&bytes(&["the", "fox", "es", "jumped"]), &bytes(&["the", "foxes", "jumped"]));
        assert_eq!(path, [(0, 0), (1, 1), (2, 1), (3, 2)]);
        assert_eq!(one_to_one(&path, 3), [Some(0), None, Some(3)]);
        assert_eq!(one_to_one(&[], 2), [None, None]);
    }

    #[test]
    fn one_tokenizer_maps_to_itself() {
        for tokenizer in [small(), ModelFiles::embedded().unwrap().tokenizer] {
            let ids = tokenizer.encode(TEXT, false).unwrap();
            for rule in [VocabRule::Equal, VocabRule::Nearest] {
                let mut map = VocabMap::new(&tokenizer, &tokenizer, rule);
                let path = map.align(&ids, &ids);
                assert_eq!(path, (0..ids.len()).map(|i| (i, i)).collect::<Vec<_>>());
                assert!((0..tokenizer.vocab_size() as u32).all(|id| map.get(id) == Some(id)));
                let distribution = vec![(3, 0.5), (7, 0.25), (200, 0.25)];
                assert_eq!(map.distribution(&distribution), Some(distribution));
            }
        }
        // Control: two tokenizers are not one.
        let (other, tokenizer) = (small(), ModelFiles::embedded().unwrap().tokenizer);
        let mut map = VocabMap::new(&tokenizer, &other, VocabRule::Nearest);
        assert!((0..other.vocab_size() as u32).any(|id| map.get(id) != Some(id)));
        let (from, to) = (tokenizer.encode(TEXT, false).unwrap(), other.encode(TEXT, false).unwrap());
        assert!(map.align(&from, &to).iter().any(|(i, j)| i != j));
    }

    #[test]
    fn partners_have_the_same_text_or_the_nearest() {
        let (source, target) = (ModelFiles::embedded().unwrap().tokenizer, small());
        let (from, to) = (Texts::of(&source), Texts::of(&target));
        let mut nearest = VocabMap::new(&source, &target, VocabRule::Nearest);
        let mut equal = VocabMap::new(&source, &target, VocabRule::Equal);
        // `train_bpe` has them under the names of the roles: they are no candidates for words.
        let apart: Vec<u32> = target.eos_ids().iter().copied().chain(target.pad_id()).collect();
        let mut exact = VocabMap::new(&source, &target, VocabRule::Exact);
        let (mut only, mut marked) = (0, 0);
        for id in (0..source.vocab_size() as u32).step_by(37) {
            let text = from.text(id);
            let found = nearest.get(id).unwrap();
            let by_equality = equal.get(id);
            only += usize::from(by_equality.is_none());
            let whole = by_equality.filter(|partner| to.text(*partner) == text);
            assert_eq!(exact.get(id), whole);
            marked += usize::from(whole != by_equality);
            if let Some(partner) = by_equality {
                assert_eq!(partner, found);
                assert_eq!(strip(to.text(partner)), strip(text));
                continue;
            }
            let distance = |other: u32| {
                edit_distance(strip(text), strip(to.text(other)), usize::MAX, &mut Vec::new()).unwrap()
            };
            let least = (0..target.vocab_size() as u32).filter(|i| !apart.contains(i)).map(distance).min();
            assert_eq!(Some(distance(found)), least, "{}", String::from_utf8_lossy(text));
        }
        assert!(only > 5, "control: {only} tokens have no equal");
        assert!(marked > 0, "control: some differ in the mark alone");
    }

    #[test]
    fn the_largest_of_those_that_meet_counts() {
        let target = small();
        let source = ModelFiles::embedded().unwrap().tokenizer;
        let mut map = VocabMap::new(&source, &target, VocabRule::Equal);
        let id = |text: &str| source.id(text).unwrap();
        let to = |text: &str| target.id(text).unwrap();
        // `A` and its lower case meet nowhere; the marked letter meets the bare one.
        let marked =
            (0..source.vocab_size() as u32).find(|&i| source.token(i).as_deref() == Some("ĠW")).unwrap();
        assert_eq!(target.id("ĠW"), None);
        let found = map.distribution(&[(id("a"), 0.25), (marked, 0.5), (id("W"), 0.125)]).unwrap();
        let mut expected = vec![(to("a"), 1.0 / 3.0), (to("W"), 2.0 / 3.0)];
        expected.sort_unstable_by_key(|pair| pair.0);
        assert_eq!(
            found.iter().map(|p| p.0).collect::<Vec<_>>(),
            expected.iter().map(|p| p.0).collect::<Vec<_>>()
        );
        assert!(found.iter().zip(&expected).all(|(a, b)| (a.1 - b.1).abs() < 1e-6), "{found:?}");
        assert_eq!(map.distribution(&[]), None);
    }
}
