//! `cargo xtask tidy`: the rules of this repository that no compiler, linter or formatter checks.

mod code;
mod crates;
mod files;
mod source;

use crate::cmd;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Every rule; each looks at the whole tree and returns all that it finds.
const RULES: &[fn(&Tree) -> Vec<Violation>] = &[
    crates::dependency_direction,
    crates::burn_internals,
    source::default_device,
    source::environment,
    source::unsafe_code,
    source::unfinished,
    files::lengths,
    files::whitespace,
    files::sizes,
    files::forbidden_strings,
    files::methods_page,
    files::guide_snippets,
];

/// A file of the repository. Text is kept for what is UTF-8 and of moderate size.
pub struct File {
    /// Relative to the root, with `/`.
    path: String,
    bytes: u64,
    text: Option<String>,
    /// `text` without comments and literals, for Rust only.
    code: Option<String>,
}

/// The files that are, or with the next commit would be, in the repository.
#[derive(Default)]
pub struct Tree {
    files: Vec<File>,
}

/// A broken rule. `line` is 0 where the whole file is meant.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    path: String,
    line: usize,
    message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line.max(1), self.message)
    }
}

/// Prints every violation, and fails if there is one.
pub fn run() -> Result<()> {
    let tree = Tree::load(&cmd::root())?;
    let violations = check(&tree);
    for violation in &violations {
        println!("{violation}");
    }
    if !violations.is_empty() {
        bail!("{} violations", violations.len());
    }
    eprintln!("xtask: {} files are tidy", tree.files.len());
    Ok(())
}

fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations: Vec<_> = RULES.iter().flat_map(|rule| rule(tree)).collect();
    violations.sort();
    violations.dedup();
    violations
}

impl File {
    fn new(path: &str, content: &[u8]) -> Self {
        let is_text = content.len() < 2 << 20 && !content.contains(&0);
        let text = std::str::from_utf8(content).ok().filter(|_| is_text).map(str::to_owned);
        let code = text.as_deref().filter(|_| path.ends_with(".rs")).map(code::blank);
        Self { path: path.to_owned(), bytes: content.len() as u64, text, code }
    }

    fn at(&self, line: usize, message: impl Into<String>) -> Violation {
        Violation { path: self.path.clone(), line, message: message.into() }
    }

    /// Numbered lines of Rust, blanked; those of unit tests only when `tests` is true.
    fn code_lines(&self, tests: bool) -> impl Iterator<Item = (usize, &str)> {
        let code = self.code.as_deref().unwrap_or_default();
        let end = if tests { usize::MAX } else { code::lines_before_tests(code) };
        numbered(code).take_while(move |(line, _)| *line <= end)
    }

    fn text_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(self.text.as_deref().unwrap_or_default())
    }

    fn extension(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        name.rsplit_once('.').map_or("", |(_, extension)| extension)
    }

    /// `tensor` for `crates/firebrick-tensor/src/lib.rs`.
    fn crate_name(&self) -> Option<&str> {
        self.path.strip_prefix("crates/firebrick-")?.split('/').next()
    }

    /// The path inside its crate: `src/lib.rs`.
    fn inside(&self) -> &str {
        match self.path.strip_prefix("crates/") {
            Some(rest) => rest.split_once('/').map_or("", |(_, inside)| inside),
            None => &self.path,
        }
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(n, line)| (n + 1, line))
}

impl Tree {
    fn load(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in list(root)? {
            match std::fs::read(root.join(&path)) {
                Ok(content) => files.push(File::new(&path, &content)),
                // Deleted and not yet committed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("cannot read {path}")),
            }
        }
        Ok(Self { files })
    }

    fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.code.is_some())
    }

    fn get(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| File::new(path, text.as_bytes())).collect() }
    }
}

/// Paths of tracked files and of new ones that are not ignored; outside a git checkout, of all but build output.
fn list(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let mut paths: Vec<String> = match output {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            String::from_utf8_lossy(&output.stdout).split_terminator('\0').map(str::to_owned).collect()
        }
        _ => {
            let mut paths = Vec::new();
            walk(root, "", &mut paths)?;
            paths
        }
    };
    paths.retain(|path| root.join(path).symlink_metadata().is_ok_and(|meta| meta.is_file()));
    paths.sort();
    paths.dedup();
    Ok(paths)
}

fn walk(root: &Path, below: &str, paths: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_file() {
            paths.push(path);
        } else if kind.is_dir() && ![".git", "target", "out"].contains(&name.as_str()) {
            walk(root, &path, paths)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_repository_is_tidy() {
        let violations = check(&Tree::load(&cmd::root()).unwrap());
        let list: Vec<_> = violations.iter().map(ToString::to_string).collect();
        assert!(list.is_empty(), "{} violations\n{}", list.len(), list.join("\n"));
    }

    #[test]
    fn listing_without_git_finds_the_same_kind_of_paths() {
        let mut paths = Vec::new();
        walk(&cmd::root(), "xtask", &mut paths).unwrap();
        assert!(paths.contains(&"xtask/src/tidy.rs".to_owned()), "{paths:?}");
    }

    #[test]
    fn binary_files_have_no_text() {
        assert!(File::new("a.rs", b"fn main() {}\0").code.is_none());
        assert!(File::new("a.rs", b"fn main() {}").code.is_some());
        assert!(File::new("a.bin", &[0xff, 0xfe]).text.is_none());
    }
}
