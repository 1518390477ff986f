//! Mixture-of-experts layers in place of a decoder's feed-forward networks: every token is served, none is dropped.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Base, Brick, Mode, Part, Run, Seed, Site, SiteSet};
use firebrick_tensor::ops::{self, grouped_swiglu, swiglu};
use serde::{Deserialize, Serialize};

use crate::{AuxNorm, DispatchPlan, MoeError, RouterConfig, Routing, TopKRouter};
use crate::{router_z_loss, switch_balance_loss};

/// The SwiGLU experts of one layer, stacked.
#[derive(Module, Debug)]
pub struct ExpertBank {
    /// `[experts, d_model, d_ff]`.
    pub gate: Param<Tensor<3>>,
    /// `[experts, d_model, d_ff]`.
    pub up: Param<Tensor<3>>,
    /// `[experts, d_ff, d_model]`.
    pub down: Param<Tensor<3>>,
}

impl ExpertBank {
    /// Experts with uniform initial weights in `±1/sqrt(d_in)`, each from a stream of its own.
    pub fn random(
        layer: usize,
        experts: usize,
        d_model: usize,
        d_ff: usize,
        seed: Seed,
        device: &Device,
    ) -> Self {
        let stack = |part: Part, d_in: usize, d_out: usize| {
            let bound = (d_in as f64).powf(-0.5);
            let draw =
                |e| seed.uniform(&format!("moe.init/{}", Site::expert(layer, part, e)), d_in * d_out, bound);
            let values: Vec<f32> = (0..experts).flat_map(draw).collect();
            Param::from_data(TensorData::new(values, [experts, d_in, d_out]), device)
        };
        ExpertBank {
            gate: stack(Part::MlpGate, d_model, d_ff),
            up: stack(Part::MlpUp, d_model, d_ff),
            down: stack(Part::MlpDown, d_ff, d_model),
        }
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.gate.lazy_shape()[0]
    }

    /// Outputs `[rows, d_model]` of rows `x: [rows, d_model]` sorted by expert; expert `e` has the rows
    /// `offsets[e]..offsets[e + 1]`.
    pub fn grouped(&self, x: Tensor<2>, offsets: &[usize]) -> Tensor<2> {
        grouped_swiglu(x, self.gate.val(), self.up.val(), self.down.val(), offsets)
    }

    /// Output `[rows, d_model]` of expert `e` for `x: [rows, d_model]`.
    pub fn expert(&self, e: usize, x: Tensor<2>) -> Tensor<2> {
        let of = |stack: &Param<Tensor<3>>| stack.val().narrow(0, e, 1).squeeze_dim::<2>(0);
        let (gate, up) = (x.clone().matmul(of(&self.gate)), x.matmul(of(&self.up)));
        swiglu(gate, up).matmul(of(&self.down))
    }

    /// `[d_model, d_ff]`, or what does not fit, in words.
    fn widths(&self) -> Result<[usize; 2], String> {
        let dims = |stack: &Param<Tensor<3>>| stack.lazy_shape().dims::<3>();
        let (gate, up, down) = (dims(&self.gate), dims(&self.up), dims(&self.down));
        let [experts, d_model, d_ff] = gate;
        match up == gate && down == [experts, d_ff, d_model] {
            true => Ok([d_model, d_ff]),
            false => Err(format!("experts of gate {gate:?}, up {up:?}, down {down:?}")),
        }
    }
}

/// How tokens get to their experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// Rows sorted by expert, one grouped product per weight: every token passes `top_k` experts.
    #[default]
    Grouped,
    /// Every expert sees every token, weighted by 0 where it was not chosen: the plain reference, at
    /// `experts / top_k` times the work.
    Loop,
}

/// Auxiliary losses of a layer in training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Balance {
    /// Weight of [`switch_balance_loss`], averaged over layers; 0 for none.
    pub alpha: f64,
    /// What loads are divided by.
    pub norm: AuxNorm,
    /// Weight of [`router_z_loss`], averaged over layers; 0 for none.
    pub z: f64,
}

impl Default for Balance {
    /// Switch's weight 0.01, loads per slot, no z-loss.
    fn default() -> Self {
        Balance { alpha: 1e-2, norm: AuxNorm::PerSlot, z: 0.0 }
    }
}

/// How many slots each expert served in the passes of one [`Run`]; kept in the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertLoads {
    /// Slots of each expert, by layer.
    pub counts: BTreeMap<usize, Vec<u64>>,
}

