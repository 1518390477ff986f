//! The sources of the texts: which packages, crates and pages, and how each becomes documents.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::files::{read, say, stdout_of, walk};
use super::text::{ascii, html_sections, pack, plain};

/// Package, the version the checked-in texts were made from, and words its copyright file must contain.
pub const PACKAGES: [(&str, &str, &str); 8] = [
    ("bible-kjv", "4.38", "The copyright for the King James Version text of the Bible is expired"),
    ("bible-kjv-text", "4.38", "The copyright for the King James Version text of the Bible is expired"),
    ("wordnet-base", "1:3.0-37", "Permission to use, copy, modify and distribute this software and database"),
    (
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "Files: * Copyright: D. Richard Hipp <drh@hwaci.com> License: public-domain",
    ),
    ("dict-devil", "1.0-13.1", "The Devil's Dictionary is in the public domain"),
    ("dict-jargon", "4.4.7-3.1", "The Jargon File is in the public domain"),
    ("docutils-doc", "0.19+dfsg-6", "Files: * Copyright: Public domain License: public-domain"),
    ("r-cran-janeaustenr", "1.0.0-1", "License: MIT"),
];
/// The packages the domain texts need.
pub const DOMAIN_PACKAGES: usize = 4;

pub const RUST_DOMAIN: &[(&str, &str)] =
    &[("indexmap", "2.14.2"), ("memmap2", "0.9.12"), ("semver", "1.0.28"), ("serde_json", "1.0.154")];
pub const RUST_CORPUS: &[(&str, &str)] = &[
    ("anyhow", "1.0.104"),
    ("arrayvec", "0.7.8"),
    ("bitflags", "2.13.2"),
    ("bytes", "1.12.2"),
    ("clap_builder", "4.6.7"),
    ("crossbeam-utils", "0.8.23"),
    ("either", "1.19.0"),
    ("fastrand", "2.5.0"),
    ("httparse", "1.10.1"),
    ("itertools", "0.15.0"),
    ("log", "0.4.35"),
    ("memchr", "2.8.3"),
    ("ndarray", "0.17.2"),
    ("num-bigint", "0.4.8"),
    ("num-traits", "0.2.19"),
    ("rand", "0.9.5"),
    ("rayon", "1.12.0"),
    ("smallvec", "1.16.6"),
    ("tempfile", "3.27.0"),
    ("textdistance", "1.1.1"),
    ("url", "2.5.8"),
    ("walkdir", "2.5.0"),
];

pub const SCRIPTURE_DOMAIN: [&str; 3] = ["Proverbs", "Ecclesiastes", "John"];
const BOOKS: &str = "Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,\
2 Kings,1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,\
Jeremiah,Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,\
Zechariah,Malachi,Matthew,Mark,Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,\
Colossians,1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,\
1 John,2 John,3 John,Jude,Revelation";

/// WordNet's lexicographer files of the domain: animal, food, plant, substance.
pub const GLOSSES_DOMAIN: [&str; 4] = ["05", "13", "20", "27"];
/// Words that keep a gloss out of every text.
const COARSE: [&str; 12] = [
    "offensive",
    "ethnic",
    "obscene",
    "vulgar",
    "derogat",
    "disparag",
    "sexual",
    "contempt",
    "racial",
    "slur",
    "insult",
    "genital",
];

/// Pages of SQLite's documentation in the domain: the essays on storage, transactions, planning and testing.
pub const PROSE_DOMAIN: &[&str] = &[
    "appfileformat",
    "arch",
    "assert",
    "atomiccommit",
    "backup",
    "different",
    "fasterthanfs",
    "floatingpoint",
    "foreignkeys",
    "howtocorrupt",
    "isolation",
    "lockingv3",
    "malloc",
    "queryplanner",
    "queryplanner-ng",
    "sharedcache",
    "speed",
    "tempfiles",
    "testing",
    "th3",
    "useovernet",
    "wal",
    "walformat",
    "whentouse",
    "whynotgit",
    "withoutrowid",
];
/// Pages that hold lists, change notes or second copies of other pages.
pub const PROSE_SKIPPED: &[&str] = &[
    "34to35",
    "books",
    "c_interface",
    "capi3",
    "changes",
    "chronology",
    "consortium_agreement-20071201",
    "copyright-release",
    "cves",
    "doc_backlink_crossref",
    "doc_keyword_crossref",
    "doc_pagelink_crossref",
    "doc_target_crossref",
    "doclist",
    "docs",
    "download",
    "fileformat",
    "index",
    "keyword_index",
    "news",
    "oldnews",
    "prosupport",
    "requirements",
    "sitemap",
    "syntax",
    "syntaxdiagrams",
];
/// Docutils files that are lists, are under another licence, or show markup rather than prose.
const DOCUTILS_SKIPPED: [&str; 10] = [
    "HISTORY.txt",
    "THANKS.txt",
    "links.txt",
    "cheatsheet.txt",
    "smartquotes.txt",
    "enthought-plan.txt",
    "enthought-rfp.txt",
    "mwe-test.txt",
    "demo.txt",
    "math.txt",
];

