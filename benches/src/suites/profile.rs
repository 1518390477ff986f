//! The profile of the embedded model, beside the forward passes over the same windows. Larger models take minutes a call.

use anyhow::Result;
use burn::tensor::{Int, Tensor};
use firebrick_analysis::{ProfileOptions, profile};
use firebrick_core::{Run, Silent};
use firebrick_models::ModelFiles;

use super::{load, tokens};
use crate::{Bench, Bound, Case};

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let files = ModelFiles::embedded()?;
    let decoder = load(&files, &bench.device)?;
    let options = ProfileOptions::default();
    let (windows, length) = (options.max_windows, options.window);
    let ids: Vec<u32> = (0..windows * length).map(|i| (i * 7919 % files.config.vocab) as u32).collect();
    let batches: Vec<Tensor<2, Int>> =
        tokens(files.config.vocab, windows, length, &bench.device).split(options.batch, 0);
    let case = Case {
        suite: "profile",
        name: format!("embedded {windows}x{length}"),
        dtype: "f32",
        unit: "s",
        amount: 1.0,
        bound: Bound::Unknown,
    };
    if !bench.asks_for(&case) {
        return Ok(());
    }
    let mut passes = Vec::new();
    let measured = bench.take(&case, None, &mut || {
        passes.push(bench.timed(|| {
            for ids in &batches {
                decoder.hidden(ids.clone(), &mut Run::default());
            }
            Ok(())
        })?);
        bench.timed(|| {
            profile(&decoder, &ids, &options, &Silent)?;
            Ok(())
        })
    })?;
    bench.add(measured.with_peer("its forward passes", &case, &passes[1..]));
    Ok(())
}