impl ExpertLoads {
    /// Adds the slots each expert of `layer` served.
    pub fn add(&mut self, layer: usize, counts: &[usize]) {
        let sums = self.counts.entry(layer).or_insert_with(|| vec![0; counts.len()]);
        sums.iter_mut().zip(counts).for_each(|(sum, &n)| *sum += n as u64);
    }

    /// The coefficient of variation of the loads of `layer` (standard deviation by mean): 0 when balanced,
    /// `sqrt(experts - 1)` when one expert has everything; `None` if the layer served nothing.
    pub fn variation(&self, layer: usize) -> Option<f64> {
        let counts = self.counts.get(&layer)?;
        let n = counts.len() as f64;
        let mean = counts.iter().sum::<u64>() as f64 / n;
        let variance = counts.iter().map(|&c| (c as f64 - mean).powi(2)).sum::<f64>() / n;
        (mean > 0.0).then(|| variance.sqrt() / mean)
    }
}

/// Router and experts of one layer.
#[derive(Module, Debug)]
struct MoeBlock {
    router: TopKRouter,
    experts: ExpertBank,
}

/// Mixtures of experts at the `mlp` sites of some layers, in place of the feed-forward networks there.
///
/// In [`Mode::Train`] every layer adds its share of the losses `balance` and `z` to the run. Each pass adds to the
/// run's [`ExpertLoads`]. A layer reads its chosen experts back to the host once per pass.
#[derive(Module, Debug)]
pub struct MoeLayer {
    blocks: Vec<MoeBlock>,
    #[module(skip)]
    layout: Layout,
}

#[derive(Clone, Debug)]
struct Layout {
    /// The layer of each block, ascending.
    layers: Vec<usize>,
    sites: SiteSet,
    dispatch: Dispatch,
    balance: Balance,
}

impl MoeLayer {
    /// Random routers and experts in `layers`.
    ///
    /// # Errors
    /// See [`RouterConfig::check`] and [`MoeLayer::from_parts`].
    pub fn random(
        layers: &[usize],
        d_model: usize,
        d_ff: usize,
        router: &RouterConfig,
        seed: Seed,
        device: &Device,
    ) -> Result<Self, MoeError> {
        let part = |&layer: &usize| {
            let site = Site::layer(layer, Part::Mlp);
            let routing = TopKRouter::new(d_model, router.clone(), site, seed, device)?;
            Ok((layer, routing, ExpertBank::random(layer, router.experts, d_model, d_ff, seed, device)))
        };
        Self::from_parts(layers.iter().map(part).collect::<Result<_, MoeError>>()?)
    }

    /// The mixture of these layers, routers and experts, with the default [`Balance`] and [`Dispatch`].
    ///
    /// # Errors
    /// If there are none, a layer comes twice or tensors do not fit together; every problem is listed.
    pub fn from_parts(mut parts: Vec<(usize, TopKRouter, ExpertBank)>) -> Result<Self, MoeError> {
        parts.sort_by_key(|part| part.0);
        let mut problems = Vec::new();
        if parts.is_empty() {
            problems.push("no layers".to_string());
        }
        for pair in parts.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            problems.push(format!("layer {} comes twice", pair[0].0));
        }
        for (layer, router, experts) in &parts {
            let [d, count] = router.weight.lazy_shape().dims();
            match experts.widths() {
                Err(what) => problems.push(format!("layer {layer}: {what}")),
                Ok([d_model, _]) if (d_model, experts.experts()) != (d, count) => problems.push(format!(
                    "layer {layer}: a router of width {d} over {count} experts, beside {} experts of width {d_model}",
                    experts.experts()
                )),
                Ok(_) => {}
            }
        }
        if !problems.is_empty() {
            return Err(MoeError::Shapes { problems });
        }
        let layers: Vec<usize> = parts.iter().map(|part| part.0).collect();
        let sites = layers.iter().map(|&l| Site::layer(l, Part::Mlp)).collect();
        let blocks = parts.into_iter().map(|(_, router, experts)| MoeBlock { router, experts }).collect();
        let layout = Layout { layers, sites, dispatch: Dispatch::default(), balance: Balance::default() };
        Ok(MoeLayer { blocks, layout })
    }

    /// The same with other auxiliary losses.
    pub fn with_balance(mut self, balance: Balance) -> Self {
        self.layout.balance = balance;
        self
    }

    /// The same with another way for tokens to get to their experts.
    pub fn with_dispatch(mut self, dispatch: Dispatch) -> Self {
        self.layout.dispatch = dispatch;
        self
    }

    /// Router and experts of each layer, in order.
    pub fn parts(&self) -> impl Iterator<Item = (usize, &TopKRouter, &ExpertBank)> {
        self.layout.layers.iter().zip(&self.blocks).map(|(&layer, b)| (layer, &b.router, &b.experts))
    }

    fn losses(&self, routing: &Routing, counts: &[usize], run: &mut Run<'_>) {
        let Balance { alpha, norm, z } = self.layout.balance;
        let layers = self.layout.layers.len() as f64;
        if alpha > 0.0 {
            let loss = switch_balance_loss(&routing.probs, counts, norm);
            run.add_loss("balance", loss * (alpha / layers));
        }
        if z > 0.0 {
            run.add_loss("z", router_z_loss(&routing.logits) * (z / layers));
        }
    }
}