/// Fetches a Debian package and unpacks it into `tmp/NAME`; checks that its licence is the recorded one.
pub fn unpack(&(name, made_from, licence): &(&str, &str, &str), tmp: &Path) -> Result<()> {
    let folder = tmp.join(format!("{name}.download"));
    fs::create_dir_all(&folder)?;
    stdout_of(Command::new("apt-get").args(["download", name]).current_dir(&folder)).with_context(|| {
        format!("package {name}: run `apt-get update` first if the list of packages is old")
    })?;
    let entry =
        fs::read_dir(&folder)?.next().with_context(|| format!("apt-get left no file for {name}"))??;
    let version = stdout_of(Command::new("dpkg-deb").arg("-f").arg(entry.path()).arg("Version"))?;
    let version = String::from_utf8_lossy(&version).trim().to_owned();
    if version != made_from {
        say(&format!("note: {name} is {version} here; the checked-in texts were made from {made_from}"))?;
    }
    stdout_of(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(tmp.join(name)))?;
    let copyright = read(&tmp.join(name).join("usr/share/doc").join(name).join("copyright"))?;
    let words = copyright.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words.contains(licence), "package {name} {version}: its licence no longer says {licence:?}");
    Ok(())
}

pub fn scripture(tmp: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let program = tmp.join("bible-kjv/usr/bin/bible");
    let output = Command::new(&program)
        .env("COLUMNS", "1000000")
        .arg("-p")
        .arg(tmp.join("bible-kjv-text/usr/lib"))
        .args(["-f", "gen1:1-rev22:21"])
        .output()
        .context("running the `bible` program of package bible-kjv")?;
    ensure!(
        output.status.success(),
        "`bible` failed (it needs libreadline, which `apt-get install bible-kjv` brings): {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8(output.stdout).context("the text of the Bible")?;
    let mut books = BOOKS.split(',');
    let (mut abbreviation, mut book) = ("", "");
    let mut chapters: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines() {
        let (reference, verse) = line.split_once(' ').with_context(|| format!("verse line {line:?}"))?;
        let (place, number) =
            reference.split_once(':').with_context(|| format!("reference {reference:?}"))?;
        let short = place.trim_end_matches(|c: char| c.is_ascii_digit());
        if short != abbreviation {
            abbreviation = short;
            book = books.next().context("more than 66 books")?;
        }
        if !wanted(book) {
            continue;
        }
        let chapter = format!("{book} {}", &place[short.len()..]);
        if chapters.last().is_none_or(|(name, _)| *name != chapter) {
            chapters.push((chapter, Vec::new()));
        }
        if let (Some((_, verses)), Some(verse)) = (chapters.last_mut(), ascii(verse.trim())) {
            verses.push(format!("{number} {verse}"));
        }
    }
    ensure!(books.next().is_none(), "fewer than 66 books");
    Ok(chapters.iter().flat_map(|(name, verses)| pack(Some(name), verses, 1_500)).collect())
}

pub fn glosses(tmp: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for kind in ["noun", "verb", "adj", "adv"] {
        let path = tmp.join("wordnet-base/usr/share/wordnet").join(format!("data.{kind}"));
        for line in read(&path)?.lines().filter(|l| !l.starts_with(' ')) {
            let (record, gloss) = line.split_once(" | ").with_context(|| format!("synset {line:?}"))?;
            let fields: Vec<&str> = record.split(' ').collect();
            ensure!(fields.len() > 4, "synset {line:?}");
            if !wanted(fields[1]) || COARSE.iter().any(|w| gloss.contains(w)) {
                continue;
            }
            let count = usize::from_str_radix(fields[3], 16).with_context(|| format!("synset {line:?}"))?;
            let words: Vec<String> = fields[4..]
                .iter()
                .step_by(2)
                .take(count.min(4))
                .map(|w| w.split('(').next().unwrap_or(w).replace('_', " "))
                .collect();
            let class = match kind {
                "adj" => "adjective",
                "adv" => "adverb",
                other => other,
            };
            if let Some(entry) = ascii(&format!("{} ({class}): {}", words.join(", "), gloss.trim())) {
                files.entry(fields[1].to_owned()).or_default().push(entry);
            }
        }
    }
    Ok(files.values().flat_map(|entries| pack(None, entries, 1_500)).collect())
}

pub fn rust(root: &Path, tmp: &Path, name: &str, crates: &[(&str, &str)]) -> Result<Vec<String>> {
    // A package of its own names exact versions, so that an update of the workspace's lock file changes no text.
    let probe = tmp.join(format!("rust-{name}"));
    let mut manifest =
        "[package]\nname = \"probe\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n"
            .to_owned();
    for (krate, version) in crates {
        manifest += &format!("{krate} = {{ version = \"={version}\", default-features = false }}\n");
    }
    fs::create_dir_all(probe.join("src"))?;
    fs::write(probe.join("Cargo.toml"), manifest)?;
    fs::write(probe.join("src/lib.rs"), "")?;
    fs::copy(root.join("Cargo.lock"), probe.join("Cargo.lock")).context("Cargo.lock")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["metadata", "--format-version", "1", "--manifest-path"]).arg(probe.join("Cargo.toml"));
    let metadata: serde_json::Value = serde_json::from_slice(&stdout_of(&mut cargo)?)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut docs = Vec::new();
    for (krate, version) in crates {
        let package = packages
            .iter()
            .find(|p| p["name"] == *krate && p["version"] == *version)
            .with_context(|| format!("cargo metadata does not list {krate} {version}"))?;
        let licence = package["license"].as_str().unwrap_or("none");
        ensure!(licence.contains("MIT"), "{krate} {version}: licence {licence} is not the expected one");
        let home = Path::new(package["manifest_path"].as_str().context("manifest_path")?);
        let home = home.parent().context("manifest_path has a folder")?;
        let mut files = Vec::new();
        walk(&home.join("src"), &mut files)?;
        for file in files {
            let path = file.strip_prefix(home)?.to_string_lossy().replace('\\', "/");
            if !path.ends_with(".rs")
                || path.contains("test")
                || path.contains("bench")
                || path.contains("table")
            {
                continue;
            }
            docs.extend(pack(Some(&format!("// {krate} {version} {path}")), &items(&read(&file)?), 1_800));
        }
    }
    Ok(docs.iter().filter_map(|doc| ascii(doc)).collect())
}

