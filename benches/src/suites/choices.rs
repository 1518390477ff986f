//! Log-likelihoods of choices: contexts shared and sequences batched, beside one sequence at a time.

use anyhow::{Context, Result};
use firebrick_core::Silent;
use firebrick_models::{Decoder, ModelFiles};
use firebrick_train::eval::{Batching, EvalTask, Request, TaskSettings, loglikelihoods, run_task};

use super::load;
use crate::{Bench, Bound, Case};

const BATCHING: Batching = Batching { longest: 1024, tokens: 2048 };

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    for (name, files) in bench.models {
        let decoder = load(files, &bench.device)?;
        for (task, shots) in [("gloss_pair", 0), ("gloss_rank", 0), ("gloss_rank", 4)] {
            let requests = requests(&decoder, files, task, shots)?;
            task_of(bench, &decoder, &format!("{name} {task}, {shots} shots"), &requests)?;
        }
    }
    Ok(())
}

/// What 40 items of the task ask.
fn requests(decoder: &Decoder, files: &ModelFiles, task: &str, shots: usize) -> Result<Vec<Request>> {
    let task = EvalTask::built_in(task).with_context(|| format!("no task {task}"))?;
    let settings = TaskSettings { shots: Some(shots), limit: Some(40), special: false, batching: BATCHING };
    let asked = run_task(decoder, &[], &files.tokenizer, &task, &settings, &Silent)?;
    let requests = asked.samples.iter().map(|s| {
        let texts: Vec<&str> = s.arguments.iter().map(|(_, text)| text.as_str()).collect();
        Request::encode(&files.tokenizer, &s.arguments[0].0, &texts, false)
    });
    Ok(requests.collect::<Result<_, _>>()?)
}

fn task_of(bench: &Bench<'_>, decoder: &Decoder, name: &str, requests: &[Request]) -> Result<()> {
    let one =
        |r: &Request, c: &Vec<u32>| Request { context: r.context.clone(), continuations: vec![c.clone()] };
    let single: Vec<Request> =
        requests.iter().flat_map(|r| r.continuations.iter().map(move |c| one(r, c))).collect();
    let case = Case {
        suite: "choices",
        name: name.into(),
        dtype: "f32",
        unit: "tok/s",
        amount: requests.iter().map(Request::tokens).sum::<usize>() as f64,
        bound: Bound::Unknown,
    };
    if !bench.asks_for(&case) {
        return Ok(());
    }
    let score = |requests: &[Request]| -> Result<()> {
        loglikelihoods(decoder, &[], requests, BATCHING, &Silent)?;
        Ok(())
    };
    let mut alone = Vec::new();
    let measured = bench.take(&case, None, &mut || {
        alone.push(bench.timed(|| single.chunks(1).try_for_each(score))?);
        bench.timed(|| score(requests))
    })?;
    bench.add(measured.with_peer("one at a time", &case, &alone[1..]));
    Ok(())
}
