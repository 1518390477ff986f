//! Sizes, whitespace, forbidden strings, and pages that name files.

use super::{File, Tree, Violation};

const MAX_LINES: usize = 800;
const MAX_FILE: u64 = 6_000_000;
const MAX_DATA: u64 = 8_000_000;

/// What people write by hand; everything else is data.
const WRITTEN: &[&str] = &["md", "py", "rs", "sh", "toml", "wgsl", "yaml", "yml"];

/// Hosts of package registries and paths of single machines. In pieces, so that this file passes its own rule.
const FORBIDDEN: &[&str] = &[
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("index.", "crates.io"),
    concat!("static.", "crates.io"),
    concat!("registry.", "npmjs.org"),
    concat!("proxy.", "golang.org"),
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/tm", "p/"),
    concat!("/ho", "me/"),
];

fn is_written(file: &File) -> bool {
    WRITTEN.contains(&file.extension()) || file.path == ".ci/run"
}

/// A file that no one can take in at once is split.
pub fn lengths(tree: &Tree) -> Vec<Violation> {
    let written = tree.files.iter().filter(|file| is_written(file) && file.path != "CHANGELOG.md");
    let long = written.filter_map(|file| {
        let lines = file.text_lines().count();
        (lines > MAX_LINES).then(|| file.at(lines, format!("{lines} lines, at most {MAX_LINES}")))
    });
    long.collect()
}

/// No tabs, no blanks at the end of a line.
pub fn whitespace(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in tree.files.iter().filter(|file| is_written(file)) {
        for (line, text) in file.text_lines() {
            if text.contains('\t') {
                violations.push(file.at(line, "tab"));
            }
            if text.ends_with([' ', '\t']) {
                violations.push(file.at(line, "blank at the end of the line"));
            }
        }
    }
    violations
}

/// A clone stays small: no large file, little data in all.
pub fn sizes(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in tree.files.iter().filter(|file| file.bytes > MAX_FILE) {
        violations.push(file.at(0, format!("{} bytes, at most {MAX_FILE}", file.bytes)));
    }
    let is_data = |file: &&File| !is_written(file) && file.extension() != "lock";
    let data: u64 = tree.files.iter().filter(is_data).map(|file| file.bytes).sum();
    if data > MAX_DATA
        && let Some(largest) = tree.files.iter().filter(is_data).max_by_key(|file| file.bytes)
    {
        violations.push(
            largest
                .at(0, format!("the data files have {data} bytes, at most {MAX_DATA}; this is the largest")),
        );
    }
    violations
}

/// No registry host and no path of one machine.
pub fn forbidden_strings(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in &tree.files {
        for (line, text) in file.text_lines() {
            let found = FORBIDDEN.iter().filter(|string| text.contains(**string));
            violations.extend(found.map(|string| file.at(line, format!("forbidden string `{string}`"))));
        }
    }
    violations
}

/// Each row of docs/methods.md names the tests of its method, as `` `path.rs` `` or `` `path.rs::test` ``.
pub fn methods_page(tree: &Tree) -> Vec<Violation> {
    let path = "docs/methods.md";
    let Some(page) = tree.get(path) else {
        return vec![Violation {
            path: path.to_owned(),
            line: 0,
            message: "the page of methods is missing".to_owned(),
        }];
    };
    let mut violations = Vec::new();
    let mut in_table = false;
    for (line, text) in page.text_lines() {
        if text.starts_with("|--")
            || text.starts_with("| --")
            || text.starts_with("|:")
            || text.starts_with("| :")
        {
            in_table = true;
            continue;
        }
        in_table &= text.starts_with('|');
        let mut names_test = false;
        for (path, test) in test_paths(text) {
            names_test = true;
            match tree.get(path) {
                None => violations.push(page.at(line, format!("no file {path}"))),
                Some(file) if !file.code_lines(true).any(|(_, code)| code.contains("#[test]")) => {
                    violations.push(page.at(line, format!("{path} has no test")));
                }
                Some(file) if !test.is_empty() && !defines(file, test) => {
                    violations.push(page.at(line, format!("{path} has no function {test}")));
                }
                Some(_) => {}
            }
        }
        if in_table && !names_test {
            violations.push(page.at(line, "the row names no test file (`path.rs`)"));
        }
    }
    violations
}

/// Paths ending in `.rs` between backticks, each with the function named behind `::`, if any.
fn test_paths(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let spans = line.split('`').skip(1).step_by(2);
    spans.filter_map(|span| {
        let (path, test) = span.split_once("::").unwrap_or((span, ""));
        (path.ends_with(".rs") && path.contains('/')).then_some((path, test))
    })
}