impl MoeBlock {
    /// Sort, three grouped products, unsort and weigh.
    fn grouped(&self, x: Tensor<2>, routing: &Routing, plan: &DispatchPlan) -> Tensor<2> {
        let rows = self.experts.grouped(ops::permute(x, plan.order()), plan.offsets());
        let weights = routing.weights.clone().cast(rows.dtype());
        ops::unpermute(rows, weights, plan.order())
    }

    fn one_by_one(&self, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let mut sum = x.zeros_like();
        for e in 0..self.experts.experts() {
            let others = routing.indices.clone().not_equal_scalar(e as i64);
            let weight = routing.weights.clone().mask_fill(others, 0.0).sum_dim(1);
            sum = sum + self.experts.expert(e, x.clone()) * weight.cast(x.dtype());
        }
        sum
    }
}

impl Brick for MoeLayer {
    fn sites(&self) -> &SiteSet {
        &self.layout.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, _base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let layer = site.layer.expect("an `mlp` site is in a layer");
        let at = self.layout.layers.binary_search(&layer).expect("called at its own sites");
        let block = &self.blocks[at];
        let [batch, length, d] = x.dims();
        let x = x.reshape([batch * length, d]);
        let routing = block.router.route(x.clone(), site, run);
        let slots: Vec<usize> =
            routing.indices.clone().into_data().iter::<i64>().map(|expert| expert as usize).collect();
        let plan = DispatchPlan::new(&slots, block.experts.experts());
        let counts = plan.counts();
        run.state::<ExpertLoads>().add(layer, &counts);
        if run.mode == Mode::Train {
            self.losses(&routing, &counts, run);
        }
        let y = match self.layout.dispatch {
            Dispatch::Grouped => block.grouped(x, &routing, &plan),
            Dispatch::Loop => block.one_by_one(x, &routing),
        };
        y.reshape([batch, length, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_add_up_and_their_variation_is_known() {
        let mut loads = ExpertLoads::default();
        loads.add(2, &[1, 5]);
        loads.add(2, &[5, 1]);
        loads.add(0, &[4, 0, 0, 0, 0]);
        loads.add(1, &[0, 0]);
        assert_eq!(loads.counts[&2], [6, 6]);
        assert_eq!(loads.variation(2), Some(0.0));
        assert!((loads.variation(0).unwrap() - 2.0).abs() < 1e-12);
        assert_eq!((loads.variation(1), loads.variation(3)), (None, None));
    }

    #[test]
    fn parts_that_do_not_fit_are_all_named() {
        let device = Device::flex();
        let router = |d| {
            let config = RouterConfig::new(3, 2, true);
            TopKRouter::new(d, config, Site::layer(0, Part::Mlp), Seed(0), &device).unwrap()
        };
        let bank = |experts, d| ExpertBank::random(0, experts, d, 6, Seed(0), &device);
        let crossed = ExpertBank { down: bank(3, 5).down, ..bank(3, 4) };
        let parts = vec![(1, router(4), bank(2, 4)), (0, router(4), crossed), (1, router(5), bank(3, 4))];
        let error = MoeLayer::from_parts(parts).unwrap_err().to_string();
        for what in
            ["layer 1 comes twice", "layer 0: experts of gate [3, 4, 6]", "beside 2 experts", "of width 5"]
        {
            assert!(error.contains(what), "{error}");
        }
        assert!(matches!(MoeLayer::from_parts(vec![]), Err(MoeError::Shapes { .. })));
        assert!(MoeLayer::from_parts(vec![(7, router(4), bank(3, 4))]).is_ok());
    }
}
