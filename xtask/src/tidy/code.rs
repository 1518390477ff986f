//! Rust source as the rules look at it: without comments and literals, and split at its unit tests.

/// `source` with every comment, string and character literal blanked out, line by line in place.
pub fn blank(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(bytes, at);
        if let Some(end) = end {
            out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        }
        at = end.unwrap_or(at + 1);
    }
    String::from_utf8(out).expect("whole characters are blanked")
}

/// The end of the comment or literal that starts at `at`, if one does.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let after_word = at > 0 && is_word(bytes[at - 1]);
    match rest {
        [b'/', b'/', ..] => Some(rest.iter().position(|b| *b == b'\n').map_or(bytes.len(), |n| at + n)),
        [b'/', b'*', ..] => Some(block_comment_end(bytes, at)),
        [b'"', ..] => Some(string_end(bytes, at)),
        [b'r', ..] if !after_word => raw_string_end(bytes, at + 1),
        [b'b' | b'c', b'r', ..] if !after_word => raw_string_end(bytes, at + 2),
        [b'\'', b'\\', ..] => {
            // The byte behind the backslash may itself be a quote.
            let close = rest[3.min(rest.len())..].iter().position(|b| *b == b'\'')?;
            Some(at + 3 + close + 1)
        }
        [b'\'', first, ..] => {
            let width = utf8_width(*first);
            (rest.get(1 + width) == Some(&b'\'')).then_some(at + width + 2)
        }
        _ => None,
    }
}

fn utf8_width(first: u8) -> usize {
    match first {
        0xf0.. => 4,
        0xe0.. => 3,
        0xc0.. => 2,
        _ => 1,
    }
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => (at, depth) = (at + 2, depth + 1),
            [b'*', b'/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], quote: usize) -> usize {
    let mut at = quote + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string_end(bytes: &[u8], hashes_at: usize) -> Option<usize> {
    let hashes = bytes[hashes_at..].iter().take_while(|b| **b == b'#').count();
    let open = hashes_at + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let found = bytes[open + 1..].windows(close.len()).position(|window| window == close);
    Some(found.map_or(bytes.len(), |n| open + 1 + n + close.len()))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// Byte offsets at which `word` stands in `line` as a whole word.
pub fn words<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    line.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let bytes = line.as_bytes();
        let end = at + word.len();
        (at == 0 || !is_word(bytes[at - 1])) && (end == bytes.len() || !is_word(bytes[end]))
    })
}

/// Whether `word` stands in `line` as a whole word.
pub fn has_word(line: &str, word: &str) -> bool {
    words(line, word).next().is_some()
}

/// How many lines of `code` come before its unit tests, a `#[cfg(test)]` module with a body.
pub fn lines_before_tests(code: &str) -> usize {
    let lines: Vec<&str> = code.lines().collect();
    let is_body = |line: &&str| has_word(line, "mod") && line.contains('{');
    (0..lines.len())
        .find(|&n| {
            let item =
                lines[n + 1..].iter().find(|line| !line.trim().is_empty() && !line.trim().starts_with("#["));
            lines[n].trim() == "#[cfg(test)]" && item.is_some_and(is_body)
        })
        .unwrap_or(lines.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_go_and_code_stays_in_place() {
        let source = r####"let a = "x \" todo!()"; // todo!()
/* todo!() /* nested */ todo!() */ let b = 'c'; let l: &'static str = r#"un"safe"#;
let q = '\''; let e = 'é'; let k = r#type; f::<'a, 'b>(b"todo!()", br"x", '\u{1F600}'); end()"####;
        let code = blank(source);
        assert_eq!(code.len(), source.len());
        assert_eq!(code.lines().count(), 3);
        assert!(!code.contains("todo") && !code.contains("nested") && !code.contains("safe"), "{code}");
        for kept in ["let a =", "let b =", "&'static str", "r#type", "f::<'a, 'b>(", "end()"] {
            assert!(code.contains(kept), "{kept} is missing in {code}");
            assert_eq!(code.find(kept), source.find(kept));
        }
    }

    #[test]
    fn unfinished_literals_end_with_the_file() {
        for source in ["\"abc", "/* abc", "r#\"abc\"", "'", "'\\", "'\\'", "b", "\"\\"] {
            assert_eq!(blank(source).len(), source.len());
        }
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("unsafe { f() }", "unsafe"));
        assert!(!has_word("unsafe_code not_unsafe", "unsafe"));
    }

    #[test]
    fn only_a_test_module_with_a_body_ends_the_library() {
        assert_eq!(lines_before_tests("#[cfg(test)]\nmod helper;\nfn f() {}\n"), 3);
        assert_eq!(lines_before_tests("fn f() {}\n\n#[cfg(test)]\nmod tests {\n}\n"), 2);
        assert_eq!(lines_before_tests("fn f() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n}\n"), 1);
    }
}
