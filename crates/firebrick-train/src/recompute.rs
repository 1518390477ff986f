//! Gradients block by block: of each block only the input is kept, and its activations are computed again for the backward pass.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use firebrick_core::{Brick, Mode, Run, Seed};
use firebrick_models::Decoder;

use crate::Batch;

/// A decoder with the bricks in force.
#[derive(Clone, Copy)]
pub struct Wired<'a> {
    /// The wiring.
    pub decoder: &'a Decoder,
    /// The last one on top.
    pub bricks: &'a [&'a dyn Brick],
}

/// The mean negative log-likelihood of a batch, auxiliary losses included, divided by `passes`, and its gradients for the parameters of
/// `module`, which is (in) one of the bricks of `tracked` or its decoder. Nothing if the loss depends on none of them.
///
/// `untracked` is the same with [`Module::no_grad`], for the pass that finds the inputs of blocks: tracked, a block's activations would
/// stay until its gradients are taken.
///
/// The memory of one block's activations in place of all, for a second forward pass (Chen et al. 2016, arXiv 1604.06174). Every
/// block is passed in a run of its own with the same seed: bricks that hand something from block to block through
/// the run (gates, router state) do not fit here.
pub fn recompute<M: Module>(
    tracked: Wired<'_>,
    untracked: Wired<'_>,
    module: &M,
    batch: &Batch,
    seed: Seed,
    passes: usize,
) -> Option<(Tensor<1>, GradientsParams)> {
    fn begin<'a>(bricks: &'a [&'a dyn Brick], batch: &Batch, seed: Seed) -> Run<'a> {
        let mut run = Run::new(bricks);
        (run.mode, run.seed, run.tokens) = (Mode::Train, seed, Some(batch.tokens.clone()));
        batch.enter(&mut run);
        run
    }
    let Wired { decoder, bricks } = untracked;
    let layers = decoder.config().layers;
    let mut x = decoder.embed(batch.tokens.clone(), &mut begin(bricks, batch, seed)).detach();
    let mut inputs = Vec::with_capacity(layers);
    for layer in 0..layers {
        inputs.push(x.clone());
        x = decoder.block(layer, x, &mut begin(bricks, batch, seed)).detach();
    }

    let Wired { decoder, bricks } = tracked;
    let run = || begin(bricks, batch, seed);
    let mut found = Found { accumulator: GradientsAccumulator::new(), total: None, module, passes };
    let (x, mut top) = (x.require_grad(), run());
    let loss = batch.mean(decoder.nll_after(x.clone(), batch.tokens.clone(), &mut top));
    let mut gradient = found.backward(Some(loss), None, &top, Some(&x));
    for (layer, x) in inputs.into_iter().enumerate().rev() {
        let (x, mut run) = (x.require_grad(), run());
        let y = decoder.block(layer, x.clone(), &mut run);
        gradient = found.backward(None, gradient.map(|gradient| (y, gradient)), &run, Some(&x));
    }
    let mut bottom = run();
    let y = decoder.embed(batch.tokens.clone(), &mut bottom);
    found.backward(None, gradient.map(|gradient| (y, gradient)), &bottom, None);
    let gradients = found.accumulator.grads();
    match gradients.is_empty() {
        true => None,
        false => found.total.map(|total| (total, gradients)),
    }
}

/// What the segments add up to.
struct Found<'a, M> {
    accumulator: GradientsAccumulator<M>,
    total: Option<Tensor<1>>,
    module: &'a M,
    passes: usize,
}

impl<M: Module> Found<'_, M> {
    /// Takes the gradients of one segment: of its own share of the loss, and of its result `y` along the gradient of `y` that
    /// came from above. Returns the one of its input.
    fn backward(
        &mut self,
        own: Option<Tensor<1>>,
        above: Option<(Tensor<3>, Tensor<3>)>,
        run: &Run<'_>,
        input: Option<&Tensor<3>>,
    ) -> Option<Tensor<3>> {
        let own = [own, run.total_loss()].into_iter().flatten().reduce(|a, b| a + b);
        let own = own.map(|own| if self.passes == 1 { own } else { own / self.passes as f64 });
        if let Some(own) = &own {
            let own = own.clone().inner();
            self.total = Some(match self.total.take() {
                Some(total) => total + own,
                None => own,
            });
        }
        let above = above.map(|(y, gradient)| (y * Tensor::from_inner(gradient)).sum());
        let sum = [own, above].into_iter().flatten().reduce(|a, b| a + b).filter(Tensor::is_tracked)?;
        let mut gradients = sum.backward();
        let below = input.and_then(|x| x.grad_remove(&mut gradients));
        self.accumulator.accumulate(self.module, GradientsParams::from_grads(gradients, self.module));
        below
    }
}
