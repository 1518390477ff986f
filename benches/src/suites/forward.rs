//! A forward pass without the head, 2 x 256 tokens.

use anyhow::Result;
use firebrick_core::Run;

use super::{compute, dtype, forward_flop, load_in, tokens};
use crate::{Bench, Case};

const BATCH: usize = 2;
const LENGTH: usize = 256;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        let ids = tokens(files.config.vocab, BATCH, LENGTH, &bench.device);
        for precision in bench.precisions() {
            let decoder = load_in(files, precision, &bench.device)?;
            let flop = forward_flop(&files.config, files.sites(), BATCH, LENGTH);
            let case = Case {
                suite: "forward",
                name: format!("{name} {BATCH}x{LENGTH}"),
                dtype: dtype(precision),
                unit: "tok/s",
                amount: (BATCH * LENGTH) as f64,
                bound: compute(flop, precision),
            };
            let peer = || bench.model_peer("forward.py", files, &[dtype(precision)]);
            bench.measure(&case, peer, &mut || {
                bench.timed(|| {
                    decoder.hidden(ids.clone(), &mut Run::default());
                    Ok(())
                })
            })?;
        }
    }
    Ok(())
}
