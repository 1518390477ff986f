use firebrick_core::{Selector, Site, SiteSet};
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};

use crate::table;

/// A pattern in parts, from which both its text and (by brute force) its meaning are made.
#[derive(Clone, Debug)]
struct Wanted {
    layers: Option<Vec<(i32, i32)>>,
    /// The names that may stand at each segment; `*` for any. No segments: the whole layer.
    segments: Vec<Vec<String>>,
    exact: bool,
    spaced: bool,
}

impl Wanted {
    fn text(&self) -> String {
        let (open, comma) = if self.spaced { ("{ ", " , ") } else { ("{", ",") };
        let braces = |items: Vec<String>| match items.as_slice() {
            [one] => one.clone(),
            many => format!("{open}{}}}", many.join(comma)),
        };
        let range = |(a, b): &(i32, i32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
        let mut pieces = Vec::new();
        if let Some(layers) = &self.layers {
            let all = layers.is_empty();
            let numbers = if all { "*".into() } else { braces(layers.iter().map(range).collect()) };
            pieces.push(format!("layers.{numbers}"));
        }
        pieces.extend(self.segments.iter().map(|names| braces(names.clone())));
        pieces.join(".") + if self.exact { "!" } else { "" }
    }

    /// By comparing texts segment by segment, for the site and what holds it.
    fn matches(&self, site: Site, layers: i32, ancestors: bool) -> bool {
        let layer_fits = match (&self.layers, site.layer) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(ranges), Some(layer)) => {
                let from_end = |n: i32| if n < 0 { n + layers } else { n };
                let inside =
                    |&(a, b): &(i32, i32)| from_end(a) <= layer as i32 && layer as i32 <= from_end(b);
                ranges.is_empty() || ranges.iter().any(inside)
            }
        };
        let local = |site: Site| {
            let text = site.to_string();
            match site.layer {
                Some(layer) => text.strip_prefix(&format!("layers.{layer}.")).unwrap().to_string(),
                None => text,
            }
        };
        let mut names = vec![local(site)];
        let mut at = site;
        while let Some(parent) = at.parent().filter(|_| ancestors && !self.exact) {
            at = parent;
            names.push(local(at));
        }
        if ancestors && !self.exact && site.expert.is_some() {
            names.push("mlp.experts".into());
        }
        let mut segments = self.segments.clone();
        match segments.iter().map(|s| s.join(",")).collect::<Vec<_>>().join(".").as_str() {
            "" => segments.push(vec!["block".into()]),
            "mlp.experts" => segments.push(vec!["*".into()]),
            _ => {}
        }
        let fits = |name: &String| {
            let words: Vec<&str> = name.split('.').collect();
            words.len() == segments.len()
                && words
                    .iter()
                    .zip(&segments)
                    .all(|(word, wanted)| wanted.iter().any(|w| w == "*" || w == word || number_in(w, word)))
        };
        layer_fits && names.iter().any(fits)
    }
}