/// Top-level items of a Rust file, blank lines left out.
fn items(source: &str) -> Vec<String> {
    let (mut items, mut item, mut gap) = (Vec::new(), String::new(), false);
    for line in source.lines().map(str::trim_end) {
        if line.is_empty() {
            gap = true;
            continue;
        }
        if gap && !item.is_empty() && !line.starts_with([' ', '}', ')', '\t']) {
            items.push(std::mem::take(&mut item));
        }
        if !item.is_empty() {
            item.push('\n');
        }
        item += line;
        gap = false;
    }
    items.push(item);
    items
}

pub fn sqlite(tmp: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let folder = tmp.join("sqlite3-doc/usr/share/doc/sqlite3");
    let mut pages = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|e| e == "html") && wanted(&name) {
            pages.push(path);
        }
    }
    pages.sort();
    let mut docs = Vec::new();
    for page in pages {
        let html = read(&page)?;
        let body = html.rsplit_once("antiRobotDefense();\n</script>").map_or(html.as_str(), |(_, rest)| rest);
        let sections: Vec<String> = html_sections(body).iter().filter_map(|s| ascii(s)).collect();
        docs.extend(pack(None, &sections, 1_800));
    }
    docs.retain(|doc| doc.len() >= 300);
    Ok(docs)
}

pub fn docutils(tmp: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    walk(&tmp.join("docutils-doc/usr/share/doc/docutils-doc"), &mut files)?;
    let skipped = |p: &Path| p.file_name().is_some_and(|n| DOCUTILS_SKIPPED.iter().any(|s| n == *s));
    files.retain(|p| p.extension().is_some_and(|e| e == "txt") && !skipped(p));
    let mut docs = Vec::new();
    for file in files {
        docs.extend(plain(&read(&file)?));
    }
    Ok(docs)
}

/// The novels of package r-cran-janeaustenr: zlib streams of serialized R character vectors, one line a string.
pub fn austen(tmp: &Path) -> Result<Vec<String>> {
    let path = tmp.join("r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb");
    let data = fs::read(&path).with_context(|| path.display().to_string())?;
    let (mut at, mut docs) = (0, Vec::new());
    while at + 4 < data.len() {
        let mut decoder = flate2::bufread::ZlibDecoder::new(&data[at + 4..]);
        let mut bytes = Vec::new();
        decoder.read_to_end(&mut bytes).with_context(|| format!("{} at byte {at}", path.display()))?;
        at += 4 + decoder.total_in() as usize;
        let word = |i: usize| -> Result<usize> {
            let field = bytes.get(i..i + 4).with_context(|| format!("{} ends early", path.display()))?;
            Ok(u32::from_be_bytes([field[0], field[1], field[2], field[3]]) as usize)
        };
        // "X\n", three versions, the native encoding's name; then the vector: flags, length, strings.
        let start = 18 + word(14)?;
        ensure!(
            bytes.starts_with(b"X\n") && word(start)? & 0xff == 16,
            "{}: not a string vector",
            path.display()
        );
        let (mut i, mut text) = (start + 8, String::new());
        for _ in 0..word(start + 4)? {
            let length = word(i + 4)?;
            let line =
                bytes.get(i + 8..i + 8 + length).with_context(|| format!("{} ends early", path.display()))?;
            text += std::str::from_utf8(line)?;
            text.push('\n');
            i += 8 + length;
        }
        docs.extend(plain(&text));
    }
    Ok(docs)
}
