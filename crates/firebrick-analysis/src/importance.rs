//! Importance of the inputs of linear layers: their mean squares, as llama.cpp's `imatrix` measures them.

use std::collections::BTreeMap;

use firebrick_core::{Brick, Progress, Run, Task};
use firebrick_models::Decoder;
use firebrick_tensor::imatrix::{Importance, ImportanceMatrix};

use crate::profile::{ProfileOptions, check, embed};
use crate::{AnalysisError, SecondMoments};

/// Windows per forward pass.
const BATCH: usize = 4;

/// Sums of the squared inputs of every linear layer inside the blocks, over the whole windows of `window` tokens in `ids`, by name
/// of the weight in GGUF.
///
/// One forward pass, block by block: the second moments of one block are all that is held beside the residual streams.
///
/// # Errors
/// Too short a text, ids outside the vocabulary, activations that are not finite, and [`AnalysisError::Cancelled`] once `progress`
/// says so.
pub fn importance(
    decoder: &Decoder,
    ids: &[u32],
    window: usize,
    progress: &dyn Progress,
) -> Result<ImportanceMatrix, AnalysisError> {
    check(decoder, ids, &ProfileOptions { window, ..ProfileOptions::default() })?;
    let count = ids.len() / window;
    if count == 0 {
        return Err(AnalysisError::TooFewTokens { have: ids.len(), need: window });
    }
    let windows: Vec<_> = (0..count).map(|i| i * window..(i + 1) * window).collect();
    let mut streams: Vec<_> = embed(decoder, &[], ids, &windows, BATCH).map(|(x, _)| x).collect();
    let family = decoder.config().family();
    let mut entries = BTreeMap::new();
    let layers = decoder.sites().layers();
    let mut task = Task::begin(progress, "importance", Some(layers as u64), "layers");
    for layer in 0..layers {
        let sites = decoder.sites().block_linears().filter(|s| s.layer == Some(layer));
        let moments = SecondMoments::new(&sites);
        let bricks: [&dyn Brick; 1] = [&moments];
        for x in &mut streams {
            *x = decoder.block(layer, x.clone(), &mut Run::new(&bricks));
            progress.check()?;
        }
        for site in sites.iter() {
            let Some(name) = family.gguf_name(site) else { continue };
            let squares = moments.squares(site)?;
            if squares.iter().any(|v| !v.is_finite()) {
                return Err(AnalysisError::Site { site, what: "its inputs are not finite".into() });
            }
            let sums = squares.iter().map(|v| *v as f32).collect();
            entries.insert(name, Importance { sums, counts: vec![(count * window) as f32] });
        }
        task.advance(1, "")?;
    }
    Ok(ImportanceMatrix { entries, datasets: Vec::new(), chunks: count as u32, chunk_size: window as u32 })
}
