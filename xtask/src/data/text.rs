//! Text: documents out of paragraphs, ASCII out of typography, lines out of HTML.

/// Documents of plain text: paragraphs of one indentation unwrapped to a line, pictures and tables left out.
pub fn plain(text: &str) -> Vec<String> {
    let mut paragraphs = vec![Vec::new()];
    for line in text.lines().map(str::trim_end) {
        match paragraphs.last_mut() {
            Some(last) if !line.is_empty() => last.push(line),
            _ => paragraphs.push(Vec::new()),
        }
    }
    let mut blocks = Vec::new();
    for lines in paragraphs.iter().filter(|p| !p.is_empty()) {
        let indent = |l: &str| l.len() - l.trim_start().len();
        let depth = lines.iter().map(|l| indent(l)).min().unwrap_or(0);
        let (last, full) = (lines.len() - 1, lines.iter().skip(1).all(|l| indent(l) == depth));
        let prose = full && lines[..last].iter().all(|l| l.trim().len() > 45);
        let dedented: Vec<&str> = lines.iter().map(|l| l.get(depth..).unwrap_or(l)).collect();
        let text = if prose { dedented.join(" ").trim().to_owned() } else { dedented.join("\n") };
        let marks = text.chars().filter(|c| !c.is_whitespace()).count();
        let letters = text.chars().filter(|c| c.is_alphanumeric()).count();
        // Headwords with their pronunciation are short and full of marks; pictures are longer.
        let words = letters * 4 >= marks * 3 || (marks < 60 && letters * 2 > marks);
        blocks.extend(ascii(&text).filter(|t| words && !t.starts_with("00-database")));
    }
    pack(None, &blocks, 1_800)
}

/// Joins blocks into documents of about `target` bytes, 80 to 4096; an oversized block is cut between its lines.
pub fn pack(title: Option<&str>, blocks: &[String], target: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    for block in blocks {
        if block.len() <= target * 3 / 2 {
            pieces.push(block.clone());
            continue;
        }
        let mut piece = String::new();
        for line in block.lines() {
            if !piece.is_empty() && piece.len() + line.len() > target {
                pieces.push(std::mem::take(&mut piece));
            }
            if !piece.is_empty() {
                piece.push('\n');
            }
            piece += line;
        }
        pieces.push(piece);
    }
    let mut bodies: Vec<String> = Vec::new();
    let mut left: usize = pieces.iter().map(|p| p.len() + 1).sum();
    let mut open = false;
    for piece in pieces {
        match bodies.last_mut() {
            // A short tail joins the document before it, and a short opening takes what follows.
            Some(body)
                if left < target / 3
                    || body.len() < target / 3
                    || (open && body.len() + piece.len() <= target * 3 / 2) =>
            {
                body.push('\n');
                *body += &piece;
            }
            _ => bodies.push(piece.clone()),
        }
        left -= piece.len() + 1;
        open = bodies.last().is_some_and(|b| b.len() < target);
    }
    bodies
        .iter()
        .map(|b| title.map_or(b.clone(), |t| format!("{t}\n{b}")))
        .filter(|d| (80..=4_096).contains(&d.len()))
        .collect()
}

/// The text with typographic characters replaced by ASCII ones; `None` where others remain.
pub fn ascii(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push_str("    "),
            '\u{a0}' | '\u{2002}' | '\u{2003}' | '\u{2009}' => out.push(' '),
            '\u{2018}' | '\u{2019}' | '\u{b4}' => out.push('\''),
            '\u{201c}' | '\u{201d}' => out.push('"'),
            '\u{2010}'..='\u{2012}' | '\u{2212}' | '\u{b7}' => out.push('-'),
            '\u{2013}' | '\u{2014}' => out.push_str("--"),
            '\u{2022}' => out.push('*'),
            '\u{2026}' => out.push_str("..."),
            '\u{2190}' => out.push_str("<-"),
            '\u{2192}' | '\u{2794}' => out.push_str("->"),
            '\u{2264}' => out.push_str("<="),
            '\u{2265}' => out.push_str(">="),
            '\u{d7}' => out.push('x'),
            '\u{e0}'..='\u{e5}' => out.push('a'),
            '\u{e7}' => out.push('c'),
            '\u{e8}'..='\u{eb}' => out.push('e'),
            '\u{ec}'..='\u{ef}' => out.push('i'),
            '\u{f2}'..='\u{f6}' => out.push('o'),
            '\u{f9}'..='\u{fc}' => out.push('u'),
            '\u{ad}' | '\u{200b}' | '\u{fe0e}' | '\u{feff}' => {}
            '\n' | ' '..='~' => out.push(c),
            _ => return None,
        }
    }
    Some(out)
}

