//! Generation: where it ends, and what it refuses.

use std::ops::ControlFlow;

use burn::tensor::Device;
use firebrick_core::{Run, Seed};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{
    AdjustLogits, Decoder, DecoderConfig, GenerateOptions, ModelError, generate, generate_with, token_tensor,
};

fn decoder() -> Decoder {
    let config = DecoderConfig { max_tokens: 20, ..DecoderConfig::tiny(40) };
    Decoder::random(config, Seed(3), &Device::flex()).unwrap()
}

/// Warm, so that the tokens are not all one, and cold enough for small logits to count.
fn sampler() -> Sampler {
    Sampler::new(Sampling { temperature: 0.05, seed: Seed(1), ..Sampling::default() }).unwrap()
}

fn run(prompt: &[u32], options: &GenerateOptions) -> Result<Vec<u32>, ModelError> {
    let go = &mut |_| ControlFlow::Continue(());
    generate(&decoder(), &[], prompt, &mut sampler(), options, go)
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

#[test]
fn the_cache_changes_nothing() {
    let cached = run(&[1, 2, 3], &options(10)).unwrap();
    assert_eq!(cached.len(), 10);
    assert!(cached.iter().any(|id| *id != cached[0]), "control: {cached:?}");
    let slow = GenerateOptions { use_cache: false, ..options(10) };
    assert_eq!(run(&[1, 2, 3], &slow).unwrap(), cached);
    assert_ne!(run(&[3, 2, 1], &options(10)).unwrap(), cached, "control");
}

#[test]
fn a_stop_token_ends_the_text_and_is_left_out() {
    let all = run(&[1, 2], &options(10)).unwrap();
    let first = all.iter().position(|id| *id == all[5]).unwrap();
    let stopping = GenerateOptions { stop: vec![all[5]], ..options(10) };
    assert_eq!(run(&[1, 2], &stopping).unwrap(), all[..first]);
    let unseen = (0..40).find(|id| !all.contains(id)).unwrap();
    let other = GenerateOptions { stop: vec![unseen], ..options(10) };
    assert_eq!(run(&[1, 2], &other).unwrap(), all, "control");
}

#[test]
fn the_caller_can_break_off() {
    let all = run(&[1, 2], &options(10)).unwrap();
    let mut seen = Vec::new();
    let stop = &mut |id| {
        seen.push(id);
        if seen.len() == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let found = generate(&decoder(), &[], &[1, 2], &mut sampler(), &options(10), stop).unwrap();
    assert_eq!((&found[..], &seen[..]), (&all[..4], &all[..4]), "the last token belongs to the text");
}

#[test]
fn logits_can_be_changed_before_a_token_is_drawn() {
    let decoder = decoder();
    let with = |adjust: &mut AdjustLogits<'_>| {
        let go = &mut |_| ControlFlow::Continue(());
        generate_with(&decoder, &[], &[1, 2, 3], &mut sampler(), &options(10), adjust, go)
    };
    let plain = run(&[1, 2, 3], &options(10)).unwrap();

    let mut seen = Vec::new();
    let watch = &mut |history: &[u32], logits: &mut [f32]| {
        seen.push((history.to_vec(), logits.to_vec()));
        Ok(())
    };
    assert_eq!(with(watch).unwrap(), plain, "looking changes nothing");
    assert_eq!(seen.len(), 10);
    for (step, (history, logits)) in seen.iter().enumerate() {
        assert_eq!(history[..], [&[1, 2, 3], &plain[..step]].concat()[..]);
        let alone = decoder.forward(token_tensor(&[history], &Device::flex()), &mut Run::default());
        let alone = alone.narrow(1, history.len() - 1, 1).into_data().try_into_vec_as::<f32>().unwrap();
        let far = logits.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-6, "step {step}: {far}");
    }

    let force = &mut |history: &[u32], logits: &mut [f32]| {
        logits.fill(f32::NEG_INFINITY);
        logits[history.len()] = 0.0;
        Ok(())
    };
    assert_eq!(with(force).unwrap(), (3..13).collect::<Vec<u32>>(), "what is left is drawn");
    assert_ne!(plain, (3..13).collect::<Vec<u32>>(), "control");
    let fail = &mut |_: &[u32], _: &mut [f32]| Err(ModelError::Generate("no companion".into()));
    assert!(with(fail).unwrap_err().to_string().contains("no companion"));
}

#[test]
fn what_can_not_be_continued_is_refused() {
    let message = |prompt: &[u32], n| run(prompt, &options(n)).unwrap_err().to_string();
    assert!(message(&[], 1).contains("no tokens"));
    assert!(message(&[1, 40], 1).contains("token 40"));
    assert!(message(&[1; 11], 10).contains("exceed"));
    assert!(message(&[1; 11], usize::MAX).contains("exceed"));
    assert_eq!(run(&[1; 11], &options(9)).unwrap().len(), 9, "the context may be filled");
    assert!(run(&[1], &options(0)).unwrap().is_empty());
}
