//! What GPTQ loses at each layer and number of bits: the losses that a plan of bits for GPTQ needs.
//!
//! A profile's bit losses are those of rounding to nearest. Of that error GPTQ leaves between a half and a two-hundredth, by how much a
//! layer's inputs are alike, so plans from it spend bits where GPTQ needs none.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use firebrick_analysis::{Profile, SecondMoments, input_site, weight_on_host};
use firebrick_core::{Brick, Progress, Run, Site, Task};
use firebrick_models::{Decoder, token_tensor};
use firebrick_tensor::grid::Grid;
use rayon::prelude::*;

use crate::gptq::GptqConfig;
use crate::rtn::rtn;
use crate::sequential::Input;
use crate::{Method, QuantError, QuantizedMatrix};

/// `profile` with the `error`, `relative` and `rise` of every layer and number of bits turned from round-to-nearest's into GPTQ's.
///
/// Every layer is quantized by itself on the grid of the profile, with the rest of `decoder` intact, on the windows (the
/// profile's length) of `text`. The errors of the profile are scaled by the ratio of the two quantizers' output errors on that text.
/// A layer whose Hessian cannot be factored keeps its losses, as [`quantize`](crate::quantize) then rounds it to nearest.
///
/// # Errors
/// Settings out of range, no full window of text, layers of another model, numbers that are not finite, and cancellation.
pub fn gptq_bit_losses(
    mut profile: Profile,
    decoder: &Decoder,
    text: &[u32],
    config: GptqConfig,
    progress: &dyn Progress,
) -> Result<Profile, QuantError> {
    let options = profile.options.clone();
    let window = options.window.max(2);
    if text.len() < window {
        return Err(QuantError::NoCalibration { tokens: text.len(), window });
    }
    let vocab = decoder.config().vocab;
    if let Some(id) = text.iter().find(|id| **id as usize >= vocab) {
        return Err(QuantError::Setting(format!("token {id} lies outside the vocabulary of {vocab}")));
    }
    if let Some(linear) = profile.linear.iter().find(|l| decoder.sites().linear(l.site).is_none()) {
        let what = "the profile has this layer, the model does not".into();
        return Err(QuantError::Site { site: linear.site, what });
    }
    let device = decoder.device();
    let mut streams: Vec<Tensor<3>> = text
        .chunks_exact(window)
        .map(|ids| decoder.embed(token_tensor(&[ids], &device), &mut Run::default()))
        .collect();
    let layers = decoder.config().layers;
    let mut task = Task::begin(progress, "GPTQ losses", Some(layers as u64), "layers");
    for layer in 0..layers {
        let sites = decoder.sites().block_linears().filter(|s| s.layer == Some(layer));
        let moments = SecondMoments::new(&sites);
        let bricks: [&dyn Brick; 1] = [&moments];
        for x in &mut streams {
            *x = decoder.block(layer, x.clone(), &mut Run::new(&bricks));
        }
        let inputs = Input::of(&sites, &moments, Method::Gptq(config))?;
        let weights: Vec<(Site, Vec<f32>)> = sites
            .iter()
            .map(|site| Ok((site, weight_on_host(decoder, site)?.0)))
            .collect::<Result<_, QuantError>>()?;
        let work: Vec<_> = weights.iter().flat_map(|w| options.bits.iter().map(move |b| (w, *b))).collect();
        let ratios: BTreeMap<(Site, u8), f64> = work
            .par_iter()
            .map(|((site, weight), bits)| {
                let ratio = ratio(weight, &inputs[&input_site(*site)], options.grid(*bits));
                let ratio = ratio.map_err(|e| QuantError::Site { site: *site, what: e.to_string() })?;
                Ok(((*site, *bits), ratio))
            })
            .collect::<Result<_, QuantError>>()?;
        for linear in profile.linear.iter_mut().filter(|l| l.site.layer == Some(layer)) {
            for loss in &mut linear.bits {
                let ratio = ratios.get(&(linear.site, loss.bits)).copied().unwrap_or(1.0);
                loss.error *= ratio;
                loss.relative *= ratio;
                loss.rise *= ratio;
            }
        }
        task.advance(1, "")?;
    }
    profile.quantizer = "gptq".into();
    Ok(profile)
}

/// GPTQ's squared error of the output over that of round-to-nearest; 1 where there is no factored Hessian.
fn ratio(weight: &[f32], input: &Input, grid: Grid) -> Result<f64, QuantError> {
    let Some(factor) = &input.factor else { return Ok(1.0) };
    let error = |q: &QuantizedMatrix| {
        input.energy(q.difference(weight)).map_err(|e| QuantError::Setting(e.to_string()))
    };
    let found = factor.quantize(weight, grid)?.0;
    let nearest = error(&rtn(weight, found.d_in, grid)?)?;
    Ok(if nearest > 0.0 { error(&found)? / nearest } else { 1.0 })
}
