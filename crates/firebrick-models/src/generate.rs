//! Text generation: greedy or sampled, token by token, with a key-value cache.

use std::ops::ControlFlow;

use firebrick_core::{Brick, Run};
use firebrick_tensor::ops;

use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::sampling::Sampler;
use crate::tokens::token_tensor;

/// When to stop, and whether to keep keys and values.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not part of the result.
    pub stop: Vec<u32>,
    /// Keep keys and values of earlier tokens; without it every step runs the whole text again (slow; for checks).
    pub use_cache: bool,
    /// Keep them as f16, see [`KvCache::in_f16`](firebrick_tensor::ops::KvCache::in_f16).
    pub half_cache: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions { max_tokens: 128, stop: Vec::new(), use_cache: true, half_cache: false }
    }
}

/// Continues `prompt` and returns the new tokens; `on_token` sees each one as it comes and can break off.
///
/// # Errors
/// If the prompt is empty or has an id that the embedding has no row for, prompt and new tokens exceed the model's
/// context, or the logits are not finite.
pub fn generate(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, ModelError> {
    generate_with(decoder, bricks, prompt, sampler, options, &mut |_, _| Ok(()), on_token)
}

/// Changes logits before a token is drawn of them: takes the tokens so far (the prompt included) and the logits `[vocab]` of
/// the next one.
pub type AdjustLogits<'a> = dyn FnMut(&[u32], &mut [f32]) -> Result<(), ModelError> + 'a;

/// [`generate`] with a hand on every step: `adjust` may change the logits before the sampler sees them. It runs once a step, in
/// front of penalties, temperature and filters; a logit of minus infinity is a token that can't be drawn.
///
/// # Errors
/// As [`generate`], and whatever `adjust` fails with.
pub fn generate_with(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    adjust: &mut AdjustLogits<'_>,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>, ModelError> {
    let (limit, vocab) = (decoder.config().max_tokens, decoder.config().vocab);
    if prompt.is_empty() {
        return Err(ModelError::Generate("the prompt has no tokens".into()));
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
        return Err(ModelError::Generate(format!("the prompt has token {id}, the model knows {vocab}")));
    }
    let capacity = prompt.len().checked_add(options.max_tokens).filter(|n| *n <= limit);
    let Some(capacity) = capacity else {
        return Err(ModelError::Generate(format!(
            "{} prompt tokens and {} new ones exceed the model's context of {limit}",
            prompt.len(),
            options.max_tokens
        )));
    };
    let device = decoder.device();
    let mut run = Run::new(bricks);
    if options.use_cache {
        let cache = decoder.kv_cache(1, capacity);
        run.insert(if options.half_cache { cache.in_f16() } else { cache });
    }
    let mut ids = prompt.to_vec();
    let mut next = prompt.to_vec();
    for _ in 0..options.max_tokens {
        if !options.use_cache {
            run = Run::new(bricks);
            next.clone_from(&ids);
        }
        let length = next.len();
        let logits = ops::awake(&device, || {
            let hidden = decoder.hidden(token_tensor(&[&next], &device), &mut run);
            decoder.logits(hidden.narrow(1, length - 1, 1), &mut run)
        });
        let mut logits: Vec<f32> =
            logits.into_data().try_into_vec_as::<f32>().map_err(|e| ModelError::Backend(format!("{e:?}")))?;
        adjust(&ids, &mut logits)?;
        let token = sampler.sample(&logits, &ids)?;
        if options.stop.contains(&token) {
            break;
        }
        ids.push(token);
        next = vec![token];
        if on_token(token).is_break() {
            break;
        }
    }
    Ok(ids.split_off(prompt.len()))
}
