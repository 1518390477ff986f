//! Writing a set of sites as a short selector.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Patterns that together match exactly `sites`.
pub(super) fn patterns(sites: &SiteSet) -> Vec<Pattern> {
    type Set = BTreeSet<usize>;
    let mut layers_of: BTreeMap<(Option<usize>, Part), Set> = BTreeMap::new();
    let mut global = Vec::new();
    for site in sites.iter() {
        match site.layer {
            Some(layer) => {
                layers_of.entry((site.expert, site.part)).or_default().insert(layer);
            }
            None => global.push(site.part),
        }
    }
    let mut parts_at: BTreeMap<Set, Vec<Part>> = BTreeMap::new();
    let mut experts_at: BTreeMap<(Set, Part), Set> = BTreeMap::new();
    for ((expert, part), layers) in layers_of {
        match expert {
            None => parts_at.entry(layers).or_default().push(part),
            Some(expert) => {
                experts_at.entry((layers, part)).or_default().insert(expert);
            }
        }
    }
    let mut leaves_at: BTreeMap<(Set, Set), Vec<Part>> = BTreeMap::new();
    for ((layers, part), experts) in experts_at {
        leaves_at.entry((layers, experts)).or_default().push(part);
    }

    let mut patterns = group(&global, None);
    for (layers, parts) in parts_at {
        patterns.extend(group(&parts, Some(&ranges(&layers))));
    }
    for ((layers, experts), parts) in leaves_at {
        let mut push = |leaf: Option<Segment>| {
            let exact = leaf.is_none();
            let parts = Some(Parts::Experts { experts: ranges(&experts), leaf });
            patterns.push(Pattern::Place { layers: Some(ranges(&layers)), parts, exact });
        };
        let leaves: Vec<&'static str> =
            parts.iter().filter_map(|p| Some(p.name().split_once('.')?.1)).collect();
        if leaves.len() < parts.len() {
            push(None);
        }
        if !leaves.is_empty() {
            push(Some(Segment::Names(leaves)));
        }
    }
    patterns
}

/// One pattern for the parts of one segment that hold nothing, one for those that hold others, and one for each first segment.
fn group(parts: &[Part], layers: Option<&Numbers>) -> Vec<Pattern> {
    let holds_others = |part: Part| Part::ALL.into_iter().any(|p| p.parent() == Some(part));
    let mut groups: BTreeMap<(Option<&'static str>, bool), Vec<&'static str>> = BTreeMap::new();
    for part in parts {
        match part.name().split_once('.') {
            Some((first, second)) => groups.entry((Some(first), false)).or_default().push(second),
            None => groups.entry((None, holds_others(*part))).or_default().push(part.name()),
        }
    }
    let pattern = |((first, exact), names)| {
        let mut segments: Vec<Segment> = Option::into_iter(first).map(|f| Segment::Names(vec![f])).collect();
        segments.push(Segment::Names(names));
        Pattern::Place { layers: layers.cloned(), parts: Some(Parts::Segments(segments)), exact }
    };
    groups.into_iter().map(pattern).collect()
}

fn ranges(numbers: &BTreeSet<usize>) -> Numbers {
    let mut ranges: Vec<(i32, i32)> = Vec::new();
    for number in numbers.iter().map(|n| i32::try_from(*n).unwrap_or(i32::MAX)) {
        match ranges.last_mut() {
            Some((_, to)) if number.checked_sub(1) == Some(*to) => *to = number,
            _ => ranges.push((number, number)),
        }
    }
    Numbers::Ranges(ranges)
}
