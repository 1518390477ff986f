//! Negative log-likelihoods of chosen tokens, read back once per batch.

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Site};
use firebrick_models::Decoder;
use firebrick_tensor::ops;

use crate::{TrainError, token_tensor};

/// Token ids of which those from `first` (at least 1) on are scored, each given all before it.
pub(super) struct Row<'a> {
    pub ids: &'a [u32],
    pub first: usize,
}

/// Refuses ids that the model has no embedding for: a device would read some other row, or none.
pub(super) fn check_ids<'a>(
    ids: impl IntoIterator<Item = &'a u32>,
    decoder: &Decoder,
) -> Result<(), TrainError> {
    let (id, vocab) = (ids.into_iter().copied().max().unwrap_or(0), decoder.config().vocab);
    if id as usize >= vocab { Err(TrainError::UnknownToken { id, vocab }) } else { Ok(()) }
}

/// Stacks rows of any length into `[rows, tokens]`, filled up on the right, which causal attention never sees.
pub(super) fn padded(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let longest = rows.iter().map(|r| r.len()).max().unwrap_or(0);
    if rows.iter().all(|r| r.len() == longest) {
        return token_tensor(rows, device);
    }
    let fill = |r: &&[u32]| r.iter().copied().chain(std::iter::repeat_n(0, longest - r.len())).collect();
    let rows: Vec<Vec<u32>> = rows.iter().map(fill).collect();
    token_tensor(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), device)
}

/// Nats of `targets[i]` at position `at[i]` = (row, token) of `hidden: [rows, tokens, d_model]`.
pub(super) fn nats_at(
    decoder: &Decoder,
    hidden: Tensor<3>,
    at: &[(usize, usize)],
    targets: &[u32],
    run: &mut Run<'_>,
) -> Result<Vec<f64>, TrainError> {
    let [rows, tokens, _] = hidden.dims();
    let device = hidden.device();
    let ints = |values: Vec<i32>| {
        let n = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [n]), &device)
    };
    let places = ints(at.iter().map(|&(row, token)| (row * tokens + token) as i32).collect());
    let targets = ints(targets.iter().map(|&id| id as i32).collect());
    let pick = |x: Tensor<3>| {
        let width = x.dims()[2];
        x.reshape([rows * tokens, width]).select(0, places.clone())
    };
    let nats = if run.is_bare(Site::global(Part::Head)) {
        ops::linear_cross_entropy(pick(hidden), decoder.head_weight(), targets, decoder.precision())
    } else {
        // A brick at the head may look at the shape of the batch: it gets all of it.
        ops::cross_entropy(pick(decoder.logits(hidden, run)), targets)
    };
    read(nats)
}

/// The values of a tensor that no gradient is recorded for.
pub(super) fn read<const D: usize>(values: Tensor<D>) -> Result<Vec<f64>, TrainError> {
    if values.is_tracked() {
        return Err(TrainError::Tracked);
    }
    let data = values.try_into_data().map_err(|e| TrainError::Device(e.to_string()))?;
    Ok(data.iter::<f64>().collect())
}

/// Nats of the scored tokens of each row.
pub(super) fn score(
    decoder: &Decoder,
    bricks: &[&dyn Brick],
    rows: &[Row<'_>],
) -> Result<Vec<Vec<f64>>, TrainError> {
    // The last token is predicted and predicts nothing.
    let fed: Vec<&[u32]> = rows.iter().map(|r| &r.ids[..r.ids.len() - 1]).collect();
    let mut run = Run::new(bricks);
    let hidden = decoder.hidden(padded(&fed, &decoder.device()), &mut run);
    let at: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(i, r)| (r.first..r.ids.len()).map(move |j| (i, j - 1))).collect();
    let targets: Vec<u32> = rows.iter().flat_map(|r| r.ids[r.first..].iter().copied()).collect();
    let mut nats = nats_at(decoder, hidden, &at, &targets, &mut run)?.into_iter();
    Ok(rows.iter().map(|r| nats.by_ref().take(r.ids.len() - r.first).collect()).collect())
}
