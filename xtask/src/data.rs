//! `cargo xtask data`: rebuilds the embedded domain texts and the pretraining corpus of the embedded base model.
//!
//! Every text is a list of documents separated by one blank line; a document never contains a blank line.
//! Sources: Debian packages (fetched by name, unpacked, never installed), crate sources at exact versions, and
//! a generator of worked arithmetic. `crates/firebrick-train/data/README.md` records licences and checksums.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use arithmetic::{Rng, arithmetic};
use files::{TempDir, gunzip, say, sha256, write_atomic};
use sources::{DOMAIN_PACKAGES, PACKAGES};

mod arithmetic;
mod files;
mod sources;
mod text;

/// Arguments of `cargo xtask data`.
#[derive(Debug, clap::Args)]
pub struct DataArgs {
    /// Write the pretraining corpus (`train.txt`, `held.txt`, `mixture.txt`) into this folder instead.
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    pub corpus: Option<PathBuf>,
    /// Compare with the checked-in domain texts and their checksums; write nothing, fail on any difference.
    #[arg(long)]
    pub check: bool,
}

/// Bytes of each domain text, and of the held-out part of the corpus: upper bounds, met to within one document.
const DOMAIN_BYTES: usize = 220_000;
const HELD_BYTES: usize = 208_000;
/// A line at least this long that occurs in two texts marks a shared document.
const LONG_LINE: usize = 64;

/// Runs the subcommand.
///
/// # Errors
/// A missing tool, package or crate, a package whose licence text is not the expected one, an unreadable or
/// unwritable file; with `check`, the list of all files that differ.
pub fn run(args: &DataArgs) -> Result<()> {
    let root = &crate::cmd::root();
    let tmp = TempDir::new()?;
    let count = if args.corpus.is_some() { PACKAGES.len() } else { DOMAIN_PACKAGES };
    for package in &PACKAGES[..count] {
        sources::unpack(package, &tmp.0)?;
    }
    let mut problems = HashSet::new();
    let domains = domain_texts(root, &tmp.0, &mut problems)?;
    if let Some(dir) = &args.corpus {
        return write_corpus(root, &tmp.0, dir, &domains, &mut problems);
    }
    let data = root.join("crates/firebrick-train/data");
    if args.check {
        return check(&data, &domains);
    }
    for (name, text) in &domains {
        write_atomic(&data.join(format!("{name}.txt")), text)?;
        say(&format!("{name}.txt  {} bytes  sha256 {}", text.len(), sha256(text)))?;
    }
    Ok(())
}

fn check(data: &Path, domains: &[(&str, String)]) -> Result<()> {
    let readme =
        fs::read_to_string(data.join("README.md")).context("crates/firebrick-train/data/README.md")?;
    let mut faults = Vec::new();
    for (name, text) in domains {
        match fs::read(data.join(format!("{name}.txt"))) {
            Err(e) => faults.push(format!("{name}.txt: {e}")),
            Ok(old) if old != text.as_bytes() => {
                let at = old.iter().zip(text.as_bytes()).take_while(|(a, b)| a == b).count();
                faults.push(format!(
                    "{name}.txt: {} bytes here, {} rebuilt, first difference at byte {at}",
                    old.len(),
                    text.len()
                ));
            }
            Ok(_) => {}
        }
        if !readme.contains(&sha256(text)) {
            faults.push(format!("README.md does not list the sha256 of {name}.txt, {}", sha256(text)));
        }
    }
    ensure!(faults.is_empty(), "the domain texts differ from their sources:\n  {}", faults.join("\n  "));
    say("the domain texts equal their sources")
}

fn domain_texts(
    root: &Path,
    tmp: &Path,
    problems: &mut HashSet<String>,
) -> Result<Vec<(&'static str, String)>> {
    let scripture = sources::scripture(tmp, |book| sources::SCRIPTURE_DOMAIN.contains(&book))?;
    let glosses = sources::glosses(tmp, |file| sources::GLOSSES_DOMAIN.contains(&file))?;
    let rust = sources::rust(root, tmp, "domain", sources::RUST_DOMAIN)?;
    let arithmetic = arithmetic(&mut Rng::new("domain arithmetic"), 11, DOMAIN_BYTES + 4_000, problems);
    let prose = sources::sqlite(tmp, |page| sources::PROSE_DOMAIN.contains(&page))?;
    let lists = [
        ("scripture", scripture),
        ("glosses", glosses),
        ("rust", rust),
        ("arithmetic", arithmetic),
        ("prose", prose),
    ];
    lists
        .into_iter()
        .map(|(name, mut docs)| {
            Rng::new(name).shuffle(&mut docs);
            let docs = take(&mut docs.into_iter(), DOMAIN_BYTES, &HashSet::new());
            let text = docs.join("\n\n") + "\n";
            ensure!(text.len() >= 150_000, "{name}: only {} bytes could be made", text.len());
            Ok((name, text))
        })
        .collect()
}