/// Sections of a page of SQLite's documentation, one block a line, each section opened by its heading.
pub fn html_sections(html: &str) -> Vec<String> {
    let (mut sections, mut section, mut line, mut pre) = (Vec::new(), String::new(), String::new(), false);
    let flush = |line: &mut String, section: &mut String, pre: bool| {
        let text = std::mem::take(line);
        let text = if pre { text.trim_end() } else { text.trim() };
        let boilerplate = text.starts_with("This page last modified") || text.ends_with("Table Of Contents");
        if !text.is_empty() && text != "-" && !boilerplate && text.chars().any(char::is_alphanumeric) {
            *section += text;
            section.push('\n');
        }
    };
    let mut rest = html;
    while let Some(open) = rest.find('<') {
        push_text(&entities(&rest[..open]), pre, &mut line, |l| flush(l, &mut section, pre));
        rest = &rest[open..];
        let end = if rest.starts_with("<!--") { rest.find("-->").map(|i| i + 2) } else { rest.find('>') };
        let Some(end) = end else { break };
        let tag = rest[1..end].to_ascii_lowercase();
        rest = &rest[end + 1..];
        let name = tag.split(|c: char| c.is_whitespace()).next().unwrap_or("");
        match name {
            "script" | "style" | "svg" | "button" | "form" | "head" => {
                rest = after(rest, &format!("</{name}>"))
            }
            "div" if tag.contains("fancy-toc") => rest = after(rest, "</div>"),
            "h1" | "h2" | "h3" | "h4" => {
                flush(&mut line, &mut section, pre);
                sections.push(std::mem::take(&mut section));
            }
            "td" | "th" => line.push(' '),
            "li" => {
                flush(&mut line, &mut section, pre);
                line += "- ";
            }
            "pre" | "/pre" => {
                flush(&mut line, &mut section, pre);
                pre = name == "pre";
            }
            "p" | "/p" | "div" | "/div" | "br" | "br/" | "ul" | "/ul" | "ol" | "/ol" | "dl" | "/dl"
            | "dt" | "dd" | "/li" | "tr" | "/tr" | "table" | "/table" | "blockquote" | "/blockquote"
            | "center" | "hr" | "/h1" | "/h2" | "/h3" | "/h4" => flush(&mut line, &mut section, pre),
            _ => {}
        }
    }
    flush(&mut line, &mut section, pre);
    sections.push(section);
    sections.iter().map(|s| s.trim_end().to_owned()).filter(|s| !s.is_empty()).collect()
}

fn push_text(text: &str, pre: bool, line: &mut String, mut flush: impl FnMut(&mut String)) {
    for c in text.chars() {
        match c {
            '\n' if pre => flush(line),
            c if c.is_whitespace() && !pre => {
                if !line.ends_with(' ') {
                    line.push(' ');
                }
            }
            c => line.push(c),
        }
    }
}

fn after<'a>(text: &'a str, close: &str) -> &'a str {
    text.find(close).map_or("", |i| &text[i + close.len()..])
}

fn entities(text: &str) -> String {
    let mut parts = text.split('&');
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        let (name, rest) = part.split_once(';').filter(|(n, _)| n.len() < 9).unwrap_or(("", part));
        let number = match name.strip_prefix('#') {
            Some(n) if n.starts_with(['x', 'X']) => u32::from_str_radix(&n[1..], 16).ok(),
            Some(n) => n.parse().ok(),
            None => None,
        };
        match (name, number.and_then(char::from_u32)) {
            (_, Some(c)) => out.push(c),
            ("lt", _) => out.push('<'),
            ("gt", _) => out.push('>'),
            ("amp", _) => out.push('&'),
            ("quot", _) => out.push('"'),
            ("nbsp", _) => out.push(' '),
            ("mdash" | "ndash", _) => out += "--",
            ("rarr", _) => out += "->",
            ("larr", _) => out += "<-",
            ("le", _) => out += "<=",
            ("ge", _) => out += ">=",
            ("lsquo" | "rsquo", _) => out.push('\''),
            ("ldquo" | "rdquo", _) => out.push('"'),
            (other, _) => {
                out.push('&');
                out += other;
                if !other.is_empty() {
                    out.push(';');
                }
            }
        }
        out += rest;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_lines() {
        let html = "<script>x<y</script><p>One &lt;two&gt;\nthree<br>four</p><div class=\"fancy-toc1\">gone</div>\
                    <h1>Head &mdash; line</h1><ul><li>a<li>b</ul><pre>  if x\n\n    y</pre>";
        assert_eq!(html_sections(html), ["One <two> three\nfour", "Head -- line\n- a\n- b\n  if x\n    y"]);
    }

    #[test]
    fn packing_keeps_every_line_and_no_blank_one() {
        let blocks: Vec<String> =
            (0..200).map(|i| format!("block {i}\n{}", "word ".repeat(i).trim_end())).collect();
        let docs = pack(Some("title"), &blocks, 500);
        let kept: Vec<&str> = docs.iter().flat_map(|d| d.lines().skip(1)).collect();
        let given: Vec<&str> = blocks.iter().flat_map(|b| b.lines()).collect();
        assert_eq!(kept.join("\n").replace("\n\n", "\n"), given.join("\n").replace("\n\n", "\n"));
        assert!(docs.iter().all(|d| d.starts_with("title\n") && d.len() < 1_500));
        assert!(docs.len() > 100);
    }

    #[test]
    fn typography_becomes_ascii() {
        assert_eq!(ascii("\u{201c}caf\u{e9}\u{201d}\u{2014}1").as_deref(), Some("\"cafe\"--1"));
        assert_eq!(ascii("\u{3b1}"), None);
    }

    #[test]
    fn paragraphs_are_unwrapped_and_verses_are_not() {
        let long = "a line of prose that is longer than forty-five characters";
        let docs =
            plain(&format!("  {long}\n  {long}\n\n  short verse of a poem here\n    indented verse of it\n"));
        assert_eq!(docs, [format!("{long} {long}\nshort verse of a poem here\n  indented verse of it")]);
    }
}
