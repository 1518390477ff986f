//! A forward pass without the head, 2 x 256 tokens.

use anyhow::Result;
use firebrick_core::Run;

use super::{forward_flop, load, tokens};
use crate::{Bench, Bound, Case};

const BATCH: usize = 2;
const LENGTH: usize = 256;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        let decoder = load(files, &bench.device)?;
        let ids = tokens(files.config.vocab, BATCH, LENGTH, &bench.device);
        let case = Case {
            suite: "forward",
            name: format!("{name} {BATCH}x{LENGTH}"),
            dtype: "f32",
            unit: "tok/s",
            amount: (BATCH * LENGTH) as f64,
            bound: Bound::Compute(forward_flop(&files.config, files.sites(), BATCH, LENGTH)),
        };
        let peer = bench.model_peer("forward.py", files, &[])?;
        bench.measure(&case, peer, &mut || {
            bench.timed(|| {
                decoder.hidden(ids.clone(), &mut Run::default());
                Ok(())
            })
        })?;
    }
    Ok(())
}
