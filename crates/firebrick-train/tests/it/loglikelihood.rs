use burn::tensor::Device;
use firebrick_core::{Brick, Part, Silent, Site, Skip};
use firebrick_train::TrainError;
use firebrick_train::eval::{Batching, Request, loglikelihoods};

use crate::plain::nats;
use crate::tiny::{VOCAB, decoder, noise};

const WIDE: Batching = Batching { longest: 512, tokens: 4096 };

/// Requests of many shapes: contexts that share beginnings and not, continuations of 1 to 6 tokens, some of which begin with
/// others.
fn requests(shared: usize) -> Vec<Request> {
    let ids = noise(4000).ids;
    let beginning = &ids[..shared];
    (0..25)
        .map(|i| {
            let rest = &ids[100 + 37 * i..][..1 + i * 5 % 23];
            let first = ids[2000 + i];
            let mut continuations = vec![vec![first], vec![first, 7], vec![first, 7, 9, 11, 2, 3]];
            continuations.extend((0..i % 4).map(|j| ids[3000 + 9 * i + j..][..1 + j].to_vec()));
            Request { context: [beginning, rest].concat(), continuations }
        })
        .collect()
}

/// Each sequence by itself.
fn one_at_a_time(requests: &[Request]) -> Vec<Vec<f64>> {
    let decoder = decoder(&Device::flex());
    let one = |r: &Request, c: &Vec<u32>| {
        -nats(&decoder, &[&r.context[..], c].concat(), r.context.len()).iter().sum::<f64>()
    };
    requests.iter().map(|r| r.continuations.iter().map(|c| one(r, c)).collect()).collect()
}

fn ask(requests: &[Request], bricks: &[&dyn Brick], batching: Batching) -> Vec<Vec<f64>> {
    loglikelihoods(&decoder(&Device::flex()), bricks, requests, batching, &Silent).unwrap()
}

/// The largest difference.
fn apart(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn they_equal_one_sequence_at_a_time_for_any_batch() {
    for shared in [0, 3, 40] {
        let requests = requests(shared);
        let want = one_at_a_time(&requests);
        for tokens in [1, 100, 700, 4096] {
            let found = ask(&requests, &[], Batching { longest: 512, tokens });
            let apart = apart(&found, &want);
            assert!(apart < 2e-5, "{shared} shared, {tokens} tokens: {apart}");
        }
    }
    // The control: what is found depends on the context.
    let mut moved = requests(40);
    moved[3].context[0] += 1;
    assert!(apart(&ask(&moved, &[], WIDE), &one_at_a_time(&requests(40))) > 1e-4);
}

#[test]
fn permuted_continuations_have_permuted_answers() {
    let forward = requests(20);
    let backward: Vec<Request> = forward
        .iter()
        .rev()
        .map(|r| Request { continuations: r.continuations.iter().rev().cloned().collect(), ..r.clone() })
        .collect();
    let mut found = ask(&backward, &[], WIDE);
    found.reverse();
    found.iter_mut().for_each(|f| f.reverse());
    assert!(apart(&found, &ask(&forward, &[], WIDE)) < 1e-5);
    found[0].swap(0, 2);
    assert!(apart(&found, &ask(&forward, &[], WIDE)) > 1.0, "control: the order matters");
}

#[test]
fn single_continuations_need_no_pass_before_the_last() {
    let single: Vec<Request> = requests(30)
        .into_iter()
        .map(|r| Request { continuations: r.continuations[..1].to_vec(), ..r })
        .collect();
    assert!(apart(&ask(&single, &[], WIDE), &one_at_a_time(&single)) < 2e-5);
}

#[test]
fn long_sequences_lose_their_beginning() {
    let decoder = decoder(&Device::flex());
    let request = &requests(40)[24];
    let found = ask(std::slice::from_ref(request), &[], Batching { longest: 12, tokens: 100 });
    for (c, found) in request.continuations.iter().zip(&found[0]) {
        let ids = [&request.context[..], c].concat();
        let cut = &ids[ids.len().saturating_sub(13)..];
        let want: f64 = -nats(&decoder, cut, cut.len() - c.len()).iter().sum::<f64>();
        assert!((found - want).abs() < 1e-5, "{found} {want}");
    }
    assert!(apart(&found_whole(request), &found) > 1e-4, "control: the beginning counts");
}

fn found_whole(request: &Request) -> Vec<Vec<f64>> {
    ask(std::slice::from_ref(request), &[], WIDE)
}

#[test]
fn bricks_count_and_layers_without_keys_do_not_confuse_positions() {
    let requests = requests(20);
    let nothing = Skip::default();
    let first = Skip { sites: [Site::layer(0, Part::Block)].into_iter().collect() };
    assert_eq!(ask(&requests, &[&nothing], WIDE), ask(&requests, &[], WIDE));
    let skipped = ask(&requests, &[&first], WIDE);
    assert!(apart(&skipped, &ask(&requests, &[], WIDE)) > 1e-4);
    let narrow = Batching { longest: 512, tokens: 1 };
    assert!(apart(&skipped, &ask(&requests, &[&first], narrow)) < 2e-5);
}

#[test]
fn wrong_requests_are_errors() {
    let decoder = decoder(&Device::flex());
    let fail = |context: &[u32], continuation: &[u32], longest| {
        let request = Request { context: context.to_vec(), continuations: vec![continuation.to_vec()] };
        loglikelihoods(&decoder, &[], &[request], Batching { longest, tokens: 9 }, &Silent).unwrap_err()
    };
    assert!(matches!(fail(&[], &[1], 9), TrainError::EmptyRequest { index: 0 }));
    assert!(matches!(fail(&[1], &[], 9), TrainError::EmptyRequest { .. }));
    assert!(matches!(fail(&[1], &[VOCAB], 9), TrainError::UnknownToken { .. }));
    assert!(matches!(fail(&[1], &[1; 4], 3), TrainError::TooLong { tokens: 4, longest: 3 }));
    assert!(ask(&[], &[], WIDE).is_empty());
}