/// What a guide shows of code, in blocks marked `rust,ignore`, is in some Rust file, but for blanks and line ends.
pub fn guide_snippets(tree: &Tree) -> Vec<Violation> {
    let dense = |text: &str| text.split_whitespace().collect::<String>();
    let sources: Vec<String> = tree.rust().filter_map(|file| file.text.as_deref()).map(dense).collect();
    let mut violations = Vec::new();
    for page in tree.files.iter().filter(|f| f.path.starts_with("docs/") && f.extension() == "md") {
        let mut block: Option<(usize, String)> = None;
        for (line, text) in page.text_lines() {
            match (&mut block, text.trim()) {
                (None, "```rust,ignore") => block = Some((line, String::new())),
                (Some((start, code)), "```") => {
                    if !sources.iter().any(|source| source.contains(code.as_str())) {
                        violations.push(page.at(*start, "not in any Rust file"));
                    }
                    block = None;
                }
                (Some((_, code)), text) => *code += &dense(text),
                (None, _) => {}
            }
        }
    }
    violations
}

fn defines(file: &File, path: &str) -> bool {
    let name = path.rsplit("::").next().unwrap_or(path);
    let definition = format!("fn {name}");
    file.code_lines(true).any(|(_, text)| {
        text.match_indices(&definition).any(|(at, _)| {
            !text[at + definition.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(violations: &[Violation]) -> Vec<usize> {
        violations.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn long_files_are_reported_and_data_is_not() {
        let (long, fits) = ("x\n".repeat(801), "x\n".repeat(800));
        let tree = Tree::of(&[("a.rs", &long), ("b.rs", &fits), ("c.json", &long), ("CHANGELOG.md", &long)]);
        assert_eq!(lengths(&tree), [tree.files[0].at(801, "801 lines, at most 800")]);
    }

    #[test]
    fn whitespace_is_plain() {
        let tree = Tree::of(&[("a.md", "ok\n\tx\nx \n"), ("a.txt", "\tx \n")]);
        assert_eq!(lines(&whitespace(&tree)), [2, 3]);
    }

    #[test]
    fn data_is_bounded_file_by_file_and_in_all() {
        let with = |sizes: &[u64]| {
            let mut tree = Tree::default();
            for (n, bytes) in sizes.iter().enumerate() {
                tree.files.push(File { bytes: *bytes, ..File::new(&format!("{n}.bin"), b"") });
            }
            tree
        };
        assert!(sizes(&with(&[5_000_000, 3_000_000])).is_empty());
        assert_eq!(sizes(&with(&[5_000_000, 3_000_001])).len(), 1);
        assert_eq!(sizes(&with(&[6_000_001])).len(), 1);
        let mut written = with(&[9_000_000]);
        written.files[0].path = "Cargo.lock".to_owned();
        assert_eq!(sizes(&written).len(), 1, "a large file, but not data");
    }

    #[test]
    fn registries_and_machines_are_not_named() {
        let text = format!("https://docs.rs/burn\n{}x\nhttps://{}/simple\n", FORBIDDEN[6], FORBIDDEN[0]);
        assert_eq!(lines(&forbidden_strings(&Tree::of(&[("docs/a.md", &text)]))), [2, 3]);
    }

    #[test]
    fn the_methods_page_names_tests_that_exist() {
        let page = "Intro with `not/checked.txt`.\n\n| method | test |\n|---|---|\n| A | `t/a.rs` |\n| B | `t/a.rs::works` |\n\
                    | C | `t/gone.rs` |\n| D | `t/a.rs::work` |\n| E | none |\n| F | `t/b.rs` |\n\nEnd, `t/gone.rs`.\n";
        let test = ("t/a.rs", "#[test]\nfn works() {}\n// fn work()\n");
        let none = ("t/b.rs", "// #[test]\nfn works() {}\n");
        assert_eq!(
            lines(&methods_page(&Tree::of(&[("docs/methods.md", page), test, none]))),
            [7, 8, 9, 10, 12]
        );
        assert_eq!(methods_page(&Tree::of(&[test])).len(), 1);
    }

    #[test]
    fn guides_show_code_that_is_compiled() {
        let page = "```rust,ignore\nfn a() {\n    b()\n}\n```\n```rust,ignore\nfn a() { c() }\n```\n```sh\nfn a() { c() }\n```\n";
        let source = ("docs/guide/extend/src/lib.rs", "mod m {\n    fn a() { b() }\n}\n");
        assert_eq!(lines(&guide_snippets(&Tree::of(&[("docs/guide/a.md", page), source]))), [6]);
        assert_eq!(lines(&guide_snippets(&Tree::of(&[("docs/guide/a.md", page)]))), [1, 6]);
    }
}
