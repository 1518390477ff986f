//! One file per verb.

pub mod completions;
pub mod convert;
pub mod devices;
pub mod diff;
pub mod embed;
pub mod eval;
pub mod extract_lora;
pub mod fetch;
pub mod generate;
pub mod imatrix;
pub mod inspect;
pub mod man;
pub mod merge;
pub mod profile;
pub mod prune;
pub mod quantize;
pub mod train;
pub mod transplant;

use anyhow::Result;

use crate::args::{Cli, Usage, Verb};
use crate::ui::Terminal;

/// Runs the verb of the command line.
pub fn run(cli: &Cli, terminal: &Terminal) -> Result<()> {
    let global = &cli.global;
    if let Some(threads) = global.threads {
        if threads == 0 {
            return Err(Usage("--threads 0: at least one thread is needed".into()).into());
        }
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    // This thread is one of a pool of its own: it works on what it asks for in place of sleeping until others have done it.
    let threads = global.threads.unwrap_or(0); // 0: as many as rayon's global pool, which need not be started to know
    let _pool = rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build()?;
    let idle = matches!(
        cli.verb,
        Verb::Embed(_)
            | Verb::Generate(_)
            | Verb::Inspect(_)
            | Verb::Diff(_)
            | Verb::Fetch(_)
            | Verb::Devices(_)
            | Verb::Completions(_)
            | Verb::Man(_)
    );
    if global.dry_run && idle {
        return Err(Usage("--dry-run: this verb writes nothing that could be foreseen".into()).into());
    }
    match &cli.verb {
        Verb::Specialize(v) => v.run(global, terminal),
        Verb::Eval(v) => v.run(global, terminal),
        Verb::Generate(v) => v.run(global, terminal),
        Verb::Embed(v) => v.run(global, terminal),
        Verb::Train(v) => v.run(global, terminal),
        Verb::Profile(v) => v.run(global, terminal),
        Verb::Merge(v) => v.run(global, terminal),
        Verb::ExtractLora(v) => v.run(global, terminal),
        Verb::Transplant(v) => v.run(global, terminal),
        Verb::Quantize(v) => v.run(global, terminal),
        Verb::Prune(v) => v.run(global, terminal),
        Verb::Convert(v) => v.run(global, terminal),
        Verb::Imatrix(v) => v.run(global, terminal),
        Verb::Inspect(v) => v.run(global, terminal),
        Verb::Diff(v) => v.run(global, terminal),
        Verb::Fetch(v) => v.run(terminal),
        Verb::Devices(v) => v.run(global, terminal),
        Verb::Completions(v) => v.run(),
        Verb::Man(v) => v.run(global, terminal),
    }
}
