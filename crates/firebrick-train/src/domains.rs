//! Five small texts of very different kinds, built in, so that specialization can be shown without a download.

/// A built-in text of one kind.
///
/// Its documents are separated by one blank line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Name, as in settings and reports.
    pub name: &'static str,
    /// The whole text.
    pub text: &'static str,
    /// Under what terms it may be passed on.
    pub licence: &'static str,
    /// Where it comes from.
    pub source: &'static str,
}

static DOMAINS: [Domain; 5] = [
    Domain {
        name: "scripture",
        text: include_str!("../data/scripture.txt"),
        licence: "public domain",
        source: "King James Bible: John, Proverbs, Ecclesiastes",
    },
    Domain {
        name: "glosses",
        text: include_str!("../data/glosses.txt"),
        licence: "WordNet 3.0 licence",
        source: "WordNet 3.0, Princeton University: animals, food, plants, substances",
    },
    Domain {
        name: "rust",
        text: include_str!("../data/rust.txt"),
        licence: "MIT",
        source: "sources of indexmap, memmap2, semver and serde_json; each part names its file",
    },
    Domain {
        name: "arithmetic",
        text: include_str!("../data/arithmetic.txt"),
        licence: "MIT OR Apache-2.0",
        source: "worked exercises, generated for this project",
    },
    Domain {
        name: "prose",
        text: include_str!("../data/prose.txt"),
        licence: "public domain",
        source: "documentation of SQLite",
    },
];

/// Documents are gathered into blocks of at least this many bytes before some are held out, so that short
/// documents do not leak their neighbours' subject into the other part.
const BLOCK_BYTES: usize = 4096;
/// One block in this many is held out: 14.3 %.
const HOLD_OUT_EVERY: usize = 7;

/// The built-in domains: scripture, glosses, rust, arithmetic, prose.
pub fn domains() -> &'static [Domain] {
    &DOMAINS
}

/// The built-in domain `name`, if there is one.
pub fn domain(name: &str) -> Option<&'static Domain> {
    DOMAINS.iter().find(|d| d.name == name)
}

impl Domain {
    /// The documents, in order.
    pub fn documents(&self) -> impl Iterator<Item = &'static str> {
        self.text.split("\n\n").map(|d| d.trim_end_matches('\n')).filter(|d| !d.is_empty())
    }

    /// The documents to train on, about 85 %.
    pub fn train_documents(&self) -> Vec<&'static str> {
        self.part(false)
    }

    /// The documents held out for evaluation, about 15 %: whole blocks spread evenly over the text.
    pub fn held_out_documents(&self) -> Vec<&'static str> {
        self.part(true)
    }

    /// [`Domain::train_documents`] as one text, a blank line between documents.
    pub fn train_text(&self) -> String {
        self.train_documents().join("\n\n") + "\n"
    }

    /// [`Domain::held_out_documents`] as one text, a blank line between documents.
    pub fn held_out_text(&self) -> String {
        self.held_out_documents().join("\n\n") + "\n"
    }

    fn part(&self, held_out: bool) -> Vec<&'static str> {
        let (mut block, mut bytes) = (0, 0);
        let mut part = Vec::new();
        for document in self.documents() {
            if (block % HOLD_OUT_EVERY == HOLD_OUT_EVERY / 2) == held_out {
                part.push(document);
            }
            bytes += document.len() + 2;
            if bytes >= BLOCK_BYTES {
                (block, bytes) = (block + 1, 0);
            }
        }
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_parts_cover_every_document_once() {
        for domain in domains() {
            let (train, held) = (domain.train_documents(), domain.held_out_documents());
            assert!(domain.text.len() > 150_000, "{}", domain.name);
            assert_eq!(train.len() + held.len(), domain.documents().count());
            let addresses: HashSet<_> = train.iter().chain(&held).map(|d| d.as_ptr()).collect();
            assert_eq!(addresses.len(), train.len() + held.len());
            let kept: usize = train.iter().chain(&held).map(|d| d.len()).sum();
            let separators = 2 * (train.len() + held.len() - 1) + 1;
            assert_eq!(kept + separators, domain.text.len(), "{}: nothing else is left out", domain.name);
        }
    }

    #[test]
    fn the_held_out_part_is_about_15_percent_and_spread_over_the_text() {
        for domain in domains() {
            let share = domain.held_out_text().len() as f64 / domain.text.len() as f64;
            assert!((0.10..0.20).contains(&share), "{}: {share}", domain.name);
            let start = domain.text.as_ptr() as usize;
            let fifths: HashSet<_> = domain
                .held_out_documents()
                .iter()
                .map(|d| (d.as_ptr() as usize - start) * 5 / domain.text.len())
                .collect();
            assert_eq!(fifths.len(), 5, "{}: every fifth of the text has held-out documents", domain.name);
        }
    }

    #[test]
    fn held_out_documents_are_not_in_the_training_part() {
        for domain in domains() {
            let train: HashSet<_> = domain.train_documents().into_iter().collect();
            assert!(domain.held_out_documents().iter().all(|d| !train.contains(d)), "{}", domain.name);
        }
    }

    #[test]
    fn names_are_found() {
        assert_eq!(domain("rust").unwrap().name, "rust");
        assert_eq!(domain("latin"), None);
    }
}