/// Whether `word` is a number in the range `a-b`.
fn number_in(range: &str, word: &str) -> bool {
    let bounds =
        range.split_once('-').and_then(|(a, b)| Some((a.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
    matches!((bounds, word.parse::<u32>()), (Some((a, b)), Ok(n)) if a <= n && n <= b)
}

fn names(list: &[&str]) -> impl Strategy<Value = Vec<String>> {
    let owned: Vec<String> = list.iter().map(|s| s.to_string()).collect();
    let some = 1..=owned.len();
    prop_oneof![subsequence(owned, some), Just(vec!["*".to_string()])]
}

fn wanted() -> impl Strategy<Value = Wanted> {
    const TOP: [&str; 10] = [
        "block",
        "attn_sublayer",
        "attn_norm",
        "attn",
        "attn_post_norm",
        "mlp_sublayer",
        "mlp_norm",
        "mlp",
        "mlp_post_norm",
        "block",
    ];
    const GLOBAL: [&str; 4] = ["embed", "norm", "head", "attn"];
    let one = |name: &'static str| Just(vec![name.to_string()]);
    let range = (-5i32..5, -5i32..5).prop_filter("empty", |(a, b)| (*a < 0) != (*b < 0) || a <= b);
    let layers =
        prop_oneof![Just(None), Just(Some(vec![])), proptest::collection::vec(range, 1..4).prop_map(Some)];
    let numbers = select(vec!["0", "1", "7", "*", "0-1", "1-3"]).prop_map(|n| vec![n.to_string()]);
    let segments = prop_oneof![
        names(&TOP).prop_map(|n| vec![n]),
        (one("attn"), names(&["q", "k", "v", "o", "q_norm", "k_norm"])).prop_map(|(a, b)| vec![a, b]),
        (one("mlp"), names(&["gate", "up", "down", "router"])).prop_map(|(a, b)| vec![a, b]),
        (Just(vec!["*".to_string()]), names(&["q", "up", "down"])).prop_map(|(a, b)| vec![a, b]),
        Just(vec![vec!["mlp".to_string()], vec!["experts".to_string()]]),
        (one("mlp"), one("experts"), numbers.clone()).prop_map(|(a, b, c)| vec![a, b, c]),
        (one("mlp"), one("experts"), numbers, names(&["gate", "up", "down"]))
            .prop_map(|(a, b, c, d)| vec![a, b, c, d]),
    ];
    let global = names(&GLOBAL).prop_map(|n| (None, vec![n]));
    let local = (layers, segments);
    let whole = Just((Some(vec![(1, -1)]), vec![]));
    (prop_oneof![8 => local, 1 => global, 1 => whole], any::<bool>(), any::<bool>()).prop_map(
        |((layers, segments), exact, spaced)| {
            let everything = layers.is_none() && segments == [["*"]];
            Wanted { layers, segments, exact: exact && !everything, spaced }
        },
    )
}

/// What the pattern means by definition.
fn oracle(wanted: &Wanted, ancestors: bool) -> SiteSet {
    table().all().filter(|s| wanted.matches(s, 4, ancestors))
}

proptest! {
    #[test]
    fn text_round_trips(list in proptest::collection::vec(wanted(), 1..4), tensor in any::<bool>()) {
        let mut text = list.iter().map(Wanted::text).collect::<Vec<_>>().join(", ");
        if tensor {
            text.push_str(", re:layers\\.[0-3],x{2} ");
        }
        let selector: Selector = text.parse().unwrap();
        let again = selector.to_string();
        prop_assert_eq!(again.parse::<Selector>().unwrap(), selector.clone(), "{}", again);
        let json = serde_json::to_string(&selector).unwrap();
        prop_assert_eq!(serde_json::from_str::<Selector>(&json).unwrap(), selector);
    }

    #[test]
    fn matches_what_the_definition_says(wanted in wanted()) {
        let selector: Selector = wanted.text().parse().unwrap();
        let found = table().all().filter(|s| selector.matches(s, 4));
        prop_assert_eq!(&found, &oracle(&wanted, true), "{}", wanted.text());
        match selector.resolve(&table()) {
            Ok(sites) => prop_assert_eq!(sites, found),
            Err(e) => prop_assert!(found.is_empty() || e.message.starts_with("no layer") || e.message.starts_with("no expert"), "{}", e),
        }
    }

    #[test]
    fn a_list_is_a_union(a in wanted(), b in wanted()) {
        let (left, right): (Selector, Selector) = (a.text().parse().unwrap(), b.text().parse().unwrap());
        let both: Selector = format!("{left}, {right}").parse().unwrap();
        let table = table();
        match (left.resolve(&table), right.resolve(&table)) {
            (Ok(a), Ok(b)) => {
                let union: SiteSet = a.iter().chain(b.iter()).collect();
                prop_assert_eq!(both.resolve(&table), Ok(union));
            }
            (Err(first), _) => prop_assert_eq!(both.resolve(&table).unwrap_err().message, first.message),
            (_, Err(second)) => prop_assert_eq!(both.resolve(&table).unwrap_err().message, second.message),
        }
    }

    #[test]
    fn any_set_of_sites_can_be_written(picks in proptest::collection::vec(any::<Index>(), 1..40)) {
        let all: Vec<Site> = table().all().iter().collect();
        let sites: SiteSet = picks.iter().map(|i| all[i.index(all.len())]).collect();
        let selector = Selector::exactly(&sites).unwrap();
        prop_assert_eq!(selector.resolve(&table()), Ok(sites), "{}", selector);
        prop_assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
    }

    #[test]
    fn no_text_panics(text in any::<String>()) {
        check_error(&text);
    }

    #[test]
    fn no_text_of_the_right_letters_panics(text in "[a-z_.,{}*!0-9: \\-\u{e9}]{0,40}") {
        check_error(&text);
        check_error(&format!("layers.{text}"));
        check_error(&format!("re:{text}"));
    }

    #[test]
    fn no_damaged_selector_panics(wanted in wanted(), at in any::<Index>(), c in any::<char>()) {
        let mut text = wanted.text();
        let at = at.index(text.len());
        text.insert(at, c);
        check_error(&text);
        text.truncate(at);
        check_error(&text);
    }
}

/// Parses; if it fails the span lies in the text and the message prints.
fn check_error(text: &str) {
    match text.parse::<Selector>() {
        Ok(selector) => {
            assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector, "{text:?}");
            let _ = selector.resolve(&table());
        }
        Err(e) => {
            assert!(e.text.get(e.span.clone()).is_some(), "{e:?}");
            assert!(e.to_string().contains('^'));
        }
    }
}

/// Negative control: without what holds a site, the oracle disagrees with the selector.
#[test]
fn an_oracle_without_ancestors_is_wrong() {
    let wanted = Wanted { layers: None, segments: vec![vec!["mlp".into()]], exact: false, spaced: false };
    let found = "mlp".parse::<Selector>().unwrap().resolve(&table()).unwrap();
    assert_eq!(found, oracle(&wanted, true));
    assert_ne!(found, oracle(&wanted, false));
}

fn resolved(text: &str) -> Vec<String> {
    let sites = text.parse::<Selector>().unwrap().resolve(&table()).unwrap();
    sites.iter().map(|s| s.to_string()).collect()
}

#[test]
fn examples() {
    assert_eq!(resolved("layers.-1.attn.{q,v}"), ["layers.3.attn.q", "layers.3.attn.v"]);
    assert_eq!(resolved("layers.-4--3.attn.q"), ["layers.0.attn.q", "layers.1.attn.q"]);
    assert_eq!(
        resolved("layers.{0,2-3}.attn.q, head"),
        ["head", "layers.0.attn.q", "layers.2.attn.q", "layers.3.attn.q"]
    );
    assert_eq!(resolved("experts.1.up"), ["layers.2.mlp.experts.1.up", "layers.3.mlp.experts.1.up"]);
    assert_eq!(resolved("layers.2.mlp.experts.0").len(), 4);
    assert_eq!(resolved("layers.2.mlp!"), ["layers.2.mlp"]);
    assert_eq!(resolved("layers.2.mlp").len(), 10, "the module, the router and two experts of four sites");
    assert_eq!(resolved("layers.2.mlp.*").len(), 9, "what lies inside");
    assert_eq!(resolved("layers.0!"), ["layers.0.block"]);
    assert_eq!(resolved("layers.0").len(), 13);
    assert_eq!(resolved("re:layers\\.[01]\\.self_attn\\.[qk]_proj").len(), 4);
    assert_eq!(resolved("*").len(), table().entries().len());
    let norm = Site::layer(1, firebrick_core::Part::AttnNorm);
    let regex: Selector = "re:layernorm".parse().unwrap();
    assert!(!regex.matches(norm, 4), "a regular expression needs the tensor's name");
    assert!(regex.matches_entry(table().get(norm).unwrap(), 4));
}

#[test]
fn errors_point_and_suggest() {
    let error = |text: &str| match text.parse::<Selector>() {
        Err(e) => e,
        Ok(selector) => selector.resolve(&table()).expect_err(text),
    };
    for (text, marked, says) in [
        ("", "", "expected the name of a part"),
        ("attn,", "", "expected the name of a part"),
        ("attn,,mlp", ",", "expected the name of a part"),
        ("attn mlp", "m", "expected `,`"),
        ("layers.3.attm.q", "attm", "did you mean `attn`"),
        ("layers.3.attn.z", "z", "here may stand q, k, v"),
        ("attn.q_nrom", "q_nrom", "did you mean `q_norm`"),
        ("q", "q", "did you mean `attn.q`"),
        ("{attn,mlp}.q", "mlp", "no part with `mlp` here"),
        ("layers.0.head", "head", "write it without `layers.`"),
        ("head.q", "head", "nothing lies inside"),
        ("attn.q.weight", "attn.q.weight", "so many segments"),
        ("layers", "layers", "which layers"),
        ("layers.", "", "expected the number of a layer"),
        ("layers.x", "x", "expected the number of a layer"),
        ("layers.5-3", "5-3", "did you mean `3-5`"),
        ("layers.99999999999", "99999999999", "no model has"),
        ("layers.{1,2", "", "expected `,` or `}`"),
        ("layers.{}", "}", "expected the number"),
        ("experts.-1", "-1", "counted from 0"),
        ("experts.0.router", "router", "unknown part"),
        ("*!", "!", "leave out"),
        ("re:", "", "expected a regular expression"),
        ("re:(", "(", "unclosed group"),
        ("layers.4", "layers.4", "the model has layers 0-3"),
        ("attn.q, layers.{0,7-9}.mlp", "layers.{0,7-9}.mlp", "no layer 7-9"),
        ("layers.-9--5", "layers.-9--5", "no layer -9--5"),
        ("layers.3-0", "3-0", "did you mean `0-3`"),
        ("attn_post_norm", "attn_post_norm", "its parts are embed, block"),
        ("experts.5", "mlp.experts.5", "no expert 5: the model has experts 0-1"),
        ("experts.{0,900}", "mlp.experts.{0,900}", "no expert 900"),
        ("attn, experts.1-2, experts.{0-1,2-3}.up", "mlp.experts.{0-1,2-3}.up", "no expert 2-3"),
        ("re:rotary", "re:rotary", "a name is `model.embed_tokens.weight`"),
    ] {
        let e = error(text);
        assert_eq!(e.text.get(e.span.clone()), Some(marked), "{text}: {e}");
        assert!(e.message.contains(says), "{text}: {e}");
    }
    let shown = error("layers.3.attm.q").to_string();
    assert_eq!(shown, "unknown part `attm`; did you mean `attn`?\n  layers.3.attm.q\n           ^^^^");
    let long = format!("{}attm{}", "attn, ".repeat(1000), ", mlp".repeat(1000));
    assert!(error(&long).to_string().len() < 400, "a long selector is shown around the mistake");
    assert!(error(&"attn,".repeat(20_000)).message.contains("at most 65536"));
    assert!(error("re:(\\w{500}){500}").message.contains("not a regular expression"));
}
