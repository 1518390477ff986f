//! A tap on routing: how much each layer uses each of its experts or adapters.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use firebrick_core::{Base, Brick, Part, Run, Site, SiteSet};

use crate::{AdapterGates, ExpertLoads};

/// Adds up what routers decide in the layers of its sites: the slots that each expert of a [`MoeLayer`](crate::MoeLayer) serves, else the
/// [`AdapterGates`] of each adapter. Nothing is read from the device before [`ExpertTap::read`].
#[derive(Debug, Default)]
pub struct ExpertTap {
    sites: SiteSet,
    skip: usize,
    seen: RefCell<BTreeMap<usize, Seen>>,
}

/// What was seen of one layer.
#[derive(Debug, Default)]
struct Seen {
    tokens: u64,
    counts: Vec<u64>,
    /// Sums over tokens, `[adapters]`.
    gates: Option<Tensor<1>>,
}

/// How much one layer used its experts or adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertUse {
    /// Tokens that were routed.
    pub tokens: u64,
    /// For each expert the slots it served, or for each adapter the sum of its gates over these tokens.
    pub weights: Vec<f64>,
}

impl ExpertTap {
    /// At the blocks among `sites`.
    pub fn new(sites: &SiteSet) -> Self {
        ExpertTap { sites: sites.of_part(Part::Block), ..Default::default() }
    }

    /// Leaves out the gates of the first `tokens` of each sequence; the slots of experts are counted over all of them.
    pub fn skipping(self, tokens: usize) -> Self {
        ExpertTap { skip: tokens, ..self }
    }

    /// What was seen so far, by layer; layers in which nothing was routed are not there.
    pub fn read(&self) -> BTreeMap<usize, ExpertUse> {
        let seen = self.seen.borrow();
        let of = |(layer, seen): (&usize, &Seen)| {
            let weights = match &seen.gates {
                Some(gates) => gates.clone().into_data().iter::<f64>().collect(),
                None => seen.counts.iter().map(|n| *n as f64).collect(),
            };
            (*layer, ExpertUse { tokens: seen.tokens, weights })
        };
        seen.iter().map(of).collect()
    }
}

/// The slots of each expert of `layer` in this run so far; none if it has no experts.
fn slots(run: &Run<'_>, layer: usize) -> Option<Vec<u64>> {
    run.get::<ExpertLoads>()?.counts.get(&layer).cloned()
}

impl Brick for ExpertTap {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let layer = site.layer.expect("a block is a layer");
        let ([batch, tokens, _], before) = (x.dims(), slots(run, layer));
        let y = base(x, run);
        let kept = tokens.saturating_sub(self.skip);
        let mut all = self.seen.borrow_mut();
        match (slots(run, layer), run.get::<AdapterGates>()) {
            (Some(counts), _) => {
                let before = before.unwrap_or_else(|| vec![0; counts.len()]);
                let seen = all.entry(layer).or_default();
                seen.tokens += (batch * tokens) as u64;
                seen.counts.resize(counts.len(), 0);
                let new = counts.iter().zip(before).map(|(n, before)| n - before);
                seen.counts.iter_mut().zip(new).for_each(|(sum, n)| *sum += n);
            }
            (None, Some(gates)) if kept > 0 => {
                let gates = gates.weights().without_autodiff();
                let adapters = gates.dims()[2];
                let gates = gates.expand([batch, tokens, adapters]).narrow(1, self.skip, kept);
                let sum = gates.reshape([batch * kept, adapters]).sum_dim(0).reshape([adapters]);
                let seen = all.entry(layer).or_default();
                seen.tokens += (batch * kept) as u64;
                seen.gates = Some(match seen.gates.take() {
                    Some(sums) => sums + sum,
                    None => sum,
                });
            }
            _ => {}
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use firebrick_core::Seed;

    /// A block that leaves its input as it is, in a pass with these gates `[batch, tokens, adapters]`.
    fn pass(tap: &ExpertTap, gates: Tensor<3>, tokens: usize) {
        let bricks: [&dyn Brick; 1] = [tap];
        let mut run = Run::new(&bricks);
        run.insert(AdapterGates::new(gates));
        let x = Tensor::<3>::ones([2, tokens, 4], &Device::flex());
        for layer in [0, 3] {
            run.at(Site::layer(layer, Part::Block), x.clone(), &mut |x, _| x);
        }
    }

    fn tap() -> ExpertTap {
        ExpertTap::new(&[0, 3].map(|layer| Site::layer(layer, Part::Block)).into_iter().collect())
    }

    #[test]
    fn gates_of_every_token_but_the_first_are_summed_by_layer() {
        let device = Device::flex();
        let values: Vec<f32> =
            (0..2).flat_map(|_| [[1.0, 0.0, 0.0], [0.0, 0.25, 0.75], [0.0, 0.5, 0.5]]).flatten().collect();
        let gates = Tensor::<3>::from_data(TensorData::new(values, [2, 3, 3]), &device);
        let skipping = tap().skipping(1);
        assert!(skipping.read().is_empty());
        (0..2).for_each(|_| pass(&skipping, gates.clone(), 3));
        let wanted = ExpertUse { tokens: 8, weights: vec![0.0, 3.0, 5.0] };
        assert_eq!(skipping.read(), BTreeMap::from([(0, wanted.clone()), (3, wanted)]));
        let all = tap();
        pass(&all, gates, 3);
        assert_eq!(all.read()[&0], ExpertUse { tokens: 6, weights: vec![2.0, 1.5, 2.5] }, "control");
    }

    #[test]
    fn one_hot_gates_give_all_to_one_and_any_gates_sum_to_the_tokens() {
        let device = Device::flex();
        let one_hot = tap();
        // The same for every token.
        pass(&one_hot, AdapterGates::fixed(&[0.0, 1.0, 0.0], &device).weights(), 5);
        assert_eq!(one_hot.read()[&3], ExpertUse { tokens: 10, weights: vec![0.0, 10.0, 0.0] });
        let scores = TensorData::new(Seed(2).normal("scores", 2 * 7 * 4, 2.0), [2, 7, 4]);
        let gates = burn::tensor::activation::softmax(Tensor::<3>::from_data(scores, &device), 2);
        let soft = tap().skipping(2);
        pass(&soft, gates, 7);
        let found = &soft.read()[&0];
        assert_eq!(found.tokens, 10);
        assert!((found.weights.iter().sum::<f64>() - 10.0).abs() < 1e-5, "{found:?}");
        assert!(found.weights.iter().all(|w| *w > 0.0), "control: nothing is one-hot here");
    }
}