fn write_corpus(
    root: &Path,
    tmp: &Path,
    dir: &Path,
    domains: &[(&str, String)],
    problems: &mut HashSet<String>,
) -> Result<()> {
    let dict = tmp.join("dict-devil/usr/share/dictd/devil.dict.dz");
    let jargon = tmp.join("dict-jargon/usr/share/dictd/jargon.dict.dz");
    let sources = [
        ("austen: six novels", 2_000_000, sources::austen(tmp)?),
        (
            "scripture: other books",
            1_200_000,
            sources::scripture(tmp, |book| !sources::SCRIPTURE_DOMAIN.contains(&book))?,
        ),
        (
            "glosses: other lexicographer files",
            1_200_000,
            sources::glosses(tmp, |f| !sources::GLOSSES_DOMAIN.contains(&f))?,
        ),
        ("sqlite: other pages", 1_100_000, {
            sources::sqlite(tmp, |page| {
                !sources::PROSE_DOMAIN.contains(&page) && !sources::PROSE_SKIPPED.contains(&page)
            })?
        }),
        ("docutils documentation", 550_000, sources::docutils(tmp)?),
        ("jargon file", 900_000, text::plain(&gunzip(&jargon)?)),
        ("devil's dictionary", 350_000, text::plain(&gunzip(&dict)?)),
        ("rust: other crates", 1_400_000, sources::rust(root, tmp, "corpus", sources::RUST_CORPUS)?),
        ("arithmetic: sums, differences, products by one digit", 600_000, {
            arithmetic(&mut Rng::new("corpus arithmetic"), 3, 660_000, problems)
        }),
    ];
    let total: usize = sources.iter().map(|(_, cap, _)| cap).sum();
    let mut seen = HashSet::new();
    for (_, text) in domains {
        note_long_lines(text, &mut seen);
    }
    // Held documents come first, so that a training document that repeats one of their lines is left out.
    let (mut train, mut held, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for (name, cap, mut docs) in sources {
        Rng::new(name).shuffle(&mut docs);
        let mut docs = docs.into_iter();
        let part = take(&mut docs, cap * HELD_BYTES / total, &seen);
        part.iter().for_each(|doc| note_long_lines(doc, &mut seen));
        held.extend(part);
        rest.push((name, cap, docs));
    }
    let mut counts = Vec::new();
    for (name, cap, mut docs) in rest {
        let part = take(&mut docs, cap, &seen);
        counts.push((name, part.len(), part.iter().map(|d| d.len() + 2).sum::<usize>()));
        train.extend(part);
    }
    Rng::new("train order").shuffle(&mut train);
    Rng::new("held order").shuffle(&mut held);
    let (train, held) = (train.join("\n\n") + "\n", held.join("\n\n") + "\n");
    let mut table = String::new();
    for (name, documents, bytes) in counts {
        let share = 100.0 * bytes as f64 / train.len() as f64;
        table += &format!("{share:5.1}%  {bytes:>8} bytes  {documents:>5} documents  {name}\n");
    }
    table += &format!("train.txt  {} bytes  sha256 {}\n", train.len(), sha256(&train));
    table += &format!("held.txt  {} bytes  sha256 {}\n", held.len(), sha256(&held));
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    write_atomic(&dir.join("train.txt"), &train)?;
    write_atomic(&dir.join("held.txt"), &held)?;
    write_atomic(&dir.join("mixture.txt"), &table)?;
    say(&table)
}

/// Documents from `docs` while they fit `bytes` in all, leaving out those with a long line already in `seen`.
fn take(docs: &mut impl Iterator<Item = String>, bytes: usize, seen: &HashSet<String>) -> Vec<String> {
    let (mut out, mut total) = (Vec::new(), 0);
    for doc in docs {
        if doc.lines().any(|line| line.len() >= LONG_LINE && seen.contains(line)) {
            continue;
        }
        total += doc.len() + 2;
        if total > bytes {
            break;
        }
        out.push(doc);
    }
    out
}

fn note_long_lines(text: &str, seen: &mut HashSet<String>) {
    seen.extend(text.lines().filter(|l| l.len() >= LONG_LINE).map(str::to_owned));
}
