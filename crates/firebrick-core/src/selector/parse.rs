//! The parser of selectors: by hand, over byte positions, without recursion.

use super::*;

type Parsed<T> = Result<T, SelectorError>;

/// A segment as written: `None` for `*`, else the names with their spans.
type Words<'a> = Option<Vec<(&'a str, Range<usize>)>>;

pub(super) fn selector(text: &str) -> Parsed<Selector> {
    let mut parser = Parser { text, at: 0 };
    let mut patterns = Vec::new();
    loop {
        parser.spaces();
        patterns.push(parser.pattern()?);
        parser.spaces();
        if parser.at == text.len() {
            return Ok(Selector { patterns });
        }
        if !parser.eat(b',') {
            return parser.fail(parser.here(), "expected `,` or the end of the selector");
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn fail<T>(&self, span: Range<usize>, message: impl Into<String>) -> Parsed<T> {
        Err(SelectorError { text: self.text.to_string(), span, message: message.into() })
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<u8> {
        self.rest().bytes().next()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_ascii_start().len();
    }

    /// The span of the next character, empty at the end.
    fn here(&self) -> Range<usize> {
        self.at..self.at + self.rest().chars().next().map_or(0, char::len_utf8)
    }

    /// The longest run without the characters that have a meaning.
    fn word(&mut self) -> (&'a str, Range<usize>) {
        let stops = |c: char| c.is_ascii_whitespace() || ",.{}!*".contains(c);
        let rest = self.rest();
        let word = &rest[..rest.find(stops).unwrap_or(rest.len())];
        let start = self.at;
        self.at += word.len();
        (word, start..self.at)
    }

    /// Eats `name` if a whole word of that name stands here.
    fn eat_word(&mut self, name: &str) -> bool {
        let Some(after) = self.rest().strip_prefix(name) else { return false };
        let ends = after.is_empty() || after.starts_with([',', '.', '!', '{', '}', ' ', '\t', '\r', '\n']);
        self.at += if ends { name.len() } else { 0 };
        ends
    }

    fn pattern(&mut self) -> Parsed<Pattern> {
        let start = self.at;
        if self.rest().starts_with("re:") {
            self.at += 3;
            return self.regex();
        }
        let mut layers = None;
        let mut parts = None;
        if self.eat_word("layers") {
            if !self.eat(b'.') {
                return self
                    .fail(start..self.at, "which layers? write `layers.*`, `layers.3` or `layers.0-5`");
            }
            layers = Some(self.numbers("layer")?);
            if self.eat(b'.') {
                parts = Some(self.parts(true)?);
            }
        } else if self.eat(b'*') {
            if self.peek() != Some(b'.') {
                if self.peek() == Some(b'!') {
                    return self.fail(self.here(), "`*` already means every site itself; leave out `!`");
                }
                return Ok(Pattern::All);
            }
            self.at = start;
            parts = Some(self.parts(false)?);
        } else {
            parts = Some(self.parts(false)?);
        }
        let exact = self.eat(b'!');
        Ok(Pattern::Place { layers, parts, exact })
    }

    fn regex(&mut self) -> Parsed<Pattern> {
        let span = self.at..self.text.len();
        let source = self.rest();
        if source.is_empty() {
            return self.fail(span, "expected a regular expression after `re:`");
        }
        self.at = self.text.len();
        match bounded_regex(source) {
            Ok(regex) => Ok(Pattern::Tensor(TensorRegex(regex))),
            Err(reason) => self.fail(span, format!("not a regular expression: {reason}")),
        }
    }

    fn numbers(&mut self, what: &str) -> Parsed<Numbers> {
        if self.eat(b'*') {
            return Ok(Numbers::All);
        }
        if !self.eat(b'{') {
            return Ok(Numbers::Ranges(vec![self.range(what)?]));
        }
        let mut ranges = Vec::new();
        loop {
            self.spaces();
            ranges.push(self.range(what)?);
            self.spaces();
            if self.eat(b'}') {
                return Ok(Numbers::Ranges(ranges));
            }
            if !self.eat(b',') {
                return self.fail(self.here(), "expected `,` or `}`");
            }
        }
    }

    fn range(&mut self, what: &str) -> Parsed<(i32, i32)> {
        let start = self.at;
        let from = self.int(what)?;
        let to = if self.eat(b'-') { self.int(what)? } else { from };
        if what == "expert" && (from < 0 || to < 0) {
            return self.fail(start..self.at, "experts are counted from 0, not from the end");
        }
        if (from < 0) == (to < 0) && from > to {
            return self.fail(start..self.at, format!("an empty range; did you mean `{to}-{from}`?"));
        }
        Ok((from, to))
    }

    fn int(&mut self, what: &str) -> Parsed<i32> {
        let start = self.at;
        self.eat(b'-');
        let digits = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            self.at = start;
            return self.fail(self.here(), format!("expected the number of a {what}, such as `3` or `0-5`"));
        }
        self.at += digits;
        match self.text[start..self.at].parse() {
            Ok(number) => Ok(number),
            Err(_) => self.fail(start..self.at, format!("no model has a {what} of this number")),
        }
    }

    /// One segment: `*`, a name, or names in braces.
    fn segment(&mut self) -> Parsed<Words<'a>> {
        if self.eat(b'*') {
            return Ok(None);
        }
        let mut words = Vec::new();
        let many = self.eat(b'{');
        loop {
            if many {
                self.spaces();
            }
            let (word, span) = self.word();
            if word.is_empty() {
                return self.fail(self.here(), "expected the name of a part, such as `attn` or `mlp.up`");
            }
            words.push((word, span));
            if !many {
                return Ok(Some(words));
            }
            self.spaces();
            if self.eat(b'}') {
                return Ok(Some(words));
            }
            if !self.eat(b',') {
                return self.fail(self.here(), "expected `,` or `}`");
            }
        }
    }

    fn parts(&mut self, in_layer: bool) -> Parsed<Parts> {
        let start = self.at;
        if self.eat_word(EXPERTS) || self.eat_word("experts") {
            return self.experts();
        }
        let mut written = vec![self.segment()?];
        while self.eat(b'.') {
            written.push(self.segment()?);
        }
        let known: Vec<&'static str> = known(in_layer).collect();
        let segments = self.check(&written, start, &known, in_layer)?;
        match segments.as_slice() {
            [Segment::Names(mlp), Segment::Names(experts)] if mlp == &["mlp"] && experts == &["experts"] => {
                Ok(Parts::Experts { experts: Numbers::All, leaf: None })
            }
            _ => Ok(Parts::Segments(segments)),
        }
    }

    fn experts(&mut self) -> Parsed<Parts> {
        if !self.eat(b'.') {
            return Ok(Parts::Experts { experts: Numbers::All, leaf: None });
        }
        let experts = self.numbers("expert")?;
        if !self.eat(b'.') {
            return Ok(Parts::Experts { experts, leaf: None });
        }
        let start = self.at;
        let leaf = vec![self.segment()?];
        let inside = |p: &Part| matches!(p, Part::MlpGate | Part::MlpUp | Part::MlpDown);
        let known: Vec<&'static str> = Part::ALL
            .iter()
            .filter(|p| inside(p))
            .filter_map(|p| Some(p.name().split_once('.')?.1))
            .collect();
        let leaf = self.check(&leaf, start, &known, true)?.pop();
        Ok(Parts::Experts { experts, leaf })
    }

    /// Makes segments of what is written if every name in it occurs in a known name that fits the whole.
    fn check(
        &self,
        written: &[Words<'a>],
        start: usize,
        known: &[&'static str],
        in_layer: bool,
    ) -> Parsed<Vec<Segment>> {
        let depth = |name: &str| name.split('.').count();
        let long: Vec<&'static str> = known.iter().copied().filter(|n| depth(n) == written.len()).collect();
        if long.is_empty() {
            return self.fail(start..self.at, "no part has so many segments; write for example `mlp.up`");
        }
        let mut segments: Vec<Segment> = Vec::new();
        for (i, words) in written.iter().enumerate() {
            let Some(words) = words else {
                segments.push(Segment::Any);
                continue;
            };
            let so_far = |name: &&&'static str| {
                name.split('.').zip(&segments).all(|(word, segment)| segment.matches(word))
            };
            let mut here: Vec<&'static str> =
                long.iter().filter(so_far).filter_map(|name| name.split('.').nth(i)).collect();
            here.dedup();
            let mut names = Vec::new();
            for (word, span) in words {
                match here.iter().find(|h| *h == word) {
                    Some(name) => names.push(*name),
                    None => return self.unknown(word, span.clone(), &here, known, in_layer),
                }
            }
            segments.push(Segment::Names(names));
        }
        for (i, words) in written.iter().enumerate() {
            for (word, span) in words.iter().flatten() {
                let with_word = |name: &&&'static str| name.split('.').nth(i) == Some(*word);
                if !long.iter().filter(with_word).any(|name| fits(name, &segments)) {
                    return self.fail(span.clone(), format!("no part with `{word}` here fits the rest"));
                }
            }
        }
        Ok(segments)
    }

    /// `word` is none of the names that may stand `here`.
    fn unknown<T>(
        &self,
        word: &str,
        span: Range<usize>,
        here: &[&'static str],
        known: &[&'static str],
        in_layer: bool,
    ) -> Parsed<T> {
        let global = |p: &Part| !p.in_layer() && p.name() == word;
        let shown: String = word.chars().take(40).collect();
        let inner = known.iter().find(|name| name.split_once('.').is_some_and(|(_, last)| last == word));
        let message = if in_layer && Part::ALL.iter().any(global) {
            format!("`{word}` exists once per model; write it without `layers.`")
        } else if known.contains(&word) {
            format!("nothing lies inside `{word}`")
        } else if let Some(close) = closest(word, here.iter().copied()) {
            format!("unknown part `{word}`; did you mean `{close}`?")
        } else if let Some(inner) = inner {
            format!("unknown part `{word}`; did you mean `{inner}`?")
        } else {
            format!("unknown part `{shown}`; here may stand {}", here.join(", "))
        };
        self.fail(span, message)
    }
}

/// The names a pattern can be made of.
fn known(in_layer: bool) -> impl Iterator<Item = &'static str> {
    let parts = Part::ALL.into_iter().filter(move |p| p.in_layer() || !in_layer);
    parts.map(Part::name).chain([EXPERTS])
}
